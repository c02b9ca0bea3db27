//! The float loops that compilers do not turn into good AVX2 by themselves: attention's matrix product and everything with an
//! exponential. The others are the portable bodies, compiled with the set's features.

use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::ops::Range;

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

/// Vectors of columns that are multiplied together, and the columns they have.
const C: usize = 2;
const STRIP: usize = C * LANES;

/// Rows of `b` that a [`Strip`] has.
const STRIP_ROWS: usize = 128;

/// [`STRIP`] columns of `b` as floats, row after row: 8 KB, which stay in the first cache while all rows of `a` pass.
#[repr(align(64))]
struct Strip([MaybeUninit<__m256>; STRIP_ROWS * C]);

/// Products of at most so many rows read `b` where it lies: widening halves again for every few rows costs less than a copy.
const FEW_ROWS: usize = 8;

/// See [`Gemm`]; the caller has checked its bounds.
#[target_feature(enable = "avx2,fma,f16c")]
pub fn gemm(g: Gemm<'_>, b: &[f32]) {
    product(g, b, |b| b);
}

/// See [`Gemm`]; the caller has checked its bounds.
#[target_feature(enable = "avx2,fma,f16c")]
pub fn gemm_halves(g: Gemm<'_>, b: &[u16]) {
    product(g, b, |b| half::f16::from_bits(b).to_f32());
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn product<T: Element>(mut g: Gemm<'_>, b: &[T], float: impl Fn(T) -> f32) {
    let (few, k_all, ldb) = (g.m <= FEW_ROWS, g.k.clone(), g.ldb);
    let n_wide = g.n / STRIP * STRIP;
    let n_steps = n_wide / STRIP * g.m.div_ceil(6) * k_all.len();
    let mut ahead = Ahead { rest: g.ahead, step: g.ahead.len().div_ceil(n_steps.max(1)) };
    for j in (0..n_wide).step_by(STRIP) {
        if few {
            // SAFETY: the caller has checked that the last row of `b` has `n` columns, and `j + STRIP <= n`.
            unsafe { gemm_strip(&mut g, b[k_all.start * ldb + j..].as_ptr(), ldb, j, k_all.clone(), &mut ahead) };
            continue;
        }
        let mut strip = Strip([MaybeUninit::uninit(); STRIP_ROWS * C]);
        for from in k_all.clone().step_by(STRIP_ROWS) {
            let k = from..k_all.end.min(from + STRIP_ROWS);
            let rows = b[from * ldb + j..].as_ptr();
            for (p, to) in strip.0.chunks_exact_mut(C).take(k.len()).enumerate() {
                for c in 0..C {
                    // SAFETY: as above.
                    to[c].write(unsafe { T::load(rows.add(p * ldb + LANES * c)) });
                }
            }
            // SAFETY: `k.len()` rows of the strip have just been written.
            unsafe { gemm_strip(&mut g, strip.0.as_ptr().cast::<f32>(), STRIP, j, k, &mut ahead) };
        }
    }
    body::gemm_columns::<true, _>(&mut g, b, float, n_wide);
}

/// What is fetched into the cache on the way, some bytes with every row of `b`.
struct Ahead<'a> {
    rest: &'a [u8],
    step: usize,
}

/// All rows by a strip of columns from `j` on. `b` points to the strip's row `k.start`; `ldb` elements further is the next.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
unsafe fn gemm_strip<T: Element>(
    g: &mut Gemm<'_>,
    b: *const T,
    ldb: usize,
    j: usize,
    k: Range<usize>,
    ahead: &mut Ahead<'_>,
) {
    let mut i = 0;
    while i < g.m {
        let k = k.clone();
        // SAFETY: the caller's promise.
        unsafe {
            i += match g.m - i {
                1 => gemm_tile::<T, 1>(g, b, ldb, i, j, k, ahead),
                2 => gemm_tile::<T, 2>(g, b, ldb, i, j, k, ahead),
                3 => gemm_tile::<T, 3>(g, b, ldb, i, j, k, ahead),
                4 | 8 => gemm_tile::<T, 4>(g, b, ldb, i, j, k, ahead),
                5 => gemm_tile::<T, 5>(g, b, ldb, i, j, k, ahead),
                _ => gemm_tile::<T, 6>(g, b, ldb, i, j, k, ahead),
            };
        }
    }
}

