//! The operations that tiles are made of, as instructions of AVX-VNNI.
//!
//! Every operation is one instruction, named as Intel's manual names it, and computes in each 32-bit or 16-bit lane by itself.

use std::arch::x86_64::*;

use bytemuck::Pod;

use super::super::load::{self, Plain};
use super::Tiles;
use crate::kernels::{LaneSums, Panel, Q8Block};

/// Vectors with a 32-bit lane for each of eight weight rows.
///
/// The functions are `unsafe` because they may run only on a CPU that has the instructions. They take and return
/// vectors, so they must be inlined: into [`Vectors::tile`], which is compiled for that CPU.
pub(super) trait Vectors {
    /// A vector of integers.
    type Ints: Copy;
    /// A vector of floats.
    type Floats: Copy;

    /// [`Tiles::tile`] compiled for the instructions; the products of token `t` are added to `sums[t]`.
    unsafe fn tile<F: Tiles, const N: usize>(p: &Panel, n_blocks: usize, x: &[&Q8Block; N], sums: &mut [LaneSums; N]);

    /// The 32 bytes that fill `from`.
    unsafe fn load<T: Plain + Pod>(from: &T) -> Self::Ints;
    /// Eight floats.
    unsafe fn load_floats(from: &[f32; 8]) -> Self::Floats;
    /// Dword `i` of `from` in every lane.
    unsafe fn broadcast<T: Plain + Pod>(from: &T, i: usize) -> Self::Ints;
    /// The number in every lane.
    unsafe fn set1(v: i32) -> Self::Ints;
    /// The number in every lane.
    unsafe fn set1_ps(v: f32) -> Self::Floats;

    /// `acc` plus the four products of unsigned bytes with signed ones, wrapping.
    unsafe fn dpbusd(acc: Self::Ints, unsigned: Self::Ints, signed: Self::Ints) -> Self::Ints;
    /// `acc` plus the two products of signed 16-bit numbers, wrapping.
    unsafe fn dpwssd(acc: Self::Ints, a: Self::Ints, b: Self::Ints) -> Self::Ints;
    /// The low halves of the products of 16-bit numbers.
    unsafe fn mullo_epi16(a: Self::Ints, b: Self::Ints) -> Self::Ints;
    /// The low halves of the products of 32-bit numbers.
    unsafe fn mullo_epi32(a: Self::Ints, b: Self::Ints) -> Self::Ints;
    /// Sums of 32-bit numbers, wrapping.
    unsafe fn add_epi32(a: Self::Ints, b: Self::Ints) -> Self::Ints;
    /// Exclusive or.
    unsafe fn xor(a: Self::Ints, b: Self::Ints) -> Self::Ints;
    /// The upper 16 bits of every 32-bit number, with its sign.
    unsafe fn upper_16(a: Self::Ints) -> Self::Ints;
    /// 32-bit numbers as floats, rounded to nearest even.
    unsafe fn cvtepi32_ps(a: Self::Ints) -> Self::Floats;
    unsafe fn add_ps(a: Self::Floats, b: Self::Floats) -> Self::Floats;
    unsafe fn sub_ps(a: Self::Floats, b: Self::Floats) -> Self::Floats;
    unsafe fn mul_ps(a: Self::Floats, b: Self::Floats) -> Self::Floats;
}

/// AVX-VNNI, with AVX2.
pub(super) struct Ymm;

/// Operations of [`Vectors`] that are one intrinsic each.
macro_rules! intrinsics {
    ($features:literal: $($name:ident($($arg:ident: $kind:ident),+) -> $out:ident = $intrinsic:ident $(::<$imm:literal>)?;)+) => {
        $(
            #[target_feature(enable = $features)]
            #[inline]
            unsafe fn $name($($arg: Self::$kind),+) -> Self::$out {
                $intrinsic$(::<$imm>)?($($arg),+)
            }
        )+
    };
}

impl Vectors for Ymm {
    type Ints = __m256i;
    type Floats = __m256;

    #[target_feature(enable = "avx2,fma,f16c,avxvnni")]
    unsafe fn tile<F: Tiles, const N: usize>(p: &Panel, n_blocks: usize, x: &[&Q8Block; N], sums: &mut [LaneSums; N]) {
        let mut acc = [_mm256_setzero_ps(); N];
        for t in 0..N {
            acc[t] = load::floats(&sums[t].0);
        }
        // SAFETY: this function itself runs only where the CPU has the instructions.
        unsafe { F::tile::<Ymm, N>(p, n_blocks, x, &mut acc) };
        for t in 0..N {
            sums[t].0 = load::store8(acc[t]);
        }
    }

    #[target_feature(enable = "avx2,fma,f16c,avxvnni")]
    #[inline]
    unsafe fn load<T: Plain + Pod>(from: &T) -> __m256i {
        load::vector(from)
    }

    #[target_feature(enable = "avx2,fma,f16c,avxvnni")]
    #[inline]
    unsafe fn load_floats(from: &[f32; 8]) -> __m256 {
        load::floats(from)
    }

    #[target_feature(enable = "avx2,fma,f16c,avxvnni")]
    #[inline]
    unsafe fn broadcast<T: Plain + Pod>(from: &T, i: usize) -> __m256i {
        load::broadcast(from, i)
    }

    intrinsics! { "avx2,fma,f16c,avxvnni":
        dpbusd(acc: Ints, a: Ints, b: Ints) -> Ints = _mm256_dpbusd_avx_epi32;
        dpwssd(acc: Ints, a: Ints, b: Ints) -> Ints = _mm256_dpwssd_avx_epi32;
        mullo_epi16(a: Ints, b: Ints) -> Ints = _mm256_mullo_epi16;
        mullo_epi32(a: Ints, b: Ints) -> Ints = _mm256_mullo_epi32;
        add_epi32(a: Ints, b: Ints) -> Ints = _mm256_add_epi32;
        xor(a: Ints, b: Ints) -> Ints = _mm256_xor_si256;
        upper_16(a: Ints) -> Ints = _mm256_srai_epi32::<16>;
        cvtepi32_ps(a: Ints) -> Floats = _mm256_cvtepi32_ps;
        add_ps(a: Floats, b: Floats) -> Floats = _mm256_add_ps;
        sub_ps(a: Floats, b: Floats) -> Floats = _mm256_sub_ps;
        mul_ps(a: Floats, b: Floats) -> Floats = _mm256_mul_ps;
    }

    #[target_feature(enable = "avx2,fma,f16c,avxvnni")]
    #[inline]
    unsafe fn set1(v: i32) -> __m256i {
        _mm256_set1_epi32(v)
    }

    #[target_feature(enable = "avx2,fma,f16c,avxvnni")]
    #[inline]
    unsafe fn set1_ps(v: f32) -> __m256 {
        _mm256_set1_ps(v)
    }
}
