//! Shared memory of a block, with a record of the last accesses.
//!
//! For each piece (the smallest access that the kernel makes), the last writer and the readers
//! since then are recorded as stamps. Two accesses to the same piece are a race if at least one
//! of them writes, they are not both atomic, and nothing orders them:
//!
//! - threads of different warps are ordered by a barrier of the block;
//! - threads of one warp are also ordered by `bar.warp.sync` and by exchanges within the warp
//!   (`shfl`, `vote`, `match`, `redux`), whatever their member masks;
//! - a barrier for a part of the block counts as one for the whole block.
//!
//! A write that does not change the bytes is not reported against another write. From its issue
//! until its thread waits, an asynchronous copy owns its target: any other access is a race,
//! even one by the same thread.

/// Who accesses memory, and when.
#[derive(Clone, Copy, Debug)]
pub struct Visitor {
    pub warp: u32,
    /// Lane; 32 means all lanes together.
    pub lane: u32,
    /// Number of orderings between the threads of the warp so far, counted from 1.
    pub sequence: u32,
    /// Index of the instruction.
    pub at: u32,
    pub atomic: bool,
}

/// What is wrong with an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Conflict {
    Uninitialised { at: usize },
    Race { at: usize, other: Other },
}

/// The earlier of two unordered accesses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Other {
    pub wrote: bool,
    pub in_flight: bool,
    pub warp: u32,
    pub lane: u32,
    /// Index of the instruction.
    pub at: u32,
    /// Whether several lanes or warps have read.
    pub many: bool,
}

// Layout of a stamp, from the highest bits: 14 era, 12 sequence, 4 flags, 5 warp, 5 lane, 24
// instruction. Eras count barriers and blocks; 0 means never.
const ERA: u32 = 50;
const SEQUENCE: u32 = 38;
const MANY_LANES: u64 = 1 << 37;
const MANY_WARPS: u64 = 1 << 36;
const ATOMIC: u64 = 1 << 35;
const IN_FLIGHT: u64 = 1 << 34;
const WARP: u32 = 29;
const LANE: u32 = 24;
const INSTRUCTION: u64 = 0xff_ffff;
const LAST_ERA: u64 = (1 << 14) - 1;
/// Maximum of `Visitor::sequence`; the sequence then restarts, after a call of
/// [`Shared::forget`].
pub const LAST_SEQUENCE: u32 = (1 << 12) - 1;

fn warp_of(stamp: u64) -> u32 {
    (stamp >> WARP) as u32 & 31
}

fn lane_of(stamp: u64) -> u32 {
    (stamp >> LANE) as u32 & 31
}

fn sequence_of(stamp: u64) -> u64 {
    stamp >> SEQUENCE & 0xfff
}

/// The shared memory of a block.
pub struct Shared {
    pub data: Vec<u8>,
    /// log2 of the bytes per piece.
    piece: u32,
    writes: Vec<u64>,
    reads: Vec<u64>,
    era: u64,
    /// Lower bound of the stamps of this block.
    floor: u64,
    check_races: bool,
    check_initialised: bool,
}

impl Shared {
    pub fn new(bytes: usize, granule: usize, check_races: bool, check_initialised: bool) -> Self {
        let piece = granule.trailing_zeros();
        let pieces = if check_races || check_initialised {
            bytes.div_ceil(granule)
        } else {
            0
        };
        let reads = if check_races {
            vec![0; pieces]
        } else {
            Vec::new()
        };
        let data = vec![0xcd; bytes];
        Shared {
            data,
            piece,
            writes: vec![0; pieces],
            reads,
            era: 1,
            floor: 1 << ERA,
            check_races,
            check_initialised,
        }
    }

    /// Prepares for the next block, for which nothing has been written.
    pub fn reset(&mut self) {
        self.data.fill(0xcd);
        self.era += 1;
        if self.era > LAST_ERA {
            self.writes.fill(0);
            self.reads.fill(0);
            self.era = 1;
        }
        self.floor = self.era << ERA;
    }

