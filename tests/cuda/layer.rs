//! One layer's rotary embedding, KV cache and attention on the CUDA device, for tests.
#![allow(dead_code)] // each test file uses only part of this module

use half::{bf16, f16};
use quell::internals::device::cuda::*;
use quell::internals::device::*;
use std::ops::Range;

pub const TYPES: [CudaActivations; 2] = [CudaActivations::Bf16, CudaActivations::F16];

/// Limits for steps with this block size, to be reserved on a [`device`].
pub fn limits(block_tokens: usize) -> DeviceLimits {
    DeviceLimits {
        rows: 64,
        sequences: 16,
        sequence_tokens: 2048,
        block_tokens,
        groups: 1,
        vocabulary: 32,
        model: ModelShape::default(),
    }
}

pub fn device(activations: CudaActivations) -> CudaDevice {
    CudaDevice::new(&CudaOptions {
        activations,
        ..CudaOptions::default()
    })
    .unwrap()
}

/// Rounds `value` to the type of the activations.
pub fn kept(activations: CudaActivations, value: f32) -> f32 {
    match activations {
        CudaActivations::Bf16 => bf16::from_f32(value).to_f32(),
        CudaActivations::F16 => f16::from_f32(value).to_f32(),
    }
}

/// Returns the number whose bits the cache holds.
pub fn decoded(activations: CudaActivations, bits: u16) -> f32 {
    match activations {
        CudaActivations::Bf16 => bf16::from_bits(bits).to_f32(),
        CudaActivations::F16 => f16::from_bits(bits).to_f32(),
    }
}

/// Returns the largest relative error of rounding to the type of the activations.
pub fn rounding(activations: CudaActivations) -> f64 {
    match activations {
        CudaActivations::Bf16 => 1.0 / 256.0,
        CudaActivations::F16 => 1.0 / 2048.0,
    }
}

/// A rotary embedding that changes no bit.
pub fn identity(positions: usize) -> RopeSpec {
    RopeSpec {
        inverse_frequencies: vec![0.0; 2],
        magnitude: 1.0,
        max_positions: positions,
    }
}

/// Tokens `range` of one sequence, whose blocks are `table`. `qkv` holds the rows of all tokens
/// up to the end of the range.
pub struct Part<'a> {
    pub qkv: &'a [f32],
    pub range: Range<usize>,
    pub table: &'a [u32],
}

/// One layer of a cache. Every number in the cache is NaN until it is written.
pub struct Layer<'d> {
    pub device: &'d mut CudaDevice,
    pub cache: CudaCache,
    pub rope: CudaRope,
    pub heads: HeadShape,
    /// Weights for queries and for keys, and whether they apply per head.
    pub norm: Option<(CudaVector, CudaVector, bool)>,
    /// Whether values are normalised where queries and keys are.
    pub normalizes_values: bool,
    /// The sinks of the heads.
    pub sinks: Option<CudaVector>,
    block_tokens: usize,
}

/// Place of the layer in the cache.
pub const LAYER: CacheLayer = CacheLayer {
    group: 0,
    index: 1,
    part: 0,
};

pub const EPSILON: f32 = 1e-5;

impl<'d> Layer<'d> {
    pub fn new(
        device: &'d mut CudaDevice,
        heads: HeadShape,
        rope: &RopeSpec,
        block_tokens: usize,
        blocks: usize,
    ) -> Self {
        device.reserve(&limits(block_tokens)).unwrap();
        let shape = CacheShape {
            layers: 2,
            kv_heads: heads.kv_heads,
            head_dim: heads.head_dim,
            blocks,
            block_tokens,
            values: Values::BesideKeys,
        };
        let mut cache = device.allocate_cache(&shape).unwrap();
        let all: Vec<u32> = (0..blocks as u32).collect();
        device.poison(&mut cache, &all).unwrap();
        let rope = device.load_rope(rope).unwrap();
        Self {
            device,
            cache,
            rope,
            heads,
            norm: None,
            normalizes_values: false,
            sinks: None,
            block_tokens,
        }
    }

