//! The CUDA device on the virtual GPU, or on a real one if the machine has one.

mod layer;

mod attention;
mod blas;
mod cache;
mod device;
mod embedding;
mod engine;
mod experts;
mod golden_models;
mod groups;
mod latent;
mod linear;
mod memory;
mod program;
mod recorded;
mod recurrent;
mod residual;
mod rope;
mod rowwise;
mod sampling;
mod smollm2;
mod uneven;
mod ways;
