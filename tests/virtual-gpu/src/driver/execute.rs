//! Execution of queued work.

use super::codes::{self, Code};
use super::memory::Stage;
use super::objects::Recorded;
use super::queue::{HostSource, Node, NodeId, Op};
use super::{Driver, Failure, IN_HOST_FUNCTION, panic_text};
use crate::ptx::FaultKind;
use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

/// What went wrong when a kernel or copy ran.
struct Fault {
    code: Code,
    text: String,
}

impl Driver {
    /// Runs queued work until all targets have run.
    pub fn run(&mut self, context: u64, targets: Vec<NodeId>) -> Result<(), Failure> {
        let mut plan = self.queue.plan(targets);
        let schedule = self.settings.schedule;
        while let Some((id, node)) = self.queue.next(&mut plan, context, schedule) {
            self.execute(id, node);
            self.sound(context)?;
        }
        self.sound(context)
    }

    /// Runs everything that is queued in a context.
    pub fn run_context(&mut self, context: u64) -> Result<(), Failure> {
        let all: Vec<NodeId> = self.queue.of_context(context).map(|(id, _)| id).collect();
        self.run(context, all)
    }

    /// Runs one node of the context that is ready, if there is one.
    pub fn run_one(&mut self, context: u64) {
        if let Some(id) = self.queue.random_ready(context)
            && let Some(node) = self.queue.take(id)
        {
            self.execute(id, node);
        }
    }

    fn execute(&mut self, id: NodeId, node: Node) {
        self.report.executed += 1;
        let context = node.context;
        if let Err(fault) = self.perform(id, &node) {
            let what = format!("{} on stream {:#x}", node.op.describe(), node.stream);
            self.violation(&format!(
                "{what}: {}\n{}",
                codes::display(fault.code),
                fault.text
            ));
            self.break_context(context, fault.code);
        }
    }

    fn perform(&mut self, id: NodeId, node: &Node) -> Result<(), Fault> {
        let context = node.context;
        let illegal = |text: String| Fault {
            code: codes::ILLEGAL_ADDRESS,
            text,
        };
        match &node.op {
            Op::Kernel(launch) => {
                let regions = self.memory.regions(context);
                let settings = &self.settings;
                let ran = catch_unwind(AssertUnwindSafe(|| {
                    launch.run(regions, settings, (id, node.overlaps))
                }));
                let uses = self
                    .report
                    .kernels
                    .entry(launch.name().to_owned())
                    .or_default();
                uses.launches += 1;
                self.report.overlapping += u64::from(node.overlaps.is_some());
                match ran {
                    Ok(Ok(statistics)) => {
                        uses.warp_instructions += statistics.instructions;
                        if statistics.counts.is_some() {
                            self.report.count(launch.counted(statistics));
                        }
                    }
                    Ok(Err((kind, text))) => {
                        return Err(Fault {
                            code: fault_code(kind),
                            text,
                        });
                    }
                    Err(panic) => {
                        let text =
                            format!("the interpreter itself failed: {}", panic_text(&*panic));
                        return Err(Fault {
                            code: codes::LAUNCH_FAILED,
                            text,
                        });
                    }
                }
            }
            Op::HostToDevice { to, from, len } => {
                let from = match from {
                    HostSource::Pinned(address) => {
                        self.still_pinned(*address, *len).map_err(illegal)?;
                        *address as *const u8
                    }
                    HostSource::Snapshot(bytes) => bytes.as_ptr(),
                };
                // SAFETY: the range of pinned memory was just looked up and is pinned; a
                // snapshot has `len` bytes.
                unsafe { self.memory.write(context, *to, from, *len) }.map_err(illegal)?;
            }
            Op::DeviceToHost { to, from, len } => {
                // SAFETY: the caller of the copy guarantees that the host memory is valid:
                // either it is pinned (checked when the copy was queued, and freeing it runs
                // the queued copies first), or the call that queued the copy waits for it.
                let missing = unsafe { self.memory.read(context, *to as *mut u8, *from, *len) }
                    .map_err(illegal)?;
                self.report.undefined_bytes += missing as u64;
                if missing > 0 && self.settings.check_copies {
                    self.violation(&format!(
                        "{}: {missing} bytes were never written",
                        node.op.describe()
                    ));
                }
            }
            Op::DeviceToDevice { to, from, len } => self
                .memory
                .copy(context, *to, *from, *len)
                .map_err(illegal)?,
            Op::Fill {
                to,
                value,
                unit,
                count,
            } => {
                self.memory
                    .fill(context, *to, *value, *unit, *count)
                    .map_err(illegal)?;
            }
            Op::Allocate { address } => {
                if let Some(found) = self.memory.get_mut(*address)
                    && found.stage == Stage::Reserved
                {
                    found.stage = Stage::Live;
                }
            }
            Op::Free { address } => self.free_now(context, *address),
            Op::Record { event } => {
                if let Some(event) = self.events.get_mut(*event)
                    && event.recorded == Recorded::Node(id)
                {
                    event.time = Some(Instant::now());
                }
            }
            Op::Host { function, data } => {
                IN_HOST_FUNCTION.set(true);
                // SAFETY: the caller of `cuLaunchHostFunc` guarantees that the function and its
                // argument are valid.
                unsafe { function(*data as *mut c_void) };
                IN_HOST_FUNCTION.set(false);
            }
            Op::Join => {}
        }
        Ok(())
    }

