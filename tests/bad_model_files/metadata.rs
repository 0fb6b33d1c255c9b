//! GGUF files of which one metadata value is changed: each is refused by the key, by another key of
//! the model or by a tensor, or computed. `settings.rs` does the same with folders.

use crate::settings::{Outcomes, answer};
use common::gguf_writer::GgufWriter;
use common::golden::checkpoints;
use quell::LoadError;
use quell::internals::model::ModelSource;
use quell::internals::weights::Gguf;
use quell::internals::weights::gguf::{Array, Value};
use std::collections::HashSet;
use std::path::Path;

/// Returns what is put in place of a value.
fn instead_of(value: &Value) -> Vec<Value> {
    let mut values = vec![
        Value::String("word".to_owned()),
        Value::Bool(true),
        Value::U32(0),
        Value::I32(-1),
        Value::U32(3),
        Value::U64(1 << 40),
        Value::U64(u64::MAX),
        Value::F32(0.0),
        Value::F32(0.3),
        Value::F32(-1.0),
        Value::F32(f32::NAN),
        Value::F64(1e300),
        Value::Array(Array::U32(Vec::new())),
        Value::Array(Array::I32(vec![-1; 4])),
        Value::Array(Array::F32(vec![f32::INFINITY])),
        Value::Array(Array::String(vec!["word".to_owned()])),
    ];
    let other_length = |longer: bool| match value {
        Value::Array(Array::U32(list)) => Some(Array::U32(resized(list, longer))),
        Value::Array(Array::I32(list)) => Some(Array::I32(resized(list, longer))),
        Value::Array(Array::F32(list)) => Some(Array::F32(resized(list, longer))),
        Value::Array(Array::Bool(list)) => Some(Array::Bool(resized(list, longer))),
        _ => None,
    };
    let lists = [true, false].into_iter().filter_map(other_length);
    values.extend(lists.map(Value::Array));
    values
}

/// Returns a list with one entry more or less.
fn resized<T: Copy>(list: &[T], longer: bool) -> Vec<T> {
    match (longer, list.split_last()) {
        (true, Some((last, _))) => [list, &[*last]].concat(),
        (false, Some((_, rest))) => rest.to_vec(),
        (_, None) => Vec::new(),
    }
}

#[test]
fn every_changed_metadata_value_is_refused_by_its_key_or_computed() {
    let mut outcomes = Outcomes::default();
    let mut computed = 0;
    let folder = tempfile::tempdir().unwrap();
    let changed = folder.path().join("model.gguf");
    for path in checkpoints().iter().filter(|path| path.is_file()) {
        let name = path.file_name().unwrap().to_str().unwrap();
        let file = Gguf::open(path).unwrap();
        let own = |key: &&str| !key.starts_with("tokenizer.") && !key.starts_with("general.");
        let keys: Vec<&str> = file.metadata_keys().filter(own).collect();
        let read = |bytes: &[u8]| {
            let file = Gguf::from_bytes(bytes.to_vec(), Path::new("changed.gguf")).unwrap();
            ModelSource::from_gguf(file)
        };
        let original = ModelSource::from_gguf(Gguf::open(path).unwrap()).unwrap();
        let mut answered = HashSet::new();
        for key in &keys {
            let without = GgufWriter::copy(&file, |other| other != *key);
            let values = instead_of(file.metadata(key).unwrap());
            for value in values.into_iter().map(Some).chain([None]) {
                let shown = format!("{name}, {key} = {value:?}");
                let written = match value {
                    Some(value) => without.clone().metadata(key, value),
                    None => without.clone(),
                };
                let attempt = || -> Result<(), LoadError> {
                    let bytes = written.build();
                    let source = read(&bytes).map_err(LoadError::Model)?;
                    // Answers take time: one for each key.
                    if source.config() != original.config() && answered.insert(*key) {
                        std::fs::write(&changed, bytes).unwrap();
                        answer(&changed)?;
                        computed += 1;
                    }
                    Ok(())
                };
                let is_named = |message: &str| keys.iter().any(|key| message.contains(key));
                outcomes.add(shown, attempt, is_named);
            }
        }
    }
    println!("{} refused, {computed} computed", outcomes.refused);
    outcomes.check();
    assert!(outcomes.refused > 3000 && computed > 100);
}
