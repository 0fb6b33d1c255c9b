//! Model files and tokenizers: what is read from them, and what the models answer.

mod delta_files;
mod embedding;
mod fuzz_seeds;
mod golden_gguf;
mod golden_quantised;
mod golden_smollm2;
mod golden_tiny;
mod latent;
mod model_files;
mod random_weights;
mod refused_metadata;
mod tokenizer;
mod ways;
