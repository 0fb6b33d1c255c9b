//! Attention layers in several groups, each with block tables of its own, on any device.
//!
//! All groups take their blocks from one cache. A block that a group gives back is overwritten
//! with NaN, and the next one to need a block, in whatever group or sequence, gets it.

use quell::internals::device::cpu::{CpuDevice, CpuTensor};
#[cfg(feature = "product")]
use quell::internals::device::cuda::{CudaDevice, CudaTensor};
use quell::internals::device::*;
use std::ops::Range;

/// What these tests need of a device besides its operations.
pub trait TestDevice: Device {
    /// Creates a tensor of activations.
    fn create(&mut self, columns: usize, values: &[f32]) -> Self::Tensor;

    /// Creates a tensor of float32 numbers.
    fn create_full(&mut self, columns: usize, values: &[f32]) -> Self::Tensor;

    /// Reads the leading rows of a tensor.
    fn read(&self, tensor: &Self::Tensor, rows: usize) -> Vec<f32>;
}

impl TestDevice for CpuDevice {
    fn create(&mut self, columns: usize, values: &[f32]) -> CpuTensor {
        crate::cpu::tensor(self, columns, values)
    }

    fn create_full(&mut self, columns: usize, values: &[f32]) -> CpuTensor {
        crate::cpu::tensor(self, columns, values)
    }

    fn read(&self, tensor: &CpuTensor, rows: usize) -> Vec<f32> {
        crate::cpu::values(tensor, rows)
    }
}

#[cfg(feature = "product")]
impl TestDevice for CudaDevice {
    fn create(&mut self, columns: usize, values: &[f32]) -> CudaTensor {
        self.tensor(columns, Precision::Activation, values).unwrap()
    }

    fn create_full(&mut self, columns: usize, values: &[f32]) -> CudaTensor {
        self.tensor(columns, Precision::Full, values).unwrap()
    }

    fn read(&self, tensor: &CudaTensor, rows: usize) -> Vec<f32> {
        self.values(tensor, rows).unwrap()
    }
}

/// A layer, and the group that it is in.
#[derive(Clone, Copy, Debug)]
pub struct GroupedLayer {
    pub place: CacheLayer,
    pub window: Option<usize>,
}

/// Returns seven layers in four groups of different windows. Blocks hold two layers.
pub fn layers() -> Vec<GroupedLayer> {
    let layer = |group, index, window| GroupedLayer {
        place: CacheLayer {
            group,
            index,
            part: 0,
        },
        window,
    };
    vec![
        layer(1, 0, Some(40)),
        layer(0, 0, None),
        layer(2, 1, Some(150)),
        layer(1, 1, Some(40)),
        layer(3, 0, Some(1)),
        layer(0, 1, None),
        layer(2, 0, Some(150)),
    ]
}

const LAYERS_PER_BLOCK: usize = 2;
pub const GROUPS: usize = 4;

/// Where block tables begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tables {
    /// At the first token.
    Whole,
    /// As late as devices allow. The blocks before are given back.
    Late,
}

/// Tokens that a step computes of a sequence.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    pub sequence: usize,
    pub count: usize,
}

/// Returns the index of the first block that a token at `position` needs.
pub fn first_block(window: Option<usize>, position: usize, block_tokens: usize) -> usize {
    let first = window.map_or(0, |window| (position + 1).saturating_sub(window));
    first / ATTENTION_SPAN * ATTENTION_SPAN / block_tokens
}

/// A sequence: for each group the index of the first block and the blocks, and how many tokens
/// have been computed.
#[derive(Clone, Default)]
pub struct Sequence {
    pub tables: Vec<(usize, Vec<u32>)>,
    pub computed: usize,
}

/// The layers on a device, with their cache.
pub struct Grouped<D: TestDevice> {
    pub device: D,
    pub cache: D::Cache,
    pub sequences: Vec<Sequence>,
    pub heads: HeadShape,
    pub block_tokens: usize,
    rope: D::Rope,
    free: Vec<u32>,
    tables: Tables,
}

impl<D: TestDevice> Grouped<D> {
    pub fn new(
        mut device: D,
        heads: HeadShape,
        block_tokens: usize,
        blocks: usize,
        tables: Tables,
    ) -> Self {
        let limits = DeviceLimits {
            rows: 64,
            sequences: 16,
            sequence_tokens: 2048,
            block_tokens,
            groups: GROUPS,
            vocabulary: 32,
            model: ModelShape::default(),
        };
        device.reserve(&limits).unwrap();
        let shape = CacheShape {
            layers: LAYERS_PER_BLOCK,
            kv_heads: heads.kv_heads,
            head_dim: heads.head_dim,
            blocks,
            block_tokens,
            values: Values::BesideKeys,
        };
        let mut cache = device.allocate_cache(&shape).unwrap();
        let all: Vec<u32> = (0..blocks as u32).collect();
        device.poison(&mut cache, &all).unwrap();
        // It changes no bit.
        let rope = RopeSpec {
            inverse_frequencies: vec![0.0; 2],
            magnitude: 1.0,
            max_positions: 2048,
        };
        Self {
            rope: device.load_rope(&rope).unwrap(),
            device,
            cache,
            sequences: Vec::new(),
            heads,
            block_tokens,
            free: all,
            tables,
        }
    }

