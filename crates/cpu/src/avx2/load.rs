//! Loads and stores of vectors from slices and arrays: the only places where AVX2 kernels touch memory.

use std::arch::x86_64::*;

/// 32 bytes at `b[at..]`.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn load32(b: &[u8], at: usize) -> __m256i {
    let b = &b[at..at + 32];
    // SAFETY: the slice has 32 bytes.
    unsafe { _mm256_loadu_si256(b.as_ptr().cast()) }
}

/// 16 bytes at `b[at..]`.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn load16(b: &[u8], at: usize) -> __m128i {
    let b = &b[at..at + 16];
    // SAFETY: the slice has 16 bytes.
    unsafe { _mm_loadu_si128(b.as_ptr().cast()) }
}

/// Four bytes at `b[at..]` as a number.
#[inline(always)]
pub(super) fn load4(b: &[u8], at: usize) -> i32 {
    i32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]])
}

/// Types without padding whose every bit pattern may be read as an integer.
pub(super) trait Plain: Copy {}
impl Plain for u8 {}
impl Plain for i8 {}
impl Plain for i16 {}
impl Plain for i32 {}
impl Plain for f32 {}
impl<T: Plain, const N: usize> Plain for [T; N] {}

/// The vector that fills `from`.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn vector<T: Plain>(from: &T) -> __m256i {
    const { assert!(size_of::<T>() == 32) };
    // SAFETY: `from` has 32 bytes, none of them padding.
    unsafe { _mm256_loadu_si256((from as *const T).cast()) }
}

/// Eight floats.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn floats(from: &[f32; 8]) -> __m256 {
    // SAFETY: `from` has eight floats.
    unsafe { _mm256_loadu_ps(from.as_ptr()) }
}

/// The half vector that fills `from`.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn half_vector<T: Plain>(from: &T) -> __m128i {
    const { assert!(size_of::<T>() == 16) };
    // SAFETY: `from` has 16 bytes, none of them padding.
    unsafe { _mm_loadu_si128((from as *const T).cast()) }
}

/// Dword `i` of `from` in every lane.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn broadcast<T: Plain>(from: &T, i: usize) -> __m256i {
    assert!(4 * i + 4 <= size_of::<T>());
    // SAFETY: the dword lies within `from` by the assertion, and is none of it padding.
    unsafe { _mm256_set1_epi32((from as *const T).cast::<i32>().add(i).read_unaligned()) }
}

/// The vector that fills `from`, or the dword that is `from` in every lane.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn spread<T: Plain, const L: usize>(from: &[T; L]) -> __m256i {
    const { assert!(size_of::<T>() == 4 && (L == 8 || L == 1)) };
    match L {
        // SAFETY: `from` has 32 bytes, none of them padding.
        8 => unsafe { _mm256_loadu_si256(from.as_ptr().cast()) },
        _ => broadcast(from, 0),
    }
}

/// [`spread`] for floats.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn spread_float<const L: usize>(from: &[f32; L]) -> __m256 {
    _mm256_castsi256_ps(spread(from))
}

/// Qword `i` of `from` four times.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn broadcast8<T: Plain>(from: &T, i: usize) -> __m256i {
    assert!(8 * i + 8 <= size_of::<T>());
    // SAFETY: the qword lies within `from` by the assertion, and is none of it padding.
    unsafe { _mm256_set1_epi64x((from as *const T).cast::<i64>().add(i).read_unaligned()) }
}

/// Writes a vector over the whole of `to`.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn store<T: Plain>(to: &mut T, v: __m256i) {
    const { assert!(size_of::<T>() == 32) };
    // SAFETY: `to` has 32 bytes, and any bits are a valid value of a plain type.
    unsafe { _mm256_storeu_si256((to as *mut T).cast(), v) }
}

/// The eight floats of a vector.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn store8(v: __m256) -> [f32; 8] {
    let mut to = [0.0; 8];
    // SAFETY: `to` has eight floats.
    unsafe { _mm256_storeu_ps(to.as_mut_ptr(), v) };
    to
}

/// Asks for the cache lines of `len` bytes, `ahead` bytes after the start of `b`, which may lie beyond any allocation, in the
/// second-level cache: the first level can wait for fewer lines at a time than it takes to keep memory busy.
#[inline(always)]
pub(super) fn prefetch(b: &[u8], ahead: usize, len: usize) {
    for line in (0..len).step_by(64) {
        // SAFETY: a prefetch accesses nothing, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(b.as_ptr().wrapping_add(ahead + line).cast()) }
    }
}

/// Eight half floats, given as their bits, as floats.
#[target_feature(enable = "avx2,f16c")]
#[inline]
pub(super) fn halves(bits: [i16; 8]) -> __m256 {
    let [a, b, c, d, e, f, g, h] = bits;
    _mm256_cvtph_ps(_mm_setr_epi16(a, b, c, d, e, f, g, h))
}

/// The half float at `b[at..]`, as its bits.
#[inline(always)]
pub(super) fn half_bits(b: &[u8], at: usize) -> i16 {
    i16::from_le_bytes([b[at], b[at + 1]])
}

/// Bytes `at .. at + len` of eight rows.
#[inline(always)]
pub(super) fn part_of_each<'a>(rows: &[&'a [u8]; 8], at: usize, len: usize) -> [&'a [u8]; 8] {
    let mut parts: [&[u8]; 8] = [&[]; 8];
    for r in 0..8 {
        parts[r] = &rows[r][at..at + len];
    }
    parts
}

/// [`load32`] of eight rows. Loops rather than closures here: a closure that is not inlined passes vectors in memory.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn load32_of_each(rows: &[&[u8]; 8], at: usize) -> [__m256i; 8] {
    let mut v = [_mm256_setzero_si256(); 8];
    for r in 0..8 {
        v[r] = load32(rows[r], at);
    }
    v
}

/// [`load16`] of eight rows.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn load16_of_each(rows: &[&[u8]; 8], at: usize) -> [__m128i; 8] {
    let mut v = [_mm_setzero_si128(); 8];
    for r in 0..8 {
        v[r] = load16(rows[r], at);
    }
    v
}

/// [`load4`] of eight rows.
#[inline(always)]
pub(super) fn load4_of_each(rows: &[&[u8]; 8], at: usize) -> [i32; 8] {
    let mut v = [0; 8];
    for r in 0..8 {
        v[r] = load4(rows[r], at);
    }
    v
}

/// The half float at byte `at` of eight rows.
#[target_feature(enable = "avx2,f16c")]
#[inline]
pub(super) fn half_of_each(rows: &[&[u8]; 8], at: usize) -> __m256 {
    let mut v = [0; 8];
    for r in 0..8 {
        v[r] = half_bits(rows[r], at);
    }
    halves(v)
}
