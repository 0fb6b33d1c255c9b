//! Recurrences: gated delta nets and Mamba-2.

use crate::bench::{Bench, values};
use crate::report::Work;
use crate::shapes::BLOCK;
use quell::internals::device::cuda::{CudaCache, CudaDevice};
use quell::internals::device::*;

/// Qwen 3.5 35B-A3B.
const DELTA: DeltaHeads = DeltaHeads {
    key_heads: 16,
    value_heads: 32,
    key_dim: 128,
    value_dim: 128,
    order: DeltaOrder::Grouped,
};

/// Granite 4.0 H Tiny.
const MAMBA: Mamba2Spec = Mamba2Spec {
    heads: 48,
    head_dim: 64,
    state_size: 128,
    groups: 1,
    step_limits: [0.0, f32::INFINITY],
};

/// Tokens before the first sequence's rows in steps that decode.
const CACHED: usize = 64;

/// Steps, as pairs of a number of sequences and the number of rows of each.
const STEPS: [(usize, usize); 2] = [(64, 1), (1, 512)];

pub fn run(bench: &mut Bench) -> Result<(), DeviceError> {
    for (sequences, rows) in STEPS {
        if bench.wants("gated_delta") {
            gated_delta(bench, sequences, rows)?;
        }
        if bench.wants("mamba2") {
            mamba2(bench, sequences, rows)?;
        }
    }
    Ok(())
}

/// Stages a step that decodes sequences, each a token further than the one before, or that
/// computes prompts.
fn stage(device: &mut CudaDevice, sequences: usize, rows: usize) -> Result<(), DeviceError> {
    let mut batch = Batch::new(1);
    let blocks = ((CACHED + sequences).max(rows).div_ceil(BLOCK)) as u32;
    for index in 0..sequences {
        let slot = index as u32;
        let cached = if rows == 1 { CACHED + index } else { 0 };
        let table = slot * blocks..(slot + 1) * blocks;
        batch.push(&vec![0; rows], cached, BLOCK, [(0, table)]);
        batch.states.push(BatchState {
            before: (cached > 0).then_some(slot),
            after: slot,
            snapshot: None,
        });
        batch.sample_rows.push(batch.tokens.len() - 1);
    }
    device.stage(&batch)?;
    Ok(())
}

/// Returns memory for the states of this many sequences, all of them zeros.
fn states(
    device: &mut CudaDevice,
    slots: usize,
    elements: usize,
) -> Result<(CudaCache, StatePart), DeviceError> {
    let mut cache = device.allocate_cache(&CacheShape {
        layers: 1,
        kv_heads: 1,
        head_dim: 16,
        blocks: 1,
        block_tokens: BLOCK,
        values: Values::BesideKeys,
    })?;
    device.allocate_states(&mut cache, &StateShape { slots, elements })?;
    let part = StatePart {
        offset: 0,
        elements,
    };
    Ok((cache, part))
}

/// Returns the least work of a step: each state is read, and so are the inputs of each row, whose
/// results are written. `matrix` is the number of elements of the matrices of a state.
fn work(kernel: &str, shape: &str, (sequences, rows): (usize, usize), matrix: usize) -> Work {
    Work {
        kernel: kernel.to_owned(),
        shape: format!("{shape} {sequences} × {rows}"),
        rows: sequences * rows,
        sizes: vec![("sequences", sequences), ("new", rows)],
        bytes: sequences * matrix * 4,
        operations: 0,
    }
}

fn gated_delta(bench: &mut Bench, sequences: usize, rows: usize) -> Result<(), DeviceError> {
    let (heads, count) = (DELTA, sequences * rows);
    let device = &mut bench.device;
    let elements = device.delta_elements(&heads);
    let (mut cache, part) = states(device, sequences, elements)?;
    let x = values(count * heads.qkv_columns());
    let qkv = device.tensor(heads.qkv_columns(), Precision::Activation, &x)?;
    let columns = 2 * heads.value_heads;
    let mut gates = device.tensor(columns, Precision::Full, &values(count * columns))?;
    let decay = device.load_vector(&vec![-1.0; heads.value_heads])?;
    let bias = device.load_vector(&values(heads.value_heads))?;
    let mut out = device.allocate(count, heads.value_columns(), Precision::Activation)?;
    stage(device, sequences, rows)?;
    let matrix = heads.state_elements();
    let mut work = work("gated_delta", "qwen3.5-35b-a3b", (sequences, rows), matrix);
    work.bytes += 2 * count * (heads.qkv_columns() + heads.value_columns());
    // Two products of a row with the state, and its own product that is added to the state.
    work.operations = 3 * 2 * count * matrix;
    bench.measure(work, 1, |device| {
        let input = DeltaInput {
            qkv: &qkv,
            decay: &decay,
            bias: &bias,
        };
        device.gated_delta(&input, &mut gates, &heads, &mut cache, part, &mut out)
    });
    Ok(())
}

fn mamba2(bench: &mut Bench, sequences: usize, rows: usize) -> Result<(), DeviceError> {
    let (spec, count) = (MAMBA, sequences * rows);
    let device = &mut bench.device;
    let elements = device.mamba2_elements(&spec);
    let (mut cache, part) = states(device, sequences, elements)?;
    let activation = Precision::Activation;
    let x = values(count * spec.projected());
    let projected = device.tensor(spec.projected(), activation, &x)?;
    let x = values(count * spec.channels());
    let convolved = device.tensor(spec.channels(), activation, &x)?;
    let rates = device.load_vector(&vec![-1.0; spec.heads])?;
    let others = device.load_vector(&values(spec.heads))?;
    let mut out = device.allocate(count, spec.columns(), activation)?;
    stage(device, sequences, rows)?;
    let matrix = spec.state_elements();
    let mut work = work("mamba2", "granite-4.0-h-tiny", (sequences, rows), matrix);
    work.bytes += 2 * count * (spec.channels() + spec.columns());
    work.operations = 2 * 2 * count * matrix;
    bench.measure(work, 1, |device| {
        let weights = Mamba2Weights {
            rates: &rates,
            skips: &others,
            step_biases: &others,
        };
        let input = (&projected, &convolved);
        device.mamba2(input, &spec, weights, &mut cache, part, &mut out)
    });
    Ok(())
}
