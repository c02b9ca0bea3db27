//! Q4_K and Q5_K in AVX-512 vectors of sixteen rows.

use std::arch::x86_64::*;

use super::super::k_quants::K45;
use super::sixteen::{Straight, SuperBlock, Transposed, Wide, spread};
use crate::kernels::Q8Block;

/// The scales of a super-block of sixteen rows: dword `r` belongs to row `r`.
///
/// # Safety of its functions
/// As for [`SuperBlock`].
trait Scales {
    /// The scales of blocks `2 k` and `2 k + 1`, a pair of 16-bit numbers.
    unsafe fn scales(&self, k: usize) -> __m512i;

    /// The minima of these blocks, likewise.
    unsafe fn mins(&self, k: usize) -> __m512i;

    /// What scales and minima are worth.
    unsafe fn floats(&self) -> [__m512; 2];
}

/// Bytes of scales, each taken out when it is needed: for tokens that are met once.
struct Packed {
    /// Scales 0-3, and 4-7.
    scales: [__m512i; 2],
    /// The same for minima.
    mins: [__m512i; 2],
    floats: [__m512; 2],
}

/// All of them taken out.
struct Unpacked {
    scales: [__m512i; 4],
    mins: [__m512i; 4],
    floats: [__m512; 2],
}

/// Sixteens of bytes of the larger block, that of Q5_K.
const CHUNKS: usize = 11;

/// A super-block that many tokens meet, eight at a time.
pub(super) struct Ready {
    scales: Unpacked,
    bytes: Transposed<CHUNKS>,
}

impl<const FIVE: bool, const BYTES: usize> Wide for K45<FIVE, BYTES> {
    const BYTES: usize = BYTES;

    type Ready = Ready;

    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
    unsafe fn zero() -> Ready {
        let zero = _mm512_setzero_si512();
        let scales = Unpacked { scales: [zero; 4], mins: [zero; 4], floats: [_mm512_setzero_ps(); 2] };
        Ready { scales, bytes: Transposed([[zero; 4]; CHUNKS]) }
    }

    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
    #[inline]
    unsafe fn prepare<B: SuperBlock>(b: &B, _: usize, to: &mut Ready) {
        // SAFETY: this function itself runs only where the CPU has the instructions.
        unsafe {
            let packed = packed(b.dwords(0));
            for i in 0..4 {
                to.scales.scales[i] = packed.scales(i);
                to.scales.mins[i] = packed.mins(i);
            }
            to.scales.floats = packed.floats;
            for c in 1..BYTES / 16 {
                to.bytes.0[c] = b.dwords(c);
            }
        }
    }

    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
    #[inline]
    unsafe fn add<const N: usize>(b: &Ready, _: usize, x: &[&Q8Block; N], acc: &mut [__m512; N]) {
        add::<_, _, FIVE, N>(&b.bytes, &b.scales, x, acc)
    }
}

impl<const FIVE: bool, const BYTES: usize> Straight for K45<FIVE, BYTES> {
    const FROM: usize = 1;

    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
    #[inline]
    unsafe fn add_straight<B: SuperBlock, const N: usize>(
        b: &B,
        _: usize,
        x: &[&Q8Block; N],
        acc: &mut [__m512; N],
        _: &mut Ready,
    ) {
        // SAFETY: this function itself runs only where the CPU has the instructions.
        let of = packed(unsafe { b.dwords(0) });
        add::<_, _, FIVE, N>(b, &of, x, acc)
    }
}

/// Adds the products with each token to `acc`.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
#[inline]
fn add<B: SuperBlock, S: Scales, const FIVE: bool, const N: usize>(
    b: &B,
    of: &S,
    x: &[&Q8Block; N],
    acc: &mut [__m512; N],
) {
    let mut narrow = true;
    for t in 0..N {
        narrow &= x[t].narrow;
    }
    // For all tokens at once: a choice for every one of them would cost more than it saves.
    let sum = match narrow && !FIVE {
        // SAFETY: this function itself runs only where the CPU has the instructions.
        true => unsafe { sums::<B, S, FIVE, true, N>(b, of, x) },
        // SAFETY: as above.
        false => unsafe { sums::<B, S, FIVE, false, N>(b, of, x) },
    };
    let min = if narrow { minima::<S, true, N>(of, x) } else { minima::<S, false, N>(of, x) };
    // SAFETY: as above.
    let [d, m] = unsafe { of.floats() };
    for t in 0..N {
        let of_token = _mm512_set1_ps(x[t].d);
        acc[t] = _mm512_add_ps(acc[t], _mm512_mul_ps(_mm512_cvtepi32_ps(sum[t]), _mm512_mul_ps(d, of_token)));
        acc[t] = _mm512_sub_ps(acc[t], _mm512_mul_ps(_mm512_cvtepi32_ps(min[t]), _mm512_mul_ps(m, of_token)));
    }
}

