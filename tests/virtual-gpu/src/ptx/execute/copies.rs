//! Asynchronous copies from global to shared memory.

use super::cells::Cell;
use super::warp::{Warp, set};
use super::{Block, Outcome};
use crate::ptx::fault::{FaultKind, Stop};
use crate::ptx::instruction::{Instruction, LANES};
use crate::ptx::shared::of_lane;

/// A `cp.async` of a warp that has not completed for all of its lanes.
pub struct Pending {
    /// Lanes whose copy has not completed.
    lanes: u32,
    /// Number of the commit group, as counted by these lanes.
    group: u32,
    /// Bytes to write.
    size: usize,
    /// Target addresses in shared memory.
    to: [u32; LANES],
    /// Bytes to read; the rest is filled with zeros.
    bytes: [u8; LANES],
    from: [*mut u8; LANES],
    /// Index of the instruction.
    at: usize,
}

impl Warp {
    /// `cp.async.commit_group`.
    pub fn commit(&mut self, active: u32) {
        for (lane, committed) in self.committed.iter_mut().enumerate() {
            *committed += active >> lane & 1;
        }
    }
}

impl Block<'_> {
    /// `cp.async`: the bytes are copied only when the thread waits for them.
    pub(super) fn copy(
        &mut self,
        warp: &mut Warp,
        i: &Instruction,
        size: u8,
        at: usize,
        active: u32,
    ) -> Outcome<()> {
        let to = *warp.file.words(i.slots[0]);
        let from = *warp.file.wides(i.slots[1]);
        let lengths = *warp.file.words(i.slots[2]);
        let size = usize::from(size);
        let stamp = self.shared.stamp(warp.visitor(0, at, false));
        let mut copy = Pending {
            lanes: 0,
            group: 0,
            size,
            to: [0; LANES],
            bytes: [0; LANES],
            from: [std::ptr::null_mut(); LANES],
            at,
        };
        for lane in set(active) {
            let address = to[lane].wrapping_add(i.offset as u32);
            let wanted = lengths[lane] as usize;
            if wanted > size {
                let detail = format!("{wanted} bytes to read for a copy of {size}");
                return Err(Stop::new(FaultKind::OutOfBounds, detail).at_lane(lane));
            }
            let misses = |address: u64| address & (size as u64 - 1) != 0;
            if misses(u64::from(address)) || wanted > 0 && misses(from[lane]) {
                let wrong = if misses(u64::from(address)) {
                    u64::from(address)
                } else {
                    from[lane]
                };
                let detail = format!(
                    "a copy of {size} bytes needs addresses that are multiples of its size"
                );
                return Err(Stop::new(FaultKind::Misaligned, detail)
                    .at(wrong, "source or target")
                    .at_lane(lane));
            }
            self.check_shared(u64::from(address), size, lane)?;
            if wanted > 0 {
                let spot = self.locate(warp, from[lane], wanted, lane, "copies")?;
                self.check_reader(warp, from[lane], wanted, lane)?;
                if wanted == size {
                    self.check_defined(from[lane], spot, wanted, lane)?;
                } else {
                    for byte in 0..wanted as u64 {
                        self.check_defined(from[lane] + byte, spot.add(byte), 1, lane)?;
                    }
                }
                copy.from[lane] = spot.data;
            }
            let begun = self
                .shared
                .begin_copy(address as usize, size, of_lane(stamp, lane));
            begun.map_err(|c| self.shared_fault(c, lane, "copies to"))?;
            copy.to[lane] = address;
            copy.bytes[lane] = wanted as u8;
        }
        // Lanes that have committed a different number of groups belong to different groups.
        let mut rest = active;
        while rest != 0 {
            let group = warp.committed[rest.trailing_zeros() as usize];
            let lanes = set(rest)
                .filter(|&l| warp.committed[l] == group)
                .fold(0, |m, l| m | 1 << l);
            rest &= !lanes;
            warp.pending.push(Box::new(Pending {
                lanes,
                group,
                ..copy
            }));
        }
        Ok(())
    }

    /// Completes the copies that the lanes wait for: all of them, or all except those of the
    /// last `pending` groups and those that are not committed.
    pub(super) fn wait(&mut self, warp: &mut Warp, pending: Option<u32>, active: u32) {
        let mut copies = std::mem::take(&mut warp.pending);
        copies.retain_mut(|copy| {
            let arrives = |lane: &usize| match pending {
                None => true,
                Some(groups) => copy.group.saturating_add(groups) < warp.committed[*lane],
            };
            let arriving = set(copy.lanes & active)
                .filter(arrives)
                .fold(0, |m, l| m | 1 << l);
            if arriving != 0 {
                self.finish(warp, copy, arriving);
                copy.lanes &= !arriving;
            }
            copy.lanes != 0
        });
        warp.pending = copies;
    }

    fn finish(&mut self, warp: &Warp, copy: &Pending, lanes: u32) {
        let stamp = self.shared.stamp(warp.visitor(0, copy.at, false));
        for lane in set(lanes) {
            let to = copy.to[lane] as usize;
            let target = &mut self.shared.data[to..to + copy.size];
            let bytes = usize::from(copy.bytes[lane]);
            if bytes == copy.size {
                for (at, word) in target.chunks_exact_mut(4).enumerate() {
                    // SAFETY: `copy` checked that these bytes are aligned and lie in a region,
                    // which stays valid while the kernel runs.
                    unsafe { u32::read(copy.from[lane].add(4 * at)) }.to_bytes(word);
                }
            } else {
                target.fill(0);
                for (at, byte) in target.iter_mut().enumerate().take(bytes) {
                    // SAFETY: as above.
                    *byte = unsafe { u8::read(copy.from[lane].add(at)) };
                }
            }
            self.shared.end_copy(to, copy.size, of_lane(stamp, lane));
        }
    }
}
