//! Products of weights and float32 activations: always for floating-point weights, and on the
//! reference path for quantised weights.
//!
//! Each output is one chain of fused multiply-adds over the inputs in order, so it does not
//! depend on how many rows or tiles share the registers. Several rows or tiles are computed at
//! once only to hide the latency of the chain.

use super::layout::{QuantLayout, load_scales};
use super::packed::{FloatType, Packed};
use super::product::Operands;
use super::simd::{Isa, Kernel, LANES, Simd, unroll};
use std::cell::RefCell;
use std::ops::Range;

/// Bytes of activations that stay in the L2 cache while the tiles of an item are multiplied by
/// them.
const ROW_BYTES: usize = 384 * 1024;

/// Number of tiles that a single row is multiplied by at once.
pub(crate) const TILES: usize = 4;

/// Product of some tiles of a part with all rows.
pub(crate) struct FloatTiles<'a> {
    pub(crate) part: &'a Packed,
    pub(crate) float: FloatType,
    pub(crate) tiles: Range<usize>,
    pub(crate) operands: &'a Operands<'a>,
}

impl Kernel for FloatTiles<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let panels = Panels {
            part: self.part,
            operands: self.operands,
        };
        let tiles = self.tiles;
        let load = |tile| self.part.tile(tile).as_ptr();
        match self.float {
            FloatType::F32 => panels.tiles::<S, F32>(s, tiles, load),
            FloatType::F16 => panels.tiles::<S, F16>(s, tiles, load),
            FloatType::Bf16 => panels.tiles::<S, Bf16>(s, tiles, load),
        }
    }
}

/// Product of some tiles of quantised weights with all rows. The weights are expanded to
/// float32 first.
pub(crate) struct DequantisedTiles<'a> {
    pub(crate) part: &'a Packed,
    pub(crate) layout: QuantLayout,
    pub(crate) tiles: Range<usize>,
    pub(crate) operands: &'a Operands<'a>,
}

thread_local! {
    static PANEL: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

impl DequantisedTiles<'_> {
    /// Runs with this thread's panel as the buffer for the expanded weights.
    pub(crate) fn dispatch(self, isa: Isa) {
        PANEL.with_borrow_mut(|panel| {
            panel.resize(LANES * self.part.columns, 0.0);
            isa.dispatch(Dequantised { tiles: self, panel });
        });
    }
}

struct Dequantised<'a> {
    tiles: DequantisedTiles<'a>,
    /// Expanded tile, `[input][16]`.
    panel: &'a mut [f32],
}

impl Kernel for Dequantised<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let DequantisedTiles {
            part,
            layout,
            tiles,
            operands,
        } = self.tiles;
        let panels = Panels { part, operands };
        for tile in tiles {
            dequantise(s, part.tile(tile), &layout, self.panel);
            let panel = self.panel.as_ptr();
            panels.tiles::<S, F32>(s, tile..tile + 1, |_| panel.cast());
        }
    }
}

/// Expands a tile to float32, `[input][16]`.
#[inline(always)]
fn dequantise<S: Simd>(s: S, tile: &[u8], layout: &QuantLayout, out: &mut [f32]) {
    let affine = &layout.affine;
    let blocks = tile.chunks_exact(layout.block_bytes());
    let outs = out.chunks_exact_mut(layout.block_groups * affine.group * LANES);
    for (block, out) in blocks.zip(outs) {
        let (header, codes) = block.split_at(layout.header_bytes());
        let groups = codes.chunks_exact(layout.code_bytes());
        let outs = out.chunks_exact_mut(affine.group * LANES);
        for (index, (codes, out)) in groups.zip(outs).enumerate() {
            // SAFETY: a block begins with its header, and it has `block_groups` groups.
            let (scale, min) = unsafe {
                let header = header.as_ptr();
                match (affine.has_min, layout.nested()) {
                    (false, false) => load_scales::<S, false, false>(s, header, index),
                    (false, true) => load_scales::<S, false, true>(s, header, index),
                    (true, false) => load_scales::<S, true, false>(s, header, index),
                    (true, true) => load_scales::<S, true, true>(s, header, index),
                }
            };
            let min = if affine.has_min { Some(min) } else { None };
            let group = Group {
                zero: s.splat_i(-affine.zero),
                scale,
                min,
            };
            if affine.bits == 4 {
                let nibble = s.splat_i(0x0f0f_0f0f);
                for (from, out) in codes.chunks_exact(64).zip(out.chunks_exact_mut(8 * LANES)) {
                    // SAFETY: the chunk has 64 bytes.
                    let bytes = unsafe { s.load_bytes(from.as_ptr()) };
                    let (first, second) = out.split_at_mut(4 * LANES);
                    group.expand(s, s.and_i(bytes, nibble), first);
                    group.expand(s, s.and_i(s.shift_right::<4>(bytes), nibble), second);
                }
            } else {
                for (from, out) in codes.chunks_exact(64).zip(out.chunks_exact_mut(4 * LANES)) {
                    // SAFETY: the chunk has 64 bytes.
                    group.expand(s, unsafe { s.load_bytes(from.as_ptr()) }, out);
                }
            }
        }
    }
}

/// Parameters that the weights of a group share.
struct Group<S: Simd> {
    zero: S::I,
    scale: S::F,
    min: Option<S::F>,
}

