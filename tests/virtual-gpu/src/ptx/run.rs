//! Launches: runs all blocks of a grid on several host threads.

use super::count::{Counter, Counts};
use super::execute::{Block, Warp};
use super::fault::{Fault, FaultKind, Stop};
use super::kernel::Kernel;
use super::memory::{Map, Regions};
use super::shared::Shared;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// A launch of a kernel.
#[derive(Clone, Debug)]
pub struct Launch {
    /// Number of blocks per dimension.
    pub grid: [u32; 3],
    /// Number of threads per block and dimension.
    pub block: [u32; 3],
    /// Bytes of shared memory in addition to what the kernel declares.
    pub dynamic_shared: usize,
    /// The bytes of all parameters, each at its offset.
    pub parameters: Vec<u8>,
}

/// How to run a kernel, and what to check.
#[derive(Clone, Debug)]
pub struct Options {
    /// Number of host threads that run blocks.
    pub threads: usize,
    /// Whether to detect races in shared memory.
    pub check_races: bool,
    /// Whether to detect reads of memory that was never written.
    pub check_initialised: bool,
    /// Seed of a random order of blocks, and of warps between barriers. `None` means ascending
    /// order.
    pub shuffle_seed: Option<u64>,
    /// Whether to count what the warps do.
    pub count: bool,
    /// The number of the launch, with which the memory that it writes to is marked; 0 for none.
    pub number: u32,
    /// The number of a launch that may still run until the kernel waits for it
    /// (`griddepcontrol.wait`), although it has run here. What a GPU would permit only sometimes is
    /// a fault. Before a thread waits, it may not read what that launch has written, since it may
    /// be written later; it may not write anything, since that launch may read or write it later;
    /// it may not let the next kernel begin, since that one waits only for this one; and it may not
    /// end, for the same reason.
    pub overlaps: Option<u32>,
}

impl Default for Options {
    /// All checks, one thread, ascending order.
    fn default() -> Self {
        Options {
            threads: 1,
            check_races: true,
            check_initialised: true,
            shuffle_seed: None,
            count: false,
            number: 0,
            overlaps: None,
        }
    }
}

/// Totals of a launch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    pub blocks: u64,
    /// Number of instructions, each counted once per warp.
    pub instructions: u64,
    /// Number of barriers that blocks passed.
    pub barriers: u64,
    /// What the warps did, if [`Options::count`] asked for it.
    pub counts: Option<Counts>,
}

/// Number of instructions that a warp may execute before the launch is considered to hang.
pub const BUDGET: u64 = 1 << 28;
/// Maximum bytes of shared memory per block on any supported GPU.
const MAX_SHARED: usize = 227 << 10;
/// Time after which further threads are started; shorter launches are not worth them.
const ALONE: Duration = Duration::from_micros(200);

/// Runs a kernel to its end or to its first fault. What it wrote before the fault stays
/// written.
///
/// The regions must stay unchanged meanwhile, and nothing else may access their bytes.
///
/// # Errors
/// Returns the first fault, or a fault of kind [`FaultKind::BadParameters`] if the launch does
/// not fit the kernel.
pub fn run(
    kernel: &Kernel,
    launch: &Launch,
    regions: &Regions,
    options: &Options,
) -> Result<Statistics, Fault> {
    run_within(kernel, launch, regions, options, BUDGET)
}

