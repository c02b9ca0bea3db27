//! Vectors of floats, and the operations that the loops of x86-64 are made of: eight lanes with AVX2, sixteen with AVX-512.

use std::arch::asm;
use std::arch::x86_64::*;

use super::codes::Pair;
use super::{body, dots};

/// A vector of floats.
///
/// The functions are `unsafe` because they may run only on a CPU that has the vector's instructions, and because loads and
/// stores take pointers to [`LANES`](Vector::LANES) elements. They take and return vectors, so they must be inlined into a
/// function that is compiled for such a CPU.
pub(super) trait Vector: Copy {
    const LANES: usize;

    /// As many 32-bit integers, or pairs of 16-bit ones.
    type Ints: Copy;

    unsafe fn load(from: *const f32) -> Self;
    /// Half floats, given as their bits.
    unsafe fn load_halves(from: *const u16) -> Self;
    /// Integers as floats.
    unsafe fn load_bytes(from: *const i8) -> Self;
    unsafe fn store(self, to: *mut f32);
    /// `v` in every lane.
    unsafe fn splat(v: f32) -> Self;
    unsafe fn add(self, other: Self) -> Self;
    unsafe fn sub(self, other: Self) -> Self;
    unsafe fn mul(self, other: Self) -> Self;
    unsafe fn div(self, other: Self) -> Self;
    /// `self * b + c`, rounded once.
    unsafe fn mul_add(self, b: Self, c: Self) -> Self;
    /// The smaller; `other` where a lane of either is NaN.
    unsafe fn min(self, other: Self) -> Self;
    /// The larger; `other` where a lane of either is NaN.
    unsafe fn max(self, other: Self) -> Self;
    /// `self`, but `other` where that is NaN.
    unsafe fn or_nan_of(self, other: Self) -> Self;
    /// `self` times two to the power of `n`, an integer of at most 127; 0 where `x` is below -87. `shifted` is `n` plus
    /// [`body::ROUND`].
    unsafe fn scale_by_power(self, x: Self, n: Self, shifted: Self) -> Self;
    /// The largest lane. There is no NaN among them.
    unsafe fn largest_lane(self) -> f32;
    unsafe fn sum_of_lanes(self) -> f32;
    /// `self`, and 0 where a lane of `weight` is 0.
    unsafe fn where_not_zero(self, weight: Self) -> Self;
    /// Lanes as the nearest integers, each beside the same lane of `next`. They fit 16 bits.
    unsafe fn store_pairs(self, next: Self, to: *mut Pair);
    /// Lanes as the nearest integers, one after another. They fit 16 bits.
    unsafe fn store_codes(self, to: *mut i16);
    unsafe fn no_ints() -> Self::Ints;
    unsafe fn load_pairs(from: *const Pair) -> Self::Ints;
    /// `sum` plus both products of each pair of `a` with pair `k` of `b`.
    unsafe fn add_dots(sum: Self::Ints, a: Self::Ints, b: *const Pair, k: usize) -> Self::Ints;
    unsafe fn from_ints(ints: Self::Ints) -> Self;
    /// Adds the products of a tile's first pairs to its sums, of as many as there is a faster way for than one after another; returns
    /// how many.
    #[inline(always)]
    unsafe fn add_first<const R: usize, const C: usize>(_: &mut [[Self::Ints; C]; R], _: &Operands) -> usize {
        0
    }
}

/// What a tile of a product of codes is made of: `a` `[R, n_pairs]` and `b` `[n_pairs, C * LANES]`.
pub(super) struct Operands {
    pub(super) a: *const Pair,
    /// Distance of the rows of `a`, in pairs.
    pub(super) lda: usize,
    pub(super) b: *const Pair,
    /// Distance of the rows of `b`, in pairs.
    pub(super) ldb: usize,
    pub(super) n_pairs: usize,
    /// What is fetched into the cache with the first pair.
    pub(super) ahead: *const u8,
    /// How much further with each of the others, in bytes.
    pub(super) step: usize,
}

/// Operations of [`Vector`] that are one intrinsic each.
macro_rules! intrinsics {
    ($features:literal: $($name:ident($($arg:ident),*) = $intrinsic:ident;)+) => {
        $(
            #[target_feature(enable = $features)]
            #[inline]
            unsafe fn $name(self $(, $arg: Self)*) -> Self {
                $intrinsic(self $(, $arg)*)
            }
        )+
    };
}

