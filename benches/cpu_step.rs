//! Tokens per second of whole prefill and decode steps on the CPU device, for a model shaped
//! like SmolLM2-135M with arbitrary weights.
//!
//! `cargo bench --bench cpu_step [-- THREADS]`

use quell::SamplingParams;
use quell::internals::device::cpu::*;
use quell::internals::device::*;
use quell::internals::sampling::SampleRow;
use quell::internals::weights::DType;
use std::collections::BTreeMap;
use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, Instant};

const HIDDEN: usize = 576;
const INNER: usize = 1536;
const LAYERS: usize = 30;
const VOCABULARY: usize = 49152;
const HEADS: HeadShape = HeadShape {
    q_heads: 9,
    kv_heads: 3,
    head_dim: 64,
    values: Values::BesideKeys,
};
const BLOCK: usize = 16;

struct Layer {
    norms: [CpuVector; 2],
    qkv: CpuLinear,
    output: CpuLinear,
    gate_up: CpuLinear,
    down: CpuLinear,
}

struct Model {
    device: CpuDevice,
    table: CpuLinear,
    layers: Vec<Layer>,
    norm: CpuVector,
    rope: CpuRope,
    cache: CpuCache,
    residual: CpuTensor,
    x: CpuTensor,
    qkv: CpuTensor,
    attended: CpuTensor,
    gate_up: CpuTensor,
    inner: CpuTensor,
    samples: CpuTensor,
    logits: CpuTensor,
    /// Total time by operation.
    times: BTreeMap<&'static str, Duration>,
}

fn data(dtype: DType, rows: usize, columns: usize) -> Vec<u8> {
    let mut data = vec![0x11; dtype.bytes_for(columns).unwrap_or(0) * rows];
    let mut state = 1u32;
    for (i, byte) in data.iter_mut().enumerate() {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        if i % dtype.block_bytes() >= 4 {
            *byte = (state >> 24) as u8;
        }
    }
    data
}

fn linear(
    device: &mut CpuDevice,
    parts: &[(DType, usize)],
    columns: usize,
) -> Result<CpuLinear, DeviceError> {
    let bytes: Vec<_> = parts
        .iter()
        .map(|&(dtype, rows)| data(dtype, rows, columns))
        .collect();
    let parts = parts
        .iter()
        .zip(&bytes)
        .map(|(&(dtype, rows), data)| WeightRows {
            dtype,
            rows,
            columns,
            data,
            order: RowOrder::AsStored,
        });
    device.load_linear(&LinearSpec {
        parts: parts.collect(),
        bias: None,
    })
}

impl Model {
    fn new(options: &CpuOptions, rows: usize, blocks: usize) -> Result<Self, DeviceError> {
        let mut device = CpuDevice::new(options)?;
        let d = &mut device;
        let ones = |n| vec![1.0; n];
        let q = DType::Q4_1;
        let layers = (0..LAYERS).map(|_| {
            Ok(Layer {
                norms: [d.load_vector(&ones(HIDDEN))?, d.load_vector(&ones(HIDDEN))?],
                qkv: linear(d, &[(q, 576), (q, 192), (q, 192)], HIDDEN)?,
                output: linear(d, &[(q, HIDDEN)], HIDDEN)?,
                gate_up: linear(d, &[(q, INNER), (q, INNER)], HIDDEN)?,
                down: linear(d, &[(q, HIDDEN)], INNER)?,
            })
        });
        let layers = layers.collect::<Result<Vec<_>, DeviceError>>()?;
        let pairs = HEADS.head_dim / 2;
        let frequency = |i| 10_000f32.powf(-(i as f32) / pairs as f32);
        let rope = RopeSpec {
            inverse_frequencies: (0..pairs).map(frequency).collect(),
            magnitude: 1.0,
            max_positions: 8192,
        };
        let HeadShape {
            kv_heads, head_dim, ..
        } = HEADS;
        let shape = CacheShape {
            layers: LAYERS,
            kv_heads,
            head_dim,
            blocks,
            block_tokens: BLOCK,
            values: Values::BesideKeys,
        };
        Ok(Self {
            table: linear(d, &[(DType::Q8_0, VOCABULARY)], HIDDEN)?,
            layers,
            norm: d.load_vector(&ones(HIDDEN))?,
            rope: d.load_rope(&rope)?,
            cache: d.allocate_cache(&shape)?,
            residual: d.allocate(rows, HIDDEN, Precision::Full)?,
            x: d.allocate(rows, HIDDEN, Precision::Full)?,
            qkv: d.allocate(rows, HEADS.qkv_columns(), Precision::Full)?,
            attended: d.allocate(rows, HEADS.q_columns(), Precision::Full)?,
            gate_up: d.allocate(rows, 2 * INNER, Precision::Full)?,
            inner: d.allocate(rows, INNER, Precision::Full)?,
            samples: d.allocate(64, HIDDEN, Precision::Full)?,
            logits: d.allocate(64, VOCABULARY, Precision::Full)?,
            times: BTreeMap::new(),
            device,
        })
    }

