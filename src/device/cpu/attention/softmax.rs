//! The running softmax of a block of queries: the state that attention accumulates.
//!
//! Milakov & Gimelshein, *Online normalizer calculation for softmax*, 2018.

use crate::device::cpu::simd::{LANES, Simd};

/// Size of the softmax state of an item's queries.
#[derive(Clone, Copy)]
pub(crate) struct SoftmaxShape {
    /// Number of queries, including padding.
    pub(crate) queries: usize,
    /// Number of elements per result; a multiple of 16.
    pub(crate) stride: usize,
}

impl SoftmaxShape {
    /// Returns the number of elements that a [`Softmax`] takes.
    pub(crate) fn len(self) -> usize {
        self.queries * (1 + LANES + self.stride)
    }
}

/// Softmax state of some queries. For each query, it has the largest score so far, the sums of
/// the weights relative to that score (one sum per token of a tile), and the weighted sum of
/// the values.
pub(crate) struct Softmax<'a> {
    pub(crate) largest: &'a mut [f32],
    /// Sums of the weights, `[query][16]`.
    pub(crate) sums: &'a mut [f32],
    /// Weighted sums of the values, `[query][stride]`.
    pub(crate) results: &'a mut [f32],
    stride: usize,
}

impl<'a> Softmax<'a> {
    /// Places the state in the first [`SoftmaxShape::len`] elements of `memory`.
    #[inline(always)]
    pub(crate) fn new(memory: &'a mut [f32], shape: SoftmaxShape) -> Self {
        let (largest, memory) = memory[..shape.len()].split_at_mut(shape.queries);
        let (sums, results) = memory.split_at_mut(shape.queries * LANES);
        Self {
            largest,
            sums,
            results,
            stride: shape.stride,
        }
    }

    /// Resets the state to that before the first key.
    #[inline(always)]
    pub(crate) fn reset(&mut self) {
        self.largest.fill(f32::NEG_INFINITY);
        self.sums.fill(0.0);
        self.results.fill(0.0);
    }

    /// Sets the state of one query to that after a key with this score whose value is zero.
    #[inline(always)]
    pub(crate) fn sink(&mut self, query: usize, score: f32) {
        self.largest[query] = score;
        self.sums[query * LANES] = 1.0;
    }

    /// Merges the state of another softmax of this shape, which processed later keys. A state
    /// that has attended to nothing changes nothing, bit for bit.
    #[inline(always)]
    pub(crate) fn merge<S: Simd>(&mut self, s: S, part: &[f32]) {
        let queries = self.largest.len();
        let (theirs, part) = part.split_at(queries);
        let (their_sums, their_results) = part.split_at(self.sums.len());
        let (mut keep, mut take) = ([0.0; LANES], [0.0; LANES]);
        for first in (0..queries).step_by(LANES) {
            let count = LANES.min(queries - first);
            // SAFETY: at least `count` queries are left, and the arrays hold 16 elements.
            unsafe {
                let ours = s.load_part(self.largest[first..].as_ptr(), count);
                let theirs = s.load_part(theirs[first..].as_ptr(), count);
                let largest = s.max(theirs, ours);
                // If nothing has been attended to yet, any finite pivot will do, because all
                // weights are 0.
                let pivot = s.max(largest, s.splat(f32::MIN));
                s.store(keep.as_mut_ptr(), s.exp(s.sub(ours, pivot)));
                s.store(take.as_mut_ptr(), s.exp(s.sub(theirs, pivot)));
                s.store_part(self.largest[first..].as_mut_ptr(), largest, count);
            }
            for (index, (&keep, &take)) in keep[..count].iter().zip(&take).enumerate() {
                let (query, keep, take) = (first + index, s.splat(keep), s.splat(take));
                let at = query * LANES..(query + 1) * LANES;
                scale_add(s, &mut self.sums[at.clone()], keep, &their_sums[at], take);
                let at = query * self.stride..(query + 1) * self.stride;
                let theirs = &their_results[at.clone()];
                scale_add(s, &mut self.results[at], keep, theirs, take);
            }
        }
    }

    /// Writes the softmax-weighted mean of the values of one query to `out`.
    #[inline(always)]
    pub(crate) fn finish<S: Simd>(&self, s: S, query: usize, out: &mut [f32]) {
        assert!(out.len() <= self.stride);
        let sums = &self.sums[query * LANES..][..LANES];
        let result = &self.results[query * self.stride..][..self.stride];
        // SAFETY: there are 16 sums per query.
        let sum = s.splat(s.reduce_add(unsafe { s.load(sums.as_ptr()) }));
        for at in (0..out.len()).step_by(LANES) {
            let count = LANES.min(out.len() - at);
            // SAFETY: the stride is a multiple of 16, and at least `count` outputs are left.
            unsafe {
                let value = s.div(s.load(result.as_ptr().add(at)), sum);
                s.store_part(out.as_mut_ptr().add(at), value, count);
            }
        }
    }
}

/// Computes `a = a · keep + b · take` over whole vectors.
#[inline(always)]
fn scale_add<S: Simd>(s: S, a: &mut [f32], keep: S::F, b: &[f32], take: S::F) {
    for (a, b) in a.chunks_exact_mut(LANES).zip(b.chunks_exact(LANES)) {
        // SAFETY: the chunks have `LANES` elements.
        unsafe {
            let sum = s.fma(s.load(b.as_ptr()), take, s.mul(s.load(a.as_ptr()), keep));
            s.store(a.as_mut_ptr(), sum);
        }
    }
}
