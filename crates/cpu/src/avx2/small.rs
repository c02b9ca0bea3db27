//! The types with blocks of 32 columns: Q8_0, and the four- and five-bit Q4_0, Q4_1, Q5_0, Q5_1.
//!
//! A block is `d`, for the `_1` types `m` (half floats), for five bits a word with the codes' fifth bits (bit `c` for
//! column `c`), and the codes: bytes, or nibbles whose low halves are the first 16 columns. Codes of `_0` types are
//! offset by half their range.

use std::arch::x86_64::*;

use super::direct::{self, Blocks};
use super::load::{half_of_each, load4, load4_of_each, load16_of_each, load32_of_each, part_of_each, store, store8};
use super::reduce::{transpose, transpose_halves};
use super::tile::{self, Acc, Rows};
use super::{Format, Strip};
use crate::kernels::{Lanes, Panel, Q8Block, STRIP};

/// Q8_0.
pub(super) struct Q8;

/// Q4_0 and its like: with minima where `MIN`, five bits where `FIVE`.
pub(super) struct Nibbles<const MIN: bool, const FIVE: bool>;

/// The products of a strip with `N` tokens; `step` adds those of a block, given each row's bytes, the tokens'
/// super-blocks and its number in them.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
pub(super) fn each_block<const BYTES: usize, const N: usize>(
    strip: &Strip<'_>,
    x: [&[Q8Block]; N],
    step: impl Fn([__m256; N], Blocks<'_, BYTES>, [&Q8Block; N], usize) -> [__m256; N],
) -> [__m256; N] {
    let mut acc = [_mm256_setzero_ps(); N];
    let rows = direct::rows_of(strip);
    for b in 0..rows[0].len() {
        strip.fetch(b * STRIP * BYTES, STRIP * BYTES);
        acc = step(acc, direct::nth(&rows, b), direct::super_block(&x, b / 8), b % 8);
    }
    acc
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
    pub(super) const BYTES: usize = 34;

    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    fn step<const N: usize>(
        mut acc: [__m256; N],
        blocks: Blocks<'_, { Self::BYTES }>,
        x: [&Q8Block; N],
        j: usize,
    ) -> [__m256; N] {
        let w = [direct::pairs(&blocks, 2), direct::pairs(&blocks, 18)];
        let [d, _] = direct::first_two_halves(&blocks);
        for t in 0..N {
            acc[t] = tile::add_block(acc[t], direct::signed_sum(&w, x[t], j), d, _mm256_set1_ps(x[t].block_d[j]));
        }
        acc
    }
}

impl Format for Q8 {
    const TILES_FROM: usize = 9;

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn direct<const N: usize>(strip: &Strip<'_>, x: [&[Q8Block]; N]) -> [__m256; N] {
        each_block(strip, x, |a, b, x, j| Self::step(a, b, x, j))
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn unpack<const DOT: bool>(strip: &Strip<'_>, s: usize, panel: &mut Panel) {
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
    unsafe fn tile<const L: usize, const N: usize>(
        w: Rows<'_, L>,
        n_blocks: usize,
        x: &[&Lanes<L>; N],
        acc: &mut Acc<N>,
    ) {
        tile::blocks_signed(w, n_blocks, x, acc)
    }
}

/// Bits 0 to 3 of every lane, each as bit 4 of a byte of its own.
#[target_feature(enable = "avx2")]
#[inline]
fn spread_bits(v: __m256i) -> __m256i {
    let apart = _mm256_mullo_epi32(_mm256_and_si256(v, _mm256_set1_epi32(15)), _mm256_set1_epi32(0x0020_4081));
    _mm256_slli_epi32::<4>(_mm256_and_si256(apart, _mm256_set1_epi32(0x0101_0101)))
}

impl<const MIN: bool, const FIVE: bool> Nibbles<MIN, FIVE> {
    pub(super) const HIGH: usize = if MIN { 4 } else { 2 };
    pub(super) const QS: usize = Self::HIGH + if FIVE { 4 } else { 0 };
    pub(super) const BYTES: usize = Self::QS + 16;
    /// What a code is offset by.
    pub(super) const OFFSET: i16 = match (MIN, FIVE) {
        (true, _) => 0,
        (false, false) => 8,
        (false, true) => 16,
    };
}

/// Bit `c` of the upper or lower half of `bits` as bit 4 of byte `c` of a half vector; the bits of row `i + 4` above.
#[target_feature(enable = "avx2")]
#[inline]
fn fifth_bits<const BYTES: usize>(blocks: &Blocks<'_, BYTES>, at: usize) -> [[__m256i; 4]; 2] {
    let (a, b) = (0x0101_0101_0101_0101, 0x0202_0202_0202_0202);
    let bit = _mm256_set1_epi64x(0x8040_2010_0804_0201u64 as i64);
    let mut v = [[bit; 4]; 2];
    for i in 0..4 {
        let bits = _mm256_set_m128i(_mm_set1_epi32(load4(blocks[i + 4], at)), _mm_set1_epi32(load4(blocks[i], at)));
        for h in 0..2 {
            let byte = if h == 0 { _mm256_setr_epi64x(0, a, 0, a) } else { _mm256_setr_epi64x(b, a + b, b, a + b) };
            let one = _mm256_and_si256(_mm256_shuffle_epi8(bits, byte), bit);
            v[h][i] = _mm256_and_si256(_mm256_cmpeq_epi8(one, bit), _mm256_set1_epi8(16));
        }
    }
    v
}

impl<const MIN: bool, const FIVE: bool> Nibbles<MIN, FIVE> {
    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    fn step<const BYTES: usize, const N: usize>(
        mut acc: [__m256; N],
        blocks: Blocks<'_, BYTES>,
        x: [&Q8Block; N],
        j: usize,
    ) -> [__m256; N] {
        let mut w = direct::nibbles(direct::pairs(&blocks, Self::QS));
        if FIVE {
            let high = fifth_bits(&blocks, Self::HIGH);
            for h in 0..2 {
                for i in 0..4 {
                    w[h][i] = _mm256_or_si256(w[h][i], high[h][i]);
                }
            }
        }
        let [d, m] = direct::first_two_halves(&blocks);
        for t in 0..N {
            let sum = direct::unsigned_sum::<FIVE>(&w, x[t], j, Self::OFFSET);
            acc[t] = tile::add_block(acc[t], sum, d, _mm256_set1_ps(x[t].block_d[j]));
            if MIN {
                acc[t] = _mm256_add_ps(acc[t], _mm256_mul_ps(m, _mm256_set1_ps(x[t].block_sum[j])));
            }
        }
        acc
    }
}

impl<const MIN: bool, const FIVE: bool> Format for Nibbles<MIN, FIVE> {
    const TILES_FROM: usize = if FIVE { 5 } else { 9 };

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn direct<const N: usize>(strip: &Strip<'_>, x: [&[Q8Block]; N]) -> [__m256; N] {
        match (MIN, FIVE) {
            (false, false) => each_block::<18, N>(strip, x, |a, b, x, j| Self::step::<18, N>(a, b, x, j)),
            (true, false) => each_block::<20, N>(strip, x, |a, b, x, j| Self::step::<20, N>(a, b, x, j)),
            (false, true) => each_block::<22, N>(strip, x, |a, b, x, j| Self::step::<22, N>(a, b, x, j)),
            (true, true) => each_block::<24, N>(strip, x, |a, b, x, j| Self::step::<24, N>(a, b, x, j)),
        }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn unpack<const DOT: bool>(strip: &Strip<'_>, s: usize, panel: &mut Panel) {
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
    unsafe fn tile<const L: usize, const N: usize>(
        w: Rows<'_, L>,
        n_blocks: usize,
        x: &[&Lanes<L>; N],
        acc: &mut Acc<N>,
    ) {
        match FIVE {
            true => tile::blocks_unsigned::<4, MIN, L, N>(w, n_blocks, x, Self::OFFSET, acc),
            false => tile::blocks_unsigned::<8, MIN, L, N>(w, n_blocks, x, Self::OFFSET, acc),
        }
    }
}
