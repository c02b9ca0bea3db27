//! Q4_K and Q5_K with few tokens, in AVX-512 vectors of sixteen rows, straight from the file's layout.
//!
//! Four bytes of each row are a vector, as in a panel, but none is written: a transposition of sixteen bytes of sixteen
//! rows is cheap, as half of it is what the loads do, and its result meets all tokens while it is in registers.

use std::arch::x86_64::*;

use super::super::k_quants::K45;
use super::super::load::{broadcast, prefetch};
use super::super::{self as avx2, STRIP};
use super::MAX_STRIPS;
use super::unpack::transpose_quarters;
use crate::kernels::{Out, PanelScratch, Q8Block, Q8Tokens, WeightRows};

/// Rows of a vector.
const ROWS: usize = MAX_STRIPS * STRIP;

/// Tokens that rows meet at most while they are decoded: as many as there are registers for their sums.
pub(super) const MOST: usize = 8;

/// Sixteen rows, as they lie in the file.
#[derive(Clone, Copy)]
struct Rows<'a> {
    data: &'a [u8],
    row_bytes: usize,
    /// How far ahead of a byte to fetch, in bytes.
    ahead: usize,
}

/// The scales of a super-block of sixteen rows: dword `r` belongs to row `r`.
struct Scales {
    /// Scales 0-3, and 4-7.
    scales: [__m512i; 2],
    /// The same for minima.
    mins: [__m512i; 2],
    d: __m512,
    m: __m512,
}

/// Multiplies with at most [`MOST`] tokens.
///
/// May run only on a CPU with AVX2, FMA, F16C and AVX-512 F, BW, VL and VNNI.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) fn matmul<const FIVE: bool, const BYTES: usize>(
    w: WeightRows<'_>,
    x: Q8Tokens<'_>,
    out: &mut Out<'_>,
    scratch: &mut PanelScratch,
) {
    if w.n_rows() < ROWS {
        return avx2::matmul::<K45<FIVE, BYTES>>(w, x, out, scratch);
    }
    match x.len() {
        1 => multiply::<FIVE, BYTES, 1>(w, x, out),
        2 => multiply::<FIVE, BYTES, 2>(w, x, out),
        3 => multiply::<FIVE, BYTES, 3>(w, x, out),
        4 => multiply::<FIVE, BYTES, 4>(w, x, out),
        5 => multiply::<FIVE, BYTES, 5>(w, x, out),
        6 => multiply::<FIVE, BYTES, 6>(w, x, out),
        7 => multiply::<FIVE, BYTES, 7>(w, x, out),
        8 => multiply::<FIVE, BYTES, 8>(w, x, out),
        n => unreachable!("{n} tokens are none or not few"),
    }
}

/// Multiplies sixteen rows or more with `N` tokens.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
#[inline(never)]
fn multiply<const FIVE: bool, const BYTES: usize, const N: usize>(
    w: WeightRows<'_>,
    x: Q8Tokens<'_>,
    out: &mut Out<'_>,
) {
    let n_rows = w.n_rows();
    let ahead = avx2::prefetch_distance(ROWS / STRIP * w.row_bytes());
    let tokens: [&[Q8Block]; N] = std::array::from_fn(|t| x.row(t));
    for r in (0..n_rows).step_by(ROWS) {
        // Where fewer than sixteen rows are left, some before them are multiplied again.
        let first = r.min(n_rows - ROWS);
        let rows = Rows::new(w.rows(first..first + ROWS), ahead);
        let products = products::<FIVE, BYTES, N>(&rows, &tokens);
        for t in 0..N {
            out.put(x.out_row(t), r, &store(products[t])[r - first..]);
        }
    }
}

/// The products of sixteen rows with `N` tokens.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
#[inline]
fn products<const FIVE: bool, const BYTES: usize, const N: usize>(
    rows: &Rows<'_>,
    tokens: &[&[Q8Block]; N],
) -> [__m512; N] {
    let mut acc = [_mm512_setzero_ps(); N];
    for s in 0..rows.row_bytes / BYTES {
        let mut x = [&tokens[0][s]; N];
        for t in 1..N {
            x[t] = &tokens[t][s];
        }
        let of = scales(rows, s * BYTES);
        let sum = sums::<FIVE, BYTES, N>(rows, s, &of, &x);
        let min = minima(&of, &x);
        for t in 0..N {
            let d = _mm512_set1_ps(x[t].d);
            acc[t] = _mm512_add_ps(acc[t], _mm512_mul_ps(_mm512_cvtepi32_ps(sum[t]), _mm512_mul_ps(of.d, d)));
            acc[t] = _mm512_sub_ps(acc[t], _mm512_mul_ps(_mm512_cvtepi32_ps(min[t]), _mm512_mul_ps(of.m, d)));
        }
    }
    acc
}

