//! Recurrent layers on the CUDA device agree with the CPU device, and the bits of a sequence
//! depend on nothing but the sequence.

use crate::layer::{TYPES, device, kept, limits, rounding};
use common::cpu::{Random, bits};
use common::gpu;
use common::groups::TestDevice;
use quell::internals::device::cuda::{CudaDevice, CudaTensor};
use quell::internals::device::*;
use quell::{Activations, CudaActivations, SimdLevel};
use std::ops::Range;

#[derive(Clone, Copy, Debug)]
enum Operation {
    Conv(ConvSpec, bool),
    Delta(DeltaHeads),
    Mamba(Mamba2Spec),
}
use Operation::{Conv, Delta, Mamba};

fn heads(
    [key_heads, value_heads]: [usize; 2],
    [key_dim, value_dim]: [usize; 2],
    order: DeltaOrder,
) -> Operation {
    Delta(DeltaHeads {
        key_heads,
        value_heads,
        key_dim,
        value_dim,
        order,
    })
}

fn conv(channels: usize, taps: usize, input: ConvInput, silu: bool, has_bias: bool) -> Operation {
    let spec = ConvSpec {
        channels,
        taps,
        input,
        silu,
    };
    Conv(spec, has_bias)
}

fn mamba([heads, head_dim]: [usize; 2], state_size: usize, groups: usize) -> Operation {
    Mamba(Mamba2Spec {
        heads,
        head_dim,
        state_size,
        groups,
        step_limits: [0.01, 2.0],
    })
}

/// The smallest sizes, some that differ in every number, those of Qwen 3.5 and of Granite 4,
/// and channels for several blocks.
fn operations() -> [Operation; 12] {
    [
        conv(16, 2, ConvInput::Columns(8), true, true),
        conv(48, 3, ConvInput::Gated, false, true),
        conv(1040, 4, ConvInput::Columns(0), true, false),
        conv(32, 4, ConvInput::Gated, true, false),
        heads([1, 1], [16, 16], DeltaOrder::Grouped),
        heads([2, 6], [32, 48], DeltaOrder::Grouped),
        heads([2, 6], [48, 32], DeltaOrder::Tiled),
        heads([1, 1], [80, 64], DeltaOrder::Grouped),
        heads([1, 2], [128, 128], DeltaOrder::Tiled),
        mamba([8, 16], 8, 1),
        mamba([16, 48], 72, 4),
        mamba([8, 64], 128, 1),
    ]
}

/// An operation and its weights: of a convolution, the taps and the bias; of a delta net, the
/// decays and their bias; of Mamba-2, its rates, skips and biases of steps.
struct Layer {
    operation: Operation,
    weights: [Vec<f32>; 3],
}

impl Layer {
    fn new(random: &mut Random, operation: Operation) -> Self {
        let weights = match operation {
            Conv(spec, _) => {
                let taps = random.numbers(spec.taps * spec.channels);
                [taps, random.numbers(spec.channels), Vec::new()]
            }
            Delta(heads) => {
                let decay = random.numbers(heads.value_heads);
                let decay = decay.iter().map(|v| -v.exp()).collect();
                [decay, random.numbers(heads.value_heads), Vec::new()]
            }
            Mamba(spec) => {
                let rates = random.numbers(spec.heads);
                let rates = rates.iter().map(|v| -v.exp()).collect();
                [
                    rates,
                    random.numbers(spec.heads),
                    random.numbers(spec.heads),
                ]
            }
        };
        Self { operation, weights }
    }

    /// Columns of the input, of the gates, and of the result.
    fn columns(&self) -> [usize; 3] {
        match self.operation {
            Conv(spec, _) => match spec.input {
                ConvInput::Columns(first) => [first + spec.channels + 8, 1, spec.channels],
                ConvInput::Gated => [3 * spec.channels, 1, spec.channels],
            },
            Delta(heads) => [
                heads.qkv_columns(),
                2 * heads.value_heads,
                heads.value_columns(),
            ],
            Mamba(spec) => [spec.channels(), spec.projected(), spec.columns()],
        }
    }

