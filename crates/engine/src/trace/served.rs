//! The trace of a request that is served, taken of the very steps that serve it, whoever else is in them.
//!
//! What it accounts for and what it saves is what [`trace`](super::trace()) would of the same tokens alone, bit for bit. A disk that
//! fails ends the trace, not the answer.

use std::path::PathBuf;

use apr_core::backend::{BackendError, Result};
use apr_core::batch::Batch;
use apr_core::models::{self, stage_shape};
use apr_core::probe::{StageValue, Watch};
use apr_core::stage::{Place, Stage};

use super::file::{TraceFileError, TraceHeader, TraceWriter};
use super::header_of;
use super::save::SaveWatch;
use super::stats::{Stats, StatsPlan, StatsWatch};
use crate::engine::Engine;
use crate::onlook::Rows;

/// What a request asks to have traced: statistics, and values of stages where they are to be saved.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TraceAsk {
    pub save: Option<SaveAsk>,
}

/// What to save, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SaveAsk {
    /// A file that is not there yet.
    pub path: PathBuf,
    /// By default all that the device shows, without the scores of attention, which grow with the square of the tokens.
    pub stages: Option<Vec<Stage>>,
    /// Bytes that the values may take, all tokens that are asked for being decoded.
    pub max_bytes: u64,
}

/// What was seen of an answer.
#[derive(Clone, Debug)]
pub struct ServedTrace {
    /// Of all positions that were computed, from 0 on.
    pub stats: Stats,
    /// Tokens, positions and what computed them.
    pub header: TraceHeader,
    /// Where the values are, if they were to be saved, or why they are not.
    pub saved: Option<std::result::Result<PathBuf, String>>,
}

/// Why a request cannot be traced as it asks.
#[derive(Clone, Debug, thiserror::Error)]
pub enum TraceAskError {
    #[error("this {arch} model has no stage '{name}'; it has: {}", .has.join(", "))]
    NoStage { name: &'static str, arch: String, has: Vec<&'static str> },
    #[error("the device {device} does not show stage '{name}' of a pass as it is served")]
    NotShown { name: &'static str, device: String },
    #[error(
        "the trace of {n_positions} positions would take {bytes} bytes; at most {max_bytes} are allowed: ask for fewer tokens, or for \
         some stages by name"
    )]
    TooLarge { n_positions: usize, bytes: u64, max_bytes: u64 },
}

/// Looks on while an answer is made.
pub(crate) struct ServedWatch {
    stats: StatsWatch<'static>,
    saving: Saving,
    header: TraceHeader,
    /// Positions before this one have been seen; they may be computed again after the answer was set back.
    n_seen: u32,
    /// Rows of the step that were seen before.
    n_skipped: usize,
    /// Where the step ends, until it has been run.
    pending: Option<u32>,
    /// Whether a step broke off in the middle.
    is_broken: bool,
}

enum Saving {
    No,
    On(Box<SaveWatch>),
    Failed(String),
}

/// A trace whose answer has ended; its file has not.
pub(crate) struct Unfinished {
    trace: ServedTrace,
    save: Option<Box<SaveWatch>>,
}

impl ServedWatch {
    /// # Errors
    /// Stages that are not there to be seen, and more bytes than are allowed. A file that cannot be written is told at the end.
    pub(crate) fn new(
        engine: &Engine,
        ask: &TraceAsk,
        prompt: &[u32],
        max_tokens: usize,
    ) -> std::result::Result<ServedWatch, TraceAskError> {
        // The last token is not computed any more.
        let n_positions = prompt.len() + max_tokens.saturating_sub(1);
        let positions = (0..n_positions as u32).collect();
        let header = TraceHeader {
            tokens: prompt.to_vec(),
            n_prompt: prompt.len(),
            positions,
            fused: true,
            ..header_of(engine)
        };
        let saving = match &ask.save {
            None => Saving::No,
            Some(save) => begin(engine, save, &header, max_tokens)?,
        };
        let plan = StatsPlan { positions: 0..u32::MAX, ..StatsPlan::default() };
        let stats = StatsWatch::new(plan, engine.session.read_bytes(), None);
        Ok(ServedWatch { stats, saving, header, n_seen: 0, n_skipped: 0, pending: None, is_broken: false })
    }

    /// The last step that began has been run.
    pub(crate) fn stepped(&mut self) {
        self.n_seen = self.n_seen.max(self.pending.take().unwrap_or(0));
    }

