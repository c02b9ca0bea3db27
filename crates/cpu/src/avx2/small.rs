//! The types with blocks of 32 columns: Q8_0, and the four- and five-bit Q4_0, Q4_1, Q5_0, Q5_1.
//!
//! A block is `d`, for the `_1` types `m` (half floats), for five bits a word with the codes' fifth bits (bit `c` for
//! column `c`), and the codes: bytes, or nibbles whose low halves are the first 16 columns. Codes of `_0` types are
//! offset by half their range.

use std::arch::x86_64::*;

use super::load::{
    floats, half_bits, half_of_each, half_vector, halves, load4, load4_of_each, load16, load16_of_each, load32,
    load32_of_each, part_of_each, prefetch, store, store8, vector,
};
use super::reduce::{sum_lanes, transpose, transpose_floats, transpose_halves};
use super::tile;
use super::{Format, Strip};
use crate::kernels::{Panel, Q8Block, STRIP};

/// Q8_0.
pub(super) struct Q8;

/// Q4_0 and its like: with minima where `MIN`, five bits where `FIVE`.
pub(super) struct Nibbles<const MIN: bool, const FIVE: bool>;

/// The products of a strip with one token, from `terms` of each row's super-block: lane `j` of the first vector is
/// what block `j` adds to the sum, that of the second (where `MIN`) what its minimum adds.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn gemv<const MIN: bool, const BYTES: usize>(
    strip: &Strip<'_>,
    x: &[Q8Block],
    terms: impl Fn(&[u8], &Q8Block) -> (__m256, __m256),
) -> __m256 {
    let mut acc = _mm256_setzero_ps();
    let mut padded = [0u8; 8 * 34];
    for s in 0..strip.n_blocks.div_ceil(8) {
        let mut products = [_mm256_setzero_ps(); STRIP];
        let mut mins = products;
        for r in 0..STRIP {
            let rest = &strip.rows[r][8 * s * BYTES..];
            for line in 0..BYTES.div_ceil(8) {
                prefetch(rest, strip.ahead + 64 * line);
            }
            let blocks = if rest.len() >= 8 * BYTES {
                &rest[..8 * BYTES]
            } else {
                // The row ends within this super-block; what the padding gives is not added.
                padded[..rest.len()].copy_from_slice(rest);
                &padded[..8 * BYTES]
            };
            (products[r], mins[r]) = terms(blocks, &x[s]);
        }
        let products = transpose_floats(products);
        let mins = if MIN { transpose_floats(mins) } else { products };
        for j in 0..8.min(strip.n_blocks - 8 * s) {
            acc = _mm256_add_ps(acc, products[j]);
            if MIN {
                acc = _mm256_add_ps(acc, mins[j]);
            }
        }
    }
    acc
}

/// `f32(sums) · (d · x_d)` for the eight blocks of a super-block.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn scaled(sums: __m256i, d: __m256, x: &Q8Block) -> __m256 {
    _mm256_mul_ps(_mm256_cvtepi32_ps(sums), _mm256_mul_ps(d, floats(&x.block_d)))
}

/// The half floats at byte `at` of eight blocks.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn half_of_blocks<const BYTES: usize>(blocks: &[u8], at: usize) -> __m256 {
    let mut v = [0; 8];
    for j in 0..8 {
        v[j] = half_bits(blocks, j * BYTES + at);
    }
    halves(v)
}

/// The two half floats in each dword, as two vectors.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn two_halves([a, b, c, d, e, f, g, h]: [i32; 8]) -> [__m256; 2] {
    let v = _mm256_setr_epi32(a, b, c, d, e, f, g, h);
    let v = _mm256_packus_epi32(_mm256_and_si256(v, _mm256_set1_epi32(0xffff)), _mm256_srli_epi32::<16>(v));
    let v = _mm256_permute4x64_epi64::<0b11_01_10_00>(v);
    [_mm256_cvtph_ps(_mm256_castsi256_si128(v)), _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(v))]
}

impl Q8 {
    const BYTES: usize = 34;

    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    fn terms(blocks: &[u8], x: &Q8Block) -> (__m256, __m256) {
        let (codes, _) = x.codes.as_chunks::<32>();
        let ones = _mm256_set1_epi16(1);
        let mut sums = [_mm256_setzero_si256(); 8];
        for j in 0..8 {
            let w = load32(blocks, j * Self::BYTES + 2);
            let signed = _mm256_sign_epi8(vector(&codes[j]), w);
            sums[j] = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(w), signed), ones);
        }
        (scaled(sum_lanes(sums), half_of_blocks::<{ Self::BYTES }>(blocks, 0), x), _mm256_setzero_ps())
    }
}

