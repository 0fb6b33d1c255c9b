//! Activations as 8-bit integers, for integer dot products with quantised weights.
//!
//! Each span of 16 values of a row has its own scale, `largest magnitude / 127`. With spans of
//! 32, as in ggml, the error of the log probabilities is a third larger. The sums of the codes
//! over each group of weights are stored as well. The kernel uses them to account for the zero
//! points of the weights (exactly, in integers) and for their minimums.
//!
//! The value with the largest magnitude of each row is not rounded. Its code is 0, and the
//! kernel adds its products in float32, as LLM.int8() does for columns with large values
//! (Dettmers et al., 2022). Otherwise a channel that is much larger than the others would
//! reduce the precision of its whole span.

use super::layout::QuantLayout;
use super::memory::Disjoint;
use super::simd::{Isa, Kernel, LANES, Simd};
use super::workers::Workers;
use crate::device::DeviceError;
use std::ops::Range;

/// Number of values that share a scale.
pub(crate) const SPAN: usize = 16;

/// Number of values that are quantised at a time: the size of the largest group of weights.
const GROUP: usize = 2 * SPAN;

/// Number of rows whose largest values are listed together. This is the maximum number of rows
/// of a register block, and no block crosses a multiple of it.
pub(crate) const SHARED: usize = 8;

/// A column in which at least one of [`SHARED`] rows has its largest value.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LargeColumn {
    pub(crate) column: usize,
    /// Value of each row in this column; 0 if the row has its largest value in another column.
    pub(crate) values: [f32; SHARED],
}

impl LargeColumn {
    /// Sentinel after the last column of a list.
    const END: Self = Self {
        column: usize::MAX,
        values: [0.0; SHARED],
    };
}

/// What a kernel needs to know about the values of a row, apart from their codes, for one group
/// of weights. A group consists of one or two spans.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct GroupMeta {
    /// Scale of each span, which is the value of code 1.
    pub(crate) scales: [f32; 2],
    /// `−zero · Σ codes` of each span, the initial value of the integer dot product.
    pub(crate) starts: [i32; 2],
    /// `Σ scale · Σ codes`, the factor for a minimum of the weights.
    pub(crate) sum: f32,
}

/// Quantised rows of activations. Reused from call to call to keep the memory.
#[derive(Default)]
pub(crate) struct Quantised {
    codes: Vec<i8>,
    meta: Vec<GroupMeta>,
    views: Vec<View>,
    /// For every [`SHARED`] rows, a list of at most [`SHARED`] columns.
    large: Vec<LargeColumn>,
}

/// Sums for the weights of one group size and zero point.
struct View {
    group: usize,
    zero: i32,
    /// Range of the sums in [`Quantised::meta`], row after row.
    meta: Range<usize>,
}

impl Quantised {
    /// Quantises `rows` rows of `x` for weights of the given layouts.
    pub(crate) fn fill(
        &mut self,
        workers: &mut Workers,
        isa: Isa,
        x: &[f32],
        (rows, columns): (usize, usize),
        layouts: impl Iterator<Item = QuantLayout>,
    ) -> Result<(), DeviceError> {
        self.codes.resize(rows * columns, 0);
        self.views.clear();
        let mut end = 0;
        for layout in layouts {
            let (group, zero) = (layout.affine.group, layout.affine.zero);
            if !self
                .views
                .iter()
                .any(|view| view.group == group && view.zero == zero)
            {
                let meta = end..end + rows * columns / group;
                end = meta.end;
                self.views.push(View { group, zero, meta });
            }
        }
        self.meta.resize(end, GroupMeta::default());
        let shares = rows.div_ceil(SHARED);
        self.large.resize(shares * SHARED, LargeColumn::END);
        let large = &Disjoint::new(&mut self.large);
        let codes = &Disjoint::new(&mut self.codes);
        let (views, meta) = (&self.views[..], &Disjoint::new(&mut self.meta));
        // A small number of rows is done sooner than a second thread could join.
        let grain = (16_384 / SHARED / columns.max(1)).max(1);
        workers.run("linear", shares, grain, |range| {
            isa.dispatch(QuantiseRows {
                x,
                rows,
                columns,
                range,
                codes,
                meta,
                views,
                large,
            });
        })
    }

    /// Returns the codes of all rows.
    pub(crate) fn codes(&self) -> &[i8] {
        &self.codes
    }

    /// Returns the columns of the largest values of `row` and of the rows listed with it, in
    /// ascending order.
    #[inline(always)]
    pub(crate) fn large(&self, row: usize) -> impl Iterator<Item = &LargeColumn> {
        let list = &self.large[row / SHARED * SHARED..][..SHARED];
        list.iter().take_while(|large| large.column != usize::MAX)
    }

    /// Returns the [`GroupMeta`] for weights of `layout`, one entry per row and group.
    pub(crate) fn meta(&self, layout: &QuantLayout) -> &[GroupMeta] {
        let affine = &layout.affine;
        let fits = |view: &&View| view.group == affine.group && view.zero == affine.zero;
        self.views
            .iter()
            .find(fits)
            .map_or(&[], |view| &self.meta[view.meta.clone()])
    }
}

struct QuantiseRows<'a> {
    x: &'a [f32],
    rows: usize,
    columns: usize,
    /// Indices of the groups of [`SHARED`] rows.
    range: Range<usize>,
    codes: &'a Disjoint<'a, i8>,
    meta: &'a Disjoint<'a, GroupMeta>,
    views: &'a [View],
    large: &'a Disjoint<'a, LargeColumn>,
}