    /// Number of elements that a device keeps of all tokens so far.
    fn elements<D: Device>(&self, device: &D) -> usize {
        match &self.operation {
            Conv(spec, _) => spec.state_elements(),
            Delta(heads) => device.delta_elements(heads),
            Mamba(spec) => device.mamba2_elements(spec),
        }
    }

    /// Creates the gates of some rows: those of a delta net, or the projections of Mamba-2.
    fn gates<D: TestDevice>(&self, device: &mut D, values: &[f32]) -> D::Tensor {
        let [_, columns, _] = self.columns();
        match self.operation {
            Mamba(_) => device.create(columns, values),
            Conv(..) | Delta(_) => device.create_full(columns, values),
        }
    }

    /// A sequence that `kind` can represent.
    fn sequence(&self, random: &mut Random, kind: CudaActivations, rows: usize) -> Sequence {
        let [columns, gates, _] = self.columns();
        let input = random.numbers(rows * columns);
        let gates = random.numbers(rows * gates);
        Sequence {
            rows,
            input: input.into_iter().map(|value| kept(kind, value)).collect(),
            // Gates of all sizes: some forget everything at once, and some nothing at all.
            gates: gates
                .iter()
                .map(|gate| kept(kind, 30.0 * gate.powi(3)))
                .collect(),
        }
    }
}

struct Sequence {
    rows: usize,
    input: Vec<f32>,
    gates: Vec<f32>,
}

const SLOTS: usize = 8;

/// A layer on a device, with memory for states in which its own is not at the beginning.
struct Loaded<'a, D: Device> {
    layer: &'a Layer,
    device: D,
    weights: [D::Vector; 3],
    cache: D::Cache,
    part: StatePart,
}

fn state(before: Option<u32>, after: u32) -> BatchState {
    BatchState {
        before,
        after,
        snapshot: None,
    }
}

/// Rows of a sequence, and its state.
type Piece<'a> = (&'a Sequence, Range<usize>, BatchState);

impl<'a, D: TestDevice> Loaded<'a, D> {
    fn new(device: D, layer: &'a Layer) -> Self {
        Self::with_slots(device, layer, SLOTS)
    }

    fn with_slots(mut device: D, layer: &'a Layer, slots: usize) -> Self {
        let shape = CacheShape {
            layers: 1,
            kv_heads: 1,
            head_dim: 16,
            values: Values::BesideKeys,
            blocks: 64,
            block_tokens: 16,
        };
        let mut cache = device.allocate_cache(&shape).unwrap();
        let part = StatePart {
            offset: 32,
            elements: layer.elements(&device),
        };
        let shape = StateShape {
            slots,
            elements: part.offset + part.elements + 16,
        };
        device.allocate_states(&mut cache, &shape).unwrap();
        let slots: Vec<u32> = (0..slots as u32).collect();
        device.poison_states(&mut cache, &slots).unwrap();
        let weights = layer.weights.each_ref();
        let weights = weights.map(|values| device.load_vector(values).unwrap());
        Self {
            layer,
            device,
            weights,
            cache,
            part,
        }
    }

    /// Enqueues the operation on an input and gates.
    fn enqueue(
        &mut self,
        input: &D::Tensor,
        gates: &mut D::Tensor,
        out: &mut D::Tensor,
    ) -> Result<(), DeviceError> {
        let (device, cache, part) = (&mut self.device, &mut self.cache, self.part);
        let [first, second, third] = &self.weights;
        match &self.layer.operation {
            Conv(spec, has_bias) => {
                let bias = has_bias.then_some(second);
                device.short_conv(input, spec, (first, bias), cache, part, out)
            }
            Delta(heads) => {
                let input = DeltaInput {
                    qkv: input,
                    decay: first,
                    bias: second,
                };
                device.gated_delta(&input, gates, heads, cache, part, out)
            }
            Mamba(spec) => {
                let weights = Mamba2Weights {
                    rates: first,
                    skips: second,
                    step_biases: third,
                };
                device.mamba2((gates, input), spec, weights, cache, part, out)
            }
        }
    }

