//! The types whose nibbles are places in a table of sixteen values: IQ4_NL, IQ4_XS, MXFP4.
//!
//! IQ4_NL is `d` (half float) and sixteen bytes of nibbles, laid out as in Q4_0; MXFP4 the same with one byte of
//! exponent for `d`. An IQ4_XS block has 256 columns: `d`, sixteen bits with the upper two bits of eight scales, four
//! bytes with their lower nibbles, and eight times sixteen bytes of nibbles.

use std::arch::x86_64::*;

use super::direct::{self, Blocks};
use super::load::{half_vector, load16, store, store8};
use super::small::each_block;
use super::tile::{self, Acc, Rows};
use super::{Format, Strip};
use crate::kernels::{Lanes, Panel, Q8Block, STRIP};
use crate::scalar::{IQ4_VALUES, MXFP4_VALUES};

/// IQ4_NL.
pub(super) struct Iq4Nl;

/// IQ4_XS.
pub(super) struct Iq4Xs;

/// MXFP4.
pub(super) struct Mxfp4;

/// A table of sixteen values in both halves.
#[target_feature(enable = "avx2")]
#[inline]
fn table(values: &[i8; 16]) -> __m256i {
    _mm256_broadcastsi128_si256(half_vector(values))
}

/// The values of the nibbles at byte `at` of eight blocks: of the first sixteen columns, and of the others.
#[target_feature(enable = "avx2")]
#[inline]
fn values<const BYTES: usize>(blocks: &Blocks<'_, BYTES>, at: usize, table: __m256i) -> [[__m256i; 4]; 2] {
    let mut w = direct::nibbles(direct::pairs(blocks, at));
    for h in 0..2 {
        for i in 0..4 {
            w[h][i] = _mm256_shuffle_epi8(table, w[h][i]);
        }
    }
    w
}

/// [`values`] interleaved as a panel has them.
#[target_feature(enable = "avx2")]
#[inline]
fn unpack<const BYTES: usize>(blocks: &Blocks<'_, BYTES>, at: usize, table: __m256i, codes: &mut [[u8; 32]; 8]) {
    let nibble = _mm256_set1_epi8(15);
    let q = direct::dwords_16(blocks, at);
    for i in 0..4 {
        let (low, high) = (_mm256_and_si256(q[i], nibble), _mm256_and_si256(_mm256_srli_epi16::<4>(q[i]), nibble));
        store(&mut codes[i], _mm256_shuffle_epi8(table, low));
        store(&mut codes[i + 4], _mm256_shuffle_epi8(table, high));
    }
}

impl Iq4Nl {
    const BYTES: usize = 18;

    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    fn step<const N: usize>(
        mut acc: [__m256; N],
        blocks: Blocks<'_, { Self::BYTES }>,
        x: [&Q8Block; N],
        j: usize,
    ) -> [__m256; N] {
        let w = values(&blocks, 2, table(&IQ4_VALUES));
        let [d, _] = direct::first_two_halves(&blocks);
        for t in 0..N {
            acc[t] = tile::add_block(acc[t], direct::signed_sum(&w, x[t], j), d, _mm256_set1_ps(x[t].block_d[j]));
        }
        acc
    }
}

