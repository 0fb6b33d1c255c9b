//! How many blocks share the inputs of a tile of a matrix product.
//!
//! The inputs of a product are divided into units, whose sums are added in ascending order (see
//! `kernels/linear.cuh`). The units depend on the number of inputs only. A narrow product with few
//! rows has fewer tiles than a GPU runs blocks at once, so several blocks share the units of each
//! tile, which changes no bit of the result.

/// The least number of inputs of a unit of a floating-point product, and its maximum number of
/// units: more units mean more sums that pass through memory.
const LEAST_UNIT: usize = 1024;
const MOST_UNITS: usize = 8;

/// Number of tiles whose units may be shared, as in `kernels/linear.cuh`.
const COUNTERS: usize = 1024;
const COUNTER_BYTES: usize = 4 * COUNTERS;

/// Blocks per multiprocessor that go through the largest tiles, and what each of them keeps in
/// memory: a float32 per result of a tile of 128 × 128.
const LARGE_BLOCKS: usize = 2;
const LARGE_BYTES: usize = 4 * 128 * 128;

/// Returns the number of inputs of a unit of a floating-point product with `inputs` inputs.
pub(super) fn unit_inputs(inputs: usize) -> usize {
    LEAST_UNIT * inputs.div_ceil(LEAST_UNIT * MOST_UNITS).max(1)
}

/// Returns the number of records of a round, of the `records` records of a row of weights in a block
/// format, as in `kernels/linear_quant.cu`: there are at most four rounds.
pub(super) fn round_records(records: usize) -> usize {
    16.max(records.div_ceil(16) * 4)
}

/// What a GPU has room for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Room {
    pub(super) multiprocessors: usize,
    /// Bytes of shared memory per multiprocessor.
    pub(super) shared: usize,
}

impl Room {
    /// Returns the bytes of memory for sums, and for counters before them.
    pub(super) fn sum_bytes(&self) -> usize {
        COUNTER_BYTES + self.large_blocks() * LARGE_BYTES
    }

    /// Returns the maximum number of blocks that go through the largest tiles.
    pub(super) fn large_blocks(&self) -> usize {
        LARGE_BLOCKS * self.multiprocessors
    }

    /// Returns the number of blocks that run at once. A block takes `shared` bytes of shared
    /// memory; at most `most` of them run on a multiprocessor, whatever they take.
    pub(super) fn blocks(&self, shared: usize, most: usize) -> usize {
        /// Bytes per block that the driver reserves.
        const RESERVED: usize = 1 << 10;
        self.multiprocessors * (self.shared / (shared + RESERVED)).clamp(1, most)
    }
}

/// The tiles of a product.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tiles {
    pub(super) count: usize,
    /// Number of results per tile.
    pub(super) size: usize,
    /// Number of parts that the inputs have: a block takes one or more of them, in order.
    pub(super) parts: usize,
    /// Units per part.
    pub(super) units: usize,
}

impl Tiles {
    /// Returns the number of blocks that share the parts of each tile: the one with which the
    /// busiest of them has the fewest, if `blocks` blocks run at once. All of them do, or else
    /// the tiles are not shared.
    pub(super) fn sharing(&self, blocks: usize, room: &Room) -> usize {
        let most = self.parts.min(blocks / self.count.max(1));
        let fits = |sharing: &usize| {
            let bytes = 4 * self.size * self.count * self.sums(*sharing);
            self.count <= COUNTERS && COUNTER_BYTES + bytes <= room.sum_bytes()
        };
        let sharing = (2..=most).filter(fits);
        let best = sharing.min_by_key(|sharing| self.parts.div_ceil(*sharing));
        best.unwrap_or(1)
    }

    /// Returns the number of sums per tile that pass through memory: one of the first block,
    /// and one for each unit of the others.
    fn sums(&self, sharing: usize) -> usize {
        1 + (self.parts - self.parts / sharing) * self.units
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const H200: Room = Room {
        multiprocessors: 132,
        shared: 228 << 10,
    };

    #[test]
    fn a_unit_has_whole_stages_and_there_are_at_most_eight() {
        for (inputs, expected) in [
            (8, 1024),
            (1024, 1024),
            (4096, 1024),
            (8192, 1024),
            (8200, 2048),
            (14336, 2048),
            (28672, 4096),
        ] {
            let unit = unit_inputs(inputs);
            assert_eq!(unit, expected, "{inputs}");
            assert!(unit.is_multiple_of(128) && inputs.div_ceil(unit) <= MOST_UNITS);
        }
    }

    #[test]
    fn a_round_has_whole_stages_and_there_are_at_most_four() {
        for (records, expected) in [(1, 16), (32, 16), (64, 16), (65, 20), (112, 28), (224, 56)] {
            let round = round_records(records);
            assert_eq!(round, expected, "{records}");
            assert!(round.is_multiple_of(4) && records.div_ceil(round) <= 4);
        }
    }

    #[test]
    fn narrow_products_are_shared_until_a_gpu_is_full() {
        let sharing = |count, (rows, outputs): (usize, usize), inputs: usize| {
            let tiles = Tiles {
                count,
                size: rows * outputs,
                parts: inputs.div_ceil(unit_inputs(inputs)),
                units: 1,
            };
            tiles.sharing(H200.blocks(61_440, 3), &H200)
        };
        assert_eq!(H200.blocks(61_440, 3), 396);
        // The projections of an 8B model at up to 16 rows: attention out, down, and gate and up.
        assert_eq!(sharing(128, (16, 32), 4096), 2);
        assert_eq!(sharing(128, (16, 32), 14336), 3);
        assert_eq!(sharing(896, (16, 32), 4096), 1);
        // At 64 rows.
        assert_eq!(sharing(64, (64, 64), 4096), 4);
        assert_eq!(sharing(64, (64, 64), 14336), 4);
        // One unit cannot be shared, and no tiles need no blocks.
        assert_eq!(sharing(1, (16, 32), 1024), 1);
        assert_eq!(sharing(0, (16, 32), 4096), 4);
    }

    #[test]
    fn sums_never_take_more_memory_than_there_is() {
        for multiprocessors in [1, 4, 46, 132, 192] {
            let room = Room {
                multiprocessors,
                ..H200
            };
            for count in [1, 7, 60, 131, 200, 1025] {
                for (size, units) in [(256, 4), (512, 1), (4096, 1), (8192, 1)] {
                    let tiles = Tiles {
                        count,
                        size,
                        parts: 32,
                        units,
                    };
                    let sharing = tiles.sharing(room.blocks(70_000, 3), &room);
                    let bytes = 4 * size * count * tiles.sums(sharing);
                    let fits = COUNTER_BYTES + bytes <= room.sum_bytes();
                    assert!(sharing == 1 || fits && count <= COUNTERS, "{tiles:?}");
                }
            }
        }
    }

    #[test]
    fn the_kernels_have_as_many_counters() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/kernels/linear.cuh");
        let source = std::fs::read_to_string(path).unwrap();
        let counters = format!("constexpr u32 COUNTERS = {COUNTERS};");
        assert!(
            source.contains(&counters),
            "kernels/linear.cuh has another number"
        );
    }
}
