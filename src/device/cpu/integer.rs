//! Products of quantised weights and 8-bit activations: integer dot products that are scaled
//! once per group.
//!
//! For a row and an output, the float operations are one fused multiply-add per span of
//! activations and one or two per group of weights, in the order of the groups. They are the
//! same for any number of rows in the register block, which keeps results independent of the
//! batch. The product of the row's largest value comes last. Columns in which only other rows
//! of the block have their largest value add 0.

use super::layout::{QuantLayout, load_scales};
use super::packed::Packed;
use super::product::Operands;
use super::quantise::{Quantised, SHARED, SPAN};
use super::simd::{Kernel, LANES, Simd, unroll};
use std::ops::Range;

/// Bytes of activations that stay in the L2 cache while the tiles of an item are multiplied by
/// them.
const ROW_BYTES: usize = 384 * 1024;

/// Prefetch distance in bytes.
const AHEAD: usize = 4096;

/// Product of some tiles of a part with all rows.
pub(crate) struct IntegerTiles<'a> {
    pub(crate) part: &'a Packed,
    pub(crate) layout: QuantLayout,
    pub(crate) tiles: Range<usize>,
    pub(crate) x: &'a Quantised,
    pub(crate) operands: &'a Operands<'a>,
}

impl Kernel for IntegerTiles<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let affine = &self.layout.affine;
        match (
            affine.bits,
            affine.group,
            self.layout.nested(),
            affine.has_min,
        ) {
            (4, 16, _, false) => self.tiles::<S, Shape<4, 16, true, false>>(s),
            (4, 16, _, true) => self.tiles::<S, Shape<4, 16, true, true>>(s),
            (4, _, false, false) => self.tiles::<S, Shape<4, 32, false, false>>(s),
            (4, _, false, true) => self.tiles::<S, Shape<4, 32, false, true>>(s),
            (4, _, true, false) => self.tiles::<S, Shape<4, 32, true, false>>(s),
            (4, _, true, true) => self.tiles::<S, Shape<4, 32, true, true>>(s),
            (_, 16, _, false) => self.tiles::<S, Shape<8, 16, true, false>>(s),
            (_, 16, _, true) => self.tiles::<S, Shape<8, 16, true, true>>(s),
            (_, _, false, false) => self.tiles::<S, Shape<8, 32, false, false>>(s),
            (_, _, false, true) => self.tiles::<S, Shape<8, 32, false, true>>(s),
            (_, _, true, false) => self.tiles::<S, Shape<8, 32, true, false>>(s),
            (_, _, true, true) => self.tiles::<S, Shape<8, 32, true, true>>(s),
        }
    }
}

/// A layout as compile-time constants. A branch in the innermost loop would keep accumulators
/// out of registers.
struct Shape<const BITS: usize, const GROUP: usize, const NESTED: bool, const MIN: bool>;

/// Constants of a [`Shape`].
trait TileShape {
    const BITS: usize;
    const GROUP: usize;
    const MIN: bool;
    /// Number of groups per block.
    const BLOCK: usize;

    /// Loads the scales and minimums of a group.
    ///
    /// # Safety
    /// `header` must point to a header of this layout, and `group` must be below `BLOCK`.
    unsafe fn scales<S: Simd>(s: S, header: *const u8, group: usize) -> (S::F, S::F);
}

impl<const BITS: usize, const GROUP: usize, const NESTED: bool, const MIN: bool> TileShape
    for Shape<BITS, GROUP, NESTED, MIN>
{
    const BITS: usize = BITS;
    const GROUP: usize = GROUP;
    const MIN: bool = MIN;
    const BLOCK: usize = if NESTED { 256 / GROUP } else { 1 };

    #[inline(always)]
    unsafe fn scales<S: Simd>(s: S, header: *const u8, group: usize) -> (S::F, S::F) {
        // SAFETY: the caller guarantees the header and the group.
        unsafe { load_scales::<S, MIN, NESTED>(s, header, group) }
    }
}

