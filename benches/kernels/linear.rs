//! Matrix products: the projections of a layer, the logits, and the experts.

use crate::bench::{Bench, values};
use crate::report::Work;
use crate::shapes::{ExpertShape, Shape};
use quell::internals::device::cuda::CudaDevice;
use quell::internals::device::*;
use quell::internals::weights::{DType, RandomContent, RandomTensor, RandomWeights, WeightSource};

/// Quantised weights are measured up to this number of rows; beyond it, products are bound by
/// arithmetic.
const QUANTISED_ROWS: usize = 256;

/// Returns the random weights of one matrix.
fn weights(rows: usize, columns: usize, dtype: DType) -> Result<RandomWeights, DeviceError> {
    let tensor = RandomTensor {
        name: "weights".to_owned(),
        shape: vec![rows, columns],
        content: RandomContent::Weights,
    };
    RandomWeights::new(vec![tensor], dtype).map_err(|unfit| DeviceError::Unsupported {
        device: "cuda",
        what: format!("{} columns of {}", unfit.columns, unfit.format),
        expected: "whole blocks".to_owned(),
    })
}

/// Returns a spec that covers the whole matrix.
fn spec(weights: &RandomWeights, rows: usize, columns: usize) -> LinearSpec<'_> {
    let stored = weights.tensor("weights").zip(weights.bytes("weights"));
    let part = stored.map(|(tensor, data)| WeightRows {
        dtype: tensor.dtype,
        rows,
        columns,
        data,
        order: RowOrder::AsStored,
    });
    LinearSpec {
        parts: part.into_iter().collect(),
        bias: None,
    }
}

pub fn run(bench: &mut Bench, shape: &Shape) -> Result<(), DeviceError> {
    let (hidden, inner, heads) = (shape.hidden, shape.inner, shape.heads);
    let formats: &[DType] = if bench.short {
        &[DType::BF16, DType::Q4K]
    } else {
        &[DType::BF16, DType::Q8_0, DType::Q4_0, DType::Q4K]
    };
    for (name, outputs, inputs) in [
        ("qkv", heads.qkv_columns(), hidden),
        ("attention out", hidden, heads.q_columns()),
        ("gate and up", 2 * inner, hidden),
        ("down", hidden, inner),
        ("logits", shape.vocabulary, hidden),
    ] {
        if bench.short && ["qkv", "logits"].contains(&name) {
            continue;
        }
        for &dtype in formats {
            let kernel = format!("linear {}", dtype.name());
            if bench.wants(&kernel) {
                product(bench, shape, &kernel, name, (outputs, inputs), dtype)?;
            }
        }
    }
    Ok(())
}

/// Measures one matrix product at all row counts of the shape.
pub fn product(
    bench: &mut Bench,
    shape: &Shape,
    kernel: &str,
    name: &str,
    (outputs, inputs): (usize, usize),
    dtype: DType,
) -> Result<(), DeviceError> {
    let stored = weights(outputs, inputs, dtype)?;
    let spec = spec(&stored, outputs, inputs);
    let bytes: usize = spec.parts.iter().map(|part| part.data.len()).sum();
    let load = |device: &mut CudaDevice| device.load_linear(&spec);
    let copies = bench.copies(bytes);
    let linears: Vec<_> = (0..copies).map(|_| load(&mut bench.device)).collect();
    let linears: Vec<_> = match linears.into_iter().collect::<Result<_, _>>() {
        Ok(linears) => linears,
        Err(error) => {
            let work = work(kernel, shape, name, (outputs, inputs), 0, bytes);
            bench.report.add(work, 1, Err(error));
            return Ok(());
        }
    };
    let logits = name == "logits";
    for &rows in shape.rows {
        // Logits are computed for sampled rows only, so their row counts stay small.
        if (logits || dtype != DType::BF16) && rows > QUANTISED_ROWS {
            continue;
        }
        let x = bench
            .device
            .tensor(inputs, Precision::Activation, &values(rows * inputs))?;
        let precision = if logits {
            Precision::Full
        } else {
            Precision::Activation
        };
        let mut out = bench.device.allocate(rows, outputs, precision)?;
        let work = work(kernel, shape, name, (outputs, inputs), rows, bytes);
        // Products with many rows are bound by arithmetic, so they need not read fresh weights
        // each time: a few copies are enough.
        let used = if rows > 64 {
            linears.len().min(4)
        } else {
            linears.len()
        };
        bench.measure(work, used, |device| {
            let mut all = linears[..used].iter();
            all.try_for_each(|linear| device.linear(&x, linear, rows, &mut out))
        });
    }
    Ok(())
}

fn work(
    kernel: &str,
    shape: &Shape,
    name: &str,
    (outputs, inputs): (usize, usize),
    rows: usize,
    weights: usize,
) -> Work {
    let out = if name == "logits" { 4 } else { 2 };
    Work {
        kernel: kernel.to_owned(),
        shape: format!("{} {name} {outputs}×{inputs}", shape.name),
        rows,
        sizes: vec![("outputs", outputs), ("inputs", inputs)],
        bytes: weights + rows * (2 * inputs + out * outputs),
        operations: 2 * rows * outputs * inputs,
    }
}

/// Measures a layer of experts.
pub fn experts(bench: &mut Bench, shape: &ExpertShape, rows: &[usize]) -> Result<(), DeviceError> {
    if !bench.wants("experts") {
        return Ok(());
    }
    let &ExpertShape {
        name,
        hidden,
        width,
        count,
        top_k,
        score,
    } = shape;
    let gate_up = weights(2 * width, hidden, DType::BF16)?;
    let down = weights(hidden, width, DType::BF16)?;
    let gate_ups = vec![spec(&gate_up, 2 * width, hidden); count];
    let downs = vec![spec(&down, hidden, width); count];
    let layer = bench.device.load_experts(&gate_ups, &downs, None, None)?;
    let routing = RoutingSpec {
        top_k,
        score,
        normalize: true,
        activation: Activation::Silu,
    };
    for &rows in rows {
        let x = values(rows * hidden);
        let x = bench.device.tensor(hidden, Precision::Activation, &x)?;
        let router = values(rows * count);
        let router = bench.device.tensor(count, Precision::Full, &router)?;
        let mut out = bench.device.allocate(rows, hidden, Precision::Activation)?;
        // Expected number of experts that at least one row is routed to, if rows choose at
        // random.
        let missed = (1.0 - top_k as f64 / count as f64).powi(rows as i32);
        let used = ((1.0 - missed) * count as f64).round() as usize;
        let work = Work {
            kernel: "experts BF16".to_owned(),
            shape: format!("{name} {count} × {width}×{hidden}, {top_k} per row"),
            rows,
            sizes: vec![
                ("experts", count),
                ("top_k", top_k),
                ("width", width),
                ("columns", hidden),
            ],
            bytes: used * 3 * width * hidden * 2 + rows * hidden * 4,
            operations: rows * top_k * 6 * width * hidden,
        };
        bench.measure(work, 1, |device| {
            device.experts(&x, &router, routing, &layer, rows, &mut out)
        });
    }
    Ok(())
}
