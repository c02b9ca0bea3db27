//! Where two runs of a model part: the first stage, layer, position, expert and row that differ, and whether they should.
//!
//! A side is a model file on a device, or a saved trace. Side A runs first and lies on disk from then on, so the two never have to be in
//! memory together. B is held against it twice: running freely, which shows how an error grows, and with each stage computed from A's
//! inputs, which shows the op that makes it. Two sides that must compute the same numbers are judged by their bits; others by the ratio
//! of their difference to the error that the reference makes when its activations are rounded as the sides declare.

use std::path::{Path, PathBuf};

use apr_core::backend::Precision;
use apr_core::gguf::Value;
use apr_core::models;
use apr_core::stage::{Place, Stage};

use crate::engine::EngineError;
use crate::model_file::{ModelFile, OpenError};
use crate::session::StepError;
use crate::trace::file::{SavedTrace, TraceFileError};

pub mod bundle;
pub mod end;
pub mod isolated;
pub mod measure;
pub mod op;
pub mod replay;
pub mod routing;
pub mod verdict;
pub mod weights;

mod blocks;
mod exact;
mod noise;
mod sides;
mod site;
mod tape;

use end::EndMetrics;
use measure::{Comparison, Measured, ShapeDiff};
use noise::{Noise, coarseness};
use routing::{Choice, Route, logit_noise};
use sides::Loaded;
pub use sides::{ModelSource, SideInfo, Source};
use tape::{RouteFeed, TapeFeed};
use verdict::{Culprit, Judge, Mode, Rule, Summary};
use weights::Spot;

/// Side A's pass, in the scratch folder.
const TAPE_FILE: &str = "a.safetensors";
/// Flips of experts whose cost is measured: each takes a pass.
const COSTED_FLIPS: usize = 8;

/// The prompt of a comparison.
#[derive(Clone, Debug)]
pub enum Prompt {
    Tokens(Vec<u32>),
    /// Plain text, by the tokenizers of both sides.
    Text(String),
}

/// What to compare, and how.
#[derive(Clone, Debug)]
pub struct DiffOptions {
    pub a: Source,
    pub b: Source,
    /// Not needed where a side is a trace, which has its tokens.
    pub prompt: Option<Prompt>,
    /// How many times the noise a difference may be.
    pub threshold: f64,
    /// The model of two saved traces, for the noise between them.
    pub model: Option<PathBuf>,
    /// An empty folder for passes that lie on disk.
    pub scratch: PathBuf,
}

/// What a comparison found.
#[derive(Clone, Debug)]
pub struct Report {
    pub a: SideInfo,
    pub b: SideInfo,
    pub tokens: Vec<u32>,
    pub positions: Vec<u32>,
    pub rule: Rule,
    /// Whether each stage was also computed from the other side's inputs.
    pub isolated: bool,
    /// In order of computation.
    pub places: Vec<PlaceReport>,
    /// What differs first, and what else does.
    pub findings: Vec<Finding>,
    pub end: Option<EndMetrics>,
    /// Choices of experts in the free-running passes; empty in a model without.
    pub routes: Vec<Route>,
    /// The flips among them, the first ones with their cost.
    pub flips: Vec<Flip>,
    /// Metadata keys that differ between two files.
    pub metadata: Vec<MetadataDiff>,
    pub notes: Vec<String>,
}

/// A metadata key whose values differ; `None` where a file lacks it.
#[derive(Clone, Debug, PartialEq)]
pub struct MetadataDiff {
    pub key: String,
    pub a: Option<Value>,
    pub b: Option<Value>,
}

/// One place.
#[derive(Clone, Debug)]
pub struct PlaceReport {
    pub place: Place,
    pub free: Option<Summary>,
    pub isolated: Option<Summary>,
    /// The shapes for one position, where they differ.
    pub shape: Option<(Vec<usize>, Vec<usize>)>,
}