/// The integer sums of super-block `s` with each token.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
#[inline]
fn sums<const FIVE: bool, const BYTES: usize, const N: usize>(
    rows: &Rows<'_>,
    s: usize,
    of: &Scales,
    x: &[&Q8Block; N],
) -> [__m512i; N] {
    let (zero, byte) = (_mm512_setzero_si512(), _mm512_set1_epi32(0xff));
    let at = s * BYTES;
    let high = if FIVE { [dwords(rows, at + 16), dwords(rows, at + 32)] } else { [[zero; 4]; 2] };
    let mut sum = [zero; N];
    for k in 0..4 {
        rows.fetch(ROWS * at + k * (ROWS * BYTES / 4), ROWS * BYTES / 4);
        let from = at + K45::<FIVE, BYTES>::QS + 32 * k;
        // What the tokens' codes are read through: one address each, so that registers suffice for those of eight tokens.
        let mut parts = [&x[0].codes.as_chunks::<64>().0[k]; N];
        for t in 1..N {
            parts[t] = &x[t].codes.as_chunks::<64>().0[k];
        }
        let mut y = [[zero; N]; 2];
        for h in 0..2 {
            let q = dwords(rows, from + 16 * h);
            for i in 0..4 {
                let w = codes::<FIVE>(q[i], high[h][i], k);
                for t in 0..N {
                    for odd in 0..2 {
                        y[odd][t] = _mm512_dpbusd_epi32(y[odd][t], w[odd], spread(parts[t], 8 * odd + 4 * h + i));
                    }
                }
            }
        }
        let scales = _mm512_srlv_epi32(of.scales[k / 2], _mm512_set1_epi32(16 * (k % 2) as i32));
        let scales = [_mm512_and_si512(scales, byte), _mm512_and_si512(_mm512_srli_epi32::<8>(scales), byte)];
        for t in 0..N {
            for odd in 0..2 {
                // Scales have six bits and sub-scales of tokens as many: a product fills no more than the lower half.
                let scale = _mm512_mullo_epi16(scales[odd], spread(&x[t].scale_pairs, 2 * k + odd));
                sum[t] = _mm512_add_epi32(sum[t], _mm512_mullo_epi32(y[odd][t], scale));
            }
        }
    }
    sum
}

/// The codes of blocks `2 k` and `2 k + 1` from the bytes that hold their first four bits, and the fifth.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn codes<const FIVE: bool>(q: __m512i, high: __m512i, k: usize) -> [__m512i; 2] {
    let nibble = _mm512_set1_epi8(15);
    let w = [_mm512_and_si512(q, nibble), _mm512_and_si512(_mm512_srli_epi16::<4>(q), nibble)];
    if !FIVE {
        return w;
    }
    // Bit `j` comes to be the fifth of its byte; or-ed to a nibble is what that and 16 have in common.
    let fifth = |j: usize| _mm512_rorv_epi32(high, _mm512_set1_epi32((j + 28) as i32));
    let sixteen = _mm512_set1_epi8(16);
    [
        _mm512_ternarylogic_epi32::<0xf8>(w[0], fifth(2 * k), sixteen),
        _mm512_ternarylogic_epi32::<0xf8>(w[1], fifth(2 * k + 1), sixteen),
    ]
}

/// The integer sums of the minima with each token.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
#[inline]
fn minima<const N: usize>(of: &Scales, x: &[&Q8Block; N]) -> [__m512i; N] {
    let mut min = [_mm512_setzero_si512(); N];
    for i in 0..4 {
        let m = byte_pairs(of.mins[i / 2], i % 2);
        for t in 0..N {
            let m = _mm512_mullo_epi16(m, spread(&x[t].scales, i));
            min[t] = _mm512_dpwssd_epi32(min[t], m, spread(&x[t].sums, i));
        }
    }
    min
}

