//! Q4_K and Q5_K: four- and five-bit codes, six-bit scales and minima per 32 columns.
//!
//! A block is `d` and `dmin` (half floats), twelve bytes of scales and minima, for Q5_K 32 bytes with the codes'
//! fifth bits (bit `j` of byte `i` belongs to column `32 j + i`), and 128 bytes of nibbles (byte `32 k + i` holds
//! columns `64 k + i` and, in its high half, `64 k + 32 + i`).

use std::arch::x86_64::*;
use std::array::from_mut;

use super::direct::{self, Blocks, Eights};
use super::lanes::paired;
use super::load::{broadcast, load32, store, store8};
use super::tile::{self, Acc, Rows, add_super};
use super::{Format, SEVERAL, Strip};
use crate::kernels::{LANES, Lanes, Panel, Q8Block};

/// Q5_K where `FIVE`, else Q4_K; in blocks of `BYTES`.
pub(super) struct K45<const FIVE: bool, const BYTES: usize>;

/// The scales of eight rows.
struct Scales {
    /// Dword `r` of vector `c`: scales `4 c .. 4 c + 4` of row `r`.
    scales: [__m256i; 2],
    /// The same for minima.
    mins: [__m256i; 2],
    d: __m256,
    m: __m256,
}

/// The scales of eight blocks.
///
/// Behind `d` and `dmin` stand three dwords: six bits of scales 0-3, six bits of minima 0-3, and the low nibbles of scales
/// and minima 4-7, whose upper two bits are the top of the first two dwords' bytes.
#[target_feature(enable = "avx2,f16c")]
#[inline]
fn scales<const BYTES: usize>(blocks: &Blocks<'_, BYTES>) -> Scales {
    let [_, a, b, c] = direct::dwords_16(blocks, 0);
    let (six, nibble, pair) = (_mm256_set1_epi8(0x3f), _mm256_set1_epi8(15), _mm256_set1_epi8(0x30));
    let top = |v: __m256i| _mm256_and_si256(_mm256_srli_epi16::<2>(v), pair);
    let scales = [_mm256_and_si256(a, six), _mm256_or_si256(_mm256_and_si256(c, nibble), top(a))];
    let high = _mm256_and_si256(_mm256_srli_epi16::<4>(c), nibble);
    let mins = [_mm256_and_si256(b, six), _mm256_or_si256(high, top(b))];
    let [d, m] = direct::first_two_halves(blocks);
    Scales { scales, mins, d, m }
}

/// Scales or minima `2 i` and `2 i + 1` of every row as a pair.
#[target_feature(enable = "avx2")]
#[inline]
fn neighbours(of: &[__m256i; 2], i: usize) -> __m256i {
    direct::bytes(of[i / 2], 2 * (i % 2), 2 * (i % 2) + 1)
}

/// Adds bit `j` of every byte of `high` to nibbles as their fifth bit.
#[target_feature(enable = "avx2")]
#[inline]
fn fifth(nibbles: __m256i, high: __m256i, j: usize) -> __m256i {
    let bit = _mm256_set1_epi8((1u8 << j) as i8);
    let set = _mm256_cmpeq_epi8(_mm256_and_si256(high, bit), bit);
    _mm256_or_si256(nibbles, _mm256_and_si256(set, _mm256_set1_epi8(16)))
}

impl<const FIVE: bool, const BYTES: usize> K45<FIVE, BYTES> {
    /// Where the nibbles begin.
    const QS: usize = if FIVE { 48 } else { 16 };

    /// The codes of block `j` from the bytes that hold their first four bits, and the fifth.
    #[target_feature(enable = "avx2")]
    #[inline]
    fn codes(q: &[Eights; 4], high: &[Eights; 4], j: usize) -> [Eights; 4] {
        let nibble = _mm256_set1_epi8(15);
        let mut w = *q;
        for c in 0..4 {
            for i in 0..2 {
                let shifted = if j.is_multiple_of(2) { q[c][i] } else { _mm256_srli_epi16::<4>(q[c][i]) };
                w[c][i] = _mm256_and_si256(shifted, nibble);
                if FIVE {
                    w[c][i] = fifth(w[c][i], high[c][i], j);
                }
            }
        }
        w
    }

