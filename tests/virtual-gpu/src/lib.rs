//! A virtual GPU for tests: the CUDA driver API on the CPU.
//!
//! As a dynamic library its name is `libcuda.so`. Load it by its path before the program looks
//! for the driver; the program will then find it under that name.

pub mod bounds;
pub mod cublaslt;
pub mod driver;
pub mod ptx;
