//! The memory of a model on the GPU: what is planned is what is allocated, too little is a typed
//! error that says what would fit, and the limits that nobody sets are those of a GPU.

use common::golden::tiny;
use common::gpu::{self, Gpu};
use common::requests::idle;
use quell::internals::device::CacheOps;
use quell::internals::device::cuda::CudaDevice;
use quell::{
    CudaOptions, DeviceChoice, Engine, EngineConfig, LoadError, LoadOptions, MemoryPlan,
    ModelFiles, Request, SamplingParams,
};
use std::sync::{Arc, Mutex};

fn options(warm_up: usize) -> LoadOptions {
    LoadOptions {
        device: DeviceChoice::Cuda(0),
        cuda: CudaOptions {
            warm_up,
            ..CudaOptions::default()
        },
        ..LoadOptions::default()
    }
}

fn load(model: &str, config: &EngineConfig) -> Result<Engine, LoadError> {
    Engine::load_with(tiny(model), config.clone(), options(0))
}

fn plan(model: &str, config: &EngineConfig) -> Result<MemoryPlan, LoadError> {
    let files = ModelFiles::open(&tiny(model)).unwrap();
    files.plan(config, &options(0)).map(|(_, plan)| plan)
}

/// Returns the virtual GPU with this much memory, or `None` if the tests' GPU is a real one.
fn with_memory(memory: &str) -> Option<Gpu> {
    let gpu = gpu::lock();
    if gpu::is_real() {
        return None;
    }
    gpu.set("memory", memory);
    Some(gpu)
}

fn free() -> usize {
    let device = CudaDevice::new(&CudaOptions::default()).unwrap();
    device.free_memory().unwrap().unwrap()
}

fn request(index: usize) -> Request {
    let prompt: Vec<u32> = (0..5 + index as u32).map(|i| 3 + i * 31 % 500).collect();
    let mut request = Request::new(prompt).max_tokens(6);
    request.ignore_eos = true;
    request
}

/// Returns the answer to a request.
fn answer(engine: &Engine) -> Vec<u32> {
    let answer = engine.generate(request(0).greedy()).unwrap();
    let answer = answer.complete_blocking().unwrap();
    answer.tokens.iter().map(|token| token.id).collect()
}

/// Returns what an error about memory proposes for the setting `name`.
fn proposed(error: &LoadError, name: &str) -> usize {
    let LoadError::Memory { remedy, .. } = error else {
        panic!("{error}");
    };
    let text = remedy.split_once(&format!("{name} of "));
    let (_, text) = text.unwrap_or_else(|| panic!("{error}"));
    let digits: String = text.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().unwrap()
}

#[test]
fn a_loaded_model_takes_the_memory_that_was_planned() {
    let Some(_gpu) = with_memory("1G") else {
        return;
    };
    let config = EngineConfig {
        max_batch_tokens: Some(256),
        max_sequences: 16,
        kv_cache_bytes: Some(1 << 20),
        ..EngineConfig::default()
    };
    // Without a norm on their input, olmo2's layers multiply the residual stream itself.
    for model in ["llama", "gemma3", "olmo2", "qwen3-moe"] {
        let planned = plan(model, &config).unwrap();
        let before = free();
        let engine = load(model, &config).unwrap();
        let taken = before - free();
        let of = &engine.info().model.as_ref().unwrap().memory;
        let loaded = |plan: &MemoryPlan| {
            let MemoryPlan {
                activations,
                scratch,
                graphs,
                graph_bytes,
                pinned,
                batch_tokens,
                cache_blocks,
                ..
            } = *plan;
            let graphs = (graphs, graph_bytes);
            (
                activations,
                scratch,
                graphs,
                pinned,
                batch_tokens,
                cache_blocks,
            )
        };
        assert_eq!(loaded(of), loaded(&planned), "{model}");
        assert!(
            of.graphs > 0 && of.graph_bytes > 0 && of.pinned > 0,
            "{model}"
        );
        let counted = of.weights + of.activations + of.scratch + of.cache();
        // Only the weights of norms are not counted.
        let rest = taken
            .checked_sub(counted)
            .expect("less is taken than counted");
        assert!(rest < 16 << 10, "{model}: {rest} bytes are not counted");
        // Biases, and the zeros that fill up records, are not in the estimate.
        let estimate = planned.weights.abs_diff(of.weights);
        assert!(
            10 * estimate < of.weights,
            "{model}: {estimate} of {}",
            of.weights
        );
    }
}

