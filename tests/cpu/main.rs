//! The CPU device, operation by operation, against plain reference code.

mod support;

mod attention;
mod linear;
mod operations;
mod quant_reference;
