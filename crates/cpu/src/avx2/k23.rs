//! Q2_K and Q3_K: two- and three-bit codes, a four- or six-bit scale per 16 columns.
//!
//! A Q2_K block is sixteen bytes with a scale in the lower and a minimum in the upper nibble, 64 bytes of codes, `d`
//! and `dmin` (half floats). A Q3_K block is 32 bytes with the codes' third bits (bit `j` of byte `i` belongs to column
//! `32 j + i`), 64 bytes of the lower two bits, eight bytes with the lower nibbles of the scales (the first eight in
//! the lower nibbles), four bytes with their upper pairs (pair `c` of byte `i` belongs to scale `4 c + i`), and `d`.
//! Both keep columns `128 h + 32 q + i` in pair `q` of byte `32 h + i`. Codes of Q3_K are offset by 4, scales by 32.

use std::arch::x86_64::*;

use super::direct::{self, Blocks};
use super::load::{broadcast, load16, load32_of_each, store, store8};
use super::reduce::{transpose, transpose_halves};
use super::tile::{self, Acc, Rows, add_super};
use super::{Format, Strip};
use crate::kernels::{Lanes, Panel, Q8Block, STRIP};

/// Q3_K where `THREE`, else Q2_K; in blocks of `BYTES`.
pub(super) struct K23<const THREE: bool, const BYTES: usize>;

/// The scales of eight rows.
struct Scales {
    /// Dword `r` of vector `c`: scales `4 c .. 4 c + 4` of row `r`, without offset.
    scales: [__m256i; 4],
    /// The same for minima, where there are any.
    mins: [__m256i; 4],
    d: __m256,
    m: __m256,
}

/// `v` with bit `from` of every byte at place 2, other bits anything.
#[target_feature(enable = "avx2")]
#[inline]
fn to_bit_2(v: __m256i, from: usize) -> __m256i {
    match from {
        0 | 1 => _mm256_sll_epi16(v, _mm_cvtsi32_si128(2 - from as i32)),
        _ => _mm256_srl_epi16(v, _mm_cvtsi32_si128(from as i32 - 2)),
    }
}

impl<const THREE: bool, const BYTES: usize> K23<THREE, BYTES> {
    /// Where the lower two bits of the codes begin.
    const QS: usize = if THREE { 32 } else { 16 };

    #[target_feature(enable = "avx2,f16c")]
    #[inline]
    fn scales(blocks: &Blocks<'_, BYTES>) -> Scales {
        let nibble = _mm256_set1_epi8(15);
        let mut head = [_mm_setzero_si128(); STRIP];
        for r in 0..STRIP {
            // The scales of Q3_K begin two bytes into the last sixteen.
            head[r] = if THREE { _mm_bsrli_si128::<2>(load16(blocks[r], BYTES - 16)) } else { load16(blocks[r], 0) };
        }
        let [a, b, c, e] = transpose_halves(head);
        let low = |v: __m256i| _mm256_and_si256(v, nibble);
        let high = |v: __m256i| _mm256_and_si256(_mm256_srli_epi16::<4>(v), nibble);
        let [d, m] = direct::last_two_halves(blocks);
        if !THREE {
            return Scales {
                scales: [low(a), low(b), low(c), low(e)],
                mins: [high(a), high(b), high(c), high(e)],
                d,
                m,
            };
        }
        let pair = _mm256_set1_epi8(0x30);
        let scales = [
            _mm256_or_si256(low(a), _mm256_and_si256(_mm256_slli_epi16::<4>(c), pair)),
            _mm256_or_si256(low(b), _mm256_and_si256(_mm256_slli_epi16::<2>(c), pair)),
            _mm256_or_si256(high(a), _mm256_and_si256(c, pair)),
            _mm256_or_si256(high(b), _mm256_and_si256(_mm256_srli_epi16::<2>(c), pair)),
        ];
        Scales { scales, mins: scales, d: m, m: _mm256_setzero_ps() }
    }

    /// Scales `a` and `b` of the four in a vector, as 16-bit numbers.
    #[target_feature(enable = "avx2")]
    #[inline]
    fn pair(scales: __m256i, a: usize, b: usize) -> __m256i {
        let pair = direct::bytes(scales, a, b);
        if THREE { _mm256_sub_epi16(pair, _mm256_set1_epi16(32)) } else { pair }
    }

    /// What the sums of columns `32 j ..` and `32 j + 16 ..` are multiplied with and taken off: minima, or the offset
    /// of the codes times the scale.
    #[target_feature(enable = "avx2")]
    #[inline]
    fn mins(of: &Scales, j: usize) -> __m256i {
        let pair = Self::pair(of.mins[j / 2], 2 * (j % 2), 2 * (j % 2) + 1);
        if THREE { _mm256_slli_epi16::<2>(pair) } else { pair }
    }

