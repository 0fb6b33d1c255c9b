//! Attention of layers in several groups on the CUDA device.

use crate::attention::{assert_near, reference};
use crate::layer::{TYPES, device, kept};
use common::cpu::{Random, bits};
use common::gpu;
use common::groups::*;
use common::model_groups::a_model_has_the_same_bits_in_groups;
use quell::CudaActivations;
use quell::internals::device::cuda::{CudaDevice, CudaTensor};
use quell::internals::device::*;

const HEADS: HeadShape = HeadShape {
    q_heads: 4,
    kv_heads: 2,
    head_dim: 32,
    values: Values::BesideKeys,
};

/// Returns random numbers that the type of the activations can hold.
fn numbers(random: &mut Random, kind: CudaActivations, count: usize) -> Vec<f32> {
    let numbers = random.numbers(count);
    numbers.into_iter().map(|value| kept(kind, value)).collect()
}

#[test]
fn late_tables_change_no_bit_of_any_group() {
    let _gpu = gpu::lock();
    let mut random = Random::new(61);
    for (kind, block_tokens) in TYPES.into_iter().zip([16, 48]) {
        let check = |spec: &AttentionSpec, qkv: &[f32], found: &[f32]| {
            let rows = found.chunks(HEADS.q_columns());
            for (position, row) in rows.enumerate() {
                let what = format!("{kind:?} {spec:?}, token {position}");
                assert_near(kind, row, &reference(spec, qkv, position), &what);
            }
        };
        let mut numbers = |count| numbers(&mut random, kind, count);
        late_tables_change_no_bit(
            &mut || device(kind),
            HEADS,
            block_tokens,
            &mut numbers,
            &check,
        );
    }
}

#[test]
fn chunk_sizes_change_no_bit_of_any_group() {
    let _gpu = gpu::lock();
    let mut random = Random::new(62);
    let kind = CudaActivations::Bf16;
    let mut numbers = |count| numbers(&mut random, kind, count);
    chunk_sizes_change_no_bit(&mut || device(kind), HEADS, &mut numbers);
}

#[test]
fn missing_blocks_and_groups_are_refused() {
    let _gpu = gpu::lock();
    let device = device(CudaActivations::F16);
    common::groups::missing_blocks_and_groups_are_refused(device, HEADS);
}

/// The sequences' contexts, and the number of tokens that are decoded after them. Meanwhile, the
/// windows of 40 tokens and of 1 token of the first sequence leave a span behind.
const CONTEXTS: [usize; 3] = [285, 130, 7];
const STEPS: usize = 12;

/// Creates the layers and computes the contexts.
fn with_contexts(inputs: &Inputs, tables: Tables) -> Grouped<CudaDevice> {
    let device = device(CudaActivations::F16);
    let mut grouped = Grouped::new(device, HEADS, 16, 140, tables);
    let parts = CONTEXTS.into_iter().enumerate();
    let parts = parts.map(|(sequence, count)| vec![Part { sequence, count }]);
    run(&mut grouped, inputs, &parts.collect::<Vec<_>>());
    grouped
}

fn decoded() -> [Part; 3] {
    [0, 1, 2].map(|sequence| Part { sequence, count: 1 })
}

#[test]
fn recorded_steps_follow_the_tables_of_each_group() {
    let _gpu = gpu::lock();
    let mut random = Random::new(63);
    let mut numbers = |count| numbers(&mut random, CudaActivations::F16, count);
    let inputs = Inputs::new(HEADS, &CONTEXTS, &mut numbers);
    // All decoded tokens have the same rows, so that those in device memory can be reused.
    let last = |layer: usize, sequence: usize| {
        let length = CONTEXTS[sequence];
        inputs.rows(layer, sequence, length - 1..length).to_vec()
    };
    let mut plain = with_contexts(&inputs, Tables::Whole);
    let rows = |layer, sequence, _| last(layer, sequence);
    let expected: Vec<Vec<Vec<f32>>> = (0..STEPS).map(|_| plain.step(&decoded(), &rows)).collect();

    let mut grouped = with_contexts(&inputs, Tables::Late);
    let (columns, q_columns) = (HEADS.qkv_columns(), HEADS.q_columns());
    // A step of three rows is padded to four.
    let mut tensors: Vec<(CudaTensor, CudaTensor)> = (0..layers().len())
        .map(|layer| {
            let rows = (0..3).flat_map(|sequence| last(layer, sequence));
            let rows: Vec<f32> = rows.chain(vec![0.0; columns]).collect();
            let device = &mut grouped.device;
            let out = device.create(q_columns, &vec![7.0; 4 * q_columns]);
            (device.create(columns, &rows), out)
        })
        .collect();
    let before = grouped.sequences[0].tables[1].0;
    let mut replayed = 0;
    for (step, expected) in expected.iter().enumerate() {
        decoded().into_iter().for_each(|part| grouped.prepare(part));
        let mut batch = grouped.batch(&decoded());
        batch.sample_rows = vec![0, 1, 2];
        match grouped.device.stage(&batch).unwrap() {
            Staged::Replayed => replayed += 1,
            Staged::Enqueue => {
                grouped.enqueue(&mut tensors).unwrap();
                assert_eq!(grouped.device.finish(Ok(())).unwrap(), Finished::Done);
            }
        }
        for (layer, ((_, out), expected)) in tensors.iter().zip(expected).enumerate() {
            let found = grouped.device.values(out, 3).unwrap();
            assert!(bits(&found) == bits(expected), "step {step}, layer {layer}");
        }
        let sequences = grouped.sequences.iter_mut();
        sequences.for_each(|sequence| sequence.computed += 1);
    }
    assert!(replayed > STEPS / 2, "{replayed} steps were replayed");
    assert!(
        grouped.sequences[0].tables[1].0 > before,
        "no block was given back"
    );

    // A replay refuses a table that begins too late, too.
    decoded().into_iter().for_each(|part| grouped.prepare(part));
    let mut batch = grouped.batch(&decoded());
    batch.sample_rows = vec![0, 1, 2];
    for group in 0..GROUPS {
        let mut late = batch.clone();
        let table = &mut late.groups[group].tables[0];
        table.first += 1;
        table.entries.start += 1;
        let error = grouped.device.stage(&late).unwrap_err();
        let complaint = format!("group {group} begin too late");
        assert!(error.to_string().contains(&complaint), "{error}");
    }
    assert_eq!(grouped.device.stage(&batch).unwrap(), Staged::Replayed);
    grouped.device.finish(Ok(())).unwrap();
}

#[test]
fn models_have_the_same_bits_in_groups() {
    let _gpu = gpu::lock();
    for (name, windows) in [
        ("gemma2", true),
        ("gemma3", true),
        ("gemma3n", true),
        ("gemma4", true),
        ("gemma4-moe", true),
        ("mistral", true),
        ("phi3", false),
    ] {
        let mut device = || device(CudaActivations::F16);
        a_model_has_the_same_bits_in_groups(&mut device, name, windows);
    }
}
