//! Measures how much the log probabilities of a tiny checkpoint depend on the precision that it is
//! computed in.
//!
//! Where two experts of a token are nearly equal, or where the result of a head nearly vanishes
//! before it is normalised, rounding decides. No tolerance for all steps of such a checkpoint is
//! right: it is too wide for most steps, or too narrow for a few.

use crate::golden::{Case, teacher_forced_errors, tiny, tiny_cases};
use crate::random::Random;
use half::bf16;
use quell::{CpuOptions, Engine, EngineConfig, LoadOptions};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::sync::{Mutex, OnceLock};
use tempfile::TempDir;

/// How often the weights are changed.
const TRIALS: u64 = 16;

/// How much of a weight is changed at most: as much of it as rounding to float16 changes of a
/// number.
const CHANGE: f32 = 1.0 / 2048.0;

/// How a checkpoint reacts to small changes of its weights, in float32 on the CPU.
pub struct Conditioning {
    /// For each step of each case, the largest change of a log probability in any trial.
    pub steps: Vec<f32>,
    /// The median of the changes of all log probabilities in all trials.
    pub median: f32,
}

/// Returns how the tiny checkpoint `name` reacts. It is measured once per test program.
pub fn of(name: &str) -> &'static Conditioning {
    static KNOWN: Mutex<BTreeMap<String, &OnceLock<Conditioning>>> = Mutex::new(BTreeMap::new());
    let known = *KNOWN
        .lock()
        .unwrap()
        .entry(name.to_owned())
        .or_insert_with(|| Box::leak(Box::default()));
    known.get_or_init(|| measure(name))
}

/// Changes every weight of the tiny checkpoint `name` at random and by a little, and compares its
/// log probabilities with the reference.
fn measure(name: &str) -> Conditioning {
    let cases = tiny_cases(name);
    let trials = (0..TRIALS).map(|trial| {
        let folder = changed(name, &mut Random(trial));
        let config = EngineConfig {
            kv_cache_bytes: Some(8 << 20),
            ..EngineConfig::default()
        };
        let options = LoadOptions {
            cpu: CpuOptions {
                threads: Some(1),
                ..CpuOptions::default()
            },
            ..LoadOptions::cpu()
        };
        let engine = Engine::load_with(folder.path(), config, options).unwrap();
        let errors = |case: &Case| step_errors(&engine, case);
        cases.iter().flat_map(errors).collect()
    });
    let trials: Vec<Vec<Vec<f32>>> = trials.collect();
    let steps = (0..trials[0].len()).map(|step| {
        let of_step = trials.iter().flat_map(|steps| &steps[step]);
        of_step.copied().fold(0.0, f32::max)
    });
    Conditioning {
        steps: steps.collect(),
        median: median(trials.iter().flatten().flatten().copied().collect()),
    }
}

/// Returns the errors of the log probabilities of each step of a case.
pub fn step_errors(engine: &Engine, case: &Case) -> Vec<Vec<f32>> {
    let mut errors = teacher_forced_errors(engine, case, 512).into_iter();
    let steps = case.steps.iter();
    let steps: Vec<_> = steps
        .map(|step| errors.by_ref().take(step.top.len()).collect())
        .collect();
    assert_eq!(errors.len(), 0);
    steps
}

/// Returns the median of some errors.
pub fn median(mut errors: Vec<f32>) -> f32 {
    errors.sort_by(f32::total_cmp);
    errors[errors.len() / 2]
}

/// Writes the checkpoint `name` with changed weights, in float32.
fn changed(name: &str, random: &mut Random) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::copy(
        tiny(name).join("config.json"),
        folder.path().join("config.json"),
    )
    .unwrap();
    let file = fs::read(tiny(name).join("model.safetensors")).unwrap();
    let (length, rest) = file.split_first_chunk().unwrap();
    let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
    let mut header: Value = serde_json::from_slice(header).unwrap();
    let mut weights = Vec::new();
    for (name, tensor) in header.as_object_mut().unwrap() {
        if name == "__metadata__" {
            continue;
        }
        assert_eq!(tensor["dtype"], "BF16", "{name}");
        let offset = |index: usize| tensor["data_offsets"][index].as_u64().unwrap() as usize;
        let begin = weights.len();
        let (stored, rest) = data[offset(0)..offset(1)].as_chunks();
        assert!(rest.is_empty(), "{name}");
        for &bytes in stored {
            let share = CHANGE * (2.0 * random.share() as f32 - 1.0);
            let weight = bf16::from_le_bytes(bytes).to_f32() * (1.0 + share);
            weights.extend(weight.to_le_bytes());
        }
        tensor["dtype"] = json!("F32");
        tensor["data_offsets"] = json!([begin, weights.len()]);
    }
    let header = header.to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.bytes());
    file.extend(weights);
    fs::write(folder.path().join("model.safetensors"), file).unwrap();
    folder
}
