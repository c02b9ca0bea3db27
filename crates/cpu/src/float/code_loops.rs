//! Attention's products in 16-bit integers over vectors of any width: the loops of [`super::codes`], which tells what they compute.
//!
//! As in `loops`, they are inlined into functions that are compiled for an instruction set, and are unsafe because of that alone where
//! nothing else is said: the CPU has the instructions of `V`.

use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};

use apr_core::backend::KV_BLOCK;

use super::SHARED;
use super::codes::{self, Coded, LANES, Pair, Product};
use super::loops::{Ahead, padded};
use super::vector::{Operands, Vector};

/// The most vectors that a row of a tile of positions has.
const MOST: usize = KV_BLOCK / 8;

/// What is done with the sums of a product, given what a unit of a row is worth and the first column of the vector.
pub(super) trait Put<V: Vector>: Copy {
    unsafe fn put(self, c: *mut f32, sum: V, of_a: V, column: usize);
}

/// Stores them, multiplied with what units of rows and columns are worth.
#[derive(Clone, Copy)]
pub(super) struct Score<'a>(pub(super) &'a [f32]);

/// Adds them, multiplied with what units of rows are worth.
#[derive(Clone, Copy)]
pub(super) struct Weigh;

impl<V: Vector> Put<V> for Score<'_> {
    #[inline(always)]
    unsafe fn put(self, c: *mut f32, sum: V, of_a: V, column: usize) {
        // SAFETY: the caller's promise; columns are as many as units.
        unsafe { sum.mul(of_a.mul(V::load(self.0[column..][..V::LANES].as_ptr()))).store(c) }
    }
}

impl<V: Vector> Put<V> for Weigh {
    #[inline(always)]
    unsafe fn put(self, c: *mut f32, sum: V, of_a: V, _: usize) {
        // SAFETY: the caller's promise.
        unsafe { V::load(c).add(sum.mul(of_a)).store(c) }
    }
}

/// All columns that fill strips of `C` vectors; returns how many. Tiles have `R` rows, and fewer for what is left.
#[inline(always)]
pub(super) unsafe fn strips<V: Vector, P: Put<V>, const R: usize, const C: usize>(
    p: &mut Product<'_>,
    put: P,
) -> usize {
    let (m, strip) = (p.m, C * V::LANES);
    let n = p.n / strip * strip;
    let mut ahead = Ahead::new(p.ahead, n / strip * m.div_ceil(R) * p.n_pairs);
    for j in (0..n).step_by(strip) {
        let mut i = 0;
        while i < m {
            // SAFETY: the rows are fewer than `m`, and the columns fewer than `n`.
            i += unsafe {
                match m - i {
                    1 => tile::<V, P, 1, C>(p, (i, j), put, &mut ahead),
                    2 => tile::<V, P, 2, C>(p, (i, j), put, &mut ahead),
                    3 => tile::<V, P, 3, C>(p, (i, j), put, &mut ahead),
                    // Eight rows, those of a token's heads that share keys, are twice four sooner than six and two.
                    7 | 8 if R == 6 => tile::<V, P, 4, C>(p, (i, j), put, &mut ahead),
                    n if n >= R => tile::<V, P, R, C>(p, (i, j), put, &mut ahead),
                    _ => tile::<V, P, 4, C>(p, (i, j), put, &mut ahead),
                }
            };
        }
    }
    n
}

/// `R` rows from `i` on by `C` vectors of columns from `j` on, in registers; returns `R`.
#[inline(always)]
unsafe fn tile<V: Vector, P: Put<V>, const R: usize, const C: usize>(
    p: &mut Product<'_>,
    (i, j): (usize, usize),
    put: P,
    ahead: &mut Ahead<'_>,
) -> usize {
    let (a, b, c) = (p.a[i * p.lda..].as_ptr(), p.b[j..].as_ptr(), p.c[i * p.ldc + j..].as_mut_ptr());
    let (lda, ldb, n_pairs, of_a) = (p.lda, p.ldb, p.n_pairs, &p.of_a[i..i + R]);
    let (next, step) = ahead.next(n_pairs, a.cast());
    // SAFETY: the caller's promise: `a` has `R` rows of `n_pairs` pairs, `lda` apart, `b` as many rows, and `c` has `R` rows.
    unsafe {
        let mut sums = [[V::no_ints(); C]; R];
        let first = V::add_first(&mut sums, &Operands { a, lda, b, ldb, n_pairs, ahead: next, step });
        for k in first..n_pairs {
            // Into the second-level cache: the first has too few buffers for lines under way.
            _mm_prefetch::<_MM_HINT_T1>(next.wrapping_add(step * k).cast());
            let mut of_b = [V::no_ints(); C];
            for v in 0..C {
                of_b[v] = V::load_pairs(b.add(k * ldb + V::LANES * v));
            }
            for r in 0..R {
                for v in 0..C {
                    sums[r][v] = V::add_dots(sums[r][v], of_b[v], a.add(r * lda), k);
                }
            }
        }
        for r in 0..R {
            let of_a = V::splat(of_a[r]);
            for v in 0..C {
                put.put(c.add(r * p.ldc + V::LANES * v), V::from_ints(sums[r][v]), of_a, j + V::LANES * v);
            }
        }
    }
    R
}

