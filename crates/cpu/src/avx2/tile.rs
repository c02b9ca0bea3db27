//! Tiles: eight unpacked weight rows with one to four tokens.
//!
//! A broadcast dword of a token's codes meets the same four columns of eight rows; `maddubs` results are summed in
//! 16 bits as often as their largest value allows (eight times for codes to 15, four for 31, two for 63) before
//! `madd` widens them.

use std::arch::x86_64::*;

use super::load::{broadcast, floats, vector};
use crate::kernels::{Panel, Q8Block};

/// Unsigned codes with integer scales and minima per 32 columns; `SUMS` results of `maddubs` fit 16 bits.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(super) fn super_32<const SUMS: usize, const N: usize>(panels: &[Panel], x: [&[Q8Block]; N]) -> [__m256; N] {
    let mut acc = [_mm256_setzero_ps(); N];
    for (s, p) in panels.iter().enumerate() {
        let x: [&Q8Block; N] = x.map(|x| &x[s]);
        let mut sum = [_mm256_setzero_si256(); N];
        for j in 0..8 {
            let w: [__m256i; 8] = std::array::from_fn(|i| vector(&p.codes[j][i]));
            let scale = vector(&p.scales[j]);
            for t in 0..N {
                let scale = _mm256_mullo_epi16(scale, broadcast(&x[t].scale_pairs, j));
                for g in 0..8 / SUMS {
                    let y = unsigned_16::<SUMS>(&w, x[t], j, g * SUMS);
                    sum[t] = _mm256_add_epi32(sum[t], _mm256_madd_epi16(y, scale));
                }
            }
        }
        let mut min = [_mm256_setzero_si256(); N];
        for i in 0..4 {
            let m = vector(&p.mins[i]);
            for t in 0..N {
                let m = _mm256_mullo_epi16(m, broadcast(&x[t].scales, i));
                min[t] = _mm256_add_epi32(min[t], _mm256_madd_epi16(m, broadcast(&x[t].sums, i)));
            }
        }
        finish_super(p, &x, &sum, &min, &mut acc);
    }
    acc
}

/// The sum of `SUMS` results of `maddubs` in 16-bit lanes: dwords `from ..` of block `j`.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn unsigned_16<const SUMS: usize>(w: &[__m256i; 8], x: &Q8Block, j: usize, from: usize) -> __m256i {
    let mut y = _mm256_maddubs_epi16(w[from], broadcast(&x.codes, 8 * j + from));
    for i in from + 1..from + SUMS {
        y = _mm256_add_epi16(y, _mm256_maddubs_epi16(w[i], broadcast(&x.codes, 8 * j + i)));
    }
    y
}

/// Adds a super-block's integer sums to the float accumulators.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn finish_super<const N: usize>(
    p: &Panel,
    x: &[&Q8Block; N],
    sum: &[__m256i; N],
    min: &[__m256i; N],
    acc: &mut [__m256; N],
) {
    let (d, m) = (floats(&p.d[0]), floats(&p.m[0]));
    for t in 0..N {
        acc[t] = add_super(acc[t], sum[t], min[t], d, m, x[t].d);
    }
}

/// One step of the sequence of [`crate::kernels`] for types with a super-block sum, for eight rows.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(super) fn add_super(acc: __m256, sum: __m256i, min: __m256i, d: __m256, m: __m256, x_d: f32) -> __m256 {
    let x_d = _mm256_set1_ps(x_d);
    let acc = _mm256_add_ps(acc, _mm256_mul_ps(_mm256_cvtepi32_ps(sum), _mm256_mul_ps(d, x_d)));
    _mm256_sub_ps(acc, _mm256_mul_ps(_mm256_cvtepi32_ps(min), _mm256_mul_ps(m, x_d)))
}

/// Unsigned codes up to 7 with integer scales and minima per 16 columns; where `OFFSET`, the minima are in the scale of
/// the products and are taken off before the sum becomes a float.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(super) fn super_16<const OFFSET: bool, const N: usize>(panels: &[Panel], x: [&[Q8Block]; N]) -> [__m256; N] {
    let mut acc = [_mm256_setzero_ps(); N];
    for (s, p) in panels.iter().enumerate() {
        let x: [&Q8Block; N] = x.map(|x| &x[s]);
        let (mut sum, mut min) = ([_mm256_setzero_si256(); N], [_mm256_setzero_si256(); N]);
        for j in 0..8 {
            let w: [__m256i; 8] = std::array::from_fn(|i| vector(&p.codes[j][i]));
            for t in 0..N {
                let x_scale = broadcast(&x[t].scale_pairs, j);
                for h in 0..2 {
                    let y = unsigned_16::<4>(&w, x[t], j, 4 * h);
                    let scale = _mm256_mullo_epi16(vector(&p.scales[2 * j + h]), x_scale);
                    sum[t] = _mm256_add_epi32(sum[t], _mm256_madd_epi16(y, scale));
                }
                let m = _mm256_mullo_epi16(vector(&p.mins[j]), x_scale);
                min[t] = _mm256_add_epi32(min[t], _mm256_madd_epi16(m, broadcast(&x[t].half_sums, j)));
            }
        }
        if OFFSET {
            for t in 0..N {
                (sum[t], min[t]) = (_mm256_sub_epi32(sum[t], min[t]), _mm256_setzero_si256());
            }
        }
        finish_super(p, &x, &sum, &min, &mut acc);
    }
    acc
}

