//! The passes of a comparison: side A to disk, side B against it, and the noise between them.

use std::path::{Path, PathBuf};

use apr_core::backend::Precision;
use apr_core::stage::{Place, Stage};

use super::end::{self, EndMetrics};
use super::measure::{Comparison, Measured, ShapeDiff};
use super::noise::{Noise, coarseness};
use super::routing::{Choice, Route};
use super::sides::{Loaded, ModelSource, SideInfo, Source};
use super::tape::{RouteFeed, TapeFeed};
use super::verdict::Rule;
use super::{DiffError, DiffOptions, Prompt, TAPE_FILE};
use crate::model_file::ModelFile;
use crate::trace::file::SavedTrace;

/// Flips of experts whose cost is measured: each takes a pass.
const COSTED_FLIPS: usize = 8;

/// What side B's passes gave.
#[derive(Default)]
pub(super) struct Passes {
    pub free: Measured,
    pub isolated: Option<Measured>,
    pub noise_free: (Measured, Vec<Route>),
    pub noise_isolated: Measured,
    pub shapes: Vec<ShapeDiff>,
    pub routes: Vec<Route>,
    pub end: Option<EndMetrics>,
    pub costs: Vec<Option<f64>>,
    /// Why stages were not isolated.
    pub free_only: Option<&'static str>,
}

/// Side A on disk, and what it is.
pub(super) fn side_a(options: &DiffOptions) -> Result<(SavedTrace, SideInfo), DiffError> {
    match &options.a {
        Source::Trace(path) => {
            let trace = SavedTrace::open(path)?;
            if let Some(Prompt::Tokens(tokens)) = &options.prompt
                && *tokens != trace.header.tokens
            {
                return Err(unequal("tokens", &trace.header.tokens, tokens));
            }
            let info = SideInfo { is_trace: true, path: path.clone(), header: trace.header.clone() };
            Ok((trace, info))
        }
        Source::Model(source) => {
            let mut side = Loaded::load(source)?;
            let (tokens, positions) = match (&options.b, &options.prompt) {
                (Source::Trace(path), prompt) => {
                    let header = SavedTrace::open(path)?.header;
                    if let Some(Prompt::Tokens(tokens)) = prompt
                        && *tokens != header.tokens
                    {
                        return Err(unequal("tokens", tokens, &header.tokens));
                    }
                    (header.tokens, header.positions)
                }
                (_, Some(prompt)) => {
                    let tokens = tokens_of(&side, prompt);
                    let positions = (0..tokens.len() as u32).collect();
                    (tokens, positions)
                }
                (_, None) => return Err(DiffError::NoPrompt),
            };
            let tape = side.record(&options.scratch.join(TAPE_FILE), (&tokens, &positions), &|_| true, None, None)?;
            let info = side.info(tape.header.clone());
            Ok((tape, info))
        }
    }
}

/// Side B against the tape of A: what it is, how the two are judged, and what its passes gave.
pub(super) fn side_b(
    options: &DiffOptions,
    tape: &SavedTrace,
    a: &SideInfo,
) -> Result<(SideInfo, Rule, Passes), DiffError> {
    let mut passes = Passes::default();
    let (b, rule) = match &options.b {
        Source::Trace(path) => hold_trace(options, path, (tape, a), &mut passes)?,
        Source::Model(source) => run_b(options, source, (tape, a), &mut passes)?,
    };
    if passes.isolated.is_none() {
        passes.free_only = Some(if a.is_trace || b.is_trace {
            "free-running only: a saved trace cannot compute a stage from other inputs"
        } else if !passes.shapes.is_empty() {
            "free-running only: the two sides have stages of different shapes"
        } else {
            "free-running only: the two sides do not compute the same stages"
        });
    }
    Ok((b, rule, passes))
}

/// Side B as a trace.
fn hold_trace(
    options: &DiffOptions,
    path: &Path,
    (tape, a): (&SavedTrace, &SideInfo),
    passes: &mut Passes,
) -> Result<(SideInfo, Rule), DiffError> {
    let trace = SavedTrace::open(path)?;
    check_equal(tape, &trace)?;
    let tokens = &tape.header.tokens;
    let mut comparison = Comparison::new(tape, tokens, true);
    comparison.trace(&trace);
    take_free(passes, comparison);
    let info = SideInfo { is_trace: true, path: path.to_path_buf(), header: trace.header.clone() };
    let rule = rule(a, &info, options.threshold);
    noise_of_traces(options, (a, &info), rule, (tokens, &tape.header.positions), passes)?;
    Ok((info, rule))
}