    /// Records a barrier of the block, which orders all earlier accesses before all later ones.
    pub fn barrier(&mut self) {
        self.era += 1;
        if self.era > LAST_ERA {
            // Restart the eras: this block's writes are moved to era 1, and the current era is
            // 2.
            self.era = 2;
            self.reads.fill(0);
            for stamp in &mut self.writes {
                let is_mine = *stamp >= self.floor;
                *stamp = if is_mine {
                    *stamp & !(LAST_ERA << ERA) | 1 << ERA
                } else {
                    0
                };
            }
            self.floor = 1 << ERA;
        }
    }

    /// Restarts the sequence of a warp. Its earlier accesses are ordered before its later ones.
    pub fn forget(&mut self, warp: u32) {
        for stamp in self.writes.iter_mut().chain(&mut self.reads) {
            if *stamp >> ERA == self.era && warp_of(*stamp) == warp {
                *stamp &= !(0xfff << SEQUENCE);
            }
        }
    }

    /// Returns the stamp of a visitor.
    pub fn stamp(&self, who: Visitor) -> u64 {
        let lane = if who.lane < 32 {
            u64::from(who.lane) << LANE
        } else {
            MANY_LANES
        };
        self.era << ERA
            | u64::from(who.sequence) << SEQUENCE
            | u64::from(who.warp) << WARP
            | lane
            | if who.atomic { ATOMIC } else { 0 }
            | u64::from(who.at) & INSTRUCTION
    }

    /// Returns whether an earlier access is ordered before the one with the stamp `mine`.
    #[inline(always)]
    fn is_ordered(&self, stamp: u64, mine: u64) -> bool {
        if stamp >> ERA != self.era {
            return true;
        }
        if stamp & MANY_WARPS != 0 || warp_of(stamp) != warp_of(mine) {
            return false;
        }
        sequence_of(stamp) != sequence_of(mine)
            || (stamp | mine) & MANY_LANES == 0 && lane_of(stamp) == lane_of(mine)
    }

    fn race(&self, piece: usize, stamp: u64, wrote: bool) -> Conflict {
        let other = Other {
            wrote,
            in_flight: stamp & IN_FLIGHT != 0,
            warp: warp_of(stamp),
            lane: lane_of(stamp),
            at: (stamp & INSTRUCTION) as u32,
            many: stamp & (MANY_LANES | MANY_WARPS) != 0,
        };
        Conflict::Race {
            at: piece << self.piece,
            other,
        }
    }

    #[inline(always)]
    fn pieces(&self, at: usize, bytes: usize) -> std::ops::Range<usize> {
        at >> self.piece..((at + bytes - 1) >> self.piece) + 1
    }

    /// Records a read of bytes that exist.
    #[inline]
    pub fn read(&mut self, at: usize, bytes: usize, who: Visitor) -> Result<(), Conflict> {
        let mine = self.stamp(who);
        self.read_as(at, bytes, mine)
    }

    /// Like [`Self::read`], with the stamp of the visitor.
    #[inline(always)]
    pub fn read_as(&mut self, at: usize, bytes: usize, mine: u64) -> Result<(), Conflict> {
        let pieces = self.pieces(at, bytes);
        if !self.check_races {
            let floor = self.floor;
            if self.check_initialised
                && let Some(place) = self.writes[pieces.clone()].iter().position(|&w| w < floor)
            {
                return Err(Conflict::Uninitialised {
                    at: (pieces.start + place) << self.piece,
                });
            }
            return Ok(());
        }
        let now = self.era << ERA;
        let (writes, reads) = (
            &self.writes[pieces.clone()],
            &mut self.reads[pieces.clone()],
        );
        for (write, read) in writes.iter().zip(reads) {
            // Writes of this block in an earlier era need no closer check.
            if *write < self.floor || *write >= now || write & IN_FLIGHT != 0 {
                return self.read_checked(pieces, mine);
            }
            *read = joined(*read, mine);
        }
        Ok(())
    }