/// Unsigned codes that stand for `code - offset`, with a float scale per 32 columns, and a float minimum where
/// `MIN`; `SUMS` results of `maddubs` fit 16 bits.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(super) fn blocks_unsigned<const SUMS: usize, const MIN: bool, const N: usize>(
    panels: &[Panel],
    n_blocks: usize,
    x: [&[Q8Block]; N],
    offset: i16,
) -> [__m256; N] {
    let mut acc = [_mm256_setzero_ps(); N];
    let ones = _mm256_set1_epi16(1);
    for b in 0..n_blocks {
        let (p, j) = (&panels[b / 8], b % 8);
        let w: [__m256i; 8] = std::array::from_fn(|i| vector(&p.codes[j][i]));
        for t in 0..N {
            let x = &x[t][b / 8];
            let mut sum = _mm256_set1_epi32(-i32::from(offset) * i32::from(x.sums[j]));
            for g in 0..8 / SUMS {
                sum = _mm256_add_epi32(sum, _mm256_madd_epi16(unsigned_16::<SUMS>(&w, x, j, g * SUMS), ones));
            }
            acc[t] = add_block(acc[t], sum, floats(&p.d[j]), x.block_d[j]);
            if MIN {
                let min = _mm256_mul_ps(floats(&p.m[j]), _mm256_set1_ps(x.block_sum[j]));
                acc[t] = _mm256_add_ps(acc[t], min);
            }
        }
    }
    acc
}

/// One step of the sequence of [`crate::kernels`] for types with a float scale per 32 columns, for eight rows.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(super) fn add_block(acc: __m256, sum: __m256i, d: __m256, x_d: f32) -> __m256 {
    let d = _mm256_mul_ps(d, _mm256_set1_ps(x_d));
    _mm256_add_ps(acc, _mm256_mul_ps(_mm256_cvtepi32_ps(sum), d))
}

/// Unsigned codes to 63 that stand for `code - 32`, with an integer scale per 16 columns and a float per super-block.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(super) fn blocks_16<const N: usize>(panels: &[Panel], n_blocks: usize, x: [&[Q8Block]; N]) -> [__m256; N] {
    let mut acc = [_mm256_setzero_ps(); N];
    for b in 0..n_blocks {
        let (p, j) = (&panels[b / 8], b % 8);
        let w: [__m256i; 8] = std::array::from_fn(|i| vector(&p.codes[j][i]));
        let scales = [vector(&p.scales[2 * j]), vector(&p.scales[2 * j + 1])];
        for t in 0..N {
            let x = &x[t][b / 8];
            // `mins` holds -32 times the scales, so this takes the codes' offset off.
            let mut sum = _mm256_madd_epi16(vector(&p.mins[j]), broadcast(&x.half_sums, j));
            for g in 0..4 {
                let y = _mm256_madd_epi16(unsigned_16::<2>(&w, x, j, 2 * g), scales[g / 2]);
                sum = _mm256_add_epi32(sum, y);
            }
            acc[t] = add_block(acc[t], sum, floats(&p.d[0]), x.block_d[j]);
        }
    }
    acc
}

/// Signed 8-bit codes with a float scale per 32 columns. The sign of a weight moves to the activation, whose codes
/// never are -128, and `128 · 127 · 2` still fits 16 bits.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(super) fn blocks_signed<const N: usize>(panels: &[Panel], n_blocks: usize, x: [&[Q8Block]; N]) -> [__m256; N] {
    let mut acc = [_mm256_setzero_ps(); N];
    let ones = _mm256_set1_epi16(1);
    for b in 0..n_blocks {
        let (p, j) = (&panels[b / 8], b % 8);
        let mut sum = [_mm256_setzero_si256(); N];
        for i in 0..8 {
            let w = vector(&p.codes[j][i]);
            let magnitude = _mm256_abs_epi8(w);
            for t in 0..N {
                let signed = _mm256_sign_epi8(broadcast(&x[t][b / 8].codes, 8 * j + i), w);
                let y = _mm256_madd_epi16(_mm256_maddubs_epi16(magnitude, signed), ones);
                sum[t] = _mm256_add_epi32(sum[t], y);
            }
        }
        for t in 0..N {
            acc[t] = add_block(acc[t], sum[t], floats(&p.d[j]), x[t][b / 8].block_d[j]);
        }
    }
    acc
}