/// Like [`run`], with a different limit on the instructions per warp.
///
/// # Errors
/// Returns the same faults as [`run`].
pub fn run_within(
    kernel: &Kernel,
    launch: &Launch,
    regions: &Regions,
    options: &Options,
    budget: u64,
) -> Result<Statistics, Fault> {
    check(kernel, launch, regions)?;
    let blocks = launch.grid.iter().map(|&n| u64::from(n)).product::<u64>();
    let map = Map::new(regions.0, kernel);
    let work = Work {
        kernel,
        launch,
        options,
        map,
        budget,
        blocks,
        next: AtomicU64::new(0),
        failed: AtomicBool::new(false),
        fault: Mutex::new(None),
        total: Mutex::new(Statistics::default()),
        counter: Mutex::new(options.count.then(Counter::default)),
    };
    let helpers = (options.threads.max(1) - 1).min(blocks.saturating_sub(1) as usize);
    work.run(if helpers == 0 {
        None
    } else {
        Some(Instant::now() + ALONE)
    });
    if helpers > 0 && work.next.load(Relaxed) < blocks && !work.failed.load(Relaxed) {
        std::thread::scope(|scope| {
            for _ in 0..helpers {
                scope.spawn(|| work.run(None));
            }
            work.run(None);
        });
    }
    let fault = work.fault.into_inner().unwrap_or_else(|e| e.into_inner());
    let counter = work.counter.into_inner().unwrap_or_else(|e| e.into_inner());
    match fault {
        Some((_, fault)) => Err(*fault),
        None => Ok(Statistics {
            counts: counter.map(|counter| counter.counts()),
            ..work.total.into_inner().unwrap_or_else(|e| e.into_inner())
        }),
    }
}

/// Checks that the launch fits the kernel.
fn check(kernel: &Kernel, launch: &Launch, regions: &Regions) -> Result<(), Fault> {
    let threads = launch.block.iter().map(|&n| u64::from(n)).product::<u64>();
    let shared = kernel.dynamic_shared_at + launch.dynamic_shared;
    let most = u64::from(kernel.max_threads.unwrap_or(1024).min(1024));
    let expected = kernel.parameter_bytes();
    let detail = if launch.parameters.len() != expected {
        format!(
            "{} bytes of parameters, expected {expected}",
            launch.parameters.len()
        )
    } else if threads == 0 || launch.grid.contains(&0) {
        format!(
            "a grid of {:?} blocks of {:?} threads is empty",
            launch.grid, launch.block
        )
    } else if threads > most {
        format!("{threads} threads per block, expected at most {most}")
    } else if launch.block[2] > 64
        || launch.grid[0] > i32::MAX as u32
        || launch.grid[1..].iter().any(|&n| n > 65535)
    {
        format!(
            "a grid of {:?} blocks of {:?} threads exceeds the limit of a dimension",
            launch.grid, launch.block
        )
    } else if kernel
        .required_block
        .is_some_and(|shape| shape != launch.block)
    {
        format!(
            "blocks of {:?} threads, expected {:?}",
            launch.block,
            kernel.required_block.unwrap_or_default()
        )
    } else if shared > MAX_SHARED {
        format!("{shared} bytes of shared memory, expected at most {MAX_SHARED}")
    } else if let Some(region) = regions
        .0
        .iter()
        .find(|r| (r.base ^ r.data as u64) & 15 != 0)
    {
        format!(
            "the bytes of `{}` are not aligned like its address",
            region.label
        )
    } else if let Some(pair) = regions
        .0
        .windows(2)
        .find(|p| p[0].base + p[0].len as u64 > p[1].base)
    {
        format!(
            "`{}` and `{}` overlap or are out of order",
            pair[0].label, pair[1].label
        )
    } else {
        return Ok(());
    };
    Err(Fault {
        kind: FaultKind::BadParameters,
        kernel: kernel.name.clone(),
        line: 0,
        source: None,
        block: [0; 3],
        thread: None,
        address: None,
        location: None,
        detail,
    })
}

/// State shared by the host threads.
struct Work<'a> {
    kernel: &'a Kernel,
    launch: &'a Launch,
    options: &'a Options,
    map: Map<'a>,
    budget: u64,
    blocks: u64,
    next: AtomicU64,
    failed: AtomicBool,
    /// The fault with its position in the order, so that the first one is kept.
    fault: Mutex<Option<(u64, Box<Fault>)>>,
    total: Mutex<Statistics>,
    counter: Mutex<Option<Counter>>,
}