    /// The scaled sums of block `j` with a token.
    #[target_feature(enable = "avx2")]
    #[inline]
    fn block_sum(w: &[Eights; 4], scale: __m256i, j: usize, x: &Q8Block) -> __m256i {
        let scale = _mm256_mullo_epi16(scale, broadcast(&x.scale_pairs, j));
        let y = direct::products(w, x, 4 * j);
        let (even, odd) = direct::even_odd(y[0], y[1]);
        // Four results of `maddubs` fit 16 bits, and eight where codes have four bits.
        match FIVE {
            true => _mm256_add_epi32(_mm256_madd_epi16(even, scale), _mm256_madd_epi16(odd, scale)),
            false => _mm256_madd_epi16(_mm256_add_epi16(even, odd), scale),
        }
    }

    /// The integer sums of a super-block with each token: products, and minima. There are as many sums as tokens or more.
    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    fn sums<const N: usize>(
        strip: &Strip<'_>,
        s: usize,
        blocks: &Blocks<'_, BYTES>,
        of: &Scales,
        x: &[&Q8Block],
    ) -> ([__m256i; N], [__m256i; N]) {
        let (mut sum, mut min) = ([_mm256_setzero_si256(); N], [_mm256_setzero_si256(); N]);
        let high = if FIVE { direct::eights_32(blocks, 16) } else { [[_mm256_setzero_si256(); 2]; 4] };
        for k in 0..4 {
            strip.fetch((4 * s + k) * 2 * BYTES, 2 * BYTES);
            let q = direct::eights_32(blocks, Self::QS + 32 * k);
            for j in [2 * k, 2 * k + 1] {
                let scale = direct::bytes(of.scales[j / 4], j % 4, j % 4);
                let w = Self::codes(&q, &high, j);
                for (x, sum) in x.iter().zip(&mut sum) {
                    *sum = _mm256_add_epi32(*sum, Self::block_sum(&w, scale, j, x));
                }
            }
        }
        for i in 0..4 {
            let m = neighbours(&of.mins, i);
            for (x, min) in x.iter().zip(&mut min) {
                let m = _mm256_mullo_epi16(m, broadcast(&x.scales, i));
                *min = _mm256_add_epi32(*min, _mm256_madd_epi16(m, broadcast(&x.sums, i)));
            }
        }
        (sum, min)
    }

    /// Adds the products of a tile to `acc`.
    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    fn products<const L: usize, const M: usize, const N: usize>(
        w: Rows<'_, L>,
        x: &[&Lanes<L>; N],
        acc: &mut [Acc<N>; M],
    ) {
        match (FIVE, x.iter().all(|x| x.narrow)) {
            (false, true) => tile::super_pairs::<16, true, L, M, N>(w, x, acc),
            (false, false) => tile::super_pairs::<8, false, L, M, N>(w, x, acc),
            (true, true) => tile::super_pairs::<4, true, L, M, N>(w, x, acc),
            (true, false) => tile::super_pairs::<4, false, L, M, N>(w, x, acc),
        }
    }

    /// Writes what a panel holds beside codes.
    #[target_feature(enable = "avx2,fma,f16c")]
    fn unpack_scales<const DOT: bool>(blocks: &Blocks<'_, BYTES>, panel: &mut Panel) {
        let of = scales(blocks);
        for i in 0..4 {
            store(&mut panel.mins[i], neighbours(&of.mins, i));
            if DOT {
                for j in [2 * i, 2 * i + 1] {
                    store(&mut panel.scales[j], direct::bytes(of.scales[j / 4], j % 4, j % 4));
                }
            } else {
                store(&mut panel.scales[i], neighbours(&of.scales, i));
            }
        }
        (panel.d[0], panel.m[0]) = (store8(of.d), store8(of.m));
    }
}