#[inline(always)]
pub(super) unsafe fn code_queries<V: Vector>(x: &[f32], pairs: &mut [Pair], scales: &mut [f32]) {
    let d = x.len() / scales.len().max(1);
    let codes: &mut [i16] = bytemuck::cast_slice_mut(pairs);
    for ((x, codes), scale) in x.chunks_exact(d).zip(codes.chunks_exact_mut(d)).zip(scales) {
        // SAFETY: the caller's promise; a chunk has as many elements as a vector.
        unsafe {
            let mut sums = [V::splat(0.0); 2];
            for (i, x) in x.chunks(V::LANES).enumerate() {
                let x = if x.len() == V::LANES { V::load(x.as_ptr()) } else { padded(x, 0.0) };
                let sum = &mut sums[i % (LANES / V::LANES)];
                *sum = sum.add(x.mul(x));
            }
            *scale = codes::unit_of_query(sum_of(sums));
            let inverse = V::splat(1.0 / *scale);
            for (x, codes) in x.chunks(V::LANES).zip(codes.chunks_mut(V::LANES)) {
                if x.len() == V::LANES {
                    V::load(x.as_ptr()).mul(inverse).store_codes(codes.as_mut_ptr());
                    continue;
                }
                let mut last = [0; LANES];
                padded::<V>(x, 0.0).mul(inverse).store_codes(last.as_mut_ptr());
                codes.copy_from_slice(&last[..codes.len()]);
            }
        }
    }
}

/// The sum of sixteen lanes: of the first vector, or of both where it has eight.
#[inline(always)]
unsafe fn sum_of<V: Vector>(sums: [V; 2]) -> f32 {
    // SAFETY: the caller's promise.
    unsafe { if V::LANES == LANES { sums[0] } else { sums[0].add(sums[1]) }.sum_of_lanes() }
}

#[inline(always)]
pub(super) unsafe fn widen_keys<V: Vector>(codes: &[i8], scales: &[f32], to: Coded<'_>) {
    let inverse = codes::of_keys(scales, to.scales);
    // Every so many rows have scales of their own.
    let rows = codes.chunks_exact(SHARED * KV_BLOCK).zip(to.pairs.chunks_exact_mut(SHARED / 2 * KV_BLOCK));
    for ((rows, pairs), scales) in rows.zip(scales.chunks_exact(KV_BLOCK)) {
        for p in (0..KV_BLOCK).step_by(V::LANES) {
            // SAFETY: the caller's promise; a row has as many elements from `p` on as a vector.
            unsafe {
                let by = V::load(scales[p..].as_ptr()).mul(V::load(inverse[p..].as_ptr()));
                for (rows, pairs) in rows.chunks_exact(2 * KV_BLOCK).zip(pairs.chunks_exact_mut(KV_BLOCK)) {
                    let (a, b) = (V::load_bytes(rows[p..].as_ptr()), V::load_bytes(rows[KV_BLOCK + p..].as_ptr()));
                    a.mul(by).store_pairs(b.mul(by), pairs[p..].as_mut_ptr());
                }
            }
        }
    }
}

#[inline(always)]
pub(super) unsafe fn widen_values<V: Vector>(codes: &[i8], scales: &[f32], to: Coded<'_>) {
    let inverse = codes::of_values(scales, to.scales);
    let d = codes.len() / KV_BLOCK;
    let of_rows = scales.chunks_exact(2 * d / SHARED).zip(inverse.as_chunks::<2>().0);
    for ((rows, pairs), (scales, inverse)) in codes.chunks_exact(2 * d).zip(to.pairs.chunks_exact_mut(d)).zip(of_rows) {
        let ((a, b), (of_a, of_b)) = (rows.split_at(d), scales.split_at(d / SHARED));
        for c in (0..d).step_by(V::LANES) {
            let j = c / SHARED;
            // SAFETY: the caller's promise; a row has as many elements from `c` on as a vector.
            unsafe {
                let a = V::load_bytes(a[c..].as_ptr()).mul(V::splat(of_a[j] * inverse[0]));
                let b = V::load_bytes(b[c..].as_ptr()).mul(V::splat(of_b[j] * inverse[1]));
                a.store_pairs(b, pairs[c..].as_mut_ptr());
            }
        }
    }
}

#[inline(always)]
pub(super) unsafe fn code_weights<V: Vector>(
    weights: &[f32],
    of_values: &[f32; KV_BLOCK],
    pairs: &mut [Pair],
    scales: &mut [f32],
) {
    let n = KV_BLOCK / V::LANES;
    let codes = bytemuck::cast_slice_mut::<Pair, i16>(pairs).as_chunks_mut::<KV_BLOCK>().0;
    // SAFETY: the caller's promise; a row has as many floats as `n` vectors.
    unsafe {
        for ((weights, codes), scale) in weights.as_chunks::<KV_BLOCK>().0.iter().zip(codes).zip(scales) {
            let mut x = [V::splat(0.0); MOST];
            let mut largest = V::splat(0.0);
            let mut sums = [V::splat(0.0); 2];
            for v in 0..n {
                let weight = V::load(weights[V::LANES * v..].as_ptr());
                x[v] = weight.mul(V::load(of_values[V::LANES * v..].as_ptr())).where_not_zero(weight);
                largest = x[v].max(largest);
                let s = v % (LANES / V::LANES);
                sums[s] = sums[s].add(x[v]);
            }
            *scale = codes::unit_of_weights(largest.largest_lane(), sum_of(sums));
            let inverse = V::splat(1.0 / *scale);
            for v in 0..n {
                x[v].mul(inverse).store_codes(codes[V::LANES * v..].as_mut_ptr());
            }
        }
    }
}
