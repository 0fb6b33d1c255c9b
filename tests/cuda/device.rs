//! The CUDA device as a whole: when it is refused, what is copied to it and back, what it waits
//! for, which steps it records, and that every failure of the driver is a typed error after
//! which nothing is leaked.

use common::cpu::Random;
use common::gpu;
use common::gpu::Gpu;
use quell::SamplingParams;
use quell::internals::device::cuda::*;
use quell::internals::device::*;
use quell::internals::sampling::SampleRow;
use quell::internals::weights::DType;
use std::sync::{Arc, mpsc};
use std::thread;

const HIDDEN: usize = 64;
const VOCABULARY: usize = 96;
const BLOCK: usize = 16;
const HEADS: HeadShape = HeadShape {
    q_heads: 2,
    kv_heads: 1,
    head_dim: 32,
    values: Values::BesideKeys,
};
const MODEL: ModelShape = ModelShape {
    layers: 1,
    heads: HEADS,
    narrow_heads: None,
    full_columns: 0,
    experts: None,
    streams: 0,
};
const LIMITS: DeviceLimits = DeviceLimits {
    rows: 16,
    sequences: 8,
    sequence_tokens: 64,
    block_tokens: BLOCK,
    groups: 1,
    vocabulary: VOCABULARY,
    model: MODEL,
};
/// Place of the model's only layer.
const LAYER: CacheLayer = CacheLayer {
    group: 0,
    index: 0,
    part: 0,
};
const INVALID_VALUE: i32 = 1;
/// The driver's error for calls that a recording forbids.
const STREAM_CAPTURE_UNSUPPORTED: i32 = 900;
/// Lengths of the prompts.
const PROMPTS: [usize; 3] = [5, 3, 1];

/// A model of one layer, without a feed-forward part.
struct Model {
    table: CudaLinear,
    output: CudaLinear,
    qkv: CudaLinear,
    out: CudaLinear,
    norm: CudaVector,
    rope: CudaRope,
    cache: CudaCache,
    residual: CudaTensor,
    normed: CudaTensor,
    rows: CudaTensor,
    attended: CudaTensor,
    delta: CudaTensor,
    gathered: CudaTensor,
    logits: CudaTensor,
}

fn linear(device: &mut CudaDevice, seed: u64, rows: usize) -> Result<CudaLinear, DeviceError> {
    let data: Vec<u8> = Random::new(seed)
        .numbers(rows * HIDDEN)
        .iter()
        .flat_map(|value| (value * 0.3).to_le_bytes())
        .collect();
    device.load_linear(&LinearSpec {
        parts: vec![WeightRows {
            dtype: DType::F32,
            rows,
            columns: HIDDEN,
            data: &data,
            order: RowOrder::AsStored,
        }],
        bias: None,
    })
}

impl Model {
    fn load(device: &mut CudaDevice) -> Result<Self, DeviceError> {
        device.reserve(&LIMITS)?;
        let shape = CacheShape {
            layers: 1,
            kv_heads: HEADS.kv_heads,
            head_dim: HEADS.head_dim,
            blocks: 16,
            block_tokens: BLOCK,
            values: Values::BesideKeys,
        };
        let rope = RopeSpec {
            inverse_frequencies: (0..16).map(|i| 0.7f32.powi(i)).collect(),
            magnitude: 1.0,
            max_positions: LIMITS.sequence_tokens,
        };
        let (rows, samples) = (LIMITS.rows, LIMITS.sequences);
        let (activation, full) = (Precision::Activation, Precision::Full);
        Ok(Self {
            table: linear(device, 1, VOCABULARY)?,
            output: linear(device, 4, VOCABULARY)?,
            qkv: linear(device, 2, HEADS.qkv_columns())?,
            out: linear(device, 3, HIDDEN)?,
            norm: device.load_vector(&[1.0; HIDDEN])?,
            rope: device.load_rope(&rope)?,
            residual: device.allocate(rows, HIDDEN, full)?,
            normed: device.allocate(rows, HIDDEN, activation)?,
            rows: device.allocate(rows, HEADS.qkv_columns(), activation)?,
            attended: device.allocate(rows, HEADS.q_columns(), activation)?,
            delta: device.allocate(rows, HIDDEN, activation)?,
            gathered: device.allocate(samples, HIDDEN, full)?,
            logits: device.allocate(samples, VOCABULARY, full)?,
            cache: device.allocate_cache(&shape)?,
        })
    }

    fn enqueue(&mut self, device: &mut CudaDevice, batch: &Batch) -> Result<(), DeviceError> {
        self.enqueue_rows(device, batch.rows(), batch.sample_rows.len())
    }