impl Work<'_> {
    /// Runs blocks until none is left, one has failed, or the deadline has passed.
    fn run(&self, until: Option<Instant>) {
        let Options {
            check_races,
            check_initialised,
            ..
        } = *self.options;
        let bytes = self.kernel.dynamic_shared_at + self.launch.dynamic_shared;
        let shared = Shared::new(bytes, self.kernel.granule, check_races, check_initialised);
        let mut block = Block::new(
            self.kernel,
            self.launch,
            &self.map,
            shared,
            check_initialised,
            self.budget,
        );
        block.counter = self.options.count.then(Box::default);
        (block.number, block.overlaps) = (self.options.number, self.options.overlaps);
        let count = block.threads.div_ceil(32);
        let mut warps: Vec<Warp> = (0..count).map(|id| Warp::new(self.kernel, id)).collect();
        let mut total = Statistics::default();
        while !self.failed.load(Relaxed) && until.is_none_or(|time| Instant::now() < time) {
            let turn = self.next.fetch_add(1, Relaxed);
            if turn >= self.blocks {
                self.next.store(self.blocks, Relaxed);
                break;
            }
            let number = match self.options.shuffle_seed {
                Some(seed) => shuffled(turn, self.blocks, seed),
                None => turn,
            };
            let [x, y, _] = self.launch.grid.map(u64::from);
            block.begin([number % x, number / x % y, number / x / y].map(|n| n as u32));
            for warp in &mut warps {
                warp.begin(self.kernel, self.launch, block.index);
            }
            if let Err(fault) = self.run_block(&mut block, &mut warps, number) {
                self.failed.store(true, Relaxed);
                let mut first = self.fault.lock().unwrap_or_else(|e| e.into_inner());
                if first.as_ref().is_none_or(|(other, _)| turn < *other) {
                    *first = Some((turn, fault));
                }
            }
            total.blocks += 1;
            total.instructions += warps.iter().map(|w| w.executed).sum::<u64>();
        }
        let mut all = self.total.lock().unwrap_or_else(|e| e.into_inner());
        all.blocks += total.blocks;
        all.instructions += total.instructions;
        all.barriers += block.barriers;
        let mut all = self.counter.lock().unwrap_or_else(|e| e.into_inner());
        if let (Some(all), Some(counter)) = (all.as_mut(), &block.counter) {
            all.merge(counter);
        }
    }

    fn run_block(
        &self,
        block: &mut Block,
        warps: &mut [Warp],
        number: u64,
    ) -> Result<(), Box<Fault>> {
        let mut order: Vec<usize> = (0..warps.len()).collect();
        let mut random = self
            .options
            .shuffle_seed
            .map(|seed| Random(seed ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
        loop {
            if let Some(random) = &mut random {
                for last in (1..order.len()).rev() {
                    order.swap(last, (random.next() % (last as u64 + 1)) as usize);
                }
            }
            for &at in &order {
                let warp = &mut warps[at];
                block
                    .advance(warp)
                    .map_err(|(place, stop)| self.fault(block, warp.id, place, *stop))?;
            }
            if warps.iter().all(|w| w.groups.is_empty()) {
                return Ok(());
            }
            block
                .release(warps)
                .map_err(|(warp, place, stop)| self.fault(block, warp, place, *stop))?;
        }
    }

    fn fault(&self, block: &Block, warp: u32, at: usize, stop: Stop) -> Box<Fault> {
        let place = self.kernel.places.get(at).copied().unwrap_or_default();
        Box::new(Fault {
            kind: stop.kind,
            kernel: self.kernel.name.clone(),
            line: place.line,
            source: self.kernel.source(place),
            block: block.index,
            thread: stop.lane.map(|lane| block.coordinates(warp * 32 + lane)),
            address: stop.address,
            location: stop.location,
            detail: stop.detail,
        })
    }
}

/// Pseudo-random numbers (xorshift64*).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.max(1);
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }
}

/// Returns an element of a permutation of `0..count` that depends on the seed. It starts at a
/// random element and advances by a step that is coprime to `count`.
fn shuffled(turn: u64, count: u64, seed: u64) -> u64 {
    let mut random = Random(seed.wrapping_add(1));
    random.next();
    let begin = random.next() % count;
    let mut step = (random.next() % count) | 1;
    while divisor(step, count) != 1 {
        step += 2;
    }
    ((u128::from(turn) * u128::from(step) + u128::from(begin)) % u128::from(count)) as u64
}

fn divisor(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { divisor(b, a % b) }
}
