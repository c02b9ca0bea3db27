//! The types with blocks of 32 columns in AVX-512 vectors of sixteen rows.
//!
//! Eight blocks are transposed whole, scales and all. As a block begins with one half float, every second block's codes lie across
//! two dwords and are shifted together. Transposed, they are kept in memory, from where every few tokens take codes out of them: 36 to
//! 68 vectors are more than there are registers.
//!
//! Functions that are generic over a block's place are inlined by force: offsets are then constants, and no vector is passed in memory.

use std::arch::x86_64::*;

use super::super::small::{Nibbles, Q8};
use super::sixteen::{Straight, SuperBlock, Transposed, Wide, spread};
use crate::kernels::Q8Block;

/// The codes of four columns of sixteen rows, unsigned, by where they lie in a block.
trait Codes: Wide {
    /// What a code is offset by.
    const OFFSET: i16;
    /// Whether a block has a minimum.
    const MIN: bool;

    /// The codes of columns `4 i ..` and of columns `16 + 4 i ..` of a block.
    unsafe fn codes(block: &Block<'_>, i: usize) -> [__m512i; 2];
}

/// A block of 32 columns of a transposed super-block.
struct Block<'a> {
    /// Dwords, from the one on in which the block of an even number begins.
    dwords: &'a [__m512i],
    /// Where this block begins, in bytes from there.
    at: usize,
}

impl Block<'_> {
    /// Bytes `at .. at + 4` of the block, `at` being even.
    #[inline(always)]
    unsafe fn dword(&self, at: usize) -> __m512i {
        let (i, is_across) = ((self.at + at) / 4, (self.at + at) & 2 != 0);
        if !is_across {
            return self.dwords[i];
        }
        // SAFETY: the caller has the instructions.
        unsafe {
            let (low, high) = (_mm512_srli_epi32::<16>(self.dwords[i]), _mm512_slli_epi32::<16>(self.dwords[i + 1]));
            _mm512_or_si512(low, high)
        }
    }

    /// The half float at `at`.
    #[inline(always)]
    unsafe fn half(&self, at: usize) -> __m512 {
        let (dword, is_upper) = (self.dwords[(self.at + at) / 4], (self.at + at) & 2 != 0);
        // SAFETY: the caller has the instructions.
        unsafe {
            let bits = if is_upper { _mm512_srli_epi32::<16>(dword) } else { dword };
            _mm512_cvtph_ps(_mm512_cvtepi32_epi16(bits))
        }
    }
}

/// Transposes a super-block of `n_blocks` blocks, and fetches ahead meanwhile where `FETCH`.
#[inline(always)]
unsafe fn transpose<F: Wide, B: SuperBlock, const FETCH: bool, const CHUNKS: usize>(
    b: &B,
    n_blocks: usize,
    to: &mut Transposed<CHUNKS>,
) {
    let n_chunks = F::BYTES / 16;
    for c in 0..(F::BYTES / 8 * n_blocks).div_ceil(16) {
        // SAFETY: the caller has the instructions.
        unsafe {
            let quarter = 4 * c / n_chunks;
            if FETCH && c == (quarter * n_chunks).div_ceil(4) {
                b.fetch(quarter);
            }
            to.0[c] = b.dwords(c);
        }
    }
}

/// Adds the products of a super-block of `n_blocks` blocks with each token to `acc`.
#[inline(always)]
unsafe fn add<F: Codes, const CHUNKS: usize, const N: usize>(
    b: &Transposed<CHUNKS>,
    n_blocks: usize,
    x: &[&Q8Block; N],
    acc: &mut [__m512; N],
) {
    let dwords = b.0.as_flattened();
    for j in (0..n_blocks).step_by(2) {
        let dwords = &dwords[F::BYTES * j / 32..][..F::BYTES / 16];
        // SAFETY: the caller has the instructions.
        unsafe {
            add_block::<F, N>(&Block { dwords, at: 0 }, j, x, acc);
            if j + 1 < n_blocks {
                add_block::<F, N>(&Block { dwords, at: F::BYTES / 8 }, j + 1, x, acc);
            }
        }
    }
}

/// One step of the sequence of [`crate::kernels`] with block `j` of each token.
#[inline(always)]
unsafe fn add_block<F: Codes, const N: usize>(block: &Block<'_>, j: usize, x: &[&Q8Block; N], acc: &mut [__m512; N]) {
    // What the tokens' codes are read through: one address each, so that registers suffice for those of eight tokens.
    let mut parts = [&x[0].codes.as_chunks::<32>().0[j]; N];
    for t in 1..N {
        parts[t] = &x[t].codes.as_chunks::<32>().0[j];
    }
    // SAFETY: the caller has the instructions.
    unsafe {
        let zero = _mm512_setzero_si512();
        // The offset times the sum of a token's codes: the lower or the upper of two sums in a dword.
        let offset = _mm512_set1_epi32((i32::from(-F::OFFSET) & 0xffff) << if block.at == 0 { 0 } else { 16 });
        let mut y = [zero; N];
        if F::OFFSET != 0 {
            for t in 0..N {
                y[t] = _mm512_dpwssd_epi32(zero, offset, spread(&x[t].sums, j / 2));
            }
        }
        for i in 0..4 {
            let w = F::codes(block, i);
            for t in 0..N {
                y[t] = _mm512_dpbusd_epi32(y[t], w[0], spread(parts[t], i));
            }
            for t in 0..N {
                y[t] = _mm512_dpbusd_epi32(y[t], w[1], spread(parts[t], 4 + i));
            }
        }
        let d = block.half(0);
        for t in 0..N {
            let d = _mm512_mul_ps(d, _mm512_set1_ps(x[t].block_d[j]));
            acc[t] = _mm512_add_ps(acc[t], _mm512_mul_ps(_mm512_cvtepi32_ps(y[t]), d));
        }
        if F::MIN {
            let m = block.half(2);
            for t in 0..N {
                acc[t] = _mm512_add_ps(acc[t], _mm512_mul_ps(m, _mm512_set1_ps(x[t].block_sum[j])));
            }
        }
    }
}

