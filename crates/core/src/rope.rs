//! Rotary position embedding: the angles, computed once at load from the file's metadata.
//!
//! RoFormer (arXiv:2104.09864); YaRN (arXiv:2309.00071) as Hugging Face and llama.cpp apply it.

/// Which values of a head rotate together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pairing {
    /// Value `i` with value `i + n_rot / 2` (GPT-NeoX order).
    Halves,
    /// Value `2i` with value `2i + 1`, the order in which `llama` files store queries and keys.
    Adjacent,
}

/// How a file stretches positions beyond the context it was trained on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scaling {
    None,
    /// Positions divided by `factor`.
    Linear {
        factor: f32,
    },
    /// High frequencies kept, low ones divided by `factor`, a ramp between.
    Yarn {
        factor: f32,
        n_ctx_orig: u32,
        attn_factor: f32,
        beta_fast: f32,
        beta_slow: f32,
    },
}

impl std::fmt::Display for Scaling {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Scaling::None => f.write_str("not scaled"),
            Scaling::Linear { factor } => write!(f, "linear scaling by {factor}"),
            Scaling::Yarn { factor, n_ctx_orig, .. } => {
                write!(f, "yarn scaling by {factor} from {n_ctx_orig} positions")
            }
        }
    }
}

/// The rotation of one architecture and file.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    pub pairing: Pairing,
    /// Radians per position, one per pair: `[n_rot / 2]`.
    pub inv_freq: Vec<f32>,
    /// Factor on sine and cosine (YaRN's attention temperature; 1 otherwise).
    pub magnitude: f32,
}

impl Rope {
    /// `n_rot` values of a head rotate, an even number; `factors` (`rope_freqs.weight`) divides the frequencies pair by pair.
    pub fn new(pairing: Pairing, n_rot: usize, base: f32, scaling: Scaling, factors: Option<&[f32]>) -> Rope {
        let n_pair = n_rot / 2;
        let plain = |i: usize| 1.0 / f64::from(base).powf(2.0 * i as f64 / n_rot as f64);
        let mut inv_freq: Vec<f64> = (0..n_pair).map(plain).collect();
        let mut magnitude = 1.0;
        match scaling {
            Scaling::None => {}
            Scaling::Linear { factor } => inv_freq.iter_mut().for_each(|f| *f /= f64::from(factor)),
            Scaling::Yarn { factor, n_ctx_orig, attn_factor, beta_fast, beta_slow } => {
                // The pair whose wave turns `beta` times within the original context.
                let pair_of = |beta: f32| {
                    let turns = f64::from(n_ctx_orig) / (f64::from(beta) * std::f64::consts::TAU);
                    n_rot as f64 * turns.ln() / (2.0 * f64::from(base).ln())
                };
                let low = pair_of(beta_fast).floor().max(0.0);
                let high = pair_of(beta_slow).ceil().min(n_rot as f64 - 1.0);
                for (i, f) in inv_freq.iter_mut().enumerate() {
                    let stretched = ((i as f64 - low) / (high - low).max(0.001)).clamp(0.0, 1.0);
                    *f = *f * (1.0 - stretched) + *f / f64::from(factor) * stretched;
                }
                magnitude = attn_factor * (1.0 + 0.1 * factor.max(1.0).ln());
            }
        }
        if let Some(factors) = factors {
            assert_eq!(factors.len(), n_pair, "one frequency factor per pair");
            inv_freq.iter_mut().zip(factors).for_each(|(f, &by)| *f /= f64::from(by));
        }
        Rope { pairing, inv_freq: inv_freq.into_iter().map(|f| f as f32).collect(), magnitude }
    }

    /// Values of a head that rotate.
    pub fn n_rot(&self) -> usize {
        2 * self.inv_freq.len()
    }

    /// Writes cosine and sine of every pair at a position, magnitude included.
    pub fn angles(&self, position: u32, cos: &mut [f32], sin: &mut [f32]) {
        for ((c, s), &f) in cos.iter_mut().zip(sin.iter_mut()).zip(&self.inv_freq) {
            let (sine, cosine) = (f64::from(position) * f64::from(f)).sin_cos();
            *c = cosine as f32 * self.magnitude;
            *s = sine as f32 * self.magnitude;
        }
    }

    /// Rotates one head by the angles that [`angles`](Self::angles) gave.
    pub fn rotate(&self, head: &mut [f32], cos: &[f32], sin: &[f32]) {
        let n_pair = self.inv_freq.len();
        let turn =
            |x: &mut f32, y: &mut f32, i: usize| (*x, *y) = (*x * cos[i] - *y * sin[i], *x * sin[i] + *y * cos[i]);
        match self.pairing {
            Pairing::Halves => {
                let (first, rest) = head.split_at_mut(n_pair);
                first.iter_mut().zip(rest).enumerate().for_each(|(i, (x, y))| turn(x, y, i));
            }
            Pairing::Adjacent => {
                let (pairs, _) = head[..2 * n_pair].as_chunks_mut::<2>();
                pairs.iter_mut().enumerate().for_each(|(i, [x, y])| turn(x, y, i));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn position_zero_does_not_turn_and_a_quarter_turn_swaps() {
        let rope = Rope { pairing: Pairing::Halves, inv_freq: vec![std::f32::consts::FRAC_PI_2], magnitude: 1.0 };
        let (mut cos, mut sin, mut head) = ([0.0], [0.0], [3.0, 5.0]);
        rope.angles(0, &mut cos, &mut sin);
        rope.rotate(&mut head, &cos, &sin);
        assert_eq!(head, [3.0, 5.0]);
        rope.angles(1, &mut cos, &mut sin);
        rope.rotate(&mut head, &cos, &sin);
        assert!((head[0] + 5.0).abs() < 1e-5 && (head[1] - 3.0).abs() < 1e-5, "{head:?}");
    }

    #[test]
    fn linear_scaling_divides_positions() {
        let plain = Rope::new(Pairing::Halves, 8, 1e4, Scaling::None, None);
        let half = Rope::new(Pairing::Halves, 8, 1e4, Scaling::Linear { factor: 2.0 }, None);
        for (a, b) in plain.inv_freq.iter().zip(&half.inv_freq) {
            assert_eq!(*a, 2.0 * b);
        }
    }
}
