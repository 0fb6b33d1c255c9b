//! Activations as 8-bit integers, for integer dot products with quantised weights.
//!
//! Each span of 16 values of a row has its own scale, `largest magnitude / 127`:
//! spans of 32, as in ggml, have a third more error in the log-probabilities. Sums
//! over the weights' groups are kept next to it: they stand for the weights' zero
//! points (exactly, in integers) and minimums.
//!
//! The value of a row with the largest magnitude is not rounded: its code is 0, and
//! the kernel adds its products in float32, as LLM.int8() does with the columns of
//! large values (Dettmers et al., 2022). Otherwise a channel far above the others
//! would take the precision of its span.

use super::layout::QuantLayout;
use super::memory::Disjoint;
use super::simd::{Isa, Kernel, LANES, Simd};
use super::workers::Workers;
use crate::device::DeviceError;
use std::ops::Range;

/// Values that share a scale.
pub(crate) const SPAN: usize = 16;

/// Values that are quantised at a time: the largest group of weights.
const GROUP: usize = 2 * SPAN;

/// Rows whose largest values are listed together: as many as a register block has at
/// most, and no block reaches over a multiple of it.
pub(crate) const SHARED: usize = 8;

/// A column in which at least one of [`SHARED`] rows has its largest value.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LargeColumn {
    pub(crate) column: usize,
    /// The rows' values; 0 where a row's largest value is in another column.
    pub(crate) values: [f32; SHARED],
}

impl LargeColumn {
    /// Follows the last column of a list.
    const END: Self = Self {
        column: usize::MAX,
        values: [0.0; SHARED],
    };
}

/// What a kernel needs to know of a row's values beside their codes, for one group
/// of weights: one or two spans.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct GroupMeta {
    /// Value of code 1 in each span.
    pub(crate) scales: [f32; 2],
    /// `−zero · Σ codes` of each span: where the integer dot product starts.
    pub(crate) starts: [i32; 2],
    /// `Σ scale · Σ codes`: what a weight minimum is multiplied by.
    pub(crate) sum: f32,
}

/// Rows of activations as integers; kept from call to call for its memory.
#[derive(Default)]
pub(crate) struct Quantised {
    codes: Vec<i8>,
    meta: Vec<GroupMeta>,
    views: Vec<View>,
    /// For each [`SHARED`] rows, a list of as many columns at most.
    large: Vec<LargeColumn>,
}

/// The sums that weights of one group size and zero point need.
struct View {
    group: usize,
    zero: i32,
    /// Where they lie in [`Quantised::meta`], row after row.
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
        // A few rows are done sooner than a second thread would join.
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

    /// The codes of all rows.
    pub(crate) fn codes(&self) -> &[i8] {
        &self.codes
    }

    /// The columns of the largest values, ascending, of `row` and the rows listed with it.
    #[inline(always)]
    pub(crate) fn large(&self, row: usize) -> impl Iterator<Item = &LargeColumn> {
        let list = &self.large[row / SHARED * SHARED..][..SHARED];
        list.iter().take_while(|large| large.column != usize::MAX)
    }

    /// What weights of `layout` need: one entry a row and group.
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
    /// Which [`SHARED`] rows.
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
    /// Writes the codes of a row and what belongs to them. Returns the column of its
    /// largest value, whose code is 0; `None` where all values are 0 or NaN.
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
        // What an infinite value leaves is NaN: it must not get lost.
        rest[offset] *= 0.0;
        self.quantise_group(s, row, g, &rest);
        Some(g * GROUP + offset)
    }

    /// Writes the codes of some values of a row and what belongs to them.
    #[inline(always)]
    fn quantise_group<S: Simd>(&self, s: S, row: usize, g: usize, x: &[f32; GROUP]) -> [Span; 2] {
        let codes = self.codes.pointer(row * self.columns + g * GROUP, GROUP);
        // SAFETY: 32 values in, 32 codes out; the row belongs to this item.
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
            // SAFETY: entries of this row only.
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

/// The largest magnitude of a row; NaN does not count.
#[inline(always)]
fn largest<S: Simd>(s: S, x: &[f32]) -> f32 {
    let mut largest = s.splat(0.0);
    for x in x.as_chunks::<LANES>().0 {
        // SAFETY: sixteen values are a vector. The second operand of a maximum stays
        // where the first is NaN.
        largest = s.max(s.abs(unsafe { s.load(x.as_ptr()) }), largest);
    }
    s.reduce_max(largest)
}

/// Writes what was found, column, row and value, as one list by column.
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

/// The scale and the sum of codes of some values.
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
            // A NaN's integers are arbitrary, but its scale is NaN as well.
            starts: [
                first.sum.wrapping_mul(-zero),
                second.sum.wrapping_mul(-zero),
            ],
            sum: first.scale * first.sum as f32 + second.scale * second.sum as f32,
        }
    }
}

/// Writes the codes of one span.
///
/// # Safety
/// `x` holds [`SPAN`] values, and `codes` is writable for as many bytes.
#[inline(always)]
unsafe fn quantise<S: Simd>(s: S, x: &[f32], codes: *mut i8) -> Span {
    const { assert!(SPAN == LANES) };
    debug_assert_eq!(x.len(), SPAN);
    // SAFETY: one vector is the span.
    let x = unsafe { s.load(x.as_ptr()) };
    let largest = s.reduce_max(s.abs(x));
    // 0 for finite values, else NaN: integers could not carry a NaN any further.
    let poison = s.reduce_add(s.mul(x, s.splat(0.0)));
    let inverse = if largest > 1e-30 {
        127.0 / largest
    } else {
        0.0
    };
    let quantised = s.to_int(s.mul(x, s.splat(inverse)));
    // SAFETY: the caller vouches for 16 bytes.
    unsafe { s.store_low_bytes(codes, quantised) };
    Span {
        scale: largest / 127.0 + poison,
        sum: s.reduce_add_i(quantised),
    }
}
