//! Q6_K with few tokens, by AVX-512 VNNI, row by row and straight from the file's layout.
//!
//! A scale covers sixteen columns, and a dot product of bytes adds up four of them. With the codes' offset taken off, sums of
//! eight columns fit 16 bits (`8 · 32 · 127`): so two dot products follow each other, results of two such pairs are packed, and
//! one multiplication takes in the scales of half a row each. What follows each other has to lie at the same place of two
//! vectors, which is what [`Regrouped`] is about; the two halves of a super-block are even and odd dwords from the dot products
//! to the end.
//!
//! Codes of four rows stay in registers while they meet all tokens.

use std::arch::x86_64::*;

use super::super::direct::{self, Blocks};
use super::super::load::{Plain, load16, load32, prefetch, store8, vector};
use super::super::{prefetch_distance, tile};
use crate::kernels::{Out, PanelScratch, Q8Block, Q8Tokens, Regrouped, STRIP, SUPER, WeightRows};

/// Tokens that rows meet at most.
pub(super) const MOST: usize = 8;

const BYTES: usize = 210;

/// A super-block of one row.
#[derive(Clone, Copy)]
struct Row {
    /// Codes in the order of [`Regrouped`]: the first and the second eight of columns 0-63 of both halves, then those of the others.
    codes: [__m512i; 4],
    /// The scales in their order, in 16 bits.
    scales: __m256i,
}

/// Eight rows, of which the last is repeated where there are fewer.
struct Strip<'a> {
    /// All blocks of the matrix.
    blocks: &'a [[u8; BYTES]],
    /// The first block of each row.
    first: [usize; STRIP],
    /// How far ahead of a byte to fetch, in bytes.
    ahead: usize,
}

/// Multiplies with at most [`MOST`] tokens.
///
/// May run only on a CPU with AVX2, FMA, F16C and AVX-512 F, BW, VL and VNNI.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) fn matmul(w: WeightRows<'_>, x: Q8Tokens<'_>, out: &mut Out<'_>, scratch: &mut PanelScratch) {
    let (n_rows, n_supers, n_tokens) = (w.n_rows(), w.n_cols() / SUPER, x.len());
    assert!(n_tokens <= MOST, "{n_tokens} tokens are not few");
    let regrouped = scratch.regrouped(n_supers * n_tokens);
    for t in 0..n_tokens {
        for (x, to) in x.row(t).iter().zip(regrouped[t..].iter_mut().step_by(n_tokens)) {
            regroup(x, to);
        }
    }
    let (blocks, ahead) = (w.data().as_chunks().0, prefetch_distance(w.row_bytes()));
    let mut acc = [_mm256_setzero_ps(); MOST];
    for r in (0..n_rows).step_by(STRIP) {
        let mut first = [0; STRIP];
        for i in 0..STRIP {
            first[i] = n_supers * (r + i).min(n_rows - 1);
        }
        let strip = Strip { blocks, first, ahead };
        match n_tokens {
            1 => acc[0] = strip.single(regrouped),
            _ => strip.several(n_tokens, regrouped, &mut acc),
        }
        for t in 0..n_tokens {
            out.put(x.out_row(t), r, &store8(acc[t])[..STRIP.min(n_rows - r)]);
        }
    }
}

