//! A GPU that is not there: the CUDA driver API on the CPU, for tests.
//!
//! As a dynamic library it calls itself `libcuda.so`: load it by its path before the
//! driver is looked for, and whoever asks for the driver finds it.

pub mod driver;
pub mod ptx;
