//! Q4_K and Q5_K: four- and five-bit codes, six-bit scales and minima per 32 columns.
//!
//! A block is `d` and `dmin` (half floats), twelve bytes of scales and minima, for Q5_K 32 bytes with the codes'
//! fifth bits (bit `j` of byte `i` belongs to column `32 j + i`), and 128 bytes of nibbles (byte `32 k + i` holds
//! columns `64 k + i` and, in its high half, `64 k + 32 + i`).

use std::arch::x86_64::*;

use super::load::{half_vector, load16, load16_of_each, load32, load32_of_each, part_of_each, store, store8, vector};
use super::reduce::{sum_half_lanes, sum_lanes, transpose, transpose_halves};
use super::tile::{self, add_super};
use super::{Format, Strip};
use crate::kernels::{Panel, Q8Block, STRIP};

/// Q5_K where `FIVE`, else Q4_K.
pub(super) struct K45<const FIVE: bool>;

/// The scales (low half) and minima (high half) of a block as sixteen bytes, from its first sixteen.
///
/// Behind `d` and `dmin` stand three dwords: six bits of scales 0-3, six bits of minima 0-3, and the low nibbles of scales
/// and minima 4-7, whose upper two bits are the top of the first two dwords' bytes.
#[target_feature(enable = "avx2")]
#[inline]
fn scales_and_mins(head: __m128i) -> __m128i {
    let six = _mm_shuffle_epi32::<0b10_01_10_01>(head);
    let nibbles = _mm_srlv_epi32(_mm_shuffle_epi32::<0b11_11_11_11>(head), _mm_setr_epi32(0, 4, 0, 4));
    let low = _mm_and_si128(six, _mm_set1_epi8(0x3f));
    let top = _mm_and_si128(_mm_srli_epi32::<2>(six), _mm_set1_epi8(0x30));
    let high = _mm_or_si128(_mm_and_si128(nibbles, _mm_set1_epi8(0x0f)), top);
    _mm_unpacklo_epi32(low, high)
}

/// `d` and `dmin` of eight blocks, from each one's first sixteen bytes.
#[target_feature(enable = "avx2,f16c")]
#[inline]
fn scale_pairs(head: [__m128i; STRIP]) -> (__m256, __m256) {
    let (a, b) = (_mm_unpacklo_epi32(head[0], head[1]), _mm_unpacklo_epi32(head[2], head[3]));
    let (c, d) = (_mm_unpacklo_epi32(head[4], head[5]), _mm_unpacklo_epi32(head[6], head[7]));
    // Dword r: `d` of row r in its low half, `dmin` in its high half.
    let (first, last) = (_mm_unpacklo_epi64(a, b), _mm_unpacklo_epi64(c, d));
    let low = _mm_set1_epi32(0xffff);
    let d = _mm_packus_epi32(_mm_and_si128(first, low), _mm_and_si128(last, low));
    let m = _mm_packus_epi32(_mm_srli_epi32::<16>(first), _mm_srli_epi32::<16>(last));
    (_mm256_cvtph_ps(d), _mm256_cvtph_ps(m))
}

/// Bytes `a` and `b` of every lane as two 16-bit numbers.
#[target_feature(enable = "avx2")]
#[inline]
fn bytes(v: __m256i, a: usize, b: usize) -> __m256i {
    let (a, b) = (a as i32, b as i32);
    let a = _mm256_and_si256(_mm256_srl_epi32(v, _mm_cvtsi32_si128(8 * a)), _mm256_set1_epi32(255));
    let b = _mm256_and_si256(_mm256_srl_epi32(v, _mm_cvtsi32_si128(8 * b)), _mm256_set1_epi32(255));
    _mm256_or_si256(a, _mm256_slli_epi32::<16>(b))
}

/// The integer sums of one row's super-block with a token, not yet reduced: products and minima.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn row_sums<const FIVE: bool>(block: &[u8], head: __m128i, x: &Q8Block) -> (__m256i, __m128i) {
    let scales_mins = _mm256_cvtepu8_epi16(scales_and_mins(head));
    let x_scales = half_vector(&x.scales);
    let scales = _mm_mullo_epi16(_mm256_castsi256_si128(scales_mins), x_scales);
    let mins = _mm_mullo_epi16(_mm256_extracti128_si256::<1>(scales_mins), x_scales);
    let scales = _mm256_broadcastsi128_si256(scales);
    let nibble = _mm256_set1_epi8(15);
    let high = if FIVE { load32(block, 16) } else { nibble };
    let qs = if FIVE { 48 } else { 16 };
    let (codes, _) = x.codes.as_chunks::<32>();
    let mut sum = _mm256_setzero_si256();
    for k in 0..4 {
        let q = load32(block, qs + 32 * k);
        let mut w = [_mm256_and_si256(q, nibble), _mm256_and_si256(_mm256_srli_epi16::<4>(q), nibble)];
        if FIVE {
            w = [fifth(w[0], high, 2 * k), fifth(w[1], high, 2 * k + 1)];
        }
        for h in 0..2 {
            let j = (2 * k + h) as i16;
            let scale = _mm256_shuffle_epi8(scales, _mm256_set1_epi16((2 * j) | (2 * j + 1) << 8));
            let y = _mm256_maddubs_epi16(w[h], vector(&codes[2 * k + h]));
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(y, scale));
        }
    }
    (sum, _mm_madd_epi16(mins, half_vector(&x.sums)))
}

