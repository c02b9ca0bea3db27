//! Tiles: unpacked weight rows with groups of eight tokens.
//!
//! A dword of a weight row, four columns, is broadcast and meets the same columns of eight tokens, one in each lane, for
//! one to four such groups. The tokens' vectors are operands in memory, so that a multiplication costs no load of its
//! own: with the sides swapped, every multiplication would need a broadcast from memory first, a third more
//! instructions. `maddubs` results are summed in 16 bits as often as their largest value allows (eight times for codes
//! to 15, four for 31, two for 63) before `madd` widens them.

use std::arch::x86_64::*;

use super::load::{broadcast, broadcast_float, floats, vector};
use crate::kernels::{Lanes, Panel};

/// Integer sums of `R` rows with `T` groups of tokens.
type Sums<const R: usize, const T: usize> = [[__m256i; T]; R];

/// Float sums of `R` rows with `T` groups of tokens.
pub(super) type Acc<const R: usize, const T: usize> = [[__m256; T]; R];

/// Unsigned codes with integer scales and minima per 32 columns; `SUMS` results of `maddubs` fit 16 bits.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(super) fn super_32<const SUMS: usize, const R: usize, const T: usize>(
    p: &Panel,
    r: usize,
    x: &[Lanes; T],
    acc: &mut Acc<R, T>,
) {
    let mut sum = [[_mm256_setzero_si256(); T]; R];
    for j in 0..8 {
        for g in 0..8 / SUMS {
            let y = unsigned_16::<SUMS, R, T>(p, r, x, j, g * SUMS);
            for k in 0..R {
                let scale = broadcast(&p.scales[j], r + k);
                for t in 0..T {
                    let scale = _mm256_mullo_epi16(scale, vector(&x[t].scale_pairs[j]));
                    sum[k][t] = _mm256_add_epi32(sum[k][t], _mm256_madd_epi16(y[k][t], scale));
                }
            }
        }
    }
    let mut min = [[_mm256_setzero_si256(); T]; R];
    for i in 0..4 {
        for k in 0..R {
            let m = broadcast(&p.mins[i], r + k);
            for t in 0..T {
                let m = _mm256_mullo_epi16(m, vector(&x[t].scales[i]));
                min[k][t] = _mm256_add_epi32(min[k][t], _mm256_madd_epi16(m, vector(&x[t].sums[i])));
            }
        }
    }
    finish_super(p, r, x, &sum, &min, acc);
}

/// The sums of `SUMS` results of `maddubs` in 16-bit lanes: dwords `from ..` of block `j`.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn unsigned_16<const SUMS: usize, const R: usize, const T: usize>(
    p: &Panel,
    r: usize,
    x: &[Lanes; T],
    j: usize,
    from: usize,
) -> Sums<R, T> {
    let mut y = [[_mm256_setzero_si256(); T]; R];
    for i in from..from + SUMS {
        for k in 0..R {
            let w = broadcast(&p.codes[j][i], r + k);
            for t in 0..T {
                let product = _mm256_maddubs_epi16(w, vector(&x[t].codes[8 * j + i]));
                y[k][t] = if i == from { product } else { _mm256_add_epi16(y[k][t], product) };
            }
        }
    }
    y
}

/// Adds a super-block's integer sums to the float accumulators.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn finish_super<const R: usize, const T: usize>(
    p: &Panel,
    r: usize,
    x: &[Lanes; T],
    sum: &Sums<R, T>,
    min: &Sums<R, T>,
    acc: &mut Acc<R, T>,
) {
    for k in 0..R {
        let (d, m) = (broadcast_float(&p.d[0], r + k), broadcast_float(&p.m[0], r + k));
        for t in 0..T {
            acc[k][t] = add_super(acc[k][t], sum[k][t], min[k][t], d, m, floats(&x[t].d));
        }
    }
}

/// One step of the sequence of [`crate::kernels`] for types with a super-block sum, in every lane.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(super) fn add_super(acc: __m256, sum: __m256i, min: __m256i, d: __m256, m: __m256, x_d: __m256) -> __m256 {
    let acc = _mm256_add_ps(acc, _mm256_mul_ps(_mm256_cvtepi32_ps(sum), _mm256_mul_ps(d, x_d)));
    _mm256_sub_ps(acc, _mm256_mul_ps(_mm256_cvtepi32_ps(min), _mm256_mul_ps(m, x_d)))
}

/// Unsigned codes up to 7 with integer scales and minima per 16 columns; where `OFFSET`, the minima are in the scale of
/// the products and are taken off before the sum becomes a float.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(super) fn super_16<const OFFSET: bool, const R: usize, const T: usize>(
    p: &Panel,
    r: usize,
    x: &[Lanes; T],
    acc: &mut Acc<R, T>,
) {
    let (mut sum, mut min) = ([[_mm256_setzero_si256(); T]; R], [[_mm256_setzero_si256(); T]; R]);
    for j in 0..8 {
        for h in 0..2 {
            let y = unsigned_16::<4, R, T>(p, r, x, j, 4 * h);
            for k in 0..R {
                let scale = broadcast(&p.scales[2 * j + h], r + k);
                for t in 0..T {
                    let scale = _mm256_mullo_epi16(scale, vector(&x[t].scale_pairs[j]));
                    sum[k][t] = _mm256_add_epi32(sum[k][t], _mm256_madd_epi16(y[k][t], scale));
                }
            }
        }
        for k in 0..R {
            let m = broadcast(&p.mins[j], r + k);
            for t in 0..T {
                let m = _mm256_mullo_epi16(m, vector(&x[t].scale_pairs[j]));
                min[k][t] = _mm256_add_epi32(min[k][t], _mm256_madd_epi16(m, vector(&x[t].half_sums[j])));
            }
        }
    }
    if OFFSET {
        for k in 0..R {
            for t in 0..T {
                (sum[k][t], min[k][t]) = (_mm256_sub_epi32(sum[k][t], min[k][t]), _mm256_setzero_si256());
            }
        }
    }
    finish_super(p, r, x, &sum, &min, acc);
}