fn tokens_of(side: &Loaded, prompt: &Prompt) -> Vec<u32> {
    match prompt {
        Prompt::Tokens(tokens) => tokens.clone(),
        Prompt::Text(text) => side.engine.text_tokens(text.as_bytes(), true),
    }
}

fn unequal(what: &'static str, a: &[u32], b: &[u32]) -> DiffError {
    let show = |ids: &[u32]| match ids.len() {
        0..=16 => format!("{ids:?}"),
        n => format!("{n} of them, {:?} …", &ids[..8]),
    };
    DiffError::Unequal { what, a: show(a), b: show(b) }
}

fn check_equal(a: &SavedTrace, b: &SavedTrace) -> Result<(), DiffError> {
    let (a, b) = (&a.header, &b.header);
    if a.tokens != b.tokens {
        return Err(unequal("tokens", &a.tokens, &b.tokens));
    }
    if a.positions != b.positions {
        return Err(unequal("positions", &a.positions, &b.positions));
    }
    Ok(())
}

fn rule(a: &SideInfo, b: &SideInfo, threshold: f64) -> Rule {
    if a.same_numbers(b) { Rule::Bits } else { Rule::Ratio { threshold } }
}

/// Takes over what a free-running comparison measured.
fn take_free(passes: &mut Passes, comparison: Comparison<'_>) {
    passes.end = comparison.end();
    passes.free = comparison.measured;
    passes.shapes = comparison.shapes;
    passes.routes = comparison.routes;
}

/// Runs side B against the tape of A, and the noise between them.
fn run_b(
    options: &DiffOptions,
    source: &ModelSource,
    (tape, a): (&SavedTrace, &SideInfo),
    passes: &mut Passes,
) -> Result<(SideInfo, Rule), DiffError> {
    let (tokens, positions) = (&tape.header.tokens[..], &tape.header.positions[..]);
    let mut side = Loaded::load(source)?;
    if let Some(Prompt::Text(text)) = &options.prompt {
        let own = side.engine.text_tokens(text.as_bytes(), true);
        if own != tokens {
            return Err(unequal("tokens", tokens, &own));
        }
    }
    let info = side.info(side.header(tokens, positions));
    let rule = rule(a, &info, options.threshold);
    let noise = noise_between(options, a, &info, source);
    // Where B is the exact side of the noise, its passes serve twice.
    let is_exact = rule != Rule::Bits && !noise.is_none() && noise.model == source.path && noise.is_exact(source);
    let keep = |place: Place| is_exact || place.stage == Stage::LmHead;
    let mut comparison = Comparison::new(tape, tokens, true);
    let free =
        side.record(&options.scratch.join("b.safetensors"), (tokens, positions), &keep, Some(&mut comparison), None)?;
    take_free(passes, comparison);
    let places = side.places();
    for s in &mut passes.shapes {
        // A watch sees rows; the side knows their shape.
        if let Some((_, shape)) = places.iter().find(|(place, _)| *place == s.place) {
            s.b.clone_from(shape);
        }
    }
    let can_feed =
        !a.is_trace && passes.shapes.is_empty() && same_stages(tape, &side) && positions.len() == tokens.len();
    let mut fed = None;
    if can_feed {
        let (mut comparison, mut feed) = (Comparison::new(tape, tokens, false), TapeFeed::new(tape, true));
        if is_exact {
            let path = options.scratch.join("b-fed.safetensors");
            fed = Some(side.record(&path, (tokens, positions), &keep, Some(&mut comparison), Some(&mut feed))?);
        } else {
            side.run(tokens, positions, &mut comparison, Some(&mut feed))?;
        }
        passes.isolated = Some(comparison.measured);
    }
    if rule != Rule::Bits {
        let interior = side.feeds_interior();
        if can_feed {
            passes.noise_isolated = noise
                .measure((tokens, positions), &|| Some(TapeFeed::new(tape, interior)), fed.as_ref(), &options.scratch)?
                .0;
        }
        if !can_feed || passes.routes.iter().any(|r| r.choice == Choice::Flipped) {
            let exact = is_exact.then_some(&free);
            passes.noise_free = noise.measure((tokens, positions), &|| None, exact, &options.scratch)?;
        }
    }
    passes.costs = flip_costs(&mut side, tape, &free, &passes.routes)?;
    Ok((info, rule))
}

/// Whether a side has the tape's layers: a pass cannot be fed with those of another model.
fn same_stages(tape: &SavedTrace, side: &Loaded) -> bool {
    let layers = tape.places().filter_map(Place::layer).max().map_or(0, |il| il.saturating_add(1));
    let is_moe = tape.places().any(|p| p.stage == Stage::MoeRouterIndices);
    let has_bias = tape.places().any(|p| p.stage == Stage::QkvBias);
    let own = side.places();
    let has = |stage| own.iter().any(|(p, _)| p.stage == stage);
    layers == side.engine.hparams.n_layer && is_moe == has(Stage::MoeRouterIndices) && has_bias == has(Stage::QkvBias)
}