    /// Returns the inputs of a step with these parts, and its queries, keys and values.
    pub fn batch(&self, parts: &[Part<'_>]) -> (Batch, Vec<f32>) {
        let (mut batch, mut rows) = (Batch::new(1), Vec::new());
        let columns = self.heads.qkv_columns();
        for part in parts {
            let Range { start, end } = part.range;
            rows.extend_from_slice(&part.qkv[start * columns..end * columns]);
            let table = [(0, part.table.iter().copied())];
            batch.push(&vec![0; end - start], start, self.block_tokens, table);
        }
        (batch, rows)
    }

    /// Stages `batch`, and checks that its operations must be enqueued.
    pub fn stage(&mut self, batch: &Batch) {
        assert_eq!(self.device.stage(batch).unwrap(), Staged::Enqueue);
    }

    pub fn rope_store(&mut self, qkv: &mut CudaTensor) -> Result<(), DeviceError> {
        let norm = self.norm.as_ref().map(|(q, k, per_head)| QkNorm {
            q,
            k,
            epsilon: EPSILON,
            per_head: *per_head,
            values: self.normalizes_values,
        });
        let (rope, cache) = (&self.rope, &mut self.cache);
        self.device
            .rope_store(qkv, self.heads, norm.as_ref(), rope, cache, LAYER)
    }

    /// Rotates and stores the rows and computes their attention, in one operation.
    pub fn rope_attend(
        &mut self,
        qkv: &mut CudaTensor,
        spec: &AttentionSpec,
        out: &mut CudaTensor,
    ) -> Result<(), DeviceError> {
        let norm = self.norm.as_ref().map(|(q, k, per_head)| QkNorm {
            q,
            k,
            epsilon: EPSILON,
            per_head: *per_head,
            values: self.normalizes_values,
        });
        let attention = RotaryAttention {
            rotary: Rotary {
                norm,
                rope: &self.rope,
                query_scale: None,
            },
            spec: *spec,
            sinks: self.sinks.as_ref(),
        };
        self.device
            .rope_attend(qkv, &attention, &mut self.cache, LAYER, out)
    }

    pub fn tensor(&mut self, columns: usize, values: &[f32]) -> CudaTensor {
        let precision = Precision::Activation;
        self.device.tensor(columns, precision, values).unwrap()
    }

    /// Writes keys and values of the parts to the cache. Returns the rows after the operation.
    pub fn store(&mut self, parts: &[Part<'_>]) -> Vec<f32> {
        let (batch, rows) = self.batch(parts);
        let mut qkv = self.tensor(self.heads.qkv_columns(), &rows);
        self.stage(&batch);
        self.rope_store(&mut qkv).unwrap();
        self.device.finish(Ok(())).unwrap();
        self.device.values(&qkv, batch.rows()).unwrap()
    }

    /// Writes keys and values of the parts to the cache. Returns the attention of each part.
    pub fn step(&mut self, spec: &AttentionSpec, parts: &[Part<'_>]) -> Vec<Vec<f32>> {
        self.step_with(spec, parts, false)
    }

    /// Like [`Layer::step`], with one operation for all if it is `fused`.
    pub fn step_with(
        &mut self,
        spec: &AttentionSpec,
        parts: &[Part<'_>],
        fused: bool,
    ) -> Vec<Vec<f32>> {
        let (batch, rows) = self.batch(parts);
        let columns = self.heads.q_columns();
        let mut qkv = self.tensor(self.heads.qkv_columns(), &rows);
        // Outputs that are not written stay NaN.
        let mut out = self.tensor(columns, &vec![f32::NAN; batch.rows() * columns]);
        self.stage(&batch);
        match fused {
            true => self.rope_attend(&mut qkv, spec, &mut out).unwrap(),
            false => {
                self.rope_store(&mut qkv).unwrap();
                let (device, cache, sinks) = (&mut self.device, &self.cache, self.sinks.as_ref());
                device
                    .attend(&qkv, spec, sinks, cache, LAYER, &mut out)
                    .unwrap();
            }
        }
        let device = &mut self.device;
        device.finish(Ok(())).unwrap();
        let values = device.values(&out, batch.rows()).unwrap();
        let mut values = values.as_slice();
        parts
            .iter()
            .map(|part| {
                let (of_part, others) = values.split_at(part.range.len() * columns);
                values = others;
                of_part.to_vec()
            })
            .collect()
    }
}
