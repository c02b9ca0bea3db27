//! Float loops for AVX2: sixteen registers of eight floats.

use std::arch::x86_64::__m256;
use std::mem::MaybeUninit;
use std::ops::Range;

use apr_core::stats::RowStats;

use super::loops::{self, Ahead, tile};
use super::vector::{Element, Vector};
use super::{FloatKernels, Gemm, Softmax, body};

table! { "avx2,fma,f16c", __m256 }

const LANES: usize = <__m256 as Vector>::LANES;

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
fn gemm(g: Gemm<'_>, b: &[f32]) {
    product(g, b, |b| b);
}

/// See [`Gemm`]; the caller has checked its bounds.
#[target_feature(enable = "avx2,fma,f16c")]
fn gemm_halves(g: Gemm<'_>, b: &[u16]) {
    product(g, b, |b| half::f16::from_bits(b).to_f32());
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn product<T: Element>(mut g: Gemm<'_>, b: &[T], float: impl Fn(T) -> f32) {
    let (few, k_all, ldb) = (g.m <= FEW_ROWS, g.k.clone(), g.ldb);
    let n_wide = g.n / STRIP * STRIP;
    let mut ahead = Ahead::new(g.ahead, n_wide / STRIP * g.m.div_ceil(6) * k_all.len());
    for j in (0..n_wide).step_by(STRIP) {
        if few {
            // SAFETY: the caller has checked that the last row of `b` has `n` columns, and `j + STRIP <= n`.
            unsafe { gemm_strip(&mut g, (b[k_all.start * ldb + j..].as_ptr(), ldb), j, k_all.clone(), &mut ahead) };
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
            unsafe { gemm_strip(&mut g, (strip.0.as_ptr().cast::<f32>(), STRIP), j, k, &mut ahead) };
        }
    }
    body::gemm_columns::<true, _>(&mut g, b, float, n_wide);
}

/// All rows by a strip of columns from `j` on; `b` is as [`tile`] has it.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
unsafe fn gemm_strip<T: Element>(
    g: &mut Gemm<'_>,
    b: (*const T, usize),
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
                1 => tile::<__m256, T, 1, C>(g, b, (i, j), k, ahead),
                2 => tile::<__m256, T, 2, C>(g, b, (i, j), k, ahead),
                3 => tile::<__m256, T, 3, C>(g, b, (i, j), k, ahead),
                4 | 8 => tile::<__m256, T, 4, C>(g, b, (i, j), k, ahead),
                5 => tile::<__m256, T, 5, C>(g, b, (i, j), k, ahead),
                _ => tile::<__m256, T, 6, C>(g, b, (i, j), k, ahead),
            };
        }
    }
}
