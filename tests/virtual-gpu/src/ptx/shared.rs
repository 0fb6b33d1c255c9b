//! Shared memory of a block, and who touched it last.
//!
//! For each piece (the smallest access that the kernel makes) the last writer and the readers
//! since are kept, as stamps. Two accesses of one piece are a race, if one of them writes, they
//! are not both atomic, and nothing orders them:
//!
//! - threads of different warps are ordered by a barrier of the block;
//! - threads of one warp are ordered by that, by `bar.warp.sync`, and by the exchanges within a
//!   warp (`shfl`, `vote`, `match`, `redux`), whatever their member masks;
//! - a barrier of a part of the block counts as one of the whole.
//!
//! A write of the very bytes that are there already is not reported against another write.
//! From its issue to the wait of its thread an asynchronous copy owns its target: any other
//! access is a race, also one of the same thread.

/// Who touches memory, and when.
#[derive(Clone, Copy, Debug)]
pub struct Visitor {
    pub warp: u32,
    /// 32 stands for all lanes together.
    pub lane: u32,
    /// Counts what orders the threads of the warp, from 1.
    pub sequence: u32,
    /// The instruction.
    pub at: u32,
    pub atomic: bool,
}

/// What is wrong with an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Conflict {
    Uninitialised { at: usize },
    Race { at: usize, other: Other },
}

/// The earlier of two accesses that nothing orders.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Other {
    pub wrote: bool,
    pub in_flight: bool,
    pub warp: u32,
    pub lane: u32,
    /// The instruction.
    pub at: u32,
    /// Several lanes or warps read.
    pub many: bool,
}

