//! The CPU device, operation by operation, against plain reference code.

mod attention;
mod delta;
mod groups;
mod linear;
mod operations;
mod quant_reference;
mod recurrent;
mod ungated;
