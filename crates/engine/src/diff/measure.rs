//! How far two passes are apart, place by place and position by position.
//!
//! Pass A lies on disk; the stages of pass B are held against it as they are computed, or as they are read from another trace. Values
//! are compared by their bits and by their error; what is not a number on one side only is never left out. Where the two passes chose
//! experts in another order, experts are compared by id.

use std::collections::BTreeMap;

use apr_core::backend::Result;
use apr_core::batch::Batch;
use apr_core::probe::{StageValue, Watch};
use apr_core::stage::{Place, Stage};

use super::end::{EndMetrics, EndSum};
use super::routing::{Route, slot_map};
use super::tape::{Sample, Tape};
use crate::trace::file::SavedTrace;

/// The difference of one place at one position.
#[derive(Clone, Copy, Debug)]
pub struct RowDiff {
    pub position: u32,
    /// Values compared.
    pub n: usize,
    /// Sum of squares of the differences of finite values.
    pub sum_sq: f64,
    /// Sum of squares of A's finite values.
    pub sum_sq_a: f64,
    pub max_abs: f32,
    /// Values whose bits differ; two NaNs count as equal.
    pub n_differ: usize,
    /// The first column whose bits differ.
    pub first: usize,
    /// The column with the largest difference; one that is finite on one side only is the largest.
    pub worst: usize,
    /// Values that are NaN or infinite.
    pub n_bad_a: usize,
    pub n_bad_b: usize,
    /// Whether a value is finite on one side only, or infinite with another sign.
    pub is_bad: bool,
}

/// Differences by place, positions ascending.
pub type Measured = BTreeMap<Place, Vec<RowDiff>>;

/// A place whose values have another shape on the other side.
#[derive(Clone, Debug, PartialEq)]
pub struct ShapeDiff {
    pub place: Place,
    pub a: Vec<usize>,
    pub b: Vec<usize>,
}

/// Holds a pass B against a pass A on disk.
pub struct Comparison<'a> {
    a: &'a dyn Tape,
    /// All tokens of the pass.
    tokens: &'a [u32],
    /// What is compared, where it is not everything.
    sample: Option<&'a Sample>,
    /// Whether the passes route on their own; otherwise B is fed with A's routing.
    free: bool,
    batch: Batch,
    pub measured: Measured,
    pub shapes: Vec<ShapeDiff>,
    pub routes: Vec<Route>,
    /// For each position of the current layer, where B keeps each of A's experts.
    slots: BTreeMap<u32, Vec<Option<usize>>>,
    /// Router weights that wait for the ids they belong to.
    weights: Vec<(u32, Vec<f32>)>,
    end: EndSum,
    row: Vec<f32>,
}

impl RowDiff {
    fn new(position: u32) -> RowDiff {
        RowDiff {
            position,
            n: 0,
            sum_sq: 0.0,
            sum_sq_a: 0.0,
            max_abs: 0.0,
            n_differ: 0,
            first: usize::MAX,
            worst: 0,
            n_bad_a: 0,
            n_bad_b: 0,
            is_bad: false,
        }
    }

    /// Takes in values of columns from `at` on.
    fn add(&mut self, at: usize, a: &[f32], b: &[f32]) {
        self.n += a.len();
        for (i, (&a, &b)) in a.iter().zip(b).enumerate() {
            let same = a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan());
            if !same {
                self.n_differ += 1;
                self.first = self.first.min(at + i);
            }
            self.n_bad_a += usize::from(!a.is_finite());
            self.n_bad_b += usize::from(!b.is_finite());
            if a.is_finite() && b.is_finite() {
                let d = f64::from(a) - f64::from(b);
                self.sum_sq += d * d;
                self.sum_sq_a += f64::from(a) * f64::from(a);
                if !self.is_bad && d.abs() as f32 > self.max_abs {
                    (self.max_abs, self.worst) = (d.abs() as f32, at + i);
                }
            } else if !same && !self.is_bad {
                (self.is_bad, self.worst) = (true, at + i);
            }
        }
    }

    /// The difference of two rows of one length.
    pub fn of(position: u32, a: &[f32], b: &[f32]) -> RowDiff {
        let mut d = RowDiff::new(position);
        d.add(0, a, b);
        d
    }

    /// Root mean square of the difference; infinite where one side only is no number.
    pub fn rms(&self) -> f64 {
        if self.is_bad { f64::INFINITY } else { (self.sum_sq / self.n.max(1) as f64).sqrt() }
    }

    /// Root mean square of A's values.
    pub fn rms_a(&self) -> f64 {
        (self.sum_sq_a / self.n.max(1) as f64).sqrt()
    }
}