/// The scales of the blocks at byte `at` of the rows; how they lie there, the AVX2 code tells.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl")]
#[inline]
fn scales(rows: &Rows<'_>, at: usize) -> Scales {
    let [floats, a, b, c] = dwords(rows, at);
    let (six, nibble, pair) = (_mm512_set1_epi8(0x3f), _mm512_set1_epi8(15), _mm512_set1_epi8(0x30));
    let top = |v: __m512i| _mm512_and_si512(_mm512_srli_epi16::<2>(v), pair);
    let scales = [_mm512_and_si512(a, six), _mm512_or_si512(_mm512_and_si512(c, nibble), top(a))];
    let high = _mm512_and_si512(_mm512_srli_epi16::<4>(c), nibble);
    let mins = [_mm512_and_si512(b, six), _mm512_or_si512(high, top(b))];
    let d = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(floats));
    let m = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(floats)));
    Scales { scales, mins, d, m }
}

/// Sixteen bytes at `at` of the rows: dword `r` of vector `c` is dword `c` of row `r`.
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512vl")]
#[inline]
fn dwords(rows: &Rows<'_>, at: usize) -> [__m512i; 4] {
    let mut v = [_mm512_setzero_si512(); 4];
    for i in 0..4 {
        v[i] = rows.quarter(i, at);
    }
    transpose_quarters(v)
}

/// Bytes `2 i` and `2 i + 1` of every dword as a pair of 16-bit numbers.
#[target_feature(enable = "avx2,avx512f,avx512bw")]
#[inline]
fn byte_pairs(v: __m512i, i: usize) -> __m512i {
    let v = _mm512_srlv_epi32(v, _mm512_set1_epi32(16 * i as i32));
    let (low, high) = (_mm512_set1_epi32(0xff), _mm512_set1_epi32(0xff_0000));
    _mm512_or_si512(_mm512_and_si512(v, low), _mm512_and_si512(_mm512_slli_epi32::<8>(v), high))
}

/// Sixteen bytes.
///
/// # Safety
/// They may be read.
#[target_feature(enable = "avx2")]
#[inline]
unsafe fn load(from: *const u8) -> __m128i {
    // SAFETY: the caller's promise.
    unsafe { _mm_loadu_si128(from.cast()) }
}

/// Dword `i` of `from` in every lane.
#[target_feature(enable = "avx2,avx512f")]
#[inline]
fn spread<T: avx2::load::Plain>(from: &T, i: usize) -> __m512i {
    _mm512_broadcastd_epi32(_mm256_castsi256_si128(broadcast(from, i)))
}

/// The sixteen floats of a vector.
#[target_feature(enable = "avx512f")]
#[inline]
fn store(v: __m512) -> [f32; ROWS] {
    let mut to = [0.0; ROWS];
    // SAFETY: `to` has sixteen floats.
    unsafe { _mm512_storeu_ps(to.as_mut_ptr(), v) };
    to
}

impl<'a> Rows<'a> {
    /// All rows of `w`, which are sixteen.
    #[inline(always)]
    fn new(w: WeightRows<'a>, ahead: usize) -> Rows<'a> {
        assert_eq!(w.n_rows(), ROWS);
        Rows { data: w.data(), row_bytes: w.row_bytes(), ahead }
    }

    /// Sixteen bytes at `at` of rows `4 l + i`, where `l` counts lanes of 128 bits.
    #[target_feature(enable = "avx2,avx512f")]
    #[inline]
    fn quarter(&self, i: usize, at: usize) -> __m512i {
        assert!(i < 4 && at + 16 <= self.row_bytes);
        // SAFETY: there are sixteen rows, and the bytes lie within each by the assertion.
        unsafe {
            // Four rows' distance is a factor of addresses, where sixteen rows' offsets would need as many registers.
            let (first, step) = (self.data.as_ptr().add(i * self.row_bytes + at), 4 * self.row_bytes);
            let low = _mm256_set_m128i(load(first.add(step)), load(first));
            let high = _mm256_set_m128i(load(first.add(3 * step)), load(first.add(2 * step)));
            _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), high)
        }
    }

    /// Fetches what lies `ahead` of bytes `at .. at + len` of the rows, taken one after another. See [`avx2::Strip::fetch`].
    #[inline(always)]
    fn fetch(&self, at: usize, len: usize) {
        prefetch(self.data, self.ahead + at, len);
    }
}