    #[inline(never)]
    fn read_checked(&mut self, pieces: std::ops::Range<usize>, mine: u64) -> Result<(), Conflict> {
        for piece in pieces {
            let write = self.writes[piece];
            if write < self.floor {
                if self.check_initialised {
                    return Err(Conflict::Uninitialised {
                        at: piece << self.piece,
                    });
                }
            } else {
                let both_atomic = mine & write & ATOMIC != 0;
                if write & IN_FLIGHT != 0 || !both_atomic && !self.is_ordered(write, mine) {
                    return Err(self.race(piece, write, true));
                }
            }
            self.reads[piece] = joined(self.reads[piece], mine);
        }
        Ok(())
    }

    /// Records a write of bytes that exist. `same` tells that the write does not change them.
    #[inline]
    pub fn write(
        &mut self,
        at: usize,
        bytes: usize,
        who: Visitor,
        same: bool,
    ) -> Result<(), Conflict> {
        let mine = self.stamp(who);
        self.write_as(at, bytes, mine, same)
    }

    /// Like [`Self::write`], with the stamp of the visitor.
    #[inline(always)]
    pub fn write_as(
        &mut self,
        at: usize,
        bytes: usize,
        mine: u64,
        same: bool,
    ) -> Result<(), Conflict> {
        if !self.check_races && !self.check_initialised {
            return Ok(());
        }
        let pieces = self.pieces(at, bytes);
        let writes = &mut self.writes[pieces.clone()];
        let mut plain = true;
        if self.check_races {
            let now = self.era << ERA;
            for (write, read) in writes.iter().zip(&self.reads[pieces.clone()]) {
                let is_old = *write < self.floor || *write < now && write & IN_FLIGHT == 0;
                plain &= is_old && *read < now;
            }
        }
        if plain {
            writes.fill(mine);
            return Ok(());
        }
        self.write_checked(pieces, mine, same)
    }

    #[inline(never)]
    fn write_checked(
        &mut self,
        pieces: std::ops::Range<usize>,
        mine: u64,
        same: bool,
    ) -> Result<(), Conflict> {
        for piece in pieces {
            let (write, read) = (self.writes[piece], self.reads[piece]);
            let both_atomic = mine & write & ATOMIC != 0;
            let is_mine = write >= self.floor;
            if is_mine
                && (write & IN_FLIGHT != 0
                    || !both_atomic && !same && !self.is_ordered(write, mine))
            {
                return Err(self.race(piece, write, true));
            }
            let both_atomic = mine & read & ATOMIC != 0;
            if !both_atomic && !self.is_ordered(read, mine) {
                return Err(self.race(piece, read, false));
            }
            // Keep the record of a plain write when its thread continues with an atomic one.
            if !(mine & ATOMIC != 0 && write >> ERA == self.era && write & ATOMIC == 0) {
                self.writes[piece] = mine;
            }
        }
        Ok(())
    }

    /// Records the beginning of an asynchronous copy.
    pub fn begin_copy(&mut self, at: usize, bytes: usize, mine: u64) -> Result<(), Conflict> {
        if self.check_races {
            self.write_as(at, bytes, mine | IN_FLIGHT, false)
        } else {
            Ok(())
        }
    }

    /// Records the end of an asynchronous copy.
    pub fn end_copy(&mut self, at: usize, bytes: usize, mine: u64) {
        if self.check_races || self.check_initialised {
            let pieces = self.pieces(at, bytes);
            self.writes[pieces].fill(mine);
        }
    }
}

/// Returns the stamp of all readers: the earlier ones and `mine`.
#[inline(always)]
fn joined(before: u64, mine: u64) -> u64 {
    if before >> ERA != mine >> ERA {
        return mine;
    }
    let other_warp = if warp_of(before) == warp_of(mine) {
        0
    } else {
        MANY_WARPS
    };
    // Reads of other lanes that are ordered before this one no longer count within the warp.
    let same_sequence = sequence_of(before) == sequence_of(mine);
    let other_lane = if same_sequence && lane_of(before) != lane_of(mine) {
        MANY_LANES
    } else {
        0
    };
    let kept = before
        & if same_sequence {
            MANY_WARPS | MANY_LANES
        } else {
            MANY_WARPS
        };
    // The combination is atomic only if all reads are.
    (mine & (before | !ATOMIC)) | kept | other_warp | other_lane
}

