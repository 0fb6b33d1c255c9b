//! Sums of rows that do not depend on the order of addition.

use super::{DeviceError, DeviceTypes};
use std::ops::Range;

/// Units per 1 in a sum. A power of two, so that scaling a value does not round.
const UNITS: f32 = (1 << 28) as f32;
/// Largest magnitude of a value in a sum. A sum therefore has room for at least 2²⁰ rows.
const LARGEST: f32 = (1 << 15) as f32;
/// Sentinel for an invalid sum: it contains a NaN or a value that is too large, or it
/// overflowed.
const INVALID: i64 = i64::MIN;

/// Sum of rows of activations, column by column, in units of 2⁻²⁸.
///
/// Integer sums do not depend on the order of addition. The sum of a prompt is therefore the
/// same bit for bit however the prompt was cut into steps, whatever else was in those steps,
/// and on every device that computes the same rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PooledRows {
    rows: usize,
    sums: Vec<i64>,
}

impl PooledRows {
    /// Creates the sum of zero rows.
    pub fn new(columns: usize) -> Self {
        Self {
            rows: 0,
            sums: vec![0; columns],
        }
    }

    /// Wraps a sum that a device has computed. `rows` is the number of rows that were added,
    /// and `sums` has the sum of each column in units of 2⁻²⁸. A column in which a value is NaN
    /// or has a magnitude above 32,768 must be `i64::MIN`.
    #[cfg(any(test, feature = "cuda", feature = "internals"))]
    pub fn of_device(rows: usize, sums: Vec<i64>) -> Self {
        Self { rows, sums }
    }

    /// Adds a row, which must have as many columns as the sum.
    pub fn add_row(&mut self, row: &[f32]) {
        debug_assert_eq!(row.len(), self.sums.len());
        self.rows += 1;
        for (sum, &value) in self.sums.iter_mut().zip(row) {
            // The comparison is false for NaN.
            let units = match value.abs() <= LARGEST {
                true => (value * UNITS).round_ties_even() as i64,
                false => INVALID,
            };
            add(sum, units);
        }
    }

    /// Adds the rows of another sum, which must have as many columns.
    pub fn merge(&mut self, other: &Self) {
        debug_assert_eq!(other.sums.len(), self.sums.len());
        self.rows += other.rows;
        for (sum, &units) in self.sums.iter_mut().zip(&other.sums) {
            add(sum, units);
        }
    }

    /// Returns the number of rows that were added.
    #[cfg(any(test, feature = "internals"))]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Returns the mean of the rows, rounded once; `None` if there are none. A column is NaN if
    /// one of its values was NaN or too large.
    pub fn mean(&self) -> Option<Vec<f32>> {
        if self.rows == 0 {
            return None;
        }
        let scale = f64::from(UNITS) * self.rows as f64;
        let mean = |&sum: &i64| match sum {
            INVALID => f32::NAN,
            sum => (sum as f64 / scale) as f32,
        };
        Some(self.sums.iter().map(mean).collect())
    }
}

/// Adds to a sum. An invalid sum stays invalid.
fn add(sum: &mut i64, units: i64) {
    *sum = match (*sum, units) {
        (INVALID, _) | (_, INVALID) => INVALID,
        (sum, units) => sum.checked_add(units).unwrap_or(INVALID),
    };
}

/// The part of a [`Device`](super::Device) that sums rows of activations.
pub trait PoolingOps: DeviceTypes {
    /// Sums of rows on their way to the host.
    type Pooling;

    /// Computes the sum of the rows of `x` in each of `ranges`. Must be called after
    /// [`StepOps::finish`](super::StepOps::finish).
    fn pool(
        &mut self,
        x: &Self::Tensor,
        ranges: &[Range<usize>],
    ) -> Result<Self::Pooling, DeviceError>;

    /// Waits for a step and returns its sums, in the order of the ranges.
    fn collect_pooled(&mut self, pooling: Self::Pooling) -> Result<Vec<PooledRows>, DeviceError>;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(rows: &[[f32; 3]]) -> PooledRows {
        let mut sum = PooledRows::new(3);
        rows.iter().for_each(|row| sum.add_row(row));
        sum
    }

    #[test]
    fn the_mean_does_not_depend_on_the_order_or_the_parts() {
        let rows: Vec<[f32; 3]> = (0..1000)
            .map(|i| [i as f32 * 0.37, 1e-3 / (i + 1) as f32, -3e4 + i as f32])
            .collect();
        let whole = sum(&rows);
        let reversed: Vec<_> = rows.iter().rev().copied().collect();
        assert_eq!(sum(&reversed), whole);
        for cut in [1, 500, 999] {
            let mut parts = sum(&rows[..cut]);
            parts.merge(&sum(&rows[cut..]));
            assert_eq!(parts, whole);
        }
        let exact = |column: usize| {
            let column = rows.iter().map(|row| f64::from(row[column]));
            column.sum::<f64>() / rows.len() as f64
        };
        for (column, mean) in whole.mean().unwrap().into_iter().enumerate() {
            let error = (f64::from(mean) - exact(column)).abs();
            assert!(error <= 2e-9 + 6e-8 * exact(column).abs(), "{column}");
        }
    }

    #[test]
    fn no_rows_have_no_mean() {
        let mut none = PooledRows::new(3);
        assert_eq!(none.mean(), None);
        none.merge(&PooledRows::of_device(0, vec![0; 3]));
        assert_eq!((none.rows(), none.mean()), (0, None));
        none.merge(&sum(&[[1.0, 2.0, 3.0]]));
        assert_eq!(none.mean(), Some(vec![1.0, 2.0, 3.0]));
    }

    #[test]
    fn nan_or_a_too_large_value_invalidates_only_its_column() {
        for wrong in [f32::NAN, f32::INFINITY, -40_000.0] {
            let with = sum(&[[1.0, 2.0, 3.0], [3.0, wrong, 5.0], [2.0, 1.0, 1.0]]);
            let mean = with.mean().unwrap();
            assert_eq!((mean[0], mean[2]), (2.0, 3.0));
            assert!(mean[1].is_nan());
            let mut later = sum(&[[1.0, 1.0, 1.0]]);
            later.merge(&with);
            assert!(later.mean().unwrap()[1].is_nan());
        }
    }
}
