//! Float loops of the CPU backend: the small matrix products of attention, of floats and of 16-bit integers, exponentials, norms.
//!
//! One table per width of vectors: portable bodies, which are also inlined into functions that enable an ISA's features where
//! compilers make good code of them, and for the others loops over the ISA's vectors. Every sum has an order of its own that
//! does not depend on how many rows are computed together.

use std::ops::Range;

use apr_core::backend::KV_BLOCK;
use apr_core::stats::RowStats;

use codes::{Coded, Pair, Product};

/// The float loops of one width of vectors.
pub struct FloatKernels {
    gemm: unsafe fn(Gemm<'_>, &[f32]),
    score: unsafe fn(Product<'_>, &[f32]),
    weigh: unsafe fn(Product<'_>),
    code_queries: unsafe fn(&[f32], &mut [Pair], &mut [f32]),
    widen_keys: unsafe fn(&[i8], &[f32], Coded<'_>),
    widen_values: unsafe fn(&[i8], &[f32], Coded<'_>),
    code_weights: CodeWeights,
    softmax: unsafe fn(Softmax<'_>),
    swiglu: unsafe fn(&mut [f32], &[f32]),
    normalise: unsafe fn(&[f32], &[f32], f32, &mut [f32]),
    axpby: unsafe fn(&mut [f32], f32, &[f32], f32),
    row_stats: unsafe fn(&[f32]) -> RowStats,
    tops: unsafe fn(&[f32], &mut [u32]),
    widen: unsafe fn(&[u16], &mut [f32]),
}

/// Codes of weights; the shapes have been checked.
type CodeWeights = unsafe fn(&[f32], &[f32; KV_BLOCK], &mut [Pair], &mut [f32]);

/// Codes of 8 bits that share a scale.
pub const SHARED: usize = 32;

/// `c = a b` for small row-major matrices: `a` `[m, k.end]`, `b` `[k.end, n]`, `c` `[m, n]`. Only the columns `k` of `a` and
/// the rows `k` of `b` are read.
pub struct Gemm<'a> {
    pub m: usize,
    pub n: usize,
    pub k: Range<usize>,
    pub a: &'a [f32],
    /// Distance of the rows of `a`.
    pub lda: usize,
    /// Distance of the rows of `b`.
    pub ldb: usize,
    pub c: &'a mut [f32],
    pub ldc: usize,
    /// Whether the product is added to what `c` holds.
    pub add: bool,
    /// Bytes that are needed next and fetched into the cache meanwhile.
    pub ahead: &'a [u8],
}

impl Gemm<'_> {
    /// Asserts that the matrices have the elements that the product reads and writes; `b_len` is the length of `b`.
    fn check(&self, b_len: usize) {
        let (last_row, last_k) = (self.m.saturating_sub(1), self.k.end.saturating_sub(1));
        assert!(
            self.m == 0
                || last_row * self.lda + self.k.end <= self.a.len() && last_row * self.ldc + self.n <= self.c.len()
        );
        assert!(self.k.end == 0 || last_k * self.ldb + self.n <= b_len);
    }
}

/// One tile of a softmax over many, per row the softmax of the tiles so far: scores turn into weights relative to the largest
/// score of this tile and those before, and what those before gave is scaled to it.
pub struct Softmax<'a> {
    /// `[n_rows, KV_BLOCK]`: scores, and then weights. Minus infinity has weight 0.
    pub scores: &'a mut [f32],
    /// What scores are multiplied with: a positive number.
    pub scale: f32,
    /// Per row the largest scaled score so far; minus infinity where there was none.
    pub max: &'a mut [f32],
    /// Per row the sum of the weights so far.
    pub total: &'a mut [f32],
    /// `[n_rows, n]`: the weighted sums so far.
    pub sum: &'a mut [f32],
}

impl FloatKernels {
    /// See [`Gemm`]. Every element is summed over `k` in ascending order.
    pub fn gemm(&self, g: Gemm<'_>, b: &[f32]) {
        g.check(b.len());
        // SAFETY: the table is handed out only where the CPU has its ISA; the bounds were checked above.
        unsafe { (self.gemm)(g, b) }
    }

    /// `c = a b`: see [`Product`]. `of_b` `[n]` is what a unit of each column of `b` is worth.
    pub fn score(&self, p: Product<'_>, of_b: &[f32]) {
        p.check();
        assert_eq!(p.n, of_b.len());
        // SAFETY: as in `gemm`.
        unsafe { (self.score)(p, of_b) }
    }

    /// `c = c + a b`: see [`Product`]. A unit of `b` is worth 1.
    pub fn weigh(&self, p: Product<'_>) {
        p.check();
        // SAFETY: as in `gemm`.
        unsafe { (self.weigh)(p) }
    }

    /// Codes of queries `x` `[n, d]`, `pairs` being `[n, d / 2]`, and what a unit of each row is worth. See [`codes`].
    pub fn code_queries(&self, x: &[f32], pairs: &mut [Pair], scales: &mut [f32]) {
        assert!(x.len() == 2 * pairs.len() && (x.len() / scales.len().max(1)).is_multiple_of(2));
        assert!(x.len().is_multiple_of(scales.len().max(1)));
        // SAFETY: the table is handed out only where the CPU has its ISA.
        unsafe { (self.code_queries)(x, pairs, scales) }
    }

    /// Codes of a tile of keys whose 8-bit codes `[d, KV_BLOCK]` have the scales `[d / SHARED, KV_BLOCK]`: [`SHARED`] codes of a column
    /// have one. See [`codes`].
    pub fn widen_keys(&self, codes: &[i8], scales: &[f32], to: Coded<'_>) {
        assert!(codes.len() == 2 * to.pairs.len() && codes.len() == SHARED * scales.len());
        assert!(scales.len().is_multiple_of(KV_BLOCK));
        // SAFETY: the table is handed out only where the CPU has its ISA.
        unsafe { (self.widen_keys)(codes, scales, to) }
    }

    /// The same of a tile of values whose codes are `[KV_BLOCK, d]` and scales `[KV_BLOCK, d / SHARED]`.
    pub fn widen_values(&self, codes: &[i8], scales: &[f32], to: Coded<'_>) {
        assert!(codes.len() == 2 * to.pairs.len() && codes.len() == SHARED * scales.len());
        assert!(scales.len().is_multiple_of(KV_BLOCK));
        // SAFETY: the table is handed out only where the CPU has its ISA.
        unsafe { (self.widen_values)(codes, scales, to) }
    }

    /// Codes of weights `[n, KV_BLOCK]` times what their positions' values are worth, and what a unit of each row is worth. None is
    /// negative. See [`codes`].
    pub fn code_weights(&self, weights: &[f32], of_values: &[f32; KV_BLOCK], pairs: &mut [Pair], scales: &mut [f32]) {
        assert!(weights.len() == 2 * pairs.len() && weights.len() == scales.len() * KV_BLOCK);
        // SAFETY: the table is handed out only where the CPU has its ISA.
        unsafe { (self.code_weights)(weights, of_values, pairs, scales) }
    }

    /// See [`Softmax`]. A row of which nothing can be compared has weights of NaN, or 0 where it is minus infinity.
    pub fn softmax(&self, s: Softmax<'_>) {
        let n_rows = s.max.len();
        assert!(
            s.scores.len() == n_rows * KV_BLOCK && s.total.len() == n_rows && s.sum.len().is_multiple_of(n_rows.max(1))
        );
        // SAFETY: the table is handed out only where the CPU has its ISA.
        unsafe { (self.softmax)(s) }
    }

    /// `gate = silu(gate) * up`
    pub fn swiglu(&self, gate: &mut [f32], up: &[f32]) {
        assert_eq!(gate.len(), up.len());
        // SAFETY: the table is handed out only where the CPU has its ISA.
        unsafe { (self.swiglu)(gate, up) }
    }

    /// `out = x / rms(x) * w`
    pub fn normalise(&self, x: &[f32], w: &[f32], eps: f32, out: &mut [f32]) {
        assert!(x.len() == w.len() && x.len() == out.len());
        // SAFETY: the table is handed out only where the CPU has its ISA.
        unsafe { (self.normalise)(x, w, eps, out) }
    }

    /// `y = a y + b x`
    pub fn axpby(&self, y: &mut [f32], a: f32, x: &[f32], b: f32) {
        assert_eq!(y.len(), x.len());
        // SAFETY: the table is handed out only where the CPU has its ISA.
        unsafe { (self.axpby)(y, a, x, b) }
    }

    /// Half floats, given as their bits, as floats.
    pub fn widen(&self, halves: &[u16], out: &mut [f32]) {
        assert_eq!(halves.len(), out.len());
        // SAFETY: the table is handed out only where the CPU has its ISA.
        unsafe { (self.widen)(halves, out) }
    }

    /// What [`RowStats::of`] gives, but for the order of its sums, which is the same on every ISA.
    pub fn row_stats(&self, values: &[f32]) -> RowStats {
        // SAFETY: the table is handed out only where the CPU has its ISA.
        unsafe { (self.row_stats)(values) }
    }

    /// See [`Best::tops`](apr_core::backend::Best::tops).
    pub fn tops(&self, values: &[f32], tops: &mut [u32]) {
        // SAFETY: the table is handed out only where the CPU has its ISA.
        unsafe { (self.tops)(values, tops) }
    }
}

pub(crate) static SCALAR: FloatKernels = FloatKernels {
    gemm: body::gemm,
    score: |p, of_b| codes::score(p, of_b, 0),
    weigh: |p| codes::weigh(p, 0),
    code_queries: codes::code_queries,
    widen_keys: codes::widen_keys,
    widen_values: codes::widen_values,
    code_weights: codes::code_weights,
    softmax: body::softmax,
    swiglu: body::swiglu,
    normalise: body::normalise,
    axpby: body::axpby,
    row_stats: body::row_stats,
    tops: body::tops,
    widen: body::widen,
};

/// `TABLE`, of functions compiled for `$features` with loops over `$vector`. The module that it is written in has the products.
#[cfg(target_arch = "x86_64")]
macro_rules! table {
    ($features:literal, $vector:ty) => {
        table! { $features, $vector:
            codes {
                code_queries(x: &[f32], pairs: &mut [Pair], scales: &mut [f32]) -> ();
                widen_keys(codes: &[i8], scales: &[f32], to: Coded<'_>) -> ();
                widen_values(codes: &[i8], scales: &[f32], to: Coded<'_>) -> ();
                code_weights(weights: &[f32], of_values: &[f32; KV_BLOCK], pairs: &mut [Pair], scales: &mut [f32]) -> ();
            }
            loops {
                softmax(s: Softmax<'_>) -> ();
                swiglu(gate: &mut [f32], up: &[f32]) -> ();
                normalise(x: &[f32], w: &[f32], eps: f32, out: &mut [f32]) -> ();
                axpby(y: &mut [f32], a: f32, x: &[f32], b: f32) -> ();
                widen(halves: &[u16], out: &mut [f32]) -> ();
            }
            portable {
                row_stats(values: &[f32]) -> RowStats;
                tops(values: &[f32], tops: &mut [u32]) -> ();
            }
        }
    };
    ($features:literal, $vector:ty:
        codes { $($code:ident($($code_arg:ident: $code_kind:ty),*) -> $code_out:ty;)+ }
        loops { $($loop:ident($($arg:ident: $kind:ty),*) -> $out:ty;)+ }
        portable { $($body:ident($($body_arg:ident: $body_kind:ty),*) -> $body_out:ty;)+ }
    ) => {
        pub(crate) static TABLE: FloatKernels =
            FloatKernels { gemm, score, weigh, $($code,)+ $($loop,)+ $($body),+ };

        $(
            #[target_feature(enable = $features)]
            fn $code($($code_arg: $code_kind),*) -> $code_out {
                // SAFETY: this function itself runs only where the CPU has the vector's instructions.
                unsafe { code_loops::$code::<$vector>($($code_arg),*) }
            }
        )+

        $(
            #[target_feature(enable = $features)]
            fn $loop($($arg: $kind),*) -> $out {
                // SAFETY: this function itself runs only where the CPU has the vector's instructions.
                unsafe { loops::$loop::<$vector>($($arg),*) }
            }
        )+

        $(
            #[target_feature(enable = $features)]
            fn $body($($body_arg: $body_kind),*) -> $body_out {
                body::$body($($body_arg),*)
            }
        )+
    };
}

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
#[cfg(target_arch = "x86_64")]
mod code_loops;
pub mod codes;
#[cfg(target_arch = "x86_64")]
mod dots;
#[cfg(target_arch = "x86_64")]
mod loops;
#[cfg(target_arch = "x86_64")]
mod vector;

/// The loops themselves, written over arrays of eight lanes. `FMA` says whether a fused multiply-add is one instruction.
mod body {
    use half::f16;

    use apr_core::backend::{Best, KV_BLOCK};

    use super::{Gemm, RowStats, Softmax};

    const LANES: usize = 8;
    pub type Lanes = [f32; LANES];

    #[inline(always)]
    fn mul_add<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
        if FMA { a.mul_add(b, c) } else { a * b + c }
    }

    #[inline(always)]
    fn sum(x: Lanes) -> f32 {
        ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]))
    }

    #[inline(always)]
    pub fn gemm(mut g: Gemm<'_>, b: &[f32]) {
        gemm_columns::<false>(&mut g, b, 0);
    }

    /// Columns `from ..` of the product.
    #[inline(always)]
    pub fn gemm_columns<const FMA: bool>(g: &mut Gemm<'_>, b: &[f32], from: usize) {
        if from == g.n {
            return;
        }
        for i in 0..g.m {
            let c = &mut g.c[i * g.ldc + from..i * g.ldc + g.n];
            if !g.add {
                c.fill(0.0);
            }
            for p in g.k.clone() {
                let x = g.a[i * g.lda + p];
                for (c, &b) in c.iter_mut().zip(&b[p * g.ldb + from..]) {
                    *c = mul_add::<FMA>(x, b, *c);
                }
            }
        }
    }

    /// `1.5 * 2^23`: adding and taking it away rounds to an integer.
    pub const ROUND: f32 = 12_582_912.0;
    /// ln 2 in two parts, the first of which has few digits.
    pub const LN_2_HIGH: f32 = 0.693_145_75;
    pub const LN_2_LOW: f32 = 1.428_606_8e-6;
    /// Coefficients of the polynomial for `e^r`, `|r| <= ln 2 / 2`, the highest power first.
    pub const EXP: [f32; 7] = [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0];

    /// `e^x` for eight lanes: range reduction by powers of two and a polynomial of degree 6, relative error about 2e-7.
    /// Arguments below -87 give 0; NaN stays NaN.
    #[inline(always)]
    fn exp(x: Lanes) -> Lanes {
        let mut out = [0.0; LANES];
        for l in 0..LANES {
            let v = x[l].min(88.0);
            let shifted = v * std::f32::consts::LOG2_E + ROUND;
            let n = shifted - ROUND;
            let r = n * -LN_2_LOW + (n * -LN_2_HIGH + v);
            let mut p = EXP[0];
            for c in &EXP[1..] {
                p = p * r + c;
            }
            let power = f32::from_bits(shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23);
            // `min` drops NaN; the second comparison brings it back.
            let y = if x[l] < -87.0 { 0.0 } else { p * power };
            out[l] = if x[l].is_nan() { x[l] } else { y };
        }
        out
    }

    pub fn softmax(s: Softmax<'_>) {
        let n = s.sum.len() / s.max.len().max(1);
        for (q, scores) in s.scores.chunks_exact_mut(KV_BLOCK).enumerate() {
            let largest = s.scale * scores.iter().fold(f32::NEG_INFINITY, |m, &v| if v > m { v } else { m });
            let (before, now) = (s.max[q], s.max[q].max(largest));
            let reference = reference(now);
            let mut total = [0f32; LANES];
            for chunk in scores.as_chunks_mut::<LANES>().0 {
                *chunk = exp(chunk.map(|v| v * s.scale - reference));
                for l in 0..LANES {
                    total[l] += chunk[l];
                }
            }
            if before < now && before > f32::NEG_INFINITY {
                let keep = exp([before - now; LANES])[0];
                s.total[q] *= keep;
                s.sum[q * n..(q + 1) * n].iter_mut().for_each(|v| *v *= keep);
            }
            s.max[q] = now;
            s.total[q] += sum(total);
        }
    }

    /// What weights are relative to, `largest` being the largest score: 0 where nothing is comparable, all being NaN, which
    /// the sum then shows, or minus infinity.
    #[inline(always)]
    pub fn reference(largest: f32) -> f32 {
        if largest == f32::NEG_INFINITY { 0.0 } else { largest }
    }

    pub fn swiglu(gate: &mut [f32], up: &[f32]) {
        let (g8, g_tail) = gate.as_chunks_mut::<LANES>();
        let (u8s, u_tail) = up.as_chunks::<LANES>();
        for (g, u) in g8.iter_mut().zip(u8s) {
            *g = swiglu8(*g, u);
        }
        let (mut g, mut u) = ([0.0; LANES], [0.0; LANES]);
        g[..g_tail.len()].copy_from_slice(g_tail);
        u[..u_tail.len()].copy_from_slice(u_tail);
        let y = swiglu8(g, &u);
        g_tail.copy_from_slice(&y[..g_tail.len()]);
    }

    #[inline(always)]
    fn swiglu8(g: Lanes, u: &Lanes) -> Lanes {
        let e = exp(g.map(|v| -v));
        let mut out = [0.0; LANES];
        for l in 0..LANES {
            out[l] = g[l] / (1.0 + e[l]) * u[l];
        }
        out
    }

    pub fn normalise(x: &[f32], w: &[f32], eps: f32, out: &mut [f32]) {
        let mut squares = [0f32; LANES];
        let (chunks, tail) = x.as_chunks::<LANES>();
        for chunk in chunks {
            for l in 0..LANES {
                squares[l] += chunk[l] * chunk[l];
            }
        }
        for (l, v) in tail.iter().enumerate() {
            squares[l] += v * v;
        }
        let scale = 1.0 / (sum(squares) / x.len() as f32 + eps).sqrt();
        for ((o, x), w) in out.iter_mut().zip(x).zip(w) {
            *o = x * scale * w;
        }
    }

    #[inline(always)]
    pub fn axpby(y: &mut [f32], a: f32, x: &[f32], b: f32) {
        y.iter_mut().zip(x).for_each(|(y, x)| *y = a * *y + b * x);
    }

    #[inline(always)]
    pub fn widen(halves: &[u16], out: &mut [f32]) {
        out.iter_mut().zip(halves).for_each(|(o, h)| *o = f16::from_bits(*h).to_f32());
    }

    #[inline(always)]
    pub fn tops(values: &[f32], tops: &mut [u32]) {
        Best::tops(values, tops);
    }

    /// Statistics in eight lanes, merged in order; what is left over comes last. Squares of floats are exact in f64, so that it makes
    /// no difference whether they are added by one instruction or two.
    #[inline(always)]
    pub fn row_stats(values: &[f32]) -> RowStats {
        let (mut min, mut max) = ([f32::INFINITY; LANES], [f32::NEG_INFINITY; LANES]);
        let (mut sum, mut sum_sq) = ([0f64; LANES], [0f64; LANES]);
        let (mut n_nan, mut n_finite, mut n_zero) = ([0u32; LANES], [0u32; LANES], [0u32; LANES]);
        let (chunks, tail) = values.as_chunks::<LANES>();
        for chunk in chunks {
            for l in 0..LANES {
                let v = chunk[l];
                let is_finite = v.abs() < f32::INFINITY;
                n_nan[l] += u32::from(v.is_nan());
                n_finite[l] += u32::from(is_finite);
                n_zero[l] += u32::from(v == 0.0);
                let (low, high) = if is_finite { (v, v) } else { (f32::INFINITY, f32::NEG_INFINITY) };
                min[l] = if low < min[l] { low } else { min[l] };
                max[l] = if high > max[l] { high } else { max[l] };
                let v = f64::from(if is_finite { v } else { 0.0 });
                sum[l] += v;
                sum_sq[l] += v * v;
            }
        }
        let mut all = RowStats::EMPTY;
        for l in 0..LANES {
            let (n_nan, n_zero, count) = (u64::from(n_nan[l]), u64::from(n_zero[l]), chunks.len() as u64);
            let n_inf = count - n_nan - u64::from(n_finite[l]);
            let (min, max, sum, sum_sq) = (min[l], max[l], sum[l], sum_sq[l]);
            all.merge(&RowStats { count, n_nan, n_inf, n_zero, min, max, sum, sum_sq });
        }
        all.merge(&RowStats::of(tail));
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::{Isa, Kernels};

    /// The tables of every instruction set of this CPU.
    pub(super) fn tables() -> impl Iterator<Item = &'static FloatKernels> {
        Isa::ALL.into_iter().filter_map(Kernels::for_isa).map(Kernels::float)
    }

    /// Values between -1 and 1, the same each time.
    pub(super) fn values(n: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..n).map(|_| next()).collect()
    }

    #[test]
    fn gemm_equals_plain_sums_and_does_not_depend_on_its_neighbours() {
        for t in tables() {
            for (m, n, k) in [(1, 64, 128), (4, 16, 3), (7, 37, 64), (33, 80, 5), (2, 8, 9), (13, 48, 140)] {
                let (a, b) = (values(m * k, 1), values(k * n, 2));
                let mut c = vec![f32::NAN; m * n];
                t.gemm(Gemm { m, n, k: 0..k, a: &a, lda: k, ldb: n, c: &mut c, ldc: n, add: false, ahead: &[] }, &b);
                for i in 0..m {
                    let mut alone = vec![f32::NAN; n];
                    t.gemm(
                        Gemm {
                            m: 1,
                            n,
                            k: 0..k,
                            a: &a[i * k..],
                            lda: k,
                            ldb: n,
                            c: &mut alone,
                            ldc: n,
                            add: false,
                            ahead: &[],
                        },
                        &b,
                    );
                    assert_eq!(alone, c[i * n..(i + 1) * n], "row {i} alone is bitwise the same");
                    for j in 0..n {
                        let expected: f64 = (0..k).map(|p| f64::from(a[i * k + p]) * f64::from(b[p * n + j])).sum();
                        assert!((f64::from(c[i * n + j]) - expected).abs() < 1e-5, "{} at {i},{j}", c[i * n + j]);
                    }
                }
            }
        }
    }

    #[test]
    fn a_product_in_two_parts_is_the_whole_one() {
        for t in tables() {
            for (m, n, k, first) in [(1, 128, 64, 1), (8, 128, 64, 40), (24, 37, 64, 63), (9, 16, 300, 129)] {
                let (a, b) = (values(m * k, 1), values(k * n, 2));
                let ahead = bytemuck::cast_slice(&b);
                let (mut whole, mut parts) = (vec![f32::NAN; m * n], vec![f32::NAN; m * n]);
                t.gemm(
                    Gemm { m, n, k: 0..k, a: &a, lda: k, ldb: n, c: &mut whole, ldc: n, add: false, ahead: &[] },
                    &b,
                );
                for (k_part, add) in [(0..first, false), (first..k, true)] {
                    t.gemm(Gemm { m, n, k: k_part, a: &a, lda: k, ldb: n, c: &mut parts, ldc: n, add, ahead }, &b);
                }
                assert_eq!(whole, parts, "{m} by {n} by {k}, parted at {first}");
            }
        }
    }

    #[test]
    fn a_tile_of_softmax_equals_the_exponential() {
        for t in tables() {
            for n_seen in [1, 7, 8, 64, 61] {
                let mut before: Vec<f32> = values(2 * KV_BLOCK, 3).iter().map(|v| 60.0 * v).collect();
                before[KV_BLOCK + n_seen..].fill(f32::NEG_INFINITY);
                let (mut x, mut max, mut total) = (before.clone(), [f32::NEG_INFINITY; 2], [0.0; 2]);
                t.softmax(Softmax { scores: &mut x, scale: 0.5, max: &mut max, total: &mut total, sum: &mut [1.0; 6] });
                for (q, before) in before.chunks(KV_BLOCK).enumerate() {
                    let largest = before.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    assert_eq!(max[q], 0.5 * largest);
                    let expected = before.iter().map(|&v| f64::from(v * 0.5 - max[q]).exp());
                    for (x, e) in x[q * KV_BLOCK..].iter().zip(expected.clone()) {
                        assert!((f64::from(*x) - e).abs() <= 4e-7 * e + 1e-30, "{x} {e}");
                    }
                    assert!((f64::from(total[q]) / expected.sum::<f64>() - 1.0).abs() < 1e-6);
                }
                assert!(x[KV_BLOCK + n_seen..].iter().all(|&w| w == 0.0), "what is not seen has no weight");
            }
        }
    }

    #[test]
    fn tiles_of_softmax_one_after_the_other_equal_the_whole() {
        const N: usize = 19;
        for t in tables() {
            // The largest score comes first, last, or in between.
            for slope in [-0.3, 0.0, 0.3] {
                let scores: Vec<f32> =
                    values(4 * KV_BLOCK, 5).iter().enumerate().map(|(i, v)| 9.0 * v + slope * i as f32).collect();
                let of_value = values(4 * KV_BLOCK * N, 6);
                let (mut max, mut total, mut sum) = ([f32::NEG_INFINITY], [0.0], [0.0; N]);
                for (tile, b) in scores.chunks(KV_BLOCK).zip(of_value.chunks(KV_BLOCK * N)) {
                    let mut x = tile.to_vec();
                    t.softmax(Softmax { scores: &mut x, scale: 0.7, max: &mut max, total: &mut total, sum: &mut sum });
                    let k = 0..KV_BLOCK;
                    t.gemm(
                        Gemm {
                            m: 1,
                            n: N,
                            k,
                            a: &x,
                            lda: KV_BLOCK,
                            ldb: N,
                            c: &mut sum,
                            ldc: N,
                            add: true,
                            ahead: &[],
                        },
                        b,
                    );
                }
                let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let weights: Vec<f64> = scores.iter().map(|&v| (0.7 * f64::from(v - largest)).exp()).collect();
                let all: f64 = weights.iter().sum();
                assert!((f64::from(total[0]) / all - 1.0).abs() < 1e-5, "{} {all}", total[0]);
                for (j, got) in sum.iter().enumerate() {
                    let e: f64 = weights.iter().enumerate().map(|(p, w)| w * f64::from(of_value[p * N + j])).sum();
                    assert!((f64::from(*got) - e).abs() < 1e-5 * all, "{got} {e}");
                }
            }
        }
    }

    #[test]
    fn softmax_does_not_lose_nan_and_takes_nothing_for_nothing() {
        for t in tables() {
            let nothing = [f32::NEG_INFINITY; KV_BLOCK];
            let (mut some, mut all) = ([0.5; KV_BLOCK], [f32::NAN; KV_BLOCK]);
            some[3] = f32::NAN;
            let mut x = [nothing, some, all].concat();
            let (mut max, mut total, mut sum) =
                ([-100.0, f32::NEG_INFINITY, f32::NEG_INFINITY], [2.0, 0.0, 0.0], [3.0; 3]);
            t.softmax(Softmax { scores: &mut x, scale: 1.0, max: &mut max, total: &mut total, sum: &mut sum });
            assert_eq!((max[0], total[0], sum[0], max[1], max[2]), (-100.0, 2.0, 3.0, 0.5, f32::NEG_INFINITY));
            assert!(total[1].is_nan() && total[2].is_nan());
            all.fill(-200.0);
            let (max, total) = (&mut max[2..], &mut total[2..]);
            t.softmax(Softmax { scores: &mut all, scale: 1.0, max, total, sum: &mut sum[2..] });
            assert!(max[0] == -200.0 && total[0].is_nan(), "NaN of an earlier tile stays");
        }
    }

    #[test]
    fn swiglu_and_norm_equal_their_definitions() {
        for t in tables() {
            for n in [1, 8, 29, 256] {
                let (x, w) = (values(n, 5), values(n, 6));
                let mut gate: Vec<f32> = x.iter().map(|v| 20.0 * v).collect();
                let before = gate.clone();
                t.swiglu(&mut gate, &w);
                for i in 0..n {
                    let g = f64::from(before[i]);
                    let e = g / (1.0 + (-g).exp()) * f64::from(w[i]);
                    assert!((f64::from(gate[i]) - e).abs() <= 1e-6 * e.abs() + 1e-7, "{} {e}", gate[i]);
                }
                let mut out = vec![0.0; n];
                t.normalise(&x, &w, 1e-6, &mut out);
                let ms = x.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>() / n as f64;
                for i in 0..n {
                    let e = f64::from(x[i]) / (ms + 1e-6).sqrt() * f64::from(w[i]);
                    assert!((f64::from(out[i]) - e).abs() <= 1e-6, "{} {e}", out[i]);
                }
            }
        }
    }

    #[test]
    fn statistics_of_a_row_are_the_plain_ones() {
        let close = |a: f64, b: f64, scale: f64| assert!((a - b).abs() <= 1e-12 * scale, "{a} {b}");
        for n in [0, 1, 7, 8, 9, 64, 1000, 5003] {
            let mut x = values(n, n as u32 + 1);
            for (i, odd) in [f32::NAN, f32::INFINITY, 0.0, -0.0, f32::NEG_INFINITY, -f32::NAN].into_iter().enumerate() {
                let at = |k: usize| (i * 997 + k * 41) % n.max(1);
                (0..n.min(40) / 4).for_each(|k| x[at(k)] = odd);
            }
            let plain = RowStats::of(&x);
            let mut of_isas = tables().map(|t| t.row_stats(&x));
            let first = of_isas.next().unwrap();
            let counts = |s: &RowStats| (s.count, s.n_nan, s.n_inf, s.n_zero, s.min, s.max);
            assert_eq!(counts(&first), counts(&plain), "{n} values");
            close(first.sum, plain.sum, n as f64);
            close(first.sum_sq, plain.sum_sq, n as f64);
            assert!(of_isas.all(|s| s == first), "every ISA sums in the same order");
        }
    }
}