impl Vector for __m256 {
    const LANES: usize = 8;

    type Ints = __m256i;

    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    unsafe fn load(from: *const f32) -> __m256 {
        // SAFETY: the caller's promise.
        unsafe { _mm256_loadu_ps(from) }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    unsafe fn load_halves(from: *const u16) -> __m256 {
        // SAFETY: the caller's promise.
        _mm256_cvtph_ps(unsafe { _mm_loadu_si128(from.cast()) })
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    unsafe fn load_bytes(from: *const i8) -> __m256 {
        // SAFETY: the caller's promise.
        _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(unsafe { _mm_loadl_epi64(from.cast()) }))
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { _mm256_storeu_ps(to, self) }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    unsafe fn splat(v: f32) -> __m256 {
        _mm256_set1_ps(v)
    }

    intrinsics! { "avx2,fma,f16c":
        add(other) = _mm256_add_ps;
        sub(other) = _mm256_sub_ps;
        mul(other) = _mm256_mul_ps;
        div(other) = _mm256_div_ps;
        mul_add(b, c) = _mm256_fmadd_ps;
        min(other) = _mm256_min_ps;
        max(other) = _mm256_max_ps;
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    unsafe fn or_nan_of(self, other: __m256) -> __m256 {
        _mm256_blendv_ps(self, other, _mm256_cmp_ps::<_CMP_UNORD_Q>(other, other))
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    unsafe fn scale_by_power(self, x: __m256, _: __m256, shifted: __m256) -> __m256 {
        let bias = _mm256_set1_epi32(127 - body::ROUND.to_bits() as i32);
        let exponent = _mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_castps_si256(shifted), bias));
        let below = _mm256_cmp_ps::<_CMP_LT_OQ>(x, _mm256_set1_ps(-87.0));
        _mm256_andnot_ps(below, _mm256_mul_ps(self, _mm256_castsi256_ps(exponent)))
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    unsafe fn largest_lane(self) -> f32 {
        let v = _mm_max_ps(_mm256_castps256_ps128(self), _mm256_extractf128_ps::<1>(self));
        let v = _mm_max_ps(v, _mm_movehl_ps(v, v));
        _mm_cvtss_f32(_mm_max_ss(v, _mm_movehdup_ps(v)))
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    unsafe fn sum_of_lanes(self) -> f32 {
        let v = _mm_add_ps(_mm256_castps256_ps128(self), _mm256_extractf128_ps::<1>(self));
        let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
        _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)))
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    unsafe fn where_not_zero(self, weight: __m256) -> __m256 {
        _mm256_and_ps(self, _mm256_cmp_ps::<_CMP_NEQ_UQ>(weight, _mm256_setzero_ps()))
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    unsafe fn store_pairs(self, next: __m256, to: *mut Pair) {
        let next = _mm256_slli_epi32::<16>(_mm256_cvtps_epi32(next));
        let pairs = _mm256_blend_epi16::<0b1010_1010>(_mm256_cvtps_epi32(self), next);
        // SAFETY: the caller's promise.
        unsafe { _mm256_storeu_si256(to.cast(), pairs) }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    unsafe fn store_codes(self, to: *mut i16) {
        let ints = _mm256_cvtps_epi32(self);
        let codes = _mm_packs_epi32(_mm256_castsi256_si128(ints), _mm256_extracti128_si256::<1>(ints));
        // SAFETY: the caller's promise.
        unsafe { _mm_storeu_si128(to.cast(), codes) }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    unsafe fn no_ints() -> __m256i {
        _mm256_setzero_si256()
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    unsafe fn load_pairs(from: *const Pair) -> __m256i {
        // SAFETY: the caller's promise.
        unsafe { _mm256_loadu_si256(from.cast()) }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    unsafe fn add_dots(sum: __m256i, a: __m256i, b: *const Pair, k: usize) -> __m256i {
        // SAFETY: the caller's promise.
        let b = _mm256_set1_epi32(unsafe { b.add(k).cast::<i32>().read_unaligned() });
        _mm256_add_epi32(sum, _mm256_madd_epi16(a, b))
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    unsafe fn from_ints(ints: __m256i) -> __m256 {
        _mm256_cvtepi32_ps(ints)
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    #[inline]
    unsafe fn add_first<const R: usize, const C: usize>(sums: &mut [[__m256i; C]; R], of: &Operands) -> usize {
        // SAFETY: the caller's promise.
        unsafe { dots::add_eights(sums, of) }
    }
}

impl Vector for __m512 {
    const LANES: usize = 16;

    type Ints = __m512i;

    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
    #[inline]
    unsafe fn load(from: *const f32) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { _mm512_loadu_ps(from) }
    }

    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
    #[inline]
    unsafe fn load_halves(from: *const u16) -> __m512 {
        // SAFETY: the caller's promise.
        _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(from.cast()) })
    }

    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
    #[inline]
    unsafe fn load_bytes(from: *const i8) -> __m512 {
        // SAFETY: the caller's promise.
        _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(unsafe { _mm_loadu_si128(from.cast()) }))
    }

    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
    #[inline]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { _mm512_storeu_ps(to, self) }
    }

    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
    #[inline]
    unsafe fn splat(v: f32) -> __m512 {
        _mm512_set1_ps(v)
    }

    intrinsics! { "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni":
        add(other) = _mm512_add_ps;
        sub(other) = _mm512_sub_ps;
        mul(other) = _mm512_mul_ps;
        div(other) = _mm512_div_ps;
        mul_add(b, c) = _mm512_fmadd_ps;
        min(other) = _mm512_min_ps;
        max(other) = _mm512_max_ps;
    }

    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
    #[inline]
    unsafe fn or_nan_of(self, other: __m512) -> __m512 {
        _mm512_mask_mov_ps(self, _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(other, other), other)
    }

    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
    #[inline]
    unsafe fn scale_by_power(self, x: __m512, n: __m512, _: __m512) -> __m512 {
        // Not less than: NaN is kept.
        let kept = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, _mm512_set1_ps(-87.0));
        _mm512_maskz_scalef_ps(kept, self, n)
    }

    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
    #[inline]
    unsafe fn largest_lane(self) -> f32 {
        let (low, high) = halves(self);
        // SAFETY: the CPU has AVX2 too.
        unsafe { _mm256_max_ps(low, high).largest_lane() }
    }

    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
    #[inline]
    unsafe fn sum_of_lanes(self) -> f32 {
        let (low, high) = halves(self);
        // SAFETY: the CPU has AVX2 too.
        unsafe { _mm256_add_ps(low, high).sum_of_lanes() }
    }

    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
    #[inline]
    unsafe fn where_not_zero(self, weight: __m512) -> __m512 {
        _mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_NEQ_UQ>(weight, _mm512_setzero_ps()), self)
    }

    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
    #[inline]
    unsafe fn store_pairs(self, next: __m512, to: *mut Pair) {
        let next = _mm512_slli_epi32::<16>(_mm512_cvtps_epi32(next));
        let pairs = _mm512_mask_blend_epi16(0xaaaa_aaaa, _mm512_cvtps_epi32(self), next);
        // SAFETY: the caller's promise.
        unsafe { _mm512_storeu_si512(to.cast(), pairs) }
    }

    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
    #[inline]
    unsafe fn store_codes(self, to: *mut i16) {
        let codes = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(self));
        // SAFETY: the caller's promise.
        unsafe { _mm256_storeu_si256(to.cast(), codes) }
    }

    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
    #[inline]
    unsafe fn no_ints() -> __m512i {
        _mm512_setzero_si512()
    }

    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
    #[inline]
    unsafe fn load_pairs(from: *const Pair) -> __m512i {
        // SAFETY: the caller's promise.
        unsafe { _mm512_loadu_si512(from.cast()) }
    }

    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
    #[inline]
    unsafe fn add_dots(mut sum: __m512i, a: __m512i, b: *const Pair, k: usize) -> __m512i {
        // The compiler would take the intrinsic apart into a multiplication and an addition.
        // SAFETY: the caller's promise; nothing is written but the sum.
        unsafe {
            asm!(
                "vpdpwssd {sum}, {a}, dword ptr [{b} + 4*{k}]{{1to16}}",
                sum = inout(zmm_reg) sum,
                a = in(zmm_reg) a,
                b = in(reg) b,
                k = in(reg) k,
                options(pure, readonly, nostack, preserves_flags)
            );
        }
        sum
    }

    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
    #[inline]
    unsafe fn from_ints(ints: __m512i) -> __m512 {
        _mm512_cvtepi32_ps(ints)
    }
}

#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
#[inline]
fn halves(v: __m512) -> (__m256, __m256) {
    (_mm512_castps512_ps256(v), _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(v))))
}
