//! Quantizing an activation row: the same values as the portable code, eight at a time.

use std::arch::x86_64::*;

use super::load::{floats, store};
use crate::kernels::{MAX_CODE, Q8Block, SUPER, sub_scale, super_scale};
use crate::scalar;

#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn quantize_row(x: &[f32], out: &mut [Q8Block]) {
    let (whole, tail) = x.as_chunks::<SUPER>();
    for (x, block) in whole.iter().zip(out.iter_mut()) {
        quantize_block(x, block);
    }
    if !tail.is_empty() {
        scalar::quantize_block(tail, &mut out[whole.len()]);
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn quantize_block(x: &[f32; SUPER], out: &mut Q8Block) {
    let (x, _) = x.as_chunks::<8>();
    let magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fff_ffff));
    let mut wild = _mm256_setzero_ps();
    let mut amax = [0.0f32; 8];
    for j in 0..8 {
        let v: [__m256; 4] = std::array::from_fn(|i| _mm256_and_ps(floats(&x[4 * j + i]), magnitude));
        for v in v {
            wild = _mm256_or_ps(wild, _mm256_cmp_ps::<_CMP_NLE_UQ>(v, _mm256_set1_ps(f32::MAX)));
        }
        amax[j] = max_lane(_mm256_max_ps(_mm256_max_ps(v[0], v[1]), _mm256_max_ps(v[2], v[3])));
    }
    if _mm256_movemask_ps(wild) != 0 {
        *out = Q8Block::NAN;
        return;
    }
    *out = Q8Block::ZERO;
    let Some(d) = super_scale(amax.into_iter().fold(0.0, f32::max)) else { return };
    out.d = d;
    let mut magnitudes = [0; 8];
    for j in 0..8 {
        out.scales[j] = sub_scale(amax[j], d);
        if out.scales[j] == 0 {
            continue;
        }
        let inverse = _mm256_set1_ps(1.0 / (d * f32::from(out.scales[j])));
        let v: [__m256i; 4] = std::array::from_fn(|i| {
            let v = _mm256_mul_ps(floats(&x[4 * j + i]), inverse);
            let v = _mm256_max_ps(_mm256_min_ps(v, _mm256_set1_ps(MAX_CODE)), _mm256_set1_ps(-MAX_CODE));
            _mm256_cvtps_epi32(v)
        });
        // Packing works within halves of a vector; the permutation restores the order of columns.
        let v = _mm256_packs_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3]));
        let v = _mm256_permutevar8x32_epi32(v, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        store(&mut out.codes.as_chunks_mut::<32>().0[j], v);
        // Sums of absolute differences with zero count unsigned bytes: shift the codes up by 128, and back.
        let sums = _mm256_sad_epu8(_mm256_xor_si256(v, _mm256_set1_epi8(-128)), _mm256_setzero_si256());
        let sums = _mm256_add_epi64(sums, _mm256_bsrli_epi128::<8>(sums));
        out.half_sums[2 * j] = (_mm256_extract_epi32::<0>(sums) - 16 * 128) as i16;
        out.half_sums[2 * j + 1] = (_mm256_extract_epi32::<4>(sums) - 16 * 128) as i16;
        let sums = _mm256_sad_epu8(_mm256_abs_epi8(v), _mm256_setzero_si256());
        let sums = _mm_add_epi64(_mm256_castsi256_si128(sums), _mm256_extracti128_si256::<1>(sums));
        magnitudes[j] = _mm_cvtsi128_si32(_mm_add_epi64(sums, _mm_bsrli_si128::<8>(sums))) as i16;
    }
    out.derive(&magnitudes);
}

#[target_feature(enable = "avx2")]
#[inline]
fn max_lane(v: __m256) -> f32 {
    let v = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
    let v = _mm_max_ps(v, _mm_movehl_ps(v, v));
    _mm_cvtss_f32(_mm_max_ss(v, _mm_movehdup_ps(v)))
}
