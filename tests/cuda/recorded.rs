//! Runs every operation on fixed inputs. The outputs must be bit-identical each time, and agree
//! with those of a real GPU where they were recorded.

use common::{gpu, record};
use quell::internals::device::cuda::{CudaDevice, CudaTensor};
use quell::internals::device::*;
use quell::internals::sampling::SampleRow;
use quell::internals::weights::{DType, RandomContent, RandomTensor, RandomWeights, WeightSource};
use quell::{CudaActivations, CudaOptions, SamplingParams};
use std::collections::BTreeMap;
use std::sync::Arc;

const BLOCK: usize = 16;
const HIDDEN: usize = 256;
const VOCABULARY: usize = 512;

/// Outputs by name.
type Outputs = BTreeMap<String, Vec<f32>>;

/// Returns numbers between −1 and 1 that depend on the seed.
fn values(seed: u32, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9) | 1;
    let next = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(next).collect()
}

fn weights(rows: usize, columns: usize, dtype: DType) -> RandomWeights {
    let tensor = RandomTensor {
        name: "weights".to_owned(),
        shape: vec![rows, columns],
        content: RandomContent::Weights,
    };
    RandomWeights::new(vec![tensor], dtype).unwrap()
}

fn spec(weights: &RandomWeights, bias: Option<Vec<f32>>) -> LinearSpec<'_> {
    let tensor = weights.tensor("weights").unwrap();
    let part = WeightRows {
        dtype: tensor.dtype,
        rows: tensor.shape[0],
        columns: tensor.shape[1],
        data: weights.bytes("weights").unwrap(),
        order: RowOrder::AsStored,
    };
    LinearSpec {
        parts: vec![part],
        bias,
    }
}

/// Builds a step of sequences with `(cached, new)` tokens, whose blocks alternate in the cache.
fn batch(sequences: &[(usize, usize)]) -> Batch {
    let mut batch = Batch::new(1);
    for (index, &(cached, new)) in sequences.iter().enumerate() {
        let token = |position: usize| (position * 37 + index) as u32 % VOCABULARY as u32;
        let tokens: Vec<u32> = (cached..cached + new).map(token).collect();
        let blocks = 0..(cached + new).div_ceil(BLOCK);
        let blocks = blocks.map(|block| (block * sequences.len() + index) as u32);
        batch.push(&tokens, cached, BLOCK, [(0, blocks)]);
        batch.sample_rows.push(batch.tokens.len() - 1);
    }
    batch
}

/// Place of the only layer in the cache.
const LAYER: CacheLayer = CacheLayer {
    group: 0,
    index: 0,
    part: 0,
};

/// A device and the outputs of its operations.
struct Run {
    device: CudaDevice,
    outputs: Outputs,
}

impl Run {
    fn new(activations: CudaActivations) -> Self {
        let options = CudaOptions {
            activations,
            max_graphs: 0,
            ..CudaOptions::default()
        };
        let mut device = CudaDevice::new(&options).unwrap();
        let limits = DeviceLimits {
            rows: 128,
            sequences: 8,
            sequence_tokens: 512,
            block_tokens: BLOCK,
            groups: 1,
            vocabulary: VOCABULARY,
            model: ModelShape::default(),
        };
        device.reserve(&limits).unwrap();
        Self {
            device,
            outputs: Outputs::new(),
        }
    }

    fn tensor(&mut self, seed: u32, rows: usize, columns: usize, full: bool) -> CudaTensor {
        let precision = if full {
            Precision::Full
        } else {
            Precision::Activation
        };
        let values = values(seed, rows * columns);
        self.device.tensor(columns, precision, &values).unwrap()
    }

    fn empty(&mut self, rows: usize, columns: usize, full: bool) -> CudaTensor {
        let precision = if full {
            Precision::Full
        } else {
            Precision::Activation
        };
        self.device.allocate(rows, columns, precision).unwrap()
    }

    fn keep(&mut self, name: impl Into<String>, tensor: &CudaTensor, rows: usize) {
        let values = self.device.values(tensor, rows).unwrap();
        let name = name.into();
        assert!(
            self.outputs.insert(name.clone(), values).is_none(),
            "{name}"
        );
    }

