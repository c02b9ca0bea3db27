//! Attention's products in 16-bit integers: codes of queries, keys, values and weights, and the portable loops.
//!
//! A multiply-add of two pairs of 16-bit integers takes no longer than one of floats, so a product of integers takes half the time.
//! Rows are scaled so that no sum overflows, whatever the values:
//!
//! - Queries are scaled to a length of [`QUERY_LENGTH`], and keys to one of at most [`KEY_LENGTH`]. No sum of products of two of
//!   them, nor a part of it, is larger than the product of their lengths (Cauchy and Schwarz). Where the length of a key is not
//!   known, as that of 8-bit ones, its largest code is so small that no key is longer.
//! - Values are scaled to a largest code of [`LARGEST_VALUE`], and the weights that meet them to a sum of no more than [`WEIGHTS`].
//!
//! Heads of 128 columns of like size have eleven significant bits in the root mean square or more, as many as half floats. Wider heads
//! have fewer, and small columns beside large ones, where each half float has its own exponent.
//!
//! Every position of keys and values has a scale of its own, so that its codes depend on no other. A weight is multiplied with the
//! scale of its value before it is made a code. Sums of integers are exact, so it makes no difference in what order they are made, and
//! a position of weight zero adds nothing whatever its value. All instruction sets round the same way: codes and products are the
//! same bits.

use apr_core::backend::KV_BLOCK;
use apr_core::backend::rounded::{KEY_LENGTH, LARGEST, LARGEST_VALUE, QUERY_LENGTH, WEIGHTS};

use super::SHARED;
use super::body::ROUND;

/// Two codes of neighbouring columns (queries, weights) or rows (keys, values).
pub type Pair = [i16; 2];

/// Lengths and sizes below it count as this, so that nothing is divided by zero.
pub const TINY: f32 = 1e-15;

/// Room for a tile's codes and what a unit of them is worth.
pub struct Coded<'a> {
    /// `[n_rows / 2, n_cols]`
    pub pairs: &'a mut [Pair],
    /// Per position.
    pub scales: &'a mut [f32; KV_BLOCK],
}

/// A product of codes: `a` `[m, n_pairs]`, `b` `[n_pairs, n]`, each entry a pair, and `c` `[m, n]`.
pub struct Product<'a> {
    pub m: usize,
    pub n: usize,
    pub n_pairs: usize,
    pub a: &'a [Pair],
    /// Distance of the rows of `a`.
    pub lda: usize,
    /// `[m]`: what a unit of a row of `a` is worth.
    pub of_a: &'a [f32],
    pub b: &'a [Pair],
    /// Distance of the rows of `b`.
    pub ldb: usize,
    pub c: &'a mut [f32],
    pub ldc: usize,
    /// Bytes that are needed next and fetched into the cache meanwhile.
    pub ahead: &'a [u8],
}

impl Product<'_> {
    /// Asserts that the matrices have what the product reads and writes.
    pub(super) fn check(&self) {
        assert!(self.n_pairs > 0 && self.m == self.of_a.len());
        let last = self.m.saturating_sub(1);
        assert!(
            self.m == 0 || last * self.lda + self.n_pairs <= self.a.len() && last * self.ldc + self.n <= self.c.len()
        );
        assert!((self.n_pairs - 1) * self.ldb + self.n <= self.b.len());
    }
}

/// Codes of rows of queries: `x` `[scales.len(), d]`, `pairs` `[scales.len(), d / 2]`.
pub(super) fn code_queries(x: &[f32], pairs: &mut [Pair], scales: &mut [f32]) {
    let d = x.len() / scales.len().max(1);
    let codes: &mut [i16] = bytemuck::cast_slice_mut(pairs);
    for ((x, codes), scale) in x.chunks_exact(d).zip(codes.chunks_exact_mut(d)).zip(scales) {
        let mut sums = [0f32; LANES];
        for chunk in x.chunks(LANES) {
            chunk.iter().zip(&mut sums).for_each(|(v, s)| *s += v * v);
        }
        *scale = unit_of_query(sum(sums));
        let inverse = 1.0 / *scale;
        codes.iter_mut().zip(x).for_each(|(c, v)| *c = code(v * inverse));
    }
}

/// What a unit of a query of this squared length is worth.
#[inline(always)]
pub(super) fn unit_of_query(squares: f32) -> f32 {
    // Not less than: NaN is kept.
    (if squares < TINY * TINY { TINY } else { squares.sqrt() }) * (1.0 / QUERY_LENGTH)
}

/// Sums are made in so many lanes.
pub(super) const LANES: usize = 16;