    fn enqueue_rows(
        &mut self,
        device: &mut CudaDevice,
        rows: usize,
        samples: usize,
    ) -> Result<(), DeviceError> {
        let spec = AttentionSpec {
            heads: HEADS,
            scale: 0.2,
            window: None,
            causal: true,
            chunked: false,
            softcap: None,
        };
        device.embed(&self.table, 1.0, &mut self.residual)?;
        device.rms_norm(&self.residual, &self.norm, 1e-6, rows, &mut self.normed)?;
        device.linear(&self.normed, &self.qkv, rows, &mut self.rows)?;
        let (rope, cache) = (&self.rope, &mut self.cache);
        device.rope_store(&mut self.rows, HEADS, None, rope, cache, LAYER)?;
        device.attend(
            &self.rows,
            &spec,
            None,
            &self.cache,
            LAYER,
            &mut self.attended,
        )?;
        device.linear(&self.attended, &self.out, rows, &mut self.delta)?;
        device.add(&mut self.residual, &self.delta, rows)?;
        if samples == 0 {
            return Ok(());
        }
        device.gather_samples(&self.residual, &mut self.gathered)?;
        device.rms_norm(&self.gathered, &self.norm, 1e-6, samples, &mut self.normed)?;
        device.linear(&self.normed, &self.output, samples, &mut self.logits)
    }

    fn launch(
        &mut self,
        device: &mut CudaDevice,
        batch: &Batch,
    ) -> Result<CudaPending, DeviceError> {
        if device.stage(batch)? == Staged::Enqueue {
            loop {
                let outcome = self.enqueue(device, batch);
                if device.finish(outcome)? == Finished::Done {
                    break;
                }
            }
        }
        self.sample(device, batch)
    }

    fn sample(&self, device: &mut CudaDevice, batch: &Batch) -> Result<CudaPending, DeviceError> {
        self.sample_with(device, batch, SamplingParams::greedy())
    }

    fn sample_with(
        &self,
        device: &mut CudaDevice,
        batch: &Batch,
        params: SamplingParams,
    ) -> Result<CudaPending, DeviceError> {
        let params = Arc::new(params);
        let row = |&row: &usize| SampleRow {
            params: Arc::clone(&params),
            position: batch.positions[row] + 1,
            history: Vec::new(),
            prompt_tokens: 0,
            ..SampleRow::default()
        };
        let rows: Vec<SampleRow> = batch.sample_rows.iter().map(row).collect();
        device.sample(&self.logits, &rows)
    }
}

/// Returns the batch of a step. Step 0 computes the prompts, and each later step computes one
/// token per sequence, by feedback. Sequence `i` has four blocks, from block `4 i` on.
fn batch(step: usize) -> Batch {
    let mut batch = Batch::new(1);
    for (index, &prompt) in PROMPTS.iter().enumerate() {
        let positions = match step {
            0 => 0..prompt,
            step => prompt + step - 1..prompt + step,
        };
        if step > 0 {
            let (row, sample) = (batch.rows(), index);
            batch.feedback.push(Feedback { row, sample });
        }
        let token = |position: usize| (7 * index + 3 * position + 1) as u32;
        let tokens: Vec<u32> = positions.clone().map(token).collect();
        let blocks = 0..positions.end.div_ceil(BLOCK);
        let blocks = blocks.map(|block| (4 * index + block) as u32);
        batch.push(&tokens, positions.start, BLOCK, [(0, blocks)]);
        batch.sample_rows.push(batch.rows() - 1);
    }
    batch
}

/// Returns a decode step of the first `count` sequences. It needs no samples of another step.
fn decode(count: usize) -> Batch {
    let mut batch = Batch::new(1);
    for (index, &prompt) in PROMPTS.iter().enumerate().take(count) {
        let block = (4 * index) as u32;
        batch.push(&[index as u32], prompt, BLOCK, [(0, [block])]);
        batch.sample_rows.push(index);
    }
    batch
}

/// Loads the model and runs this many steps, with two in flight.
fn run(options: &CudaOptions, steps: usize) -> Result<Vec<Vec<u32>>, DeviceError> {
    let mut device = CudaDevice::new(options)?;
    let mut model = Model::load(&mut device)?;
    let mut tokens = Vec::new();
    let mut collect = |device: &mut CudaDevice, pending| -> Result<(), DeviceError> {
        let samples = device.collect(pending)?;
        tokens.push(samples.tokens.iter().map(|token| token.id).collect());
        Ok(())
    };
    let mut in_flight = None;
    for step in 0..steps {
        let pending = model.launch(&mut device, &batch(step))?;
        if let Some(oldest) = in_flight.replace(pending) {
            collect(&mut device, oldest)?;
        }
    }
    if let Some(pending) = in_flight {
        collect(&mut device, pending)?;
    }
    Ok(tokens)
}

fn options() -> CudaOptions {
    CudaOptions::default()
}

fn refusal(gpu: &Gpu, index: usize) -> String {
    let available = CudaDevice::available(index).err();
    let options = CudaOptions {
        device: index,
        ..options()
    };
    let error = CudaDevice::new(&options).err().expect("no device");
    let DeviceError::Unavailable { device, reason } = &error else {
        panic!("{error}");
    };
    assert_eq!(*device, format!("cuda:{index}"));
    if let Some(available) = available {
        assert_eq!(available.to_string(), error.to_string());
    }
    assert!(!reason.contains('\n'), "{reason}");
    assert_eq!(gpu.leaks(), [""; 0]);
    reason.clone()
}

