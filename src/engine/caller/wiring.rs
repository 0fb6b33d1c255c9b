//! Connects the two sides of an engine: channels, heartbeat, watchdog, and the scheduler.

use super::handle::Engine;
use super::waiting::{EngineEnd, Waiters};
use crate::cache::BlockCache;
use crate::config::EngineConfig;
use crate::engine::command::Command;
use crate::engine::metrics::EngineMetrics;
use crate::engine::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize};
use crate::engine::sync::{Arc, OnceLock, Receiver, Sender, unbounded};
use crate::engine::thread::SchedulerThread;
use crate::engine::watchdog::{Heartbeat, Pulse, watch};
use crate::engine::{EngineFault, EngineInfo};
use crate::runner::{Runner, RunnerInfo};
use crate::schedule::{Policy, Scheduler};
use crate::text::Tokenizer;

/// The callers' side of an engine before its model is loaded.
pub(super) struct CallersSide {
    commands: Sender<Command>,
    end: EngineEnd,
    waiters: Arc<Waiters>,
    heart: Arc<Heartbeat>,
    metrics: Arc<EngineMetrics>,
}

/// The scheduler thread's side of an engine before its model is loaded.
pub(super) struct ThreadSide {
    pub(super) inbox: Receiver<Command>,
    pub(super) fault: Arc<OnceLock<EngineFault>>,
    pub(super) pulse: Pulse,
    pub(super) metrics: Arc<EngineMetrics>,
}

/// Creates the two sides of an engine and what connects them, and starts the watchdog.
pub(super) fn wire(config: &EngineConfig) -> std::io::Result<(CallersSide, ThreadSide)> {
    let (commands, inbox) = unbounded();
    let fault = Arc::new(OnceLock::new());
    let metrics = Arc::new(EngineMetrics::new(config.metrics_label.as_deref()));
    let waiters = Arc::new(Waiters::default());
    let heart = Arc::new(Heartbeat::new(config.step_deadline));
    let (pulse, over) = watch(&heart, &fault, &waiters)?;
    let callers = CallersSide {
        commands,
        end: EngineEnd::new(Arc::clone(&fault), over),
        waiters,
        heart,
        metrics: Arc::clone(&metrics),
    };
    let thread = ThreadSide {
        inbox,
        fault,
        pulse,
        metrics,
    };
    Ok((callers, thread))
}

impl ThreadSide {
    pub(super) fn with_runner(
        self,
        runner: Box<dyn Runner>,
        info: &RunnerInfo,
        config: &EngineConfig,
    ) -> SchedulerThread {
        let scheduler = scheduler(config, info);
        SchedulerThread::new(
            self.inbox,
            scheduler,
            runner,
            self.metrics,
            self.pulse,
            config,
        )
    }
}

impl CallersSide {
    pub(super) fn engine(
        self,
        config: EngineConfig,
        info: RunnerInfo,
        tokenizer: Option<Tokenizer>,
    ) -> Engine {
        let cache_tokens = info.layout.longest_sequence(
            info.cache_blocks,
            info.max_batch_tokens,
            info.block_tokens,
            info.context_tokens,
        );
        let limit = if cache_tokens < info.context_tokens {
            (cache_tokens, "size of the KV cache")
        } else {
            (info.context_tokens, "context length of the model")
        };
        let shared = Shared {
            config,
            info: EngineInfo::new(info),
            tokenizer: tokenizer.map(Arc::new),
            end: self.end,
            waiters: self.waiters,
            heart: self.heart,
            draining: AtomicBool::new(false),
            metrics: self.metrics,
            open: Arc::default(),
            next_request: AtomicU64::new(1),
            next_session: AtomicU64::new(1),
            limit,
        };
        Engine {
            shared: Arc::new(shared),
            commands: self.commands,
        }
    }
}

#[cfg(all(test, not(any(feature = "loom", feature = "shuttle"))))]
impl Engine {
    /// Creates an engine whose scheduler thread is driven by a test. Also returns the cell in
    /// which the engine stores why it has ended.
    pub(in crate::engine) fn by_hand(
        config: EngineConfig,
        runner: Box<dyn Runner>,
        info: RunnerInfo,
    ) -> (Self, SchedulerThread, Arc<OnceLock<EngineFault>>) {
        let info = info.with_settings(&config);
        let (callers, thread) = wire(&config).expect("the watchdog starts");
        let fault = Arc::clone(&thread.fault);
        let thread = thread.with_runner(runner, &info, &config);
        (callers.engine(config, info, None), thread, fault)
    }
}

/// What all handles of an engine share.
pub(super) struct Shared {
    pub(super) config: EngineConfig,
    pub(super) info: EngineInfo,
    pub(super) tokenizer: Option<Arc<Tokenizer>>,
    pub(super) end: EngineEnd,
    pub(super) waiters: Arc<Waiters>,
    pub(super) heart: Arc<Heartbeat>,
    /// Whether new requests are refused.
    pub(super) draining: AtomicBool,
    pub(super) metrics: Arc<EngineMetrics>,
    pub(super) open: Arc<AtomicUsize>,
    pub(super) next_request: AtomicU64,
    pub(super) next_session: AtomicU64,
    /// Maximum number of tokens per sequence, and what imposes this limit.
    pub(super) limit: (usize, &'static str),
}

/// Creates the scheduler for a runner of this size.
fn scheduler(config: &EngineConfig, info: &RunnerInfo) -> Scheduler {
    let cache = BlockCache::with_layout(
        info.cache_blocks,
        info.block_tokens,
        // Hidden states that depend on later tokens are of no use to other prompts.
        config.prefix_cache && !info.whole_prompts,
        info.layout.clone(),
    );
    let cache = match info.states {
        Some(states) => cache.with_states(states.slots, states.interval),
        None => cache,
    };
    let policy = Policy {
        max_batch_tokens: info.max_batch_tokens,
        max_sequences: config.max_sequences,
        whole_prompts: info.whole_prompts,
        max_pinned_blocks: info.cache_blocks * usize::from(config.pinned_percent) / 100,
        preemption: config.preemption,
        swap_blocks: info.swap.map_or(0, |swap| swap.blocks),
        swap_seconds_per_block: info.swap.map_or(0.0, |swap| swap.seconds_per_block),
    };
    Scheduler::new(policy, cache)
}
