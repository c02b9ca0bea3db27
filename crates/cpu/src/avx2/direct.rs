//! Few tokens straight from the file's layout: a vector's lower half holds sixteen bytes of row `i`, its upper half
//! those of row `i + 4`, so that four vectors are eight rows and a reduction leaves the sum of row `r` in lane `r`.

use std::arch::x86_64::*;

use super::load::{broadcast, broadcast8, half_vector, load16};
use super::reduce::transpose_quarter;
use super::{SEVERAL, Strip};
use crate::kernels::{Q8Block, STRIP};

/// The same block of eight rows.
pub(super) type Blocks<'a, const BYTES: usize> = [&'a [u8; BYTES]; STRIP];

/// Every row of a strip as blocks of `BYTES` bytes, all equally many.
#[inline(always)]
pub(super) fn rows_of<'a, const BYTES: usize>(strip: &Strip<'a>) -> [&'a [[u8; BYTES]]; STRIP] {
    let n = strip.rows[0].len() / BYTES;
    let mut rows: [&[[u8; BYTES]]; STRIP] = [&[]; STRIP];
    for r in 0..STRIP {
        rows[r] = &strip.rows[r].as_chunks().0[..n];
    }
    rows
}

/// Block `b` of every row.
#[inline(always)]
pub(super) fn nth<'a, const BYTES: usize>(rows: &[&'a [[u8; BYTES]]; STRIP], b: usize) -> Blocks<'a, BYTES> {
    let mut blocks = [&rows[0][b]; STRIP];
    for r in 1..STRIP {
        blocks[r] = &rows[r][b];
    }
    blocks
}

/// Block `b` of every row of a strip, where no others are asked for.
#[inline(always)]
pub(super) fn block_of<'a, const BYTES: usize>(strip: &Strip<'a>, b: usize) -> Blocks<'a, BYTES> {
    let block = |r: usize| -> &'a [u8; BYTES] {
        strip.rows[r].get(BYTES * b..).and_then(|row| row.first_chunk()).expect("a block of every row")
    };
    let mut blocks = [block(0); STRIP];
    for r in 1..STRIP {
        blocks[r] = block(r);
    }
    blocks
}

/// Super-block `s` of every token.
#[inline(always)]
pub(super) fn super_block<'a, const N: usize>(x: &[&'a [Q8Block]; N], s: usize) -> [&'a Q8Block; N] {
    let mut blocks = [&x[0][s]; N];
    for t in 1..N {
        blocks[t] = &x[t][s];
    }
    blocks
}

/// Super-block `s` of each token; the first one's stands for tokens that there are not.
#[inline(always)]
pub(super) fn super_blocks<'a>(x: &[&'a [Q8Block]], s: usize) -> [&'a Q8Block; SEVERAL] {
    let mut blocks = [&x[0][s]; SEVERAL];
    for (block, x) in blocks.iter_mut().zip(x) {
        *block = &x[s];
    }
    blocks
}

/// Sixteen bytes at `at` of the rows of each vector.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn pairs<const BYTES: usize>(blocks: &Blocks<'_, BYTES>, at: usize) -> [__m256i; 4] {
    let mut v = [_mm256_setzero_si256(); 4];
    for i in 0..4 {
        v[i] = _mm256_set_m128i(load16(blocks[i + 4], at), load16(blocks[i], at));
    }
    v
}

/// Sixteen bytes at `at` of eight rows as dwords: lane `r` of vector `c` is dword `c` of row `r`.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn dwords_16<const BYTES: usize>(blocks: &Blocks<'_, BYTES>, at: usize) -> [__m256i; 4] {
    transpose_quarter(pairs(blocks, at))
}

/// Eight columns of eight rows: bytes of rows 0 and 1 (4 and 5 in the upper half) in the first vector, of rows 2 and 3
/// (6 and 7) in the second. Eight bytes of a token meet both; [`even_odd`] of two such vectors of results puts row `r`
/// into lane `r`.
pub(super) type Eights = [__m256i; 2];

