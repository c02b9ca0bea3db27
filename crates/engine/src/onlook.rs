//! Looking into the steps that answer requests: whoever asks sees its own rows of the step that everybody shares.
//!
//! There is no second pass to look at. A step in which nobody looks on runs with the probe that costs nothing, and looking changes
//! no bit of any answer, its own or another's.

use std::ops::Range;

use apr_core::backend::Result;
use apr_core::batch::Batch;
use apr_core::probe::{StageValue, Watch};
use apr_core::stage::Stage;
use apr_core::stats::RowStats;

use crate::embedding::Mean;
use crate::engine::Engine;
use crate::generate::Request;
use crate::session::{Look, Part, Session, StepError};
use crate::trace::served::{ServedWatch, TraceAskError, Unfinished};

/// The experts that one position went to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Experts {
    /// By layer: ids, the greatest weight first. Empty in a model without experts.
    pub layers: Vec<Vec<u32>>,
}

/// What looks on for one request.
pub(crate) struct Onlooker {
    experts: Option<ExpertsWatch>,
    trace: Option<ServedWatch>,
    /// Of the final norm, where the request asks for an embedding.
    mean: Option<Mean>,
}

impl Onlooker {
    /// The onlooker that a request asks for; `max_tokens` may be decoded.
    ///
    /// # Errors
    /// A trace that cannot be taken.
    pub(crate) fn of(
        engine: &Engine,
        request: &Request,
        max_tokens: usize,
    ) -> std::result::Result<Option<Onlooker>, TraceAskError> {
        let trace = request.trace.as_ref().map(|ask| ServedWatch::new(engine, ask, &request.prompt, max_tokens));
        let (trace, experts) = (trace.transpose()?, request.show_experts.then(ExpertsWatch::default));
        let mean = request.embed.then(Mean::default);
        let is_any = trace.is_some() || experts.is_some() || mean.is_some();
        Ok(is_any.then_some(Onlooker { experts, trace, mean }))
    }

    /// Experts of the `i`-th of the rows that wanted logits in the last step.
    pub(crate) fn experts(&self, i: usize) -> Option<Experts> {
        self.experts.as_ref()?.rows.get(i).cloned()
    }

    /// The last step has been run.
    pub(crate) fn stepped(&mut self) {
        self.trace.iter_mut().for_each(ServedWatch::stepped);
    }

    /// Whether all positions are to be seen.
    pub(crate) fn is_tracing(&self) -> bool {
        self.trace.is_some()
    }

    /// What was traced of these tokens.
    pub(crate) fn take_trace(&mut self, tokens: &[u32]) -> Option<Unfinished> {
        self.trace.take().map(|trace| trace.into_trace(tokens))
    }

    /// The embedding of what has been computed so far.
    pub(crate) fn embedding(&self) -> Option<Vec<f32>> {
        self.mean.as_ref()?.unit()
    }
}

impl Watch for Onlooker {
    fn begin(&mut self, batch: &Batch) {
        self.experts.iter_mut().for_each(|w| w.begin(batch));
        self.trace.iter_mut().for_each(|w| w.begin(batch));
        self.mean.iter_mut().for_each(|w| w.begin(batch));
    }

    fn wants(&self, stage: Stage, layer: usize) -> bool {
        self.experts.as_ref().is_some_and(|w| w.wants(stage, layer))
            || self.trace.as_ref().is_some_and(|w| w.wants(stage, layer))
            || self.mean.as_ref().is_some_and(|w| w.wants(stage, layer))
    }

    fn seen(&mut self, stage: Stage, layer: usize, value: &dyn StageValue) -> Result<()> {
        if let Some(experts) = self.experts.as_mut().filter(|w| w.wants(stage, layer)) {
            experts.seen(stage, layer, value)?;
        }
        if let Some(trace) = self.trace.as_mut().filter(|w| w.wants(stage, layer)) {
            trace.seen(stage, layer, value)?;
        }
        match self.mean.as_mut().filter(|w| w.wants(stage, layer)) {
            Some(mean) => mean.seen(stage, layer, value),
            None => Ok(()),
        }
    }
}