impl<const FIVE: bool, const BYTES: usize> Format for K45<FIVE, BYTES> {
    const TILES_FROM: usize = 8;
    const SEVERAL_FROM: usize = 4;
    const PAIRED: bool = true;
    const BY_ROW: bool = true;

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn direct<const N: usize>(strip: &Strip<'_>, x: [&[Q8Block]; N]) -> [__m256; N] {
        let mut acc = [_mm256_setzero_ps(); N];
        let rows = direct::rows_of(strip);
        for s in 0..rows[0].len() {
            let blocks = direct::nth(&rows, s);
            let x = direct::super_block(&x, s);
            let of = scales(&blocks);
            let (sum, min) = Self::sums::<N>(strip, s, &blocks, &of, &x);
            for t in 0..N {
                acc[t] = add_super(acc[t], sum[t], min[t], of.d, of.m, _mm256_set1_ps(x[t].d));
            }
        }
        acc
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn several(strip: &Strip<'_>, x: &[&[Q8Block]], acc: &mut [__m256; SEVERAL]) {
        let rows = direct::rows_of(strip);
        for s in 0..rows[0].len() {
            let blocks = direct::nth(&rows, s);
            let x = &direct::super_blocks(x, s)[..x.len()];
            let of = scales(&blocks);
            let (sum, min) = Self::sums::<SEVERAL>(strip, s, &blocks, &of, x);
            for (t, x) in x.iter().enumerate() {
                acc[t] = add_super(acc[t], sum[t], min[t], of.d, of.m, _mm256_set1_ps(x.d));
            }
        }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn unpack<const DOT: bool>(strip: &Strip<'_>, s: usize, panel: &mut Panel) {
        let blocks = direct::block_of(strip, s);
        let nibble = _mm256_set1_epi8(15);
        for half in 0..2 {
            let high = if FIVE { direct::dwords_16(&blocks, 16 + 16 * half) } else { [nibble; 4] };
            for k in 0..4 {
                let q = direct::dwords_16(&blocks, Self::QS + 32 * k + 16 * half);
                for i in 0..4 {
                    let mut w =
                        [_mm256_and_si256(q[i], nibble), _mm256_and_si256(_mm256_srli_epi16::<4>(q[i]), nibble)];
                    if FIVE {
                        w = [fifth(w[0], high[i], 2 * k), fifth(w[1], high[i], 2 * k + 1)];
                    }
                    if !DOT {
                        w = paired(w);
                    }
                    store(&mut panel.codes[2 * k][4 * half + i], w[0]);
                    store(&mut panel.codes[2 * k + 1][4 * half + i], w[1]);
                }
            }
        }
        Self::unpack_scales::<DOT>(&blocks, panel);
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn unpack_by_row(strip: &Strip<'_>, s: usize, panel: &mut Panel) {
        let blocks = direct::block_of(strip, s);
        let nibble = _mm256_set1_epi8(15);
        for (r, block) in blocks.iter().enumerate() {
            let high = if FIVE { load32(*block, 16) } else { nibble };
            for k in 0..4 {
                let q = load32(*block, Self::QS + 32 * k);
                let mut w = [_mm256_and_si256(q, nibble), _mm256_and_si256(_mm256_srli_epi16::<4>(q), nibble)];
                if FIVE {
                    w = [fifth(w[0], high, 2 * k), fifth(w[1], high, 2 * k + 1)];
                }
                w = paired(w);
                store(&mut panel.codes[2 * k][r], w[0]);
                store(&mut panel.codes[2 * k + 1][r], w[1]);
            }
        }
        Self::unpack_scales::<false>(&blocks, panel);
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn tile<const L: usize, const N: usize>(w: Rows<'_, L>, _: usize, x: &[&Lanes<L>; N], acc: &mut Acc<N>) {
        Self::products(w, x, from_mut(acc))
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn tile_by_row<const M: usize, const N: usize>(
        w: Rows<'_, LANES>,
        x: &[&Lanes<LANES>; N],
        acc: &mut [Acc<N>; M],
    ) {
        Self::products(w, x, acc)
    }
}
