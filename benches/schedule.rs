//! Host cost of a step without a model: first the scheduler alone, then the whole scheduler
//! thread with a device that computes nothing.
//!
//! `cargo bench --bench schedule [-- --format json]`
//!
//! *Admit* is the step that starts all sequences and takes in their prompts, of which the
//! prefix cache holds a given share. *Plan* chooses the rows of a decode step and reserves
//! their blocks. *Commit* processes its tokens and publishes complete blocks. *Turn* is the
//! time between two launches of an engine: commands, plan, launch, collect, commit, the ledger,
//! the events to the readers, and the metrics. No reader is active meanwhile.

#[path = "common/results.rs"]
mod results;

use quell::internals::cache::BlockCache;
use quell::internals::runner::{NullOptions, NullRunner, Runner, RunnerInfo, StepOutput};
use quell::internals::schedule::{Commit, Policy, Scheduler, SequenceSpec, Sequences, StepPlan};
use quell::{DeviceError, Engine, EngineConfig, LoadError, Request, RequestId};
use results::median;
use serde_json::{Value, json};
use std::error::Error;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

const SEQUENCES: [usize; 5] = [1, 64, 256, 1024, 4096];
const BLOCK: usize = 16;
const PROMPT: usize = 128;
/// Number of warm-up steps, and number of measured steps after them.
const WARM: usize = 16;
const STEPS: usize = 256;
/// Runs per case. A figure is a median over all runs, taken of the means of [`BLOCK`]
/// consecutive steps.
const ROUNDS: usize = 5;

fn main() -> Result<(), Box<dyn Error>> {
    let as_json = results::as_json();
    let print = |line: String| {
        if !as_json {
            println!("{line}");
        }
    };
    print(format!(
        "prompts of {PROMPT} tokens in blocks of {BLOCK}; microseconds, medians of {ROUNDS} x {STEPS} steps"
    ));
    print("sequences  prefix hits    admit     plan   commit  plan + commit".to_owned());
    let mut scheduler = Vec::new();
    for sequences in SEQUENCES {
        for hits in [0, 50, 100] {
            let times = scheduler_times(sequences, hits);
            print(format!(
                "{sequences:>9}  {hits:>9} %  {:>7.1}  {:>7.2}  {:>7.2}  {:>13.2}",
                times.admit,
                times.plan,
                times.commit,
                times.plan + times.commit
            ));
            scheduler.push(times.json(sequences, hits));
        }
    }
    print("\nsequences     turn  per sequence".to_owned());
    let mut engine = Vec::new();
    for sequences in SEQUENCES {
        let turn = engine_turn(sequences)?;
        let each = turn / sequences as f64;
        print(format!("{sequences:>9}  {turn:>7.2}  {each:>10.3}"));
        engine.push(json!({"sequences": sequences, "turn_us": turn}));
    }
    if as_json {
        results::print_json(
            "schedule",
            json!({
                "prompt_tokens": PROMPT,
                "block_tokens": BLOCK,
                "scheduler": scheduler,
                "engine": engine,
            }),
        );
    }
    Ok(())
}

/// Median times in microseconds.
struct SchedulerTimes {
    admit: f64,
    plan: f64,
    commit: f64,
}

impl SchedulerTimes {
    fn json(&self, sequences: usize, hits: usize) -> Value {
        json!({
            "sequences": sequences,
            "prefix_hits_percent": hits,
            "admit_us": self.admit,
            "plan_us": self.plan,
            "commit_us": self.commit,
        })
    }
}

fn scheduler_times(sequences: usize, hits: usize) -> SchedulerTimes {
    let (mut admit, mut plan, mut commit) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let mut scheduler = filled(sequences, hits);
        let mut step = StepPlan::default();
        for number in 0..1 + WARM + STEPS {
            let start = Instant::now();
            assert!(scheduler.plan_into(&mut step));
            let planned = Instant::now();
            assert_eq!(step.items.len(), sequences);
            scheduler.step_succeeded(&step);
            for item in step.samples() {
                let committed = scheduler.commit(step.step, item, [number as u32]);
                assert_eq!(committed, Commit::Continues);
            }
            scheduler.step_completed(step.step);
            let committed = Instant::now();
            match number {
                0 => admit.push(committed - start),
                1..=WARM => {}
                _ => {
                    plan.push(planned - start);
                    commit.push(committed - planned);
                }
            }
        }
        // The last token of a prompt is always computed for its logits, so its block is never
        // found.
        let known = PROMPT * hits / 100;
        let found = (0..sequences).map(|index| known.min(prompt(index) - 1) / BLOCK * BLOCK);
        assert_eq!(scheduler.counts().prefix_hits, found.sum::<usize>() as u64);
    }
    SchedulerTimes {
        admit: median(admit),
        plan: median(means(&plan)),
        commit: median(means(&commit)),
    }
}