#[test]
fn an_unusable_gpu_is_refused_with_the_reason() {
    let gpu = gpu::lock();
    if gpu::is_real() {
        return;
    }
    let expect = |settings: &[(&str, &str)], index: usize, expected: &str| {
        gpu.reset();
        for (key, value) in settings {
            gpu.set(key, value);
        }
        let reason = refusal(&gpu, index);
        assert!(
            reason.contains(expected),
            "'{reason}' instead of '{expected}'"
        );
    };
    expect(&[("devices", "0")], 0, "finds no GPU");
    expect(&[("devices", "1")], 1, "there is only one GPU, cuda:0");
    expect(&[("devices", "3")], 5, "there are 3 GPUs, cuda:0 to cuda:2");
    expect(
        &[("driver", "12020")],
        0,
        "supports CUDA 12.2, and 12.4 is needed (driver 550",
    );
    expect(
        &[("compute_capability", "7.5")],
        0,
        "has compute capability 7.5, and 8.0",
    );
    gpu.reset();
    gpu.fail("cuDevicePrimaryCtxRetain", 1, 2);
    assert!(refusal(&gpu, 0).contains("has no memory left"));
    gpu.reset();
    gpu.fail("cuInit", 1, 999);
    assert!(
        CudaDevice::available(0)
            .unwrap_err()
            .to_string()
            .contains("cannot be initialised")
    );
    gpu.reset();
    CudaDevice::available(0).unwrap();
    drop(CudaDevice::new(&options()).unwrap());
}

#[test]
fn an_invalid_utilisation_is_refused() {
    let _gpu = gpu::lock();
    for utilisation in [0.0, -1.0, 1.5, f32::NAN] {
        let options = CudaOptions {
            utilisation,
            ..options()
        };
        let error = CudaDevice::new(&options).err().unwrap();
        assert!(matches!(error, DeviceError::Unsupported { .. }), "{error}");
    }
}

#[test]
fn matrices_are_read_back_unchanged() {
    let _gpu = gpu::lock();
    for activations in [CudaActivations::Bf16, CudaActivations::F16] {
        let mut device = CudaDevice::new(&CudaOptions {
            activations,
            ..options()
        })
        .unwrap();
        // Larger than one piece of an upload, and not a multiple of it.
        let mut random = Random::new(5);
        let values = random.numbers((17 << 20) / 4 + 40);
        let tensor = device.tensor(8, Precision::Full, &values).unwrap();
        assert!(device.values(&tensor, usize::MAX).unwrap() == values);
        let values: Vec<f32> = (0..64).map(|i| (i - 30) as f32 * 0.5).collect();
        let tensor = device.tensor(16, Precision::Activation, &values).unwrap();
        assert_eq!(device.values(&tensor, 4).unwrap(), values);
        assert_eq!(device.values(&tensor, 1).unwrap(), values[..16]);
    }
}

#[test]
fn the_memory_plan_counts_weights_and_leaves_a_share_free() {
    let gpu = gpu::lock();
    if !gpu::is_real() {
        gpu.set("memory", "1G");
    }
    let mut device = CudaDevice::new(&options()).unwrap();
    let before = device.cache_budget(0).unwrap();
    assert_eq!(device.cache_budget(1 << 20).unwrap(), before - (1 << 20));
    assert_eq!(device.weight_bytes(), 0);
    let weights = linear(&mut device, 1, VOCABULARY).unwrap();
    let bytes = device.weight_bytes();
    assert!(
        (2 * VOCABULARY * HIDDEN..4 * VOCABULARY * HIDDEN).contains(&bytes),
        "{bytes}"
    );
    let half = CudaDevice::new(&CudaOptions {
        utilisation: 0.45,
        ..options()
    });
    if !gpu::is_real() {
        assert_eq!(before, ((1 << 30) as f64 * f64::from(0.9f32)) as usize);
        assert!(device.cache_budget(0).unwrap() <= before - bytes);
        let half = half.unwrap().cache_budget(0).unwrap();
        assert!(half < before / 2 + 4096, "{half} of {before}");
    }
    drop(weights);
}

#[test]
fn a_too_large_allocation_reports_its_purpose() {
    let gpu = gpu::lock();
    if !gpu::is_real() {
        gpu.set("memory", "64M");
    }
    let mut device = CudaDevice::new(&options()).unwrap();
    let error = device.allocate(1 << 20, 1 << 20, Precision::Full).err();
    let Some(DeviceError::OutOfMemory { bytes, what, .. }) = error else {
        panic!("{error:?}");
    };
    assert_eq!((bytes, what.as_str()), (4 << 40, "activations"));
    // The device can still be used.
    device.allocate(16, 16, Precision::Full).unwrap();
    let error = device.allocate(usize::MAX / 2, 16, Precision::Full).err();
    assert!(matches!(error, Some(DeviceError::OutOfMemory { .. })));
}