impl IntegerTiles<'_> {
    #[inline(always)]
    fn tiles<S: Simd, T: TileShape>(self, s: S) {
        let chunk = (ROW_BYTES / self.part.columns.max(1)).max(8) / 8 * 8;
        let mut first = 0;
        while first < self.operands.rows {
            let end = self.operands.rows.min(first + chunk);
            for tile in self.tiles.clone() {
                self.rows::<S, T>(s, tile, first..end);
            }
            first = end;
        }
    }

    /// Multiplies one tile with some rows, in blocks of at most [`Simd::ROWS`] rows.
    #[inline(always)]
    fn rows<S: Simd, T: TileShape>(&self, s: S, tile: usize, rows: Range<usize>) {
        let mut row = rows.start;
        while S::ROWS >= 8 && rows.end - row >= 8 {
            self.block::<S, T, 8>(s, tile, row);
            row += 8;
        }
        while S::ROWS >= 4 && rows.end - row >= 4 {
            self.block::<S, T, 4>(s, tile, row);
            row += 4;
        }
        while rows.end - row >= 2 {
            self.block::<S, T, 2>(s, tile, row);
            row += 2;
        }
        if row < rows.end {
            self.block::<S, T, 1>(s, tile, row);
        }
    }

    /// Multiplies one tile with `M` rows.
    #[inline(always)]
    fn block<S: Simd, T: TileShape, const M: usize>(&self, s: S, tile: usize, row: usize) {
        let (layout, columns) = (&self.layout, self.part.columns);
        let groups = layout.groups;
        let codes = &self.x.codes()[row * columns..][..M * columns];
        let meta = &self.x.meta(layout)[row * groups..][..M * groups];
        let weights = self.part.tile(tile);
        let (header_bytes, code_bytes) = (layout.header_bytes(), LANES * T::GROUP * T::BITS / 8);
        assert!(layout.affine.group == T::GROUP && groups * T::GROUP == columns);
        assert!(layout.block_groups == T::BLOCK && layout.code_bytes() == code_bytes);
        assert!(weights.len() == layout.tile_bytes());
        let low = s.splat_i(0x0f0f_0f0f);
        let mut total = [s.splat(0.0); M];
        let mut at = weights.as_ptr();
        let (mut header, mut within) = (at, T::BLOCK);
        for g in 0..groups {
            // SAFETY: `at` advances over the blocks of the tile, whose lengths were asserted to
            // add up to the tile. `codes` and `meta` were sliced to `M` rows.
            unsafe {
                if T::BLOCK == 1 || within == T::BLOCK {
                    prefetch(s, at, header_bytes);
                    (header, within) = (at, 0);
                    at = at.add(header_bytes);
                }
                prefetch(s, at, code_bytes);
                let (scale, min) = T::scales(s, header, within);
                within += 1;
                let x = codes.as_ptr().add(g * T::GROUP);
                let meta = meta.as_ptr().add(g);
                let mut scaled = [s.splat(0.0); M];
                let vectors = code_bytes / 64 * SPAN / T::GROUP;
                for span in 0..T::GROUP / SPAN {
                    let mut dots = [low; M];
                    unroll!(m < M => {
                        dots[m] = s.splat_i((*meta.add(m * groups)).starts[span]);
                    });
                    for vector in span * vectors..(span + 1) * vectors {
                        let bytes = s.load_bytes(at.add(vector * 64));
                        let x = x.add(vector * 32 / T::BITS);
                        if T::BITS == 4 {
                            let first = s.and_i(bytes, low);
                            let second = s.and_i(s.shift_right::<4>(bytes), low);
                            unroll!(m < M => {
                                let x = x.add(m * columns);
                                dots[m] = s.dot4(dots[m], first, splat_quad(s, x));
                                dots[m] = s.dot4(dots[m], second, splat_quad(s, x.add(4)));
                            });
                        } else {
                            unroll!(m < M => {
                                let x = splat_quad(s, x.add(m * columns));
                                dots[m] = s.dot4(dots[m], bytes, x);
                            });
                        }
                    }
                    unroll!(m < M => {
                        let factor = s.splat((*meta.add(m * groups)).scales[span]);
                        scaled[m] = s.fma(s.to_float(dots[m]), factor, scaled[m]);
                    });
                }
                at = at.add(code_bytes);
                unroll!(m < M => {
                    total[m] = s.fma(scaled[m], scale, total[m]);
                    if T::MIN {
                        total[m] = s.fma(min, s.splat((*meta.add(m * groups)).sum), total[m]);
                    }
                });
            }
        }
        let within = row % SHARED;
        assert!(within + M <= SHARED);
        for large in self.x.large(row) {
            // SAFETY: `large.column` is a column of the activations, so the tile has it.
            let weights = unsafe { column::<S, T>(s, layout, weights, large.column) };
            unroll!(m < M => {
                total[m] = s.fma(weights, s.splat(large.values[within + m]), total[m]);
            });
        }
        let output = self.part.first_output + tile * LANES;
        let count = LANES.min(self.part.rows - tile * LANES);
        unroll!(m < M => {
            // SAFETY: these outputs of these rows belong to this tile alone.
            unsafe { self.operands.store(s, row + m, output, count, total[m]) };
        });
    }
}

/// Returns the weights of one column in float32.
///
/// # Safety
/// `tile` must be a tile of `layout`, `T` must have the constants of `layout`, and the tile
/// must have the column.
#[inline(always)]
unsafe fn column<S: Simd, T: TileShape>(
    s: S,
    layout: &QuantLayout,
    tile: &[u8],
    column: usize,
) -> S::F {
    let (group, within) = (column / T::GROUP, column % T::GROUP);
    let (block, group) = (group / T::BLOCK, group % T::BLOCK);
    // Number of inputs per vector of codes.
    let inputs = 32 / T::BITS;
    let codes = layout.header_bytes() + group * layout.code_bytes() + within / inputs * 64;
    // SAFETY: the caller guarantees the tile and the column.
    unsafe {
        let block = tile.as_ptr().add(block * layout.block_bytes());
        let (scale, min) = T::scales(s, block, group);
        let mut bytes = s.load_bytes(block.add(codes));
        if T::BITS == 4 {
            if within % inputs >= 4 {
                bytes = s.shift_right::<4>(bytes);
            }
            bytes = s.and_i(bytes, s.splat_i(0x0f0f_0f0f));
        }
        // A dot product with a single 1 extracts the code in that place.
        let place = s.splat_i(1 << (within % 4 * 8));
        let code = s.dot4(s.splat_i(-layout.affine.zero), bytes, place);
        let weights = s.mul(scale, s.to_float(code));
        if T::MIN { s.add(weights, min) } else { weights }
    }
}

/// Prefetches the weights that are [`AHEAD`] bytes after `at`.
#[inline(always)]
fn prefetch<S: Simd>(s: S, at: *const u8, bytes: usize) {
    let mut line = 0;
    while line < bytes {
        s.prefetch(at.wrapping_add(AHEAD + line));
        line += 64;
    }
}

/// Returns a vector with the same four codes in every lane.
///
/// # Safety
/// `x` must be readable for 4 bytes.
#[inline(always)]
unsafe fn splat_quad<S: Simd>(s: S, x: *const i8) -> S::I {
    // SAFETY: the caller guarantees that `x` is readable for 4 bytes.
    s.splat_i(unsafe { x.cast::<i32>().read_unaligned() })
}
