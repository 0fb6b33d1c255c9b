//! How much the server has to do.

use std::error::Error;

/// Why a measurement failed.
pub type Failure = Box<dyn Error + Send + Sync>;

/// Number of streams, and number of tokens per stream.
#[derive(Clone, Copy)]
pub struct Load {
    pub streams: usize,
    pub tokens: usize,
}
