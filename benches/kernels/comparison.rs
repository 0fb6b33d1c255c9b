//! The scripts in `scripts/gpu` that measure PyTorch on the same operations and draw a roofline.

use serde_json::Value;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

/// The measurements with PyTorch's times added to them.
pub struct Compared {
    /// Version of PyTorch, and the limits that it reaches on this GPU.
    pub pytorch: Value,
    pub kernels: Vec<Value>,
}

/// Runs a script with JSON as its input, and returns its output.
fn run(script: &str, input: &Value, arguments: &[&Path]) -> Result<String, String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("scripts/gpu")
        .join(script);
    let mut child = Command::new("python3")
        .arg(path)
        .arg("/dev/stdin")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| format!("python3: {error}"))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A script that ends early says why itself.
        let _ = stdin.write_all(input.to_string().as_bytes());
    }
    let output = child
        .wait_with_output()
        .map_err(|error| error.to_string())?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(format!("{script} failed: {}", output.status))
    }
}

/// Measures PyTorch on the same operations.
pub fn peers(measured: &[Value]) -> Result<Compared, String> {
    let printed = run("peers.py", &Value::Array(measured.to_vec()), &[])?;
    let mut report: Value = serde_json::from_str(&printed).map_err(|error| error.to_string())?;
    if let Some(reason) = report["left_out"].as_str() {
        return Err(reason.to_owned());
    }
    match report["kernels"].take() {
        Value::Array(kernels) => Ok(Compared {
            pytorch: report["pytorch"].take(),
            kernels,
        }),
        _ => Err("peers.py lists no kernels".to_owned()),
    }
}

/// Draws a report's kernels on the roofline of the GPU, as an SVG file.
pub fn draw(report: &Value, picture: &Path) -> Result<(), String> {
    run("roofline", report, &[picture]).map(drop)
}

/// Prints PyTorch's limits and times.
pub fn print(pytorch: &Value, kernels: &[Value]) {
    let number = |value: &Value| value.as_f64().unwrap_or(f64::NAN);
    println!(
        "PyTorch {}: matrix product {:.0} TFLOP/s, copy {:.3} TB/s",
        pytorch["version"].as_str().unwrap_or("?"),
        number(&pytorch["matmul_tflop_per_s"]),
        number(&pytorch["copy_tb_per_s"])
    );
    for kernel in kernels {
        let text = |key: &str| kernel[key].as_str().unwrap_or("?");
        print!(
            "{:<18} {:<34} {:>5} {:>10.2} µs, {:>5.1} % of product",
            text("kernel"),
            text("shape"),
            kernel["rows"],
            number(&kernel["microseconds"]),
            number(&kernel["share_of_matmul"]) * 100.0
        );
        for peer in kernel["peers"].as_array().into_iter().flatten() {
            let what = peer["what"].as_str().unwrap_or("?");
            print!("; {what} {:.2} µs", number(&peer["microseconds"]));
        }
        println!();
    }
}