    fn step(&mut self, batch: &Batch) -> Result<(), DeviceError> {
        let (d, rows) = (&mut self.device, batch.rows());
        let times = &mut self.times;
        let mut last = Instant::now();
        let mut lap = |name| {
            let now = Instant::now();
            *times.entry(name).or_default() += now - last;
            last = now;
        };
        d.stage(batch)?;
        d.embed(&self.table, 1.0, &mut self.residual)?;
        lap("embed");
        d.rms_norm(
            &self.residual,
            &self.layers[0].norms[0],
            1e-5,
            rows,
            &mut self.x,
        )?;
        lap("norm");
        let spec = AttentionSpec {
            heads: HEADS,
            scale: 0.125,
            window: None,
            causal: true,
            chunked: false,
            softcap: None,
        };
        for (index, layer) in self.layers.iter().enumerate() {
            let place = CacheLayer::single_group(index);
            d.linear(&self.x, &layer.qkv, rows, &mut self.qkv)?;
            lap("linear qkv");
            d.rope_store(
                &mut self.qkv,
                HEADS,
                None,
                &self.rope,
                &mut self.cache,
                place,
            )?;
            lap("rope_store");
            d.attend(
                &self.qkv,
                &spec,
                None,
                &self.cache,
                place,
                &mut self.attended,
            )?;
            lap("attend");
            d.linear(&self.attended, &layer.output, rows, &mut self.x)?;
            lap("linear output");
            let (residual, x) = (&mut self.residual, &mut self.x);
            let mut normed = std::mem::replace(x, d.allocate(0, 0, Precision::Full)?);
            let mut out = d.allocate(rows, HIDDEN, Precision::Full)?;
            d.add_rms_norm(residual, &normed, &layer.norms[1], 1e-5, rows, &mut out)?;
            lap("norm");
            d.linear(&out, &layer.gate_up, rows, &mut self.gate_up)?;
            lap("linear gate_up");
            d.gated_activation(&self.gate_up, Activation::Silu, rows, &mut self.inner)?;
            lap("activation");
            d.linear(&self.inner, &layer.down, rows, &mut out)?;
            lap("linear down");
            let next = self
                .layers
                .get(index + 1)
                .map_or(&self.norm, |next| &next.norms[0]);
            d.add_rms_norm(residual, &out, next, 1e-5, rows, &mut normed)?;
            lap("norm");
            self.x = normed;
        }
        let samples = batch.sample_rows.len();
        if samples > 0 {
            d.gather_samples(&self.x, &mut self.samples)?;
            d.linear(&self.samples, &self.table, samples, &mut self.logits)?;
            lap("linear logits");
            let row = SampleRow {
                params: Arc::new(SamplingParams::greedy()),
                position: 0,
                history: vec![],
                prompt_tokens: 0,
                ..SampleRow::default()
            };
            let pending = d.sample(&self.logits, &vec![row; samples])?;
            d.collect(pending)?;
            lap("sample");
        }
        Ok(())
    }

    /// Builds a batch of `count` sequences, each with `tokens` cached tokens and `new` rows.
    fn batch(count: usize, tokens: usize, new: usize) -> Batch {
        let blocks = (tokens + new).div_ceil(BLOCK);
        let mut batch = Batch::new(1);
        for sequence in 0..count {
            let token = |position: usize| (position * 31 % VOCABULARY) as u32;
            let new: Vec<u32> = (tokens..tokens + new).map(token).collect();
            let own = (sequence * blocks..(sequence + 1) * blocks).map(|block| block as u32);
            batch.push(&new, tokens, BLOCK, [(0, own)]);
            batch.sample_rows.push(batch.tokens.len() - 1);
        }
        batch
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let threads = std::env::args()
        .skip(1)
        .find_map(|argument| argument.parse().ok());
    let options = CpuOptions {
        threads,
        ..Default::default()
    };
    let start = Instant::now();
    let mut model = Model::new(&options, 512, 4096)?;
    println!(
        "{}; made in {:?}",
        model.device.info().description,
        start.elapsed()
    );
    println!(
        "{:.1} MB of weights",
        model.device.weight_bytes() as f64 / 1e6
    );
    for (name, batch) in [
        ("prefill 512", Model::batch(1, 0, 512)),
        ("prefill 128", Model::batch(1, 0, 128)),
        ("decode 1 at 128", Model::batch(1, 128, 1)),
        ("decode 1 at 1024", Model::batch(1, 1024, 1)),
        ("decode 16 at 128", Model::batch(16, 128, 1)),
        ("decode 32 at 128", Model::batch(32, 128, 1)),
    ] {
        model.step(&batch)?;
        model.times.clear();
        let begin = Instant::now();
        let mut times = Vec::new();
        while times.len() < 5 || begin.elapsed() < Duration::from_millis(1500) {
            let start = Instant::now();
            model.step(&batch)?;
            times.push(start.elapsed());
        }
        times.sort_unstable();
        let median = times[times.len() / 2];
        let rate = batch.rows() as f64 / median.as_secs_f64();
        println!("{name:>18}: {rate:8.1} tok/s, {median:.2?} per step");
        let mut parts: Vec<_> = model.times.iter().collect();
        parts.sort_unstable_by_key(|(_, time)| std::cmp::Reverse(**time));
        let steps = times.len() as f64;
        let parts = parts
            .into_iter()
            .map(|(name, time)| format!("{name} {:.0}", time.as_secs_f64() * 1e6 / steps));
        println!("{:>18}  µs: {}", "", parts.collect::<Vec<_>>().join(", "));
    }
    Ok(())
}
