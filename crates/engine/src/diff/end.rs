//! How far the next tokens of two passes are apart, by the measures and names of llama.cpp's perplexity tool: mean KLD, same top
//! p, RMS Δp.

/// Over the positions whose logits both sides have.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EndMetrics {
    pub n_positions: usize,
    /// Mean and largest Kullback-Leibler divergence of B from A, in nats.
    pub mean_kld: f64,
    pub max_kld: f64,
    /// Share of positions with the same most likely token, in percent.
    pub same_top_p: f64,
    /// Root mean square of the change in probability of the token that follows (where none does: of A's most likely), in percent.
    pub rms_delta_p: f64,
}

/// Sums of the metrics so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct EndSum {
    n: usize,
    kld: f64,
    max_kld: f64,
    n_same_top: usize,
    delta_p_sq: f64,
}

impl EndSum {
    /// Takes in the logits of one position, `a` and `b` of one vocabulary; `next` is the token that follows it, if it is in there.
    pub fn add(&mut self, a: &[f32], b: &[f32], next: Option<u32>) {
        let (log_a, log_b) = (log_softmax(a), log_softmax(b));
        let kld: f64 =
            log_a.iter().zip(&log_b).map(|(p, q)| if *p == f64::NEG_INFINITY { 0.0 } else { p.exp() * (p - q) }).sum();
        let top_a = argmax(a);
        let token = next.map(|t| t as usize).filter(|&t| t < a.len()).unwrap_or(top_a);
        self.n += 1;
        self.kld += kld;
        // `max` would drop a NaN.
        self.max_kld = if kld > self.max_kld || kld.is_nan() { kld } else { self.max_kld };
        self.n_same_top += usize::from(top_a == argmax(b));
        self.delta_p_sq += (log_a[token].exp() - log_b[token].exp()).powi(2);
    }

    /// The metrics, if any position was taken in.
    pub fn metrics(&self) -> Option<EndMetrics> {
        let n = self.n as f64;
        (self.n > 0).then(|| EndMetrics {
            n_positions: self.n,
            mean_kld: self.kld / n,
            max_kld: self.max_kld,
            same_top_p: 100.0 * self.n_same_top as f64 / n,
            rms_delta_p: 100.0 * (self.delta_p_sq / n).sqrt(),
        })
    }
}

/// Kullback-Leibler divergence of the next-token distribution of `b` from that of `a`, in nats.
pub fn kld(a: &[f32], b: &[f32]) -> f64 {
    let mut sum = EndSum::default();
    sum.add(a, b, None);
    sum.kld
}

fn log_softmax(x: &[f32]) -> Vec<f64> {
    let max = f64::from(x.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = x.iter().map(|&v| (f64::from(v) - max).exp()).sum();
    x.iter().map(|&v| f64::from(v) - max - sum.ln()).collect()
}

/// The first largest.
fn argmax(x: &[f32]) -> usize {
    (0..x.len()).fold(0, |best, i| if x[i] > x[best] { i } else { best })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_of_known_distributions() {
        let (a, b) = ([2f32.ln(), 0.0], [0.0, 2f32.ln()]);
        let mut sum = EndSum::default();
        sum.add(&a, &b, Some(1));
        sum.add(&a, &a, None);
        let m = sum.metrics().unwrap();
        let kl = 2.0 / 3.0 * 2f64.ln() - 1.0 / 3.0 * 2f64.ln();
        assert!((m.mean_kld - kl / 2.0).abs() < 1e-7 && (m.max_kld - kl).abs() < 1e-7);
        assert_eq!((m.n_positions, m.same_top_p), (2, 50.0));
        assert!((m.rms_delta_p - 100.0 * (1.0f64 / 9.0 / 2.0).sqrt()).abs() < 1e-5);
        assert!(EndSum::default().metrics().is_none());
    }

    #[test]
    fn a_token_outside_the_vocabulary_is_no_measure() {
        let mut sum = EndSum::default();
        sum.add(&[1.0, 0.0], &[1.0, 0.0], Some(7));
        assert_eq!(sum.metrics().unwrap().rms_delta_p, 0.0);
    }

    #[test]
    fn a_nan_in_the_logits_is_not_lost() {
        let mut sum = EndSum::default();
        sum.add(&[1.0, 0.0], &[f32::NAN, 0.0], None);
        sum.add(&[1.0, 0.0], &[1.0, 0.0], None);
        let m = sum.metrics().unwrap();
        assert!(m.mean_kld.is_nan() && m.max_kld.is_nan());
    }
}
