//! Unpacks sixteen rows at a time into two panels side by side, with AVX-512: half the instructions of twice eight rows, and
//! most of what unpacking costs is instructions once the next strips are fetched in time.

use std::arch::x86_64::*;

use super::super::direct::{nth, rows_of};
use super::super::k_quants::K45;
use super::super::load::{load16, store};
use super::super::q6_k::{self, Q6K};
use super::super::{Format, Strip};
use super::MAX_STRIPS;
use crate::kernels::{Panel, STRIP};

/// The same block of sixteen rows.
type Blocks<'a, const BYTES: usize> = [[&'a [u8; BYTES]; STRIP]; MAX_STRIPS];

/// Formats whose sixteen rows are unpacked at a time.
pub(super) trait Unpack: Format {
    /// [`Format::unpack`] of two strips.
    ///
    /// # Safety
    /// The CPU has AVX2, FMA, F16C, AVX-512 F, BW and VL.
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl")]
    #[inline]
    unsafe fn unpack_16(strips: &[Strip<'_>; MAX_STRIPS], s: usize, panels: &mut [Panel; MAX_STRIPS]) {
        for (strip, panel) in strips.iter().zip(panels) {
            // SAFETY: the caller's promise.
            unsafe { Self::unpack(strip, s, panel) };
        }
    }
}

/// Super-block `s` of sixteen rows.
#[inline(always)]
fn blocks<'a, const BYTES: usize>(strips: &[Strip<'a>; MAX_STRIPS], s: usize) -> Blocks<'a, BYTES> {
    [nth(&rows_of(&strips[0]), s), nth(&rows_of(&strips[1]), s)]
}

/// Sixteen bytes at `at` of sixteen rows: lane `r` of vector `c` is their dword `c` of row `r`.
#[target_feature(enable = "avx2,avx512f")]
#[inline]
fn dwords<const BYTES: usize>(blocks: &Blocks<'_, BYTES>, at: usize) -> [__m512i; 4] {
    // Rows `i`, `i + 4`, `i + 8` and `i + 12`, so that a transposition within quarters leaves rows in order.
    let mut v = [_mm512_setzero_si512(); 4];
    for i in 0..4 {
        let first = _mm512_castsi128_si512(load16(blocks[0][i], at));
        let first = _mm512_inserti32x4::<1>(first, load16(blocks[0][i + 4], at));
        let second = _mm512_inserti32x4::<2>(first, load16(blocks[1][i], at));
        v[i] = _mm512_inserti32x4::<3>(second, load16(blocks[1][i + 4], at));
    }
    transpose_quarters(v)
}

/// Transposes four by four lanes in every 128 bits of the vectors.
#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn transpose_quarters(v: [__m512i; 4]) -> [__m512i; 4] {
    let (a, b) = (_mm512_unpacklo_epi32(v[0], v[1]), _mm512_unpackhi_epi32(v[0], v[1]));
    let (c, d) = (_mm512_unpacklo_epi32(v[2], v[3]), _mm512_unpackhi_epi32(v[2], v[3]));
    [_mm512_unpacklo_epi64(a, c), _mm512_unpackhi_epi64(a, c), _mm512_unpacklo_epi64(b, d), _mm512_unpackhi_epi64(b, d)]
}

/// Writes dword `i` of block `j` of every row.
#[target_feature(enable = "avx2,avx512f")]
#[inline]
fn put(panels: &mut [Panel; MAX_STRIPS], j: usize, i: usize, codes: __m512i) {
    store(&mut panels[0].codes[j][i], _mm512_castsi512_si256(codes));
    store(&mut panels[1].codes[j][i], _mm512_extracti64x4_epi64::<1>(codes));
}

/// `a | (b & c)`
#[target_feature(enable = "avx512f")]
#[inline]
fn or_and(a: __m512i, b: __m512i, c: __m512i) -> __m512i {
    _mm512_ternarylogic_epi32::<0b1111_1000>(a, b, c)
}

impl<const FIVE: bool, const BYTES: usize> Unpack for K45<FIVE, BYTES> {
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl")]
    unsafe fn unpack_16(strips: &[Strip<'_>; MAX_STRIPS], s: usize, panels: &mut [Panel; MAX_STRIPS]) {
        let blocks = blocks::<BYTES>(strips, s);
        let nibble = _mm512_set1_epi8(15);
        for half in 0..2 {
            let high = if FIVE { dwords(&blocks, 16 + 16 * half) } else { [nibble; 4] };
            for k in 0..4 {
                let q = dwords(&blocks, Self::QS + 32 * k + 16 * half);
                for c in 0..4 {
                    let mut w =
                        [_mm512_and_si512(q[c], nibble), _mm512_and_si512(_mm512_srli_epi16::<4>(q[c]), nibble)];
                    for h in 0..2 {
                        if FIVE {
                            let fifth = _mm512_test_epi8_mask(high[c], _mm512_set1_epi8((1u8 << (2 * k + h)) as i8));
                            w[h] = _mm512_mask_add_epi8(w[h], fifth, w[h], _mm512_set1_epi8(16));
                        }
                        put(panels, 2 * k + h, 4 * half + c, w[h]);
                    }
                }
            }
        }
        for (blocks, panel) in blocks.iter().zip(panels) {
            Self::unpack_scales(blocks, panel);
        }
    }
}

impl Unpack for Q6K {
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl")]
    unsafe fn unpack_16(strips: &[Strip<'_>; MAX_STRIPS], s: usize, panels: &mut [Panel; MAX_STRIPS]) {
        let blocks = blocks::<{ q6_k::BYTES }>(strips, s);
        let (nibble, pair) = (_mm512_set1_epi8(15), _mm512_set1_epi8(0x30));
        for (half, part) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            let low0 = dwords(&blocks, 64 * half + 16 * part);
            let low1 = dwords(&blocks, 64 * half + 32 + 16 * part);
            let high = dwords(&blocks, 128 + 32 * half + 16 * part);
            for c in 0..4 {
                let low = [
                    _mm512_and_si512(low0[c], nibble),
                    _mm512_and_si512(low1[c], nibble),
                    _mm512_and_si512(_mm512_srli_epi16::<4>(low0[c]), nibble),
                    _mm512_and_si512(_mm512_srli_epi16::<4>(low1[c]), nibble),
                ];
                let high = [
                    _mm512_slli_epi16::<4>(high[c]),
                    _mm512_slli_epi16::<2>(high[c]),
                    high[c],
                    _mm512_srli_epi16::<2>(high[c]),
                ];
                for q in 0..4 {
                    put(panels, 4 * half + q, 4 * part + c, or_and(low[q], high[q], pair));
                }
            }
        }
        for (blocks, panel) in blocks.iter().zip(panels) {
            q6_k::unpack_scales(blocks, panel);
        }
    }
}
