//! Statistics of a set of measurements.

use serde::Serialize;

/// Mean, percentiles and maximum of a set of measurements, in their unit.
///
/// Percentiles between two measurements are interpolated linearly, which is NumPy's
/// default.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    pub count: usize,
    pub mean: f64,
    pub p50: f64,
    pub p90: f64,
    pub p95: f64,
    pub p99: f64,
    pub max: f64,
}

impl Spread {
    /// Computes the statistics of these measurements, or returns `None` if there are none.
    pub fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_unstable_by(f64::total_cmp);
        let max = *values.last()?;
        let at = |percent: f64| percentile(&values, percent);
        Some(Self {
            count: values.len(),
            mean: values.iter().sum::<f64>() / values.len() as f64,
            p50: at(50.0),
            p90: at(90.0),
            p95: at(95.0),
            p99: at(99.0),
            max,
        })
    }
}

/// Returns a percentile of sorted values, or 0 if there are none.
pub fn percentile(sorted: &[f64], percent: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else {
        return 0.0;
    };
    let place = percent / 100.0 * last as f64;
    let below = (place.floor() as usize).min(last);
    let above = (below + 1).min(last);
    let share = place - below as f64;
    sorted[below] + share * (sorted[above] - sorted[below])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_those_of_numpy() {
        // numpy.percentile(range(1, 102), q) is q + 1.
        let shuffled = (0..101).map(|i| f64::from((i * 37) % 101 + 1)).collect();
        let spread = Spread::of(shuffled).unwrap();
        assert_eq!(spread.count, 101);
        assert_eq!(spread.mean, 51.0);
        assert_eq!((spread.p50, spread.p90), (51.0, 91.0));
        assert_eq!((spread.p95, spread.p99, spread.max), (96.0, 100.0, 101.0));
        // numpy.percentile([1, 2, 4, 8], [50, 90, 99]) is [3, 6.8, 7.88].
        let few = Spread::of(vec![8.0, 1.0, 4.0, 2.0]).unwrap();
        assert_eq!(few.p50, 3.0);
        assert!((few.p90 - 6.8).abs() < 1e-12 && (few.p99 - 7.88).abs() < 1e-12);
    }

    #[test]
    fn one_measurement_is_all_percentiles_and_none_has_none() {
        let one = Spread::of(vec![2.5]).unwrap();
        assert_eq!((one.count, one.mean, one.p50, one.p99), (1, 2.5, 2.5, 2.5));
        assert_eq!(Spread::of(Vec::new()), None);
    }
}