/// Returns a scheduler with `sequences` new sequences, whose prompts are in its cache to `hits`
/// percent.
fn filled(sequences: usize, hits: usize) -> Scheduler {
    let answer = 1 + WARM + STEPS + 1;
    let blocks = 2 * sequences * (PROMPT + BLOCK + answer).div_ceil(BLOCK);
    let policy = Policy {
        max_sequences: sequences,
        max_batch_tokens: sequences * (PROMPT + BLOCK),
        ..Policy::default()
    };
    let mut scheduler = Scheduler::new(policy, BlockCache::new(blocks, BLOCK, true));
    let known = PROMPT * hits / 100;
    if known > 0 {
        for index in 0..sequences {
            scheduler.add(RequestId::from_u64(0), spec(index, known, known));
        }
        while let Some(plan) = scheduler.plan() {
            scheduler.step_succeeded(&plan);
            for item in &plan.items {
                if item.end {
                    scheduler.commit_end(item.key);
                    scheduler.remove(item.key);
                }
            }
            scheduler.step_completed(plan.step);
        }
    }
    for index in 0..sequences {
        let prompt = prompt(index);
        scheduler.add(RequestId::from_u64(1), spec(index, prompt, prompt + answer));
    }
    scheduler
}

/// Returns the length of a sequence's prompt. Lengths differ so that in each step, one
/// sixteenth of the sequences reserve a block and as many publish one.
fn prompt(index: usize) -> usize {
    PROMPT + index % BLOCK
}

/// Returns the means of groups of [`BLOCK`] consecutive steps. Each sequence reserves one block
/// per group.
fn means(steps: &[Duration]) -> Vec<Duration> {
    let groups = steps.chunks(BLOCK);
    groups
        .map(|group| group.iter().sum::<Duration>() / group.len() as u32)
        .collect()
}

/// Returns a sequence with the first `prompt` tokens of a prompt that is unique to this index.
fn spec(index: usize, prompt: usize, max_tokens: usize) -> SequenceSpec {
    let prompt = (0..prompt).map(|i| (index * 1000 + i) as u32).collect();
    SequenceSpec::new(prompt, max_tokens)
}

/// A null device that reports when each step was launched.
struct TimedRunner {
    null: NullRunner,
    launched: Sender<(Instant, usize)>,
    /// The first step waits here until all requests have been posted.
    begin: Option<Arc<Barrier>>,
}

impl TimedRunner {
    fn start(
        options: NullOptions,
        launched: Sender<(Instant, usize)>,
        begin: Arc<Barrier>,
    ) -> Result<(Box<dyn Runner>, RunnerInfo), LoadError> {
        let null = NullRunner::new(options);
        let info = null.info();
        let timed = Self {
            null,
            launched,
            begin: Some(begin),
        };
        Ok((Box::new(timed), info))
    }
}

impl Runner for TimedRunner {
    fn depth(&self) -> usize {
        self.null.depth()
    }

    fn launch(&mut self, plan: &StepPlan, sequences: &Sequences) -> Result<(), DeviceError> {
        if let Some(begin) = self.begin.take() {
            begin.wait();
        }
        // The receiver is dropped once enough launches have been measured.
        let _ = self.launched.send((Instant::now(), plan.items.len()));
        self.null.launch(plan, sequences)
    }

    fn collect(&mut self) -> Result<StepOutput, DeviceError> {
        self.null.collect()
    }

    fn recycle(&mut self, output: StepOutput) {
        self.null.recycle(output);
    }
}

/// Returns the microseconds between launches of an engine that decodes `sequences` sequences.
fn engine_turn(sequences: usize) -> Result<f64, Box<dyn Error>> {
    let mut turns = Vec::new();
    for _ in 0..ROUNDS {
        let options = NullOptions {
            cache_blocks: 2 * sequences * (PROMPT + 2 * STEPS).div_ceil(BLOCK) + 64,
            ..NullOptions::default()
        };
        let config = EngineConfig {
            max_sequences: sequences,
            max_batch_tokens: Some(sequences * 2 * BLOCK),
            max_open_requests: sequences,
            stream_buffer: 2 * STEPS,
            audit: false,
            ..EngineConfig::default()
        };
        let (launched, launches) = channel();
        let begin = Arc::new(Barrier::new(2));
        let barrier = Arc::clone(&begin);
        let start = move || TimedRunner::start(options, launched, barrier);
        let engine = Engine::with_runner(config, None, start)?;
        let streams = (0..sequences).map(|index| {
            let mut request = Request::new(vec![index as u32 + 3; 8 + index % BLOCK]);
            request.ignore_eos = true;
            engine.generate(request.greedy().max_tokens(WARM + STEPS))
        });
        let streams = streams.collect::<Result<Vec<_>, _>>()?;
        begin.wait();
        let full = launches.iter().filter(|(_, items)| *items == sequences);
        let full: Vec<_> = full
            .map(|(at, _)| at)
            .skip(WARM)
            .take(STEPS - WARM + 1)
            .collect();
        turns.extend(full.windows(2).map(|pair| pair[1] - pair[0]));
        drop(streams);
    }
    Ok(median(means(&turns)))
}
