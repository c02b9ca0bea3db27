//! The float loops that compilers do not turn into good AVX2 by themselves: attention's matrix product and everything with an
//! exponential. The others are the portable bodies, compiled with the set's features.

use std::arch::x86_64::*;

use super::{Gemm, body};
use apr_core::stats::RowStats;

const LANES: usize = 8;

/// Elements of `b`. Unsafe, because they may be loaded only on a CPU with AVX2 and F16C, and only where there are eight.
trait Element: Copy {
    unsafe fn load(from: *const Self) -> __m256;
}

impl Element for f32 {
    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    unsafe fn load(from: *const f32) -> __m256 {
        // SAFETY: the caller's promise.
        unsafe { _mm256_loadu_ps(from) }
    }
}

/// The bits of a half float.
impl Element for u16 {
    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    unsafe fn load(from: *const u16) -> __m256 {
        // SAFETY: the caller's promise.
        _mm256_cvtph_ps(unsafe { _mm_loadu_si128(from.cast()) })
    }
}

/// See [`Gemm`]; the caller has checked its bounds.
#[target_feature(enable = "avx2,fma,f16c")]
pub fn gemm(mut g: Gemm<'_>, b: &[f32]) {
    let n_wide = g.n / (2 * LANES) * (2 * LANES);
    // Sixteen columns of `b` stay in the first cache while all rows of `a` pass.
    for j in (0..n_wide).step_by(2 * LANES) {
        let mut i = 0;
        while i < g.m {
            i += match g.m - i {
                1 => gemm_tile::<f32, 1, 2>(&mut g, b, i, j),
                2 => gemm_tile::<f32, 2, 2>(&mut g, b, i, j),
                3 => gemm_tile::<f32, 3, 2>(&mut g, b, i, j),
                4 | 8 => gemm_tile::<f32, 4, 2>(&mut g, b, i, j),
                5 => gemm_tile::<f32, 5, 2>(&mut g, b, i, j),
                _ => gemm_tile::<f32, 6, 2>(&mut g, b, i, j),
            };
        }
    }
    body::gemm_columns::<true, _>(&mut g, b, |b| b, n_wide);
}

/// See [`Gemm`]; the caller has checked its bounds. Eight rows share one widening.
#[target_feature(enable = "avx2,fma,f16c")]
pub fn gemm_halves(mut g: Gemm<'_>, b: &[u16]) {
    let n_wide = g.n / LANES * LANES;
    for j in (0..n_wide).step_by(LANES) {
        let mut i = 0;
        while i < g.m {
            i += match g.m - i {
                8.. => gemm_tile::<u16, 8, 1>(&mut g, b, i, j),
                4.. => gemm_tile::<u16, 4, 1>(&mut g, b, i, j),
                _ => gemm_tile::<u16, 1, 1>(&mut g, b, i, j),
            };
        }
    }
    body::gemm_columns::<true, _>(&mut g, b, |b| half::f16::from_bits(b).to_f32(), n_wide);
}

/// `R` rows from `i` on by `C` vectors of columns from `j` on, in registers; returns `R`.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn gemm_tile<T: Element, const R: usize, const C: usize>(g: &mut Gemm<'_>, b: &[T], i: usize, j: usize) -> usize {
    let (a, b) = (g.a[i * g.lda..].as_ptr(), b[j..].as_ptr());
    let mut acc = [[_mm256_setzero_ps(); C]; R];
    for p in 0..g.k {
        let mut of_b = [_mm256_setzero_ps(); C];
        for c in 0..C {
            // SAFETY: the caller of `gemm` has checked that row `k - 1` of `b` has `n` columns, and `j + 8 C <= n`.
            of_b[c] = unsafe { T::load(b.add(p * g.ldb + LANES * c)) };
        }
        for r in 0..R {
            // SAFETY: and that row `m - 1` of `a` has `k` columns, and `i + R <= m`.
            let x = unsafe { _mm256_broadcast_ss(&*a.add(r * g.lda + p)) };
            for c in 0..C {
                acc[r][c] = _mm256_fmadd_ps(x, of_b[c], acc[r][c]);
            }
        }
    }
    for r in 0..R {
        let (to, _) = g.c[(i + r) * g.ldc + j..][..LANES * C].as_chunks_mut::<LANES>();
        for c in 0..C {
            store(&mut to[c], acc[r][c]);
        }
    }
    R
}

#[target_feature(enable = "avx2")]
#[inline]
fn load(x: &[f32; LANES]) -> __m256 {
    // SAFETY: `x` has eight floats.
    unsafe { _mm256_loadu_ps(x.as_ptr()) }
}