impl<'a> Comparison<'a> {
    /// A comparison with `a`, a pass of `tokens`. `free` says that B routes on its own.
    pub fn new(a: &'a dyn Tape, tokens: &'a [u32], free: bool) -> Comparison<'a> {
        Comparison {
            a,
            tokens,
            sample: None,
            free,
            batch: Batch::default(),
            measured: Measured::new(),
            shapes: Vec::new(),
            routes: Vec::new(),
            slots: BTreeMap::new(),
            weights: Vec::new(),
            end: EndSum::default(),
            row: Vec::new(),
        }
    }

    /// A comparison of a sample of a pass with a pass fed with it.
    pub fn sampled(a: &'a dyn Tape, tokens: &'a [u32], sample: &'a Sample) -> Comparison<'a> {
        Comparison { sample: Some(sample), ..Comparison::new(a, tokens, false) }
    }

    /// How far the two sides' next tokens are apart, where both have logits.
    pub fn end(&self) -> Option<EndMetrics> {
        self.end.metrics()
    }

    /// Takes in another trace's values of a place.
    pub fn trace(&mut self, b: &SavedTrace) {
        for place in b.places() {
            let (Some(shape_a), Some(shape_b)) = (self.a.shape(place), b.shape(place)) else { continue };
            if shape_a != shape_b {
                self.shapes.push(ShapeDiff { place, a: shape_a.to_vec(), b: shape_b.to_vec() });
                continue;
            }
            let mut row = Vec::new();
            for &position in &b.header.positions {
                if b.read(place, position, &mut row) {
                    self.value(place, position, &row);
                }
            }
            self.place_done(place);
        }
    }

    /// Takes in B's value of a place at a position.
    fn value(&mut self, place: Place, position: u32, b: &[f32]) {
        if self.sample.is_some_and(|s| !s.has(place, position)) {
            return;
        }
        let mut a = std::mem::take(&mut self.row);
        if self.a.read(place, position, &mut a) {
            match place.stage {
                Stage::MoeRouter if self.free => self.weights.push((position, b.to_vec())),
                Stage::MoeRouterIndices => self.ids(place, position, &a, b),
                _ => self.compare(place, position, &a, b),
            }
            if place.stage == Stage::LmHead {
                let next = self.tokens.get(position as usize + 1).copied();
                self.end.add(&a, b, next);
            }
        }
        self.row = a;
    }

    fn compare(&mut self, place: Place, position: u32, a: &[f32], b: &[f32]) {
        use Stage::*;
        let by_slot = matches!(place.stage, MoeRouter | MoeExpertGate | MoeExpertUp | MoeExpertSwigl | MoeExpertOut);
        let diff = match self.slots.get(&position).filter(|_| by_slot && self.free) {
            None => RowDiff::of(position, a, b),
            Some(slots) => {
                let n = a.len() / slots.len();
                let mut diff = RowDiff::new(position);
                for (s, partner) in slots.iter().enumerate() {
                    if let Some(p) = partner {
                        diff.add(s * n, &a[s * n..(s + 1) * n], &b[p * n..(p + 1) * n]);
                    }
                }
                diff
            }
        };
        if diff.n > 0 {
            self.measured.entry(place).or_default().push(diff);
        }
    }

    fn ids(&mut self, place: Place, position: u32, a: &[f32], b: &[f32]) {
        let (layer, mut logits) = (place.layer().expect("experts belong to a layer"), Vec::new());
        self.a.read(Place::new(layer, Stage::MoeRouterLogits), position, &mut logits);
        let mut diff = RowDiff::of(position, a, b);
        if self.free {
            self.slots.insert(position, slot_map(a, b));
            self.routes.push(Route::new(layer, position, a, b, &logits));
        } else if diff.n_differ > 0 && a.iter().zip(b).all(|(&a, &b)| is_tie(&logits, a, b)) {
            diff = RowDiff::of(position, a, a);
        }
        self.measured.entry(place).or_default().push(diff);
    }

    /// All rows of a place that there are have been taken in.
    fn place_done(&mut self, place: Place) {
        let layer = place.layer().unwrap_or_default();
        if place.stage == Stage::MoeRouterIndices {
            let router = Place::new(layer, Stage::MoeRouter);
            for (position, b) in std::mem::take(&mut self.weights) {
                let mut a = Vec::new();
                self.a.read(router, position, &mut a);
                self.compare(router, position, &a, &b);
            }
        }
        if place.stage == Stage::PostFfnResidual {
            self.slots.clear();
            self.weights.clear();
        }
    }
}