/// Unsigned codes that stand for `code - offset`, with a float scale per 32 columns, and a float minimum where
/// `MIN`; `SUMS` results of `maddubs` fit 16 bits.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(super) fn blocks_unsigned<const SUMS: usize, const MIN: bool, const R: usize, const T: usize>(
    p: &Panel,
    n_blocks: usize,
    r: usize,
    x: &[Lanes; T],
    offset: i16,
    acc: &mut Acc<R, T>,
) {
    let ones = _mm256_set1_epi16(1);
    for j in 0..n_blocks {
        let mut sum = [[_mm256_setzero_si256(); T]; R];
        for t in 0..T {
            let offset = _mm256_madd_epi16(vector(&x[t].half_sums[j]), _mm256_set1_epi16(-offset));
            for k in 0..R {
                sum[k][t] = offset;
            }
        }
        for g in 0..8 / SUMS {
            let y = unsigned_16::<SUMS, R, T>(p, r, x, j, g * SUMS);
            for k in 0..R {
                for t in 0..T {
                    sum[k][t] = _mm256_add_epi32(sum[k][t], _mm256_madd_epi16(y[k][t], ones));
                }
            }
        }
        add_blocks(p, j, r, j, x, &sum, acc);
        if MIN {
            for k in 0..R {
                let m = broadcast_float(&p.m[j], r + k);
                for t in 0..T {
                    acc[k][t] = _mm256_add_ps(acc[k][t], _mm256_mul_ps(m, floats(&x[t].block_sum[j])));
                }
            }
        }
    }
}

/// Adds the integer sums of block `j`, whose float scales are the `d_at`-th, to the float accumulators.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn add_blocks<const R: usize, const T: usize>(
    p: &Panel,
    d_at: usize,
    r: usize,
    j: usize,
    x: &[Lanes; T],
    sum: &Sums<R, T>,
    acc: &mut Acc<R, T>,
) {
    for k in 0..R {
        let d = broadcast_float(&p.d[d_at], r + k);
        for t in 0..T {
            acc[k][t] = add_block(acc[k][t], sum[k][t], d, floats(&x[t].block_d[j]));
        }
    }
}

/// One step of the sequence of [`crate::kernels`] for types with a float scale per 32 columns, in every lane.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(super) fn add_block(acc: __m256, sum: __m256i, d: __m256, x_d: __m256) -> __m256 {
    _mm256_add_ps(acc, _mm256_mul_ps(_mm256_cvtepi32_ps(sum), _mm256_mul_ps(d, x_d)))
}

/// Unsigned codes to 63 that stand for `code - 32`, with an integer scale per 16 columns and a float per super-block.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(super) fn blocks_16<const R: usize, const T: usize>(p: &Panel, r: usize, x: &[Lanes; T], acc: &mut Acc<R, T>) {
    for j in 0..8 {
        let mut sum = [[_mm256_setzero_si256(); T]; R];
        for k in 0..R {
            // `mins` holds -32 times the scales, so this takes the codes' offset off.
            let offset = broadcast(&p.mins[j], r + k);
            for t in 0..T {
                sum[k][t] = _mm256_madd_epi16(offset, vector(&x[t].half_sums[j]));
            }
        }
        for g in 0..4 {
            let y = unsigned_16::<2, R, T>(p, r, x, j, 2 * g);
            for k in 0..R {
                let scale = broadcast(&p.scales[2 * j + g / 2], r + k);
                for t in 0..T {
                    sum[k][t] = _mm256_add_epi32(sum[k][t], _mm256_madd_epi16(y[k][t], scale));
                }
            }
        }
        add_blocks(p, 0, r, j, x, &sum, acc);
    }
}

/// Signed 8-bit codes with a float scale per 32 columns. The sign of a weight moves to the activation, whose codes
/// never are -128, and `128 · 127 · 2` still fits 16 bits.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(super) fn blocks_signed<const R: usize, const T: usize>(
    p: &Panel,
    n_blocks: usize,
    r: usize,
    x: &[Lanes; T],
    acc: &mut Acc<R, T>,
) {
    let ones = _mm256_set1_epi16(1);
    for j in 0..n_blocks {
        let mut sum = [[_mm256_setzero_si256(); T]; R];
        for i in 0..8 {
            for k in 0..R {
                let w = broadcast(&p.codes[j][i], r + k);
                let magnitude = _mm256_abs_epi8(w);
                for t in 0..T {
                    let signed = _mm256_sign_epi8(vector(&x[t].codes[8 * j + i]), w);
                    let y = _mm256_madd_epi16(_mm256_maddubs_epi16(magnitude, signed), ones);
                    sum[k][t] = _mm256_add_epi32(sum[k][t], y);
                }
            }
        }
        add_blocks(p, j, r, j, x, &sum, acc);
    }
}
