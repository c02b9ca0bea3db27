//! What is odd about a pass: said only where the numbers bear it out.

use std::fmt::Display;

use apr_core::stage::{Place, Stage};

use super::Traced;
use super::stats::{RouterStats, Stats};

/// The residual's root mean square grows at most so much from layer to layer, or it is said.
const GROWTH_MAX: f64 = 10.0;
/// A mean beyond this is said where it also stands out of the spread.
const MEAN_MAX: f64 = 10.0;
/// A spread below this is that of values that are all the same.
const STD_MIN: f64 = 1e-8;
/// Choices per expert, on average, from which on it means something that one was never chosen.
const CHOICES_MIN: f64 = 20.0;
/// An expert that this share of the tokens chose, and this many times the average, is hot.
const HOT_SHARE: f64 = 0.5;
const HOT_TIMES: f64 = 3.0;
/// Expert ids that are listed.
const IDS_SHOWN: usize = 8;

/// Something odd.
#[derive(Clone, Debug, PartialEq)]
pub struct Anomaly {
    /// `not_finite`, `growth`, `mean`, `constant`, `dead_experts`, `hot_expert`
    pub kind: &'static str,
    pub place: Option<Place>,
    pub position: Option<u32>,
    /// One sentence for people.
    pub text: String,
}

/// What is odd about a pass, the gravest first.
pub fn find(traced: &Traced) -> Vec<Anomaly> {
    let mut out = Vec::new();
    let steps = traced.steps.iter().map(|s| &s.stats);
    // A decode step has the values of the steps before it in its cache: the first that is bad says it all.
    out.extend([&traced.stats].into_iter().chain(steps).find_map(not_finite));
    growth(traced, &mut out);
    moments(&traced.stats, &mut out);
    experts(traced, &mut out);
    out
}

/// Where values stop being finite, in order of computation.
fn not_finite(stats: &Stats) -> Option<Anomaly> {
    let mut bad = stats.stages.iter().filter(|(_, s)| s.first_bad.is_some());
    let (place, first) = bad.next()?;
    let (s, position) = (&first.stats, first.first_bad?);
    let further = match bad.count() {
        0 => "nowhere else".to_string(),
        1 => "in one later stage".to_string(),
        n => format!("in {n} later stages"),
    };
    let text = format!(
        "values that are not finite: first in {place} at position {position} ({} NaN and {} infinite of {}), and {further}",
        s.n_nan, s.n_inf, s.count
    );
    Some(Anomaly { kind: "not_finite", place: Some(*place), position: Some(position), text })
}

/// Layers that make the residual jump.
fn growth(traced: &Traced, out: &mut Vec<Anomaly>) {
    // Others attend to the first token, and training blows it up (Sun et al. 2024, "Massive Activations").
    let first = match traced.positions.contains(&0) {
        true => "; the first position does this in healthy models, look at others with --positions",
        false => "",
    };
    let stats = &traced.stats;
    let rms = |layer| stats.of(layer, Stage::PostFfnResidual).map(|s| s.rms());
    for layer in 1..stats.n_layer() {
        let (Some(before), Some(after)) = (rms(layer - 1), rms(layer)) else { continue };
        let times = after / before;
        if times > GROWTH_MAX && times.is_finite() {
            let text =
                format!("the residual grows {times:.1} times in layer {layer}: RMS {before:.4} to {after:.4}{first}");
            let place = Some(Place::new(layer, Stage::PostFfnResidual));
            out.push(Anomaly { kind: "growth", place, position: None, text });
        }
    }
}

