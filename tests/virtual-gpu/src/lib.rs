//! A GPU that is not there: the CUDA driver API on the CPU, for tests.

pub mod ptx;
