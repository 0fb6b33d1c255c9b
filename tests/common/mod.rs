//! Code that several test files share.

pub mod gguf_writer;
pub mod quantize;