/// [`Wide`] of a type that is transposed as a whole.
macro_rules! wide {
    ($bytes:expr, $chunks:literal) => {
        const BYTES: usize = 8 * $bytes;

        type Ready = Transposed<$chunks>;

        #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
        unsafe fn zero() -> Self::Ready {
            Transposed([[_mm512_setzero_si512(); 4]; $chunks])
        }

        #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
        #[inline]
        unsafe fn prepare<B: SuperBlock>(b: &B, n_blocks: usize, to: &mut Self::Ready) {
            // SAFETY: this function itself runs only where the CPU has the instructions.
            unsafe { transpose::<Self, B, false, $chunks>(b, n_blocks, to) }
        }

        #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
        #[inline]
        unsafe fn add<const N: usize>(b: &Self::Ready, n_blocks: usize, x: &[&Q8Block; N], acc: &mut [__m512; N]) {
            // SAFETY: this function itself runs only where the CPU has the instructions.
            unsafe { add::<Self, $chunks, N>(b, n_blocks, x, acc) }
        }
    };
}

/// [`Straight`] of such a type.
macro_rules! straight {
    ($chunks:literal) => {
        #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
        #[inline]
        unsafe fn add_straight<B: SuperBlock, const N: usize>(
            b: &B,
            n_blocks: usize,
            x: &[&Q8Block; N],
            acc: &mut [__m512; N],
            room: &mut Self::Ready,
        ) {
            // SAFETY: this function itself runs only where the CPU has the instructions.
            unsafe {
                transpose::<Self, B, true, $chunks>(b, n_blocks, room);
                add::<Self, $chunks, N>(room, n_blocks, x, acc);
            }
        }
    };
}

impl Wide for Q8 {
    wide!(Q8::BYTES, 17);
}

impl Straight for Q8 {
    const FROM: usize = 2;

    straight!(17);
}

impl Codes for Q8 {
    const OFFSET: i16 = 128;
    const MIN: bool = false;

    #[inline(always)]
    unsafe fn codes(block: &Block<'_>, i: usize) -> [__m512i; 2] {
        // SAFETY: the caller has the instructions.
        unsafe {
            let flip = _mm512_set1_epi32(0x8080_8080_u32 as i32);
            [_mm512_xor_si512(block.dword(2 + 4 * i), flip), _mm512_xor_si512(block.dword(18 + 4 * i), flip)]
        }
    }
}

impl<const MIN: bool, const FIVE: bool> Wide for Nibbles<MIN, FIVE> {
    wide!(Nibbles::<MIN, FIVE>::BYTES, 12);
}

impl<const MIN: bool, const FIVE: bool> Straight for Nibbles<MIN, FIVE> {
    const FROM: usize = if FIVE { 1 } else { 2 };

    straight!(12);
}

impl<const MIN: bool, const FIVE: bool> Codes for Nibbles<MIN, FIVE> {
    const OFFSET: i16 = Nibbles::<MIN, FIVE>::OFFSET;
    const MIN: bool = MIN;

    #[inline(always)]
    unsafe fn codes(block: &Block<'_>, i: usize) -> [__m512i; 2] {
        // SAFETY: the caller has the instructions.
        unsafe {
            let nibble = _mm512_set1_epi8(15);
            let q = block.dword(Self::QS + 4 * i);
            let mut w = [_mm512_and_si512(q, nibble), _mm512_and_si512(_mm512_srli_epi16::<4>(q), nibble)];
            if !FIVE {
                return w;
            }
            // Of every dword the byte with four columns' bits, four times; then of each of them its own bit.
            let high = block.dword(Self::HIGH);
            let lanes = _mm512_set4_epi32(0x0c0c_0c0c, 0x0808_0808, 0x0404_0404, 0);
            let bits = _mm512_set1_epi32(if i & 1 == 0 { 0x0804_0201 } else { 0x8040_2010_u32 as i32 });
            for h in 0..2 {
                let which = _mm512_set1_epi32(0x0101_0101 * (i / 2 + 2 * h) as i32);
                let spread = _mm512_shuffle_epi8(high, _mm512_or_si512(lanes, which));
                // A nibble lacks the bit, so that adding is or-ing.
                w[h] = _mm512_mask_add_epi8(w[h], _mm512_test_epi8_mask(spread, bits), w[h], _mm512_set1_epi8(16));
            }
            w
        }
    }
}