/// `R` rows from `i` on by a strip of columns from `j` on, in registers; returns `R`.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
unsafe fn gemm_tile<T: Element, const R: usize>(
    g: &mut Gemm<'_>,
    b: *const T,
    ldb: usize,
    i: usize,
    j: usize,
    k: Range<usize>,
    ahead: &mut Ahead<'_>,
) -> usize {
    let (a, n) = (g.a[i * g.lda + k.start..].as_ptr(), k.len());
    let mut acc = [[_mm256_setzero_ps(); C]; R];
    if k.start > 0 {
        for r in 0..R {
            let (from, _) = g.c[(i + r) * g.ldc + j..][..STRIP].as_chunks::<LANES>();
            for c in 0..C {
                acc[r][c] = load(&from[c]);
            }
        }
    }
    // Where nothing is left to fetch, what is there stands in: an address outside the process' memory costs a walk through
    // page tables.
    let n_ahead = ahead.step * n;
    let (next, step) = if ahead.rest.len() < n_ahead { (a.cast(), 0) } else { (ahead.rest.as_ptr(), ahead.step) };
    ahead.rest = &ahead.rest[n_ahead.min(ahead.rest.len())..];
    for p in 0..n {
        _mm_prefetch::<_MM_HINT_T0>(next.wrapping_add(step * p).cast());
        let mut of_b = [_mm256_setzero_ps(); C];
        for c in 0..C {
            // SAFETY: the caller's promise.
            of_b[c] = unsafe { T::load(b.add(p * ldb + LANES * c)) };
        }
        for r in 0..R {
            // SAFETY: the last row of `a` has the columns `k`, and `i + R <= m`.
            let x = unsafe { _mm256_broadcast_ss(&*a.add(r * g.lda + p)) };
            for c in 0..C {
                acc[r][c] = _mm256_fmadd_ps(x, of_b[c], acc[r][c]);
            }
        }
    }
    for r in 0..R {
        let (to, _) = g.c[(i + r) * g.ldc + j..][..STRIP].as_chunks_mut::<LANES>();
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
    let y = exp_below_88(_mm256_min_ps(x, _mm256_set1_ps(88.0)));
    // `min` drops NaN.
    _mm256_blendv_ps(y, x, _mm256_cmp_ps::<_CMP_UNORD_Q>(x, x))
}

/// [`exp`] of what is at most 88 or NaN, which stays NaN.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn exp_below_88(x: __m256) -> __m256 {
    let set = |v: f32| _mm256_set1_ps(v);
    let shifted = _mm256_fmadd_ps(x, set(std::f32::consts::LOG2_E), set(body::ROUND));
    let n = _mm256_sub_ps(shifted, set(body::ROUND));
    let r = _mm256_fmadd_ps(n, set(-body::LN_2_HIGH), x);
    let r = _mm256_fmadd_ps(n, set(-body::LN_2_LOW), r);
    let mut p = set(body::EXP[0]);
    for c in &body::EXP[1..] {
        p = _mm256_fmadd_ps(p, r, set(*c));
    }
    let exponent =
        _mm256_add_epi32(_mm256_castps_si256(shifted), _mm256_set1_epi32(127 - body::ROUND.to_bits() as i32));
    let power = _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent));
    _mm256_andnot_ps(_mm256_cmp_ps::<_CMP_LT_OQ>(x, set(-87.0)), _mm256_mul_ps(p, power))
}

#[target_feature(enable = "avx2,fma,f16c")]
pub fn softmax_tile(scores: &mut [f32], scale: f32) -> (f32, f32) {
    let (chunks, tail) = scores.as_chunks_mut::<LANES>();
    let mut max = _mm256_set1_ps(f32::NEG_INFINITY);
    for chunk in chunks.iter() {
        // The second operand stands where the first is NaN.
        max = _mm256_max_ps(load(chunk), max);
    }
    let max = _mm_max_ps(_mm256_castps256_ps128(max), _mm256_extractf128_ps::<1>(max));
    let max = _mm_max_ps(max, _mm_movehl_ps(max, max));
    let max = _mm_cvtss_f32(_mm_max_ss(max, _mm_movehdup_ps(max)));
    let largest = body::largest(max, tail);
    let mut total = _mm256_setzero_ps();
    for chunk in chunks.iter_mut() {
        let y = _mm256_mul_ps(_mm256_sub_ps(load(chunk), _mm256_set1_ps(largest)), _mm256_set1_ps(scale));
        let y = exp_below_88(y);
        store(chunk, y);
        total = _mm256_add_ps(total, y);
    }
    let mut lanes = [0.0; LANES];
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