/// Sixteen bytes at `at` of eight rows.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn eights<const BYTES: usize>(blocks: &Blocks<'_, BYTES>, at: usize) -> [Eights; 2] {
    let v = pairs(blocks, at);
    [
        [_mm256_unpacklo_epi64(v[0], v[1]), _mm256_unpacklo_epi64(v[2], v[3])],
        [_mm256_unpackhi_epi64(v[0], v[1]), _mm256_unpackhi_epi64(v[2], v[3])],
    ]
}

/// Thirty-two bytes at `at` of eight rows.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn eights_32<const BYTES: usize>(blocks: &Blocks<'_, BYTES>, at: usize) -> [Eights; 4] {
    let ([a, b], [c, d]) = (eights(blocks, at), eights(blocks, at + 16));
    [a, b, c, d]
}

/// The sums in 16 bits of `C` times eight columns with a token's, of which the first are `8 c ..`.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn products<const C: usize>(w: &[Eights; C], x: &Q8Block, c: usize) -> Eights {
    let codes = broadcast8(&x.codes, c);
    let mut y = [_mm256_maddubs_epi16(w[0][0], codes), _mm256_maddubs_epi16(w[0][1], codes)];
    for i in 1..C {
        let codes = broadcast8(&x.codes, c + i);
        for h in 0..2 {
            y[h] = _mm256_add_epi16(y[h], _mm256_maddubs_epi16(w[i][h], codes));
        }
    }
    y
}

/// The lower and the upper nibbles.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn nibbles(q: [__m256i; 4]) -> [[__m256i; 4]; 2] {
    let nibble = _mm256_set1_epi8(15);
    let mut v = [q; 2];
    for i in 0..4 {
        v[0][i] = _mm256_and_si256(q[i], nibble);
        v[1][i] = _mm256_and_si256(_mm256_srli_epi16::<4>(q[i]), nibble);
    }
    v
}

/// The codes of columns `16 k .. 16 k + 16`, in both halves.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn codes_16(x: &Q8Block, k: usize) -> __m256i {
    _mm256_broadcastsi128_si256(half_vector(&x.codes.as_chunks::<16>().0[k]))
}

/// Lane `r` is the sum of row `r` over block `j`, for signed codes. The sign of a weight moves to the activation.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn signed_sum(w: &[[__m256i; 4]; 2], x: &Q8Block, j: usize) -> __m256i {
    let ones = _mm256_set1_epi16(1);
    let mut y = [ones; 4];
    for i in 0..4 {
        let mut sum = [ones; 2];
        for h in 0..2 {
            let signed = _mm256_sign_epi8(codes_16(x, 2 * j + h), w[h][i]);
            sum[h] = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(w[h][i]), signed), ones);
        }
        y[i] = _mm256_add_epi32(sum[0], sum[1]);
    }
    sum_32(y)
}

/// Lane `r` is the sum of row `r` over block `j`, for unsigned codes up to 31 (15 where not `FIVE`) that stand for
/// `code - offset`.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn unsigned_sum<const FIVE: bool>(w: &[[__m256i; 4]; 2], x: &Q8Block, j: usize, offset: i16) -> __m256i {
    let ones = _mm256_set1_epi16(1);
    let mut y = [ones; 4];
    for i in 0..4 {
        let first = _mm256_maddubs_epi16(w[0][i], codes_16(x, 2 * j));
        y[i] = _mm256_add_epi16(first, _mm256_maddubs_epi16(w[1][i], codes_16(x, 2 * j + 1)));
    }
    let sum = if FIVE { sum_16_wide(y) } else { _mm256_madd_epi16(sum_16(y), ones) };
    match offset {
        0 => sum,
        _ => _mm256_sub_epi32(sum, _mm256_madd_epi16(broadcast(&x.half_sums, j), _mm256_set1_epi16(offset))),
    }
}

/// One vector whose 32-bit lane `r` holds two sums of row `r`, from four vectors of eight 16-bit lanes per row.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn sum_16(y: [__m256i; 4]) -> __m256i {
    let a = _mm256_add_epi16(_mm256_unpacklo_epi64(y[0], y[1]), _mm256_unpackhi_epi64(y[0], y[1]));
    let b = _mm256_add_epi16(_mm256_unpacklo_epi64(y[2], y[3]), _mm256_unpackhi_epi64(y[2], y[3]));
    let (even, odd) = even_odd(a, b);
    _mm256_add_epi16(even, odd)
}