    pub fn spec(&self, layer: GroupedLayer) -> AttentionSpec {
        AttentionSpec {
            heads: self.heads,
            scale: 2.0 / (self.heads.head_dim as f32).sqrt(),
            window: layer.window,
            causal: true,
            chunked: false,
            softcap: None,
        }
    }

    /// Gives a sequence the blocks that it needs to compute its next `count` tokens, and takes
    /// those that it no longer needs.
    pub fn prepare(&mut self, Part { sequence, count }: Part) {
        if self.sequences.len() <= sequence {
            self.sequences.resize(sequence + 1, Sequence::default());
        }
        let Sequence { tables, computed } = &mut self.sequences[sequence];
        tables.resize(GROUPS, (0, Vec::new()));
        for layer in layers() {
            let (first, blocks) = &mut tables[layer.place.group];
            let needed = match self.tables {
                Tables::Whole => 0,
                Tables::Late => first_block(layer.window, *computed, self.block_tokens),
            };
            let gone = needed.saturating_sub(*first).min(blocks.len());
            let gone: Vec<u32> = blocks.drain(..gone).collect();
            if !gone.is_empty() {
                self.device.poison(&mut self.cache, &gone).unwrap();
            }
            self.free.extend(gone);
            *first = needed.max(*first);
            while (*first + blocks.len()) * self.block_tokens < *computed + count {
                blocks.push(self.free.pop().expect("the cache is large enough"));
            }
        }
    }

    /// Returns the inputs of a step.
    pub fn batch(&self, parts: &[Part]) -> Batch {
        let mut batch = Batch::new(GROUPS);
        for &Part { sequence, count } in parts {
            let Sequence { tables, computed } = &self.sequences[sequence];
            let tables = tables.iter();
            let tables = tables.map(|(first, blocks)| (*first, blocks.iter().copied()));
            batch.push(&vec![0; count], *computed, self.block_tokens, tables);
        }
        batch
    }

    /// Computes a step. `inputs` returns queries, keys and values of some tokens of a sequence in
    /// a layer, by its index. Returns the results of each layer, one row after the other.
    pub fn step(
        &mut self,
        parts: &[Part],
        inputs: &dyn Fn(usize, usize, Range<usize>) -> Vec<f32>,
    ) -> Vec<Vec<f32>> {
        parts.iter().for_each(|&part| self.prepare(part));
        let batch = self.batch(parts);
        assert_eq!(self.device.stage(&batch).unwrap(), Staged::Enqueue);
        let (columns, rows) = (self.heads.q_columns(), batch.rows());
        let mut tensors = Vec::new();
        for index in 0..layers().len() {
            let values = parts.iter().flat_map(|&Part { sequence, count }| {
                let start = self.sequences[sequence].computed;
                inputs(index, sequence, start..start + count)
            });
            let values: Vec<f32> = values.collect();
            let qkv = self.device.create(self.heads.qkv_columns(), &values);
            // Outputs that are not written stay NaN.
            let out = self.device.create(columns, &vec![f32::NAN; rows * columns]);
            tensors.push((qkv, out));
        }
        self.enqueue(&mut tensors).unwrap();
        let results = tensors.iter().map(|(_, out)| self.device.read(out, rows));
        let results = results.collect();
        self.device.finish(Ok(())).unwrap();
        for &Part { sequence, count } in parts {
            self.sequences[sequence].computed += count;
        }
        results
    }

    /// Enqueues all layers: for each, the queries, keys and values, and the result.
    pub fn enqueue(&mut self, tensors: &mut [(D::Tensor, D::Tensor)]) -> Result<(), DeviceError> {
        for (layer, (qkv, out)) in layers().into_iter().zip(tensors) {
            let (spec, heads) = (self.spec(layer), self.heads);
            let (device, cache, rope) = (&mut self.device, &mut self.cache, &self.rope);
            device.rope_store(qkv, heads, None, rope, cache, layer.place)?;
            device.attend(qkv, &spec, None, cache, layer.place, out)?;
        }
        Ok(())
    }

