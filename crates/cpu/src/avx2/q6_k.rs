//! Q6_K: six-bit codes, an eight-bit scale per 16 columns.
//!
//! A block has 128 bytes of low nibbles, 64 bytes of upper bit pairs, sixteen scales and `d` (half float). In each
//! half of 128 columns, nibble byte `32 a + i` holds columns `32 a + i` and, in its high half, `64 + 32 a + i`; pair
//! `q` of byte `i` belongs to column `32 q + i`.

use std::arch::x86_64::*;
use std::array::from_mut;

use super::direct::{self, Blocks, Eights};
use super::load::{broadcast, load16, load32, store, store8, vector};
use super::reduce::sum_halves;
use super::tile::{self, Acc, Rows};
use super::{Format, SEVERAL, Strip};
use crate::kernels::{LANES, Lanes, Panel, Q8Block, STRIP};

const BYTES: usize = 210;

pub(super) struct Q6K;

/// The scales of eight rows.
struct Scales {
    /// Dword `r` of vector `c`: scales `4 c` and `4 c + 2` of row `r`.
    even: [__m256i; 4],
    /// Dword `r` of vector `c`: scales `4 c + 1` and `4 c + 3` of row `r`.
    odd: [__m256i; 4],
}

impl Scales {
    #[target_feature(enable = "avx2")]
    #[inline]
    fn of(blocks: &Blocks<'_, BYTES>) -> Scales {
        // Dword c of a row holds scales 4 c .. 4 c + 4 as signed bytes.
        let v = direct::dwords_16(blocks, 192);
        let mut scales = Scales { even: v, odd: v };
        for c in 0..4 {
            scales.even[c] = _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(v[c]));
            scales.odd[c] = _mm256_srai_epi16::<8>(v[c]);
        }
        scales
    }

    /// The scales of both halves of block `4 half + Q`, as a pair per row.
    #[target_feature(enable = "avx2")]
    #[inline]
    fn pairs<const Q: usize>(&self, half: usize) -> __m256i {
        let (even, odd) = (self.even[2 * half + Q / 2], self.odd[2 * half + Q / 2]);
        match Q % 2 {
            0 => _mm256_blend_epi16::<0xaa>(even, _mm256_slli_epi32::<16>(odd)),
            _ => _mm256_blend_epi16::<0xaa>(_mm256_srli_epi32::<16>(even), odd),
        }
    }

    /// The scales of both halves of block `4 half + Q`, each in the places of the rows in [`Eights`].
    #[target_feature(enable = "avx2")]
    #[inline]
    fn eights<const Q: usize>(&self, half: usize) -> [Eights; 2] {
        let (even, odd) = (self.even[2 * half + Q / 2], self.odd[2 * half + Q / 2]);
        let word = _mm256_set1_epi16(0x0100 + 0x0202 * (Q % 2) as i16);
        let rows = _mm256_broadcastsi128_si256(_mm_setr_epi32(0, 0, 0x0404_0404, 0x0404_0404));
        let first = _mm256_add_epi8(word, rows);
        let last = _mm256_add_epi8(first, _mm256_set1_epi8(8));
        [
            [_mm256_shuffle_epi8(even, first), _mm256_shuffle_epi8(even, last)],
            [_mm256_shuffle_epi8(odd, first), _mm256_shuffle_epi8(odd, last)],
        ]
    }
}

/// The codes of quarter `Q` from its bytes of nibbles and of upper bits.
#[target_feature(enable = "avx2")]
#[inline]
fn codes<const Q: usize>(low: __m256i, high: __m256i) -> __m256i {
    let low = if Q < 2 { low } else { _mm256_srli_epi16::<4>(low) };
    let high = match Q {
        0 => _mm256_slli_epi16::<4>(high),
        1 => _mm256_slli_epi16::<2>(high),
        2 => high,
        _ => _mm256_srli_epi16::<2>(high),
    };
    let (nibble, pair) = (_mm256_set1_epi8(15), _mm256_set1_epi8(0x30));
    _mm256_or_si256(_mm256_and_si256(low, nibble), _mm256_and_si256(high, pair))
}

/// Adds the scaled integer sums of block `4 half + Q` to those of each token.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn block_sums<const Q: usize>(
    low: &[Eights; 4],
    high: &[Eights; 4],
    of: &Scales,
    half: usize,
    x: &[&Q8Block],
    sums: &mut [__m256i; SEVERAL],
) {
    let j = 4 * half + Q;
    let mut w = *high;
    for c in 0..4 {
        for i in 0..2 {
            w[c][i] = codes::<Q>(low[c][i], high[c][i]);
        }
    }
    let offset = _mm256_slli_epi16::<5>(of.pairs::<Q>(half));
    let scales = of.eights::<Q>(half);
    for (x, sum) in x.iter().zip(sums) {
        let first = direct::products(&[w[0], w[1]], x, 4 * j);
        let second = direct::products(&[w[2], w[3]], x, 4 * j + 2);
        let mut y = first;
        for i in 0..2 {
            let first = _mm256_madd_epi16(first[i], scales[0][i]);
            y[i] = _mm256_add_epi32(first, _mm256_madd_epi16(second[i], scales[1][i]));
        }
        let (even, odd) = direct::even_odd(y[0], y[1]);
        let offset = _mm256_madd_epi16(offset, broadcast(&x.half_sums, j));
        let of_block = _mm256_sub_epi32(_mm256_add_epi32(even, odd), offset);
        *sum = _mm256_add_epi32(*sum, tile::times_scale(of_block, broadcast(&x.scale_pairs, j)));
    }
}

