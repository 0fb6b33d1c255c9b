//! Compares an engine with reference outputs, by the rule in ARCHITECTURE.md.

use quell::{Engine, EngineConfig, Request, SamplingParams, TokenStream};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// One step of a reference: the most likely tokens with their log probabilities.
pub struct Step {
    pub token: u32,
    /// Difference between the two highest log probabilities.
    pub margin: f32,
    pub top: Vec<(u32, f32)>,
}

pub struct Case {
    pub name: String,
    pub prompt: Vec<u32>,
    pub steps: Vec<Step>,
}

/// How far an engine may differ from a reference.
#[derive(Clone, Copy, Debug)]
pub struct Tolerance {
    pub max: f32,
    /// The greedy token may differ where the reference's margin is below this.
    pub margin: f32,
}

/// Path of the folder of a tiny checkpoint.
pub fn tiny(name: &str) -> PathBuf {
    crate::root().join("tests/fixtures/golden/tiny").join(name)
}

/// Path of a tiny checkpoint as a GGUF file that llama.cpp's converter made.
pub fn gguf(name: &str) -> PathBuf {
    let folder = crate::root().join("tests/fixtures/golden/gguf");
    folder.join(format!("{name}.gguf"))
}

/// Returns every tiny checkpoint, first those that are folders and then those that are GGUF files.
pub fn checkpoints() -> Vec<PathBuf> {
    let mut paths = Vec::new();
    for folder in [tiny(""), gguf("").parent().unwrap().to_owned()] {
        let entries = std::fs::read_dir(folder).unwrap();
        let mut entries: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
        assert!(!entries.is_empty());
        entries.sort();
        paths.extend(entries);
    }
    paths
}

/// Reads the token ids of a reference file.
pub fn ids(value: &Value) -> Vec<u32> {
    let ids = value.as_array().unwrap().iter();
    ids.map(|id| id.as_u64().unwrap() as u32).collect()
}

/// Path of the folder of a quantised checkpoint.
pub fn quantised(name: &str) -> PathBuf {
    let folder = crate::root().join("tests/fixtures/golden/quantised");
    folder.join(name)
}

/// Returns the configuration of engines that are compared with a reference: small steps, so that
/// the longest prompt is prefilled in chunks.
pub fn small_steps() -> EngineConfig {
    EngineConfig {
        max_batch_tokens: Some(32),
        kv_cache_bytes: Some(8 << 20),
        audit: true,
        ..EngineConfig::default()
    }
}

/// Reads the reference of a tiny checkpoint.
pub fn tiny_cases(name: &str) -> Vec<Case> {
    cases(&tiny(name))
}

/// Reads the reference in a folder.
pub fn cases(folder: &Path) -> Vec<Case> {
    let name = folder.file_name().unwrap().to_str().unwrap();
    let text = std::fs::read_to_string(folder.join("golden.json")).unwrap();
    let golden: Value = serde_json::from_str(&text).unwrap();
    let step = |step: &Value| {
        let logprobs = step["top_logprobs"].as_array().unwrap().iter();
        let logprobs = logprobs.map(|value| value.as_f64().unwrap() as f32);
        let top: Vec<(u32, f32)> = ids(&step["top_ids"]).into_iter().zip(logprobs).collect();
        Step {
            token: step["token"].as_u64().unwrap() as u32,
            margin: top[0].1 - top[1].1,
            top,
        }
    };
    let case = |case: &Value| Case {
        name: name.to_owned(),
        prompt: ids(&case["prompt_ids"]),
        steps: case["steps"].as_array().unwrap().iter().map(step).collect(),
    };
    golden["cases"]
        .as_array()
        .unwrap()
        .iter()
        .map(case)
        .collect()
}

