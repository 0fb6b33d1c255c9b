//! Models whose settings are changed, one at a time: each is refused by the name of a setting or of
//! a tensor, or computed.

use common::golden::{checkpoints, tiny};
use quell::internals::model::ModelSource;
use quell::internals::weights::ModelFolder;
use quell::{
    CpuOptions, Engine, EngineConfig, LoadError, LoadOptions, ModelError, Request, SamplingParams,
};
use serde_json::{Value, json};
use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

/// A changed setting: its key, the keys that lead to it, and its value, or `None` if it is removed.
struct Change {
    place: Vec<String>,
    value: Option<Value>,
}

impl Change {
    fn key(&self) -> &str {
        self.place.last().unwrap()
    }

    /// Returns `config` with the change.
    fn apply(&self, config: &Value) -> Value {
        let mut changed = config.clone();
        let (key, place) = self.place.split_last().unwrap();
        let part = place.iter().fold(&mut changed, |part, key| &mut part[key]);
        match &self.value {
            Some(value) => part[key] = value.clone(),
            None => {
                part.as_object_mut().unwrap().remove(key);
            }
        }
        changed
    }
}

impl std::fmt::Display for Change {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let place = self.place.join(".");
        match &self.value {
            Some(value) => write!(formatter, "{place} = {value}"),
            None => write!(formatter, "no {place}"),
        }
    }
}

/// Returns what is put in place of a value.
fn instead_of(value: &Value) -> Vec<Value> {
    let mut values = vec![json!("word"), json!(null)];
    match value {
        Value::Number(_) => {
            values.extend([json!(0), json!(-1), json!(3), json!(1u64 << 40)]);
            values.extend([json!(0.3), json!(1e30), json!(u64::MAX), json!([1])]);
        }
        Value::Array(list) => {
            values.extend([json!(3), json!([]), json!({})]);
            let mut longer = list.clone();
            longer.extend(list.last().cloned());
            values.push(Value::Array(longer));
            let mut shorter = list.clone();
            shorter.pop();
            values.push(Value::Array(shorter));
            for entry in [
                json!("word"),
                json!(-1),
                json!(0),
                json!(1u64 << 40),
                json!(null),
            ] {
                let mut other = list.clone();
                if let Some(first) = other.first_mut() {
                    *first = entry;
                }
                values.push(Value::Array(other));
            }
        }
        Value::Bool(flag) => values.extend([json!(!flag), json!(3)]),
        Value::String(_) | Value::Null => values.extend([json!(3), json!(0), json!(true)]),
        Value::Object(_) => values.extend([json!(3), json!({}), json!([])]),
    }
    values
}

/// Returns every change of a setting, also of those within others.
fn changes(settings: &Value, place: &[String]) -> Vec<Change> {
    let mut all = Vec::new();
    for (key, value) in settings.as_object().unwrap() {
        let place = [place, std::slice::from_ref(key)].concat();
        if value.is_object() {
            all.extend(changes(value, &place));
        }
        let values = instead_of(value).into_iter().map(Some);
        all.extend(values.chain([None]).map(|value| Change {
            place: place.clone(),
            value,
        }));
    }
    all
}

/// Returns the names of all settings, also of those within others.
fn keys(settings: &Value) -> HashSet<String> {
    let own = settings.as_object().into_iter().flatten();
    own.flat_map(|(key, value)| keys(value).into_iter().chain([key.clone()]))
        .collect()
}

/// Loads a model and lets it answer.
pub fn answer(path: &Path) -> Result<(), LoadError> {
    let options = LoadOptions {
        cpu: CpuOptions {
            threads: Some(1),
            ..CpuOptions::default()
        },
        ..LoadOptions::cpu()
    };
    let config = EngineConfig {
        max_batch_tokens: Some(16),
        max_sequences: 2,
        kv_cache_bytes: Some(1 << 20),
        ..EngineConfig::default()
    };
    let engine = Engine::load_with(path, config, options)?;
    let prompt: Vec<u32> = (0..20)
        .map(|i| i % engine.info().vocabulary as u32)
        .collect();
    let mut request = Request::new(prompt).max_tokens(3);
    request.sampling = SamplingParams::greedy();
    // Numbers that are not finite end a request with an error. A prompt may be too long.
    if let Ok(stream) = engine.generate(request) {
        let _ = stream.complete_blocking();
    }
    // The engine is still there.
    engine.stats().unwrap();
    Ok(())
}