impl Strip<'_> {
    /// The products with one token.
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
    fn single(&self, x: &[Regrouped]) -> __m256 {
        let mut acc = _mm256_setzero_ps();
        for (s, x) in x.iter().enumerate() {
            let b = self.nth(s);
            let [_, d] = direct::last_two_halves(&b);
            self.fetch(s * STRIP * BYTES, STRIP * BYTES);
            let sums = [
                four_rows([Row::of(b[0]).with(x), Row::of(b[1]).with(x), Row::of(b[2]).with(x), Row::of(b[3]).with(x)]),
                four_rows([Row::of(b[4]).with(x), Row::of(b[5]).with(x), Row::of(b[6]).with(x), Row::of(b[7]).with(x)]),
            ];
            acc = add(acc, sums, d, x.d);
        }
        acc
    }

    /// The products with `n` tokens.
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
    fn several(&self, n: usize, x: &[Regrouped], acc: &mut [__m256; MOST]) {
        *acc = [_mm256_setzero_ps(); MOST];
        for (s, x) in x.chunks_exact(n).enumerate() {
            let b = self.nth(s);
            let mut sums = [[_mm512_setzero_si512(); MOST]; 2];
            for (i, sums) in sums.iter_mut().enumerate() {
                self.fetch((s * STRIP + 4 * i) * BYTES, 4 * BYTES);
                let rows = [Row::of(b[4 * i]), Row::of(b[4 * i + 1]), Row::of(b[4 * i + 2]), Row::of(b[4 * i + 3])];
                for (x, sums) in x.iter().zip(sums) {
                    *sums = four_rows([rows[0].with(x), rows[1].with(x), rows[2].with(x), rows[3].with(x)]);
                }
            }
            let [_, d] = direct::last_two_halves(&b);
            for (t, x) in x.iter().enumerate() {
                acc[t] = add(acc[t], [sums[0][t], sums[1][t]], d, x.d);
            }
        }
    }

    /// Super-block `s` of every row.
    #[inline(always)]
    fn nth(&self, s: usize) -> Blocks<'_, BYTES> {
        let mut of = [&self.blocks[self.first[0] + s]; STRIP];
        for r in 1..STRIP {
            of[r] = &self.blocks[self.first[r] + s];
        }
        of
    }

    /// Fetches what lies `ahead` of bytes `at .. at + len` of the rows, taken one after another. See
    /// [`super::super::Strip::fetch`].
    #[inline(always)]
    fn fetch(&self, at: usize, len: usize) {
        prefetch(self.blocks[self.first[0]..].as_flattened(), self.ahead + at, len);
    }
}

impl Row {
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
    #[inline]
    fn of(block: &[u8; BYTES]) -> Row {
        // Bytes of nibbles of both halves, eight and eight, then the bytes of upper bits that belong to each.
        let nibbles = eights(wide(block, 0), wide(block, 64));
        let pairs = eights(twice(block, 128), twice(block, 160));
        // The lower half of a vector holds quarters 0 and 2 of the halves, the upper one quarters 1 and 3.
        let pair = _mm512_inserti64x4::<1>(_mm512_set1_epi8(0x33), _mm256_set1_epi8(0xcc_u8 as i8));
        let up = _mm512_inserti64x4::<1>(_mm512_set1_epi16(4), _mm256_set1_epi16(2));
        let down = _mm512_inserti64x4::<1>(_mm512_setzero_si512(), _mm256_set1_epi16(2));
        let nibble = _mm512_set1_epi8(15);
        let mut codes = [nibble; 4];
        for e in 0..2 {
            let pairs = _mm512_and_si512(pairs[e], pair);
            // Below a mask of 15 the nibble, above it the pair: shifted, the other pair of its byte is out of both.
            const SELECT: i32 = 0xca;
            let (lower, upper) = (nibbles[e], _mm512_srli_epi16::<4>(nibbles[e]));
            codes[e] = _mm512_ternarylogic_epi32::<SELECT>(nibble, lower, _mm512_sllv_epi16(pairs, up));
            codes[2 + e] = _mm512_ternarylogic_epi32::<SELECT>(nibble, upper, _mm512_srlv_epi16(pairs, down));
        }
        Row { codes, scales: _mm256_cvtepi8_epi16(load16(block, 192)) }
    }

    /// Even dwords add up to the integer sum of the first half of the super-block with a token, odd ones to that of the second.
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
    #[inline]
    fn with(&self, x: &Regrouped) -> __m512i {
        let mut sums = [_mm512_setzero_si512(); 2];
        for p in 0..2 {
            let first = _mm512_dpbusd_epi32(whole(&x.offsets[p]), self.codes[2 * p], whole(&x.codes[p][0]));
            sums[p] = _mm512_dpbusd_epi32(first, self.codes[2 * p + 1], whole(&x.codes[p][1]));
        }
        let scales = _mm512_castsi256_si512(_mm256_mullo_epi16(self.scales, vector(&x.scale_pairs)));
        let scales = _mm512_permutexvar_epi16(whole(&SCALE_OF_SUM), scales);
        _mm512_madd_epi16(_mm512_packs_epi32(sums[0], sums[1]), scales)
    }
}