impl Format for Iq4Nl {
    const TILES_FROM: usize = 9;

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn direct<const N: usize>(strip: &Strip<'_>, x: [&[Q8Block]; N]) -> [__m256; N] {
        each_block(strip, x, |a, b, x, j| Self::step(a, b, x, j))
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn unpack<const DOT: bool>(strip: &Strip<'_>, s: usize, panel: &mut Panel) {
        let rows = direct::rows_of::<{ Self::BYTES }>(strip);
        for j in 0..8.min(strip.n_blocks - 8 * s) {
            let blocks = direct::nth(&rows, 8 * s + j);
            unpack(&blocks, 2, table(&IQ4_VALUES), &mut panel.codes[j]);
            panel.d[j] = store8(direct::first_two_halves(&blocks)[0]);
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

impl Mxfp4 {
    const BYTES: usize = 17;
    /// Added to the values, so that they are unsigned.
    const OFFSET: i16 = 12;
    const VALUES: [i8; 16] = {
        let mut v = MXFP4_VALUES;
        let mut i = 0;
        while i < 16 {
            v[i] += Self::OFFSET as i8;
            i += 1;
        }
        v
    };

    /// Half of the power of two that opens each row's block.
    #[target_feature(enable = "avx2")]
    #[inline]
    fn scales(blocks: &Blocks<'_, { Self::BYTES }>) -> __m256 {
        let v = |r: usize| _mm_unpacklo_epi8(load16(blocks[r], 0), load16(blocks[r + 1], 0));
        let (a, b) = (_mm_unpacklo_epi16(v(0), v(2)), _mm_unpacklo_epi16(v(4), v(6)));
        let e = _mm256_cvtepu8_epi32(_mm_unpacklo_epi32(a, b));
        // The two smallest are subnormal: their exponent counts as 2, and the shift halves the difference away.
        let two = _mm256_max_epi32(e, _mm256_set1_epi32(2));
        let power = _mm256_slli_epi32::<23>(_mm256_sub_epi32(two, _mm256_set1_epi32(1)));
        _mm256_castsi256_ps(_mm256_srlv_epi32(power, _mm256_sub_epi32(two, e)))
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    fn step<const N: usize>(
        mut acc: [__m256; N],
        blocks: Blocks<'_, { Self::BYTES }>,
        x: [&Q8Block; N],
        j: usize,
    ) -> [__m256; N] {
        let w = values(&blocks, 1, table(&Self::VALUES));
        let d = Self::scales(&blocks);
        for t in 0..N {
            let sum = direct::unsigned_sum::<true>(&w, x[t], j, Self::OFFSET);
            acc[t] = tile::add_block(acc[t], sum, d, _mm256_set1_ps(x[t].block_d[j]));
        }
        acc
    }
}

impl Format for Mxfp4 {
    const TILES_FROM: usize = 9;

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn direct<const N: usize>(strip: &Strip<'_>, x: [&[Q8Block]; N]) -> [__m256; N] {
        each_block(strip, x, |a, b, x, j| Self::step(a, b, x, j))
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn unpack<const DOT: bool>(strip: &Strip<'_>, s: usize, panel: &mut Panel) {
        let rows = direct::rows_of::<{ Self::BYTES }>(strip);
        for j in 0..8.min(strip.n_blocks - 8 * s) {
            let blocks = direct::nth(&rows, 8 * s + j);
            unpack(&blocks, 1, table(&Self::VALUES), &mut panel.codes[j]);
            panel.d[j] = store8(Self::scales(&blocks));
        }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn tile<const L: usize, const N: usize>(
        w: Rows<'_, L>,
        n_blocks: usize,
        x: &[&Lanes<L>; N],
        acc: &mut Acc<N>,
    ) {
        tile::blocks_unsigned::<4, false, L, N>(w, n_blocks, x, Self::OFFSET, acc)
    }
}

impl Iq4Xs {
    const BYTES: usize = 136;

    /// `d` of eight rows, and the lower and upper parts of their scales, the first block's in the lowest bits.
    #[target_feature(enable = "avx2,f16c")]
    #[inline]
    fn scales(blocks: &Blocks<'_, { Self::BYTES }>) -> (__m256, __m256i, __m256i) {
        let v = |r: usize| _mm_unpacklo_epi32(load16(blocks[r], 0), load16(blocks[r + 1], 0));
        let (a, b, c, d) = (v(0), v(2), v(4), v(6));
        let first = _mm256_set_m128i(_mm_unpacklo_epi64(c, d), _mm_unpacklo_epi64(a, b));
        let low = _mm256_set_m128i(_mm_unpackhi_epi64(c, d), _mm_unpackhi_epi64(a, b));
        let [d, _] = direct::first_two_halves(blocks);
        (d, low, _mm256_srli_epi32::<12>(first))
    }

    /// `d · (scale - 32)` of the next block, whose parts move out.
    #[target_feature(enable = "avx2")]
    #[inline]
    fn next_scale(d: __m256, low: &mut __m256i, high: &mut __m256i) -> __m256 {
        let upper = _mm256_and_si256(*high, _mm256_set1_epi32(0x30));
        let scale = _mm256_or_si256(_mm256_and_si256(*low, _mm256_set1_epi32(15)), upper);
        (*low, *high) = (_mm256_srli_epi32::<4>(*low), _mm256_srli_epi32::<2>(*high));
        _mm256_mul_ps(d, _mm256_cvtepi32_ps(_mm256_sub_epi32(scale, _mm256_set1_epi32(32))))
    }
}

impl Format for Iq4Xs {
    const TILES_FROM: usize = 9;

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn direct<const N: usize>(strip: &Strip<'_>, x: [&[Q8Block]; N]) -> [__m256; N] {
        let mut acc = [_mm256_setzero_ps(); N];
        let rows = direct::rows_of(strip);
        for s in 0..rows[0].len() {
            let blocks = direct::nth(&rows, s);
            let x = direct::super_block(&x, s);
            let (d, mut low, mut high) = Self::scales(&blocks);
            for j in 0..8 {
                strip.fetch((s * STRIP + j) * Self::BYTES, Self::BYTES);
                let d = Self::next_scale(d, &mut low, &mut high);
                let w = values(&blocks, 8 + 16 * j, table(&IQ4_VALUES));
                for t in 0..N {
                    acc[t] =
                        tile::add_block(acc[t], direct::signed_sum(&w, x[t], j), d, _mm256_set1_ps(x[t].block_d[j]));
                }
            }
        }
        acc
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn unpack<const DOT: bool>(strip: &Strip<'_>, s: usize, panel: &mut Panel) {
        let blocks = direct::block_of::<{ Self::BYTES }>(strip, s);
        let (d, mut low, mut high) = Self::scales(&blocks);
        for j in 0..8 {
            unpack(&blocks, 8 + 16 * j, table(&IQ4_VALUES), &mut panel.codes[j]);
            panel.d[j] = store8(Self::next_scale(d, &mut low, &mut high));
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