    fn still_pinned(&self, address: usize, len: usize) -> Result<(), String> {
        match self.host.overlapping(address, len) {
            Some((base, found)) if address >= base && address + len <= base + found.len => Ok(()),
            _ => Err(format!(
                "host address {address:#x} ({len} bytes) is no longer pinned memory"
            )),
        }
    }

    /// Performs a `cuMemFreeAsync`. Queued work that still uses the memory was not ordered
    /// before the free, and so is a violation.
    fn free_now(&mut self, context: u64, address: u64) {
        self.users_of(context, address);
        self.memory.free(address);
    }

    /// Records a violation for each queued operation that uses an allocation. Returns the
    /// nodes.
    pub fn users_of(&mut self, context: u64, address: u64) -> Vec<NodeId> {
        let Some((len, label)) = self
            .memory
            .get(address)
            .map(|found| (found.len, found.label.clone()))
        else {
            return Vec::new();
        };
        self.users(context, &label, |op| op.uses_device(address, len))
    }

    /// Records a violation for each queued operation that uses memory which is being freed.
    /// Returns the nodes.
    pub fn users(&mut self, context: u64, label: &str, uses: impl Fn(&Op) -> bool) -> Vec<NodeId> {
        let users = self
            .queue
            .of_context(context)
            .filter(|(_, node)| uses(&node.op));
        let users: Vec<(NodeId, String)> = users
            .map(|(id, node)| {
                (
                    id,
                    format!("{} on stream {:#x}", node.op.describe(), node.stream),
                )
            })
            .collect();
        for (_, text) in &users {
            self.violation(&format!(
                "{label} is freed while queued work still uses it: {text}"
            ));
        }
        users.into_iter().map(|(id, _)| id).collect()
    }
}

/// Returns the error code that a real device reports for a fault. Faults that a real device
/// would not notice break the context as well, so that no test continues after one.
fn fault_code(kind: FaultKind) -> Code {
    match kind {
        FaultKind::OutOfBounds => codes::ILLEGAL_ADDRESS,
        FaultKind::Misaligned => codes::MISALIGNED_ADDRESS,
        FaultKind::Timeout => codes::LAUNCH_TIMEOUT,
        FaultKind::Unsupported => codes::ILLEGAL_INSTRUCTION,
        _ => codes::LAUNCH_FAILED,
    }
}
