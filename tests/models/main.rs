//! Model files and tokenizers: what is read from them, and what the models answer.

#[path = "../common/clients.rs"]
mod clients;
#[path = "../common/mod.rs"]
mod common;
#[path = "../common/golden.rs"]
mod golden;
#[path = "../common/model.rs"]
mod model;

mod fuzz_seeds;
mod golden_gguf;
mod golden_smollm2;
mod golden_tiny;
mod model_files;
mod random_weights;
mod tokenizer;
