//! The CUDA device on the virtual GPU, or on a real one if the machine has one.

#[path = "../common/constraint.rs"]
mod constraint;
#[path = "../common/golden.rs"]
mod golden;
#[path = "../common/gpu.rs"]
mod gpu;
#[path = "../common/groups.rs"]
mod grouped;
#[path = "../common/http.rs"]
mod http;
mod layer;
#[path = "../common/model.rs"]
mod model;
#[path = "../common/model_groups.rs"]
mod model_groups;
#[path = "../common/record.rs"]
mod record;
#[path = "../common/refusals.rs"]
mod refusals;
#[path = "../common/requests.rs"]
mod requests;
#[path = "../common/serve.rs"]
mod serve;
#[path = "../cpu/support.rs"]
mod support;

mod attention;
mod cache;
mod device;
mod engine;
mod experts;
mod golden_models;
mod groups;
mod linear;
mod program;
mod recorded;
mod rope;
mod rowwise;
mod sampling;
mod smollm2;