/// Runs a step. Each part's rows, and no others, are shown to its onlooker.
///
/// # Errors
/// As [`Session::step`].
pub(crate) fn step(
    session: &mut dyn Session,
    parts: &mut [Part<'_>],
    onlookers: &mut [Option<&mut Onlooker>],
) -> std::result::Result<(), StepError> {
    assert_eq!(parts.len(), onlookers.len(), "a place for each part's onlooker");
    assert!(parts.iter().all(|p| !p.tokens.is_empty()), "each part is a sequence of the batch");
    if onlookers.iter().all(Option::is_none) {
        return session.step(parts);
    }
    let mut watch = StepWatch { onlookers, batch: Batch::default() };
    session.step_watched(parts, Look { watch: &mut watch, unfused: false, feed: None })
}

/// Shows each onlooker its own rows.
struct StepWatch<'a, 'b> {
    /// By sequence of the batch.
    onlookers: &'a mut [Option<&'b mut Onlooker>],
    batch: Batch,
}

impl Watch for StepWatch<'_, '_> {
    fn begin(&mut self, batch: &Batch) {
        self.batch.clone_from(batch);
        for (s, onlooker) in self.onlookers.iter_mut().enumerate() {
            if let Some(onlooker) = onlooker {
                onlooker.begin(&batch.of_sequence(s as u32));
            }
        }
    }

    fn wants(&self, stage: Stage, layer: usize) -> bool {
        self.onlookers.iter().flatten().any(|o| o.wants(stage, layer))
    }

    fn seen(&mut self, stage: Stage, layer: usize, value: &dyn StageValue) -> Result<()> {
        let n_rows = value.shape().0;
        for (s, onlooker) in self.onlookers.iter_mut().enumerate() {
            let Some(onlooker) = onlooker.as_mut().filter(|o| o.wants(stage, layer)) else { continue };
            let rows = self.batch.rows_of(s as u32, n_rows);
            if !rows.is_empty() {
                onlooker.seen(stage, layer, &Rows::new(value, rows))?;
            }
        }
        Ok(())
    }
}

/// Some rows of a stage's value.
pub(crate) struct Rows<'a> {
    value: &'a dyn StageValue,
    rows: Range<usize>,
}

impl<'a> Rows<'a> {
    pub(crate) fn new(value: &'a dyn StageValue, rows: Range<usize>) -> Rows<'a> {
        Rows { value, rows }
    }

    fn whole(&self, rows: Range<usize>) -> Range<usize> {
        assert!(rows.end <= self.rows.len(), "rows {rows:?} of {}", self.rows.len());
        self.rows.start + rows.start..self.rows.start + rows.end
    }
}

impl StageValue for Rows<'_> {
    fn shape(&self) -> (usize, usize) {
        (self.rows.len(), self.value.shape().1)
    }

    fn read(&self, rows: Range<usize>, out: &mut Vec<f32>) -> Result<()> {
        self.value.read(self.whole(rows), out)
    }

    fn stats(&self, rows: Range<usize>, out: &mut Vec<RowStats>) -> Result<()> {
        self.value.stats(self.whole(rows), out)
    }

    fn read_bytes(&self) -> Option<u64> {
        self.value.read_bytes()
    }
}

/// Notes the experts of the rows that want logits: those that tokens are sampled from.
#[derive(Default)]
struct ExpertsWatch {
    batch: Batch,
    /// One for each row that wants logits.
    rows: Vec<Experts>,
    ids: Vec<f32>,
}

impl Watch for ExpertsWatch {
    fn begin(&mut self, batch: &Batch) {
        self.batch.clone_from(batch);
        self.rows.clear();
        self.rows.resize(batch.kept().len(), Experts::default());
    }

    fn wants(&self, stage: Stage, _: usize) -> bool {
        stage == Stage::MoeRouterIndices && !self.rows.is_empty()
    }

    fn seen(&mut self, _: Stage, _: usize, value: &dyn StageValue) -> Result<()> {
        let (n_rows, k) = value.shape();
        value.read(0..n_rows, &mut self.ids)?;
        let is_whole = n_rows == self.batch.rows().len();
        for (i, (row, &kept)) in self.rows.iter_mut().zip(self.batch.kept()).enumerate() {
            let at = if is_whole { kept as usize } else { i };
            row.layers.push(self.ids[at * k..(at + 1) * k].iter().map(|&id| id as u32).collect());
        }
        Ok(())
    }
}