/// What each of the first flips costs: the divergence of B's next token from what it is when this one choice is made as A made it.
/// `None` where B has no such experts, or another number of them per token.
fn flip_costs(
    side: &mut Loaded,
    tape: &SavedTrace,
    free: &SavedTrace,
    routes: &[Route],
) -> Result<Vec<Option<f64>>, DiffError> {
    let lm_head = Place::new(0, Stage::LmHead);
    let flips = routes.iter().filter(|r| r.choice == Choice::Flipped).take(COSTED_FLIPS);
    let (tokens, mut costs) = (&free.header.tokens, Vec::new());
    let Some(experts) = side.engine.hparams.experts else { return Ok(costs) };
    for flip in flips {
        let shape = tape.shape(Place::new(flip.layer, Stage::MoeRouterIndices));
        if shape != Some(&[experts.n_expert_used]) || flip.only_a.iter().any(|&e| e as usize >= experts.n_expert) {
            costs.push(None);
            continue;
        }
        let until = &tokens[..flip.position as usize + 1];
        let mut logits = Logits::default();
        let mut feed = RouteFeed { tape, layer: flip.layer, position: flip.position, batch: Default::default() };
        side.run(until, &[flip.position], &mut logits, Some(&mut feed))?;
        let mut own = Vec::new();
        let has_own = free.read(lm_head, flip.position, &mut own);
        costs.push(has_own.then(|| end::kld(&own, &logits.0)));
    }
    Ok(costs)
}

/// Keeps the logits of one row.
#[derive(Default)]
struct Logits(Vec<f32>);

impl apr_core::probe::Watch for Logits {
    fn begin(&mut self, _: &apr_core::batch::Batch) {}
    fn wants(&self, stage: Stage, _: usize) -> bool {
        stage == Stage::LmHead
    }
    fn seen(&mut self, _: Stage, _: usize, value: &dyn apr_core::probe::StageValue) -> apr_core::backend::Result<()> {
        value.read(0..1, &mut self.0)
    }
}

/// The noise between two sides, where there is a model to measure it on.
fn noise_between(options: &DiffOptions, a: &SideInfo, b: &SideInfo, source: &ModelSource) -> Noise {
    let own = if let Source::Model(a) = &options.a { Some(a.path.clone()) } else { None };
    let model = own.unwrap_or_else(|| source.path.clone());
    noise_of(a, b, model, source.options.n_ctx)
}

fn noise_of(a: &SideInfo, b: &SideInfo, model: PathBuf, n_ctx: Option<usize>) -> Noise {
    let (kv_a, kv_b) = (a.kv_type(), b.kv_type());
    let (kv_fine, kv_coarse) = if coarseness(kv_a) <= coarseness(kv_b) { (kv_a, kv_b) } else { (kv_b, kv_a) };
    let is_int8 = [a, b].iter().any(|s| s.precision() == Precision::Int8);
    let activations = if is_int8 { Precision::Int8 } else { Precision::F32 };
    Noise { model, activations, kv_coarse, kv_fine, n_ctx }
}

/// The model that a trace names, if it is still there and the same.
fn model_of(side: &SideInfo) -> Option<PathBuf> {
    let path = PathBuf::from(&side.header.model);
    let file = ModelFile::open(&path).ok()?;
    (side.header.model_sha256.is_empty() || side.header.model_sha256 == file.sha256()).then_some(path)
}

/// Measures the noise where B is a trace: on A's model, on the one that was named, or on the one a trace was made of if it is there.
fn noise_of_traces(
    options: &DiffOptions,
    (a, b): (&SideInfo, &SideInfo),
    rule: Rule,
    what: (&[u32], &[u32]),
    passes: &mut Passes,
) -> Result<(), DiffError> {
    if rule == Rule::Bits {
        return Ok(());
    }
    let named = match &options.a {
        Source::Model(source) => Some(source.path.clone()),
        Source::Trace(_) => options.model.clone(),
    };
    let mut noise = noise_of(a, b, PathBuf::new(), None);
    if noise.is_none() {
        return Ok(());
    }
    let model = named.or_else(|| [a, b].into_iter().find_map(model_of));
    noise.model = model.ok_or(DiffError::NoModel)?;
    passes.noise_free = noise.measure(what, &|| None, None, &options.scratch)?;
    Ok(())
}
