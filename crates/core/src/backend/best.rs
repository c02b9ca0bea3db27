//! The best few values of a row: what it takes to choose a token, where nobody wants to see all logits.
//!
//! A value's rank is a whole number, and above it all stands what is no logit at all, so that whoever looks at the best sees it. Columns
//! come in blocks, and the best rank of each block tells which of them are worth a second look.

/// So many of the best a backend is asked for at most.
pub const BEST_MAX: usize = 256;

/// Columns that have one rank in [`Best::tops`].
pub const BEST_BLOCK: usize = 128;

/// The rank of what is not a number or is positive infinity.
const BAD: u32 = u32::MAX;

/// One of the best values of a row. Of two the larger is better, of equals the one with the lower index; what is not a number or is
/// positive infinity is better than any other value, whichever comes first.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Best {
    pub index: u32,
    pub value: f32,
}

impl Best {
    /// The `out.len()` best of a row on the host, best first. There are at least as many columns.
    pub fn of(row: &[f32], out: &mut [Best]) {
        let mut tops = vec![0; row.len().div_ceil(BEST_BLOCK)];
        Best::tops(row, &mut tops);
        Best::among(row, &tops, out);
    }

    /// The best rank of every [`BEST_BLOCK`] columns. Whoever compiles it for an instruction set of its own compiles its loops too.
    #[inline(always)]
    pub fn tops(row: &[f32], tops: &mut [u32]) {
        for (block, top) in row.chunks(BEST_BLOCK).zip(tops) {
            *top = top_of(block);
        }
    }

    /// [`of`](Self::of) a row whose [`tops`](Self::tops) are known.
    pub fn among(row: &[f32], tops: &[u32], out: &mut [Best]) {
        let k = out.len();
        assert!(k <= row.len() && tops.len() == row.len().div_ceil(BEST_BLOCK), "{k} of {} values", row.len());
        if k == 0 {
            return;
        }
        // As many blocks as values are wanted have a value of this rank, so that none below is among the best.
        let mut order = tops.to_vec();
        let floor = if k <= order.len() { *order.select_nth_unstable_by(k - 1, |a, b| b.cmp(a)).1 } else { 0 };
        let mut places = Vec::with_capacity(2 * k);
        for (block, values) in row.chunks(BEST_BLOCK).enumerate().filter(|(block, _)| tops[*block] >= floor) {
            let ranks = values.iter().map(|v| rank_of(*v)).enumerate().filter(|(_, rank)| *rank >= floor);
            places.extend(ranks.map(|(i, rank)| place(rank, block * BEST_BLOCK + i)));
        }
        if places.len() > k {
            places.select_nth_unstable_by(k - 1, |a, b| b.cmp(a));
            places.truncate(k);
        }
        places.sort_unstable_by(|a, b| b.cmp(a));
        for (best, place) in out.iter_mut().zip(places) {
            let index = !(place as u32);
            *best = Best { index, value: row[index as usize] };
        }
    }
}

/// A value's place among all of a row, no two of which are equal; better ones are larger.
fn place(rank: u32, index: usize) -> u64 {
    u64::from(rank) << 32 | u64::from(!(index as u32))
}

/// Floats in their order as whole numbers; both zeros are one.
fn rank_of(v: f32) -> u32 {
    let bits = (if v == 0.0 { 0.0 } else { v }).to_bits();
    match bits >> 31 {
        _ if is_bad(v) => BAD,
        0 => bits | 1 << 31,
        _ => !bits,
    }
}

fn is_bad(v: f32) -> bool {
    v.is_nan() | (v == f32::INFINITY)
}

/// The best rank of some values.
#[inline(always)]
fn top_of(values: &[f32]) -> u32 {
    // Columns side by side, so that they are compared several at a time.
    const SIDE: usize = 16;
    let (mut largest, mut bad) = ([f32::NEG_INFINITY; SIDE], [false; SIDE]);
    let (chunks, rest) = values.as_chunks::<SIDE>();
    for chunk in chunks {
        for i in 0..SIDE {
            largest[i] = if chunk[i] > largest[i] { chunk[i] } else { largest[i] };
            bad[i] |= is_bad(chunk[i]);
        }
    }
    if bad.contains(&true) || rest.iter().any(|v| is_bad(*v)) {
        return BAD;
    }
    rank_of(largest.iter().chain(rest).fold(f32::NEG_INFINITY, |m, v| m.max(*v)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The definition, by a full sort.
    fn plainly(row: &[f32], k: usize) -> Vec<u32> {
        let mut order: Vec<u32> = (0..row.len() as u32).collect();
        order.sort_by(|&a, &b| {
            let (x, y) = (row[a as usize], row[b as usize]);
            is_bad(y).cmp(&is_bad(x)).then_with(|| match is_bad(x) {
                true => std::cmp::Ordering::Equal,
                false => y.partial_cmp(&x).expect("both are numbers"),
            })
        });
        order.truncate(k);
        order
    }

    #[test]
    fn the_best_are_the_first_of_a_stable_sort_behind_what_is_no_logit() {
        let values =
            [-1.0, 3.0, f32::NEG_INFINITY, 3.0, 0.0, -0.0, 7.5, -1e30, f32::MAX, f32::NAN, -f32::NAN, f32::INFINITY];
        let mut random = 1u32;
        let mut next = |n: usize| {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (random >> 16) as usize % n
        };
        for n in (1..70).chain([127, 128, 129, 300, 1000, 1031]) {
            for n_kinds in 1..=values.len() + 1 {
                let mut value =
                    || if n_kinds > values.len() { next(30_000) as f32 - 2e4 } else { values[next(n_kinds)] };
                let row: Vec<f32> = (0..n).map(|_| value()).collect();
                for k in [1, 2, 3, 20, 64, 128, n].into_iter().filter(|k| *k <= n) {
                    let mut got = vec![Best::default(); k];
                    Best::of(&row, &mut got);
                    let indices: Vec<u32> = got.iter().map(|b| b.index).collect();
                    assert_eq!(indices, plainly(&row, k), "{k} of {row:?}");
                    assert!(got.iter().all(|b| b.value.to_bits() == row[b.index as usize].to_bits()));
                }
            }
        }
        Best::of(&[], &mut []);
    }
}
