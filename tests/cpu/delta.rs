//! Gated delta nets on the CPU device agree with float64, and their bits depend on nothing but the
//! sequence.

use crate::operations::{assert_near, wide};
use common::cpu::*;
use quell::internals::device::cpu::{CpuCache, CpuDevice};
use quell::internals::device::*;
use quell::{Activations, SimdLevel};

fn heads(
    [key_heads, value_heads]: [usize; 2],
    [key_dim, value_dim]: [usize; 2],
    order: DeltaOrder,
) -> DeltaHeads {
    DeltaHeads {
        key_heads,
        value_heads,
        key_dim,
        value_dim,
        order,
    }
}

/// Head counts and sizes: the smallest, some that differ in every number, and those of Qwen 3.5.
fn shapes() -> [DeltaHeads; 4] {
    [
        heads([1, 1], [16, 16], DeltaOrder::Grouped),
        heads([2, 6], [32, 48], DeltaOrder::Grouped),
        heads([2, 6], [48, 32], DeltaOrder::Tiled),
        heads([1, 2], [128, 128], DeltaOrder::Tiled),
    ]
}

/// One sequence, and what does not depend on its tokens.
struct Sequence {
    heads: DeltaHeads,
    qkv: Vec<f32>,
    gates: Vec<f32>,
    decay: Vec<f32>,
    bias: Vec<f32>,
}

impl Sequence {
    fn new(random: &mut Random, heads: DeltaHeads, rows: usize) -> Self {
        let count = heads.value_heads;
        // Gates of all sizes: some forget everything at once, and some nothing at all.
        let gates = random.numbers(rows * 2 * count);
        Self {
            heads,
            qkv: random.numbers(rows * heads.qkv_columns()),
            gates: gates.iter().map(|gate| 30.0 * gate.powi(3)).collect(),
            decay: random.numbers(count).iter().map(|v| -v.exp()).collect(),
            bias: random.numbers(count),
        }
    }

    fn rows(&self) -> usize {
        self.qkv.len() / self.heads.qkv_columns()
    }

    /// The results in float64, by the formulas of the operation.
    fn expected(&self) -> Vec<f64> {
        let heads = self.heads;
        let (key_dim, value_dim) = (heads.key_dim, heads.value_dim);
        let mut states = vec![vec![0.0f64; key_dim * value_dim]; heads.value_heads];
        let mut out = Vec::new();
        for row in 0..self.rows() {
            let qkv = wide(&self.qkv[row * heads.qkv_columns()..][..heads.qkv_columns()]);
            let gates = wide(&self.gates[row * 2 * heads.value_heads..][..2 * heads.value_heads]);
            for (head, state) in states.iter_mut().enumerate() {
                let group = heads.value_heads / heads.key_heads;
                let key_head = match heads.order {
                    DeltaOrder::Grouped => head / group,
                    DeltaOrder::Tiled => head % heads.key_heads,
                };
                let unit = |first: usize| {
                    let part = &qkv[first + key_head * key_dim..][..key_dim];
                    let length = (part.iter().map(|v| v * v).sum::<f64>() + 1e-6).sqrt();
                    part.iter().map(|v| v / length).collect::<Vec<_>>()
                };
                let (q, k) = (unit(0), unit(heads.key_columns()));
                let v = &qkv[2 * heads.key_columns() + head * value_dim..][..value_dim];
                let beta = 1.0 / (1.0 + (-gates[head]).exp());
                let a = gates[heads.value_heads + head] + f64::from(self.bias[head]);
                let alpha = (f64::from(self.decay[head]) * a.exp().ln_1p()).exp();
                state.iter_mut().for_each(|one| *one *= alpha);
                for (column, value) in v.iter().enumerate() {
                    let at = |element: usize| element * value_dim + column;
                    let known: f64 = (0..key_dim).map(|one| k[one] * state[at(one)]).sum();
                    let new = beta * (value - known);
                    (0..key_dim).for_each(|one| state[at(one)] += k[one] * new);
                    let result: f64 = (0..key_dim).map(|one| q[one] * state[at(one)]).sum();
                    out.push(result / (key_dim as f64).sqrt());
                }
            }
        }
        out
    }
}

