//! Transpositions of eight vectors at a time.

use std::arch::x86_64::*;

/// Lane `i` of vector `j` becomes lane `j` of vector `i`.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn transpose(v: [__m256i; 8]) -> [__m256i; 8] {
    let (a, b) = (transpose_quarter([v[0], v[1], v[2], v[3]]), transpose_quarter([v[4], v[5], v[6], v[7]]));
    let mut t = [_mm256_setzero_si256(); 8];
    for i in 0..4 {
        t[i] = _mm256_permute2x128_si256::<0x20>(a[i], b[i]);
        t[i + 4] = _mm256_permute2x128_si256::<0x31>(a[i], b[i]);
    }
    t
}

/// Transposes four by four lanes in both halves of the vectors.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn transpose_quarter(v: [__m256i; 4]) -> [__m256i; 4] {
    let (a, b) = (_mm256_unpacklo_epi32(v[0], v[1]), _mm256_unpackhi_epi32(v[0], v[1]));
    let (c, d) = (_mm256_unpacklo_epi32(v[2], v[3]), _mm256_unpackhi_epi32(v[2], v[3]));
    [_mm256_unpacklo_epi64(a, c), _mm256_unpackhi_epi64(a, c), _mm256_unpacklo_epi64(b, d), _mm256_unpackhi_epi64(b, d)]
}

/// Four dwords of each of eight rows: lane `r` of vector `c` is dword `c` of row `r`.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn transpose_halves(v: [__m128i; 8]) -> [__m256i; 4] {
    transpose_quarter([
        _mm256_set_m128i(v[4], v[0]),
        _mm256_set_m128i(v[5], v[1]),
        _mm256_set_m128i(v[6], v[2]),
        _mm256_set_m128i(v[7], v[3]),
    ])
}

/// Lane `i` of the results is the sum of the lower lanes of `v[i]`, and of the upper ones.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn sum_halves(v: [__m256i; 8]) -> [__m256i; 2] {
    let a = _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]));
    let b = _mm256_hadd_epi32(_mm256_hadd_epi32(v[4], v[5]), _mm256_hadd_epi32(v[6], v[7]));
    [_mm256_permute2x128_si256::<0x20>(a, b), _mm256_permute2x128_si256::<0x31>(a, b)]
}

/// [`transpose`] for floats.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn transpose_floats(v: [__m256; 8]) -> [__m256; 8] {
    transpose(v.map(|v| _mm256_castps_si256(v))).map(|v| _mm256_castsi256_ps(v))
}