    fn rows(&mut self) {
        let rows = 5;
        let weight = self.device.load_vector(&values(1, HIDDEN)).unwrap();
        let x = self.tensor(2, rows, HIDDEN, true);
        let delta = self.tensor(3, rows, HIDDEN, false);
        let mut residual = self.tensor(4, rows, HIDDEN, true);
        let mut out = self.empty(rows, HIDDEN, false);
        self.device
            .rms_norm(&x, &weight, 1e-5, rows, &mut out)
            .unwrap();
        self.keep("rms_norm", &out, rows);
        self.device
            .add_rms_norm(&mut residual, &delta, &weight, 1e-5, rows, &mut out)
            .unwrap();
        self.keep("add_rms_norm", &out, rows);
        self.device
            .rms_norm_add(&delta, &weight, 1e-5, rows, &mut residual)
            .unwrap();
        self.device.add(&mut residual, &delta, rows).unwrap();
        self.keep("residual", &residual, rows);
        for (name, activation) in [("silu", Activation::Silu), ("gelu", Activation::GeluTanh)] {
            let gate_up = self.tensor(5, rows, 2 * HIDDEN, false);
            self.device
                .gated_activation(&gate_up, activation, rows, &mut out)
                .unwrap();
            self.keep(name, &out, rows);
        }
        let mut logits = self.tensor(6, rows, VOCABULARY, true);
        self.device.softcap(&mut logits, 0.5, rows).unwrap();
        self.keep("softcap", &logits, rows);
    }

    fn products(&mut self) {
        for dtype in [
            DType::BF16,
            DType::Q4_0,
            DType::Q4_1,
            DType::Q8_0,
            DType::Q4K,
            DType::Q6K,
        ] {
            let stored = weights(96, HIDDEN, dtype);
            let linear = spec(&stored, Some(values(7, 96)));
            let linear = self.device.load_linear(&linear).unwrap();
            for rows in [1, 20, 80] {
                let x = self.tensor(8, rows, HIDDEN, false);
                let mut out = self.empty(rows, 96, true);
                self.device.linear(&x, &linear, rows, &mut out).unwrap();
                self.keep(format!("linear-{}-{rows}", dtype.name()), &out, rows);
            }
        }
        for dtype in [DType::BF16, DType::Q8_0] {
            let stored = weights(VOCABULARY, HIDDEN, dtype);
            let table = self.device.load_linear(&spec(&stored, None)).unwrap();
            let step = batch(&[(0, 4), (9, 1)]);
            self.device.stage(&step).unwrap();
            let mut out = self.empty(5, HIDDEN, true);
            self.device.embed(&table, 2.0, &mut out).unwrap();
            self.keep(format!("embed-{}", dtype.name()), &out, 5);
            let mut gathered = self.empty(2, HIDDEN, true);
            self.device.gather_samples(&out, &mut gathered).unwrap();
            self.keep(format!("gather-{}", dtype.name()), &gathered, 2);
        }
    }

    fn attention(&mut self, head_dim: usize, window: Option<usize>) {
        let heads = HeadShape {
            q_heads: 4,
            kv_heads: 2,
            head_dim,
            values: Values::BesideKeys,
        };
        let rope = RopeSpec {
            inverse_frequencies: (0..head_dim / 2).map(|i| 0.9f32.powi(i as i32)).collect(),
            magnitude: 1.0,
            max_positions: 512,
        };
        let rope = self.device.load_rope(&rope).unwrap();
        let shape = CacheShape {
            layers: 1,
            kv_heads: heads.kv_heads,
            head_dim,
            blocks: 64,
            block_tokens: BLOCK,
            values: Values::BesideKeys,
        };
        let mut cache = self.device.allocate_cache(&shape).unwrap();
        let spec = AttentionSpec {
            heads,
            scale: 0.3,
            window,
            causal: true,
            chunked: false,
            softcap: window.map(|_| 5.0),
        };
        // A long and a short sequence in chunks, and then a step that decodes both.
        let steps = [[(0, 90), (0, 7)], [(90, 60), (7, 30)], [(150, 1), (37, 1)]];
        for (index, step) in steps.iter().enumerate() {
            let step = batch(step);
            let rows = step.rows();
            let mut qkv = self.tensor(10 + index as u32, rows, heads.qkv_columns(), false);
            let mut out = self.empty(rows, heads.q_columns(), false);
            let device = &mut self.device;
            device.stage(&step).unwrap();
            device
                .rope_store(&mut qkv, heads, None, &rope, &mut cache, LAYER)
                .unwrap();
            device
                .attend(&qkv, &spec, None, &cache, LAYER, &mut out)
                .unwrap();
            self.keep(format!("attend-{head_dim}-step{index}"), &out, rows);
        }
    }

