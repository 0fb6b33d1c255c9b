//! Executes blocks: the lanes of a warp run in lock step until they diverge.
//!
//! A warp is a set of groups of lanes, each with its own position in the code. The group with
//! the lowest position runs first, and groups that meet are merged, so that lanes converge
//! again after a branch or loop. An instruction that needs lanes of other groups waits until
//! they arrive, like the independent threads of GPUs since Volta.

mod barrier;
mod cells;
pub mod convert;
mod copies;
mod count;
mod directed;
pub mod float;
mod global;
pub mod half;
pub mod integer;
pub mod lanes;
mod matrix;
mod memory;
mod overlap;
mod registers;
pub mod set;
mod shared_access;
mod warp;

pub(super) use warp::Warp;

use super::count::Counter;
use super::fault::{FaultKind, Stop};
use super::instruction::{Action, Instruction, UNGUARDED};
use super::kernel::Kernel;
use super::memory::Map;
use super::run::Launch;
use super::shared::Shared;
use warp::{Group, Wait};

/// What a group does after an instruction.
enum Flow {
    /// Continues with the next instruction.
    Next,
    /// Waits for other lanes to arrive, then tries the instruction again.
    Lanes,
    /// Waits at a barrier of the block.
    Barrier { id: u32, count: u32 },
}

type Outcome<T> = Result<T, Box<Stop>>;

/// One block, and the state that its warps share.
pub struct Block<'a> {
    pub kernel: &'a Kernel,
    pub launch: &'a Launch,
    pub memory: &'a Map<'a>,
    pub shared: Shared,
    /// Coordinates of the block in the grid.
    pub index: [u32; 3],
    pub threads: u32,
    pub check_initialised: bool,
    /// Number of threads that have arrived at each barrier without waiting.
    arrivals: [u32; 16],
    /// Maximum number of instructions per warp.
    pub budget: u64,
    pub barriers: u64,
    /// Counts what the warps do, if that was asked for.
    pub counter: Option<Box<Counter>>,
    /// See [`Options`](crate::ptx::Options).
    pub number: u32,
    pub overlaps: Option<u32>,
}

impl<'a> Block<'a> {
    pub fn new(
        kernel: &'a Kernel,
        launch: &'a Launch,
        memory: &'a Map<'a>,
        shared: Shared,
        checked: bool,
        budget: u64,
    ) -> Self {
        Block {
            kernel,
            launch,
            memory,
            shared,
            index: [0; 3],
            threads: launch.block.iter().product(),
            check_initialised: checked,
            arrivals: [0; 16],
            budget,
            barriers: 0,
            counter: None,
            number: 0,
            overlaps: None,
        }
    }

    /// Prepares for the block with these coordinates.
    pub fn begin(&mut self, index: [u32; 3]) {
        self.index = index;
        self.arrivals = [0; 16];
        self.shared.reset();
    }

    /// Runs a warp until all its lanes have exited or wait at a barrier. A fault comes with the
    /// index of its instruction.
    pub fn advance(&mut self, warp: &mut Warp) -> Result<(), (usize, Box<Stop>)> {
        loop {
            let Some(chosen) = warp.choose() else {
                return match warp.stuck() {
                    Some(at) => Err((at, warp.missing_lanes(self.kernel))),
                    None => Ok(()),
                };
            };
            match self.counter {
                None => self.run_group::<false>(warp, chosen)?,
                Some(_) => self.run_group::<true>(warp, chosen)?,
            }
        }
    }