/// The sum of all lanes, in the order of the vectors.
fn sum(x: [f32; LANES]) -> f32 {
    let [a, b, c, d, e, f, g, h] = std::array::from_fn(|l| x[l] + x[l + 8]);
    ((a + e) + (c + g)) + ((b + f) + (d + h))
}

/// The nearest integer, of two equally near ones the even, of what fits 16 bits.
#[inline(always)]
fn code(x: f32) -> i16 {
    (x + ROUND).to_bits().wrapping_sub(ROUND.to_bits()) as i16
}

/// Codes of a position's key, and what a unit of them is worth: NaN where a value is not finite.
pub fn code_key(x: &[f32], codes: &mut [i16]) -> f32 {
    let length = x.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt() as f32;
    code_position(x, (length * (1.0 / KEY_LENGTH)).max(largest(x.iter().copied()) * (1.0 / LARGEST)), codes)
}

/// Codes of a position's value, and what a unit of them is worth: NaN where one is not finite.
pub fn code_value(x: &[f32], codes: &mut [i16]) -> f32 {
    code_position(x, largest(x.iter().copied()) * (1.0 / LARGEST_VALUE), codes)
}

fn code_position(x: &[f32], unit: f32, codes: &mut [i16]) -> f32 {
    let unit = if unit.is_finite() { unit.max(TINY * (1.0 / KEY_LENGTH)) } else { f32::NAN };
    let inverse = 1.0 / unit;
    codes.iter_mut().zip(x).for_each(|(c, v)| *c = code(v * inverse));
    unit
}

/// The largest code of a key of `d` columns of which no more is known: however many are as large, none is too long.
#[inline(always)]
pub(super) fn largest_of_key(d: usize) -> f32 {
    (KEY_LENGTH / (d as f32).sqrt()).min(LARGEST)
}

/// The largest magnitude, or NaN where there is one.
#[inline(always)]
pub(super) fn largest(row: impl Iterator<Item = f32>) -> f32 {
    // Signed integers, which plain x86-64 can compare in vectors.
    f32::from_bits(row.map(|v| (v.to_bits() & 0x7fff_ffff) as i32).fold(0, i32::max) as u32)
}

/// What makes codes of a position's key or value whose largest magnitude this is and whose largest code is to be `code`, and what one
/// of them is worth.
#[inline(always)]
pub(super) fn of_largest(largest: f32, code: f32) -> (f32, f32) {
    let largest = if largest < TINY { TINY } else { largest };
    (code / largest, largest / code)
}

/// What makes 16-bit codes of each position's 8-bit codes of scale 1, given the scales `[d / SHARED, KV_BLOCK]` of a tile of keys.
/// `units` is what becomes of a unit.
#[inline(always)]
pub(super) fn of_keys(scales: &[f32], units: &mut [f32; KV_BLOCK]) -> [f32; KV_BLOCK] {
    let code = largest_of_key(scales.len() / KV_BLOCK * SHARED);
    std::array::from_fn(|p| {
        let inverse;
        (inverse, units[p]) = of_largest(127.0 * largest(scales.iter().skip(p).step_by(KV_BLOCK).copied()), code);
        inverse
    })
}

/// The same for the scales `[KV_BLOCK, d / SHARED]` of a tile of values.
#[inline(always)]
pub(super) fn of_values(scales: &[f32], units: &mut [f32; KV_BLOCK]) -> [f32; KV_BLOCK] {
    let per_position = scales.len() / KV_BLOCK;
    std::array::from_fn(|p| {
        let inverse;
        let scales = scales[p * per_position..][..per_position].iter().copied();
        (inverse, units[p]) = of_largest(127.0 * largest(scales), LARGEST_VALUE);
        inverse
    })
}

pub(super) fn widen_keys(codes: &[i8], scales: &[f32], to: Coded<'_>) {
    let inverse = of_keys(scales, to.scales);
    for (j, (rows, pairs)) in codes.chunks_exact(2 * KV_BLOCK).zip(to.pairs.chunks_exact_mut(KV_BLOCK)).enumerate() {
        let scales = &scales[2 * j / SHARED * KV_BLOCK..];
        for p in 0..KV_BLOCK {
            pairs[p] = [rows[p], rows[KV_BLOCK + p]].map(|c| code(f32::from(c) * (scales[p] * inverse[p])));
        }
    }
}