/// Whether two experts' logits are one number but for the rounding of a softmax in 32-bit floats.
pub(super) fn is_tie(logits: &[f32], a: f32, b: f32) -> bool {
    match (logits.get(a as usize), logits.get(b as usize)) {
        (Some(x), Some(y)) => a == b || (x - y).abs() <= 1e-6 * x.abs().max(1.0),
        _ => a == b,
    }
}

impl Watch for Comparison<'_> {
    fn begin(&mut self, batch: &Batch) {
        self.batch.clone_from(batch);
    }

    fn wants(&self, stage: Stage, layer: usize) -> bool {
        self.a.shape(Place::new(layer, stage)).is_some()
    }

    fn seen(&mut self, stage: Stage, layer: usize, value: &dyn StageValue) -> Result<()> {
        let place = Place::new(layer, stage);
        let (n_rows, n_cols) = value.shape();
        let shape = self.a.shape(place).unwrap_or_default();
        if shape.iter().product::<usize>() != n_cols {
            let found = ShapeDiff { place, a: shape.to_vec(), b: vec![n_cols] };
            if !self.shapes.contains(&found) {
                self.shapes.push(found);
            }
            return Ok(());
        }
        let (positions, mut values) = (self.batch.positions_of(n_rows).collect::<Vec<_>>(), Vec::new());
        for (i, position) in positions.into_iter().enumerate() {
            value.read(i..i + 1, &mut values)?;
            self.value(place, position, &values);
        }
        self.place_done(place);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_compared_by_bits_and_by_error() {
        let d = RowDiff::of(3, &[1.0, 2.0, -0.0, f32::NAN], &[1.0, 2.5, 0.0, f32::NAN]);
        assert_eq!((d.position, d.n, d.n_differ, d.first, d.worst, d.is_bad), (3, 4, 2, 1, 1, false));
        assert_eq!((d.max_abs, d.sum_sq, d.n_bad_a, d.n_bad_b), (0.5, 0.25, 1, 1));
    }

    #[test]
    fn what_is_a_number_on_one_side_only_is_infinitely_wrong() {
        for (a, b) in [(1.0, f32::NAN), (f32::INFINITY, f32::NEG_INFINITY), (f32::INFINITY, 1.0)] {
            let d = RowDiff::of(0, &[5.0, a, 0.0], &[1.0, b, 9.0]);
            assert!(d.is_bad && d.rms().is_infinite());
            assert_eq!(d.worst, 1);
        }
        assert!(!RowDiff::of(0, &[f32::INFINITY], &[f32::INFINITY]).is_bad);
    }
}
