//! Every model with recurrent layers, and one for each other layout of the KV cache, gives the same
//! bits in whatever way the engine computes its answers. `tests/models/ways.rs` has all checkpoints
//! on the CPU device, and `make test-cuda-all` runs all of them on the virtual GPU, too.

use common::cuda::load_options;
use common::golden::{checkpoints, gguf, tiny};
use common::gpu;
use common::ways::{Lengths, Undisturbed};
use quell::{CudaActivations, CudaOptions, Engine, EngineConfig, Preemption};
use std::path::{Path, PathBuf};

fn load(path: &Path, config: EngineConfig) -> Engine {
    let options = load_options(CudaOptions {
        activations: CudaActivations::F16,
        ..CudaOptions::default()
    });
    Engine::load_with(path, config, options)
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn check(path: PathBuf, lengths: Lengths) {
    check_chunks(&path, lengths, &[7]);
}

fn check_chunks(path: &Path, lengths: Lengths, chunks: &[usize]) {
    let _gpu = gpu::lock();
    let undisturbed = Undisturbed::new(path, &load, lengths);
    for chunk in chunks {
        undisturbed.agrees_in_chunks(*chunk);
    }
    undisturbed.agrees_after_preemption(Preemption::Recompute);
    undisturbed.agrees_after_preemption(Preemption::Swap);
    undisturbed.agrees_after_a_prefix_hit();
    undisturbed.agrees_in_a_session();
}

/// With `QUELL_EVERY_CHECKPOINT`, all checkpoints and more chunks; else one that no other test has.
#[test]
fn every_checkpoint_has_the_same_bits() {
    if std::env::var_os("QUELL_EVERY_CHECKPOINT").is_none() {
        return check(tiny("llama4"), Lengths::SHORT);
    }
    for path in checkpoints() {
        println!("{}", path.display());
        check_chunks(&path, Lengths::SHORT, &[1, 7, 16, 64]);
    }
}

macro_rules! same_bits {
    ($($test:ident: $path:expr, $lengths:ident;)*) => {$(
        #[test]
        fn $test() {
            check($path, Lengths::$lengths);
        }
    )*};
}

same_bits! {
    llama_has_the_same_bits: tiny("llama"), SHORT;
    // Windows.
    gpt_oss_has_the_same_bits: tiny("gpt-oss"), LONG;
    // Latents.
    deepseek_v3_has_the_same_bits: tiny("deepseek-v3"), SHORT;
    // Heads of two sizes, windows, and layers that share the cache of others.
    gemma4_has_the_same_bits: tiny("gemma4"), SHORT;
    gemma3n_has_the_same_bits: tiny("gemma3n"), SHORT;
    // States beside keys and values.
    qwen3_next_has_the_same_bits: tiny("qwen3-next"), SHORT;
    qwen3_5_has_the_same_bits: gguf("qwen3.5"), SHORT;
    qwen3_5_moe_has_the_same_bits: tiny("qwen3.5-moe"), SHORT;
    lfm2_has_the_same_bits: tiny("lfm2"), SHORT;
    lfm2_moe_has_the_same_bits: tiny("lfm2-moe"), SHORT;
    granite_hybrid_has_the_same_bits: gguf("granite-hybrid"), SHORT;
    nemotron_h_has_the_same_bits: tiny("nemotron-h"), SHORT;
}