/// Reads the reference of the demo model: one value per case.
pub fn smollm2_reference() -> Vec<Value> {
    let path = crate::root().join("tests/fixtures/golden/smollm2-135m-instruct-q4_1.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// Parses one case of [`smollm2_reference`].
pub fn smollm2_case(value: &Value) -> Case {
    let step = |step: &Value| {
        let top = step["top"]
            .as_array()
            .map(Vec::as_slice)
            .unwrap_or_default();
        let entry = |entry: &Value| {
            (
                entry[0].as_u64().unwrap() as u32,
                entry[1].as_f64().unwrap() as f32,
            )
        };
        Step {
            token: step["token"].as_u64().unwrap() as u32,
            margin: step["margin"].as_f64().unwrap() as f32,
            top: top.iter().map(entry).collect(),
        }
    };
    Case {
        name: value["name"].as_str().unwrap().to_owned(),
        prompt: ids(&value["prompt_ids"]),
        steps: value["steps"]
            .as_array()
            .unwrap()
            .iter()
            .map(step)
            .collect(),
    }
}

/// Returns the largest error that transformers itself makes on a tiny checkpoint when it runs
/// it in `dtype` instead of float32.
pub fn transformers_error(name: &str, dtype: &str) -> f32 {
    let errors = transformers_errors(name, dtype);
    // The newer checkpoints have the shorter name.
    let error = errors.get("max_abs_logprob_error").or(errors.get("max"));
    error.and_then(Value::as_f64).unwrap() as f32
}

fn transformers_errors(name: &str, dtype: &str) -> Value {
    let text = std::fs::read_to_string(tiny(name).join("golden.json")).unwrap();
    let golden: Value = serde_json::from_str(&text).unwrap();
    golden["transformers_error"][dtype].clone()
}

fn request(prompt: Vec<u32>, tokens: usize, logprobs: Option<u32>) -> Request {
    let sampling = SamplingParams {
        logprobs,
        ..SamplingParams::greedy()
    };
    let mut request = Request::new(prompt).max_tokens(tokens).sampling(sampling);
    request.ignore_eos = true;
    request
}

/// Returns the errors of the log probabilities of a case. Each step is given the reference's
/// tokens so far. The engine reports the `report` most likely tokens per step.
pub fn teacher_forced_errors(engine: &Engine, case: &Case, report: u32) -> Vec<f32> {
    let streams: Vec<(&Step, TokenStream)> = case
        .steps
        .iter()
        .enumerate()
        .filter(|(_, step)| !step.top.is_empty())
        .map(|(index, step)| {
            let mut prompt = case.prompt.clone();
            prompt.extend(case.steps[..index].iter().map(|step| step.token));
            (
                step,
                engine.generate(request(prompt, 1, Some(report))).unwrap(),
            )
        })
        .collect();
    let mut errors = Vec::new();
    for (step, stream) in streams {
        let generation = stream.complete_blocking().unwrap();
        let found = &generation.tokens[0].top;
        for &(token, expected) in &step.top {
            let (_, logprob) = found
                .iter()
                .find(|(id, _)| *id == token)
                .unwrap_or_else(|| panic!("{}: token {token} is not among the top", case.name));
            errors.push((logprob - expected).abs());
        }
    }
    errors
}

/// Checks a case: the log probabilities given the reference's tokens, and the engine's own
/// greedy tokens up to the first step at which they differ, which must be a step where the
/// reference's margin is small.
pub fn check(engine: &Engine, case: &Case, report: u32, tolerance: Tolerance) -> Vec<f32> {
    let errors = teacher_forced_errors(engine, case, report);
    let max = errors.iter().copied().fold(0.0, f32::max);
    assert!(
        max <= tolerance.max,
        "{}: max error {max} above {tolerance:?}",
        case.name
    );
    check_tokens(engine, case, |_| tolerance.margin);
    errors
}

/// Generates greedily, and fails if a token differs from the reference where the log probability
/// of the best one is larger than that of the second by at least the `margin` of the step.
pub fn check_tokens(engine: &Engine, case: &Case, margin: impl Fn(usize) -> f32) {
    let stream = engine
        .generate(request(case.prompt.clone(), case.steps.len(), None))
        .unwrap();
    let generation = stream.complete_blocking().unwrap();
    assert_eq!(generation.tokens.len(), case.steps.len());
    for (index, (token, step)) in generation.tokens.iter().zip(&case.steps).enumerate() {
        if token.id != step.token {
            assert!(
                step.margin < margin(index),
                "{}: token {index} is {}, not {}, although the margin is {}",
                case.name,
                token.id,
                step.token,
                step.margin
            );
            break;
        }
    }
}