// A stamp, from the highest bits: 14 era, 12 sequence, 4 flags, 5 warp, 5 lane, 24 instruction.
// 0 means never.
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
/// The last value of `Visitor::sequence`; then [`Shared::forget`] makes room.
pub const LAST_SEQUENCE: u32 = (1 << 12) - 1;
/// Written, in an era that is over.
const LONG_AGO: u64 = 1;

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
    /// log2 of the bytes of a piece.
    piece: u32,
    writes: Vec<u64>,
    reads: Vec<u64>,
    era: u64,
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
            check_races,
            check_initialised,
        }
    }

    /// For the next block: nothing is written.
    pub fn reset(&mut self) {
        self.data.fill(0xcd);
        self.writes.fill(0);
        self.reads.fill(0);
        self.era = 1;
    }

    /// A barrier of the block: what was before is ordered before what follows.
    pub fn barrier(&mut self) {
        self.era += 1;
        if self.era > LAST_ERA {
            self.era = 1;
            self.reads.fill(0);
            for stamp in &mut self.writes {
                if *stamp != 0 {
                    *stamp = LONG_AGO | *stamp & (IN_FLIGHT | 31 << WARP | 31 << LANE);
                }
            }
        }
    }

    /// The sequence of a warp begins anew: its earlier accesses are ordered before its later ones.
    pub fn forget(&mut self, warp: u32) {
        for stamp in self.writes.iter_mut().chain(&mut self.reads) {
            if *stamp >> ERA == self.era && warp_of(*stamp) == warp {
                *stamp &= !(0xfff << SEQUENCE);
            }
        }
    }

    /// What is noted for a visitor.
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

    /// Whether an earlier access is ordered before that of `who`, whose stamp is `mine`.
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
        at >> self.piece..(at + bytes - 1 >> self.piece) + 1
    }

    /// Notes a read of bytes that exist.
    #[inline]
    pub fn read(&mut self, at: usize, bytes: usize, who: Visitor) -> Result<(), Conflict> {
        let mine = self.stamp(who);
        self.read_as(at, bytes, mine)
    }

    /// [`Self::read`] with the stamp of the visitor.
    #[inline(always)]
    pub fn read_as(&mut self, at: usize, bytes: usize, mine: u64) -> Result<(), Conflict> {
        let pieces = self.pieces(at, bytes);
        if !self.check_races {
            if self.check_initialised
                && let Some(place) = self.writes[pieces.clone()].iter().position(|&w| w == 0)
            {
                return Err(Conflict::Uninitialised {
                    at: (pieces.start + place) << self.piece,
                });
            }
            return Ok(());
        }
        let (writes, reads) = (
            &self.writes[pieces.clone()],
            &mut self.reads[pieces.clone()],
        );
        // What is written in an earlier era, and read in one or by the same thread, needs no look.
        let mut plain = true;
        for (write, read) in writes.iter().zip(reads.iter()) {
            let is_old = write >> ERA != self.era && write & IN_FLIGHT == 0 && *write != 0;
            plain &= is_old && (read >> ERA != self.era || *read == mine);
        }
        if plain {
            reads.fill(mine);
            return Ok(());
        }
        self.read_checked(pieces, mine)
    }

    #[inline(never)]
    fn read_checked(&mut self, pieces: std::ops::Range<usize>, mine: u64) -> Result<(), Conflict> {
        for piece in pieces {
            let write = self.writes[piece];
            if write == 0 && self.check_initialised {
                return Err(Conflict::Uninitialised {
                    at: piece << self.piece,
                });
            }
            let both_atomic = mine & write & ATOMIC != 0;
            if write & IN_FLIGHT != 0 || !both_atomic && !self.is_ordered(write, mine) {
                return Err(self.race(piece, write, true));
            }
            let before = self.reads[piece];
            // Atomic only if all of them are.
            let mine = if before >> ERA == self.era {
                mine & (before | !ATOMIC)
            } else {
                mine
            };
            self.reads[piece] = if before >> ERA != self.era || before == mine {
                mine
            } else if warp_of(before) != warp_of(mine) {
                mine | MANY_WARPS
            } else if sequence_of(before) != sequence_of(mine) {
                mine | before & MANY_WARPS
            } else if lane_of(before) != lane_of(mine) {
                mine | before & MANY_WARPS | MANY_LANES
            } else {
                mine | before & (MANY_WARPS | MANY_LANES)
            };
        }
        Ok(())
    }

    /// Notes a write of bytes that exist. `same`: they are the bytes that are there already.
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

    /// [`Self::write`] with the stamp of the visitor.
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
            for (write, read) in writes.iter().zip(&self.reads[pieces.clone()]) {
                plain &=
                    write >> ERA != self.era && write & IN_FLIGHT == 0 && read >> ERA != self.era;
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
            if write & IN_FLIGHT != 0 || !both_atomic && !same && !self.is_ordered(write, mine) {
                return Err(self.race(piece, write, true));
            }
            let both_atomic = mine & read & ATOMIC != 0;
            if !both_atomic && !self.is_ordered(read, mine) {
                return Err(self.race(piece, read, false));
            }
            // A plain write stays noted when its thread goes on with an atomic one.
            if !(mine & ATOMIC != 0 && write >> ERA == self.era && write & ATOMIC == 0) {
                self.writes[piece] = mine;
            }
        }
        Ok(())
    }

    /// Notes the beginning of an asynchronous copy.
    pub fn begin_copy(&mut self, at: usize, bytes: usize, mine: u64) -> Result<(), Conflict> {
        if self.check_races {
            self.write_as(at, bytes, mine | IN_FLIGHT, false)
        } else {
            Ok(())
        }
    }

    /// Notes the end of an asynchronous copy.
    pub fn end_copy(&mut self, at: usize, bytes: usize, mine: u64) {
        if self.check_races || self.check_initialised {
            let pieces = self.pieces(at, bytes);
            self.writes[pieces].fill(mine);
        }
    }
}

/// A stamp for another lane of the same warp than lane 0, for which it was made.
#[inline(always)]
pub fn of_lane(stamp: u64, lane: usize) -> u64 {
    stamp | (lane as u64) << LANE
}