/// Turns a stamp made for lane 0 into one for another lane of the same warp.
#[inline(always)]
pub fn of_lane(stamp: u64, lane: usize) -> u64 {
    stamp | (lane as u64) << LANE
}

#[cfg(test)]
mod tests {
    use super::*;

    fn visitor(warp: u32, lane: u32, sequence: u32) -> Visitor {
        Visitor {
            warp,
            lane,
            sequence,
            at: 0,
            atomic: false,
        }
    }

    fn shared() -> Shared {
        Shared::new(64, 4, true, true)
    }

    #[test]
    fn races_are_detected_after_any_number_of_barriers() {
        let mut shared = shared();
        shared.write(0, 4, visitor(0, 0, 1), false).unwrap();
        for _ in 0..3 * LAST_ERA {
            shared.barrier();
            shared.read(0, 4, visitor(1, 0, 1)).unwrap();
            assert!(shared.read(4, 4, visitor(1, 0, 1)).is_err());
            assert!(shared.write(0, 4, visitor(0, 0, 1), false).is_err());
        }
        shared.barrier();
        shared.write(0, 4, visitor(2, 0, 1), false).unwrap();
        assert!(shared.read(0, 4, visitor(1, 0, 1)).is_err());
    }

    #[test]
    fn shared_memory_of_a_new_block_is_undefined_after_any_number_of_blocks() {
        let mut shared = shared();
        for _ in 0..3 * LAST_ERA {
            shared.reset();
            assert_eq!(
                shared.read(0, 4, visitor(0, 0, 1)),
                Err(Conflict::Uninitialised { at: 0 })
            );
            shared.write(0, 4, visitor(0, 0, 1), false).unwrap();
            shared.read(0, 4, visitor(0, 0, 1)).unwrap();
            let stamp = shared.stamp(visitor(0, 0, 1));
            shared.begin_copy(8, 16, stamp).unwrap();
            assert!(shared.read(8, 4, visitor(0, 0, 1)).is_err());
        }
    }

    #[test]
    fn a_copy_stays_in_flight_across_barriers() {
        let mut shared = shared();
        let stamp = shared.stamp(visitor(0, 3, 1));
        shared.begin_copy(16, 16, stamp).unwrap();
        for _ in 0..2 * LAST_ERA {
            shared.barrier();
        }
        assert!(matches!(
            shared.read(20, 4, visitor(0, 3, 1)),
            Err(Conflict::Race { at: 20, .. })
        ));
        assert!(shared.write(20, 4, visitor(0, 3, 1), false).is_err());
        let stamp = shared.stamp(visitor(0, 3, 1));
        shared.end_copy(16, 16, stamp);
        shared.read(20, 4, visitor(0, 3, 1)).unwrap();
    }

    #[test]
    fn restarted_sequence_numbers_do_not_order_unordered_accesses() {
        let mut shared = shared();
        shared
            .write(0, 4, visitor(0, 0, LAST_SEQUENCE), false)
            .unwrap();
        shared.forget(0);
        shared.read(0, 4, visitor(0, 1, 1)).unwrap();
        assert!(shared.read(0, 4, visitor(1, 1, 1)).is_err());
    }

    #[test]
    fn readers_of_several_lanes_and_warps_are_remembered() {
        let mut shared = shared();
        shared.write(0, 4, visitor(0, 0, 1), false).unwrap();
        shared.barrier();
        for lane in [3, 5] {
            shared.read(0, 4, visitor(0, lane, 1)).unwrap();
        }
        // Another lane has read, too, and the warp has not been synchronised since.
        assert!(shared.write(0, 4, visitor(0, 5, 1), false).is_err());
        shared.read(0, 4, visitor(1, 0, 1)).unwrap();
        assert!(shared.write(0, 4, visitor(1, 0, 2), false).is_err());
        shared.barrier();
        shared.read(0, 4, visitor(0, 3, 1)).unwrap();
        shared.write(0, 4, visitor(0, 4, 2), false).unwrap();
    }
}
