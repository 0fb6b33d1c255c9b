//! Row-wise operations: norms, activations and sampling.

use crate::bench::{Bench, values};
use crate::report::Work;
use crate::shapes::Shape;
use quell::SamplingParams;
use quell::internals::device::*;
use quell::internals::sampling::SampleRow;
use std::sync::Arc;

/// Measures the norms and the activation of a layer.
pub fn run(bench: &mut Bench, shape: &Shape) -> Result<(), DeviceError> {
    for &rows in shape.rows {
        norms(bench, shape, rows)?;
        activation(bench, shape, rows)?;
    }
    Ok(())
}

fn work(kernel: &str, shape: &Shape, columns: usize, rows: usize, bytes: usize) -> Work {
    Work {
        kernel: kernel.to_owned(),
        shape: format!("{} {columns} columns", shape.name),
        rows,
        sizes: vec![("columns", columns)],
        bytes,
        operations: 0,
    }
}

fn norms(bench: &mut Bench, shape: &Shape, rows: usize) -> Result<(), DeviceError> {
    let columns = shape.hidden;
    let weight = bench.device.load_vector(&values(columns))?;
    let copies = bench.copies(rows * columns * 12);
    let mut full = Vec::new();
    let mut half = Vec::new();
    for _ in 0..copies {
        let x = values(rows * columns);
        full.push(bench.device.tensor(columns, Precision::Full, &x)?);
        half.push(bench.device.tensor(columns, Precision::Activation, &x)?);
    }
    let mut out = bench
        .device
        .allocate(rows, columns, Precision::Activation)?;
    let elements = rows * columns;
    if bench.wants("rms_norm") {
        let w = work("rms_norm", shape, columns, rows, elements * 6 + columns * 4);
        bench.measure(w, copies, |device| {
            let mut all = full.iter();
            all.try_for_each(|x| device.rms_norm(x, &weight, 1e-5, rows, &mut out))
        });
    }
    if bench.wants("add_rms_norm") {
        let w = work(
            "add_rms_norm",
            shape,
            columns,
            rows,
            elements * 12 + columns * 4,
        );
        bench.measure(w, copies, |device| {
            let mut all = full.iter_mut().zip(&half);
            all.try_for_each(|(residual, x)| {
                device.add_rms_norm(residual, x, &weight, 1e-5, rows, &mut out)
            })
        });
    }
    Ok(())
}

fn activation(bench: &mut Bench, shape: &Shape, rows: usize) -> Result<(), DeviceError> {
    if !bench.wants("gated_activation") {
        return Ok(());
    }
    let columns = shape.inner;
    let copies = bench.copies(rows * columns * 6);
    let mut inputs = Vec::new();
    for _ in 0..copies {
        let x = values(rows * 2 * columns);
        inputs.push(
            bench
                .device
                .tensor(2 * columns, Precision::Activation, &x)?,
        );
    }
    let mut out = bench
        .device
        .allocate(rows, columns, Precision::Activation)?;
    let w = work("gated_activation", shape, columns, rows, rows * columns * 6);
    bench.measure(w, copies, |device| {
        let mut all = inputs.iter();
        all.try_for_each(|x| device.gated_activation(x, Activation::Silu, rows, &mut out))
    });
    Ok(())
}

/// Measures sampling, including the copy of the results to the host.
pub fn sampling(bench: &mut Bench, shape: &Shape, rows: &[usize]) -> Result<(), DeviceError> {
    let nucleus = SamplingParams {
        temperature: 0.8,
        top_p: 0.95,
        ..SamplingParams::default()
    };
    let plain = SamplingParams {
        temperature: 0.8,
        ..SamplingParams::default()
    };
    let kinds = [
        ("sample greedy", SamplingParams::greedy()),
        ("sample plain", plain),
        ("sample top-p", nucleus),
    ];
    for &rows in rows {
        let logits = values(rows * shape.vocabulary);
        let logits = bench
            .device
            .tensor(shape.vocabulary, Precision::Full, &logits)?;
        bench.device.stage(&one_row_each(rows))?;
        for (kernel, params) in &kinds {
            if !bench.wants(kernel) {
                continue;
            }
            let row = SampleRow {
                params: Arc::new(params.clone()),
                position: 0,
                history: Vec::new(),
                prompt_tokens: 0,
                ..SampleRow::default()
            };
            let sample_rows = vec![row; rows];
            let bytes = rows * shape.vocabulary * 4;
            let w = work(kernel, shape, shape.vocabulary, rows, bytes);
            bench.measure_unrecorded(w, |device| {
                let pending = device.sample(&logits, &sample_rows)?;
                device.collect(pending).map(drop)
            });
        }
    }
    Ok(())
}

/// Builds a step of `rows` sequences, each with its first token.
fn one_row_each(rows: usize) -> Batch {
    let mut batch = Batch::new(1);
    for row in 0..rows {
        batch.push(&[0], 0, crate::shapes::BLOCK, [(0, [row as u32])]);
        batch.sample_rows.push(row);
    }
    batch
}
