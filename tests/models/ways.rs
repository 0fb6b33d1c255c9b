//! Every checkpoint of the fixtures gives the same bits in whatever way the engine computes its
//! answers.

use common::golden::checkpoints;
use common::ways::{Lengths, Undisturbed};
use quell::{Activations, CpuOptions, Engine, EngineConfig, LoadOptions, Preemption};
use std::path::Path;

fn load(path: &Path, config: EngineConfig) -> Engine {
    let options = LoadOptions {
        cpu: CpuOptions {
            activations: Activations::F32,
            threads: Some(2),
            ..CpuOptions::default()
        },
        ..LoadOptions::cpu()
    };
    Engine::load_with(path, config, options)
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn for_every_checkpoint(check: impl Fn(&Undisturbed)) {
    for path in checkpoints() {
        check(&Undisturbed::new(&path, &load, Lengths::LONG));
    }
}

#[test]
fn chunks_of_a_prompt_change_no_bit_of_any_checkpoint() {
    for_every_checkpoint(|undisturbed| {
        for chunk in [1, 7, 16, 64] {
            undisturbed.agrees_in_chunks(chunk);
        }
    });
}

#[test]
fn preemption_changes_no_bit_of_any_checkpoint() {
    for_every_checkpoint(|undisturbed| {
        undisturbed.agrees_after_preemption(Preemption::Recompute);
        undisturbed.agrees_after_preemption(Preemption::Swap);
    });
}

#[test]
fn cached_prefixes_change_no_bit_of_any_checkpoint() {
    for_every_checkpoint(|undisturbed| undisturbed.agrees_after_a_prefix_hit());
}

#[test]
fn sessions_change_no_bit_of_any_checkpoint() {
    for_every_checkpoint(|undisturbed| undisturbed.agrees_in_a_session());
}