/// The codes of one row's blocks `4 half ..`.
#[target_feature(enable = "avx2")]
#[inline]
fn row_codes(block: &[u8; BYTES], half: usize) -> [__m256i; 4] {
    let low = [load32(block, 64 * half), load32(block, 64 * half + 32)];
    let high = load32(block, 128 + 32 * half);
    [codes::<0>(low[0], high), codes::<1>(low[1], high), codes::<2>(low[0], high), codes::<3>(low[1], high)]
}

/// The integer sums of one row's super-block with each token: the lanes of the lower half of the vector add up to that of the
/// first 128 columns, those of the upper half to that of the others.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn row_sums<const N: usize>(block: &[u8; BYTES], x: &[&Q8Block; N]) -> [__m256i; N] {
    let of_row = _mm256_cvtepi8_epi16(load16(block, 192));
    let mut scales = [of_row; N];
    for t in 0..N {
        scales[t] = _mm256_mullo_epi16(of_row, vector(&x[t].scale_pairs));
    }
    let mut sums = [[_mm256_setzero_si256(); 2]; N];
    for half in 0..2 {
        let w = row_codes(block, half);
        for t in 0..N {
            // Eight scales in each half of the vector: those of a block's halves are one shuffle away.
            let scales = match half {
                0 => _mm256_permute2x128_si256::<0x00>(scales[t], scales[t]),
                _ => _mm256_permute2x128_si256::<0x11>(scales[t], scales[t]),
            };
            let y = &x[t].codes.as_chunks::<32>().0[4 * half..][..4];
            for q in 0..4 {
                let j = q as i16;
                let (a, b) = ((4 * j) | (4 * j + 1) << 8, (4 * j + 2) | (4 * j + 3) << 8);
                let pick = _mm256_set_m128i(_mm_set1_epi16(b), _mm_set1_epi16(a));
                let products = _mm256_maddubs_epi16(w[q], vector(&y[q]));
                let scaled = _mm256_madd_epi16(products, _mm256_shuffle_epi8(scales, pick));
                sums[t][half] = if q == 0 { scaled } else { _mm256_add_epi32(sums[t][half], scaled) };
            }
        }
    }
    let mut y = [of_row; N];
    for t in 0..N {
        let [first, second] = sums[t];
        let (lower, upper) =
            (_mm256_blend_epi32::<0xf0>(first, second), _mm256_permute2x128_si256::<0x21>(first, second));
        let offset = _mm256_madd_epi16(scales[t], vector(&x[t].half_sums));
        y[t] = _mm256_sub_epi32(_mm256_add_epi32(lower, upper), _mm256_slli_epi32::<5>(offset));
    }
    y
}

/// The products of a strip with each token, row by row: what streams fastest from memory.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn gemv<const N: usize>(strip: &Strip<'_>, x: [&[Q8Block]; N]) -> [__m256; N] {
    let mut acc = [_mm256_setzero_ps(); N];
    let rows = direct::rows_of(strip);
    for s in 0..rows[0].len() {
        let blocks = direct::nth(&rows, s);
        let x = direct::super_block(&x, s);
        let mut sums = [[_mm256_setzero_si256(); STRIP]; N];
        for r in 0..STRIP {
            strip.fetch((s * STRIP + r) * BYTES, BYTES);
            let of_row = row_sums(blocks[r], &x);
            for t in 0..N {
                sums[t][r] = of_row[t];
            }
        }
        let [_, d] = direct::last_two_halves(&blocks);
        for t in 0..N {
            for sum in sum_halves(sums[t]) {
                acc[t] = tile::add_block(acc[t], sum, d, _mm256_set1_ps(x[t].d));
            }
        }
    }
    acc
}

/// Writes the codes that bytes `AT .. AT + 16` of the nibbles and upper bits of half `HALF` hold.
#[target_feature(enable = "avx2")]
#[inline]
fn unpack_codes<const HALF: usize, const AT: usize>(blocks: &Blocks<'_, BYTES>, to: &mut [[[u8; 32]; 8]; 8]) {
    let low0 = direct::dwords_16(blocks, 64 * HALF + AT);
    let low1 = direct::dwords_16(blocks, 64 * HALF + 32 + AT);
    let high = direct::dwords_16(blocks, 128 + 32 * HALF + AT);
    for i in 0..4 {
        store(&mut to[4 * HALF][AT / 4 + i], codes::<0>(low0[i], high[i]));
        store(&mut to[4 * HALF + 1][AT / 4 + i], codes::<1>(low1[i], high[i]));
        store(&mut to[4 * HALF + 2][AT / 4 + i], codes::<2>(low0[i], high[i]));
        store(&mut to[4 * HALF + 3][AT / 4 + i], codes::<3>(low1[i], high[i]));
    }
}

