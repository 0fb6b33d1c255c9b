//! How benches of a single table say what they measured.

use serde_json::{Value, json};
use std::time::Duration;

/// Whether the result is wanted as JSON.
pub fn as_json() -> bool {
    std::env::args().any(|argument| argument == "json")
}

/// Prints what a bench measured, for programs: `figures` is an object.
pub fn print_json(bench: &str, figures: Value) {
    let mut result = json!({
        "what": format!("cargo bench --bench {bench} -- --format json"),
        "version": env!("CARGO_PKG_VERSION"),
    });
    if let (Some(result), Value::Object(mut figures)) = (result.as_object_mut(), figures) {
        result.append(&mut figures);
    }
    println!("{result:#}");
}

/// The median, in microseconds.
#[allow(dead_code)] // each bench uses its part
pub fn median(mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    times[times.len() / 2].as_secs_f64() * 1e6
}
