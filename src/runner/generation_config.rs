//! A model's own sampling settings, from `generation_config.json` of a Hugging Face folder or
//! from the `general.sampling` metadata of a GGUF file.

use super::LoadError;
use crate::sampling::SamplingDefaults;
use crate::weights::from_python_json;
use crate::weights::gguf::{Gguf, Value as Metadata};
use serde_json::Value;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

const FILE: &str = "generation_config.json";

/// Settings that ask for unsupported ways of sampling, each with the value that disables it.
const UNSUPPORTED: [(&str, f64); 10] = [
    ("diversity_penalty", 0.0),
    ("encoder_repetition_penalty", 1.0),
    ("epsilon_cutoff", 0.0),
    ("eta_cutoff", 0.0),
    ("no_repeat_ngram_size", 0.0),
    ("num_beam_groups", 1.0),
    ("num_beams", 1.0),
    ("penalty_alpha", 0.0),
    ("typical_p", 1.0),
    ("top_h", 1.0),
];

/// Returns the settings of the folder at `path`; empty ones if it has no
/// `generation_config.json`.
///
/// # Errors
/// Returns [`LoadError::GenerationConfig`] if a setting has the wrong type or is out of range.
pub(super) fn of_folder(path: &Path) -> Result<SamplingDefaults, LoadError> {
    let path = path.join(FILE);
    let problem = |problem: String| LoadError::GenerationConfig {
        path: path.clone(),
        problem,
    };
    let text = match std::fs::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(SamplingDefaults::default()),
        Err(error) => return Err(problem(error.to_string())),
    };
    let config: Value = from_python_json(&text).map_err(|error| problem(error.to_string()))?;
    let number = |key: &str| match config.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.as_f64() {
            Some(number) => Ok(Some(number)),
            None => Err(problem(format!("{key} is {value}, but must be a number"))),
        },
    };
    for (key, neutral) in UNSUPPORTED {
        if number(key)?.is_some_and(|value| value != neutral) {
            tracing::warn!(path = %path.display(), key, "ignored an unsupported setting");
        }
    }
    let max_tokens = match number("max_new_tokens")? {
        None => None,
        Some(count) if count >= 1.0 && count.fract() == 0.0 => Some(count as usize),
        Some(count) => {
            let expected = "a whole number of at least 1";
            return Err(problem(format!(
                "max_new_tokens is {count}, but must be {expected}"
            )));
        }
    };
    // transformers uses `max_length` only without `max_new_tokens`. It counts the prompt as well.
    if max_tokens.is_none() && number("max_length")?.is_some() {
        let key = "max_length";
        tracing::warn!(path = %path.display(), key, "ignored an unsupported setting");
    }
    let read = Settings {
        temperature: number("temperature")?,
        top_k: number("top_k")?,
        top_p: number("top_p")?,
        min_p: number("min_p")?,
        repetition_penalty: number("repetition_penalty")?,
        max_tokens,
    };
    // As in transformers, the repetition penalty applies to greedy decoding, too.
    let greedy = config.get("do_sample") == Some(&Value::Bool(false));
    let mut defaults = read.checked(path.clone())?;
    if greedy {
        defaults = SamplingDefaults {
            temperature: Some(0.0),
            repetition_penalty: defaults.repetition_penalty,
            max_tokens: defaults.max_tokens,
            ..SamplingDefaults::default()
        };
    }
    Ok(defaults)
}

/// Returns the settings of a GGUF file.
///
/// # Errors
/// Returns the same errors as [`of_folder`].
pub(super) fn of_gguf(file: &Gguf) -> Result<SamplingDefaults, LoadError> {
    let number = |name: &str| {
        let key = format!("general.sampling.{name}");
        match file.metadata(&key) {
            None => Ok(None),
            Some(value) => value.as_f64().map(Some).ok_or_else(|| {
                let found = value.type_name();
                LoadError::GenerationConfig {
                    path: file.path().to_owned(),
                    problem: format!("{key} is of type {found}, but must be a number"),
                }
            }),
        }
    };
    for (key, neutral) in [("mirostat", 0.0), ("xtc_probability", 0.0)] {
        if number(key)?.is_some_and(|value| value != neutral) {
            tracing::warn!(path = %file.path().display(), key, "ignored an unsupported setting");
        }
    }
    if let Some(Metadata::String(order)) = file.metadata("general.sampling.sequence") {
        tracing::debug!(order, "the order of samplers is ignored");
    }
    let read = Settings {
        temperature: number("temp")?,
        top_k: number("top_k")?,
        top_p: number("top_p")?,
        min_p: number("min_p")?,
        repetition_penalty: number("penalty_repeat")?,
        // There is no key for it.
        max_tokens: None,
    };
    read.checked(file.path().to_owned())
}

/// Settings as they were read, not checked yet.
struct Settings {
    temperature: Option<f64>,
    top_k: Option<f64>,
    top_p: Option<f64>,
    min_p: Option<f64>,
    repetition_penalty: Option<f64>,
    max_tokens: Option<usize>,
}

impl Settings {
    fn checked(self, path: PathBuf) -> Result<SamplingDefaults, LoadError> {
        let single = |number: Option<f64>| number.map(|number| number as f32);
        let defaults = SamplingDefaults {
            temperature: single(self.temperature),
            // 0 and negative numbers stand for all tokens.
            top_k: self.top_k.map(|top_k| top_k.max(0.0) as u32),
            top_p: single(self.top_p),
            min_p: single(self.min_p),
            repetition_penalty: single(self.repetition_penalty),
            max_tokens: self.max_tokens,
        };
        match defaults.validate() {
            Ok(()) => Ok(defaults),
            Err(error) => Err(LoadError::GenerationConfig {
                path,
                problem: error.to_string(),
            }),
        }
    }
}
