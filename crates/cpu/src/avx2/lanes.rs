//! Interleaves the activations of eight tokens for the tiles.

use std::arch::x86_64::*;

use super::load::{Plain, half_vector, store, vector};
use super::reduce::{transpose, transpose_halves};
use crate::kernels::{LANES, Lanes, Q8Block};

/// Interleaves a super-block of eight tokens.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn interleave(x: &[&Q8Block; LANES], to: &mut Lanes<LANES>) {
    for c in 0..8 {
        let codes = transposed(x, |x| &x.codes.as_chunks::<32>().0[c]);
        for (to, v) in to.codes[8 * c..8 * c + 8].iter_mut().zip(codes) {
            store(to, v);
        }
    }
    let pairs = transposed(x, |x| &x.scale_pairs);
    let half_sums = transposed(x, |x| &x.half_sums);
    let (block_d, block_sum) = (transposed(x, |x| &x.block_d), transposed(x, |x| &x.block_sum));
    for j in 0..8 {
        store(&mut to.scale_pairs[j], pairs[j]);
        store(&mut to.half_sums[j], half_sums[j]);
        store(&mut to.block_d[j], block_d[j]);
        store(&mut to.block_sum[j], block_sum[j]);
    }
    let (mut scales, mut sums) = ([_mm_setzero_si128(); LANES], [_mm_setzero_si128(); LANES]);
    for t in 0..LANES {
        (scales[t], sums[t]) = (half_vector(&x[t].scales), half_vector(&x[t].sums));
    }
    let (scales, sums) = (transpose_halves(scales), transpose_halves(sums));
    for i in 0..4 {
        store(&mut to.scales[i], scales[i]);
        store(&mut to.sums[i], sums[i]);
    }
    for t in 0..LANES {
        to.d[t] = x[t].d;
    }
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