/// A difference that should not be, as closely as it can be named.
#[derive(Clone, Debug)]
pub struct Finding {
    pub place: Option<Place>,
    pub position: Option<u32>,
    /// Column of the stage's value that shows it.
    pub column: Option<usize>,
    pub spot: Spot,
    pub mode: Mode,
    /// Relative root mean square at the position.
    pub error: f64,
    pub noise: f64,
    pub ratio: f64,
    /// One sentence.
    pub why: String,
}

/// A token that went to other experts.
#[derive(Clone, Debug)]
pub struct Flip {
    pub route: Route,
    /// What the noise does to the router's logits there, where it is known.
    pub noise: Option<f64>,
    /// Whether noise explains the flip.
    pub near_tie: bool,
    /// Divergence of B's next token when only this choice is made as A made it, in nats.
    pub cost_kld: Option<f64>,
}

/// Why two sides cannot be compared.
#[derive(Debug, thiserror::Error)]
pub enum DiffError {
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(transparent)]
    Step(#[from] StepError),
    #[error(transparent)]
    Trace(#[from] TraceFileError),
    #[error("{what} differ: A has {a}, B has {b}; only the same tokens at the same positions can be compared")]
    Unequal { what: &'static str, a: String, b: String },
    #[error("there is nothing to run: give --prompt or --tokens, or compare with a saved trace")]
    NoPrompt,
    #[error("the prompt is empty: there is nothing to compare")]
    Empty,
    #[error(
        "the two traces declare different precisions or KV types, so how far apart they may be depends on the model: name its file with --model"
    )]
    NoModel,
    #[error("the two sides share no stage")]
    NothingShared,
}

/// Compares two sides.
///
/// # Errors
/// A side that cannot be loaded or run, and sides of other tokens or positions.
pub fn diff(options: &DiffOptions) -> Result<Report, DiffError> {
    let mut report = compare(options)?;
    if let Some(finer) = refined(options, &report)? {
        report.findings = finer;
        report.notes.push("the stages inside fused ops were found by running both sides unfused".to_string());
    }
    Ok(report)
}

/// Where a culprit may hide behind stages that a fused op keeps to itself: what both sides' plain bodies show.
fn refined(options: &DiffOptions, report: &Report) -> Result<Option<Vec<Finding>>, DiffError> {
    let (Source::Model(a), Source::Model(b)) = (&options.a, &options.b) else { return Ok(None) };
    let is_shown = |place: Place| report.places.iter().any(|p| p.place == place);
    let hides = |f: &Finding| {
        let found = matches!(f.mode, Mode::Free | Mode::Isolated).then_some(f.place).flatten();
        found.is_some_and(|place| {
            let layer = place.layer().unwrap_or_default();
            hidden_before(place.stage).iter().any(|&stage| !is_shown(Place::new(layer, stage)))
        })
    };
    if !report.findings.iter().any(hides) {
        return Ok(None);
    }
    let unfused = |s: &ModelSource| Source::Model(ModelSource { unfused: true, ..s.clone() });
    let finer = compare(&DiffOptions { a: unfused(a), b: unfused(b), ..options.clone() })?;
    // A fault of the fused op itself is not in its plain body.
    Ok((!finer.findings.is_empty()).then_some(finer.findings))
}

/// Stages that the same fused op computes before the given one.
fn hidden_before(stage: Stage) -> &'static [Stage] {
    use Stage::*;
    match stage {
        FfnUp => &[FfnGate],
        FfnSwigl | FfnOut => &[FfnGate, FfnUp, FfnSilu, FfnSwigl],
        MoeExpertUp => &[MoeExpertGate],
        MoeExpertSwigl | MoeExpertOut | MoeFfnOut => &[MoeExpertGate, MoeExpertUp, MoeExpertSwigl, MoeExpertOut],
        _ => &[],
    }
}

/// What side B's passes gave.
#[derive(Default)]
struct Passes {
    free: Measured,
    isolated: Option<Measured>,
    noise_free: (Measured, Vec<Route>),
    noise_isolated: Measured,
    shapes: Vec<ShapeDiff>,
    routes: Vec<Route>,
    end: Option<EndMetrics>,
    costs: Vec<f64>,
}