    /// Runs one group until it waits, meets another group, or no longer has the lowest
    /// position. `COUNTED` tells whether a counter exists.
    fn run_group<const COUNTED: bool>(
        &mut self,
        warp: &mut Warp,
        chosen: usize,
    ) -> Result<(), (usize, Box<Stop>)> {
        let kernel = self.kernel;
        let Group { at, lanes, .. } = warp.groups[chosen];
        let mut at = at as usize;
        let limit = warp.limit(chosen);
        let file = warp.file.as_mut_ptr();
        loop {
            if at == limit {
                warp.groups[chosen].at = at as u32;
                return Ok(());
            }
            let instruction = &kernel.code[at];
            let active = match instruction.guard {
                UNGUARDED => lanes,
                guard => {
                    let predicate = warp.file.predicate(guard);
                    lanes
                        & if instruction.negated {
                            !predicate
                        } else {
                            predicate
                        }
                }
            };
            if COUNTED {
                self.count(warp, instruction, at, lanes, active);
            }
            warp.executed += 1;
            if warp.executed > self.budget {
                let detail = format!("a warp executed more than {} instructions", self.budget);
                return Err((at, Stop::new(FaultKind::Timeout, detail)));
            }
            match instruction.action {
                Action::Lanes(run) => {
                    if active != 0 {
                        // SAFETY: decoding assigned every slot a place in the file, according
                        // to its class.
                        unsafe { run(file, instruction, active) };
                    }
                    at += 1;
                }
                Action::Branch(target) => {
                    if active == lanes {
                        at = target as usize;
                    } else if active == 0 {
                        at += 1;
                        continue;
                    } else {
                        warp.groups[chosen] = Group {
                            at: at as u32 + 1,
                            lanes: lanes & !active,
                            wait: Wait::Nothing,
                        };
                        warp.groups.push(Group {
                            at: target,
                            lanes: active,
                            wait: Wait::Nothing,
                        });
                        return Ok(());
                    }
                    if warp.groups.len() > 1 {
                        warp.groups[chosen].at = at as u32;
                        return Ok(());
                    }
                }
                Action::Exit => {
                    self.require_waited(warp, active, "ends")
                        .map_err(|stop| (at, stop))?;
                    warp.exited |= active;
                    warp.groups[chosen] = Group {
                        at: at as u32 + 1,
                        lanes: lanes & !active,
                        wait: Wait::Nothing,
                    };
                    if lanes == active {
                        warp.groups.remove(chosen);
                    }
                    return Ok(());
                }
                _ if active == 0 => at += 1,
                _ => match self
                    .execute(warp, instruction, at, lanes, active)
                    .map_err(|stop| (at, stop))?
                {
                    Flow::Next => at += 1,
                    Flow::Lanes => {
                        if COUNTED {
                            self.take_back_count(at, active);
                        }
                        warp.groups[chosen] = Group {
                            at: at as u32,
                            lanes,
                            wait: Wait::Lanes,
                        };
                        return Ok(());
                    }
                    Flow::Barrier { id, count } => {
                        let rest = lanes & !active;
                        let wait = Wait::Barrier { id, count };
                        warp.groups[chosen] = Group {
                            at: at as u32,
                            lanes: active,
                            wait,
                        };
                        if rest != 0 {
                            warp.groups.push(Group {
                                at: at as u32 + 1,
                                lanes: rest,
                                wait: Wait::Nothing,
                            });
                        }
                        return Ok(());
                    }
                },
            }
        }
    }

    /// Executes anything but plain arithmetic and branches, for the lanes `active` of `lanes`.
    fn execute(
        &mut self,
        warp: &mut Warp,
        i: &Instruction,
        at: usize,
        lanes: u32,
        active: u32,
    ) -> Outcome<Flow> {
        match i.action {
            Action::Load(access) => self.load(warp, i, access, at, active)?,
            Action::Store(access) => self.store(warp, i, access, at, active)?,
            Action::Atomic(access, operation) => {
                self.atomic(warp, i, access, operation, at, active)?
            }
            Action::AsyncCopy(size) => self.copy(warp, i, size, at, active)?,
            Action::Prefetch => self.prefetch(warp, i, active)?,
            Action::WaitForKernels => warp.waited |= active,
            Action::LaunchDependents => {
                self.require_waited(warp, active, "lets the next kernel begin")?;
            }
            Action::AsyncCommit => warp.commit(active),
            Action::AsyncWait(pending) => self.wait(warp, pending, active),
            Action::Multiply { depth, factors } => {
                if !warp.gathered(lanes, active, u32::MAX)? {
                    return Ok(Flow::Lanes);
                }
                matrix::multiply(&mut warp.file, i, depth, factors);
            }
            Action::LoadMatrix { count, transposed } => {
                if !warp.gathered(lanes, active, u32::MAX)? {
                    return Ok(Flow::Lanes);
                }
                self.load_matrix(warp, i, usize::from(count), transposed, at)?;
            }
            Action::Barrier(barrier) => return self.arrive(warp, i, barrier, lanes, active),
            Action::WarpBarrier
            | Action::Shuffle(_)
            | Action::Vote(_)
            | Action::Match { .. }
            | Action::Reduce(_) => return self.collective(warp, i, lanes, active),
            Action::ActiveMask => warp.file.write_words(i.slots[0], active, &[active; 32]),
            Action::Clock => {
                let now = warp.executed;
                warp.file.write_wides(i.slots[0], active, &[now; 32]);
            }
            Action::Trap => return Err(Stop::new(FaultKind::Trap, "the kernel stopped itself")),
            Action::Nothing | Action::Lanes(_) | Action::Branch(_) | Action::Exit => {}
        }
        Ok(Flow::Next)
    }
}