#[target_feature(enable = "avx2")]
#[inline]
fn store(to: &mut [f32; LANES], x: __m256) {
    // SAFETY: `to` has eight floats.
    unsafe { _mm256_storeu_ps(to.as_mut_ptr(), x) }
}

/// [`body::exp`] of eight lanes, operation by operation.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn exp(x: __m256) -> __m256 {
    let set = |v: f32| _mm256_set1_ps(v);
    let v = _mm256_min_ps(x, set(88.0));
    let shifted = _mm256_fmadd_ps(v, set(std::f32::consts::LOG2_E), set(body::ROUND));
    let n = _mm256_sub_ps(shifted, set(body::ROUND));
    let r = _mm256_fmadd_ps(n, set(-body::LN_2_HIGH), v);
    let r = _mm256_fmadd_ps(n, set(-body::LN_2_LOW), r);
    let mut p = set(body::EXP[0]);
    for c in &body::EXP[1..] {
        p = _mm256_fmadd_ps(p, r, set(*c));
    }
    let exponent =
        _mm256_add_epi32(_mm256_castps_si256(shifted), _mm256_set1_epi32(127 - body::ROUND.to_bits() as i32));
    let power = _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent));
    let y = _mm256_andnot_ps(_mm256_cmp_ps::<_CMP_LT_OQ>(x, set(-87.0)), _mm256_mul_ps(p, power));
    _mm256_blendv_ps(y, x, _mm256_cmp_ps::<_CMP_UNORD_Q>(x, x))
}

#[target_feature(enable = "avx2,fma,f16c")]
pub fn softmax_tile(scores: &mut [f32], scale: f32) -> (f32, f32) {
    let (chunks, tail) = scores.as_chunks_mut::<LANES>();
    let mut max = _mm256_set1_ps(f32::NEG_INFINITY);
    for chunk in chunks.iter() {
        // The second operand stands where the first is NaN.
        max = _mm256_max_ps(load(chunk), max);
    }
    let mut lanes = [0.0; LANES];
    store(&mut lanes, max);
    let largest = body::largest(&lanes, tail);
    let mut total = _mm256_setzero_ps();
    for chunk in chunks.iter_mut() {
        let y = _mm256_mul_ps(_mm256_sub_ps(load(chunk), _mm256_set1_ps(largest)), _mm256_set1_ps(scale));
        let y = exp(y);
        store(chunk, y);
        total = _mm256_add_ps(total, y);
    }
    store(&mut lanes, total);
    (largest * scale, body::softmax_tail::<true>(tail, largest, scale, lanes))
}

#[target_feature(enable = "avx2,fma,f16c")]
pub fn swiglu(gate: &mut [f32], up: &[f32]) {
    let (gates, gate_tail) = gate.as_chunks_mut::<LANES>();
    let (ups, up_tail) = up.as_chunks::<LANES>();
    for (g, u) in gates.iter_mut().zip(ups) {
        let v = load(g);
        let e = exp(_mm256_xor_ps(v, _mm256_set1_ps(-0.0)));
        let sigmoid = _mm256_div_ps(v, _mm256_add_ps(_mm256_set1_ps(1.0), e));
        store(g, _mm256_mul_ps(sigmoid, load(u)));
    }
    body::swiglu::<true>(gate_tail, up_tail);
}

#[target_feature(enable = "avx2,fma,f16c")]
pub fn normalise(x: &[f32], w: &[f32], eps: f32, out: &mut [f32]) {
    body::normalise::<true>(x, w, eps, out)
}

#[target_feature(enable = "avx2,fma,f16c")]
pub fn axpby(y: &mut [f32], a: f32, x: &[f32], b: f32) {
    body::axpby::<true>(y, a, x, b)
}

#[target_feature(enable = "avx2,fma,f16c")]
pub fn row_stats(values: &[f32]) -> RowStats {
    body::row_stats(values)
}

#[target_feature(enable = "avx2,f16c")]
pub fn widen(halves: &[u16], out: &mut [f32]) {
    let ((from, from_tail), (to, to_tail)) = (halves.as_chunks::<LANES>(), out.as_chunks_mut::<LANES>());
    for (h, o) in from.iter().zip(to) {
        // SAFETY: `h` has eight halves.
        store(o, _mm256_cvtph_ps(unsafe { _mm_loadu_si128(h.as_ptr().cast()) }));
    }
    body::widen(from_tail, to_tail);
}

#[target_feature(enable = "avx2,fma,f16c")]
pub fn scale_each(codes: &[i8], scales: &[f32], out: &mut [f32]) {
    body::scale_each(codes, scales, out)
}

#[target_feature(enable = "avx2,fma,f16c")]
pub fn scale_all(codes: &[i8], scale: f32, out: &mut [f32]) {
    body::scale_all(codes, scale, out)
}
