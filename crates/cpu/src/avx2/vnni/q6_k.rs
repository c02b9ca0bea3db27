//! Q6_K in AVX-512 vectors of sixteen rows, unpacked once for many tokens. Few meet other kernels ([`super::q6_k_few`]): half of a
//! code's bits lie apart from the others, so that sixteen rows are not to be had in passing.

use std::arch::x86_64::*;

use super::super::q6_k::Q6K;
use super::q6_k_few;
use super::sixteen::{self, SuperBlock, Wide, spread};
use crate::kernels::{Out, PanelScratch, Q8Block, Q8Tokens, WeightRows};

/// Sixteen rows, unpacked.
pub(super) struct Unpacked {
    /// Codes of 16 columns: those of block `j` begin at `2 j`.
    codes: [[__m512i; 4]; 16],
    /// Scales, in the order of the codes.
    scales: [__m512i; 16],
    /// -32 times the scales of two times 16 columns, as pairs of 16-bit numbers.
    offsets: [__m512i; 8],
    d: __m512,
}

/// Multiplies any number of tokens.
///
/// May run only on a CPU with AVX2, FMA, F16C and AVX-512 F, BW, VL and VNNI.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
pub(super) fn matmul(w: WeightRows<'_>, x: Q8Tokens<'_>, out: &mut Out<'_>, scratch: &mut PanelScratch) {
    match x.len() {
        1..=q6_k_few::MOST => q6_k_few::matmul(w, x, out, scratch),
        _ => sixteen::many::<Q6K>(w, x, out, scratch),
    }
}

impl Wide for Q6K {
    const BYTES: usize = 210;

    type Ready = Unpacked;

    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
    unsafe fn zero() -> Unpacked {
        let zero = _mm512_setzero_si512();
        Unpacked { codes: [[zero; 4]; 16], scales: [zero; 16], offsets: [zero; 8], d: _mm512_setzero_ps() }
    }

    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
    #[inline]
    unsafe fn prepare<B: SuperBlock>(b: &B, _: usize, to: &mut Unpacked) {
        for i in 0..4 {
            let (half, part) = (i / 2, i % 2);
            let at = 4 * half + part;
            // SAFETY: this function itself runs only where the CPU has the instructions.
            let [first, second, high] = unsafe { [b.dwords(at), b.dwords(at + 2), b.dwords(8 + i)] };
            for c in 0..4 {
                let w = codes([first[c], second[c]], high[c]);
                for q in 0..4 {
                    to.codes[8 * half + 2 * q + part][c] = w[q];
                }
            }
        }
        // SAFETY: as above.
        let [scales, [.., last]] = unsafe { [b.dwords(12), b.dwords(13)] };
        to.d = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(last)));
        for j in 0..8 {
            let pair = _mm512_sllv_epi32(scales[j / 2], _mm512_set1_epi32(16 * (1 - j % 2) as i32));
            let (even, odd) = (_mm512_srai_epi32::<24>(_mm512_slli_epi32::<8>(pair)), _mm512_srai_epi32::<24>(pair));
            (to.scales[2 * j], to.scales[2 * j + 1]) = (even, odd);
            let both = _mm512_mask_blend_epi16(0xaaaa_aaaa, even, _mm512_slli_epi32::<16>(odd));
            to.offsets[j] = _mm512_sub_epi16(_mm512_setzero_si512(), _mm512_slli_epi16::<5>(both));
        }
    }

    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
    #[inline]
    unsafe fn add<const N: usize>(b: &Unpacked, _: usize, x: &[&Q8Block; N], acc: &mut [__m512; N]) {
        for half in 0..2 {
            let mut sum = [_mm512_setzero_si512(); N];
            for j in 4 * half..4 * half + 4 {
                add_block(b, j, x, &mut sum);
            }
            for t in 0..N {
                let d = _mm512_mul_ps(b.d, _mm512_set1_ps(x[t].d));
                acc[t] = _mm512_add_ps(acc[t], _mm512_mul_ps(_mm512_cvtepi32_ps(sum[t]), d));
            }
        }
    }
}

/// The codes of four blocks, from the bytes that hold their lower four bits, two and two, and those that hold their upper two.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
#[inline]
fn codes(low: [__m512i; 2], high: __m512i) -> [__m512i; 4] {
    let (nibble, pair) = (_mm512_set1_epi8(15), _mm512_set1_epi8(0x30));
    let high = [_mm512_slli_epi16::<4>(high), _mm512_slli_epi16::<2>(high), high, _mm512_srli_epi16::<2>(high)];
    let low = [low[0], low[1], _mm512_srli_epi16::<4>(low[0]), _mm512_srli_epi16::<4>(low[1])];
    let mut w = low;
    for q in 0..4 {
        // The nibble, and what is in both of the others.
        w[q] = _mm512_ternarylogic_epi32::<0xf8>(_mm512_and_si512(low[q], nibble), high[q], pair);
    }
    w
}

/// Adds the scaled integer sums of block `j` to those of each token.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
#[inline]
fn add_block<const N: usize>(b: &Unpacked, j: usize, x: &[&Q8Block; N], sum: &mut [__m512i; N]) {
    let zero = _mm512_setzero_si512();
    let mut of_block = [zero; N];
    for t in 0..N {
        of_block[t] = _mm512_dpwssd_epi32(zero, b.offsets[j], spread(&x[t].half_sums, j));
    }
    for part in 0..2 {
        let mut y = [zero; N];
        for c in 0..4 {
            for t in 0..N {
                let x = spread(&x[t].codes, 8 * j + 4 * part + c);
                y[t] = _mm512_dpbusd_epi32(y[t], b.codes[2 * j + part][c], x);
            }
        }
        for t in 0..N {
            of_block[t] = _mm512_add_epi32(of_block[t], _mm512_mullo_epi32(y[t], b.scales[2 * j + part]));
        }
    }
    for t in 0..N {
        let scale = _mm512_srli_epi32::<16>(spread(&x[t].scale_pairs, j));
        sum[t] = _mm512_add_epi32(sum[t], _mm512_mullo_epi32(of_block[t], scale));
    }
}