    /// The codes of quarter `q` of half `h`, from the bytes with the lower two bits and those with the third.
    #[target_feature(enable = "avx2")]
    #[inline]
    fn codes(low: __m256i, high: __m256i, h: usize, q: usize) -> __m256i {
        let low = _mm256_and_si256(_mm256_srl_epi16(low, _mm_cvtsi32_si128(2 * q as i32)), _mm256_set1_epi8(3));
        if !THREE {
            return low;
        }
        _mm256_or_si256(low, _mm256_and_si256(to_bit_2(high, 4 * h + q), _mm256_set1_epi8(4)))
    }

    /// The integer sums of a super-block with `N` tokens: products, and minima.
    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    fn sums<const N: usize>(
        strip: &Strip<'_>,
        s: usize,
        blocks: &Blocks<'_, BYTES>,
        of: &Scales,
        x: &[&Q8Block; N],
    ) -> ([__m256i; N], [__m256i; N]) {
        let (mut sum, mut min) = ([_mm256_setzero_si256(); N], [_mm256_setzero_si256(); N]);
        for part in 0..4 {
            let (h, a) = (part / 2, part % 2);
            strip.fetch((4 * s + part) * 2 * BYTES, 2 * BYTES);
            let low = direct::pairs(blocks, Self::QS + 32 * h + 16 * a);
            let high = if THREE { direct::pairs(blocks, 16 * a) } else { low };
            for q in 0..4 {
                let (j, k) = (4 * h + q, 8 * h + 2 * q + a);
                let scale = Self::pair(of.scales[k / 4], k % 4, k % 4);
                let mut w = low;
                for i in 0..4 {
                    w[i] = Self::codes(low[i], high[i], h, q);
                }
                for t in 0..N {
                    let codes = direct::codes_16(x[t], k);
                    let mut y = w;
                    for i in 0..4 {
                        y[i] = _mm256_maddubs_epi16(w[i], codes);
                    }
                    let scale = _mm256_mullo_epi16(scale, broadcast(&x[t].scale_pairs, j));
                    sum[t] = _mm256_add_epi32(sum[t], _mm256_madd_epi16(direct::sum_16(y), scale));
                }
            }
        }
        for j in 0..8 {
            let m = Self::mins(of, j);
            for t in 0..N {
                let m = _mm256_mullo_epi16(m, broadcast(&x[t].scale_pairs, j));
                min[t] = _mm256_add_epi32(min[t], _mm256_madd_epi16(m, broadcast(&x[t].half_sums, j)));
            }
        }
        (sum, min)
    }
}

impl<const THREE: bool, const BYTES: usize> Format for K23<THREE, BYTES> {
    const TILES_FROM: usize = 5;

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn direct<const N: usize>(strip: &Strip<'_>, x: [&[Q8Block]; N]) -> [__m256; N] {
        let mut acc = [_mm256_setzero_ps(); N];
        let rows = direct::rows_of(strip);
        for s in 0..rows[0].len() {
            let blocks = direct::nth(&rows, s);
            let x = direct::super_block(&x, s);
            let of = Self::scales(&blocks);
            let (sum, min) = Self::sums(strip, s, &blocks, &of, &x);
            for t in 0..N {
                acc[t] = match THREE {
                    true => {
                        let none = _mm256_setzero_si256();
                        add_super(acc[t], _mm256_sub_epi32(sum[t], min[t]), none, of.d, of.m, _mm256_set1_ps(x[t].d))
                    }
                    false => add_super(acc[t], sum[t], min[t], of.d, of.m, _mm256_set1_ps(x[t].d)),
                };
            }
        }
        acc
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn unpack<const DOT: bool>(strip: &Strip<'_>, s: usize, panel: &mut Panel) {
        let blocks = direct::block_of(strip, s);
        let of = Self::scales(&blocks);
        let slices = blocks.map(|block| &block[..]);
        let high = if THREE { transpose(load32_of_each(&slices, 0)) } else { [_mm256_setzero_si256(); 8] };
        for h in 0..2 {
            let low = transpose(load32_of_each(&slices, Self::QS + 32 * h));
            for q in 0..4 {
                for i in 0..8 {
                    store(&mut panel.codes[4 * h + q][i], Self::codes(low[i], high[i], h, q));
                }
            }
        }
        for k in 0..16 {
            store(&mut panel.scales[k], Self::pair(of.scales[k / 4], k % 4, k % 4));
        }
        for j in 0..8 {
            store(&mut panel.mins[j], Self::mins(&of, j));
        }
        (panel.d[0], panel.m[0]) = (store8(of.d), store8(of.m));
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn tile<const L: usize, const N: usize>(w: Rows<'_, L>, _: usize, x: &[&Lanes<L>; N], acc: &mut Acc<N>) {
        tile::super_16::<THREE, L, N>(w, x, acc)
    }
}