impl<S: Simd> Group<S> {
    /// Writes the weights of four inputs, of which each lane of `codes` holds one byte per
    /// input.
    #[inline(always)]
    fn expand(&self, s: S, codes: S::I, out: &mut [f32]) {
        let mut codes = codes;
        for out in out.chunks_exact_mut(LANES) {
            let code = s.and_i(codes, s.splat_i(0xff));
            let mut weight = s.mul(self.scale, s.to_float(s.add_i(code, self.zero)));
            if let Some(min) = self.min {
                weight = s.add(weight, min);
            }
            // SAFETY: the chunk has `LANES` elements.
            unsafe { s.store(out.as_mut_ptr(), weight) };
            codes = s.shift_right::<8>(codes);
        }
    }
}

/// A floating-point weight format that the kernel can load.
trait Weight {
    const BYTES: usize;
    /// Loads sixteen weights.
    ///
    /// # Safety
    /// `at` must be readable for 16 weights.
    unsafe fn load<S: Simd>(s: S, at: *const u8) -> S::F;
}

struct F32;
struct F16;
struct Bf16;

impl Weight for F32 {
    const BYTES: usize = 4;
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, at: *const u8) -> S::F {
        // SAFETY: the caller guarantees that `at` is readable.
        unsafe { s.load(at.cast()) }
    }
}

impl Weight for F16 {
    const BYTES: usize = 2;
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, at: *const u8) -> S::F {
        // SAFETY: the caller guarantees that `at` is readable.
        unsafe { s.load_f16(at.cast()) }
    }
}

impl Weight for Bf16 {
    const BYTES: usize = 2;
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, at: *const u8) -> S::F {
        // SAFETY: the caller guarantees that `at` is readable.
        unsafe { s.load_bf16(at.cast()) }
    }
}

/// A part of the weights, and the operands to multiply it with.
struct Panels<'a> {
    part: &'a Packed,
    operands: &'a Operands<'a>,
}

impl Panels<'_> {
    /// Multiplies the tiles `tiles` with all rows. `load` returns the address of a tile, which
    /// holds `columns · 16` weights of format `W`.
    #[inline(always)]
    fn tiles<S: Simd, W: Weight>(
        &self,
        s: S,
        tiles: Range<usize>,
        load: impl Fn(usize) -> *const u8,
    ) {
        let row_bytes = self.part.columns.max(1) * 4;
        let chunk = (ROW_BYTES / row_bytes).max(8) / 8 * 8;
        let mut first = 0;
        while first < self.operands.rows {
            let end = self.operands.rows.min(first + chunk);
            let mut tile = tiles.start;
            while tiles.end - tile >= TILES {
                let at: [_; TILES] = std::array::from_fn(|t| load(tile + t));
                self.rows::<S, W, TILES>(s, tile, at, first..end);
                tile += TILES;
            }
            while tile < tiles.end {
                self.rows::<S, W, 1>(s, tile, [load(tile)], first..end);
                tile += 1;
            }
            first = end;
        }
    }

    /// Multiplies `T` tiles with some rows. Blocks of 8 or 4 rows take one tile at a time; the
    /// remaining rows each take all `T` tiles at once.
    #[inline(always)]
    fn rows<S: Simd, W: Weight, const T: usize>(
        &self,
        s: S,
        tile: usize,
        at: [*const u8; T],
        rows: Range<usize>,
    ) {
        let mut row = rows.start;
        for (t, &at) in at.iter().enumerate() {
            let mut row = row;
            while S::ROWS >= 8 && rows.end - row >= 8 {
                self.block::<S, W, 1, 8>(s, tile + t, [at], row);
                row += 8;
            }
            while S::ROWS >= 4 && rows.end - row >= 4 {
                self.block::<S, W, 1, 4>(s, tile + t, [at], row);
                row += 4;
            }
        }
        if S::ROWS >= 4 {
            row += (rows.end - row) / 4 * 4;
        }
        while row < rows.end {
            self.block::<S, W, T, 1>(s, tile, at, row);
            row += 1;
        }
    }

    /// Multiplies `T` tiles with `M` rows.
    #[inline(always)]
    fn block<S: Simd, W: Weight, const T: usize, const M: usize>(
        &self,
        s: S,
        tile: usize,
        at: [*const u8; T],
        row: usize,
    ) {
        let columns = self.part.columns;
        let x = &self.operands.x[row * columns..][..M * columns];
        let mut total = [[s.splat(0.0); M]; T];
        let x = x.as_ptr();
        for k in 0..columns {
            // SAFETY: every tile holds `columns · 16` weights, and `x` has `M` rows of
            // `columns` values.
            unsafe {
                unroll!(t < T => {
                    let weight = W::load(s, at[t].add(k * LANES * W::BYTES));
                    unroll!(m < M => {
                        let x = s.splat(*x.add(m * columns + k));
                        total[t][m] = s.fma(weight, x, total[t][m]);
                    });
                });
            }
        }
        unroll!(t < T => {
            let first = (tile + t) * LANES;
            let output = self.part.first_output + first;
            let count = LANES.min(self.part.rows - first);
            unroll!(m < M => {
                // SAFETY: these outputs of these rows belong to this tile alone.
                unsafe { self.operands.store(s, row + m, output, count, total[t][m]) };
            });
        });
    }
}