#[test]
fn recorded_and_enqueued_steps_give_the_same_tokens() {
    let gpu = gpu::lock();
    let recorded = run(&options(), 8).unwrap();
    let graphs = CudaOptions {
        max_graphs: 0,
        ..options()
    };
    if !gpu::is_real() {
        // The first decode step is enqueued, and the others are launched as a graph.
        assert_eq!(gpu.statistic("graph_launches"), 6);
        gpu.reset();
    }
    assert_eq!(run(&graphs, 8).unwrap(), recorded);
    assert_eq!(recorded.len(), 8);
    let mut seen: Vec<u32> = recorded.concat();
    seen.sort_unstable();
    seen.dedup();
    assert!(seen.len() > 4, "{recorded:?} has too few distinct tokens");
    if !gpu::is_real() {
        assert_eq!(gpu.statistic("graph_launches"), 0);
        for seed in ["1", "2", "3"] {
            gpu.set("schedule", &format!("shuffle:{seed}"));
            assert_eq!(run(&options(), 8).unwrap(), recorded);
        }
        assert_eq!(gpu.leaks(), [""; 0]);
    }
}

#[test]
fn a_decode_step_waits_only_for_an_older_steps_samples() {
    let gpu = gpu::lock();
    if gpu::is_real() {
        return;
    }
    let mut device = CudaDevice::new(&options()).unwrap();
    let mut model = Model::load(&mut device).unwrap();
    let mut launch = |device: &mut CudaDevice, step| model.launch(device, &batch(step)).unwrap();
    let mut in_flight = launch(&mut device, 0);
    for step in 1..=4 {
        let next = launch(&mut device, step);
        device
            .collect(std::mem::replace(&mut in_flight, next))
            .unwrap();
    }
    for step in 5..12 {
        gpu.reset();
        let next = launch(&mut device, step);
        assert_eq!(gpu.statistic("synchronisations"), 0, "{:?}", gpu.calls());
        assert_eq!(gpu.statistic("graph_launches"), 1);
        let calls = gpu.calls();
        let called = |name: &str| calls.iter().any(|(function, _)| function.starts_with(name));
        assert!(!called("cuMemAlloc") && !called("cuMemFree") && !called("cuMemHostAlloc"));
        device
            .collect(std::mem::replace(&mut in_flight, next))
            .unwrap();
        assert_eq!(gpu.statistic("synchronisations"), 1);
    }
    device.collect(in_flight).unwrap();
}

#[test]
fn a_recorded_step_does_not_use_freed_memory() {
    let gpu = gpu::lock();
    let mut device = CudaDevice::new(&options()).unwrap();
    let mut model = Model::load(&mut device).unwrap();
    for step in 0..5 {
        let pending = model.launch(&mut device, &batch(step)).unwrap();
        device.collect(pending).unwrap();
    }
    // The recorded steps wrote to the logits that this replaces.
    model.logits = device
        .allocate(LIMITS.sequences, VOCABULARY, Precision::Full)
        .unwrap();
    let pending = model.launch(&mut device, &batch(5)).unwrap();
    let samples = device.collect(pending).unwrap();
    let tokens: Vec<u32> = samples.tokens.iter().map(|token| token.id).collect();
    drop((model, device));
    assert_eq!(tokens, run(&options(), 6).unwrap()[5]);
    drop(gpu);
}

#[test]
fn a_failure_to_wait_for_recorded_steps_is_reported() {
    let gpu = gpu::lock();
    if gpu::is_real() {
        return;
    }
    let mut device = CudaDevice::new(&options()).unwrap();
    let mut model = Model::load(&mut device).unwrap();
    for step in 0..4 {
        let pending = model.launch(&mut device, &batch(step)).unwrap();
        device.collect(pending).unwrap();
    }
    assert!(gpu.statistic("graph_launches") > 0);
    model.gathered = device
        .allocate(LIMITS.sequences, HIDDEN, Precision::Full)
        .unwrap();
    gpu.fail("cuStreamSynchronize", 1, INVALID_VALUE);
    let error = device.stage(&batch(4)).expect_err("it cannot wait");
    assert!(matches!(error, DeviceError::Failed { .. }), "{error}");
}

#[test]
fn a_recording_that_failed_is_tried_again_later() {
    const STEPS: usize = 56;
    let gpu = gpu::lock();
    if gpu::is_real() {
        return;
    }
    let tokens = run(&options(), STEPS).unwrap();
    assert_eq!(gpu.statistic("graph_launches"), STEPS as u64 - 2);
    // Step 2 is recorded first. 16 steps after a failure it is tried again, and then after 32.
    for (failures, recorded) in [(1, 2 + 17), (2, 2 + 17 + 33)] {
        gpu.reset();
        for nth in 1..=failures {
            gpu.fail("cuStreamBeginCapture_v2", nth, STREAM_CAPTURE_UNSUPPORTED);
        }
        assert_eq!(run(&options(), STEPS).unwrap(), tokens);
        assert_eq!(gpu.waiting_failures(), 0);
        assert_eq!(gpu.statistic("graph_launches"), (STEPS - recorded) as u64);
    }
}