impl Format for Q8 {
    const TILES_FROM: usize = 2;

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn gemv(strip: &Strip<'_>, x: &[Q8Block]) -> __m256 {
        gemv::<false, { Self::BYTES }>(strip, x, |blocks, x| Self::terms(blocks, x))
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn unpack(strip: &Strip<'_>, s: usize, panel: &mut Panel) {
        for j in 0..8.min(strip.n_blocks - 8 * s) {
            let at = (8 * s + j) * Self::BYTES;
            let blocks = part_of_each(&strip.rows, at, Self::BYTES);
            for (i, w) in transpose(load32_of_each(&blocks, 2)).into_iter().enumerate() {
                store(&mut panel.codes[j][i], w);
            }
            panel.d[j] = store8(half_of_each(&blocks, 0));
        }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn tile<const N: usize>(panels: &[Panel], n_blocks: usize, x: [&[Q8Block]; N]) -> [__m256; N] {
        tile::blocks_signed(panels, n_blocks, x)
    }
}

/// Bits 0 to 3 of every lane, each as bit 4 of a byte of its own.
#[target_feature(enable = "avx2")]
#[inline]
fn spread_bits(v: __m256i) -> __m256i {
    let apart = _mm256_mullo_epi32(_mm256_and_si256(v, _mm256_set1_epi32(15)), _mm256_set1_epi32(0x0020_4081));
    _mm256_slli_epi32::<4>(_mm256_and_si256(apart, _mm256_set1_epi32(0x0101_0101)))
}

/// Bit `c` of `bits` as bit 4 of byte `c`.
#[target_feature(enable = "avx2")]
#[inline]
fn bits_to_bytes(bits: i32) -> __m256i {
    let (a, b) = (0x0101_0101_0101_0101, 0x0202_0202_0202_0202);
    let byte = _mm256_setr_epi64x(0, a, b, a + b);
    let bit = _mm256_set1_epi64x(0x8040_2010_0804_0201u64 as i64);
    let v = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(bits), byte), bit);
    _mm256_and_si256(_mm256_cmpeq_epi8(v, bit), _mm256_set1_epi8(16))
}

impl<const MIN: bool, const FIVE: bool> Nibbles<MIN, FIVE> {
    const HIGH: usize = if MIN { 4 } else { 2 };
    const QS: usize = Self::HIGH + if FIVE { 4 } else { 0 };
    const BYTES: usize = Self::QS + 16;
    /// What a code is offset by.
    const OFFSET: i16 = match (MIN, FIVE) {
        (true, _) => 0,
        (false, false) => 8,
        (false, true) => 16,
    };

    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    fn terms<const BYTES: usize>(blocks: &[u8], x: &Q8Block) -> (__m256, __m256) {
        let (codes, _) = x.codes.as_chunks::<32>();
        let ones = _mm256_set1_epi16(1);
        let mut sums = [_mm256_setzero_si256(); 8];
        for j in 0..8 {
            let q = load16(blocks, j * BYTES + Self::QS);
            let q = _mm256_set_m128i(_mm_srli_epi16::<4>(q), q);
            let mut w = _mm256_and_si256(q, _mm256_set1_epi8(15));
            if FIVE {
                w = _mm256_or_si256(w, bits_to_bytes(load4(blocks, j * BYTES + Self::HIGH)));
            }
            sums[j] = _mm256_madd_epi16(_mm256_maddubs_epi16(w, vector(&codes[j])), ones);
        }
        let mut sums = sum_lanes(sums);
        if !MIN {
            let x_sums = _mm256_cvtepi16_epi32(half_vector(&x.sums));
            let offset = _mm256_set1_epi32(Self::OFFSET.into());
            sums = _mm256_sub_epi32(sums, _mm256_mullo_epi32(x_sums, offset));
        }
        if MIN {
            let mut pairs = [0; 8];
            for j in 0..8 {
                pairs[j] = load4(blocks, j * BYTES);
            }
            let [d, m] = two_halves(pairs);
            (scaled(sums, d, x), _mm256_mul_ps(m, floats(&x.block_sum)))
        } else {
            (scaled(sums, half_of_blocks::<BYTES>(blocks, 0), x), _mm256_setzero_ps())
        }
    }
}

impl<const MIN: bool, const FIVE: bool> Format for Nibbles<MIN, FIVE> {
    const TILES_FROM: usize = 2;

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn gemv(strip: &Strip<'_>, x: &[Q8Block]) -> __m256 {
        match (MIN, FIVE) {
            (false, false) => gemv::<MIN, 18>(strip, x, |blocks, x| Self::terms::<18>(blocks, x)),
            (true, false) => gemv::<MIN, 20>(strip, x, |blocks, x| Self::terms::<20>(blocks, x)),
            (false, true) => gemv::<MIN, 22>(strip, x, |blocks, x| Self::terms::<22>(blocks, x)),
            (true, true) => gemv::<MIN, 24>(strip, x, |blocks, x| Self::terms::<24>(blocks, x)),
        }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn unpack(strip: &Strip<'_>, s: usize, panel: &mut Panel) {
        let nibble = _mm256_set1_epi8(15);
        for j in 0..8.min(strip.n_blocks - 8 * s) {
            let at = (8 * s + j) * Self::BYTES;
            let blocks = part_of_each(&strip.rows, at, Self::BYTES);
            let q = transpose_halves(load16_of_each(&blocks, Self::QS));
            let [a, b, c, d, e, f, g, h] = if FIVE { load4_of_each(&blocks, Self::HIGH) } else { [0; 8] };
            let mut high = _mm256_setr_epi32(a, b, c, d, e, f, g, h);
            let halves_of = [q, q.map(|q| _mm256_srli_epi16::<4>(q))];
            for (i, q) in halves_of.into_iter().flatten().enumerate() {
                let mut w = _mm256_and_si256(q, nibble);
                if FIVE {
                    w = _mm256_or_si256(w, spread_bits(high));
                    high = _mm256_srli_epi32::<4>(high);
                }
                store(&mut panel.codes[j][i], w);
            }
            if MIN {
                [panel.d[j], panel.m[j]] = two_halves(load4_of_each(&blocks, 0)).map(|v| store8(v));
            } else {
                panel.d[j] = store8(half_of_each(&blocks, 0));
            }
        }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn tile<const N: usize>(panels: &[Panel], n_blocks: usize, x: [&[Q8Block]; N]) -> [__m256; N] {
        match FIVE {
            true => tile::blocks_unsigned::<4, MIN, N>(panels, n_blocks, x, Self::OFFSET),
            false => tile::blocks_unsigned::<8, MIN, N>(panels, n_blocks, x, Self::OFFSET),
        }
    }
}
