//! Float loops for AVX2: sixteen registers of eight floats.

use std::arch::x86_64::__m256;

use apr_core::backend::KV_BLOCK;
use apr_core::stats::RowStats;

use super::code_loops::{self, Score, Weigh, strips};
use super::codes::{self, Coded, Pair, Product};
use super::loops::{self, Ahead, tile};
use super::vector::Vector;
use super::{FloatKernels, Gemm, Softmax, body};

table! { "avx2,fma,f16c", __m256 }

const LANES: usize = <__m256 as Vector>::LANES;

/// Vectors of columns that are multiplied together, and the columns they have.
const C: usize = 2;
const STRIP: usize = C * LANES;

/// See [`FloatKernels::score`](super::FloatKernels::score); the caller has checked its bounds.
#[target_feature(enable = "avx2,fma,f16c")]
fn score(mut p: Product<'_>, of_b: &[f32]) {
    // SAFETY: this function itself runs only where the CPU has the instructions.
    let from = unsafe { strips::<__m256, _, 6, C>(&mut p, Score(of_b)) };
    codes::score(p, of_b, from);
}

/// See [`FloatKernels::weigh`](super::FloatKernels::weigh); the caller has checked its bounds.
#[target_feature(enable = "avx2,fma,f16c")]
fn weigh(mut p: Product<'_>) {
    // SAFETY: as above.
    let from = unsafe { strips::<__m256, _, 6, C>(&mut p, Weigh) };
    codes::weigh(p, from);
}

/// See [`Gemm`]; the caller has checked its bounds.
#[target_feature(enable = "avx2,fma,f16c")]
fn gemm(mut g: Gemm<'_>, b: &[f32]) {
    let n_wide = g.n / STRIP * STRIP;
    let mut ahead = Ahead::new(g.ahead, n_wide / STRIP * g.m.div_ceil(6) * g.k.len());
    for j in (0..n_wide).step_by(STRIP) {
        let mut i = 0;
        while i < g.m {
            // SAFETY: the rows are fewer than `m`, and the columns no more than `n`.
            i += unsafe {
                match g.m - i {
                    1 => tile::<__m256, 1, C>(&mut g, b, (i, j), &mut ahead),
                    2 => tile::<__m256, 2, C>(&mut g, b, (i, j), &mut ahead),
                    3 => tile::<__m256, 3, C>(&mut g, b, (i, j), &mut ahead),
                    4 | 8 => tile::<__m256, 4, C>(&mut g, b, (i, j), &mut ahead),
                    5 => tile::<__m256, 5, C>(&mut g, b, (i, j), &mut ahead),
                    _ => tile::<__m256, 6, C>(&mut g, b, (i, j), &mut ahead),
                }
            };
        }
    }
    body::gemm_columns::<true>(&mut g, b, n_wide);
}