/// Runs a step, and returns whether it was a replay.
fn replays(device: &mut CudaDevice, model: &mut Model, batch: &Batch) -> bool {
    let staged = device.stage(batch).unwrap();
    if staged == Staged::Enqueue {
        let outcome = model.enqueue(device, batch);
        assert_eq!(device.finish(outcome).unwrap(), Finished::Done);
    }
    let pending = model.sample(device, batch).unwrap();
    device.collect(pending).unwrap();
    staged == Staged::Replayed
}

#[test]
fn the_least_recently_used_graph_makes_way_for_a_new_one() {
    let gpu = gpu::lock();
    let options = CudaOptions {
        max_graphs: 2,
        ..options()
    };
    let mut device = CudaDevice::new(&options).unwrap();
    let mut model = Model::load(&mut device).unwrap();
    assert_eq!(device.step_memory(&LIMITS).most_graphs, 2);
    let mut step = |count| replays(&mut device, &mut model, &decode(count));
    // A step of a size is enqueued, the next one is recorded, and the third one is a replay.
    assert_eq!(
        [1, 1, 1, 2, 2, 2].map(&mut step),
        [false, false, true, false, false, true]
    );
    for _ in 0..5 {
        assert_eq!([2, 1].map(&mut step), [true, true], "two sizes fit");
    }
    // The step of two rows was used the longest time ago.
    assert_eq!([3, 3, 3].map(&mut step), [false, false, true]);
    assert_eq!([1, 3].map(&mut step), [true, true]);
    assert_eq!([2, 2, 2].map(&mut step), [false, false, true]);
    assert_eq!([3, 2, 1].map(&mut step), [true, true, false]);
    drop((model, device));
    if !gpu::is_real() {
        assert_eq!(gpu.leaks(), [""; 0]);
    }
}

#[test]
fn after_warming_up_the_first_step_of_each_size_is_a_replay() {
    let gpu = gpu::lock();
    let expected = run(&options(), 6).unwrap();
    for most in [usize::MAX, 2, 0, 3] {
        if !gpu::is_real() {
            gpu.reset();
        }
        let options = CudaOptions {
            warm_up: most,
            ..options()
        };
        let mut device = CudaDevice::new(&options).unwrap();
        let mut model = Model::load(&mut device).unwrap();
        // Steps of 1, 2, 4 and 8 rows, of which sequences have one unit of keys.
        let padded = if most == 3 { 4 } else { most };
        let sizes = [1, 2, 4, 8].into_iter().filter(|rows| *rows <= padded);
        assert_eq!(device.warm_up_steps(), sizes.clone().count());
        let mut rows_seen = Vec::new();
        for index in 0..device.warm_up_steps() {
            let enqueue = &mut |device: &mut CudaDevice, rows: usize| {
                rows_seen.push(rows);
                model.enqueue_rows(device, rows, rows)
            };
            device.warm_up(index, enqueue).unwrap();
        }
        // Each is enqueued twice: first as usual, then to record it.
        assert_eq!(
            rows_seen,
            sizes.flat_map(|rows| [rows; 2]).collect::<Vec<_>>()
        );
        let mut tokens = Vec::new();
        for step in 0..6 {
            let pending = model.launch(&mut device, &batch(step)).unwrap();
            let samples = device.collect(pending).unwrap();
            tokens.push(
                samples
                    .tokens
                    .iter()
                    .map(|token| token.id)
                    .collect::<Vec<_>>(),
            );
        }
        assert_eq!(tokens, expected, "warmed up to {most}");
        for count in [1, 2, 3] {
            let warm = count <= 2 && count <= most || count == 3;
            let replayed = replays(&mut device, &mut model, &decode(count));
            assert_eq!(replayed, warm, "{count} rows, warmed up to {most}");
        }
        if !gpu::is_real() {
            let warm = device.warm_up_steps() as u64;
            // Steps 1 to 5 have four padded rows.
            let decodes = if most >= 3 { 5 } else { 4 };
            let others = if most == 0 { 1 } else { 3 };
            assert_eq!(gpu.statistic("graph_launches"), warm + decodes + others);
        }
    }
}