fn compare(options: &DiffOptions) -> Result<Report, DiffError> {
    let tape_path = options.scratch.join(TAPE_FILE);
    let (tape, a, tokens) = side_a(options, &tape_path)?;
    if tokens.is_empty() {
        return Err(DiffError::Empty);
    }
    let positions = tape.header.positions.clone();
    let mut notes = Vec::new();
    let mut passes = Passes::default();
    let (b, rule) = match &options.b {
        Source::Trace(path) => {
            let trace = SavedTrace::open(path)?;
            check_equal(&tape, &trace)?;
            let mut comparison = Comparison::new(&tape, &tokens, true);
            comparison.trace(&trace);
            take_free(&mut passes, comparison);
            let info = SideInfo { is_trace: true, path: path.clone(), header: trace.header.clone() };
            let rule = rule(&a, &info, options.threshold);
            noise_of_traces(options, (&a, &info), rule, (&tokens, &positions), &mut passes)?;
            (info, rule)
        }
        Source::Model(source) => run_b(options, source, (&tape, &a), (&tokens, &positions), &mut passes)?,
    };
    if passes.free.is_empty() && passes.shapes.is_empty() {
        return Err(DiffError::NothingShared);
    }
    if passes.isolated.is_none() {
        notes.push(isolated_reason(&a, &b, &passes, positions.len() == tokens.len()).to_string());
    }
    report(options, (a, b, rule), (tokens, positions), &tape, passes, notes)
}

