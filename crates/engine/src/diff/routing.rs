//! Choices of experts on two sides: the same, in another order, or other experts; and whether a flip is a near-tie.

use apr_core::stage::{Place, Stage};

use super::measure::Measured;

/// What two passes chose for one token in one layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Route {
    pub layer: usize,
    pub position: u32,
    pub choice: Choice,
    /// Experts that only one side chose.
    pub only_a: Vec<u32>,
    pub only_b: Vec<u32>,
    /// How far A's last chosen expert is from the first that was not chosen, in logits. NaN where the logits are not known.
    pub margin: f64,
}

/// How two choices compare.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    Equal,
    /// The same experts in another order.
    Permuted,
    /// Other experts.
    Flipped,
}

impl Route {
    /// Ids are given as floats, largest weight first; `logits` are A's.
    pub fn new(layer: usize, position: u32, a: &[f32], b: &[f32], logits: &[f32]) -> Route {
        let without = |x: &[f32], y: &[f32]| x.iter().filter(|id| !y.contains(id)).map(|&id| id as u32).collect();
        let (only_a, only_b): (Vec<u32>, Vec<u32>) = (without(a, b), without(b, a));
        let choice = match only_a.is_empty() && only_b.is_empty() {
            true if a == b => Choice::Equal,
            true => Choice::Permuted,
            false => Choice::Flipped,
        };
        Route { layer, position, choice, only_a, only_b, margin: margin(logits, a.len()) }
    }
}

/// The distance of the `k`-th largest logit from the next.
fn margin(logits: &[f32], k: usize) -> f64 {
    let mut sorted = logits.to_vec();
    sorted.sort_by(|a, b| b.total_cmp(a));
    match (sorted.get(k.wrapping_sub(1)), sorted.get(k)) {
        (Some(last), Some(next)) => f64::from(*last) - f64::from(*next),
        _ => f64::NAN,
    }
}

/// For each of A's slots, the slot of B with the same expert.
pub fn slot_map(a: &[f32], b: &[f32]) -> Vec<Option<usize>> {
    a.iter().map(|id| b.iter().position(|other| other == id)).collect()
}

/// Root mean square of what noise does to the router's logits of a token.
pub fn logit_noise(noise: &Measured, layer: usize, position: u32) -> Option<f64> {
    let rows = noise.get(&Place::new(layer, Stage::MoeRouterLogits))?;
    let i = rows.binary_search_by_key(&position, |r| r.position).ok()?;
    Some(rows[i].rms())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_are_told_apart() {
        let route = |b: &[f32]| Route::new(2, 9, &[3.0, 1.0], b, &[0.0, 2.0, 1.5, 4.0]);
        assert_eq!(route(&[3.0, 1.0]).choice, Choice::Equal);
        assert_eq!(route(&[1.0, 3.0]).choice, Choice::Permuted);
        let flipped = route(&[3.0, 2.0]);
        assert_eq!((flipped.choice, flipped.only_a, flipped.only_b), (Choice::Flipped, vec![1], vec![2]));
        assert_eq!(flipped.margin, 0.5);
        assert_eq!(slot_map(&[3.0, 1.0], &[1.0, 2.0]), [None, Some(0)]);
    }
}
