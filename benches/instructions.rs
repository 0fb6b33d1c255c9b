//! Steps for counting instructions. `scripts/count-instructions` runs this program under
//! callgrind twice, with fewer and with more steps, and takes the difference.
//!
//! `instructions scheduler STEPS`: the scheduler plans and commits decode steps of 64
//! sequences. `instructions decode STEPS`: a model of SmolLM2-135M's shape, but with six
//! layers, decodes one sequence on one thread with AVX2, which callgrind supports.

use quell::internals::cache::BlockCache;
use quell::internals::device::cpu::CpuDevice;
use quell::internals::model::ModelSource;
use quell::internals::runner::{ModelRunner, Runner};
use quell::internals::schedule::{Commit, Policy, Scheduler, SequenceSpec, StepPlan};
use quell::internals::weights::DType;
use quell::{CpuOptions, EngineConfig, RequestId, SimdLevel};
use std::error::Error;
use std::process::ExitCode;

const BLOCK: usize = 16;
/// Steps that always run, in addition to those asked for.
const WARM: usize = 20;

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let (what, steps) = (arguments.next(), arguments.next());
    let steps = steps.and_then(|text| text.parse().ok());
    let outcome = match (what.as_deref(), steps) {
        (Some("scheduler"), Some(steps)) => scheduler(steps),
        (Some("decode"), Some(steps)) => decode(steps),
        _ => {
            println!("for scripts/count-instructions: scheduler STEPS or decode STEPS");
            Ok(())
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("instructions: {error}");
            ExitCode::FAILURE
        }
    }
}

fn spec(index: usize, prompt: usize) -> SequenceSpec {
    let prompt = (0..prompt).map(|i| (index * 100 + i) as u32).collect();
    SequenceSpec::new(prompt, 4000)
}

fn commit(scheduler: &mut Scheduler, plan: &StepPlan, tokens: impl Iterator<Item = u32>) {
    scheduler.step_succeeded(plan);
    for (item, token) in plan.samples().zip(tokens) {
        let committed = scheduler.commit(plan.step, item, [token]);
        assert_eq!(committed, Commit::Continues);
    }
    scheduler.step_completed(plan.step);
}

fn scheduler(steps: usize) -> Result<(), Box<dyn Error>> {
    const SEQUENCES: usize = 64;
    const PROMPT: usize = 128;
    let policy = Policy {
        max_sequences: SEQUENCES,
        max_batch_tokens: SEQUENCES * PROMPT,
        ..Policy::default()
    };
    let blocks = SEQUENCES * (PROMPT + WARM + steps + 2).div_ceil(BLOCK);
    let mut scheduler = Scheduler::new(policy, BlockCache::new(blocks, BLOCK, true));
    for index in 0..SEQUENCES {
        scheduler.add(RequestId::from_u64(index as u64), spec(index, PROMPT));
    }
    let mut plan = StepPlan::default();
    for step in 0..WARM + steps {
        assert!(scheduler.plan_into(&mut plan));
        commit(&mut scheduler, &plan, std::iter::repeat(step as u32));
    }
    Ok(())
}

fn decode(steps: usize) -> Result<(), Box<dyn Error>> {
    let settings = serde_json::json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "num_hidden_layers": 6,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100_000.0,
        "vocab_size": 49_152,
        "tie_word_embeddings": true,
        "eos_token_id": 2
    });
    let source = ModelSource::random(&settings, DType::Q4_1)?;
    let device = CpuDevice::new(&CpuOptions {
        threads: Some(1),
        simd: SimdLevel::Avx2,
        ..CpuOptions::default()
    })?;
    let config = EngineConfig {
        kv_cache_bytes: Some(16 << 20),
        swap_bytes: 0,
        ..EngineConfig::default()
    };
    let (mut runner, info) = ModelRunner::load(device, &source, &config, &mut |_, _| {})?;
    let cache = BlockCache::new(info.cache_blocks, info.block_tokens, true);
    let mut scheduler = Scheduler::new(Policy::default(), cache);
    scheduler.add(RequestId::from_u64(1), spec(1, 16));
    let mut plan = StepPlan::default();
    for _ in 0..WARM + steps {
        assert!(scheduler.plan_into(&mut plan));
        runner.launch(&plan, scheduler.sequences())?;
        let output = runner.collect()?;
        let tokens = output.samples.tokens.iter().map(|token| token.id);
        commit(&mut scheduler, &plan, tokens);
        runner.recycle(output);
    }
    Ok(())
}