pub(super) fn widen_values(codes: &[i8], scales: &[f32], to: Coded<'_>) {
    let inverse = of_values(scales, to.scales);
    let d = codes.len() / KV_BLOCK;
    for (j, (rows, pairs)) in codes.chunks_exact(2 * d).zip(to.pairs.chunks_exact_mut(d)).enumerate() {
        for (c, pair) in pairs.iter_mut().enumerate() {
            let at = |i: usize| (2 * j + i) * (d / SHARED) + c / SHARED;
            *pair = [0, 1].map(|i| code(f32::from(rows[i * d + c]) * (scales[at(i)] * inverse[2 * j + i])));
        }
    }
}

pub(super) fn code_weights(weights: &[f32], of_values: &[f32; KV_BLOCK], pairs: &mut [Pair], scales: &mut [f32]) {
    let codes = bytemuck::cast_slice_mut::<Pair, i16>(pairs).as_chunks_mut::<KV_BLOCK>().0;
    for ((weights, codes), scale) in weights.as_chunks::<KV_BLOCK>().0.iter().zip(codes).zip(scales) {
        let mut x = [0f32; KV_BLOCK];
        for p in 0..KV_BLOCK {
            x[p] = if weights[p] == 0.0 { 0.0 } else { weights[p] * of_values[p] };
        }
        let mut sums = [0f32; LANES];
        for chunk in x.as_chunks::<LANES>().0 {
            (0..LANES).for_each(|l| sums[l] += chunk[l]);
        }
        *scale = unit_of_weights(x.iter().copied().fold(0.0, f32::max), sum(sums));
        let inverse = 1.0 / *scale;
        for p in 0..KV_BLOCK {
            codes[p] = code(x[p] * inverse);
        }
    }
}

/// What a unit of a row's weights is worth, given the largest of them and their sum.
#[inline(always)]
pub(super) fn unit_of_weights(largest: f32, sum: f32) -> f32 {
    let unit = (largest * (1.0 / LARGEST)).max(sum * (1.0 / WEIGHTS)).max(TINY * TINY);
    if sum.is_nan() { sum } else { unit }
}

/// Columns `from ..` of [`FloatKernels::score`](super::FloatKernels::score).
#[inline(always)]
pub(super) fn score(mut p: Product<'_>, of_b: &[f32], from: usize) {
    columns(&mut p, from, |c, x, of_a, j| *c = x * (of_a * of_b[j]));
}

/// Columns `from ..` of [`FloatKernels::weigh`](super::FloatKernels::weigh).
#[inline(always)]
pub(super) fn weigh(mut p: Product<'_>, from: usize) {
    columns(&mut p, from, |c, x, of_a, _| *c += x * of_a);
}