#[test]
fn memory_for_steps_is_reserved_as_planned_and_does_not_grow() {
    let _gpu = gpu::lock();
    if gpu::is_real() {
        return; // others may use its memory at the same time
    }
    let mut device = CudaDevice::new(&options()).unwrap();
    let free = |device: &CudaDevice| device.free_memory().unwrap().unwrap();
    for model in [
        MODEL,
        ModelShape {
            full_columns: HIDDEN,
            experts: Some(ExpertShape {
                count: 8,
                top_k: 2,
                columns: HIDDEN,
                hidden: 96,
            }),
            ..MODEL
        },
        ModelShape {
            // Each of the two takes more of some memory.
            heads: HeadShape {
                q_heads: 16,
                kv_heads: 16,
                ..HEADS
            },
            narrow_heads: Some(HeadShape {
                q_heads: 16,
                kv_heads: 2,
                head_dim: 512,
                ..HEADS
            }),
            ..MODEL
        },
    ] {
        let limits = DeviceLimits { model, ..LIMITS };
        let mut device = CudaDevice::new(&options()).unwrap();
        let before = free(&device);
        device.reserve(&limits).unwrap();
        let planned = device.step_memory(&limits);
        let taken = before - free(&device);
        // The driver rounds each of fewer than 20 allocations up.
        let rounding = taken.checked_sub(planned.scratch);
        assert!(
            rounding.is_some_and(|bytes| bytes < 20 * 512),
            "{taken} bytes are taken for {model:?}, and {} are planned",
            planned.scratch
        );
    }
    let mut model = Model::load(&mut device).unwrap();
    let before = free(&device);
    for step in 0..6 {
        let batch = batch(step);
        if device.stage(&batch).unwrap() == Staged::Enqueue {
            let outcome = model.enqueue(&mut device, &batch);
            device.finish(outcome).unwrap();
        }
        let params = SamplingParams {
            temperature: 0.7,
            top_k: 10,
            top_p: 0.9,
            repetition_penalty: 1.1,
            logit_bias: vec![(3, 1.0)],
            logprobs: Some(20),
            ..SamplingParams::default()
        };
        let pending = model.sample_with(&mut device, &batch, params).unwrap();
        device.collect(pending).unwrap();
    }
    assert_eq!(free(&device), before);
}

#[test]
fn long_lists_of_sampling_parameters_do_not_invalidate_graphs() {
    let _gpu = gpu::lock();
    let mut device = CudaDevice::new(&options()).unwrap();
    let mut model = Model::load(&mut device).unwrap();
    let mut step = |device: &mut _, count| replays(device, &mut model, &decode(count));
    assert_eq!(
        [1, 1, 1].map(|count| step(&mut device, count)),
        [false, false, true]
    );
    let before = device.free_memory().unwrap();
    let biases = (0..20_000).map(|index| (index % VOCABULARY as u32, 0.5));
    let params = SamplingParams {
        logit_bias: biases.collect(),
        ..SamplingParams::greedy()
    };
    let pending = model.sample_with(&mut device, &decode(1), params).unwrap();
    device.collect(pending).unwrap();
    if !gpu::is_real() {
        assert!(device.free_memory().unwrap() < before, "nothing has grown");
    }
    assert!(replays(&mut device, &mut model, &decode(1)));
}

#[test]
fn a_second_device_on_the_gpu_does_not_disturb_a_recording() {
    let gpu = gpu::lock();
    let (go, wait) = mpsc::channel();
    let (say, hear) = mpsc::channel();
    let other = thread::spawn(move || {
        let mut device = CudaDevice::new(&options()).unwrap();
        let tensor = device.allocate(4, HIDDEN, Precision::Full).unwrap();
        say.send(()).unwrap();
        wait.recv().unwrap();
        // Frees device memory, and waits for the work that may use it.
        drop(tensor);
        say.send(()).unwrap();
    });
    let mut device = CudaDevice::new(&options()).unwrap();
    let mut model = Model::load(&mut device).unwrap();
    for step in 0..2 {
        let pending = model.launch(&mut device, &batch(step)).unwrap();
        device.collect(pending).unwrap();
    }
    hear.recv().unwrap();
    let third = batch(2);
    assert_eq!(device.stage(&third).unwrap(), Staged::Enqueue);
    let outcome = model.enqueue(&mut device, &third);
    go.send(()).unwrap();
    hear.recv().unwrap();
    assert_eq!(device.finish(outcome).unwrap(), Finished::Done);
    other.join().unwrap();
    let pending = model.sample(&mut device, &third).unwrap();
    device.collect(pending).unwrap();
    assert_eq!(device.stage(&batch(3)).unwrap(), Staged::Replayed);
    drop((model, device));
    drop(gpu);
}

