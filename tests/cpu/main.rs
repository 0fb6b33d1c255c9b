//! The CPU device, operation by operation, against plain reference code.

#[path = "../common/groups.rs"]
mod grouped;
#[path = "../common/model_groups.rs"]
mod model_groups;
mod support;

mod attention;
mod groups;
mod linear;
mod operations;
mod quant_reference;
