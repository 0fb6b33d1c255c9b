//! Activations as 8-bit integers, for integer dot products with quantised weights.
//!
//! Each group of 32 values of a row has its own scale, `largest magnitude / 127`.
//! Sums over the weights' groups are kept next to it: they stand for the weights'
//! zero points (exactly, in integers) and minimums.

use super::layout::QuantLayout;
use super::memory::Disjoint;
use super::simd::{Isa, Kernel, LANES, Simd};
use super::workers::Workers;
use crate::device::DeviceError;
use std::ops::Range;

/// Values that share a scale.
const GROUP: usize = 32;

/// What a kernel needs to know of a row's group beside its codes.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct GroupMeta {
    /// Value of code 1.
    pub(crate) scale: f32,
    /// `scale · Σ codes`: what a weight minimum is multiplied by.
    pub(crate) sum: f32,
    /// `−zero · Σ codes`: where the integer dot product starts.
    pub(crate) start: i32,
}

/// Rows of activations as integers; kept from call to call for its memory.
#[derive(Default)]
pub(crate) struct Quantised {
    codes: Vec<i8>,
    meta: Vec<GroupMeta>,
    views: Vec<View>,
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
        let codes = &Disjoint::new(&mut self.codes);
        let (views, meta) = (&self.views[..], &Disjoint::new(&mut self.meta));
        // A few rows are done sooner than a second thread would join.
        let grain = (16_384 / columns.max(1)).max(1);
        workers.run("linear", rows, grain, |range| {
            isa.dispatch(QuantiseRows {
                x,
                columns,
                range,
                codes,
                meta,
                views,
            });
        })
    }

    /// The codes of all rows.
    pub(crate) fn codes(&self) -> &[i8] {
        &self.codes
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
    columns: usize,
    range: Range<usize>,
    codes: &'a Disjoint<'a, i8>,
    meta: &'a Disjoint<'a, GroupMeta>,
    views: &'a [View],
}

impl Kernel for QuantiseRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for row in self.range {
            let x = &self.x[row * self.columns..][..self.columns];
            for (g, x) in x.as_chunks::<GROUP>().0.iter().enumerate() {
                let codes = self.codes.pointer(row * self.columns + g * GROUP, GROUP);
                // SAFETY: 32 values in, 32 codes out; the row belongs to this item.
                let (scale, sums) = unsafe { quantise(s, x, codes) };
                for view in self.views {
                    let groups = GROUP / view.group;
                    let first = view.meta.start + row * (self.columns / view.group) + g * groups;
                    // SAFETY: entries of this row only.
                    let meta = unsafe { self.meta.range(first, groups) };
                    for (i, meta) in meta.iter_mut().enumerate() {
                        let sum = if groups == 1 {
                            sums[0].wrapping_add(sums[1])
                        } else {
                            sums[i]
                        };
                        // A NaN's integers are arbitrary, but its scale is NaN as well.
                        let start = sum.wrapping_mul(-view.zero);
                        *meta = GroupMeta {
                            scale,
                            sum: scale * sum as f32,
                            start,
                        };
                    }
                }
            }
        }
    }
}

/// Writes the codes of one group; gives its scale and the sums of its two halves.
///
/// # Safety
/// `codes` is writable for [`GROUP`] bytes.
#[inline(always)]
unsafe fn quantise<S: Simd>(s: S, x: &[f32; GROUP], codes: *mut i8) -> (f32, [i32; 2]) {
    let zero = s.splat(0.0);
    // SAFETY: two vectors are the group.
    let (a, b) = unsafe { (s.load(x.as_ptr()), s.load(x.as_ptr().add(LANES))) };
    let largest = s.reduce_max(s.max(s.abs(a), s.abs(b)));
    // 0 for finite values, else NaN: integers could not carry a NaN any further.
    let poison = s.reduce_add(s.fma(a, zero, s.mul(b, zero)));
    let inverse = s.splat(if largest > 1e-30 {
        127.0 / largest
    } else {
        0.0
    });
    let (a, b) = (s.to_int(s.mul(a, inverse)), s.to_int(s.mul(b, inverse)));
    // SAFETY: the caller vouches for 32 bytes.
    unsafe {
        s.store_low_bytes(codes, a);
        s.store_low_bytes(codes.add(LANES), b);
    }
    (
        largest / 127.0 + poison,
        [s.reduce_add_i(a), s.reduce_add_i(b)],
    )
}
