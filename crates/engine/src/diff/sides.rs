//! The two sides of a comparison: a model on a device, or a saved trace.

use std::path::{Path, PathBuf};

use apr_core::backend::fed::Feed;
use apr_core::backend::unfused::INTERIOR;
use apr_core::backend::{KvType, Precision};
use apr_core::models;
use apr_core::probe::{StageValue, Watch};
use apr_core::stage::{Place, Stage};

use super::DiffError;
use crate::engine::{Engine, EngineError, EngineOptions};
use crate::session::{Sequence, StepError};
use crate::trace::file::{SavedTrace, TraceHeader, TraceWriter};
use crate::trace::header_of;
use crate::trace::pass::{self, PassLook};
use crate::trace::save::SaveWatch;

/// What to compare.
#[derive(Clone, Debug)]
pub enum Source {
    Model(ModelSource),
    Trace(PathBuf),
}

/// A model and how it is run.
#[derive(Clone, Debug)]
pub struct ModelSource {
    pub path: PathBuf,
    pub options: EngineOptions,
    /// Runs the plain bodies of fused ops.
    pub unfused: bool,
}

/// What a side is, for the report: a trace's header, its own or of the trace made of it.
#[derive(Clone, Debug, PartialEq)]
pub struct SideInfo {
    pub is_trace: bool,
    pub path: PathBuf,
    pub header: TraceHeader,
}

impl SideInfo {
    /// Whether two sides must compute the same bits where their weights are the same.
    pub fn same_numbers(&self, other: &SideInfo) -> bool {
        let of = |s: &SideInfo| {
            let h = &s.header;
            (h.producer.clone(), h.device.clone(), h.isa.clone(), h.precision.clone(), h.kv.clone(), h.fused)
        };
        of(self) == of(other)
    }

    /// How the side stores keys and values.
    pub fn kv_type(&self) -> KvType {
        self.header.kv.parse().unwrap_or(KvType::F32)
    }

    /// Precision of the side's activations.
    pub fn precision(&self) -> Precision {
        if self.header.precision == "int8" { Precision::Int8 } else { Precision::F32 }
    }
}

/// A loaded side.
pub(super) struct Loaded {
    pub engine: Engine,
    pub unfused: bool,
}

/// Shows every stage to two watches.
pub(super) struct Both<'a>(pub &'a mut dyn Watch, pub &'a mut dyn Watch);

impl Watch for Both<'_> {
    fn begin(&mut self, batch: &apr_core::batch::Batch) {
        self.0.begin(batch);
        self.1.begin(batch);
    }

    fn wants(&self, stage: Stage, layer: usize) -> bool {
        self.0.wants(stage, layer) || self.1.wants(stage, layer)
    }

    fn seen(&mut self, stage: Stage, layer: usize, value: &dyn StageValue) -> apr_core::backend::Result<()> {
        for watch in [&mut self.0, &mut self.1] {
            if watch.wants(stage, layer) {
                watch.seen(stage, layer, value)?;
            }
        }
        Ok(())
    }
}

impl Loaded {
    pub fn load(source: &ModelSource) -> Result<Loaded, DiffError> {
        let engine = Engine::load(&source.path, source.options).map_err(|e| match e {
            // These name the file themselves.
            EngineError::Open(e) => DiffError::Open(e),
            e => DiffError::Load { path: source.path.clone(), source: e },
        })?;
        Ok(Loaded { engine, unfused: source.unfused })
    }

    /// Whether a feed reaches the stages inside fusable ops: not those of an op that runs fused.
    pub fn feeds_interior(&self) -> bool {
        INTERIOR.iter().all(|&stage| self.engine.session.shows(stage, self.unfused))
    }

    /// What a trace of this side says.
    pub fn header(&self, tokens: &[u32], positions: &[u32]) -> TraceHeader {
        TraceHeader {
            tokens: tokens.to_vec(),
            n_prompt: tokens.len(),
            positions: positions.to_vec(),
            fused: !self.unfused,
            ..header_of(&self.engine)
        }
    }

    pub fn info(&self, header: TraceHeader) -> SideInfo {
        SideInfo { is_trace: false, path: self.engine.file.path.clone(), header }
    }

    /// The places this side shows, with the shape of a value. Scores of attention are left out: they have a value per pair of positions.
    pub fn places(&self) -> Vec<(Place, Vec<usize>)> {
        let h = &self.engine.hparams;
        let shown = |stage: &Stage| {
            !matches!(stage, Stage::AttnScores | Stage::AttnSoftmax) && self.engine.session.shows(*stage, self.unfused)
        };
        let stages: Vec<Stage> = models::stages(h, &self.engine.file.gguf).into_iter().filter(shown).collect();
        let layers = |stage: Stage| 0..if stage.is_global() { 1 } else { h.n_layer };
        let of_stage = |&stage: &Stage| {
            let shape = models::stage_shape(h, stage, 0);
            layers(stage).map(move |il| (Place::new(il, stage), shape.clone())).collect::<Vec<_>>()
        };
        stages.iter().flat_map(of_stage).collect()
    }

    /// Runs a pass under the eyes of `watch`, with values of `feed` in place of its own.
    pub fn run(
        &mut self,
        tokens: &[u32],
        positions: &[u32],
        watch: &mut dyn Watch,
        feed: Option<&mut dyn Feed>,
    ) -> Result<(), StepError> {
        let mut sequence = Sequence::default();
        let look = PassLook { watch, unfused: self.unfused, feed: feed.map(|feed| feed as &mut dyn Feed) };
        let session = &mut *self.engine.session;
        let result = pass::run(session, &mut sequence, tokens, positions, look, &mut |_, _| Ok(()));
        session.release(&mut sequence);
        result
    }

    /// Runs a pass and saves its places in a file, those of `keep` only. `also` looks on too.
    pub fn record(
        &mut self,
        path: &Path,
        (tokens, positions): (&[u32], &[u32]),
        keep: &dyn Fn(Place) -> bool,
        also: Option<&mut dyn Watch>,
        feed: Option<&mut dyn Feed>,
    ) -> Result<SavedTrace, DiffError> {
        let header = self.header(tokens, positions);
        let places: Vec<_> = self.places().into_iter().filter(|(place, _)| keep(*place)).collect();
        let mut save = SaveWatch::new(TraceWriter::create(path, &header, 0, &places)?);
        let result = match also {
            Some(also) => self.run(tokens, positions, &mut Both(&mut save, also), feed),
            None => self.run(tokens, positions, &mut save, feed),
        };
        match (result, save.failure()) {
            (_, Some(failure)) => return Err(failure.into()),
            (result, None) => result?,
        }
        save.finish(&header)?;
        Ok(SavedTrace::open(path)?)
    }
}