    /// Computes the attention of a layer for a step whose inputs may be invalid.
    pub fn attend(&mut self, batch: &Batch, layer: GroupedLayer) -> Result<(), DeviceError> {
        self.device.stage(batch)?;
        let rows = batch.rows();
        let spec = self.spec(layer);
        let columns = [self.heads.qkv_columns(), self.heads.q_columns()];
        let [mut qkv, mut out] =
            columns.map(|columns| self.device.create(columns, &vec![0.0; rows * columns]));
        let (device, cache) = (&mut self.device, &mut self.cache);
        let stored = device.rope_store(&mut qkv, self.heads, None, &self.rope, cache, layer.place);
        let attended =
            stored.and_then(|()| device.attend(&qkv, &spec, None, cache, layer.place, &mut out));
        self.device.finish(Ok(())).unwrap();
        attended
    }
}

/// The inputs of all layers: queries, keys and values of the tokens of each sequence.
pub struct Inputs {
    /// One entry per layer and sequence, `[layer][sequence]`.
    rows: Vec<Vec<Vec<f32>>>,
    columns: usize,
}

impl Inputs {
    /// Creates inputs for sequences of these lengths from random numbers.
    pub fn new(
        heads: HeadShape,
        lengths: &[usize],
        numbers: &mut dyn FnMut(usize) -> Vec<f32>,
    ) -> Self {
        let columns = heads.qkv_columns();
        let mut rows = Vec::new();
        for _ in layers() {
            let of_layer = lengths.iter().map(|length| numbers(length * columns));
            rows.push(of_layer.collect());
        }
        Self { rows, columns }
    }

    /// Returns the rows of some tokens.
    pub fn rows(&self, layer: usize, sequence: usize, tokens: Range<usize>) -> &[f32] {
        &self.rows[layer][sequence][tokens.start * self.columns..tokens.end * self.columns]
    }

    /// Returns the rows of all tokens.
    pub fn all(&self, layer: usize, sequence: usize) -> &[f32] {
        &self.rows[layer][sequence]
    }
}

/// Computes all steps. Returns the results of each layer and sequence, `[layer][sequence]`.
pub fn run<D: TestDevice>(
    grouped: &mut Grouped<D>,
    inputs: &Inputs,
    steps: &[Vec<Part>],
) -> Vec<Vec<Vec<f32>>> {
    let columns = grouped.heads.q_columns();
    let rows = |layer, sequence, tokens| inputs.rows(layer, sequence, tokens).to_vec();
    let sequences = inputs.rows[0].len();
    let mut results = vec![vec![Vec::new(); sequences]; layers().len()];
    for step in steps {
        let of_step = grouped.step(step, &rows);
        for (of_layer, results) in of_step.iter().zip(&mut results) {
            let mut rest = &of_layer[..];
            for &Part { sequence, count } in step {
                let (own, others) = rest.split_at(count * columns);
                results[sequence].extend_from_slice(own);
                rest = others;
            }
        }
    }
    results
}

/// Compares the results of a layer and a sequence, the last argument, with a reference that is
/// computed from their inputs.
pub type Check<'a> = dyn Fn(&AttentionSpec, &[f32], &[f32]) + 'a;

/// Checks that a device computes the same bits whether the tables of its groups begin with the
/// sequence or with the span of the window, and passes the results of each layer and sequence to
/// `check`, which compares them with a reference.
pub fn late_tables_change_no_bit<D: TestDevice>(
    device: &mut dyn FnMut() -> D,
    heads: HeadShape,
    block_tokens: usize,
    numbers: &mut dyn FnMut(usize) -> Vec<f32>,
    check: &Check<'_>,
) {
    let lengths = [430, 300, 21];
    let inputs = Inputs::new(heads, &lengths, numbers);
    let part = |sequence, count| Part { sequence, count };
    let mut steps = vec![
        vec![part(0, 150)],
        vec![part(1, 30), part(0, 129)],
        vec![part(0, 1), part(1, 140), part(2, 3)],
        vec![part(2, 1), part(0, 1), part(1, 127)],
        vec![part(0, 140)],
    ];
    // All decode for a while, one of them beside the rest of a prompt.
    steps.extend((0..3).map(|_| vec![part(0, 1), part(1, 1), part(2, 1)]));
    steps.push(vec![part(2, 14), part(0, 6)]);
    let count = |sequence| {
        let parts = steps.iter().flatten();
        let own = parts.filter(|part| part.sequence == sequence);
        own.map(|part| part.count).sum::<usize>()
    };
    assert_eq!([count(0), count(1), count(2)], lengths);

    let whole = lengths.iter().map(|length| length.div_ceil(block_tokens));
    let whole = GROUPS * whole.sum::<usize>();
    let mut expected = Grouped::new(device(), heads, block_tokens, whole, Tables::Whole);
    let expected = run(&mut expected, &inputs, &steps);
    // Too few blocks for whole tables, so that blocks go from group to group.
    let fewer = whole * 17 / 20;
    let mut late = Grouped::new(device(), heads, block_tokens, fewer, Tables::Late);
    let found = run(&mut late, &inputs, &steps);
    let firsts = late.sequences[0].tables.iter().map(|(first, _)| *first);
    let firsts: Vec<usize> = firsts.collect();
    assert!(
        firsts[0] == 0 && firsts[1] > firsts[2] && firsts[2] > 0,
        "{firsts:?}"
    );

    for (index, layer) in layers().into_iter().enumerate() {
        for sequence in 0..lengths.len() {
            let (found, expected) = (&found[index][sequence], &expected[index][sequence]);
            assert_same(
                found,
                expected,
                heads,
                &format!("{layer:?}, sequence {sequence}"),
            );
            check(&late.spec(layer), inputs.all(index, sequence), found);
        }
    }
}

