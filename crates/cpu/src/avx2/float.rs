//! F32, F16 and BF16 rows with float activations: tiles of four weight rows and three tokens.
//!
//! Every product is summed in the same order whatever the number of tokens and rows: columns alternate between two
//! accumulators in groups of eight, each summing lane by lane; the columns that fill no group are added to the first as
//! a group padded with zeros. A tile has one accumulator at a time, so it takes a chunk's even groups and then its odd
//! ones.

use std::arch::x86_64::*;
use std::ops::Range;

use apr_core::qtype::GgmlType;

use super::load::{Plain, floats, half_vector, store, store8, vector};
use crate::kernels::{F32Tokens, Out, WeightRows};

/// Pairs of groups of eight columns in a chunk, which is small enough for the first cache to hold four rows of weights,
/// as floats, while tokens pass.
const CHUNK: usize = 32;

/// Weight rows of a tile: with three tokens they fill the registers.
const ROWS: usize = 4;

/// Of even and of odd groups, per row and token, not yet summed over the lanes.
type Sums<const N: usize> = [[[__m256; N]; ROWS]; 2];

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn matmul_f32(w: WeightRows<'_>, x: F32Tokens<'_>, out: &mut Out<'_>) {
    match w.qtype() {
        GgmlType::F32 => matmul::<F32>(w, x, out),
        GgmlType::F16 => matmul::<F16>(w, x, out),
        _ => matmul::<BF16>(w, x, out),
    }
}

/// How eight weights become floats. Unsafe, because it may run only on a CPU with AVX2 and F16C.
trait Weights {
    /// Eight weights.
    type Group: Plain;

    /// The weights that fill whole groups.
    fn groups(bytes: &[u8]) -> &[Self::Group];

    unsafe fn load(group: &Self::Group) -> __m256;
}

struct F32;
struct F16;
struct BF16;

impl Weights for F32 {
    type Group = [u8; 32];

    #[inline(always)]
    fn groups(bytes: &[u8]) -> &[[u8; 32]] {
        bytes.as_chunks().0
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    unsafe fn load(group: &[u8; 32]) -> __m256 {
        _mm256_castsi256_ps(vector(group))
    }
}

impl Weights for F16 {
    type Group = [u8; 16];

    #[inline(always)]
    fn groups(bytes: &[u8]) -> &[[u8; 16]] {
        bytes.as_chunks().0
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    unsafe fn load(group: &[u8; 16]) -> __m256 {
        _mm256_cvtph_ps(half_vector(group))
    }
}

impl Weights for BF16 {
    type Group = [u8; 16];

