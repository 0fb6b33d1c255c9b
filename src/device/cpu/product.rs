//! The operands of a matrix product, as its kernels take them.

use super::memory::Disjoint;
use super::simd::{LANES, Simd};

/// Operands of a multiplication other than the weights.
pub(crate) struct Operands<'a> {
    /// Activations, `rows` rows of the layer's `columns`.
    pub(crate) x: &'a [f32],
    pub(crate) rows: usize,
    /// Results, `rows` rows of `outputs`.
    pub(crate) out: Disjoint<'a, f32>,
    pub(crate) outputs: usize,
    pub(crate) bias: Option<&'a [f32]>,
}

impl Operands<'_> {
    /// Adds the bias to `count` outputs of a row and writes them.
    ///
    /// # Safety
    /// Nothing else may write these outputs, and `count` must be at most 16.
    #[inline(always)]
    pub(crate) unsafe fn store<S: Simd>(
        &self,
        s: S,
        row: usize,
        output: usize,
        count: usize,
        value: S::F,
    ) {
        let to = self.out.pointer(row * self.outputs + output, count);
        // SAFETY: `to` points to `count` outputs, and the slice of the bias has `count` values.
        unsafe {
            let value = match self.bias {
                Some(bias) => s.add(
                    value,
                    s.load_part(bias[output..output + count].as_ptr(), count),
                ),
                None => value,
            };
            if count == LANES {
                s.store(to, value);
            } else {
                s.store_part(to, value, count);
            }
        }
    }
}