#[test]
fn nothing_is_allocated_while_requests_are_served() {
    let Some(gpu) = with_memory("1G") else {
        return;
    };
    let config = EngineConfig {
        max_batch_tokens: Some(64),
        max_sequences: 8,
        kv_cache_bytes: Some(1 << 20),
        prefix_cache: false,
        audit: false,
        ..EngineConfig::default()
    };
    let engine = load("llama", &config).unwrap();
    let count = || {
        let calls = gpu.calls();
        let of = |name| calls.iter().find(|(function, _)| function == name);
        ["cuMemAlloc_v2", "cuMemFree_v2"].map(|name| of(name).map_or(0, |(_, count)| *count))
    };
    let before = count();
    let streams: Vec<_> = (0..24)
        .map(|index| {
            let sampling = SamplingParams {
                temperature: 0.8,
                top_k: 20,
                repetition_penalty: 1.1,
                logprobs: Some(5),
                ..SamplingParams::default()
            };
            let request = request(3 * index);
            let request = match index % 3 {
                0 => request.greedy(),
                _ => request.sampling(sampling),
            };
            engine.generate(request).unwrap()
        })
        .collect();
    for stream in streams {
        stream.complete_blocking().unwrap();
    }
    idle(&engine);
    assert!(gpu.statistic("graph_launches") > 0);
    assert_eq!(count(), before);
}

#[test]
fn too_many_tokens_per_step_are_refused_with_a_number_that_fits() {
    let Some(_gpu) = with_memory("64M") else {
        return;
    };
    let config = EngineConfig {
        max_batch_tokens: Some(1 << 18),
        ..EngineConfig::default()
    };
    let error = load("llama", &config).unwrap_err();
    let text = error.to_string();
    for part in [
        "cuda:0 has 57 MiB",
        "weights 1,",
        "activations",
        "KV cache at least 1",
    ] {
        assert!(text.contains(part), "{text}");
    }
    assert_eq!(plan("llama", &config).unwrap_err().to_string(), text);
    let tokens = proposed(&error, "max_batch_tokens");
    assert!((512..1 << 18).contains(&tokens), "{text}");
    let config = EngineConfig {
        max_batch_tokens: Some(tokens),
        ..config
    };
    assert_eq!(answer(&load("llama", &config).unwrap()).len(), 6);
}

#[test]
fn a_kv_cache_that_does_not_fit_is_refused_with_a_size_that_does() {
    let Some(_gpu) = with_memory("64M") else {
        return;
    };
    let config = EngineConfig {
        max_batch_tokens: Some(64),
        max_sequences: 512,
        kv_cache_bytes: Some(1 << 30),
        ..EngineConfig::default()
    };
    let error = load("llama", &config).unwrap_err();
    let bytes = proposed(&error, "kv_cache_bytes");
    let config = EngineConfig {
        kv_cache_bytes: Some(bytes),
        ..config
    };
    assert_eq!(answer(&load("llama", &config).unwrap()).len(), 6);
}

#[test]
fn if_a_configured_kv_cache_fits_with_other_limits_the_error_says_so() {
    let Some(_gpu) = with_memory("64M") else {
        return;
    };
    let config = EngineConfig {
        max_batch_tokens: Some(1 << 18),
        kv_cache_bytes: Some(1 << 30),
        ..EngineConfig::default()
    };
    let error = load("llama", &config).unwrap_err();
    let config = EngineConfig {
        max_batch_tokens: Some(proposed(&error, "max_batch_tokens")),
        kv_cache_bytes: Some(proposed(&error, "kv_cache_bytes")),
        ..config
    };
    assert_eq!(answer(&load("llama", &config).unwrap()).len(), 6);
}

#[test]
fn a_configured_kv_cache_lowers_the_default_of_tokens_per_step() {
    let Some(_gpu) = with_memory("1G") else {
        return;
    };
    let small = EngineConfig {
        kv_cache_bytes: Some(1 << 20),
        ..EngineConfig::default()
    };
    let with = |tokens| {
        let config = EngineConfig {
            max_batch_tokens: Some(tokens),
            ..small.clone()
        };
        let plan = plan("llama", &config).unwrap();
        plan.weights + plan.activations + plan.scratch + plan.graph_bytes
    };
    // Room for what 512 tokens take, but not for what 8192 take.
    let (least, most) = (with(512), with(8192));
    let config = EngineConfig {
        kv_cache_bytes: Some(free() - (least + most) / 2),
        ..small.clone()
    };
    let default = plan("llama", &config).unwrap().batch_tokens;
    assert!((512..8192).contains(&default), "{default}");
    assert_eq!(answer(&load("llama", &config).unwrap()).len(), 6);
}

#[test]
fn a_gpu_that_no_limits_suit_is_refused() {
    let Some(_gpu) = with_memory("1M") else {
        return;
    };
    let error = load("llama", &EngineConfig::default()).unwrap_err();
    assert!(matches!(error, LoadError::Memory { .. }), "{error}");
    let text = error.to_string();
    assert!(
        text.contains("no limits leave room for a sequence of 512 tokens"),
        "{text}"
    );
}

