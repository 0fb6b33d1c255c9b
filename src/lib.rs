//! quell: an inference engine for large language models.

pub mod device;
pub mod sampling;
pub mod text;
pub mod weights;
