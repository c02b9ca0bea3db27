//! What counts as a difference, and the first one.

use std::collections::HashMap;

use apr_core::stage::{Place, Stage};

use super::measure::{Measured, RowDiff};
use super::routing::{Choice, Route};

/// The part of a value's size that float sums in another order may differ by. Sums of thousands of terms in 32-bit floats stay below.
pub(super) const FLOAT_NOISE: f64 = 4e-6;
/// What a free-running pass adds to it per layer.
const FLOAT_NOISE_PER_LAYER: f64 = 2e-6;

/// How two sides are judged.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rule {
    /// They must compute the same bits.
    Bits,
    /// Their difference may be this many times the noise.
    Ratio { threshold: f64 },
}

/// In which comparison something was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Free,
    Isolated,
    /// The two sides' values have other shapes.
    Shape,
    /// The two files' weights differ where this prompt does not reach.
    Weights,
}

impl Mode {
    pub fn name(self) -> &'static str {
        match self {
            Mode::Free => "free",
            Mode::Isolated => "isolated",
            Mode::Shape => "shape",
            Mode::Weights => "weights",
        }
    }
}

/// One place in one comparison, all positions together.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Summary {
    /// Relative root mean square of the difference; infinite where one side only has values that are no numbers.
    pub error: f64,
    /// The same of the noise; 0 where bits are compared.
    pub noise: f64,
    /// Difference over noise: of the worst position in isolated mode, of all positions in free-running mode.
    pub ratio: f64,
    pub max_abs: f32,
    pub worst_position: u32,
    /// Values whose bits differ.
    pub n_differ: usize,
    pub n_bad_a: usize,
    pub n_bad_b: usize,
}

/// A place and position that differ.
#[derive(Clone, Copy, Debug)]
pub struct Culprit {
    pub place: Place,
    pub mode: Mode,
    pub row: RowDiff,
    pub noise: f64,
    pub ratio: f64,
}

/// Measures of a comparison and of the noise in it.
pub struct Judge<'a> {
    pub rule: Rule,
    pub mode: Mode,
    pub measured: &'a Measured,
    pub noise: &'a Measured,
    /// For each position, the layer of the first flip of experts, after which a free-running token is another computation.
    flips: HashMap<u32, usize>,
    /// Layers that come before the last stages.
    n_layer: usize,
}

impl<'a> Judge<'a> {
    /// `routes` are those of the two sides and of the noise.
    pub fn new(rule: Rule, mode: Mode, measured: &'a Measured, noise: &'a Measured, routes: &[&[Route]]) -> Judge<'a> {
        let mut flips = HashMap::new();
        for route in routes.iter().copied().flatten().filter(|r| r.choice == Choice::Flipped) {
            let first = flips.entry(route.position).or_insert(route.layer);
            *first = route.layer.min(*first);
        }
        let n_layer = measured.keys().filter_map(|p| p.layer()).max().map_or(0, |il| il.saturating_add(1));
        Judge { rule, mode, measured, noise, flips, n_layer }
    }

    /// Places where the sides differ by more than the rule allows, each with its first such position, in order of computation.
    pub fn culprits(&self) -> Vec<Culprit> {
        self.measured.iter().filter_map(|(&place, rows)| self.culprit(place, rows)).collect()
    }

    fn culprit(&self, place: Place, rows: &[RowDiff]) -> Option<Culprit> {
        let found = |row: &RowDiff, ratio| Culprit {
            place,
            mode: self.mode,
            row: *row,
            noise: self.noise_at(place, row),
            ratio,
        };
        match (self.rule, self.mode) {
            (Rule::Bits, _) => rows.iter().find(|r| r.n_differ > 0).map(|r| found(r, f64::INFINITY)),
            (Rule::Ratio { threshold }, Mode::Isolated) => rows
                .iter()
                .map(|r| (r, self.ratio(place, r)))
                .find(|(_, ratio)| *ratio > threshold)
                .map(|(r, q)| found(r, q)),
            // Single tokens of a free-running pass go their own ways; all of them together do not.
            (Rule::Ratio { threshold }, _) => {
                let ratio = self.summary(place)?.ratio;
                let judged = rows.iter().filter(|r| self.is_comparable(place, r.position));
                let worst = judged.max_by(|a, b| self.ratio(place, a).total_cmp(&self.ratio(place, b)))?;
                (ratio > threshold && place.stage != Stage::MoeRouterIndices).then(|| found(worst, ratio))
            }
        }
    }

    /// A place over all positions.
    pub fn summary(&self, place: Place) -> Option<Summary> {
        let rows = self.measured.get(&place).filter(|rows| !rows.is_empty())?;
        let (mut square, mut square_a, mut square_noise, mut judged, mut judged_noise) = (0.0, 0.0, 0.0, 0.0, 0.0);
        for r in rows {
            let noise = self.noise_at(place, r).powi(2) * r.n as f64;
            square += r.rms().powi(2) * r.n as f64;
            square_a += r.sum_sq_a;
            square_noise += noise;
            if self.is_comparable(place, r.position) {
                judged += r.rms().powi(2) * r.n as f64;
                judged_noise += noise;
            }
        }
        let worst = rows.iter().max_by(|a, b| self.ratio(place, a).total_cmp(&self.ratio(place, b)))?;
        let ratio =
            if self.mode == Mode::Isolated { self.ratio(place, worst) } else { quotient(judged, judged_noise).sqrt() };
        Some(Summary {
            error: quotient(square, square_a).sqrt(),
            noise: if self.rule == Rule::Bits { 0.0 } else { quotient(square_noise, square_a).sqrt() },
            ratio,
            max_abs: rows.iter().fold(0.0, |m, r| r.max_abs.max(m)),
            worst_position: worst.position,
            n_differ: rows.iter().map(|r| r.n_differ).sum(),
            n_bad_a: rows.iter().map(|r| r.n_bad_a).sum(),
            n_bad_b: rows.iter().map(|r| r.n_bad_b).sum(),
        })
    }

    /// Root mean square of the noise at a position.
    fn noise_at(&self, place: Place, row: &RowDiff) -> f64 {
        if self.rule == Rule::Bits {
            return 0.0;
        }
        let rows = self.noise.get(&place).map_or(&[][..], |rows| rows);
        let found = rows.binary_search_by_key(&row.position, |r| r.position).map(|i| rows[i].rms());
        let layers = if self.mode == Mode::Free { place.layer().unwrap_or(self.n_layer) } else { 0 };
        let floats = FLOAT_NOISE + FLOAT_NOISE_PER_LAYER * layers as f64;
        found.unwrap_or(0.0).hypot(floats * row.rms_a())
    }

    fn ratio(&self, place: Place, row: &RowDiff) -> f64 {
        if place.stage == Stage::MoeRouterIndices {
            // Ids are no quantities: from the same logits they are the same.
            return if row.n_differ > 0 { f64::INFINITY } else { 0.0 };
        }
        quotient(row.rms(), self.noise_at(place, row))
    }

    /// Whether a value of a free-running pass can be held against the other side's.
    fn is_comparable(&self, place: Place, position: u32) -> bool {
        let Some(&flip) = self.flips.get(&position).filter(|_| self.mode == Mode::Free) else { return true };
        place <= Place::new(flip, Stage::MoeRouterIndices)
    }
}

/// `a / b`, where nothing over nothing is nothing.
fn quotient(a: f64, b: f64) -> f64 {
    if a == 0.0 { 0.0 } else { a / b }
}
