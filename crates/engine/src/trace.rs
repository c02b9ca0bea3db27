//! Looking into a pass: running tokens while a watch looks on, accounting for what it computes, and saving what is asked for.
//!
//! [`trace`] is what `apr trace` asks for: the steps that answering takes, watched by a [`StatsWatch`], and by a [`SaveWatch`] where
//! stages are to be kept.

use std::ops::Range;
use std::path::PathBuf;

use apr_core::models::stage_shape;
use apr_core::probe::Watch;
use apr_core::stage::Place;
use apr_core::stats::RowStats;

use crate::engine::Engine;
use crate::generate::{GenerateError, check_fits};
use crate::sampler::{Ranked, ranked};
use crate::session::{Sequence, Session, StepError};
use file::{TraceFileError, TraceHeader, TraceWriter};
use pass::PassLook;
use save::SaveWatch;
use stats::{Stats, StatsPlan, StatsWatch};

pub mod anomalies;
pub mod file;
pub mod json;
pub mod pass;
pub mod save;
pub mod served;
pub mod stats;

/// Best tokens that are reported of every position whose logits are.
pub const N_BEST: usize = 10;
/// Positions whose residual is followed, at most.
const N_FOLLOWED: usize = 256;

/// What to run, and what to look at.
pub struct TraceRequest {
    pub prompt: Vec<u32>,
    /// Tokens to decode after the prompt, the best ones, each in a step of its own.
    pub n_decode: usize,
    /// Positions of the prompt whose values count in the statistics.
    pub positions: Range<u32>,
    /// Runs fused ops in their plain form, so that their interior is seen.
    pub unfused: bool,
    /// Also what takes more computing: the residual followed through the layers, and the logit lens.
    pub detailed: bool,
    pub save: Option<SaveRequest>,
}

/// What to keep of a pass, and where.
pub struct SaveRequest {
    pub path: PathBuf,
    pub places: Vec<Place>,
    /// Positions of the prompt; decoded ones are kept too.
    pub positions: Range<u32>,
    /// Program, model, device and precision; what the pass knows is filled in.
    pub header: TraceHeader,
}

/// What a position's logits say.
#[derive(Clone, Debug)]
pub struct Output {
    pub position: u32,
    pub stats: RowStats,
    /// Of the next token's distribution, in bits.
    pub entropy: f64,
    /// At most [`N_BEST`].
    pub best: Vec<Ranked>,
}

/// A decoded token and the step that fed it.
pub struct DecodeStep {
    pub token: u32,
    pub stats: Stats,
    pub output: Output,
}

/// What was seen.
pub struct Traced {
    /// Of the prompt, at the positions that were asked for.
    pub stats: Stats,
    pub positions: Range<u32>,
    /// At the prompt's last position.
    pub output: Output,
    pub steps: Vec<DecodeStep>,
    /// What the model would say if it ended after each layer, at the last of the positions; where details were asked for.
    pub lens: Vec<Output>,
    pub saved: Option<PathBuf>,
}

/// Why a pass cannot be traced.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    #[error(transparent)]
    Generate(#[from] GenerateError),
    #[error("no logit at position {position} is finite, so that there is no token to go on with; leave --decode out")]
    NoToken { position: u32 },
    #[error(transparent)]
    File(#[from] TraceFileError),
}

impl From<StepError> for TraceError {
    fn from(e: StepError) -> TraceError {
        TraceError::Generate(e.into())
    }
}

/// Runs a prompt, and decodes after it, with all stages looked at.
///
/// # Errors
/// What does not fit the context, before anything is computed; a trace that cannot be written, of which nothing is left then.
pub fn trace(engine: &mut Engine, request: &TraceRequest) -> Result<Traced, TraceError> {
    check_fits(engine, request.prompt.len(), Some(request.n_decode))?;
    let n_vocab = engine.hparams.n_vocab;
    if let Some(&token) = request.prompt.iter().find(|&&t| t as usize >= n_vocab) {
        return Err(StepError::Token { token, n_vocab }.into());
    }
    let mut save = match &request.save {
        Some(save) => Some(SaveWatch::new(begin_file(engine, request, save)?)),
        None => None,
    };
    let mut sequence = Sequence::default();
    let run = Run { session: &mut *engine.session, sequence: &mut sequence, request, save: save.as_mut() };
    let traced = run.all();
    engine.session.release(&mut sequence);
    if let Some(e) = save.as_mut().and_then(SaveWatch::failure) {
        return Err(e.into());
    }
    let mut traced = traced?;
    if let (Some(watch), Some(save)) = (save, &request.save) {
        let decoded: Vec<u32> = traced.steps.iter().map(|s| s.token).collect();
        traced.saved = Some(watch.finish(&header(request, save, &decoded))?);
    }
    Ok(traced)
}

fn begin_file(engine: &Engine, request: &TraceRequest, save: &SaveRequest) -> Result<TraceWriter, TraceFileError> {
    let n_kv = request.prompt.len() + request.n_decode;
    let shape = |place: &Place| (*place, stage_shape(&engine.hparams, place.stage, n_kv));
    let tensors: Vec<_> = save.places.iter().map(shape).collect();
    TraceWriter::create(&save.path, &header(request, save, &[]), request.n_decode, &tensors)
}

/// What a trace of an engine says before a pass is known. The file is not hashed.
pub fn header_of(engine: &Engine) -> TraceHeader {
    TraceHeader {
        producer: concat!("apr ", env!("CARGO_PKG_VERSION")).to_string(),
        model: engine.file.path.display().to_string(),
        architecture: engine.hparams.arch.to_string(),
        device: engine.device.kind.to_string(),
        isa: engine.device.isa.map(|isa| isa.to_string()).unwrap_or_default(),
        precision: engine.session.precision().to_string(),
        kv: engine.session.kv_type().to_string(),
        ..TraceHeader::default()
    }
}

/// The header of a trace with these decoded tokens; positions are those of all that will be.
fn header(request: &TraceRequest, save: &SaveRequest, decoded: &[u32]) -> TraceHeader {
    let n = request.prompt.len() as u32;
    TraceHeader {
        tokens: [&request.prompt, decoded].concat(),
        n_prompt: request.prompt.len(),
        positions: save.positions.clone().chain(n..n + request.n_decode as u32).collect(),
        fused: !request.unfused,
        ..save.header.clone()
    }
}

/// A trace in progress.
struct Run<'a> {
    session: &'a mut dyn Session,
    sequence: &'a mut Sequence,
    request: &'a TraceRequest,
    save: Option<&'a mut SaveWatch>,
}

