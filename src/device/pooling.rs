//! [`PooledRows`]: the sum of some rows, whoever adds them and in whatever order.

/// Units of a sum in 1: a power of two, so that scaling a number rounds nothing.
const UNITS: f32 = (1 << 28) as f32;
/// A number whose size is beyond this has no place in a sum, which then has room for at
/// least 2²⁰ rows.
const LARGEST: f32 = (1 << 15) as f32;
/// A sum with a number in it that is none, or too large.
const UNSOUND: i64 = i64::MIN;

/// The sum of some rows of activations, column by column, in units of 2⁻²⁸.
///
/// Sums of integers do not depend on their order: a prompt's sum is the same to the bit
/// however it was cut into steps, whoever else was in them, and on every device that
/// computes the same rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PooledRows {
    rows: usize,
    sums: Vec<i64>,
}

impl PooledRows {
    /// The sum of no rows.
    pub fn new(columns: usize) -> Self {
        Self {
            rows: 0,
            sums: vec![0; columns],
        }
    }

    /// A sum that a device has computed: so many rows, and for each column the sum in
    /// units of 2⁻²⁸, or the lowest number there is if a value is no number or its size is
    /// beyond 32,768.
    pub fn of_device(rows: usize, sums: Vec<i64>) -> Self {
        Self { rows, sums }
    }

    /// Adds a row, which has as many columns.
    pub fn add_row(&mut self, row: &[f32]) {
        debug_assert_eq!(row.len(), self.sums.len());
        self.rows += 1;
        for (sum, &value) in self.sums.iter_mut().zip(row) {
            // NaN is in no range.
            let units = match value.abs() <= LARGEST {
                true => (value * UNITS).round_ties_even() as i64,
                false => UNSOUND,
            };
            add(sum, units);
        }
    }

    /// Adds other rows, which have as many columns.
    pub fn merge(&mut self, other: &Self) {
        debug_assert_eq!(other.sums.len(), self.sums.len());
        self.rows += other.rows;
        for (sum, &units) in self.sums.iter_mut().zip(&other.sums) {
            add(sum, units);
        }
    }

    /// How many rows were added.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The mean of the rows, rounded once; NaN in a column where a value was no number or
    /// too large.
    pub fn mean(&self) -> Vec<f32> {
        let scale = f64::from(UNITS) * self.rows as f64;
        let mean = |&sum: &i64| match sum {
            UNSOUND => f32::NAN,
            sum => (sum as f64 / scale) as f32,
        };
        self.sums.iter().map(mean).collect()
    }
}

/// What is unsound stays unsound.
fn add(sum: &mut i64, units: i64) {
    *sum = match (*sum, units) {
        (UNSOUND, _) | (_, UNSOUND) => UNSOUND,
        (sum, units) => sum.checked_add(units).unwrap_or(UNSOUND),
    };
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
        for (column, mean) in whole.mean().into_iter().enumerate() {
            let error = (f64::from(mean) - exact(column)).abs();
            assert!(error <= 2e-9 + 6e-8 * exact(column).abs(), "{column}");
        }
    }

    #[test]
    fn what_is_no_number_shows_in_its_column_only() {
        for wrong in [f32::NAN, f32::INFINITY, -40_000.0] {
            let with = sum(&[[1.0, 2.0, 3.0], [3.0, wrong, 5.0], [2.0, 1.0, 1.0]]);
            let mean = with.mean();
            assert_eq!((mean[0], mean[2]), (2.0, 3.0));
            assert!(mean[1].is_nan());
            let mut later = sum(&[[1.0, 1.0, 1.0]]);
            later.merge(&with);
            assert!(later.mean()[1].is_nan());
        }
    }
}