/// Adds bit `j` of every byte of `high` to nibbles as their fifth bit.
#[target_feature(enable = "avx2")]
#[inline]
fn fifth(nibbles: __m256i, high: __m256i, j: usize) -> __m256i {
    let bit = _mm256_set1_epi8((1u8 << j) as i8);
    let set = _mm256_cmpeq_epi8(_mm256_and_si256(high, bit), bit);
    _mm256_or_si256(nibbles, _mm256_and_si256(set, _mm256_set1_epi8(16)))
}

impl<const FIVE: bool> K45<FIVE> {
    const BYTES: usize = if FIVE { 176 } else { 144 };
}

#[target_feature(enable = "avx2,fma,f16c")]
fn gemv<const FIVE: bool>(strip: &Strip<'_>, x: &[Q8Block]) -> __m256 {
    let mut acc = _mm256_setzero_ps();
    let zero = _mm256_setzero_si256();
    for s in 0..strip.n_blocks / 8 {
        let (mut sum, mut min) = ([zero; STRIP], [_mm_setzero_si128(); STRIP]);
        let mut head = [_mm_setzero_si128(); STRIP];
        for r in 0..STRIP {
            let block = &strip.rows[r][s * K45::<FIVE>::BYTES..][..K45::<FIVE>::BYTES];
            strip.fetch((s * STRIP + r) * K45::<FIVE>::BYTES, K45::<FIVE>::BYTES);
            head[r] = load16(block, 0);
            (sum[r], min[r]) = row_sums::<FIVE>(block, head[r], &x[s]);
        }
        let (d, m) = scale_pairs(head);
        acc = add_super(acc, sum_lanes(sum), sum_half_lanes(min), d, m, x[s].d);
    }
    acc
}

impl<const FIVE: bool> Format for K45<FIVE> {
    const TILES_FROM: usize = 2;

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn direct<const N: usize>(strip: &Strip<'_>, x: [&[Q8Block]; N]) -> [__m256; N] {
        let mut y = [_mm256_setzero_ps(); N];
        for t in 0..N {
            y[t] = gemv::<FIVE>(strip, x[t]);
        }
        y
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn unpack(strip: &Strip<'_>, s: usize, panel: &mut Panel) {
        let blocks = part_of_each(&strip.rows, s * Self::BYTES, Self::BYTES);
        let nibble = _mm256_set1_epi8(15);
        let high = if FIVE { transpose(load32_of_each(&blocks, 16)) } else { [nibble; 8] };
        for k in 0..4 {
            let q = transpose(load32_of_each(&blocks, if FIVE { 48 } else { 16 } + 32 * k));
            for i in 0..8 {
                let mut w = [_mm256_and_si256(q[i], nibble), _mm256_and_si256(_mm256_srli_epi16::<4>(q[i]), nibble)];
                if FIVE {
                    w = [fifth(w[0], high[i], 2 * k), fifth(w[1], high[i], 2 * k + 1)];
                }
                store(&mut panel.codes[2 * k][i], w[0]);
                store(&mut panel.codes[2 * k + 1][i], w[1]);
            }
        }
        // Dword 0 and 1 of a row: scales; 2 and 3: minima; as bytes.
        let head = load16_of_each(&blocks, 0);
        let mut packed = [_mm_setzero_si128(); STRIP];
        for r in 0..STRIP {
            packed[r] = scales_and_mins(head[r]);
        }
        let [s0, s1, m0, m1] = transpose_halves(packed);
        for i in 0..4 {
            store(&mut panel.scales[i], bytes(s0, i, i));
            store(&mut panel.scales[4 + i], bytes(s1, i, i));
        }
        for i in 0..2 {
            store(&mut panel.mins[i], bytes(m0, 2 * i, 2 * i + 1));
            store(&mut panel.mins[2 + i], bytes(m1, 2 * i, 2 * i + 1));
        }
        let (d, m) = scale_pairs(head);
        (panel.d[0], panel.m[0]) = (store8(d), store8(m));
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn tile<const N: usize>(panels: &[Panel], _: usize, x: [&[Q8Block]; N]) -> [__m256; N] {
        if FIVE { tile::super_32::<4, N>(panels, x) } else { tile::super_32::<8, N>(panels, x) }
    }
}