/// The integer sums of a super-block with each token.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
#[inline]
unsafe fn sums<B: SuperBlock, S: Scales, const FIVE: bool, const NARROW: bool, const N: usize>(
    b: &B,
    of: &S,
    x: &[&Q8Block; N],
) -> [__m512i; N] {
    let zero = _mm512_setzero_si512();
    // SAFETY: this function itself runs only where the CPU has the instructions.
    let high = if FIVE { unsafe { [b.dwords(1), b.dwords(2)] } } else { [[zero; 4]; 2] };
    let mut sum = [zero; N];
    for k in 0..4 {
        // SAFETY: as above.
        unsafe { b.fetch(k) };
        // What the tokens' codes are read through: one address each, so that registers suffice for those of eight tokens.
        let mut parts = [&x[0].codes.as_chunks::<64>().0[k]; N];
        for t in 1..N {
            parts[t] = &x[t].codes.as_chunks::<64>().0[k];
        }
        let mut y = [[zero; N]; 2];
        for h in 0..2 {
            // SAFETY: as above.
            let q = unsafe { b.dwords(if FIVE { 3 } else { 1 } + 2 * k + h) };
            for i in 0..4 {
                let w = codes::<FIVE>(q[i], high[h][i], k);
                for t in 0..N {
                    for odd in 0..2 {
                        y[odd][t] = _mm512_dpbusd_epi32(y[odd][t], w[odd], spread(parts[t], 8 * odd + 4 * h + i));
                    }
                }
            }
        }
        // SAFETY: as above.
        let scales = unsafe { of.scales(k) };
        for t in 0..N {
            // Scales have six bits and sub-scales of tokens as many.
            let scales = _mm512_mullo_epi16(scales, spread(&x[t].scales, k));
            sum[t] = add_scaled::<NARROW>(sum[t], [y[0][t], y[1][t]], scales);
        }
    }
    sum
}

/// `sum` plus the sums of two blocks, each times its scale of a pair; sums that are `NARROW` fit 16 bits.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
#[inline]
fn add_scaled<const NARROW: bool>(sum: __m512i, y: [__m512i; 2], scales: __m512i) -> __m512i {
    if NARROW {
        let y = _mm512_mask_blend_epi16(0xaaaa_aaaa, y[0], _mm512_slli_epi32::<16>(y[1]));
        return _mm512_dpwssd_epi32(sum, y, scales);
    }
    let scales = [_mm512_and_si512(scales, _mm512_set1_epi32(0xffff)), _mm512_srli_epi32::<16>(scales)];
    let sum = _mm512_add_epi32(sum, _mm512_mullo_epi32(y[0], scales[0]));
    _mm512_add_epi32(sum, _mm512_mullo_epi32(y[1], scales[1]))
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
fn minima<S: Scales, const NARROW: bool, const N: usize>(of: &S, x: &[&Q8Block; N]) -> [__m512i; N] {
    let mut min = [_mm512_setzero_si512(); N];
    for k in 0..4 {
        // SAFETY: this function itself runs only where the CPU has the instructions.
        let m = unsafe { of.mins(k) };
        for t in 0..N {
            min[t] = match NARROW {
                true => _mm512_dpwssd_epi32(min[t], m, spread(&x[t].scaled_sums, k)),
                false => {
                    let m = _mm512_mullo_epi16(m, spread(&x[t].scales, k));
                    _mm512_dpwssd_epi32(min[t], m, spread(&x[t].sums, k))
                }
            };
        }
    }
    min
}

/// The scales of a super-block; how they lie in its first sixteen bytes, the AVX2 code tells.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl")]
#[inline]
fn packed([floats, a, b, c]: [__m512i; 4]) -> Packed {
    let (six, nibble, pair) = (_mm512_set1_epi8(0x3f), _mm512_set1_epi8(15), _mm512_set1_epi8(0x30));
    let top = |v: __m512i| _mm512_and_si512(_mm512_srli_epi16::<2>(v), pair);
    let scales = [_mm512_and_si512(a, six), _mm512_or_si512(_mm512_and_si512(c, nibble), top(a))];
    let high = _mm512_and_si512(_mm512_srli_epi16::<4>(c), nibble);
    let mins = [_mm512_and_si512(b, six), _mm512_or_si512(high, top(b))];
    let d = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(floats));
    let m = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(floats)));
    Packed { scales, mins, floats: [d, m] }
}

impl Scales for Packed {
    #[target_feature(enable = "avx2,avx512f,avx512bw")]
    #[inline]
    unsafe fn scales(&self, k: usize) -> __m512i {
        byte_pairs(self.scales[k / 2], k % 2)
    }

    #[target_feature(enable = "avx2,avx512f,avx512bw")]
    #[inline]
    unsafe fn mins(&self, k: usize) -> __m512i {
        byte_pairs(self.mins[k / 2], k % 2)
    }

    #[target_feature(enable = "avx512f")]
    #[inline]
    unsafe fn floats(&self) -> [__m512; 2] {
        self.floats
    }
}

impl Scales for Unpacked {
    #[target_feature(enable = "avx512f")]
    #[inline]
    unsafe fn scales(&self, k: usize) -> __m512i {
        self.scales[k]
    }

    #[target_feature(enable = "avx512f")]
    #[inline]
    unsafe fn mins(&self, k: usize) -> __m512i {
        self.mins[k]
    }

    #[target_feature(enable = "avx512f")]
    #[inline]
    unsafe fn floats(&self) -> [__m512; 2] {
        self.floats
    }
}

/// Bytes `2 i` and `2 i + 1` of every dword as a pair of 16-bit numbers.
#[target_feature(enable = "avx2,avx512f,avx512bw")]
#[inline]
fn byte_pairs(v: __m512i, i: usize) -> __m512i {
    let v = _mm512_srlv_epi32(v, _mm512_set1_epi32(16 * i as i32));
    let (low, high) = (_mm512_set1_epi32(0xff), _mm512_set1_epi32(0xff_0000));
    _mm512_or_si512(_mm512_and_si512(v, low), _mm512_and_si512(_mm512_slli_epi32::<8>(v), high))
}