/// Checks that the results do not depend on how a sequence is cut into steps, while its groups
/// give back blocks.
pub fn chunk_sizes_change_no_bit<D: TestDevice>(
    device: &mut dyn FnMut() -> D,
    heads: HeadShape,
    numbers: &mut dyn FnMut(usize) -> Vec<f32>,
) {
    const TOKENS: usize = 310;
    let inputs = Inputs::new(heads, &[TOKENS], numbers);
    let mut results = |block_tokens: usize, chunks: &[usize]| {
        let (mut steps, mut left) = (Vec::new(), TOKENS);
        for &chunk in chunks.iter().cycle() {
            let count = chunk.min(left);
            steps.push(vec![Part { sequence: 0, count }]);
            left -= count;
            if left == 0 {
                break;
            }
        }
        let blocks = GROUPS * TOKENS.div_ceil(block_tokens);
        let mut grouped = Grouped::new(device(), heads, block_tokens, blocks, Tables::Late);
        let results = run(&mut grouped, &inputs, &steps);
        results.concat()
    };
    let expected = results(16, &[TOKENS]);
    for (block_tokens, chunks) in [
        (16, &[150, 1, 9, 1, 1, 60][..]),
        (32, &[17, 100]),
        (48, &[129]),
        (256, &[200, 1]),
    ] {
        let found = results(block_tokens, chunks);
        for (index, (found, expected)) in found.iter().zip(&expected).enumerate() {
            let what = format!("layer {index}, {block_tokens} {chunks:?}");
            assert_same(found, expected, heads, &what);
        }
    }
}

/// Checks that a table that begins too late or ends too early, and a group that a batch does not
/// have, are refused.
pub fn missing_blocks_and_groups_are_refused<D: TestDevice>(device: D, heads: HeadShape) {
    let mut grouped = Grouped::new(device, heads, 16, 160, Tables::Late);
    let part = |count| Part { sequence: 0, count };
    grouped.prepare(part(500));
    grouped.sequences[0].computed = 500;
    grouped.prepare(part(2));
    let good = grouped.batch(&[part(2)]);
    for layer in layers() {
        grouped.attend(&good, layer).unwrap();
    }
    let mut refused = |layer: GroupedLayer, change: &dyn Fn(&mut BatchGroup), complaint: &str| {
        let mut batch = good.clone();
        change(&mut batch.groups[layer.place.group]);
        let error = grouped.attend(&batch, layer).unwrap_err();
        assert!(matches!(error, DeviceError::Failed { .. }), "{error}");
        assert!(error.to_string().contains(complaint), "{error}");
    };
    let first = |group: &mut BatchGroup| {
        group.tables[0].first += 1;
        group.tables[0].entries.start += 1;
    };
    let last = |group: &mut BatchGroup| group.tables[0].entries.end -= 1;
    for layer in layers() {
        let group = layer.place.group;
        refused(layer, &first, &format!("group {group} begin too late"));
        refused(layer, &last, "ends after 496 tokens");
    }
    let beyond = GroupedLayer {
        place: CacheLayer {
            group: GROUPS,
            index: 0,
            part: 0,
        },
        window: None,
    };
    let error = grouped.attend(&good, beyond).unwrap_err();
    assert!(error.to_string().contains("group 4 of layers"), "{error}");
    // A longer window than that of the group.
    let longer = GroupedLayer {
        window: Some(118),
        ..layers()[0]
    };
    let error = grouped.attend(&good, longer).unwrap_err();
    let complaint = "enough for a window of 117 tokens, but a layer attends to a window of 118";
    assert!(error.to_string().contains(complaint), "{error}");
}

/// Requires that two results agree bit for bit and are finite.
fn assert_same(found: &[f32], expected: &[f32], heads: HeadShape, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let mut pairs = found.iter().zip(expected);
    let differs = pairs.position(|(a, b)| a.to_bits() != b.to_bits() || !a.is_finite());
    let row = differs.map(|at| at / heads.q_columns());
    assert_eq!(row, None, "{what}");
}
