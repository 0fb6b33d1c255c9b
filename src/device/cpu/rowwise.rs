//! Loops over the rows of a matrix and over the vectors of a row.

use super::CpuDevice;
use super::memory::Disjoint;
use super::simd::{Kernel, LANES, Simd};
use crate::device::DeviceError;
use std::ops::Range;

impl CpuDevice {
    /// Runs `kernel(rows, elements)` over the rows of `out` on all threads, where `elements`
    /// are the elements of these rows in `out`. `weight` is the cost of a row in elements.
    pub(super) fn rowwise<'a, K: Kernel>(
        &mut self,
        operation: &'static str,
        (rows, weight): (usize, usize),
        out: &'a mut [f32],
        kernel: impl Fn(Range<usize>, &'a mut [f32]) -> K + Sync,
    ) -> Result<(), DeviceError> {
        let isa = self.multiplier.isa;
        let columns = out.len() / rows.max(1);
        let out = Disjoint::new(out);
        // A small number of rows is done sooner than a second thread could join.
        let grain = (16_384 / weight.max(1)).max(1);
        self.workers.run(operation, rows, grain, |range| {
            // SAFETY: each row belongs to one item, so that no two calls share elements, and
            // `out` stays borrowed for `'a`, the lifetime that the elements get.
            let elements = unsafe {
                let part = out.range(range.start * columns, range.len() * columns);
                std::slice::from_raw_parts_mut(part.as_mut_ptr(), part.len())
            };
            isa.dispatch(kernel(range, elements));
        })
    }
}

/// Iterates over the start and the length of each vector of a row of `columns` elements.
#[inline(always)]
pub(super) fn vectors(columns: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..columns)
        .step_by(LANES)
        .map(move |at| (at, LANES.min(columns - at)))
}

/// Loads the first `count` numbers of a vector.
///
/// # Safety
/// `from` must be readable for `count` numbers, and `count` must be at most 16.
#[inline(always)]
pub(super) unsafe fn load<S: Simd>(s: S, from: *const f32, count: usize) -> S::F {
    // SAFETY: the caller guarantees that `from` is readable.
    unsafe {
        if count == LANES {
            s.load(from)
        } else {
            s.load_part(from, count)
        }
    }
}

/// Stores the first `count` numbers of a vector.
///
/// # Safety
/// `to` must be writable for `count` numbers, and `count` must be at most 16.
#[inline(always)]
pub(super) unsafe fn store<S: Simd>(s: S, to: *mut f32, value: S::F, count: usize) {
    // SAFETY: the caller guarantees that `to` is writable.
    unsafe {
        if count == LANES {
            s.store(to, value)
        } else {
            s.store_part(to, value, count)
        }
    }
}