/// Whether an error names a tensor. A number that can be meant need not fit the weights.
fn names_a_tensor(error: &ModelError) -> bool {
    matches!(
        error,
        ModelError::MissingTensor { .. }
            | ModelError::MissingHead { .. }
            | ModelError::UnusedTensor { .. }
            | ModelError::WrongShape { .. }
    )
}

/// Whether an error names a tensor or the architecture instead of a setting.
fn is_named_otherwise(error: &LoadError) -> bool {
    let is_unknown = |error: &ModelError| matches!(error, ModelError::UnknownArchitecture { .. });
    matches!(error, LoadError::Model(error) if names_a_tensor(error) || is_unknown(error))
}

/// What became of models that were changed.
#[derive(Default)]
pub struct Outcomes {
    pub refused: usize,
    complaints: Vec<String>,
}

impl Outcomes {
    /// Tries a changed model, which is computed or refused: by an error that `is_named` accepts, or
    /// by the name of a tensor or of the architecture. It must not panic.
    pub fn add(
        &mut self,
        shown: impl std::fmt::Display,
        attempt: impl FnOnce() -> Result<(), LoadError>,
        is_named: impl Fn(&str) -> bool,
    ) {
        let error = match catch_unwind(AssertUnwindSafe(attempt)) {
            Ok(Ok(())) => return,
            Ok(Err(error)) => error,
            Err(_) => return self.complaints.push(format!("{shown}: a panic")),
        };
        self.refused += 1;
        let message = error.to_string();
        if !is_named(&message) && !is_named_otherwise(&error) {
            self.complaints.push(format!("{shown}: {message}"));
        }
    }

    /// Fails if a model was neither computed nor refused by a name.
    pub fn check(&self) {
        for complaint in &self.complaints {
            println!("{complaint}");
        }
        let count = self.complaints.len();
        assert!(self.complaints.is_empty(), "{count} of them");
    }
}

#[test]
fn every_changed_setting_is_refused_by_its_name_or_computed() {
    let mut outcomes = Outcomes::default();
    let mut computed = 0;
    for path in checkpoints().iter().filter(|path| path.is_dir()) {
        let name = path.file_name().unwrap().to_str().unwrap();
        let config = ModelFolder::open(path).unwrap().config().clone();
        let folder = tempfile::tempdir().unwrap();
        let weights = "model.safetensors";
        std::fs::copy(tiny(name).join(weights), folder.path().join(weights)).unwrap();
        let read = |config: &Value| {
            std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
            let folder = ModelFolder::open(folder.path()).unwrap();
            ModelSource::from_folder(folder)
        };
        let original = read(&config).unwrap().config().clone();
        let mut answered = HashSet::new();
        let known = keys(&config);
        for change in changes(&config, &[]) {
            let attempt = || -> Result<(), LoadError> {
                let source = read(&change.apply(&config)).map_err(LoadError::Model)?;
                // Answers take time: one for each setting.
                if *source.config() != original && answered.insert(change.place.clone()) {
                    answer(folder.path())?;
                    computed += 1;
                }
                Ok(())
            };
            // If two settings contradict each other, the error may begin with the other one.
            let is_named = |message: &str| {
                let mut others = known.iter().filter(|key| key.contains('_'));
                message.contains(change.key()) || others.any(|key| message.contains(key.as_str()))
            };
            outcomes.add(format!("{name}, {change}"), attempt, is_named);
        }
    }
    println!("{} refused, {computed} computed", outcomes.refused);
    outcomes.check();
    assert!(outcomes.refused > 5000 && computed > 200);
}
