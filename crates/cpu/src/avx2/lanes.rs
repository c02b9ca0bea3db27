//! Brings the activations of eight tokens, or of one, into the order in which tiles read them.

use std::arch::x86_64::*;

use super::load::{Plain, half_vector, store, vector};
use super::reduce::{transpose, transpose_halves};
use crate::kernels::{LANES, Lanes, Order, Q8Block};

/// Interleaves a super-block of eight tokens.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn interleave(x: &[&Q8Block; LANES], order: Order, to: &mut Lanes<LANES>) {
    for k in 0..4 {
        let mut codes = [[_mm256_setzero_si256(); LANES]; 2];
        for t in 0..LANES {
            [codes[0][t], codes[1][t]] = codes_64(x[t], order, k);
        }
        for (h, codes) in codes.into_iter().enumerate() {
            let codes = transpose(codes);
            let at = 16 * k + 8 * h;
            for (to, v) in to.codes[at..at + 8].iter_mut().zip(codes) {
                store(to, v);
            }
            if order.offset {
                for (i, to) in to.offsets[at / 4..at / 4 + 2].iter_mut().enumerate() {
                    let products = |c: usize| _mm256_maddubs_epi16(_mm256_set1_epi8(32), codes[4 * i + c]);
                    let first = _mm256_add_epi16(products(0), products(1));
                    let sum = _mm256_add_epi16(first, _mm256_add_epi16(products(2), products(3)));
                    store(to, _mm256_sub_epi16(_mm256_setzero_si256(), sum));
                }
            }
        }
    }
    // Weights of one order read no more than this.
    if order.paired {
        put(&mut to.scales, transposed_half(x, |x| &x.scales));
        put(&mut to.sums, transposed_half(x, |x| &x.sums));
        put(&mut to.scaled_sums, transposed_half(x, |x| &x.scaled_sums));
    } else {
        put(&mut to.scale_pairs, transposed(x, |x| &x.scale_pairs));
    }
    if !order.paired && !order.offset {
        put(&mut to.half_sums, transposed(x, |x| &x.half_sums));
        put(&mut to.block_d, transposed(x, |x| &x.block_d));
        put(&mut to.block_sum, transposed(x, |x| &x.block_sum));
    }
    to.narrow = true;
    for t in 0..LANES {
        to.d[t] = x[t].d;
        to.narrow &= x[t].narrow;
    }
}

/// Writes vectors over the whole of `to`.
#[target_feature(enable = "avx2")]
#[inline]
fn put<T: Plain, const N: usize>(to: &mut [[T; LANES]; N], v: [__m256i; N]) {
    for (to, v) in to.iter_mut().zip(v) {
        store(to, v);
    }
}

/// A super-block of one token.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn alone(x: &Q8Block, order: Order, to: &mut Lanes<1>) {
    for k in 0..4 {
        let codes = codes_64(x, order, k);
        for (h, codes) in codes.into_iter().enumerate() {
            let at = 16 * k + 8 * h;
            store(to.codes[at..].first_chunk_mut::<8>().expect("64 dwords"), codes);
            if order.offset {
                let sum = _mm256_maddubs_epi16(_mm256_set1_epi8(32), codes);
                let sum = _mm256_add_epi16(sum, _mm256_shuffle_epi32::<0b01_00_11_10>(sum));
                let sum = _mm256_add_epi16(sum, _mm256_shuffle_epi32::<0b10_11_00_01>(sum));
                let mut words = [0i16; 16];
                store(&mut words, _mm256_sub_epi16(_mm256_setzero_si256(), sum));
                (to.offsets[at / 4], to.offsets[at / 4 + 1]) = ([[words[0], words[1]]], [[words[8], words[9]]]);
            }
        }
    }
    for j in 0..8 {
        to.scale_pairs[j] = [x.scale_pairs[j]];
        to.half_sums[j] = [[x.half_sums[2 * j], x.half_sums[2 * j + 1]]];
        to.block_d[j] = [x.block_d[j]];
        to.block_sum[j] = [x.block_sum[j]];
    }
    for i in 0..4 {
        to.scales[i] = [[x.scales[2 * i], x.scales[2 * i + 1]]];
        to.sums[i] = [[x.sums[2 * i], x.sums[2 * i + 1]]];
        to.scaled_sums[i] = [[x.scaled_sums[2 * i], x.scaled_sums[2 * i + 1]]];
    }
    (to.d, to.narrow) = ([x.d], x.narrow);
}

/// The codes of columns `64 k ..` in this order.
#[target_feature(enable = "avx2")]
#[inline]
fn codes_64(x: &Q8Block, order: Order, k: usize) -> [__m256i; 2] {
    let blocks = x.codes.as_chunks::<32>().0;
    let codes = [vector(&blocks[2 * k]), vector(&blocks[2 * k + 1])];
    if order.paired { paired(codes) } else { codes }
}

/// Codes of 32 columns and of 32 others, in dwords of which each has two of the first in its lower half and two of the others in its
/// upper one.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn paired([a, b]: [__m256i; 2]) -> [__m256i; 2] {
    let swap = _mm256_broadcastsi128_si256(_mm_setr_epi8(2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
    // A compiler that knows the places makes two shuffles of it.
    let swap = opaque(swap);
    [_mm256_blend_epi16::<0xaa>(a, b), _mm256_shuffle_epi8(_mm256_blend_epi16::<0xaa>(b, a), swap)]
}

/// The same vector, of which compilers do not know what it holds.
#[target_feature(enable = "avx2")]
#[inline]
fn opaque(mut v: __m256i) -> __m256i {
    // SAFETY: there are no instructions.
    unsafe { std::arch::asm!("/* {v} */", v = inout(ymm_reg) v, options(pure, nomem, nostack, preserves_flags)) };
    v
}

/// Dword `i` of `field` of every token as vector `i`.
#[target_feature(enable = "avx2")]
#[inline]
fn transposed<T: Plain>(x: &[&Q8Block; LANES], field: impl Fn(&Q8Block) -> &T) -> [__m256i; 8] {
    let mut v = [_mm256_setzero_si256(); LANES];
    for t in 0..LANES {
        v[t] = vector(field(x[t]));
    }
    transpose(v)
}

/// [`transposed`] for fields of four dwords.
#[target_feature(enable = "avx2")]
#[inline]
fn transposed_half<T: Plain>(x: &[&Q8Block; LANES], field: impl Fn(&Q8Block) -> &T) -> [__m256i; 4] {
    let mut v = [_mm_setzero_si128(); LANES];
    for t in 0..LANES {
        v[t] = half_vector(field(x[t]));
    }
    transpose_halves(v)
}