#[test]
fn a_recording_that_another_thread_spoils_is_repeated() {
    let gpu = gpu::lock();
    if gpu::is_real() {
        return; // another thread's call may come too late
    }
    let expected = run(&options(), 4).unwrap();
    let mut device = CudaDevice::new(&options()).unwrap();
    let mut model = Model::load(&mut device).unwrap();
    for (step, expected) in expected.iter().enumerate() {
        let batch = batch(step);
        assert_eq!(device.stage(&batch).unwrap(), Staged::Enqueue);
        let outcome = model.enqueue(&mut device, &batch);
        let recorded = step == 2;
        if recorded {
            let context = cudarc::driver::result::ctx::get_current().unwrap().unwrap() as usize;
            let wait = move || {
                // SAFETY: the context is that of the device, which outlives the thread.
                let bound = unsafe { cudarc::driver::result::ctx::set_current(context as _) };
                bound.and_then(|()| cudarc::driver::result::ctx::synchronize())
            };
            let waited = thread::spawn(wait).join().unwrap();
            assert!(waited.is_err(), "the device was waited for");
        }
        let mut finished = device.finish(outcome).unwrap();
        assert_eq!(finished == Finished::Repeat, recorded, "step {step}");
        if recorded {
            let outcome = model.enqueue(&mut device, &batch);
            finished = device.finish(outcome).unwrap();
        }
        assert_eq!(finished, Finished::Done);
        let pending = model.sample(&mut device, &batch).unwrap();
        let tokens: Vec<u32> = device
            .collect(pending)
            .unwrap()
            .tokens
            .iter()
            .map(|token| token.id)
            .collect();
        assert_eq!(&tokens, expected, "step {step}");
    }
    let violations = gpu.violations();
    assert_eq!(violations.len(), 1, "{violations:#?}");
    assert!(
        violations[0].contains("cuCtxSynchronize"),
        "{violations:#?}"
    );
    drop((model, device));
    gpu.reset();
}

#[test]
fn a_batch_beyond_the_cache_is_refused_with_and_without_recording() {
    let _gpu = gpu::lock();
    let mut device = CudaDevice::new(&options()).unwrap();
    let mut model = Model::load(&mut device).unwrap();
    for step in 0..5 {
        let pending = model.launch(&mut device, &batch(step)).unwrap();
        device.collect(pending).unwrap();
        let mut refused = |change: fn(&mut Batch)| {
            let mut batch = batch(step + 1);
            change(&mut batch);
            let error = model.launch(&mut device, &batch).err().expect("refused");
            assert!(matches!(error, DeviceError::Failed { .. }), "{error}");
        };
        refused(|batch| batch.groups[0].entries[0] = 16);
        refused(|batch| batch.groups[0].slots[0] = 16 * BLOCK as u32);
        refused(|batch| batch.feedback[0].sample = PROMPTS.len());
    }
}

/// Functions that only release something. Their failures are logged and counted.
const CLEANUP: [&str; 10] = [
    "cuDevicePrimaryCtxRelease_v2",
    "cuEventDestroy_v2",
    "cuGraphDestroy",
    "cuGraphExecDestroy",
    "cuMemFreeHost",
    "cuMemFree_v2",
    "cuModuleUnload",
    "cuStreamDestroy_v2",
    "cuStreamIsCapturing",
    // Before memory is released. A step waits in this way only if it forgets recorded steps, which
    // another test covers.
    "cuStreamSynchronize",
];
/// Functions that may fail while a step is recorded: the step is enqueued instead.
const RECORDING: [&str; 5] = [
    "cuGraphInstantiateWithFlags",
    "cuLaunchKernel",
    "cuLaunchKernelEx",
    "cuStreamBeginCapture_v2",
    "cuStreamEndCapture",
];

const STEPS: usize = 5;

/// Makes each call of `function` fail in turn, with `code`.
fn fail_each(gpu: &Gpu, function: &str, count: u64, code: i32, expected: &[Vec<u32>]) {
    let sticky = code >= 700;
    // The context is checked before every call, and both streams are waited for before every
    // release, so testing some of these calls is enough.
    let stride = match function {
        "cuCtxGetCurrent" => 13,
        "cuStreamSynchronize" => 7,
        _ => 1,
    };
    for nth in (1..=count).step_by(stride) {
        gpu.reset();
        gpu.fail(function, nth, code);
        let outcome = run(&options(), STEPS);
        let what = format!("call {nth} of {count} of {function} with {code}: {outcome:?}");
        let waiting = gpu.waiting_failures();
        let (violations, leaks) = (gpu.violations(), gpu.leaks());
        assert!(
            violations.is_empty() && leaks.is_empty(),
            "{what}: {violations:?} {leaks:?}"
        );
        match outcome {
            Ok(tokens) => {
                // The result of the call was not needed, or there was a fallback.
                let harmless = CLEANUP.contains(&function)
                    || RECORDING.contains(&function)
                    || function == "cuCtxGetCurrent"
                    // A recorded step makes fewer calls.
                    || waiting > 0;
                assert!(harmless, "{what}");
                assert_eq!(tokens, expected, "{what}");
            }
            Err(error) => {
                assert_eq!(waiting, 0, "{what}");
                let typed = match &error {
                    DeviceError::Lost { .. } => sticky,
                    DeviceError::Failed { reason, .. } => !sticky && reason.contains("CUDA_ERROR"),
                    DeviceError::OutOfMemory { .. } => code == 2,
                    // The device could not be created.
                    DeviceError::Unavailable { .. } => true,
                    _ => false,
                };
                assert!(typed, "{what}");
            }
        }
    }
}

