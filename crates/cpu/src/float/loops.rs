//! The float loops that compilers do not turn into good code by themselves, over vectors of any width: a tile of attention's
//! matrix product, everything with an exponential, and the norm.
//!
//! They are inlined into functions that are compiled for an instruction set, and are unsafe because of that alone where
//! nothing else is said: the CPU has the instructions of `V`.

use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};

use apr_core::backend::KV_BLOCK;

use super::vector::Vector;
use super::{Gemm, Softmax, body};

/// The most lanes that a vector has.
const MAX_LANES: usize = 16;

/// What is fetched into the cache on the way, some bytes with every row of the right-hand side.
pub(super) struct Ahead<'a> {
    rest: &'a [u8],
    step: usize,
}

impl<'a> Ahead<'a> {
    /// `bytes`, spread over `n_steps` rows.
    pub(super) fn new(bytes: &'a [u8], n_steps: usize) -> Ahead<'a> {
        Ahead { rest: bytes, step: bytes.len().div_ceil(n_steps.max(1)) }
    }

    /// Where to fetch with the first of the next `n` rows, and how much further with each of the others. Where nothing is left to
    /// fetch, `at_hand` stands in: an address outside the process' memory costs a walk through page tables.
    #[inline(always)]
    pub(super) fn next(&mut self, n: usize, at_hand: *const u8) -> (*const u8, usize) {
        let n_bytes = self.step * n;
        let next = if self.rest.len() < n_bytes { (at_hand, 0) } else { (self.rest.as_ptr(), self.step) };
        self.rest = &self.rest[n_bytes.min(self.rest.len())..];
        next
    }
}

/// `R` rows from `i` on by `C` vectors of columns from `j` on, in registers; returns `R`. `b` as in [`Gemm`].
///
/// # Safety
/// The rows and columns are within the product's, whose bounds have been checked.
#[inline(always)]
pub(super) unsafe fn tile<V: Vector, const R: usize, const C: usize>(
    g: &mut Gemm<'_>,
    b: &[f32],
    (i, j): (usize, usize),
    ahead: &mut Ahead<'_>,
) -> usize {
    let (from, n) = (g.k.start, g.k.len());
    let (a, b, c) =
        (g.a[i * g.lda + from..].as_ptr(), b[from * g.ldb + j..].as_ptr(), g.c[i * g.ldc + j..].as_mut_ptr());
    let (lda, ldb, ldc, add) = (g.lda, g.ldb, g.ldc, g.add);
    let (next, step) = ahead.next(n, a.cast());
    // SAFETY: the caller's promise: `a` has `R` rows of `n` columns, `lda` apart, `b` has `n` rows, and `c` has `R` rows.
    unsafe {
        let mut acc = [[V::splat(0.0); C]; R];
        if add {
            for r in 0..R {
                for v in 0..C {
                    acc[r][v] = V::load(c.add(r * ldc + V::LANES * v));
                }
            }
        }
        for p in 0..n {
            _mm_prefetch::<_MM_HINT_T0>(next.wrapping_add(step * p).cast());
            let mut of_b = [V::splat(0.0); C];
            for v in 0..C {
                of_b[v] = V::load(b.add(p * ldb + V::LANES * v));
            }
            for r in 0..R {
                let x = V::splat(*a.add(r * lda + p));
                for v in 0..C {
                    acc[r][v] = x.mul_add(of_b[v], acc[r][v]);
                }
            }
        }
        for r in 0..R {
            for v in 0..C {
                acc[r][v].store(c.add(r * ldc + V::LANES * v));
            }
        }
    }
    R
}

/// `exp` of the portable loops in every lane, operation by operation.
#[inline(always)]
unsafe fn exp<V: Vector>(x: V) -> V {
    // SAFETY: the caller's promise. `min` drops NaN.
    unsafe { exp_below_88(x.min(V::splat(88.0))).or_nan_of(x) }
}

/// [`exp`] of what is at most 88 or NaN, which stays NaN.
#[inline(always)]
unsafe fn exp_below_88<V: Vector>(x: V) -> V {
    // SAFETY: the caller's promise.
    unsafe {
        let shifted = x.mul_add(V::splat(std::f32::consts::LOG2_E), V::splat(body::ROUND));
        let n = shifted.sub(V::splat(body::ROUND));
        let r = n.mul_add(V::splat(-body::LN_2_HIGH), x);
        let r = n.mul_add(V::splat(-body::LN_2_LOW), r);
        let mut p = V::splat(body::EXP[0]);
        for c in &body::EXP[1..] {
            p = p.mul_add(r, V::splat(*c));
        }
        p.scale_by_power(x, n, shifted)
    }
}

/// A vector of what fills none, and `rest` in the other lanes.
#[inline(always)]
pub(super) unsafe fn padded<V: Vector>(tail: &[f32], rest: f32) -> V {
    let mut lanes = [rest; MAX_LANES];
    lanes[..tail.len()].copy_from_slice(tail);
    // SAFETY: no vector has more lanes.
    unsafe { V::load(lanes.as_ptr()) }
}

/// The first lanes of `v`.
#[inline(always)]
unsafe fn store_to<V: Vector>(v: V, tail: &mut [f32]) {
    let mut lanes = [0.0; MAX_LANES];
    // SAFETY: no vector has more lanes.
    unsafe { v.store(lanes.as_mut_ptr()) };
    tail.copy_from_slice(&lanes[..tail.len()]);
}

#[inline(always)]
pub(super) unsafe fn softmax<V: Vector>(s: Softmax<'_>) {
    let n = s.sum.len() / s.max.len().max(1);
    // SAFETY: the caller's promise; a chunk has as many floats as a vector.
    unsafe {
        for (q, scores) in s.scores.as_chunks_mut::<KV_BLOCK>().0.iter_mut().enumerate() {
            let mut largest = V::splat(f32::NEG_INFINITY);
            for chunk in scores.chunks_exact(V::LANES) {
                // The second operand stands where the first is NaN.
                largest = V::load(chunk.as_ptr()).max(largest);
            }
            let (before, now) = (s.max[q], s.max[q].max(s.scale * largest.largest_lane()));
            let (scale, minus_reference) = (V::splat(s.scale), V::splat(-body::reference(now)));
            let mut total = V::splat(0.0);
            for chunk in scores.chunks_exact_mut(V::LANES) {
                let y = exp_below_88(V::load(chunk.as_ptr()).mul_add(scale, minus_reference));
                y.store(chunk.as_mut_ptr());
                total = total.add(y);
            }
            if before < now && before > f32::NEG_INFINITY {
                let keep = exp_below_88(V::splat(before - now));
                s.total[q] *= keep.largest_lane();
                multiply(&mut s.sum[q * n..(q + 1) * n], keep);
            }
            s.max[q] = now;
            s.total[q] += total.sum_of_lanes();
        }
    }
}

/// Multiplies all values with `by`, whose lanes are equal.
#[inline(always)]
unsafe fn multiply<V: Vector>(values: &mut [f32], by: V) {
    // SAFETY: the caller's promise; a chunk has as many floats as a vector.
    unsafe {
        let mut chunks = values.chunks_exact_mut(V::LANES);
        for chunk in &mut chunks {
            by.mul(V::load(chunk.as_ptr())).store(chunk.as_mut_ptr());
        }
        let rest = chunks.into_remainder();
        if !rest.is_empty() {
            store_to(by.mul(padded(rest, 0.0)), rest);
        }
    }
}

#[inline(always)]
pub(super) unsafe fn swiglu<V: Vector>(gate: &mut [f32], up: &[f32]) {
    // SAFETY: the caller's promise; a chunk has as many floats as a vector.
    unsafe {
        let (mut gates, ups) = (gate.chunks_exact_mut(V::LANES), up.chunks_exact(V::LANES));
        let ups_rest = ups.remainder();
        for (g, u) in (&mut gates).zip(ups) {
            activated(V::load(g.as_ptr()), V::load(u.as_ptr())).store(g.as_mut_ptr());
        }
        let rest = gates.into_remainder();
        if !rest.is_empty() {
            store_to(activated::<V>(padded(rest, 0.0), padded(ups_rest, 0.0)), rest);
        }
    }
}

#[inline(always)]
unsafe fn activated<V: Vector>(gate: V, up: V) -> V {
    // SAFETY: the caller's promise.
    unsafe { gate.div(V::splat(1.0).add(exp(V::splat(0.0).sub(gate)))).mul(up) }
}

/// Sums that do not wait for each other.
const SUMS: usize = 4;

#[inline(always)]
pub(super) unsafe fn normalise<V: Vector>(x: &[f32], w: &[f32], eps: f32, out: &mut [f32]) {
    // SAFETY: the caller's promise; every pointer is to as many floats as a vector has.
    let squares = unsafe {
        let mut sums = [V::splat(0.0); SUMS];
        let groups = x.chunks_exact(SUMS * V::LANES);
        let vectors = groups.remainder().chunks_exact(V::LANES);
        let tail = vectors.remainder();
        for group in groups {
            for i in 0..SUMS {
                let v = V::load(group[i * V::LANES..].as_ptr());
                sums[i] = v.mul_add(v, sums[i]);
            }
        }
        for v in vectors {
            let v = V::load(v.as_ptr());
            sums[0] = v.mul_add(v, sums[0]);
        }
        if !tail.is_empty() {
            let v = padded::<V>(tail, 0.0);
            sums[1] = v.mul_add(v, sums[1]);
        }
        sums[0].add(sums[1]).add(sums[2].add(sums[3])).sum_of_lanes()
    };
    let scale = 1.0 / (squares / x.len() as f32 + eps).sqrt();
    for ((o, x), w) in out.iter_mut().zip(x).zip(w) {
        *o = x * scale * w;
    }
}

#[inline(always)]
pub(super) unsafe fn axpby<V: Vector>(y: &mut [f32], a: f32, x: &[f32], b: f32) {
    // SAFETY: the caller's promise; a chunk has as many floats as a vector.
    unsafe {
        let (a, b) = (V::splat(a), V::splat(b));
        let (mut ys, xs) = (y.chunks_exact_mut(V::LANES), x.chunks_exact(V::LANES));
        let x_rest = xs.remainder();
        for (y, x) in (&mut ys).zip(xs) {
            a.mul_add(V::load(y.as_ptr()), b.mul(V::load(x.as_ptr()))).store(y.as_mut_ptr());
        }
        let rest = ys.into_remainder();
        if !rest.is_empty() {
            store_to(a.mul_add(padded::<V>(rest, 0.0), b.mul(padded(x_rest, 0.0))), rest);
        }
    }
}

#[inline(always)]
pub(super) unsafe fn widen<V: Vector>(halves: &[u16], out: &mut [f32]) {
    let (from, mut to) = (halves.chunks_exact(V::LANES), out.chunks_exact_mut(V::LANES));
    let rest = from.remainder();
    for (h, o) in from.zip(&mut to) {
        // SAFETY: the caller's promise; a chunk has as many elements as a vector.
        unsafe { V::load_halves(h.as_ptr()).store(o.as_mut_ptr()) };
    }
    body::widen(rest, to.into_remainder());
}
