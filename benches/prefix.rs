//! Cost of the prefix cache when a lookup finds nothing, and the time that a hit takes.
//!
//! `cargo bench --bench prefix [-- MODEL]`
//!
//! The scheduler alone, without a device, plans and commits steps with the cache on and off in
//! alternation. For comparison, the same run measures a step of a real model on the CPU device
//! with the same number of sequences; the cache's cost is given as a share of that step.

use quell::internals::cache::{BlockCache, BlockTable, Extent, PrefixHit, Transfers};
use quell::internals::schedule::{Commit, Policy, Scheduler, SequenceSpec};
use quell::{Engine, EngineConfig, LoadOptions, Request, RequestId, StepId};
use std::error::Error;
use std::hint::black_box;
use std::time::Instant;

const BLOCK: usize = 16;
const PROMPT: usize = 128;
const ANSWER: usize = 128;
const ROUNDS: usize = 15;

fn main() -> Result<(), Box<dyn Error>> {
    let path = std::env::args()
        .skip(1)
        .find(|argument| !argument.starts_with('-'));
    let path = path.unwrap_or_else(|| "models/SmolLM2-135M-Instruct.Q4_1.gguf".to_owned());
    println!(
        "Distinct prompts of {PROMPT} tokens, answers of {ANSWER} tokens; microseconds per step"
    );
    println!("sequences  cache off  cache on  difference  model's step  share");
    for sequences in [1, 16, 64] {
        let (off, on) = scheduler_steps(sequences);
        let step = model_step(&path, sequences)?;
        println!(
            "{sequences:>9}  {off:>9.2}  {on:>8.2}  {:>10.2}  {step:>12.0}  {:>5.3} %",
            on - off,
            (on - off) / step * 100.0
        );
    }
    lookups();
    Ok(())
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// Returns the scheduler's microseconds per step without and with the cache.
fn scheduler_steps(sequences: usize) -> (f64, f64) {
    let mut times = [Vec::new(), Vec::new()];
    for round in 0..2 * ROUNDS {
        times[round % 2].push(scheduler_round(sequences, round % 2 == 1));
    }
    let [off, on] = times;
    (median(off), median(on))
}

fn scheduler_round(sequences: usize, prefixes: bool) -> f64 {
    let blocks = sequences * (PROMPT + ANSWER).div_ceil(BLOCK) * 2;
    let policy = Policy {
        max_sequences: sequences,
        ..Policy::default()
    };
    let mut scheduler = Scheduler::new(policy, BlockCache::new(blocks, BLOCK, prefixes));
    let (mut steps, mut finished) = (0, 0);
    let start = Instant::now();
    // Twice as many sequences as run at a time, so that later ones take over the blocks of
    // earlier ones.
    for index in 0..2 * sequences {
        scheduler.add(RequestId::from_u64(index as u64), spec(index));
    }
    while finished < 2 * sequences {
        let Some(plan) = scheduler.plan() else { break };
        scheduler.step_succeeded(&plan);
        for item in plan.samples() {
            let committed = scheduler.commit(plan.step, item, [steps as u32]);
            if let Commit::Finished { .. } = committed {
                scheduler.remove(item.key);
                finished += 1;
            }
        }
        scheduler.step_completed(plan.step);
        steps += 1;
    }
    assert_eq!(scheduler.counts().prefix_hits, 0, "something was found");
    start.elapsed().as_secs_f64() * 1e6 / steps as f64
}

fn spec(index: usize) -> SequenceSpec {
    let prompt = (0..PROMPT).map(|i| (index * 1000 + i) as u32).collect();
    SequenceSpec::new(prompt, PROMPT + ANSWER)
}

/// Returns the microseconds per decode step of a real model on the CPU device.
fn model_step(path: &str, sequences: usize) -> Result<f64, Box<dyn Error>> {
    let config = EngineConfig {
        audit: false,
        stream_buffer: 4096,
        ..EngineConfig::default()
    };
    let engine = Engine::load_with(path, config, LoadOptions::cpu())?;
    let prompts = (0..sequences).map(|index| vec![(index + 100) as u32; 4]);
    let streams = prompts
        .map(|prompt| {
            let mut request = Request::new(prompt).greedy().max_tokens(64);
            request.ignore_eos = true;
            engine.generate(request)
        })
        .collect::<Result<Vec<_>, _>>()?;
    let mut rates = Vec::new();
    for stream in streams {
        let finish = stream.complete_blocking()?.finish;
        rates.extend(finish.timing.decode_rate(finish.generated_tokens));
    }
    Ok(1e6 / median(rates))
}

/// Prints the microseconds to look up a long prompt, to attach the blocks found, and to publish
/// them.
fn lookups() {
    println!("\ntokens  lookup of a hit  lookup of a miss  attach and release  publish");
    for length in [512_usize, 2048, 8192] {
        let tokens: Vec<u32> = (0..length as u32).map(|i| i * 7).collect();
        let other: Vec<u32> = tokens.iter().map(|token| token + 1).collect();
        let mut times = [const { Vec::new() }; 4];
        for _ in 0..200 {
            let mut cache = BlockCache::new(length.div_ceil(BLOCK), BLOCK, true);
            let mut table = BlockTable::default();
            let mut transfers = Transfers::default();
            let step = StepId::default();
            let booked = cache.prepare(&mut table, 0, Extent::all(length), step, &mut transfers);
            assert!(booked.is_ok());
            let mut time = |index: usize, what: &mut dyn FnMut(&mut BlockCache)| {
                let start = Instant::now();
                what(&mut cache);
                times[index].push(start.elapsed().as_secs_f64() * 1e6);
            };
            time(3, &mut |cache| {
                cache.publish(&mut table, &tokens, length, step)
            });
            let mut hit = PrefixHit::default();
            time(0, &mut |cache| {
                hit = black_box(cache.lookup(None, &tokens, length));
                assert_eq!(hit.tokens, length / BLOCK * BLOCK);
            });
            time(1, &mut |cache| {
                assert_eq!(black_box(cache.lookup(None, &other, length)).tokens, 0);
            });
            let mut second = BlockTable::default();
            time(2, &mut |cache| {
                cache.attach(&mut second, &hit);
                cache.release(&mut second, step);
            });
        }
        let [hit, miss, attach, publish] = times.map(median);
        println!("{length:>6}  {hit:>15.2}  {miss:>16.2}  {attach:>18.2}  {publish:>7.2}");
    }
}
