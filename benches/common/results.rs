//! Output of the benches that print a single table.

use serde_json::{Value, json};
use std::time::Duration;

/// Returns whether the result should be printed as JSON.
pub fn as_json() -> bool {
    std::env::args().any(|argument| argument == "json")
}

/// Prints the measurements of a bench as JSON. `figures` must be an object.
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

/// Returns the median in microseconds.
#[allow(dead_code)] // not every bench uses it
pub fn median(mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    times[times.len() / 2].as_secs_f64() * 1e6
}