/// Stages whose values are all the same, or far off centre. Scores and choices may be either.
fn moments(stats: &Stats, out: &mut Vec<Anomaly>) {
    use Stage::*;
    let free =
        |s: Stage| matches!(s, AttnScores | AttnSoftmax | MoeRouterLogits | MoeRouter | MoeRouterIndices | LmHead);
    let mut say = |place: &Place, kind, what: String| {
        // One layer shows what is wrong; what follows from it would bury it.
        if !out.iter().any(|a| a.kind == kind) {
            out.push(Anomaly { kind, place: Some(*place), position: None, text: format!("{place} {what}") });
        }
    };
    for (place, s) in stats.stages.iter().filter(|(place, _)| !free(place.stage)) {
        let (mean, std) = (s.stats.mean(), s.stats.std_dev());
        if s.stats.n_finite() > 1 && std < STD_MIN {
            say(place, "constant", format!("holds {mean:e} everywhere: nothing comes through"));
        }
        if mean.abs() > MEAN_MAX && mean.abs() > 3.0 * std {
            say(place, "mean", format!("has a mean of {mean:.2} with a standard deviation of {std:.2}"));
        }
    }
}

/// Experts that no token chose, or nearly every one. The prompt's and the decoded tokens' choices count together.
fn experts(traced: &Traced, out: &mut Vec<Anomaly>) {
    let mut dead: Vec<(usize, Vec<usize>)> = Vec::new();
    let (mut hot, mut n_choices) = (Vec::new(), 0);
    for (&layer, router) in &traced.stats.routers {
        let later = traced.steps.iter().filter_map(|s| s.stats.routers.get(&layer));
        let load = sum(router, later);
        n_choices = load.iter().sum::<u64>();
        let mean = n_choices as f64 / load.len() as f64;
        // Every token chooses an expert at most once.
        let n_token = router_tokens(traced, layer);
        if mean < CHOICES_MIN {
            continue;
        }
        let never: Vec<usize> = (0..load.len()).filter(|&e| load[e] == 0).collect();
        if !never.is_empty() {
            dead.push((layer, never));
        }
        let (most, &n) = load.iter().enumerate().max_by_key(|(_, n)| **n).expect("a router has experts");
        if n as f64 > HOT_SHARE * n_token as f64 && n as f64 > HOT_TIMES * mean {
            hot.push((layer, most, n as f64 / n_token as f64));
        }
    }
    let anomaly = |kind, layer, text| Anomaly {
        kind,
        place: Some(Place::new(layer, Stage::MoeRouterIndices)),
        position: None,
        text,
    };
    if let Some((layer, ids)) = dead.iter().max_by_key(|(layer, ids)| (ids.len(), usize::MAX - layer)) {
        let (n, n_layer) = (dead.iter().map(|d| d.1.len()).sum::<usize>(), dead.len());
        let text = format!(
            "{n} experts in {n_layer} layers were never chosen in {n_choices} choices per layer; most in layer {layer}: {}",
            listed(ids)
        );
        out.push(anomaly("dead_experts", *layer, text));
    }
    if let Some((layer, expert, share)) = hot.iter().copied().max_by(|a, b| a.2.total_cmp(&b.2)) {
        let n = hot.len();
        let text = format!(
            "hot experts in {n} layers: expert {expert} of layer {layer} was chosen by {:.0} % of the tokens",
            100.0 * share
        );
        out.push(anomaly("hot_expert", layer, text));
    }
}

/// Load of a router over several passes.
fn sum<'a>(first: &RouterStats, later: impl Iterator<Item = &'a RouterStats>) -> Vec<u64> {
    let mut load = first.load.clone();
    later.for_each(|r| load.iter_mut().zip(&r.load).for_each(|(sum, n)| *sum += n));
    load
}

/// Tokens that a layer routed.
fn router_tokens(traced: &Traced, layer: usize) -> u64 {
    let routed = |s: &Stats| s.stages.get(&Place::new(layer, Stage::MoeRouterLogits)).map_or(0, |s| s.stats.count);
    let n_expert = traced.stats.routers.get(&layer).map_or(1, |r| r.load.len().max(1)) as u64;
    (routed(&traced.stats) + traced.steps.iter().map(|s| routed(&s.stats)).sum::<u64>()) / n_expert
}