    /// Computes a step and returns the results of each sequence.
    fn step(&mut self, pieces: &[Piece<'_>]) -> Vec<Vec<f32>> {
        let [columns, gate_columns, width] = self.layer.columns();
        let (mut input, mut gates) = (Vec::new(), Vec::new());
        for (sequence, rows, _) in pieces {
            input.extend(&sequence.input[rows.start * columns..rows.end * columns]);
            gates.extend(&sequence.gates[rows.start * gate_columns..rows.end * gate_columns]);
        }
        let batch = batch(pieces);
        assert_eq!(self.device.stage(&batch).unwrap(), Staged::Enqueue);
        let input = self.device.create(columns, &input);
        let mut gates = self.layer.gates(&mut self.device, &gates);
        let precision = Precision::Activation;
        let out = self.device.allocate(batch.rows(), width, precision);
        let mut out = out.unwrap();
        self.enqueue(&input, &mut gates, &mut out).unwrap();
        assert_eq!(self.device.finish(Ok(())).unwrap(), Finished::Done);
        let all = self.device.read(&out, batch.rows());
        let rows = batch.sequences.iter().map(|sequence| sequence.rows.clone());
        rows.map(|rows| all[rows.start * width..rows.end * width].to_vec())
            .collect()
    }
}

fn batch(pieces: &[Piece<'_>]) -> Batch {
    let mut batch = Batch::new(1);
    for (index, (_, rows, state)) in pieces.iter().enumerate() {
        let first = index as u32 * 8;
        let tokens = vec![0; rows.len()];
        batch.push(&tokens, rows.start, 16, [(0, first..first + 8)]);
        batch.states.push(*state);
    }
    batch
}

/// What a sequence gives in one step, alone.
fn whole(layer: &Layer, kind: CudaActivations, sequence: &Sequence) -> Vec<f32> {
    let piece = (sequence, 0..sequence.rows, state(None, 0));
    Loaded::new(device(kind), layer).step(&[piece]).remove(0)
}

#[test]
fn recurrent_operations_agree_with_the_cpu_device() {
    let _gpu = gpu::lock();
    let mut random = Random::new(71);
    for operation in operations() {
        let layer = Layer::new(&mut random, operation);
        for kind in TYPES {
            let sequence = layer.sequence(&mut random, kind, 70);
            let piece = (&sequence, 0..sequence.rows, state(None, 0));
            let cpu = common::cpu::device(SimdLevel::Auto, 1, Activations::F32);
            let expected = Loaded::new(cpu, &layer).step(&[piece]).remove(0);
            let found = whole(&layer, kind, &sequence);
            assert_close(kind, &found, &expected, &format!("{operation:?}"));
        }
    }
}

/// Checks numbers that were computed in float32 and rounded once.
fn assert_close(kind: CudaActivations, found: &[f32], expected: &[f32], what: &str) {
    assert_eq!(found.len(), expected.len());
    for (at, (found, expected)) in found.iter().zip(expected).enumerate() {
        let error = f64::from(found - expected).abs();
        assert!(
            error <= rounding(kind) * f64::from(expected.abs()) + 2e-5,
            "{what} in {kind:?}: {found} instead of {expected} at {at}"
        );
    }
}

/// Computes pieces of sequences, step after step, on both devices. A sequence has the slot of its
/// index.
fn assert_steps_agree(
    layer: &Layer,
    kind: CudaActivations,
    sequences: &[Sequence],
    steps: &[Vec<Range<usize>>],
) {
    let cpu = common::cpu::device(SimdLevel::Auto, 1, Activations::F32);
    let mut cpu = Loaded::with_slots(cpu, layer, sequences.len());
    let mut cuda = Loaded::with_slots(device(kind), layer, sequences.len());
    for (number, rows) in steps.iter().enumerate() {
        let pieces = (0..).zip(sequences).zip(rows).map(|((slot, one), rows)| {
            let before = (rows.start > 0).then_some(slot);
            (one, rows.clone(), state(before, slot))
        });
        let pieces: Vec<Piece<'_>> = pieces.filter(|piece| !piece.1.is_empty()).collect();
        let expected = cpu.step(&pieces);
        let found = cuda.step(&pieces);
        for (index, (found, expected)) in found.iter().zip(&expected).enumerate() {
            let what = format!("{:?}, step {number}, piece {index}", layer.operation);
            assert_close(kind, found, expected, &what);
        }
    }
}

fn recurrences() -> impl Iterator<Item = Operation> {
    let all = operations().into_iter();
    all.filter(|operation| !matches!(operation, Conv(..)))
}

#[test]
fn steps_that_begin_and_end_anywhere_agree_with_the_cpu_device() {
    let _gpu = gpu::lock();
    let mut random = Random::new(79);
    for (operation, kind) in recurrences().zip(TYPES.into_iter().cycle()) {
        let layer = Layer::new(&mut random, operation);
        // Intervals have sixteen tokens. The first four sequences begin inside of one, at its end,
        // at its start, and at its last token. Then one is decoded, and others cross one end or
        // several.
        let steps = [
            vec![0..7, 0..16, 0..32, 0..15, 0..1],
            vec![7..12, 16..17, 32..47, 15..16, 1..60],
            vec![12..33, 17..40, 47..49, 16..48, 60..61],
        ];
        let lengths = [33, 40, 49, 48, 61];
        let sequences = lengths.map(|rows| layer.sequence(&mut random, kind, rows));
        assert_steps_agree(&layer, kind, &sequences, &steps);
    }
}

#[test]
fn batches_of_decoded_tokens_agree_with_the_cpu_device() {
    let _gpu = gpu::lock();
    let mut random = Random::new(80);
    let small = [
        heads([2, 6], [32, 48], DeltaOrder::Grouped),
        mamba([16, 48], 72, 4),
    ];
    let large = [
        heads([1, 2], [128, 128], DeltaOrder::Tiled),
        mamba([8, 64], 128, 1),
    ];
    let cases = [(small, 1), (small, 16), (small, 256), (large, 16)];
    for (operations, count) in cases {
        for (operation, kind) in operations.into_iter().zip(TYPES) {
            let layer = Layer::new(&mut random, operation);
            let sequences: Vec<Sequence> = (0..count)
                .map(|index| layer.sequence(&mut random, kind, index % 18 + 3))
                .collect();
            let ends = sequences.iter().map(|sequence| sequence.rows);
            let prompts = ends.clone().map(|end| 0..end - 2).collect();
            let second = ends.clone().map(|end| end - 2..end - 1).collect();
            let last = ends.map(|end| end - 1..end).collect();
            assert_steps_agree(&layer, kind, &sequences, &[prompts, second, last]);
        }
    }
}

#[test]
fn chunks_and_other_sequences_change_no_bit_of_a_sequence() {
    let _gpu = gpu::lock();
    let mut random = Random::new(72);
    for (operation, kind) in operations().into_iter().zip(TYPES.into_iter().cycle()) {
        let layer = Layer::new(&mut random, operation);
        let sequences = [70, 20].map(|rows| layer.sequence(&mut random, kind, rows));
        let expected = sequences.each_ref().map(|one| whole(&layer, kind, one));
        for chunk in [1, 3, 16, 33, 47] {
            let mut loaded = Loaded::new(device(kind), &layer);
            let found = in_chunks(&mut loaded, &sequences, chunk);
            for (found, expected) in found.iter().zip(&expected) {
                assert!(
                    bits(found) == bits(expected),
                    "{operation:?} in {kind:?}, chunks of {chunk}"
                );
            }
        }
    }
}

/// The results of two sequences that are computed side by side in chunks. The first keeps its
/// slot. The second begins a step later, and changes its slot in each step.
fn in_chunks(
    loaded: &mut Loaded<'_, CudaDevice>,
    sequences: &[Sequence; 2],
    chunk: usize,
) -> [Vec<f32>; 2] {
    let mut found = [Vec::new(), Vec::new()];
    let mut done = [0, 0];
    for number in 0u32.. {
        let mut pieces: Vec<Piece<'_>> = Vec::new();
        let mut computed = Vec::new();
        for (index, sequence) in sequences.iter().enumerate() {
            let rows = done[index]..sequence.rows.min(done[index] + chunk);
            if rows.is_empty() || (index == 1 && number == 0) {
                continue;
            }
            let [before, after] = match index {
                0 => [0, 0],
                _ => [1 + (number + 1) % 2, 1 + number % 2],
            };
            done[index] = rows.end;
            let before = (rows.start > 0).then_some(before);
            pieces.push((sequence, rows, state(before, after)));
            computed.push(index);
        }
        if pieces.is_empty() {
            break;
        }
        for (index, result) in computed.into_iter().zip(loaded.step(&pieces)) {
            found[index].extend(result);
        }
    }
    found
}

#[test]
fn a_snapshot_continues_as_the_sequence_did() {
    let _gpu = gpu::lock();
    let mut random = Random::new(73);
    let kind = CudaActivations::F16;
    for operation in operations() {
        let layer = Layer::new(&mut random, operation);
        let sequence = layer.sequence(&mut random, kind, 48);
        let expected = whole(&layer, kind, &sequence);
        // The state is kept after the first interval, after some, and after the last one.
        for rows in [16, 32, 48] {
            let mut loaded = Loaded::new(device(kind), &layer);
            let snapshot = Some(StateSnapshot { rows, slot: 3 });
            let kept = BatchState {
                snapshot,
                ..state(None, 0)
            };
            let all = loaded.step(&[(&sequence, 0..48, kept)]);
            assert!(bits(&all[0]) == bits(&expected), "{operation:?}");
            if rows == 48 {
                continue;
            }
            let poisoned = loaded.device.poison_states(&mut loaded.cache, &[0]);
            poisoned.unwrap();
            let [_, _, width] = layer.columns();
            for after in [5, 6] {
                let piece = (&sequence, rows..48, state(Some(3), after));
                let rest = loaded.step(&[piece]);
                let expected = &expected[rows * width..];
                assert!(
                    bits(&rest[0]) == bits(expected),
                    "{operation:?} after {rows} rows, slot {after}"
                );
            }
        }
    }
}

#[test]
fn a_snapshot_after_a_decoded_token_continues_as_the_sequence_did() {
    let _gpu = gpu::lock();
    let mut random = Random::new(81);
    let kind = CudaActivations::Bf16;
    for operation in recurrences() {
        let layer = Layer::new(&mut random, operation);
        let sequence = layer.sequence(&mut random, kind, 35);
        let expected = whole(&layer, kind, &sequence);
        let mut loaded = Loaded::new(device(kind), &layer);
        loaded.step(&[(&sequence, 0..15, state(None, 0))]);
        let kept = BatchState {
            snapshot: Some(StateSnapshot { rows: 1, slot: 3 }),
            ..state(Some(0), 0)
        };
        loaded.step(&[(&sequence, 15..16, kept)]);
        let [_, _, width] = layer.columns();
        let mut before = 3;
        for rows in [16..17, 17..18, 18..35] {
            let found = loaded.step(&[(&sequence, rows.clone(), state(Some(before), 5))]);
            let expected = &expected[rows.start * width..rows.end * width];
            assert!(bits(&found[0]) == bits(expected), "{operation:?}, {rows:?}");
            before = 5;
        }
    }
}

/// Decodes three sequences in steps of four rows, and returns the results and the number of steps
/// that were replayed. In every second step, the sequences change their slots.
/// The tensors come with them: graphs are forgotten when memory is freed.
fn decoded(
    loaded: &mut Loaded<'_, CudaDevice>,
    sequences: &[Sequence; 3],
) -> (Vec<f32>, usize, [CudaTensor; 3]) {
    let [columns, gate_columns, width] = loaded.layer.columns();
    let (mut found, mut replayed) = (Vec::new(), 0);
    // A replay reads where the recorded step did.
    let one_row = |count: usize, values: fn(&Sequence) -> &[f32]| -> Vec<f32> {
        let rows = sequences.iter().flat_map(|one| &values(one)[..count]);
        rows.copied().chain(vec![0.0; count]).collect()
    };
    let input = one_row(columns, |sequence| &sequence.input);
    let input = loaded.device.create(columns, &input);
    let gates = one_row(gate_columns, |sequence| &sequence.gates);
    let mut gates = loaded.layer.gates(&mut loaded.device, &gates);
    let mut out = loaded.device.create(width, &vec![7.0; 4 * width]);
    let mut slots: [Option<u32>; 3] = [None; 3];
    for step in 0..36 {
        let mut pieces: Vec<Piece<'_>> = Vec::new();
        for (index, slot) in slots.iter_mut().enumerate() {
            let after = (index + step / 2 % 2 * 3) as u32;
            let state = state(slot.replace(after), after);
            pieces.push((&sequences[index], step..step + 1, state));
        }
        let mut batch = batch(&pieces);
        batch.sample_rows = vec![0, 1, 2];
        match loaded.device.stage(&batch).unwrap() {
            Staged::Replayed => replayed += 1,
            Staged::Enqueue => {
                loaded.enqueue(&input, &mut gates, &mut out).unwrap();
                assert_eq!(loaded.device.finish(Ok(())).unwrap(), Finished::Done);
            }
        }
        found.extend(loaded.device.read(&out, 3));
    }
    (found, replayed, [input, gates, out])
}

#[test]
fn recorded_steps_follow_the_slots_of_each_sequence() {
    let _gpu = gpu::lock();
    let mut random = Random::new(74);
    let kind = CudaActivations::F16;
    for operation in operations() {
        let layer = Layer::new(&mut random, operation);
        let sequences = [1; 3].map(|rows| layer.sequence(&mut random, kind, rows));
        let mut plain = Loaded::new(device(kind), &layer);
        let (expected, replayed, _) = decoded(&mut plain, &sequences);
        assert_eq!(replayed, 0, "no limits were given");
        let mut recording = device(kind);
        recording.reserve(&limits(16)).unwrap();
        let mut loaded = Loaded::new(recording, &layer);
        let (found, replayed, _tensors) = decoded(&mut loaded, &sequences);
        assert!(replayed > 5, "{replayed} steps were replayed");
        assert!(bits(&found) == bits(&expected), "{operation:?}");

        // A replay is checked as well.
        let mut refuse = |change: fn(&mut Batch), expected: &str| {
            let pieces = [0, 1, 2].map(|slot| (&sequences[0], 11..12, state(Some(slot), slot)));
            let mut batch = batch(&pieces);
            batch.sample_rows = vec![0, 1, 2];
            change(&mut batch);
            let error = loaded.device.stage(&batch).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        };
        refuse(
            |batch| batch.states[1].after = SLOTS as u32,
            "slot of states 8 is out of range: there are 8",
        );
        refuse(
            |batch| batch.states.clear(),
            "sequences of the step have no states",
        );
    }
}

#[test]
fn recurrent_operands_that_do_not_fit_are_refused() {
    let _gpu = gpu::lock();
    let mut random = Random::new(75);
    let kind = CudaActivations::Bf16;
    for operation in [operations()[0], operations()[4], operations()[9]] {
        let layer = Layer::new(&mut random, operation);
        let mut loaded = Loaded::new(device(kind), &layer);
        let [columns, gate_columns, width] = layer.columns();
        let sequence = layer.sequence(&mut random, kind, 1);
        let staged = |loaded: &mut Loaded<'_, CudaDevice>, state: BatchState| {
            let batch = batch(&[(&sequence, 0..1, state)]);
            loaded.device.stage(&batch).unwrap();
        };
        staged(&mut loaded, state(None, 0));
        let part = loaded.part;
        let attempt = |loaded: &mut Loaded<'_, CudaDevice>, columns: [usize; 3]| {
            let [input, gates, out] = columns;
            let device = &mut loaded.device;
            let input = device.create(input, &vec![0.0; input]);
            let mut gates = layer.gates(device, &vec![0.0; gates]);
            let mut out = device.create(out, &vec![0.0; out]);
            loaded.enqueue(&input, &mut gates, &mut out)
        };
        let fitting = [columns, gate_columns, width];
        attempt(&mut loaded, fitting).unwrap();
        for wrong in [
            [columns - 16, gate_columns, width],
            [columns, gate_columns, width + 8],
        ] {
            attempt(&mut loaded, wrong).unwrap_err();
        }
        for wrong in [
            StatePart {
                elements: part.elements - 16,
                ..part
            },
            StatePart { offset: 64, ..part },
        ] {
            loaded.part = wrong;
            let error = attempt(&mut loaded, fitting).unwrap_err().to_string();
            assert!(error.contains("does not fit"), "{error}");
        }
        loaded.part = part;
        for slots in [state(Some(8), 0), state(None, 9)] {
            staged(&mut loaded, slots);
            let error = attempt(&mut loaded, fitting).unwrap_err().to_string();
            assert!(error.contains("out of range: there are 8"), "{error}");
        }
        let poisoned = loaded.device.poison_states(&mut loaded.cache, &[8]);
        poisoned.unwrap_err();
    }
    let Delta(heads) = heads([1, 1], [144, 16], DeltaOrder::Grouped) else {
        unreachable!()
    };
    let error = device(kind).check_delta(&heads).unwrap_err();
    assert!(matches!(error, DeviceError::Unsupported { .. }), "{error}");
    assert!(error.to_string().contains("keys of 144 elements"));
    for (operation, expected) in [
        (mamba([8, 16], 136, 1), "136 elements of the state"),
        (mamba([4, 16], 16, 1), "4 heads"),
    ] {
        let Mamba(spec) = operation else {
            unreachable!()
        };
        let error = device(kind).check_mamba2(&spec).unwrap_err();
        assert!(matches!(error, DeviceError::Unsupported { .. }), "{error}");
        assert!(error.to_string().contains(expected), "{error}");
    }
}