    #[inline(always)]
    fn groups(bytes: &[u8]) -> &[[u8; 16]] {
        bytes.as_chunks().0
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    unsafe fn load(group: &[u8; 16]) -> __m256 {
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(half_vector(group))))
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn matmul<W: Weights>(w: WeightRows<'_>, x: F32Tokens<'_>, out: &mut Out<'_>) {
    let mut t = 0;
    while t < x.len() {
        t += match x.len() - t {
            1 => tokens::<W, 1, 1>(w, x, t, out),
            2 => tokens::<W, 1, 2>(w, x, t, out),
            3..24 => tokens::<W, 1, 3>(w, x, t, out),
            _ => tokens::<W, 8, 3>(w, x, t, out),
        };
    }
}

/// The products of all rows with the `T * N` tokens from `t` on, in `T` tiles of `N`; returns the number of tokens.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn tokens<W: Weights, const T: usize, const N: usize>(
    w: WeightRows<'_>,
    x: F32Tokens<'_>,
    t: usize,
    out: &mut Out<'_>,
) -> usize {
    let n_cols = w.n_cols();
    let mut x_rows: [[&[f32]; N]; T] = [[&[]; N]; T];
    for tile in 0..T {
        for i in 0..N {
            x_rows[tile][i] = x.row(t + tile * N + i, n_cols);
        }
    }
    let mut wide = [[[[0; 32]; 2]; CHUNK]; ROWS];
    for first in (0..w.n_rows()).step_by(ROWS) {
        let n_rows = ROWS.min(w.n_rows() - first);
        let mut rows: [&[u8]; ROWS] = [&[]; ROWS];
        for r in 0..ROWS {
            rows[r] = w.row(first + r.min(n_rows - 1));
        }
        let mut sums: [Sums<N>; T] = [[[[_mm256_setzero_ps(); N]; ROWS]; 2]; T];
        for from in (0..n_cols / 16).step_by(CHUNK) {
            add_chunk::<W, T, N>(&rows, &x_rows, from..(n_cols / 16).min(from + CHUNK), &mut wide, &mut sums);
        }
        for tile in 0..T {
            if !n_cols.is_multiple_of(16) {
                add_rest::<W, N>(&rows, &x_rows[tile], &mut sums[tile][0]);
            }
            let [a, b] = &sums[tile];
            for i in 0..N {
                let mut both = [_mm256_setzero_ps(); ROWS];
                for r in 0..ROWS {
                    both[r] = _mm256_add_ps(a[r][i], b[r][i]);
                }
                let y = sum_lanes(both);
                out.put(x.out_row(t + tile * N + i), first, &y[..n_rows]);
            }
        }
    }
    T * N
}

/// Adds the products of the pairs of groups `chunk`. `wide` is scratch.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn add_chunk<W: Weights, const T: usize, const N: usize>(
    rows: &[&[u8]; ROWS],
    x_rows: &[[&[f32]; N]; T],
    chunk: Range<usize>,
    wide: &mut [[[[u8; 32]; 2]; CHUNK]; ROWS],
    sums: &mut [Sums<N>; T],
) {
    // Several tiles share the work of turning weights into floats, and then read them in order.
    let widen = T > 1;
    let mut w: [&[[W::Group; 2]]; ROWS] = [&[]; ROWS];
    let mut w_wide: [&[[[u8; 32]; 2]]; ROWS] = [&[]; ROWS];
    for (r, wide) in wide.iter_mut().enumerate() {
        w[r] = &W::groups(rows[r]).as_chunks().0[chunk.clone()];
        if widen {
            for (wide, group) in wide.iter_mut().zip(w[r]) {
                for half in 0..2 {
                    // SAFETY: this function itself runs only with the features that `Weights` asks for.
                    store(&mut wide[half], _mm256_castps_si256(unsafe { W::load(&group[half]) }));
                }
            }
            w_wide[r] = &wide[..w[r].len()];
        }
    }
    for tile in 0..T {
        let mut x: [&[[[f32; 8]; 2]]; N] = [&[]; N];
        for i in 0..N {
            x[i] = &x_rows[tile][i].as_chunks().0.as_chunks().0[chunk.clone()];
        }
        for half in 0..2 {
            if widen {
                add_products::<F32, N>(w_wide, x, half, &mut sums[tile][half]);
            } else {
                add_products::<W, N>(w, x, half, &mut sums[tile][half]);
            }
        }
    }
}

/// Adds the products of either the even or the odd groups of four rows and `N` tokens.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn add_products<W: Weights, const N: usize>(
    mut w: [&[[W::Group; 2]]; ROWS],
    mut x: [&[[[f32; 8]; 2]]; N],
    half: usize,
    sums: &mut [[__m256; N]; ROWS],
) {
    let n = w[0].len();
    // Lengths that are known to be equal spare a check per load.
    for w in &mut w {
        *w = &w[..n];
    }
    for x in &mut x {
        *x = &x[..n];
    }
    let mut acc = *sums;
    for g in 0..n {
        let mut x8 = [_mm256_setzero_ps(); N];
        for i in 0..N {
            x8[i] = floats(&x[i][g][half]);
        }
        for r in 0..ROWS {
            // SAFETY: this function itself runs only with the features that `Weights` asks for.
            let v = unsafe { W::load(&w[r][g][half]) };
            for i in 0..N {
                acc[r][i] = _mm256_fmadd_ps(v, x8[i], acc[r][i]);
            }
        }
    }
    *sums = acc;
}

/// Adds the products of the columns that fill no pair of groups, of which there are fewer than sixteen.
#[target_feature(enable = "avx2,fma,f16c")]
fn add_rest<W: Weights, const N: usize>(rows: &[&[u8]; ROWS], x: &[&[f32]; N], sums: &mut [[__m256; N]; ROWS]) {
    let (n_cols, size) = (x[0].len(), size_of::<W::Group>() / 8);
    for from in (n_cols / 16 * 16..n_cols).step_by(8) {
        let end = n_cols.min(from + 8);
        for r in 0..ROWS {
            let mut bytes = [0u8; 32];
            bytes[..(end - from) * size].copy_from_slice(&rows[r][from * size..end * size]);
            // SAFETY: this function itself runs only with the features that `Weights` asks for.
            let v = unsafe { W::load(&W::groups(&bytes)[0]) };
            for i in 0..N {
                let mut x8 = [0.0f32; 8];
                x8[..end - from].copy_from_slice(&x[i][from..end]);
                sums[r][i] = _mm256_fmadd_ps(v, floats(&x8), sums[r][i]);
            }
        }
    }
}

/// The sums of the lanes of four vectors.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn sum_lanes(v: [__m256; ROWS]) -> [f32; ROWS] {
    let mut quarters = [_mm_setzero_ps(); ROWS];
    for r in 0..ROWS {
        quarters[r] = _mm_add_ps(_mm256_castps256_ps128(v[r]), _mm256_extractf128_ps::<1>(v[r]));
    }
    let [a, b, c, d] = quarters;
    let y = store8(_mm256_castps128_ps256(_mm_hadd_ps(_mm_hadd_ps(a, b), _mm_hadd_ps(c, d))));
    [y[0], y[1], y[2], y[3]]
}
