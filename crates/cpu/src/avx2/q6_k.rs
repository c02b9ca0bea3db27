//! Q6_K: six-bit codes, an eight-bit scale per 16 columns.
//!
//! A block has 128 bytes of low nibbles, 64 bytes of upper bit pairs, sixteen scales and `d` (half float). In each
//! half of 128 columns, nibble byte `32 a + i` holds columns `32 a + i` and, in its high half, `64 + 32 a + i`; pair
//! `q` of byte `i` belongs to column `32 q + i`.

use std::arch::x86_64::*;

use super::load::{
    broadcast_half, floats, half_of_each, load16, load16_of_each, load32, load32_of_each, part_of_each, store, store8,
    vector,
};
use super::reduce::{sum_lanes, transpose, transpose_floats, transpose_halves};
use super::tile;
use super::{Format, Strip};
use crate::kernels::{Panel, Q8Block, STRIP};

const BYTES: usize = 210;

pub(super) struct Q6K;

/// The four vectors of codes from two vectors of nibbles and one of upper bits.
#[target_feature(enable = "avx2")]
#[inline]
fn codes(low: [__m256i; 2], high: __m256i) -> [__m256i; 4] {
    let nibble = _mm256_set1_epi8(15);
    let pair = _mm256_set1_epi8(0x30);
    let (a, b) = (_mm256_and_si256(low[0], nibble), _mm256_and_si256(low[1], nibble));
    let c = _mm256_and_si256(_mm256_srli_epi16::<4>(low[0]), nibble);
    let d = _mm256_and_si256(_mm256_srli_epi16::<4>(low[1]), nibble);
    [
        _mm256_or_si256(a, _mm256_and_si256(_mm256_slli_epi16::<4>(high), pair)),
        _mm256_or_si256(b, _mm256_and_si256(_mm256_slli_epi16::<2>(high), pair)),
        _mm256_or_si256(c, _mm256_and_si256(high, pair)),
        _mm256_or_si256(d, _mm256_and_si256(_mm256_srli_epi16::<2>(high), pair)),
    ]
}

/// The integer sums of one row's super-block with a token: lane `j` is that of block `j`.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn row_sums(block: &[u8], x: &Q8Block) -> __m256i {
    let scales = _mm256_cvtepi8_epi16(load16(block, 192));
    let (y, _) = x.codes.as_chunks::<32>();
    let mut sums = [_mm256_setzero_si256(); 8];
    // Both halves' scales in each half of the vector: scales 2 j and 2 j + 1 are one shuffle away from any j.
    let first = _mm256_permute2x128_si256::<0x00>(scales, scales);
    let second = _mm256_permute2x128_si256::<0x11>(scales, scales);
    for half in 0..2 {
        let low = [load32(block, 64 * half), load32(block, 64 * half + 32)];
        let w = codes(low, load32(block, 128 + 32 * half));
        for q in 0..4 {
            let j = q as i16;
            let (a, b) = ((4 * j) | (4 * j + 1) << 8, (4 * j + 2) | (4 * j + 3) << 8);
            let pick = _mm256_set_m128i(_mm_set1_epi16(b), _mm_set1_epi16(a));
            let scale = _mm256_shuffle_epi8(if half == 0 { first } else { second }, pick);
            let products = _mm256_maddubs_epi16(w[q], vector(&y[4 * half + q]));
            sums[4 * half + q] = _mm256_madd_epi16(products, scale);
        }
    }
    let offset = _mm256_madd_epi16(scales, vector(&x.half_sums));
    _mm256_sub_epi32(sum_lanes(sums), _mm256_slli_epi32::<5>(offset))
}

#[target_feature(enable = "avx2,fma,f16c")]
fn gemv(strip: &Strip<'_>, x: &[Q8Block]) -> __m256 {
    let mut acc = _mm256_setzero_ps();
    for s in 0..strip.n_blocks / 8 {
        let blocks = part_of_each(&strip.rows, s * BYTES, BYTES);
        let x_d = floats(&x[s].block_d);
        let mut terms = [_mm256_setzero_ps(); STRIP];
        for r in 0..STRIP {
            let block = blocks[r];
            strip.fetch((s * STRIP + r) * BYTES, BYTES);
            let sums = _mm256_cvtepi32_ps(row_sums(block, &x[s]));
            terms[r] = _mm256_mul_ps(sums, _mm256_mul_ps(broadcast_half(block, 208), x_d));
        }
        for term in transpose_floats(terms) {
            acc = _mm256_add_ps(acc, term);
        }
    }
    acc
}

impl Format for Q6K {
    const TILES_FROM: usize = 2;

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn direct<const N: usize>(strip: &Strip<'_>, x: [&[Q8Block]; N]) -> [__m256; N] {
        let mut y = [_mm256_setzero_ps(); N];
        for t in 0..N {
            y[t] = gemv(strip, x[t]);
        }
        y
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn unpack(strip: &Strip<'_>, s: usize, panel: &mut Panel) {
        let blocks = part_of_each(&strip.rows, s * BYTES, BYTES);
        for half in 0..2 {
            let low0 = transpose(load32_of_each(&blocks, 64 * half));
            let low1 = transpose(load32_of_each(&blocks, 64 * half + 32));
            let high = transpose(load32_of_each(&blocks, 128 + 32 * half));
            for i in 0..8 {
                for (q, w) in codes([low0[i], low1[i]], high[i]).into_iter().enumerate() {
                    store(&mut panel.codes[4 * half + q][i], w);
                }
            }
        }
        // Dword c of a row holds scales 4 c .. 4 c + 4 as signed bytes.
        let scales = transpose_halves(load16_of_each(&blocks, 192));
        for (c, v) in scales.into_iter().enumerate() {
            // 16-bit numbers: scales 0 and 2 of the dword in `even`, 1 and 3 in `odd`.
            let (even, odd) = (_mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(v)), _mm256_srai_epi16::<8>(v));
            for (i, v) in [even, odd].into_iter().enumerate() {
                let lower = _mm256_blend_epi16::<0xaa>(v, _mm256_slli_epi32::<16>(v));
                let upper = _mm256_blend_epi16::<0x55>(v, _mm256_srli_epi32::<16>(v));
                store(&mut panel.scales[4 * c + i], lower);
                store(&mut panel.scales[4 * c + 2 + i], upper);
            }
            let pairs = [
                _mm256_blend_epi16::<0xaa>(even, _mm256_slli_epi32::<16>(odd)),
                _mm256_blend_epi16::<0xaa>(_mm256_srli_epi32::<16>(even), odd),
            ];
            for h in 0..2 {
                store(&mut panel.mins[2 * c + h], _mm256_mullo_epi16(pairs[h], _mm256_set1_epi16(-32)));
            }
        }
        panel.d[0] = store8(half_of_each(&blocks, 208));
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn tile<const N: usize>(panels: &[Panel], n_blocks: usize, x: [&[Q8Block]; N]) -> [__m256; N] {
        tile::blocks_16(panels, n_blocks, x)
    }
}