fn fail_everything(code: i32) {
    let gpu = gpu::lock();
    if gpu::is_real() {
        return;
    }
    let expected = run(&options(), STEPS).unwrap();
    let calls = gpu.calls();
    assert!(calls.len() > 35, "{calls:?}");
    for (function, count) in calls {
        // It only looks up the text of an error.
        if function != "cuGetErrorString" {
            fail_each(&gpu, &function, count, code, &expected);
        }
    }
    gpu.reset();
    // A new device works as before.
    assert_eq!(run(&options(), STEPS).unwrap(), expected);
}

#[test]
fn every_driver_call_may_fail() {
    fail_everything(1);
}

#[test]
fn memory_may_run_out_at_every_driver_call() {
    fail_everything(2);
}

#[test]
fn the_device_may_be_lost_at_every_driver_call() {
    fail_everything(719);
}

/// A measurement whose operations fail in their `nth` run, if it is given.
fn measure(device: &mut CudaDevice, nth: Option<usize>) -> Result<(), DeviceError> {
    let values = vec![1.0; 4 * HIDDEN];
    let mut x = device.tensor(HIDDEN, Precision::Full, &values)?;
    let y = device.tensor(HIDDEN, Precision::Activation, &values)?;
    let mut runs = 0;
    let times = device.time(2, |device| {
        runs += 1;
        device.add(&mut x, &y, 4)?;
        match nth == Some(runs) {
            true => Err(DeviceError::Failed {
                device: "test",
                operation: "measure",
                reason: "made to fail".to_owned(),
            }),
            false => Ok(()),
        }
    })?;
    assert_eq!(times.len(), 2);
    Ok(())
}

#[test]
fn a_measurement_that_fails_leaks_nothing_and_leaves_the_device_usable() {
    let gpu = gpu::lock();
    if gpu::is_real() {
        return;
    }
    let complete = || measure(&mut CudaDevice::new(&options())?, None);
    complete().unwrap();
    let calls = gpu.calls();
    assert!(
        calls
            .iter()
            .any(|(name, _)| name == "cuGraphInstantiateWithFlags")
    );
    // The first run is not recorded, and the second one is.
    for nth in [1, 2] {
        let mut device = CudaDevice::new(&options()).unwrap();
        let error = measure(&mut device, Some(nth)).unwrap_err();
        assert!(error.to_string().contains("made to fail"), "{error}");
        measure(&mut device, None).unwrap();
        drop(device);
        assert_eq!(gpu.leaks(), [""; 0], "run {nth} fails");
    }
    for (function, count) in calls {
        for (nth, code) in (1..=count).flat_map(|nth| [(nth, 1), (nth, 719)]) {
            gpu.reset();
            let Ok(mut device) = CudaDevice::new(&options()) else {
                panic!("nothing was made to fail");
            };
            gpu.fail(&function, nth, code);
            let outcome = measure(&mut device, None);
            let what = format!("call {nth} of {function} with {code}: {outcome:?}");
            if gpu.waiting_failures() == 0 && code < 700 {
                let again = measure(&mut device, None);
                assert!(again.is_ok(), "{what}: {again:?}");
            }
            drop(device);
            let (violations, leaks) = (gpu.violations(), gpu.leaks());
            assert!(
                violations.is_empty() && leaks.is_empty(),
                "{what}: {violations:?} {leaks:?}"
            );
        }
    }
    gpu.reset();
}

#[test]
fn failed_releases_are_counted() {
    let gpu = gpu::lock();
    if gpu::is_real() {
        return;
    }
    let mut device = CudaDevice::new(&options()).unwrap();
    let matrix = device.allocate(16, 16, Precision::Full).unwrap();
    assert_eq!(device.cleanup_errors(), 0);
    gpu.fail("cuMemFree_v2", 1, 1);
    drop(matrix);
    assert_eq!(device.cleanup_errors(), 1);
    device.allocate(16, 16, Precision::Full).unwrap();
}

#[test]
fn a_lost_device_keeps_reporting_its_error() {
    let gpu = gpu::lock();
    if gpu::is_real() {
        return;
    }
    // With another one, kernels are launched by another function.
    gpu.set("compute_capability", "9.0");
    let mut device = CudaDevice::new(&options()).unwrap();
    let mut model = Model::load(&mut device).unwrap();
    gpu.fail("cuLaunchKernelEx", 3, 700);
    let first = model.launch(&mut device, &batch(0)).err().unwrap();
    let DeviceError::Lost {
        operation, reason, ..
    } = &first
    else {
        panic!("{first}");
    };
    assert!(
        !operation.is_empty() && reason.contains("CUDA_ERROR_ILLEGAL_ADDRESS"),
        "{first}"
    );
    let text = first.to_string();
    let again = model.launch(&mut device, &batch(0)).err().unwrap();
    assert_eq!(again.to_string(), text);
    let allocated = device.allocate(1, 8, Precision::Full).err().unwrap();
    assert_eq!(allocated.to_string(), text);
    drop((model, device));
    assert_eq!(gpu.leaks(), [""; 0]);
}