#[test]
fn a_second_engine_gets_the_memory_that_the_first_one_leaves() {
    let Some(_gpu) = with_memory("64M") else {
        return;
    };
    let config = EngineConfig {
        max_batch_tokens: Some(64),
        kv_cache_bytes: Some(8 << 20),
        ..EngineConfig::default()
    };
    let first = load("llama", &config).unwrap();
    let expected = answer(&first);
    // This one takes all that is left.
    let rest = EngineConfig {
        max_sequences: 4096,
        kv_cache_bytes: None,
        ..config.clone()
    };
    let second = load("llama", &rest).unwrap();
    assert!(second.info().cache_blocks > first.info().cache_blocks);
    let error = load("llama", &rest).unwrap_err();
    assert!(matches!(error, LoadError::Memory { .. }), "{error}");
    assert_eq!(answer(&second), expected);
    // Both compute at the same time.
    std::thread::scope(|scope| {
        let other = scope.spawn(|| answer(&first));
        assert_eq!(answer(&second), expected);
        assert_eq!(other.join().unwrap(), expected);
    });
    drop(second);
    assert_eq!(answer(&load("llama", &rest).unwrap()), expected);
    assert_eq!(answer(&first), expected);
}

#[test]
fn the_default_of_tokens_per_step_depends_on_the_gpu_and_settings_win() {
    let default = EngineConfig::default();
    let tokens = |config: &EngineConfig| plan("llama", config).unwrap().batch_tokens;
    {
        let Some(_gpu) = with_memory("8G") else {
            return;
        };
        assert_eq!(tokens(&default), 8192);
        let explicit = EngineConfig {
            max_batch_tokens: Some(100),
            ..default.clone()
        };
        assert_eq!(tokens(&explicit), 100);
        // A step has no use for more tokens than the KV cache holds.
        let small_cache = EngineConfig {
            kv_cache_bytes: Some(2000 * 256),
            ..default.clone()
        };
        assert_eq!(tokens(&small_cache), 2048);
        let engine = load("llama", &small_cache).unwrap();
        assert_eq!(engine.info().max_batch_tokens, 2048);
    }
    let Some(_gpu) = with_memory("64M") else {
        return;
    };
    let less = tokens(&default);
    assert!((512..8192).contains(&less), "{less}");
    let cpu = LoadOptions::cpu();
    let files = ModelFiles::open(&tiny("llama")).unwrap();
    let (_, plan) = files.plan(&default, &cpu).unwrap();
    assert_eq!((plan.batch_tokens, plan.graphs), (512, 0));
}

#[test]
fn a_model_is_warmed_up_while_it_is_loaded_unless_an_option_forbids_it() {
    let gpu = gpu::lock();
    let config = EngineConfig {
        max_batch_tokens: Some(64),
        max_sequences: 4,
        kv_cache_bytes: Some(1 << 20),
        audit: true,
        ..EngineConfig::default()
    };
    for model in ["llama", "gemma3", "qwen3-moe"] {
        let mut expected = None;
        let mut parts = None;
        // Steps of 1, 2 and 4 sequences.
        for (warm_up, sizes) in [(0, 0), (1, 1), (usize::MAX, 3)] {
            if !gpu::is_real() {
                gpu.reset();
            }
            let seen = Arc::new(Mutex::new(Vec::new()));
            let progress = Arc::clone(&seen);
            let options = LoadOptions {
                progress: Some(Box::new(move |done, total| {
                    progress.lock().unwrap().push((done, total));
                })),
                ..options(warm_up)
            };
            let engine = Engine::load_with(tiny(model), config.clone(), options).unwrap();
            let seen = seen.lock().unwrap();
            let total = sizes + *parts.get_or_insert(seen.len() - 1);
            let each = (0..=total).map(|done| (done, total));
            assert!(each.eq(seen.iter().copied()), "{model}: {seen:?}");
            let launches = || (!gpu::is_real()).then(|| gpu.statistic("graph_launches"));
            let before = launches();
            let tokens = answer(&engine);
            if let Some((before, after)) = before.zip(launches()) {
                assert_eq!(before, sizes as u64);
                // The prompt gives the first of six tokens. Without a warm-up, the next step is
                // enqueued. A further step may be in flight when the last token is known.
                let replays = if warm_up == 0 { 4 } else { 5 };
                let found = after - before;
                assert!((replays..=replays + 1).contains(&found), "{model}: {found}");
            }
            idle(&engine);
            assert_eq!(*expected.get_or_insert(tokens.clone()), tokens, "{model}");
        }
    }
}