    /// What was seen, of these tokens.
    pub(crate) fn into_trace(self, tokens: &[u32]) -> Unfinished {
        let n = (self.n_seen as usize).min(tokens.len());
        let header = TraceHeader { tokens: tokens[..n].to_vec(), positions: (0..n as u32).collect(), ..self.header };
        let (save, saved) = match self.saving {
            Saving::No => (None, None),
            Saving::On(_) if self.is_broken => (None, Some(Err("a step broke off in the middle".to_string()))),
            Saving::On(save) => (Some(save), None),
            Saving::Failed(e) => (None, Some(Err(e))),
        };
        Unfinished { trace: ServedTrace { stats: self.stats.stats, header, saved }, save }
    }
}

impl Unfinished {
    /// Writes the file to its end, which may take as long as the disk likes.
    pub(crate) fn finish(self) -> ServedTrace {
        let Unfinished { mut trace, save } = self;
        if let Some(save) = save {
            trace.saved = Some(save.finish(&trace.header).map_err(|e| e.to_string()));
        }
        trace
    }
}

fn begin(
    engine: &Engine,
    ask: &SaveAsk,
    header: &TraceHeader,
    max_tokens: usize,
) -> std::result::Result<Saving, TraceAskError> {
    let stages = stages(engine, ask.stages.as_deref())?;
    let place = |&stage: &Stage| match stage.is_global() {
        true => vec![Place::new(0, stage)],
        false => (0..engine.hparams.n_layer).map(|layer| Place::new(layer, stage)).collect(),
    };
    let shape = |place: Place| (place, stage_shape(&engine.hparams, place.stage, header.positions.len()));
    let tensors: Vec<(Place, Vec<usize>)> = stages.iter().flat_map(place).map(shape).collect();
    let row_bytes: u64 = tensors.iter().map(|(_, shape)| 4 * shape.iter().product::<usize>() as u64).sum();
    let (n_positions, max_bytes) = (header.positions.len(), ask.max_bytes);
    let bytes = row_bytes.saturating_mul(n_positions as u64);
    if bytes > max_bytes {
        return Err(TraceAskError::TooLarge { n_positions, bytes, max_bytes });
    }
    Ok(match TraceWriter::create_new(&ask.path, header, max_tokens, &tensors) {
        Ok(writer) => Saving::On(Box::new(SaveWatch::new(writer))),
        Err(e) => Saving::Failed(e.to_string()),
    })
}

/// The stages that are meant: those that this model computes and the device shows as it serves.
fn stages(engine: &Engine, asked: Option<&[Stage]>) -> std::result::Result<Vec<Stage>, TraceAskError> {
    let of_model = models::stages(&engine.hparams, &engine.file.gguf);
    let is_shown = |stage| engine.session.shows(stage, false);
    let Some(asked) = asked else {
        let grows = |stage| matches!(stage, Stage::AttnScores | Stage::AttnSoftmax);
        return Ok(of_model.into_iter().filter(|&stage| is_shown(stage) && !grows(stage)).collect());
    };
    for &stage in asked {
        let name = stage.name();
        if !of_model.contains(&stage) {
            let has = of_model.iter().map(|s| s.name()).collect();
            return Err(TraceAskError::NoStage { name, arch: engine.hparams.arch.to_string(), has });
        }
        if !is_shown(stage) {
            return Err(TraceAskError::NotShown { name, device: engine.device.kind.to_string() });
        }
    }
    Ok(asked.to_vec())
}

impl Watch for ServedWatch {
    fn begin(&mut self, batch: &Batch) {
        self.is_broken |= self.pending.is_some();
        let rows = batch.rows();
        self.n_skipped = rows.partition_point(|row| row.position < self.n_seen);
        self.pending = rows.last().map(|row| row.position + 1);
        if self.n_skipped < rows.len() {
            let rest = Batch::new(rows[self.n_skipped..].to_vec(), batch.tables().to_vec());
            self.stats.begin(&rest);
            if let Saving::On(save) = &mut self.saving {
                save.begin(&rest);
            }
        }
    }

    fn wants(&self, stage: Stage, layer: usize) -> bool {
        self.stats.wants(stage, layer) || matches!(&self.saving, Saving::On(save) if save.wants(stage, layer))
    }

    fn seen(&mut self, stage: Stage, layer: usize, value: &dyn StageValue) -> Result<()> {
        let n_rows = value.shape().0;
        if self.n_skipped >= n_rows {
            return Ok(());
        }
        let value = Rows::new(value, self.n_skipped..n_rows);
        if self.stats.wants(stage, layer) {
            self.stats.seen(stage, layer, &value)?;
        }
        let Saving::On(save) = &mut self.saving else { return Ok(()) };
        if !save.wants(stage, layer) {
            return Ok(());
        }
        match save.seen(stage, layer, &value) {
            // The step is not only this answer's.
            Err(BackendError::Stopped) => {
                let e = save.failure().as_ref().map_or_else(String::new, TraceFileError::to_string);
                self.saving = Saving::Failed(e);
                Ok(())
            }
            result => result,
        }
    }
}
