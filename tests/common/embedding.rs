//! Embeddings and scores that sentence-transformers has computed.

use serde_json::Value;
use std::path::{Path, PathBuf};

/// Models with random weights, which `tests/clients/embedding_models.py` makes.
pub const TINY: [&str; 6] = [
    "bert",
    "xlm-roberta",
    "gemma3-embedding",
    "qwen3-embedding",
    "bert-classifier",
    "xlm-roberta-classifier",
];

/// A text, and its embedding or score.
pub struct Expected {
    /// Empty for models without a tokenizer.
    pub text: String,
    pub ids: Vec<u32>,
    pub values: Vec<f32>,
}

/// Returns the path of a model or of what is expected of one.
pub fn fixture(name: &str) -> PathBuf {
    crate::root().join("tests/fixtures/embedding").join(name)
}

/// Reads what is expected of a model.
pub fn expected(path: &Path) -> Vec<Expected> {
    let text = std::fs::read_to_string(path).unwrap();
    let all: Vec<Value> = serde_json::from_str(&text).unwrap();
    assert!(all.len() > 1);
    let numbers = |value: &Value| value.as_array().unwrap().clone();
    let read = |one: &Value| Expected {
        text: one["text"].as_str().unwrap_or_default().to_owned(),
        ids: (numbers(&one["ids"]).iter())
            .map(|id| id.as_u64().unwrap() as u32)
            .collect(),
        values: (numbers(&one["values"]).iter())
            .map(|value| value.as_f64().unwrap() as f32)
            .collect(),
    };
    all.iter().map(read).collect()
}

/// Returns the largest difference between two vectors.
pub fn largest_difference(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let pairs = found.iter().zip(expected);
    pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}