/// Checks numbers that were rounded once.
fn assert_near(kind: CudaActivations, found: &[f32], expected: &[f64], what: &str) {
    assert_eq!(found.len(), expected.len());
    for (at, (found, expected)) in found.iter().zip(expected).enumerate() {
        let error = (f64::from(*found) - expected).abs();
        assert!(
            error <= rounding(kind) * expected.abs() + 1e-6,
            "{what} in {kind:?}: {found} instead of {expected} at {at}"
        );
    }
}

fn tensor(
    device: &mut CudaDevice,
    random: &mut Random,
    columns: usize,
    rows: usize,
    kind: CudaActivations,
) -> (CudaTensor, Vec<f64>) {
    let values = random.numbers(rows * columns);
    let values: Vec<f32> = values.into_iter().map(|v| kept(kind, 5.0 * v)).collect();
    let wide = values.iter().map(|v| f64::from(*v)).collect();
    (device.create(columns, &values), wide)
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

#[test]
fn gated_norms_agree_with_float64() {
    let _gpu = gpu::lock();
    let mut random = Random::new(76);
    for kind in TYPES {
        for (rows, count, width) in [(1, 1, 16), (5, 9, 32), (2, 4, 40), (3, 2, 264)] {
            let mut device = device(kind);
            let columns = count * width;
            let stride = columns + 16;
            let (mut x, wide) = tensor(&mut device, &mut random, columns, rows, kind);
            let (gate, gates) = tensor(&mut device, &mut random, stride, rows, kind);
            let weight = random.numbers(width);
            let mut expected = Vec::new();
            for (x, gates) in wide.chunks(columns).zip(gates.chunks(stride)) {
                for (x, gates) in x.chunks(width).zip(gates[8..8 + columns].chunks(width)) {
                    let mean = x.iter().map(|v| v * v).sum::<f64>() / width as f64;
                    let factor = 1.0 / (mean + 1e-5).sqrt();
                    for ((x, gate), weight) in x.iter().zip(gates).zip(&weight) {
                        expected.push(x * factor * f64::from(*weight) * gate * sigmoid(*gate));
                    }
                }
            }
            let w = device.load_vector(&weight).unwrap();
            device
                .gated_rms_norm(&mut x, (&gate, 8), &w, 1e-5, rows)
                .unwrap();
            let what = format!("{rows} × {count} × {width}");
            let found = device.values(&x, rows).unwrap();
            assert_near(kind, &found, &expected, &what);
            let beyond = device.gated_rms_norm(&mut x, (&gate, 24), &w, 1e-5, rows);
            assert!(beyond.is_err(), "gates beyond the last column");
        }
    }
}

#[test]
fn norms_of_gated_groups_agree_with_float64() {
    let _gpu = gpu::lock();
    let mut random = Random::new(78);
    for kind in TYPES {
        for (rows, groups, width) in [(1, 1, 16), (5, 3, 32), (2, 2, 2056)] {
            let mut device = device(kind);
            let columns = groups * width;
            let stride = columns + 8;
            let (mut x, wide) = tensor(&mut device, &mut random, columns, rows, kind);
            let (gate, gates) = tensor(&mut device, &mut random, stride, rows, kind);
            let weight = random.numbers(columns);
            let mut expected = Vec::new();
            for (x, gates) in wide.chunks(columns).zip(gates.chunks(stride)) {
                let gated = x
                    .iter()
                    .zip(gates)
                    .map(|(x, gate)| x * gate * sigmoid(*gate));
                let gated: Vec<f64> = gated.collect();
                for (x, weight) in gated.chunks(width).zip(weight.chunks(width)) {
                    let mean = x.iter().map(|v| v * v).sum::<f64>() / width as f64;
                    let factor = 1.0 / (mean + 1e-5).sqrt();
                    let scaled = x
                        .iter()
                        .zip(weight)
                        .map(|(x, w)| x * factor * f64::from(*w));
                    expected.extend(scaled);
                }
            }
            let w = device.load_vector(&weight).unwrap();
            device
                .gated_norm(&mut x, &gate, &w, groups, 1e-5, rows)
                .unwrap();
            let what = format!("{rows} × {groups} × {width}");
            let found = device.values(&x, rows).unwrap();
            assert_near(kind, &found, &expected, &what);
            let uneven = device.gated_norm(&mut x, &gate, &w, 7, 1e-5, rows);
            assert!(uneven.is_err(), "groups that do not divide the columns");
        }
    }
}

#[test]
fn sigmoid_gates_agree_with_float64() {
    let _gpu = gpu::lock();
    let mut random = Random::new(77);
    for kind in TYPES {
        let mut device = device(kind);
        for (rows, columns, gates) in [(3, 40, 40), (2, 48, 3), (70, 72, 1)] {
            let (mut x, wide) = tensor(&mut device, &mut random, columns, rows, kind);
            let numbers = random.numbers(rows * gates);
            let numbers: Vec<f32> = numbers.iter().map(|v| kept(kind, 20.0 * v)).collect();
            let gate = match gates == columns {
                true => device.create(gates, &numbers),
                false => device.create_full(gates, &numbers),
            };
            let each = columns / gates;
            let gate_of = |at: usize| f64::from(numbers[at / each]);
            let expected = wide.iter().enumerate();
            let expected: Vec<f64> = expected.map(|(at, x)| x * sigmoid(gate_of(at))).collect();
            device.sigmoid_gate(&mut x, &gate, rows).unwrap();
            let found = device.values(&x, rows).unwrap();
            let what = format!("{rows} × {columns}, {gates} gates");
            assert_near(kind, &found, &expected, &what);
        }
        let mut x = device.create(16, &[0.0; 16]);
        let gate = device.create_full(3, &[0.0; 3]);
        let error = device.sigmoid_gate(&mut x, &gate, 1).unwrap_err();
        assert!(error.to_string().contains("do not divide"), "{error}");
    }
}