/// Memory for states in which the net's own is not at the beginning.
struct Memory {
    cache: CpuCache,
    part: StatePart,
}

const SLOTS: usize = 8;

impl Memory {
    fn new(device: &mut CpuDevice, heads: &DeltaHeads) -> Self {
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
            elements: heads.state_elements(),
        };
        let elements = part.offset + part.elements + 16;
        let shape = StateShape {
            slots: SLOTS,
            elements,
        };
        device.allocate_states(&mut cache, &shape).unwrap();
        let slots: Vec<u32> = (0..SLOTS as u32).collect();
        device.poison_states(&mut cache, &slots).unwrap();
        Self { cache, part }
    }
}

fn state(before: Option<u32>, after: u32) -> BatchState {
    BatchState {
        before,
        after,
        snapshot: None,
    }
}

/// Rows `rows` of the sequences, each with its state.
type Piece<'a> = (&'a Sequence, std::ops::Range<usize>, BatchState);

/// Computes a step and returns the results of each sequence.
fn step(device: &mut CpuDevice, memory: &mut Memory, pieces: &[Piece<'_>]) -> Vec<Vec<f32>> {
    let heads = pieces[0].0.heads;
    let columns = [heads.qkv_columns(), 2 * heads.value_heads];
    let mut batch = Batch::new(1);
    let (mut qkv, mut gates) = (Vec::new(), Vec::new());
    for (index, (sequence, rows, state)) in pieces.iter().enumerate() {
        let first = index as u32 * 8;
        let tokens = vec![0; rows.len()];
        batch.push(&tokens, rows.start, 16, [(0, first..first + 8)]);
        batch.states.push(*state);
        qkv.extend(&sequence.qkv[rows.start * columns[0]..rows.end * columns[0]]);
        gates.extend(&sequence.gates[rows.start * columns[1]..rows.end * columns[1]]);
    }
    device.stage(&batch).unwrap();
    let qkv = tensor(device, columns[0], &qkv);
    let mut gates = tensor(device, columns[1], &gates);
    let input = DeltaInput {
        qkv: &qkv,
        decay: &device.load_vector(&pieces[0].0.decay).unwrap(),
        bias: &device.load_vector(&pieces[0].0.bias).unwrap(),
    };
    let width = heads.value_columns();
    let mut out = device.allocate(batch.rows(), width, Precision::Full);
    let out = out.as_mut().unwrap();
    let Memory { cache, part } = memory;
    device
        .gated_delta(&input, &mut gates, &heads, cache, *part, out)
        .unwrap();
    let rows = batch.sequences.iter().map(|sequence| sequence.rows.clone());
    rows.map(|rows| rows.flat_map(|row| out.row(row).to_vec()).collect())
        .collect()
}

/// The bits of a sequence that is computed in one step, alone and on one thread.
fn whole(sequence: &Sequence, level: SimdLevel) -> Vec<u32> {
    let mut device = device(level, 1, Activations::Auto);
    let mut memory = Memory::new(&mut device, &sequence.heads);
    let piece = (sequence, 0..sequence.rows(), state(None, 0));
    bits(&step(&mut device, &mut memory, &[piece])[0])
}

#[test]
fn the_gated_delta_rule_agrees_with_float64() {
    let mut random = Random::new(61);
    for heads in shapes() {
        let sequence = Sequence::new(&mut random, heads, 70);
        for level in levels() {
            let found = whole(&sequence, level);
            let found: Vec<f32> = found.into_iter().map(f32::from_bits).collect();
            let what = format!("{level:?} {heads:?}");
            assert_near(&found, &sequence.expected(), 2e-5, &what);
        }
    }
}

#[test]
fn avx2_and_avx512_give_the_same_bits() {
    let mut random = Random::new(62);
    let levels: Vec<SimdLevel> = levels();
    for heads in shapes() {
        let sequence = Sequence::new(&mut random, heads, 9);
        let vectors = levels.iter().filter(|one| **one != SimdLevel::Portable);
        let found: Vec<Vec<u32>> = vectors.map(|level| whole(&sequence, *level)).collect();
        assert!(found.windows(2).all(|pair| pair[0] == pair[1]), "{heads:?}");
    }
}

#[test]
fn chunks_threads_and_other_sequences_change_no_bit() {
    let mut random = Random::new(63);
    for heads in shapes() {
        let first = Sequence::new(&mut random, heads, 37);
        let second = Sequence {
            decay: first.decay.clone(),
            bias: first.bias.clone(),
            ..Sequence::new(&mut random, heads, 20)
        };
        for level in levels() {
            let expected = [whole(&first, level), whole(&second, level)];
            for (threads, chunk) in [(1, 1), (3, 4), (2, 16), (3, 64)] {
                let mut device = device(level, threads, Activations::Auto);
                let found = in_chunks(&mut device, [&first, &second], chunk);
                assert!(
                    found == expected,
                    "{level:?} {heads:?} {threads} threads, chunks of {chunk}"
                );
            }
        }
    }
}

/// The bits of two sequences that are computed side by side in chunks. The first keeps its slot.
/// The second begins a step later, and changes its slot in each step.
fn in_chunks(device: &mut CpuDevice, sequences: [&Sequence; 2], chunk: usize) -> [Vec<u32>; 2] {
    let mut memory = Memory::new(device, &sequences[0].heads);
    let mut found = [Vec::new(), Vec::new()];
    let mut done = [0, 0];
    for number in 0u32.. {
        let mut pieces: Vec<Piece<'_>> = Vec::new();
        let mut computed = Vec::new();
        for (index, sequence) in sequences.into_iter().enumerate() {
            let rows = done[index]..sequence.rows().min(done[index] + chunk);
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
        let results = step(device, &mut memory, &pieces);
        for (index, result) in computed.into_iter().zip(results) {
            found[index].extend(bits(&result));
        }
    }
    found
}

#[test]
fn a_snapshot_continues_as_the_sequence_did() {
    let mut random = Random::new(64);
    let heads = shapes()[1];
    let sequence = Sequence::new(&mut random, heads, 24);
    let expected = whole(&sequence, SimdLevel::Auto);
    let mut device = device(SimdLevel::Auto, 2, Activations::Auto);
    let mut memory = Memory::new(&mut device, &heads);
    let snapshot = Some(StateSnapshot { rows: 10, slot: 3 });
    let kept = BatchState {
        snapshot,
        ..state(None, 0)
    };
    let all = step(&mut device, &mut memory, &[(&sequence, 0..24, kept)]);
    assert_eq!(bits(&all[0]), expected);
    device.poison_states(&mut memory.cache, &[0]).unwrap();
    for after in [5, 6] {
        let piece = (&sequence, 10..24, state(Some(3), after));
        let rest = step(&mut device, &mut memory, &[piece]);
        let first = 10 * heads.value_columns();
        assert_eq!(bits(&rest[0]), expected[first..], "slot {after}");
    }
}

#[test]
fn operands_that_do_not_fit_are_refused() {
    let heads = shapes()[0];
    let mut device = device(SimdLevel::Auto, 1, Activations::Auto);
    let mut memory = Memory::new(&mut device, &heads);
    let mut batch = Batch::new(1);
    batch.push(&[0], 0, 16, [(0, [0])]);
    batch.states.push(state(None, 0));
    device.stage(&batch).unwrap();
    let qkv = tensor(&mut device, 48, &[0.0; 48]);
    let mut gates = tensor(&mut device, 2, &[0.0; 2]);
    let mut out = tensor(&mut device, 16, &[0.0; 16]);
    let one = device.load_vector(&[0.0]).unwrap();
    let two = device.load_vector(&[0.0; 2]).unwrap();
    let mut check = |decay, heads: DeltaHeads, part: StatePart, fits: bool| {
        let input = DeltaInput {
            qkv: &qkv,
            decay,
            bias: &one,
        };
        let cache = &mut memory.cache;
        let result = device.gated_delta(&input, &mut gates, &heads, cache, part, &mut out);
        match result {
            Ok(()) => assert!(fits),
            Err(error) => {
                let text = error.to_string();
                assert!(!fits && text.contains("gated_delta"), "{text}");
            }
        }
    };
    let part = memory.part;
    check(&one, heads, part, true);
    check(&two, heads, part, false);
    for wrong in [
        DeltaHeads {
            key_heads: 0,
            ..heads
        },
        DeltaHeads {
            key_dim: 8,
            ..heads
        },
        DeltaHeads {
            value_dim: 32,
            ..heads
        },
    ] {
        check(&one, wrong, part, false);
    }
    for wrong in [
        StatePart {
            elements: 128,
            ..part
        },
        StatePart { offset: 64, ..part },
    ] {
        check(&one, heads, wrong, false);
    }
}

#[test]
fn gated_norms_agree_with_float64() {
    let mut random = Random::new(65);
    for (rows, count, width) in [(1, 1, 16), (5, 3, 32), (2, 4, 40)] {
        let columns = count * width;
        let x = random.numbers(rows * columns);
        let gate = random.numbers(rows * (columns + 7));
        let weight = random.numbers(width);
        let mut expected = Vec::new();
        for (x, gate) in wide(&x)
            .chunks(columns)
            .zip(wide(&gate).chunks(columns + 7))
        {
            for (x, gate) in x.chunks(width).zip(gate[4..4 + columns].chunks(width)) {
                let mean = x.iter().map(|v| v * v).sum::<f64>() / width as f64;
                let factor = 1.0 / (mean + 1e-5).sqrt();
                for ((x, gate), weight) in x.iter().zip(gate).zip(wide(&weight)) {
                    expected.push(x * factor * weight * gate / (1.0 + (-gate).exp()));
                }
            }
        }
        for level in levels() {
            let mut d = device(level, 2, Activations::Auto);
            let w = d.load_vector(&weight).unwrap();
            let mut x = tensor(&mut d, columns, &x);
            let gate = tensor(&mut d, columns + 7, &gate);
            d.gated_rms_norm(&mut x, (&gate, 4), &w, 1e-5, rows)
                .unwrap();
            let what = format!("{level:?} {rows} × {count} × {width}");
            assert_near(&values(&x, rows), &expected, 1e-5, &what);
            let error = d.gated_rms_norm(&mut x, (&gate, 8), &w, 1e-5, rows);
            assert!(error.is_err(), "gates beyond the last column");
        }
    }
}

#[test]
fn sigmoid_gates_agree_with_float64() {
    let mut random = Random::new(66);
    for (rows, columns, gates) in [(3, 40, 40), (2, 48, 3), (4, 35, 1)] {
        let x = random.numbers(rows * columns);
        let gate: Vec<f32> = random.numbers(rows * gates);
        let gate: Vec<f32> = gate.iter().map(|gate| 20.0 * gate).collect();
        let expected: Vec<f64> = (0..rows * columns)
            .map(|at| {
                let gate = gate[at / (columns / gates)];
                f64::from(x[at]) / (1.0 + (-f64::from(gate)).exp())
            })
            .collect();
        for level in levels() {
            let mut d = device(level, 2, Activations::Auto);
            let mut x = tensor(&mut d, columns, &x);
            let gate = tensor(&mut d, gates, &gate);
            d.sigmoid_gate(&mut x, &gate, rows).unwrap();
            let what = format!("{level:?} {rows} × {columns}, {gates} gates");
            assert_near(&values(&x, rows), &expected, 1e-6, &what);
        }
    }
    let mut d = device(SimdLevel::Auto, 1, Activations::Auto);
    let mut x = tensor(&mut d, 16, &[0.0; 16]);
    let gate = tensor(&mut d, 3, &[0.0; 3]);
    let error = d.sigmoid_gate(&mut x, &gate, 1).unwrap_err().to_string();
    assert!(
        error.contains("3 gates do not divide 16 columns"),
        "{error}"
    );
}
