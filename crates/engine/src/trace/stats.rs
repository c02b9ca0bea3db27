//! A watch that accounts for a pass: statistics of every stage, what each took, where the experts' load went, how the residual moved.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::{Duration, Instant};

use apr_core::backend::Result;
use apr_core::backend::unfused::INTERIOR;
use apr_core::batch::Batch;
use apr_core::probe::{StageValue, Watch};
use apr_core::stage::{Place, Stage};
use apr_core::stats::RowStats;

/// What to account for.
#[derive(Clone, Debug, Default)]
pub struct StatsPlan {
    /// The positions whose values count.
    pub positions: Range<u32>,
    /// Positions among them, ascending, whose residual is followed through the layers.
    pub followed: Vec<u32>,
    /// Whether fused ops run in their plain form, stage by stage.
    pub unfused: bool,
}

/// A stage of one layer over the positions that count.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StageStats {
    pub stats: RowStats,
    /// The first position with a value that is not finite.
    pub first_bad: Option<u32>,
}

/// What it took to compute a stage, at all positions.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    pub time: Duration,
    /// Bytes of weights, keys and values, where the device counts them.
    pub bytes: Option<u64>,
}

/// How the router of one layer chose.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RouterStats {
    /// How often each expert was chosen.
    pub load: Vec<u64>,
    /// Per position: probability of the last expert chosen, less that of the first one left out. Empty where all are chosen.
    pub margin: Vec<f32>,
}

/// The residual stream after one layer, at the followed positions.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Followed {
    pub positions: Vec<u32>,
    /// Root mean square at each position.
    pub rms: Vec<f32>,
    /// Cosine with the residual before the layer, at each position.
    pub cosine: Vec<f32>,
    /// The residual itself at the last position, `[n_embd]`.
    pub last: Vec<f32>,
}

/// The account of a pass.
#[derive(Clone, Debug, Default)]
pub struct Stats {
    pub stages: BTreeMap<Place, StageStats>,
    /// Of what the device computes in one go, the sum stands at the last of its stages.
    pub costs: BTreeMap<Place, Cost>,
    /// By layer; empty without experts.
    pub routers: BTreeMap<usize, RouterStats>,
    /// By layer.
    pub followed: BTreeMap<usize, Followed>,
}

/// Accounts for a pass while it runs.
pub struct StatsWatch<'a> {
    plan: StatsPlan,
    pub stats: Stats,
    batch: Batch,
    /// Another watch of the same pass, whose time is not the pass's either.
    beside: Option<&'a mut dyn Watch>,
    /// When the pass went on, and what had been read by then.
    resumed: Instant,
    read_bytes: Option<u64>,
    /// Logits of the layer's router at the positions that count, until its choice is known.
    router_logits: Vec<f32>,
    /// Residual before the layer: followed positions, values `[n, n_embd]`.
    before: (Vec<u32>, Vec<f32>),
    rows: Vec<RowStats>,
    values: Vec<f32>,
}

impl Stats {
    /// Statistics of a stage; global ones are in layer 0 as well as anywhere.
    pub fn of(&self, layer: usize, stage: Stage) -> Option<&RowStats> {
        self.stages.get(&Place::new(layer, stage)).map(|s| &s.stats)
    }

    /// Number of layers that were seen.
    pub fn n_layer(&self) -> usize {
        self.stages.keys().filter_map(|p| p.layer()).max().map_or(0, |last| last + 1)
    }

    /// What every stage took, summed over the layers, in order of computation.
    pub fn cost_by_stage(&self) -> BTreeMap<Stage, Cost> {
        self.summed(|place| Some(place.stage))
    }

    /// What every layer took.
    pub fn cost_by_layer(&self) -> BTreeMap<usize, Cost> {
        self.summed(Place::layer)
    }

    /// What the pass took, without looking on.
    pub fn total(&self) -> Cost {
        self.summed(|_| Some(())).remove(&()).unwrap_or_default()
    }