/// Which scale belongs to each 16-bit sum: in every 128 bits, two sums of a group of sixteen columns of the first half, two of
/// the second, and the same for the group that is 64 columns further.
static SCALE_OF_SUM: [i16; 32] = {
    let mut places = [0; 32];
    let mut i = 0;
    while i < 32 {
        places[i] = (i / 8 + 8 * (i / 2 % 2) + 4 * (i / 4 % 2)) as i16;
        i += 1;
    }
    places
};

/// Adds up sums of four rows by the pair of dwords, as far as to `[0, 1, 0, 1, 2, 3, 2, 3]`, the rows of the pairs.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
#[inline]
fn four_rows(sums: [__m512i; 4]) -> __m512i {
    let [a, b] = eights(sums[0], sums[1]);
    let [c, d] = eights(sums[2], sums[3]);
    add_lanes(_mm512_add_epi32(a, b), _mm512_add_epi32(c, d))
}

/// The sums of even and odd 128 bits of `a`, then those of `b`.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
#[inline]
fn add_lanes(a: __m512i, b: __m512i) -> __m512i {
    _mm512_add_epi32(_mm512_shuffle_i64x2::<0b10_00_10_00>(a, b), _mm512_shuffle_i64x2::<0b11_01_11_01>(a, b))
}

/// The first and the second eight bytes of every sixteen, those of `a` and `b` in turns.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
#[inline]
fn eights(a: __m512i, b: __m512i) -> [__m512i; 2] {
    [_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b)]
}

/// Two steps of the sequence of [`crate::kernels`], for the halves of a super-block of which `sums` holds four rows and four.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
#[inline]
fn add(acc: __m256, [a, b]: [__m512i; 2], d: __m256, x_d: f32) -> __m256 {
    let apart = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    let sums = _mm512_permutexvar_epi32(apart, add_lanes(a, b));
    let x_d = _mm256_set1_ps(x_d);
    let acc = tile::add_block(acc, _mm512_castsi512_si256(sums), d, x_d);
    tile::add_block(acc, _mm512_extracti64x4_epi64::<1>(sums), d, x_d)
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
fn regroup(x: &Q8Block, to: &mut Regrouped) {
    let codes = x.codes.as_chunks::<64>().0;
    let (zero, offset) = (_mm512_setzero_si512(), _mm512_set1_epi8(32));
    for p in 0..2 {
        let [first, second] = eights(whole(&codes[p]), whole(&codes[p + 2]));
        let sums = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(zero, offset, first), offset, second);
        store_whole(&mut to.codes[p][0], first);
        store_whole(&mut to.codes[p][1], second);
        store_whole(&mut to.offsets[p], _mm512_sub_epi32(zero, sums));
    }
    (to.scale_pairs, to.d) = (x.scale_pairs, x.d);
}

/// 64 bytes at `b[at..]`.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
#[inline]
fn wide(b: &[u8], at: usize) -> __m512i {
    let b = &b[at..at + 64];
    // SAFETY: the slice has 64 bytes.
    unsafe { _mm512_loadu_si512(b.as_ptr().cast()) }
}

/// 32 bytes at `b[at..]`, twice.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
#[inline]
fn twice(b: &[u8], at: usize) -> __m512i {
    _mm512_broadcast_i64x4(load32(b, at))
}

/// The vector that fills `from`.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
#[inline]
fn whole<T: Plain>(from: &T) -> __m512i {
    const { assert!(size_of::<T>() == 64) };
    // SAFETY: `from` has 64 bytes, none of them padding.
    unsafe { _mm512_loadu_si512((from as *const T).cast()) }
}

/// Writes a vector over the whole of `to`.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
#[inline]
fn store_whole<T: Plain>(to: &mut T, v: __m512i) {
    const { assert!(size_of::<T>() == 64) };
    // SAFETY: `to` has 64 bytes, and any bits are a valid value of a plain type.
    unsafe { _mm512_storeu_si512((to as *mut T).cast(), v) }
}
