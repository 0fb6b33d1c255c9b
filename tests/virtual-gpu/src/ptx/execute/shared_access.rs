//! Checks of accesses to shared memory, and descriptions of their faults.

use super::{Block, Outcome};
use crate::ptx::fault::{FaultKind, Stop};
use crate::ptx::shared::Conflict;

impl Block<'_> {
    /// Fails unless the bytes exist.
    pub(super) fn check_shared(&self, address: u64, bytes: usize, lane: usize) -> Outcome<()> {
        let size = self.shared.data.len();
        if address <= size as u64 && bytes as u64 <= size as u64 - address {
            return Ok(());
        }
        let detail = format!("{bytes} bytes of shared memory, of which the block has {size}");
        Err(Stop::new(FaultKind::OutOfBounds, detail)
            .at(address, "shared memory")
            .at_lane(lane))
    }

    /// Turns a conflict found by the tracking of shared memory into a fault.
    pub(super) fn shared_fault(&self, conflict: Conflict, lane: usize, verb: &str) -> Box<Stop> {
        let (kind, at, detail) = match conflict {
            Conflict::Uninitialised { at } => (
                FaultKind::UninitialisedRead,
                at,
                "reads shared memory that this block never wrote".to_string(),
            ),
            Conflict::Race { at, other } => {
                let place = self
                    .kernel
                    .places
                    .get(other.at as usize)
                    .copied()
                    .unwrap_or_default();
                let source = self
                    .kernel
                    .source(place)
                    .map_or(String::new(), |s| format!(" ({s})"));
                let thread = self.coordinates(other.warp * 32 + other.lane);
                let who = if other.many {
                    format!("thread {thread:?} and others")
                } else {
                    format!("thread {thread:?}")
                };
                let what = match (other.in_flight, other.wrote) {
                    (true, _) => "is being written by the asynchronous copy that",
                    (_, true) => "was written by what",
                    _ => "was read by what",
                };
                let detail = format!(
                    "{verb} shared memory that {what} {who} issued at PTX line {}{source}, \
                     and nothing orders the two accesses",
                    place.line
                );
                (FaultKind::SharedRace, at, detail)
            }
        };
        Stop::new(kind, detail)
            .at(at as u64, "shared memory")
            .at_lane(lane)
    }

    /// Returns the coordinates of a thread within the block.
    pub fn coordinates(&self, thread: u32) -> [u32; 3] {
        let [x, y, _] = self.launch.block;
        [thread % x, thread / x % y, thread / x / y]
    }
}