    fn summed<K: Ord>(&self, key: impl Fn(Place) -> Option<K>) -> BTreeMap<K, Cost> {
        let mut out: BTreeMap<K, Cost> = BTreeMap::new();
        for (place, cost) in &self.costs {
            if let Some(key) = key(*place) {
                out.entry(key).or_default().add(*cost);
            }
        }
        out
    }
}

impl Cost {
    fn add(&mut self, other: Cost) {
        self.time += other.time;
        self.bytes = self.bytes.zip(other.bytes).map(|(a, b)| a + b).or(self.bytes).or(other.bytes);
    }
}

impl<'a> StatsWatch<'a> {
    /// Watches a pass of a session that has read `read_bytes` so far. `beside` sees what it wants of the same pass.
    pub fn new(plan: StatsPlan, read_bytes: Option<u64>, beside: Option<&'a mut dyn Watch>) -> StatsWatch<'a> {
        StatsWatch {
            plan,
            stats: Stats::default(),
            batch: Batch::default(),
            beside,
            resumed: Instant::now(),
            read_bytes,
            router_logits: Vec::new(),
            before: Default::default(),
            rows: Vec::new(),
            values: Vec::new(),
        }
    }

    /// Books what has passed since the pass went on.
    fn charge(&mut self, stage: Stage, layer: usize, read_bytes: Option<u64>) {
        let time = self.resumed.elapsed();
        let bytes = read_bytes.zip(self.read_bytes).map(|(now, before)| now - before);
        self.read_bytes = read_bytes;
        // What a fused op shows comes after all of it has been computed, or in the middle: its parts have no time of their own.
        let stage = match stage {
            s if self.plan.unfused || !INTERIOR.contains(&s) => s,
            Stage::FfnGate | Stage::FfnUp | Stage::FfnSilu | Stage::FfnSwigl => Stage::FfnOut,
            _ => Stage::MoeFfnOut,
        };
        self.stats.costs.entry(Place::new(layer, stage)).or_default().add(Cost { time, bytes });
    }

    /// The rows of this step, of `n_rows`, that count, and their positions.
    fn counted(&self, n_rows: usize) -> (Range<usize>, Vec<u32>) {
        let positions: Vec<u32> = self.batch.positions_of(n_rows).collect();
        let from = positions.partition_point(|p| *p < self.plan.positions.start);
        let to = positions.partition_point(|p| *p < self.plan.positions.end).max(from);
        (from..to, positions[from..to].to_vec())
    }

    fn account(&mut self, stage: Stage, layer: usize, value: &dyn StageValue) -> Result<()> {
        let (rows, positions) = self.counted(value.shape().0);
        if rows.is_empty() {
            return Ok(());
        }
        value.stats(rows.clone(), &mut self.rows)?;
        let nothing = StageStats { stats: RowStats::EMPTY, first_bad: None };
        let all = self.stats.stages.entry(Place::new(layer, stage)).or_insert(nothing);
        for (row, position) in self.rows.iter().zip(&positions) {
            all.stats.merge(row);
            if row.n_finite() < row.count {
                all.first_bad.get_or_insert(*position);
            }
        }
        match stage {
            Stage::MoeRouterLogits => value.read(rows, &mut self.router_logits)?,
            Stage::MoeRouterIndices => self.route(layer, rows, value)?,
            Stage::Embedding => self.follow(None, rows, &positions, value)?,
            Stage::PostFfnResidual => self.follow(Some(layer), rows, &positions, value)?,
            _ => {}
        }
        Ok(())
    }

    /// Counts the experts chosen, and by how much. The logits were seen just before.
    fn route(&mut self, layer: usize, rows: Range<usize>, ids: &dyn StageValue) -> Result<()> {
        let k = ids.shape().1;
        let n_expert = self.router_logits.len() / rows.len();
        ids.read(rows, &mut self.values)?;
        let router = self.stats.routers.entry(layer).or_default();
        router.load.resize(n_expert, 0);
        self.values.iter().for_each(|id| router.load[*id as usize] += 1);
        if k < n_expert {
            router.margin.extend(self.router_logits.chunks_exact(n_expert).map(|row| margin(row, k)));
        }
        Ok(())
    }

    /// Follows the residual from before a layer, or from the embedding, to after it.
    fn follow(
        &mut self,
        layer: Option<usize>,
        rows: Range<usize>,
        positions: &[u32],
        value: &dyn StageValue,
    ) -> Result<()> {
        let n = value.shape().1;
        let (mut found, mut now) = (Vec::new(), Vec::new());
        for (row, position) in rows.zip(positions) {
            if self.plan.followed.binary_search(position).is_err() {
                continue;
            }
            value.read(row..row + 1, &mut self.values)?;
            if let Some(layer) = layer {
                let f = self.stats.followed.entry(layer).or_default();
                let (was_at, was) = &self.before;
                let before = was_at.binary_search(position).map(|i| &was[i * n..(i + 1) * n]);
                f.positions.push(*position);
                f.rms.push(RowStats::of(&self.values).rms() as f32);
                f.cosine.push(before.map_or(f32::NAN, |before| cosine(before, &self.values)));
                f.last.clone_from(&self.values);
            }
            found.push(*position);
            now.extend_from_slice(&self.values);
        }
        self.before = (found, now);
        Ok(())
    }
}

impl Watch for StatsWatch<'_> {
    fn begin(&mut self, batch: &Batch) {
        self.batch.clone_from(batch);
        if let Some(beside) = &mut self.beside {
            beside.begin(batch);
        }
        self.resumed = Instant::now();
    }