impl Run<'_> {
    fn all(mut self) -> Result<Traced, TraceError> {
        let request = self.request;
        let (stats, output) = self.pass(&request.prompt, request.positions.clone(), request.detailed)?;
        let mut steps: Vec<DecodeStep> = Vec::new();
        for _ in 0..request.n_decode {
            let last = steps.last().map_or(&output, |s| &s.output);
            let token = last.best.first().ok_or(TraceError::NoToken { position: last.position })?.token;
            let at = self.sequence.n_tokens() as u32;
            let (stats, output) = self.pass(&[token], at..at + 1, false)?;
            steps.push(DecodeStep { token, stats, output });
        }
        let lens = if request.detailed { self.lens(&stats)? } else { Vec::new() };
        Ok(Traced { stats, positions: request.positions.clone(), output, steps, lens, saved: None })
    }

    /// Feeds tokens; their account, and what their last position says.
    fn pass(&mut self, tokens: &[u32], positions: Range<u32>, detailed: bool) -> Result<(Stats, Output), StepError> {
        let end = (self.sequence.n_tokens() + tokens.len()) as u32;
        let saved = self.request.save.as_ref().map_or(0..0, |s| s.positions.clone());
        let wanted = (0..end).filter(|p| positions.contains(p) || saved.contains(p) || p + 1 == end);
        let wanted: Vec<u32> = wanted.collect();
        let followed = if detailed { spread(positions.clone(), N_FOLLOWED) } else { Vec::new() };
        let plan = StatsPlan { positions, followed, unfused: self.request.unfused };
        let beside = self.save.as_deref_mut().map(|save| save as &mut dyn Watch);
        let mut watch = StatsWatch::new(plan, self.session.read_bytes(), beside);
        let mut output = None;
        let mut after = |session: &dyn Session, positions: &[u32]| {
            if positions.last() == Some(&(end - 1)) {
                output = Some(self::output(session, positions.len() - 1, end - 1)?);
            }
            Ok(())
        };
        let look = PassLook { watch: &mut watch, unfused: self.request.unfused, feed: None };
        pass::run(&mut *self.session, &mut *self.sequence, tokens, &wanted, look, &mut after)?;
        Ok((watch.stats, output.expect("the last position has logits")))
    }

    /// What the residual after each layer would give as output.
    fn lens(&mut self, stats: &Stats) -> Result<Vec<Output>, StepError> {
        let residual: Vec<f32> = stats.followed.values().flat_map(|f| f.last.iter().copied()).collect();
        let Some(position) = stats.followed.values().next().and_then(|f| f.positions.last().copied()) else {
            return Ok(Vec::new());
        };
        self.session.step_output(&residual)?;
        (0..stats.followed.len()).map(|layer| output(self.session, layer, position)).collect()
    }
}

/// What the `i`-th row of logits says.
fn output(session: &dyn Session, i: usize, position: u32) -> Result<Output, StepError> {
    let mut logits = Vec::new();
    session.logits(i, &mut logits)?;
    let (best, entropy) = ranked(&logits, N_BEST);
    Ok(Output { position, stats: RowStats::of(&logits), entropy, best })
}

/// At most `n` of the positions, evenly spread, the last among them.
fn spread(positions: Range<u32>, n: usize) -> Vec<u32> {
    let len = positions.len();
    let n = n.min(len);
    (1..=n).map(|i| positions.start + (i * len / n) as u32 - 1).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn followed_positions_are_spread_and_end_with_the_last() {
        assert_eq!(spread(0..3, 8), [0, 1, 2]);
        assert_eq!(spread(10..20, 5), [11, 13, 15, 17, 19]);
        let many = spread(0..2000, 256);
        assert!(many.len() == 256 && many.is_sorted_by(|a, b| a < b) && many[255] == 1999);
        assert_eq!(spread(3..3, 4), [0; 0]);
    }
}
