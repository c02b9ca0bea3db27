//! Routing: softmax over the router's logits, the largest experts, weights renormalised.

/// Chooses the `ids.len()` largest of `logits` (lower id first on ties), largest first, and their softmax weights renormalised to sum 1.
/// `order` is scratch.
///
/// Softmax is monotonic and its denominator cancels in the renormalisation, so only the chosen logits are exponentiated.
pub fn route_row(logits: &[f32], ids: &mut [u32], weights: &mut [f32], order: &mut Vec<u32>) {
    let k = ids.len();
    let by_weight = |&a: &u32, &b: &u32| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b));
    order.clear();
    order.extend(0..logits.len() as u32);
    if k < order.len() {
        order.select_nth_unstable_by(k - 1, by_weight);
    }
    order[..k].sort_unstable_by(by_weight);
    ids.copy_from_slice(&order[..k]);
    let largest = logits[ids[0] as usize];
    weights.iter_mut().zip(ids.iter()).for_each(|(w, &e)| *w = (logits[e as usize] - largest).exp());
    let sum: f32 = weights.iter().sum();
    weights.iter_mut().for_each(|w| *w /= sum);
    // A router that computes no numbers must not be taken for one that chose.
    if logits.iter().any(|v| v.is_nan()) {
        weights.fill(f32::NAN);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ties_go_to_the_lower_id_and_weights_sum_to_one() {
        let (mut ids, mut weights) = ([0; 3], [0.0; 3]);
        route_row(&[1.0, 3.0, 1.0, 3.0, 1.0], &mut ids, &mut weights, &mut Vec::new());
        assert_eq!(ids, [1, 3, 0]);
        assert!((weights.iter().sum::<f32>() - 1.0).abs() < 1e-6);
        assert_eq!(weights[0], weights[1]);
        assert!((weights[2] / weights[0] - (-2f32).exp()).abs() < 1e-6);
    }

    #[test]
    fn nan_is_not_lost() {
        let (mut ids, mut weights) = ([0; 1], [0.0; 1]);
        route_row(&[0.0, -f32::NAN, 1.0], &mut ids, &mut weights, &mut Vec::new());
        assert!(weights[0].is_nan());
    }

    #[test]
    fn all_experts_may_be_used() {
        let (mut ids, mut weights) = ([0; 2], [0.0; 2]);
        route_row(&[0.0, 1.0], &mut ids, &mut weights, &mut Vec::new());
        assert_eq!(ids, [1, 0]);
    }
}