/// Writes what a panel holds beside codes.
#[target_feature(enable = "avx2,fma,f16c")]
fn unpack_scales<const DOT: bool>(blocks: &Blocks<'_, BYTES>, panel: &mut Panel) {
    let of = Scales::of(blocks);
    for (c, (even, odd)) in of.even.into_iter().zip(of.odd).enumerate() {
        for (i, v) in [even, odd].into_iter().enumerate() {
            let lower = _mm256_blend_epi16::<0xaa>(v, _mm256_slli_epi32::<16>(v));
            let upper = _mm256_blend_epi16::<0x55>(v, _mm256_srli_epi32::<16>(v));
            store(&mut panel.scales[4 * c + i], lower);
            store(&mut panel.scales[4 * c + 2 + i], upper);
        }
    }
    for half in 0..if DOT { 2 } else { 0 } {
        let pairs = [of.pairs::<0>(half), of.pairs::<1>(half), of.pairs::<2>(half), of.pairs::<3>(half)];
        for (q, pairs) in pairs.into_iter().enumerate() {
            store(&mut panel.mins[4 * half + q], _mm256_mullo_epi16(pairs, _mm256_set1_epi16(-32)));
        }
    }
    panel.d[0] = store8(direct::last_two_halves(blocks)[1]);
}

impl Format for Q6K {
    const TILES_FROM: usize = 7;
    const SEVERAL_FROM: usize = 3;
    const OFFSET_32: bool = true;
    const BY_ROW: bool = true;

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn direct<const N: usize>(strip: &Strip<'_>, x: [&[Q8Block]; N]) -> [__m256; N] {
        gemv(strip, x)
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn several(strip: &Strip<'_>, x: &[&[Q8Block]], acc: &mut [__m256; SEVERAL]) {
        let rows = direct::rows_of(strip);
        for s in 0..rows[0].len() {
            let mut sums = [[_mm256_setzero_si256(); SEVERAL]; 2];
            let blocks = direct::nth(&rows, s);
            let x = &direct::super_blocks(x, s)[..x.len()];
            let of = Scales::of(&blocks);
            let [_, d] = direct::last_two_halves(&blocks);
            for (half, sums) in sums.iter_mut().enumerate() {
                let low0 = direct::eights_32(&blocks, 64 * half);
                let low1 = direct::eights_32(&blocks, 64 * half + 32);
                let high = direct::eights_32(&blocks, 128 + 32 * half);
                let at = (2 * s + half) * 4 * BYTES;
                strip.fetch(at, BYTES);
                block_sums::<0>(&low0, &high, &of, half, x, sums);
                strip.fetch(at + BYTES, BYTES);
                block_sums::<1>(&low1, &high, &of, half, x, sums);
                strip.fetch(at + 2 * BYTES, BYTES);
                block_sums::<2>(&low0, &high, &of, half, x, sums);
                strip.fetch(at + 3 * BYTES, BYTES);
                block_sums::<3>(&low1, &high, &of, half, x, sums);
            }
            for (t, x) in x.iter().enumerate() {
                for sums in &sums {
                    acc[t] = tile::add_block(acc[t], sums[t], d, _mm256_set1_ps(x.d));
                }
            }
        }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn unpack<const DOT: bool>(strip: &Strip<'_>, s: usize, panel: &mut Panel) {
        let blocks = direct::block_of(strip, s);
        unpack_codes::<0, 0>(&blocks, &mut panel.codes);
        unpack_codes::<0, 16>(&blocks, &mut panel.codes);
        unpack_codes::<1, 0>(&blocks, &mut panel.codes);
        unpack_codes::<1, 16>(&blocks, &mut panel.codes);
        unpack_scales::<DOT>(&blocks, panel);
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn unpack_by_row(strip: &Strip<'_>, s: usize, panel: &mut Panel) {
        let blocks = direct::block_of(strip, s);
        for (r, block) in blocks.iter().enumerate() {
            for half in 0..2 {
                for (to, w) in panel.codes[4 * half..].iter_mut().zip(row_codes(block, half)) {
                    store(&mut to[r], w);
                }
            }
        }
        unpack_scales::<false>(&blocks, panel);
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn tile<const L: usize, const N: usize>(w: Rows<'_, L>, _: usize, x: &[&Lanes<L>; N], acc: &mut Acc<N>) {
        tile::halves_16(w, x, from_mut(acc))
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn tile_by_row<const M: usize, const N: usize>(
        w: Rows<'_, LANES>,
        x: &[&Lanes<LANES>; N],
        acc: &mut [Acc<N>; M],
    ) {
        tile::halves_16(w, x, acc)
    }
}