    fn wants(&self, stage: Stage, layer: usize) -> bool {
        // Scores of attention grow with the square of the prompt: they are for who asks.
        let costly = matches!(stage, Stage::AttnScores | Stage::AttnSoftmax);
        !costly || self.beside.as_ref().is_some_and(|w| w.wants(stage, layer))
    }

    fn seen(&mut self, stage: Stage, layer: usize, value: &dyn StageValue) -> Result<()> {
        self.charge(stage, layer, value.read_bytes());
        self.account(stage, layer, value)?;
        if let Some(beside) = self.beside.as_mut().filter(|w| w.wants(stage, layer)) {
            beside.seen(stage, layer, value)?;
        }
        self.resumed = Instant::now();
        Ok(())
    }
}

/// Softmax probability of rank `k` less that of rank `k + 1`; NaN where a logit is no number.
fn margin(logits: &[f32], k: usize) -> f32 {
    if logits.iter().any(|v| v.is_nan()) {
        return f32::NAN;
    }
    let mut order = logits.to_vec();
    order.sort_unstable_by(|a, b| b.total_cmp(a));
    let p = |v: f32| f64::from(v - order[0]).exp();
    let total: f64 = order.iter().map(|&v| p(v)).sum();
    ((p(order[k - 1]) - p(order[k])) / total) as f32
}

fn cosine(a: &[f32], b: &[f32]) -> f32 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    (dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn margins_are_of_probabilities() {
        let logits = [0.1f32, 0.4, 0.2, 0.3].map(f32::ln);
        assert!((margin(&logits, 2) - 0.1).abs() < 1e-6);
        assert!((margin(&logits, 1) - 0.1).abs() < 1e-6);
        assert!((margin(&logits, 3) - 0.1).abs() < 1e-6);
        assert_eq!(margin(&[1.0, 1.0], 1), 0.0);
        assert!(margin(&[1.0, f32::NAN], 1).is_nan());
    }

    #[test]
    fn costs_add_up_where_they_are_counted() {
        let mut sum = Cost::default();
        sum.add(Cost { time: Duration::from_secs(1), bytes: None });
        sum.add(Cost { time: Duration::from_secs(2), bytes: Some(5) });
        sum.add(Cost { time: Duration::ZERO, bytes: Some(6) });
        assert_eq!(sum, Cost { time: Duration::from_secs(3), bytes: Some(11) });
    }
}