fn listed(ids: &[impl Display]) -> String {
    let shown: Vec<String> = ids.iter().take(IDS_SHOWN).map(|id| id.to_string()).collect();
    format!("{}{}", shown.join(", "), if ids.len() > IDS_SHOWN { ", ..." } else { "" })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use apr_core::stats::RowStats;

    use super::super::Output;
    use super::super::stats::StageStats;
    use super::*;

    fn traced(stages: &[(usize, Stage, &[f32])], routers: &[Vec<u64>]) -> Traced {
        let stage = |(layer, stage, values): &(usize, Stage, &[f32])| {
            let stats = RowStats::of(values);
            let first_bad = (stats.n_finite() < stats.count).then_some(3);
            (Place::new(*layer, *stage), StageStats { stats, first_bad })
        };
        let router = |load: &Vec<u64>| RouterStats { load: load.clone(), margin: Vec::new() };
        let stats = Stats {
            stages: stages.iter().map(stage).collect(),
            routers: routers.iter().map(router).enumerate().collect::<BTreeMap<_, _>>(),
            ..Stats::default()
        };
        let output = Output { position: 0, stats: RowStats::EMPTY, entropy: 0.0, best: Vec::new() };
        Traced { stats, positions: 3..4, output, steps: Vec::new(), lens: Vec::new(), saved: None }
    }

    fn kinds(t: &Traced) -> Vec<&'static str> {
        find(t).iter().map(|a| a.kind).collect()
    }

    #[test]
    fn the_first_value_that_is_not_finite_is_named() {
        let t = traced(
            &[
                (1, Stage::LmHead, &[f32::NAN, 1.0]),
                (1, Stage::MoeFfnOut, &[f32::INFINITY, 1.0, 2.0]),
                (1, Stage::AttnOut, &[0.5, 1.0]),
            ],
            &[],
        );
        let found = find(&t);
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].place, found[0].position), (Some(Place::new(1, Stage::MoeFfnOut)), Some(3)));
        for word in ["blk.1.moe_ffn_out", "position 3", "1 infinite of 3", "one later stage"] {
            assert!(found[0].text.contains(word), "{word}: {}", found[0].text);
        }
    }

    #[test]
    fn growth_constants_and_means_are_said_and_healthy_values_are_not() {
        fn residual(layer: usize, values: &[f32]) -> (usize, Stage, &[f32]) {
            (layer, Stage::PostFfnResidual, values)
        }
        assert_eq!(kinds(&traced(&[residual(0, &[1.0, -1.0]), residual(1, &[9.0, -9.0])], &[])), [""; 0]);
        let grown = traced(&[residual(0, &[1.0, -1.0]), residual(1, &[11.0, -11.0])], &[]);
        assert_eq!(kinds(&grown), ["growth"]);
        assert!(find(&grown)[0].text.contains("11.0 times in layer 1"));
        assert_eq!(kinds(&traced(&[(0, Stage::AttnOut, &[0.0, 0.0])], &[])), ["constant"]);
        assert_eq!(kinds(&traced(&[(0, Stage::AttnOut, &[20.0, 21.0])], &[])), ["mean"]);
        assert_eq!(kinds(&traced(&[(0, Stage::LmHead, &[20.0, 21.0])], &[])), [""; 0]);
    }

    #[test]
    fn experts_are_judged_by_enough_tokens_only() {
        let logits = |n_token: usize| vec![0.1f32; n_token * 8];
        let of =
            |n_token: usize, load: Vec<u64>| kinds(&traced(&[(0, Stage::MoeRouterLogits, &logits(n_token))], &[load]));
        assert_eq!(of(8, vec![8, 0, 2, 2, 1, 1, 1, 1]), [""; 0], "two choices per expert say nothing");
        assert_eq!(of(160, vec![40, 0, 40, 40, 40, 40, 60, 60]), ["dead_experts"]);
        assert_eq!(of(160, vec![160, 20, 20, 20, 20, 20, 30, 30]), ["hot_expert"]);
        assert_eq!(of(160, vec![40; 8]), [""; 0]);
    }
}