impl Kernel for QuantiseRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for share in self.range.clone() {
            let first = share * SHARED;
            let mut found = [(usize::MAX, 0, 0.0); SHARED];
            for row in first..self.rows.min(first + SHARED) {
                let x = &self.x[row * self.columns..][..self.columns];
                if let Some(column) = self.quantise_row(s, row, x) {
                    found[row - first] = (column, row - first, x[column]);
                }
            }
            // SAFETY: the list belongs to this item.
            list_columns(&mut found, unsafe { self.large.range(first, SHARED) });
        }
    }
}

impl QuantiseRows<'_> {
    /// Quantises a row and writes its codes and sums. Returns the column of the largest value,
    /// whose code is 0, or `None` if all values are 0 or NaN.
    #[inline(always)]
    fn quantise_row<S: Simd>(&self, s: S, row: usize, x: &[f32]) -> Option<usize> {
        let groups = x.as_chunks::<GROUP>().0;
        let largest = largest(s, x);
        let mut found = None;
        for (g, x) in groups.iter().enumerate() {
            let [first, second] = self.quantise_group(s, row, g, x);
            if found.is_none() && first.scale.max(second.scale) >= largest / 127.0 {
                let offset = x.iter().position(|value| value.abs() == largest);
                found = offset.map(|offset| (g, offset));
            }
        }
        let (g, offset) = found.filter(|_| largest > 0.0)?;
        let mut rest = groups[g];
        // This is 0, or NaN if the value is infinite, so that an infinity is not lost.
        rest[offset] *= 0.0;
        self.quantise_group(s, row, g, &rest);
        Some(g * GROUP + offset)
    }

    /// Quantises one group of values of a row and writes its codes and sums.
    #[inline(always)]
    fn quantise_group<S: Simd>(&self, s: S, row: usize, g: usize, x: &[f32; GROUP]) -> [Span; 2] {
        let codes = self.codes.pointer(row * self.columns + g * GROUP, GROUP);
        // SAFETY: `x` has 32 values, `codes` points to 32 codes, and the row belongs to this
        // item.
        let spans = unsafe {
            let (first, second) = x.split_at(SPAN);
            [
                quantise(s, first, codes),
                quantise(s, second, codes.add(SPAN)),
            ]
        };
        for view in self.views {
            let groups = GROUP / view.group;
            let first = view.meta.start + row * (self.columns / view.group) + g * groups;
            // SAFETY: these entries belong to this row only.
            let meta = unsafe { self.meta.range(first, groups) };
            if let [whole] = meta {
                *whole = GroupMeta::new(view.zero, spans);
            } else {
                for (meta, span) in meta.iter_mut().zip(spans) {
                    *meta = GroupMeta::new(view.zero, [span, Span::default()]);
                }
            }
        }
        spans
    }
}

/// Returns the largest magnitude of a row, ignoring NaN.
#[inline(always)]
fn largest<S: Simd>(s: S, x: &[f32]) -> f32 {
    let mut largest = s.splat(0.0);
    for x in x.as_chunks::<LANES>().0 {
        // SAFETY: a chunk holds sixteen values, which is one vector. If the first operand of
        // `max` is NaN, the second one is the result.
        largest = s.max(s.abs(unsafe { s.load(x.as_ptr()) }), largest);
    }
    s.reduce_max(largest)
}

/// Writes the entries of `found`, each a column, a row and a value, as one list by column.
fn list_columns(found: &mut [(usize, usize, f32); SHARED], list: &mut [LargeColumn]) {
    found.sort_unstable_by_key(|&(column, row, _)| (column, row));
    list.fill(LargeColumn::END);
    let mut length = 0;
    for &(column, row, value) in found.iter().filter(|found| found.0 != usize::MAX) {
        if length == 0 || list[length - 1].column != column {
            list[length].column = column;
            length += 1;
        }
        list[length - 1].values[row] = value;
    }
}

/// Scale and sum of the codes of a span.
#[derive(Clone, Copy, Debug, Default)]
struct Span {
    scale: f32,
    sum: i32,
}

impl GroupMeta {
    #[inline(always)]
    fn new(zero: i32, [first, second]: [Span; 2]) -> Self {
        Self {
            scales: [first.scale, second.scale],
            // If a span contains NaN, its integer sum is arbitrary, but its scale is NaN as
            // well.
            starts: [
                first.sum.wrapping_mul(-zero),
                second.sum.wrapping_mul(-zero),
            ],
            sum: first.scale * first.sum as f32 + second.scale * second.sum as f32,
        }
    }
}

/// Quantises one span and writes its codes.
///
/// # Safety
/// `x` must hold [`SPAN`] values, and `codes` must be writable for [`SPAN`] bytes.
#[inline(always)]
unsafe fn quantise<S: Simd>(s: S, x: &[f32], codes: *mut i8) -> Span {
    const { assert!(SPAN == LANES) };
    debug_assert_eq!(x.len(), SPAN);
    // SAFETY: the span is exactly one vector.
    let x = unsafe { s.load(x.as_ptr()) };
    let largest = s.reduce_max(s.abs(x));
    // 0 if all values are finite, otherwise NaN. The integer codes cannot represent a NaN.
    let poison = s.reduce_add(s.mul(x, s.splat(0.0)));
    let inverse = if largest > 1e-30 {
        127.0 / largest
    } else {
        0.0
    };
    let quantised = s.to_int(s.mul(x, s.splat(inverse)));
    // SAFETY: the caller guarantees that `codes` is writable for 16 bytes.
    unsafe { s.store_low_bytes(codes, quantised) };
    Span {
        scale: largest / 127.0 + poison,
        sum: s.reduce_add_i(quantised),
    }
}