/// Side A on disk, what it is, and its tokens.
fn side_a(options: &DiffOptions, tape_path: &Path) -> Result<(SavedTrace, SideInfo, Vec<u32>), DiffError> {
    match &options.a {
        Source::Trace(path) => {
            let trace = SavedTrace::open(path)?;
            if let Some(Prompt::Tokens(tokens)) = &options.prompt
                && *tokens != trace.header.tokens
            {
                return Err(unequal("tokens", &trace.header.tokens, tokens));
            }
            let info = SideInfo { is_trace: true, path: path.clone(), header: trace.header.clone() };
            let tokens = trace.header.tokens.clone();
            Ok((trace, info, tokens))
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
            let tape = side.record(tape_path, (&tokens, &positions), &|_| true, None, None)?;
            let info = side.info(tape.header.clone());
            Ok((tape, info, tokens))
        }
    }
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
    (tokens, positions): (&[u32], &[u32]),
    passes: &mut Passes,
) -> Result<(SideInfo, Rule), DiffError> {
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
    let is_exact = rule != Rule::Bits
        && noise.as_ref().is_some_and(|n| !n.is_none() && n.model == source.path && n.is_exact(source));
    let keep = |place: Place| is_exact || place.stage == Stage::LmHead;
    let mut comparison = Comparison::new(tape, tokens, true);
    let free =
        side.record(&options.scratch.join("b.safetensors"), (tokens, positions), &keep, Some(&mut comparison), None)?;
    take_free(passes, comparison);
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
    if let (Rule::Ratio { .. }, Some(noise)) = (rule, &noise) {
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
    let layers = tape.places().filter_map(Place::layer).max().map_or(0, |il| il + 1);
    let is_moe = tape.places().any(|p| p.stage == Stage::MoeRouterIndices);
    let has_bias = tape.places().any(|p| p.stage == Stage::QkvBias);
    let own = side.places();
    let has = |stage| own.iter().any(|(p, _)| p.stage == stage);
    layers == side.engine.hparams.n_layer && is_moe == has(Stage::MoeRouterIndices) && has_bias == has(Stage::QkvBias)
}

/// What each of the first flips costs: the divergence of B's next token from what it is when this one choice is made as A made it.
fn flip_costs(
    side: &mut Loaded,
    tape: &SavedTrace,
    free: &SavedTrace,
    routes: &[Route],
) -> Result<Vec<f64>, DiffError> {
    let lm_head = Place::new(0, Stage::LmHead);
    let flips = routes.iter().filter(|r| r.choice == Choice::Flipped).take(COSTED_FLIPS);
    let (tokens, mut costs) = (&free.header.tokens, Vec::new());
    for flip in flips {
        let until = &tokens[..flip.position as usize + 1];
        let mut logits = Logits::default();
        let mut feed = RouteFeed { tape, layer: flip.layer, position: flip.position, batch: Default::default() };
        side.run(until, &[flip.position], &mut logits, Some(&mut feed))?;
        let mut own = Vec::new();
        if free.read(lm_head, flip.position, &mut own) {
            costs.push(end::kld(&own, &logits.0));
        }
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
fn noise_between(options: &DiffOptions, a: &SideInfo, b: &SideInfo, source: &ModelSource) -> Option<Noise> {
    let own = if let Source::Model(a) = &options.a { Some(a.path.clone()) } else { None };
    let model = own.unwrap_or_else(|| source.path.clone());
    noise_of(a, b, model, source.options.n_ctx)
}

fn noise_of(a: &SideInfo, b: &SideInfo, model: PathBuf, n_ctx: Option<usize>) -> Option<Noise> {
    let (kv_a, kv_b) = (a.kv_type(), b.kv_type());
    let (kv_fine, kv_coarse) = if coarseness(kv_a) <= coarseness(kv_b) { (kv_a, kv_b) } else { (kv_b, kv_a) };
    let is_int8 = [a, b].iter().any(|s| s.precision() == Precision::Int8);
    let activations = if is_int8 { Precision::Int8 } else { Precision::F32 };
    Some(Noise { model, activations, kv_coarse, kv_fine, n_ctx })
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
    let known = [a, b].into_iter().map(|s| PathBuf::from(&s.header.model)).find(|path| ModelFile::open(path).is_ok());
    let probe = noise_of(a, b, named.or(known).unwrap_or_default(), None);
    let Some(noise) = probe.filter(|n| !n.is_none()) else { return Ok(()) };
    if noise.model.as_os_str().is_empty() {
        return Err(DiffError::NoModel);
    }
    passes.noise_free = noise.measure(what, &|| None, None, &options.scratch)?;
    Ok(())
}

fn isolated_reason(a: &SideInfo, b: &SideInfo, passes: &Passes, positions_all: bool) -> &'static str {
    if a.is_trace || b.is_trace {
        "free-running only: a saved trace cannot compute a stage from other inputs"
    } else if !passes.shapes.is_empty() {
        "free-running only: the two sides have stages of different shapes"
    } else if positions_all {
        "free-running only: the two sides do not compute the same stages"
    } else {
        "free-running only: not all positions are compared"
    }
}

/// Puts everything together and names what was found.
fn report(
    options: &DiffOptions,
    (a, b, rule): (SideInfo, SideInfo, Rule),
    (tokens, positions): (Vec<u32>, Vec<u32>),
    tape: &SavedTrace,
    passes: Passes,
    notes: Vec<String>,
) -> Result<Report, DiffError> {
    let none = Measured::new();
    let free =
        Judge::new(rule, Mode::Free, &passes.free, &passes.noise_free.0, &[&passes.routes, &passes.noise_free.1]);
    let measured = passes.isolated.as_ref().unwrap_or(&none);
    let isolated = Judge::new(rule, Mode::Isolated, measured, &passes.noise_isolated, &[]);
    let files = Files::open(options)?;
    let mut findings: Vec<Finding> = passes.shapes.iter().map(shape_finding).collect();
    let culprits = match passes.isolated {
        Some(_) => isolated.culprits(),
        // What follows the first difference of a free-running pass inherits it.
        None => free.culprits().into_iter().take(1).collect(),
    };
    findings.extend(files.one_sided());
    findings.extend(culprits.iter().map(|c| files.finding(c, rule, tape, &tokens)));
    findings.sort_by_key(|f| f.place);
    if let (Source::Model(source_a), Source::Model(source_b), Some(file), None) =
        (&options.a, &options.b, &files.a, &files.b)
    {
        blocks::name(&mut findings, (file, tape), [(source_a, &a), (source_b, &b)])?;
    }
    if findings.is_empty()
        && let Some(unreached) = files.unreached()
    {
        findings.push(unreached);
    }
    let mut places: Vec<Place> = passes.free.keys().copied().chain(passes.shapes.iter().map(|s| s.place)).collect();
    places.sort();
    places.dedup();
    let shape = |place| passes.shapes.iter().find(|s| s.place == place).map(|s| (s.a.clone(), s.b.clone()));
    let places = places.into_iter().map(|place| PlaceReport {
        place,
        free: free.summary(place),
        isolated: isolated.summary(place),
        shape: shape(place),
    });
    let places = places.collect();
    let flips = flips(&passes, rule);
    Ok(Report {
        a,
        b,
        rule,
        isolated: passes.isolated.is_some(),
        places,
        findings,
        end: passes.end,
        routes: passes.routes,
        flips,
        metadata: files.metadata(),
        tokens,
        positions,
        notes,
    })
}

fn flips(passes: &Passes, rule: Rule) -> Vec<Flip> {
    let flipped = passes.routes.iter().filter(|r| r.choice == Choice::Flipped);
    let flip = |(i, route): (usize, &Route)| {
        let noise = match rule {
            Rule::Bits => None,
            Rule::Ratio { .. } => logit_noise(&passes.noise_free.0, route.layer, route.position),
        };
        // Both sides of the margin move.
        let near_tie = noise.is_some_and(|n| route.margin <= 6.0 * n);
        Flip { route: route.clone(), noise, near_tie, cost_kld: passes.costs.get(i).copied() }
    };
    flipped.enumerate().map(flip).collect()
}

fn shape_finding(s: &ShapeDiff) -> Finding {
    Finding {
        place: Some(s.place),
        position: None,
        column: None,
        spot: Spot::default(),
        mode: Mode::Shape,
        error: f64::INFINITY,
        noise: 0.0,
        ratio: f64::INFINITY,
        why: format!("a value has shape {:?} in A and {:?} in B", s.a, s.b),
    }
}

/// The files behind the sides, to name weights by.
struct Files {
    a: Option<ModelFile>,
    /// Where it is another file than A's.
    b: Option<ModelFile>,
}

impl Files {
    fn open(options: &DiffOptions) -> Result<Files, DiffError> {
        let path = |source: &Source| if let Source::Model(m) = source { Some(m.path.clone()) } else { None };
        let (a, b) = (path(&options.a), path(&options.b));
        let open = |path: Option<PathBuf>| path.map(|p| ModelFile::open(&p)).transpose();
        let b = b.filter(|b| a.as_ref() != Some(b));
        Ok(Files { a: open(a.or_else(|| options.model.clone()))?, b: open(b)? })
    }

    /// Both files, where there are two.
    fn two(&self) -> Option<(&ModelFile, &ModelFile)> {
        Some((self.a.as_ref()?, self.b.as_ref()?))
    }

    fn finding(&self, c: &Culprit, rule: Rule, tape: &SavedTrace, tokens: &[u32]) -> Finding {
        let column = if rule == Rule::Bits { c.row.first } else { c.row.worst };
        let mut ids = Vec::new();
        if let Some(il) = c.place.layer() {
            tape.read(Place::new(il, Stage::MoeRouterIndices), c.row.position, &mut ids);
        }
        let ids: Vec<u32> = ids.iter().map(|&id| id as u32).collect();
        let token = tokens[c.row.position as usize];
        let file = self.a.as_ref().or(self.b.as_ref());
        let named = file.and_then(|f| Some(weights::spot(f, &f.hparams().ok()?, c.place, column, token, &ids)));
        let named = named.unwrap_or(Spot { row: Some(column), ..Spot::default() });
        let differing = self.two().map(|(a, b)| weights::differing_spot(a, b, c.place, &named));
        let (spot, why) = match differing {
            Some(Some(spot)) => (spot, "the weights of the two files differ there".to_string()),
            Some(None) => {
                let why = format!("{}, though the weights are the same; {}", inputs(c, column), self.keys());
                (Spot { expert: named.expert, ..Spot::default() }, why)
            }
            None => (named, inputs(c, column)),
        };
        let why = match (c.row.n_bad_a, c.row.n_bad_b) {
            (0, 0) => why,
            (a, b) => format!("{why}; of {} values {a} in A and {b} in B are no numbers", c.row.n),
        };
        let error = if c.row.sum_sq_a > 0.0 { c.row.rms() / c.row.rms_a() } else { c.row.rms() };
        let noise = if c.row.sum_sq_a > 0.0 { c.noise / c.row.rms_a() } else { c.noise };
        Finding {
            place: Some(c.place),
            position: Some(c.row.position),
            column: Some(column),
            spot,
            mode: c.mode,
            error,
            noise,
            ratio: c.ratio,
            why,
        }
    }

    /// Stages and layers that only one of two files computes.
    fn one_sided(&self) -> Vec<Finding> {
        let Some((a, b)) = self.two() else { return Vec::new() };
        let (Ok(h_a), Ok(h_b)) = (a.hparams(), b.hparams()) else { return Vec::new() };
        let (stages_a, stages_b) = (models::stages(&h_a, &a.gguf), models::stages(&h_b, &b.gguf));
        let only = |side: &str, place: Place| Finding {
            place: Some(place),
            position: None,
            column: None,
            spot: Spot::default(),
            mode: Mode::Shape,
            error: f64::INFINITY,
            noise: 0.0,
            ratio: f64::INFINITY,
            why: format!("only {side} computes this"),
        };
        let missing = |side, these: &[Stage], others: &[Stage]| -> Vec<Finding> {
            these.iter().filter(|s| !others.contains(s)).map(|&s| only(side, Place::new(0, s))).collect()
        };
        let mut found = [missing("A", &stages_a, &stages_b), missing("B", &stages_b, &stages_a)].concat();
        if h_a.n_layer != h_b.n_layer {
            let side = if h_a.n_layer > h_b.n_layer { "A" } else { "B" };
            found.push(only(side, Place::new(h_a.n_layer.min(h_b.n_layer), Stage::AttnNorm)));
        }
        found
    }

    /// A difference between two files that this prompt does not reach.
    fn unreached(&self) -> Option<Finding> {
        let (a, b) = self.two()?;
        let (place, spot) = weights::first_differing(a, b)?;
        let why = "the weights of the two files differ there, which this prompt does not reach".to_string();
        let (mode, position, column) = (Mode::Weights, None, None);
        Some(Finding { place, position, column, spot, mode, error: 0.0, noise: 0.0, ratio: 0.0, why })
    }

    /// Metadata keys that differ.
    fn metadata(&self) -> Vec<MetadataDiff> {
        let Some((a, b)) = self.two() else { return Vec::new() };
        let (a, b) = (&a.gguf.metadata, &b.gguf.metadata);
        let mut keys: Vec<&str> = a.iter().chain(b.iter()).map(|(key, _)| key).collect();
        keys.sort_unstable();
        keys.dedup();
        let differ = keys.into_iter().filter(|key| a.get(key) != b.get(key));
        differ
            .map(|key| MetadataDiff { key: key.to_string(), a: a.get(key).cloned(), b: b.get(key).cloned() })
            .collect()
    }

    fn keys(&self) -> String {
        let keys: Vec<String> = self.metadata().into_iter().map(|m| m.key).collect();
        match keys.len() {
            0 => "so is the metadata".to_string(),
            1..=4 => format!("metadata that differs: {}", keys.join(", ")),
            n => format!("metadata that differs: {} and {} more keys", keys[..3].join(", "), n - 3),
        }
    }
}

/// What is known of a difference that no weight explains.
fn inputs(c: &Culprit, column: usize) -> String {
    match c.mode {
        Mode::Isolated => format!("the two sides compute column {column} differently from the same inputs"),
        _ => format!("the two sides differ in column {column}"),
    }
}
