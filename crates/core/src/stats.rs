//! What a row of values looks like from afar: range, moments, and how many values are no numbers.

/// Statistics of some values. Minimum, maximum and sums are of the finite ones.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RowStats {
    pub count: u64,
    pub n_nan: u64,
    pub n_inf: u64,
    pub n_zero: u64,
    /// `+inf` where nothing is finite.
    pub min: f32,
    /// `-inf` where nothing is finite.
    pub max: f32,
    pub sum: f64,
    pub sum_sq: f64,
}

impl RowStats {
    /// Of no values.
    pub const EMPTY: RowStats = RowStats {
        count: 0,
        n_nan: 0,
        n_inf: 0,
        n_zero: 0,
        min: f32::INFINITY,
        max: f32::NEG_INFINITY,
        sum: 0.0,
        sum_sq: 0.0,
    };

    /// Statistics of `values`.
    pub fn of(values: &[f32]) -> RowStats {
        let mut s = RowStats { count: values.len() as u64, ..RowStats::EMPTY };
        for &v in values {
            s.n_nan += u64::from(v.is_nan());
            s.n_inf += u64::from(v.is_infinite());
            s.n_zero += u64::from(v == 0.0);
            if v.is_finite() {
                s.min = s.min.min(v);
                s.max = s.max.max(v);
                s.sum += f64::from(v);
                s.sum_sq += f64::from(v) * f64::from(v);
            }
        }
        s
    }

    /// Takes in the statistics of more values.
    pub fn merge(&mut self, other: &RowStats) {
        self.count += other.count;
        self.n_nan += other.n_nan;
        self.n_inf += other.n_inf;
        self.n_zero += other.n_zero;
        self.min = self.min.min(other.min);
        self.max = self.max.max(other.max);
        self.sum += other.sum;
        self.sum_sq += other.sum_sq;
    }

    /// Values that are numbers.
    pub fn n_finite(&self) -> u64 {
        self.count - self.n_nan - self.n_inf
    }

    /// Mean of the finite values; NaN without any.
    pub fn mean(&self) -> f64 {
        self.sum / self.n_finite() as f64
    }

    /// Standard deviation of the finite values; NaN without any.
    pub fn std_dev(&self) -> f64 {
        let variance = self.sum_sq / self.n_finite() as f64 - self.mean().powi(2);
        // Rounding may take it below zero; `max` would make a number of NaN.
        if variance < 0.0 { 0.0 } else { variance.sqrt() }
    }

    /// Euclidean norm of the finite values; NaN without any.
    pub fn l2(&self) -> f64 {
        if self.n_finite() == 0 { f64::NAN } else { self.sum_sq.sqrt() }
    }

    /// Root mean square of the finite values; NaN without any.
    pub fn rms(&self) -> f64 {
        (self.sum_sq / self.n_finite() as f64).sqrt()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_number_is_counted_and_left_out() {
        let s = RowStats::of(&[1.0, f32::NAN, -3.0, f32::INFINITY, 0.0, f32::NEG_INFINITY]);
        assert_eq!((s.count, s.n_nan, s.n_inf, s.n_zero, s.n_finite()), (6, 1, 2, 1, 3));
        assert_eq!((s.min, s.max, s.sum, s.sum_sq), (-3.0, 1.0, -2.0, 10.0));
        assert!((s.std_dev() - (10.0f64 / 3.0 - 4.0 / 9.0).sqrt()).abs() < 1e-12);
        let mut whole = RowStats::of(&[1.0, f32::NAN]);
        whole.merge(&RowStats::of(&[-3.0, f32::INFINITY, 0.0, f32::NEG_INFINITY]));
        assert_eq!(whole, s);
        for none in [RowStats::EMPTY, RowStats::of(&[f32::NAN, f32::INFINITY])] {
            assert!([none.mean(), none.std_dev(), none.l2(), none.rms()].iter().all(|v| v.is_nan()), "{none:?}");
        }
    }
}
