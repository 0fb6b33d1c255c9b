//! What a kernel may do while the kernel before it may still run; see
//! [`Options::overlaps`](crate::ptx::Options::overlaps).

use super::memory::Addresses;
use super::warp::{Warp, set};
use super::{Block, Outcome};
use crate::ptx::fault::{FaultKind, Stop};
use crate::ptx::instruction::Instruction;

impl Block<'_> {
    /// Returns whether a kernel before this one may still run for any of the lanes.
    #[inline(always)]
    pub(super) fn is_early(&self, warp: &Warp, lanes: u32) -> bool {
        self.overlaps.is_some() && lanes & !warp.waited != 0
    }

    /// Fails if a lane has not waited yet. `does` says what it does.
    #[inline(always)]
    pub(super) fn require_waited(&self, warp: &Warp, lanes: u32, does: &str) -> Outcome<()> {
        match self.is_early(warp, lanes) {
            true => Err(early(warp, lanes, does)),
            false => Ok(()),
        }
    }

    /// Fails if a lane that has not waited yet reads what the kernel before this one has written.
    /// The bytes were located last.
    #[inline(always)]
    pub(super) fn check_reader(
        &self,
        warp: &Warp,
        address: u64,
        bytes: usize,
        lane: usize,
    ) -> Outcome<()> {
        let Some(before) = self.overlaps.filter(|_| warp.waited >> lane & 1 == 0) else {
            return Ok(());
        };
        match self.memory.get(warp.hint) {
            Some(region) if region.is_written_by(address, bytes, before) => {
                let does = "reads what the kernel before it writes";
                let stop = early(warp, 1 << lane, does);
                Err(stop.at(address, self.memory.describe(address)))
            }
            _ => Ok(()),
        }
    }

    /// Marks bytes, which were located last, as written by this launch.
    #[inline(always)]
    pub(super) fn note_writer(&self, warp: &Warp, address: u64, bytes: usize) {
        if self.number != 0
            && let Some(region) = self.memory.get(warp.hint)
        {
            region.written(address, bytes, self.number);
        }
    }

    /// Reads bytes into a cache. That is never too early, since writes go through the same cache,
    /// but the bytes must exist.
    pub(super) fn prefetch(&self, warp: &mut Warp, i: &Instruction, active: u32) -> Outcome<()> {
        let addresses: Addresses = warp.addresses(i, i.slots[0], true);
        let bytes = *warp.file.words(i.slots[1]);
        for lane in set(active) {
            let (address, bytes) = (addresses[lane], bytes[lane]);
            if address % 16 != 0 || bytes % 16 != 0 {
                let detail = format!("a prefetch of {bytes} bytes: both must be multiples of 16");
                return Err(Stop::new(FaultKind::Misaligned, detail)
                    .at(address, self.memory.describe(address))
                    .at_lane(lane));
            }
            if bytes > 0 {
                self.locate(warp, address, bytes as usize, lane, "prefetches")?;
            }
        }
        Ok(())
    }
}

#[cold]
fn early(warp: &Warp, lanes: u32, does: &str) -> Box<Stop> {
    let detail =
        format!("{does}, but has not waited for the kernel before it (griddepcontrol.wait)");
    let lane = (lanes & !warp.waited).trailing_zeros() as usize;
    Stop::new(FaultKind::Overlap, detail).at_lane(lane)
}
