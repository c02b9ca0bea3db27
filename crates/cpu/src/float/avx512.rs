//! Float loops for AVX-512: 32 registers of sixteen floats, and multiply-adds that broadcast a float of memory.

use std::arch::x86_64::__m512;

use apr_core::backend::KV_BLOCK;
use apr_core::stats::RowStats;

use super::code_loops::{self, Score, Weigh, strips};
use super::codes::{self, Coded, Pair, Product};
use super::loops::{self, Ahead, tile};
use super::vector::Vector;
use super::{FloatKernels, Gemm, Softmax, body};

table! { "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni", __m512 }

const LANES: usize = <__m512 as Vector>::LANES;

/// Vectors of columns that the last few rows are multiplied with together: one would wait for its own sums.
const WIDE: usize = 4;

/// See [`FloatKernels::score`](super::FloatKernels::score); the caller has checked its bounds.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
fn score(mut p: Product<'_>, of_b: &[f32]) {
    // SAFETY: this function itself runs only where the CPU has the instructions.
    let from = unsafe { strips::<__m512, _, 8, 1>(&mut p, Score(of_b)) };
    codes::score(p, of_b, from);
}

/// See [`FloatKernels::weigh`](super::FloatKernels::weigh); the caller has checked its bounds.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
fn weigh(mut p: Product<'_>) {
    // SAFETY: as above.
    let from = unsafe { strips::<__m512, _, 8, 1>(&mut p, Weigh) };
    codes::weigh(p, from);
}

/// See [`Gemm`]; the caller has checked its bounds. Tiles are of eight rows and one vector of columns: all operands but the latter are
/// floats that a multiply-add takes from memory, so that there is hardly an instruction beside the multiply-adds.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
fn gemm(mut g: Gemm<'_>, b: &[f32]) {
    let (n_wide, in_tiles) = (g.n / LANES * LANES, g.m / 4 * 4);
    let mut ahead = Ahead::new(g.ahead, n_wide / LANES * in_tiles.div_ceil(8).max(1) * g.k.len());
    for j in (0..n_wide).step_by(LANES) {
        let mut i = 0;
        while i < in_tiles {
            // SAFETY: the rows are fewer than `m`, and the columns fewer than `n`.
            i += unsafe {
                match in_tiles - i {
                    4 => tile::<__m512, 4, 1>(&mut g, b, (i, j), &mut ahead),
                    _ => tile::<__m512, 8, 1>(&mut g, b, (i, j), &mut ahead),
                }
            };
        }
    }
    let mut j = 0;
    while in_tiles < g.m && j < n_wide {
        let at = (in_tiles, j);
        // SAFETY: as above.
        unsafe {
            if j + WIDE * LANES <= n_wide {
                match g.m - in_tiles {
                    1 => tile::<__m512, 1, WIDE>(&mut g, b, at, &mut ahead),
                    2 => tile::<__m512, 2, WIDE>(&mut g, b, at, &mut ahead),
                    _ => tile::<__m512, 3, WIDE>(&mut g, b, at, &mut ahead),
                };
                j += WIDE * LANES;
            } else {
                match g.m - in_tiles {
                    1 => tile::<__m512, 1, 1>(&mut g, b, at, &mut ahead),
                    2 => tile::<__m512, 2, 1>(&mut g, b, at, &mut ahead),
                    _ => tile::<__m512, 3, 1>(&mut g, b, at, &mut ahead),
                };
                j += LANES;
            }
        }
    }
    body::gemm_columns::<true>(&mut g, b, n_wide);
}