    fn experts(&mut self) {
        let (count, width, rows) = (4, 64, 6);
        let gate_up = weights(2 * width, HIDDEN, DType::BF16);
        let down = weights(HIDDEN, width, DType::BF16);
        let gate_ups = vec![spec(&gate_up, None); count];
        let downs = vec![spec(&down, None); count];
        let experts = self
            .device
            .load_experts(&gate_ups, &downs, None, None)
            .unwrap();
        let routing = RoutingSpec {
            top_k: 2,
            score: RouterScore::Softmax,
            normalize: true,
            activation: Activation::Silu,
        };
        let x = self.tensor(20, rows, HIDDEN, false);
        let router = self.tensor(21, rows, count, true);
        let mut out = self.empty(rows, HIDDEN, false);
        self.device
            .experts(&x, &router, routing, &experts, rows, &mut out)
            .unwrap();
        self.keep("experts", &out, rows);
    }

    fn sampling(&mut self) {
        let params = [
            SamplingParams::greedy(),
            SamplingParams {
                temperature: 0.7,
                top_p: 0.9,
                logprobs: Some(4),
                ..SamplingParams::default()
            },
            SamplingParams {
                temperature: 1.3,
                top_k: 20,
                seed: 5,
                ..SamplingParams::default()
            },
        ];
        let rows: Vec<SampleRow> = params
            .into_iter()
            .map(|params| SampleRow {
                params: Arc::new(params),
                position: 3,
                history: Vec::new(),
                prompt_tokens: 0,
                ..SampleRow::default()
            })
            .collect();
        self.device
            .stage(&batch(&[(0, 1), (5, 1), (9, 1)]))
            .unwrap();
        let logits = self.tensor(30, 3, VOCABULARY, true);
        let pending = self.device.sample(&logits, &rows).unwrap();
        let sampled = self.device.collect(pending).unwrap().tokens;
        let tokens = sampled.iter().map(|token| token.id as f32).collect();
        self.outputs.insert("sample-tokens".to_owned(), tokens);
        let top = sampled[1].top.iter().map(|(_, logprob)| *logprob).collect();
        self.outputs.insert("sample-logprobs".to_owned(), top);
    }

    fn all(activations: CudaActivations) -> Outputs {
        let mut run = Self::new(activations);
        run.rows();
        run.products();
        run.attention(64, None);
        run.attention(128, Some(40));
        run.experts();
        run.sampling();
        run.outputs
    }
}

fn check(activations: CudaActivations, tolerance: f32) {
    let _gpu = gpu::lock();
    let outputs = Run::all(activations);
    assert!(outputs.len() > 30, "only {} outputs", outputs.len());
    let again = Run::all(activations);
    for (name, values) in &outputs {
        let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<u32>>();
        assert_eq!(
            bits(values),
            bits(&again[name]),
            "{name} differs the second time"
        );
        let tolerance = if name == "sample-tokens" {
            0.0
        } else {
            tolerance
        };
        record::outputs(&format!("{}-{name}", activations.name()), values, tolerance);
    }
    if !record::exists() {
        println!("there is no recording of a real GPU: compared only with a second run");
    }
}

// The tolerances allow a number near the midpoint between two values of the activation type to
// be rounded either way.

#[test]
fn bfloat16_outputs_are_reproducible_and_match_recordings() {
    check(CudaActivations::Bf16, 1.0 / 128.0);
}

#[test]
fn float16_outputs_are_reproducible_and_match_recordings() {
    check(CudaActivations::F16, 1.0 / 1024.0);
}