/// Lane `r` is the sum of row `r`, from four vectors of eight 16-bit lanes per row; sums of two of them fit.
#[target_feature(enable = "avx2")]
#[inline]
fn sum_16_wide(y: [__m256i; 4]) -> __m256i {
    let ones = _mm256_set1_epi16(1);
    let a = _mm256_add_epi16(_mm256_unpacklo_epi64(y[0], y[1]), _mm256_unpackhi_epi64(y[0], y[1]));
    let b = _mm256_add_epi16(_mm256_unpacklo_epi64(y[2], y[3]), _mm256_unpackhi_epi64(y[2], y[3]));
    let (even, odd) = even_odd(_mm256_madd_epi16(a, ones), _mm256_madd_epi16(b, ones));
    _mm256_add_epi32(even, odd)
}

/// Lane `r` is the sum of row `r`, from four vectors of four 32-bit lanes per row.
#[target_feature(enable = "avx2")]
#[inline]
fn sum_32(y: [__m256i; 4]) -> __m256i {
    let a = _mm256_add_epi32(_mm256_unpacklo_epi64(y[0], y[1]), _mm256_unpackhi_epi64(y[0], y[1]));
    let b = _mm256_add_epi32(_mm256_unpacklo_epi64(y[2], y[3]), _mm256_unpackhi_epi64(y[2], y[3]));
    let (even, odd) = even_odd(a, b);
    _mm256_add_epi32(even, odd)
}

/// The even and the odd dwords of both, those of `a` first in each half.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn even_odd(a: __m256i, b: __m256i) -> (__m256i, __m256i) {
    let (a, b) = (_mm256_castsi256_ps(a), _mm256_castsi256_ps(b));
    (
        _mm256_castps_si256(_mm256_shuffle_ps::<0b10_00_10_00>(a, b)),
        _mm256_castps_si256(_mm256_shuffle_ps::<0b11_01_11_01>(a, b)),
    )
}

/// Bytes `a` and `b` of every lane as two 16-bit numbers.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn bytes(v: __m256i, a: usize, b: usize) -> __m256i {
    let first = _mm_setr_epi32(0, 4, 8, 12);
    let places = _mm_set1_epi32(0x8000_8000u32 as i32 | (b << 16 | a) as i32);
    let twice = _mm_or_si128(first, _mm_slli_epi32::<16>(first));
    _mm256_shuffle_epi8(v, _mm256_broadcastsi128_si256(_mm_add_epi8(places, twice)))
}

/// The two half floats that open each row's block, as floats.
#[target_feature(enable = "avx2,f16c")]
#[inline]
pub(super) fn first_two_halves<const BYTES: usize>(blocks: &Blocks<'_, BYTES>) -> [__m256; 2] {
    let v = |r: usize| _mm_unpacklo_epi16(load16(blocks[r], 0), load16(blocks[r + 1], 0));
    // Dword c of four rows is one of `a`, `b`: four first halves, then four second ones.
    let (a, b) = (_mm_unpacklo_epi32(v(0), v(2)), _mm_unpacklo_epi32(v(4), v(6)));
    [_mm256_cvtph_ps(_mm_unpacklo_epi64(a, b)), _mm256_cvtph_ps(_mm_unpackhi_epi64(a, b))]
}

/// The two half floats that close each row's block, as floats.
#[target_feature(enable = "avx2,f16c")]
#[inline]
pub(super) fn last_two_halves<const BYTES: usize>(blocks: &Blocks<'_, BYTES>) -> [__m256; 2] {
    let end = |r: usize| load16(blocks[r], BYTES - 16);
    let v = |r: usize| _mm_unpackhi_epi16(end(r), end(r + 1));
    let (a, b) = (_mm_unpackhi_epi32(v(0), v(2)), _mm_unpackhi_epi32(v(4), v(6)));
    [_mm256_cvtph_ps(_mm_unpacklo_epi64(a, b)), _mm256_cvtph_ps(_mm_unpackhi_epi64(a, b))]
}
