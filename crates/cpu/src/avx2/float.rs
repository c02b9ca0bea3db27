//! F32, F16 and BF16 rows with float activations: two accumulators of eight lanes per token, four tokens at a time.
//!
//! Every product is summed in the same order whatever the number of tokens and rows: columns alternate between the
//! accumulators in groups of eight, the columns that fill no group are added to the first as a group padded with zeros.

use std::arch::x86_64::*;

use apr_core::qtype::GgmlType;

use super::load::{floats, load16, load32, store8};
use crate::kernels::{F32Tokens, Out, WeightRows};

/// Tokens whose activations stay in the second cache while all weight rows pass.
const TOKENS_IN_CACHE: usize = 16;

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn matmul_f32(w: WeightRows<'_>, x: F32Tokens<'_>, out: &mut Out<'_>) {
    match w.qtype() {
        GgmlType::F32 => matmul::<4, F32>(w, x, out),
        GgmlType::F16 => matmul::<2, F16>(w, x, out),
        _ => matmul::<2, BF16>(w, x, out),
    }
}

/// How eight weights become floats. Unsafe, because it may run only on a CPU with AVX2 and F16C.
trait Weights {
    unsafe fn load(row: &[u8], at: usize) -> __m256;
}

struct F32;
struct F16;
struct BF16;

impl Weights for F32 {
    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    unsafe fn load(row: &[u8], at: usize) -> __m256 {
        _mm256_castsi256_ps(load32(row, at))
    }
}

impl Weights for F16 {
    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    unsafe fn load(row: &[u8], at: usize) -> __m256 {
        _mm256_cvtph_ps(load16(row, at))
    }
}

impl Weights for BF16 {
    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    unsafe fn load(row: &[u8], at: usize) -> __m256 {
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(load16(row, at))))
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn matmul<const BYTES: usize, W: Weights>(w: WeightRows<'_>, x: F32Tokens<'_>, out: &mut Out<'_>) {
    for first in (0..x.len()).step_by(TOKENS_IN_CACHE) {
        let end = x.len().min(first + TOKENS_IN_CACHE);
        for r in 0..w.n_rows() {
            let mut t = first;
            while t < end {
                t += match end - t {
                    1 => dots::<BYTES, W, 1>(&w, r, x, t, out),
                    2 => dots::<BYTES, W, 2>(&w, r, x, t, out),
                    3 => dots::<BYTES, W, 3>(&w, r, x, t, out),
                    _ => dots::<BYTES, W, 4>(&w, r, x, t, out),
                };
            }
        }
    }
}

/// The products of row `r` with tokens `t .. t + N`; returns `N`.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn dots<const BYTES: usize, W: Weights, const N: usize>(
    w: &WeightRows<'_>,
    r: usize,
    x: F32Tokens<'_>,
    t: usize,
    out: &mut Out<'_>,
) -> usize {
    let (row, n_cols) = (w.row(r), w.n_cols());
    let x_rows: [&[f32]; N] = std::array::from_fn(|i| x.row(t + i, n_cols));
    let x8: [&[[f32; 8]]; N] = x_rows.map(|x| x.as_chunks::<8>().0);
    let mut acc = [[_mm256_setzero_ps(); 2]; N];
    for g in 0..n_cols / 8 {
        // SAFETY: this function itself runs only with the features that `Weights` asks for.
        let v = unsafe { W::load(row, 8 * BYTES * g) };
        for i in 0..N {
            acc[i][g % 2] = _mm256_fmadd_ps(v, floats(&x8[i][g]), acc[i][g % 2]);
        }
    }
    let tail = n_cols / 8 * 8;
    if tail < n_cols {
        let mut bytes = [0u8; 32];
        bytes[..row.len() - tail * BYTES].copy_from_slice(&row[tail * BYTES..]);
        // SAFETY: as above.
        let v = unsafe { W::load(&bytes, 0) };
        for i in 0..N {
            let mut x = [0.0f32; 8];
            x[..n_cols - tail].copy_from_slice(&x_rows[i][tail..]);
            acc[i][0] = _mm256_fmadd_ps(v, floats(&x), acc[i][0]);
        }
    }
    for (i, [a, b]) in acc.into_iter().enumerate() {
        let v = store8(_mm256_add_ps(a, b));
        let sum = ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
        out.put(x.out_row(t + i), r, &[sum]);
    }
    N
}
