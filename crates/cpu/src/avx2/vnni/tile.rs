//! Tiles of dot-product instructions: unpacked weight rows with some tokens.
//!
//! A broadcast dword of a token's codes meets the same four columns of every row. The sum of 32 columns (16 where
//! scales are that fine) is exact in 32 bits, and is multiplied there with its integer scales.
//!
//! Every function is inlined into [`Vectors::tile`], and so are the operations of `V` in it: loops, not closures, as a
//! closure that is not inlined would pass vectors in memory.

use super::Vectors;
use crate::kernels::{Panel, Q8Block};

/// Adds to `y[t]` the products of `dwords` of block `j` with each token.
#[inline(always)]
unsafe fn dots<V: Vectors, const N: usize>(
    y: &mut [V::Ints; N],
    p: &Panel,
    flip: Option<V::Ints>,
    x: &[&Q8Block; N],
    j: usize,
    dwords: std::ops::Range<usize>,
) {
    for i in dwords {
        // SAFETY: the caller has the instructions of `V`.
        unsafe {
            let mut w = V::load(&p.codes[j][i]);
            if let Some(flip) = flip {
                w = V::xor(w, flip);
            }
            for t in 0..N {
                y[t] = V::dpbusd(y[t], w, V::broadcast(&x[t].codes, 8 * j + i));
            }
        }
    }
}

/// Unsigned codes with integer scales and minima per 32 columns: one step of the sequence of [`crate::kernels`].
#[inline(always)]
pub(super) unsafe fn super_32<V: Vectors, const N: usize>(p: &Panel, x: &[&Q8Block; N], acc: &mut [V::Floats; N]) {
    // SAFETY: the caller has the instructions of `V`.
    unsafe {
        let zero = V::set1(0);
        let mut sum = [zero; N];
        for j in 0..8 {
            let mut y = [zero; N];
            dots::<V, N>(&mut y, p, None, x, j, 0..8);
            // Scales have six bits and sub-scales of tokens as many: a product fills no more than the lower half.
            let scale = V::upper_16(V::load(&p.scales[j]));
            for t in 0..N {
                let scale = V::mullo_epi16(scale, V::broadcast(&x[t].scale_pairs, j));
                sum[t] = V::add_epi32(sum[t], V::mullo_epi32(y[t], scale));
            }
        }
        let mut min = [zero; N];
        for i in 0..4 {
            let m = V::load(&p.mins[i]);
            for t in 0..N {
                let m = V::mullo_epi16(m, V::broadcast(&x[t].scales, i));
                min[t] = V::dpwssd(min[t], m, V::broadcast(&x[t].sums, i));
            }
        }
        let (d, m) = (V::load_floats(&p.d[0]), V::load_floats(&p.m[0]));
        for t in 0..N {
            let x_d = V::set1_ps(x[t].d);
            acc[t] = V::add_ps(acc[t], V::mul_ps(V::cvtepi32_ps(sum[t]), V::mul_ps(d, x_d)));
            acc[t] = V::sub_ps(acc[t], V::mul_ps(V::cvtepi32_ps(min[t]), V::mul_ps(m, x_d)));
        }
    }
}

/// Unsigned codes that stand for `code - OFFSET`, or signed ones (then `OFFSET` is 128: adding it is what flips their
/// sign bit), with a float scale per 32 columns, and a float minimum where `MIN`.
#[inline(always)]
pub(super) unsafe fn blocks_32<V: Vectors, const OFFSET: i16, const SIGNED: bool, const MIN: bool, const N: usize>(
    p: &Panel,
    n_blocks: usize,
    x: &[&Q8Block; N],
    acc: &mut [V::Floats; N],
) {
    // SAFETY: the caller has the instructions of `V`.
    unsafe {
        let zero = V::set1(0);
        let flip = if SIGNED { Some(V::set1(0x8080_8080_u32 as i32)) } else { None };
        // The offset times the sum of a token's codes: the lower or the upper of two sums in a dword.
        let offset = [V::set1(i32::from(-OFFSET) & 0xffff), V::set1(i32::from(-OFFSET) << 16)];
        for j in 0..n_blocks {
            let mut y = [zero; N];
            if OFFSET != 0 {
                for t in 0..N {
                    y[t] = V::dpwssd(zero, offset[j % 2], V::broadcast(&x[t].sums, j / 2));
                }
            }
            dots::<V, N>(&mut y, p, flip, x, j, 0..8);
            let x_d: [f32; N] = std::array::from_fn(|t| x[t].block_d[j]);
            add_block::<V, N>(acc, &y, V::load_floats(&p.d[j]), &x_d);
            if MIN {
                let m = V::load_floats(&p.m[j]);
                for t in 0..N {
                    acc[t] = V::add_ps(acc[t], V::mul_ps(m, V::set1_ps(x[t].block_sum[j])));
                }
            }
        }
    }
}

/// Unsigned codes to 63 that stand for `code - 32`, with an integer scale per 16 columns and a float per super-block, whose
/// halves are summed apart.
#[inline(always)]
pub(super) unsafe fn halves_16<V: Vectors, const N: usize>(p: &Panel, x: &[&Q8Block; N], acc: &mut [V::Floats; N]) {
    // SAFETY: the caller has the instructions of `V`.
    unsafe {
        let zero = V::set1(0);
        let d = V::load_floats(&p.d[0]);
        for half in 0..2 {
            let mut sum = [zero; N];
            for j in 4 * half..4 * half + 4 {
                // `mins` holds -32 times the scales, so this takes the codes' offset off.
                let min = V::load(&p.mins[j]);
                let mut of_block = [zero; N];
                for t in 0..N {
                    of_block[t] = V::dpwssd(zero, min, V::broadcast(&x[t].half_sums, j));
                }
                for h in 0..2 {
                    let mut y = [zero; N];
                    dots::<V, N>(&mut y, p, None, x, j, 4 * h..4 * h + 4);
                    let scale = V::upper_16(V::load(&p.scales[2 * j + h]));
                    for t in 0..N {
                        of_block[t] = V::add_epi32(of_block[t], V::mullo_epi32(y[t], scale));
                    }
                }
                for t in 0..N {
                    let scale = V::upper_16(V::broadcast(&x[t].scale_pairs, j));
                    sum[t] = V::add_epi32(sum[t], V::mullo_epi32(of_block[t], scale));
                }
            }
            let x_d: [f32; N] = std::array::from_fn(|t| x[t].d);
            add_block::<V, N>(acc, &sum, d, &x_d);
        }
    }
}

/// One step of the sequence of [`crate::kernels`] for types with a float scale per 32 columns, or with sums of half super-blocks.
#[inline(always)]
unsafe fn add_block<V: Vectors, const N: usize>(
    acc: &mut [V::Floats; N],
    sum: &[V::Ints; N],
    d: V::Floats,
    x_d: &[f32; N],
) {
    for t in 0..N {
        // SAFETY: the caller has the instructions of `V`.
        unsafe {
            let d = V::mul_ps(d, V::set1_ps(x_d[t]));
            acc[t] = V::add_ps(acc[t], V::mul_ps(V::cvtepi32_ps(sum[t]), d));
        }
    }
}