/// Columns `from ..` of a product: `put(c, sum, of_a, column)` takes each sum.
#[inline(always)]
fn columns(p: &mut Product<'_>, from: usize, put: impl Fn(&mut f32, f32, f32, usize)) {
    for i in 0..p.m {
        let a = &p.a[i * p.lda..][..p.n_pairs];
        for j in from..p.n {
            let dot = |(k, a): (usize, &Pair)| {
                let b = p.b[k * p.ldb + j];
                // What belongs to no number may overflow.
                (i32::from(a[0]) * i32::from(b[0])).wrapping_add(i32::from(a[1]) * i32::from(b[1]))
            };
            let sum = a.iter().enumerate().map(dot).fold(0, i32::wrapping_add);
            put(&mut p.c[i * p.ldc + j], sum as f32, p.of_a[i], j);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::float::FloatKernels;
    use crate::float::tests::{tables, values};
    use crate::kernels::{Isa, Kernels};

    fn scalar() -> &'static FloatKernels {
        Kernels::for_isa(Isa::Scalar).unwrap().float()
    }

    fn bits(x: &[f32]) -> Vec<u32> {
        x.iter().map(|v| v.to_bits()).collect()
    }

    /// A position's codes as values.
    fn decoded(codes: &[i16], unit: f32) -> Vec<f32> {
        codes.iter().map(|&c| f32::from(c) * unit).collect()
    }

    #[test]
    fn codes_are_within_half_a_unit_and_as_long_as_they_may_be() {
        for d in [2, 30, 64, 128, 1024] {
            let flat = vec![3.7; d];
            let single: Vec<f32> = (0..d).map(|i| if i == 1 { -1e-6 } else { 0.0 }).collect();
            for x in [values(d, 1), flat, single] {
                let mut codes = vec![0; d];
                let unit = code_key(&x, &mut codes);
                let length = codes.iter().map(|&c| f64::from(c).powi(2)).sum::<f64>().sqrt();
                assert!(
                    length * (f64::from(QUERY_LENGTH) + 16.0) < f64::from(i32::MAX),
                    "{d}: a key of length {length}"
                );
                assert!(decoded(&codes, unit).iter().zip(&x).all(|(c, x)| (c - x).abs() <= 0.501 * unit));
                let unit = code_value(&x, &mut codes);
                assert_eq!(codes.iter().map(|c| c.abs()).max(), Some(LARGEST_VALUE as i16));
                assert!(decoded(&codes, unit).iter().zip(&x).all(|(c, x)| (c - x).abs() <= 0.501 * unit));
                let (mut pairs, mut unit) = (vec![[0; 2]; d / 2], [0.0]);
                scalar().code_queries(&x, &mut pairs, &mut unit);
                let codes: &[i16] = bytemuck::cast_slice(&pairs);
                let length = codes.iter().map(|&c| f64::from(c).powi(2)).sum::<f64>().sqrt();
                assert!((length - f64::from(QUERY_LENGTH)).abs() < 16.5, "{d}: a query of length {length}");
                assert!(decoded(codes, unit[0]).iter().zip(&x).all(|(c, x)| (c - x).abs() <= 0.501 * unit[0]));
            }
        }
    }

    #[test]
    fn queries_are_the_same_codes_on_every_isa() {
        for d in [2, 14, 64, 100, 128] {
            let x: Vec<f32> =
                values(3 * d, 7).iter().enumerate().map(|(i, v)| v * 10f32.powi((i / d) as i32)).collect();
            let coded = |f: &FloatKernels| {
                let (mut pairs, mut units) = (vec![[0; 2]; 3 * d / 2], [0.0; 3]);
                f.code_queries(&x, &mut pairs, &mut units);
                (pairs, units.map(f32::to_bits))
            };
            assert!(tables().all(|f| coded(f) == coded(scalar())), "{d} columns");
        }
        let (mut pairs, mut units) = ([[7; 2]; 4], [0.0; 2]);
        for f in tables() {
            f.code_queries(&[0.0, 0.0, 0.0, 0.0, f32::NAN, 1.0, 0.0, 2.0], &mut pairs, &mut units);
            assert!(pairs[..2] == [[0; 2]; 2] && units[0] < 1e-15 && units[1].is_nan());
        }
    }

    /// Rows as long as they may be, whose sums therefore fit.
    #[test]
    fn products_are_exact_sums_on_every_isa() {
        for (m, n, n_pairs) in [(1, 64, 64), (8, 48, 64), (13, 128, 32), (3, 100, 32), (27, 38, 15), (5, 7, 1)] {
            let code = |i: usize, most: f32| (most / ((2 * n_pairs) as f32).sqrt() * ((i % 7) as f32 / 6.0)) as i16;
            let a: Vec<Pair> = (0..m * n_pairs).map(|i| [code(i, QUERY_LENGTH), -code(3 * i, QUERY_LENGTH)]).collect();
            let b: Vec<Pair> = (0..n_pairs * n).map(|i| [code(5 * i, KEY_LENGTH), -code(i + 1, KEY_LENGTH)]).collect();
            let (of_a, of_b, before) = (values(m, 3), values(n, 4), values(m * n, 5));
            let exact = |i: usize, j: usize| -> i64 {
                let dots = |k: usize| [0, 1].map(|h| i64::from(a[i * n_pairs + k][h]) * i64::from(b[k * n + j][h]));
                (0..n_pairs).flat_map(dots).sum()
            };
            for f in tables() {
                let (mut scores, mut sums) = (vec![f32::NAN; m * n], before.clone());
                let product = |c| -> Product<'_> {
                    let ahead = bytemuck::cast_slice(&b);
                    Product { m, n, n_pairs, a: &a, lda: n_pairs, of_a: &of_a, b: &b, ldb: n, c, ldc: n, ahead }
                };
                f.score(product(&mut scores), &of_b);
                f.weigh(product(&mut sums));
                for (at, (score, sum)) in scores.iter().zip(&sums).enumerate() {
                    let (i, j) = (at / n, at % n);
                    let x = i32::try_from(exact(i, j)).unwrap() as f32;
                    assert_eq!(*score, x * (of_a[i] * of_b[j]), "{m} by {n} by {n_pairs}, {i},{j}");
                    assert_eq!(*sum, before[at] + x * of_a[i], "{m} by {n} by {n_pairs}, {i},{j}");
                }
            }
        }
    }

    #[test]
    fn codes_of_eight_bits_become_those_of_sixteen_on_every_isa() {
        for d in [32, 128, 160] {
            let bytes: Vec<i8> = (0..d * KV_BLOCK).map(|i| ((i * 37) % 255) as u8 as i8).collect();
            let bytes: Vec<i8> = bytes.iter().map(|&c| c.max(-127)).collect();
            let scales: Vec<f32> = values(d * KV_BLOCK / SHARED, 9).iter().map(|v| 1e-3 + v.abs()).collect();
            type Widen = fn(&FloatKernels, &[i8], &[f32], Coded<'_>);
            let widened = |f: &FloatKernels, widen: Widen| {
                let (mut pairs, mut units) = (vec![[0; 2]; d / 2 * KV_BLOCK], [0.0; KV_BLOCK]);
                widen(f, &bytes, &scales, Coded { pairs: &mut pairs, scales: &mut units });
                (pairs, units)
            };
            let (keys, units) = widened(scalar(), FloatKernels::widen_keys);
            for at in 0..d * KV_BLOCK {
                let (i, p) = (at / KV_BLOCK, at % KV_BLOCK);
                let (got, unit) = (f32::from(keys[i / 2 * KV_BLOCK + p][i % 2]) * units[p], units[p]);
                let x = f32::from(bytes[at]) * scales[i / SHARED * KV_BLOCK + p];
                assert!((got - x).abs() <= 0.501 * unit, "key {at}: {got} {x}");
            }
            let (values, units) = widened(scalar(), FloatKernels::widen_values);
            for at in 0..d * KV_BLOCK {
                let (p, i) = (at / d, at % d);
                let (got, unit) = (f32::from(values[p / 2 * d + i][p % 2]) * units[p], units[p]);
                let x = f32::from(bytes[at]) * scales[at / SHARED];
                assert!((got - x).abs() <= 0.501 * unit, "value {at}: {got} {x}");
            }
            for f in tables() {
                assert!(
                    widened(f, FloatKernels::widen_keys).0 == keys
                        && widened(f, FloatKernels::widen_values).0 == values
                );
            }
        }
    }

    #[test]
    fn weights_are_within_half_a_unit_and_their_sum_is_bounded() {
        let mut weights = values(5 * KV_BLOCK, 11).iter().map(|v| v.abs()).collect::<Vec<_>>();
        weights[KV_BLOCK..2 * KV_BLOCK].fill(1.0);
        weights[2 * KV_BLOCK..3 * KV_BLOCK].fill(0.0);
        weights[2 * KV_BLOCK + 5] = 1e-3;
        weights[3 * KV_BLOCK..4 * KV_BLOCK].fill(0.0);
        let of_values: [f32; KV_BLOCK] = std::array::from_fn(|p| 1e-4 * (1 + p % 5) as f32);
        let coded = |f: &FloatKernels| {
            let (mut pairs, mut units) = (vec![[0; 2]; 5 * KV_BLOCK / 2], [0.0; 5]);
            f.code_weights(&weights, &of_values, &mut pairs, &mut units);
            (pairs, units)
        };
        let (pairs, units) = coded(scalar());
        for ((weights, codes), unit) in weights.chunks(KV_BLOCK).zip(pairs.chunks(KV_BLOCK / 2)).zip(units) {
            let codes: &[i16] = bytemuck::cast_slice(codes);
            for p in 0..KV_BLOCK {
                let x = weights[p] * of_values[p];
                assert!((f32::from(codes[p]) * unit - x).abs() <= 0.501 * unit, "{p}: {} {x}", codes[p]);
            }
            let sum: i64 = codes.iter().map(|&c| i64::from(c)).sum();
            assert!(codes.iter().all(|c| *c >= 0) && sum * LARGEST_VALUE as i64 <= i64::from(i32::MAX), "{sum}");
        }
        assert_eq!(bytemuck::cast_slice::<_, i16>(&pairs)[2 * KV_BLOCK + 5], LARGEST as i16, "alone it is the largest");
        assert!(pairs[3 * KV_BLOCK / 2..2 * KV_BLOCK].iter().all(|p| *p == [0; 2]), "nothing is no weight");
        assert!(tables().all(|f| coded(f).0 == pairs && bits(&coded(f).1) == bits(&units)));
    }

    #[test]
    fn a_value_that_is_no_number_shows_where_it_has_weight_and_only_there() {
        let mut of_values = [1.0; KV_BLOCK];
        of_values[9] = f32::NAN;
        of_values[10] = f32::INFINITY;
        let mut weights = [0.25; 2 * KV_BLOCK];
        weights[9..11].fill(0.0);
        for f in tables() {
            let (mut pairs, mut units) = ([[0; 2]; KV_BLOCK], [0.0; 2]);
            f.code_weights(&weights, &of_values, &mut pairs, &mut units);
            assert!(units[0] > 0.0 && units[0] < 1.0 && units[1].is_nan(), "{units:?}");
            assert_eq!(pairs[4][1], 0);
            assert_eq!(pairs[5][0], 0);
        }
    }
}
