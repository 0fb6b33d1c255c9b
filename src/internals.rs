//! The engine's parts, for the tests and benches of this repository (feature `internals`).
//!
//! They are not part of the public API: anything here may change in any release.

macro_rules! parts {
    ($($part:ident)*) => {
        $(
            pub mod $part {
                pub use crate::$part::*;
            }
        )*
    };
}

parts!(cache config device engine model runner sampling schedule text weights);

#[cfg(feature = "server")]
pub mod server {
    pub use crate::server::fields::*;
}
