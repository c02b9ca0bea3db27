//! Where two runs of a model part: the first stage, layer, position, expert and row that differ, and whether they should.
//!
//! A side is a model file on a device, or a saved trace. Side A runs first and lies on disk from then on, so the two never have to be in
//! memory together. B is held against it twice: running freely, which shows how an error grows, and with each stage computed from A's
//! inputs, which shows the op that makes it. Two sides that must compute the same numbers are judged by their bits; others by the ratio
//! of their difference to the error that the reference makes when its activations are rounded as the sides declare.

use std::path::PathBuf;

use apr_core::gguf::Value;
use apr_core::stage::{Place, Stage};

use crate::engine::EngineError;
use crate::model_file::OpenError;
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
mod findings;
mod noise;
mod passes;
mod sides;
mod site;
mod tape;

use end::EndMetrics;
use findings::Files;
use measure::Measured;
use passes::Passes;
use routing::{Choice, Route, logit_noise};
pub use sides::{ModelSource, SideInfo, Source};
use verdict::{Judge, Mode, Rule, Summary};
use weights::Spot;

/// Side A's pass, in the scratch folder.
const TAPE_FILE: &str = "a.safetensors";
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
    #[error("{path}: {source}")]
    Load { path: PathBuf, source: EngineError },
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
    let report = match compare(options) {
        Err(DiffError::Load { path, source: EngineError::Load(error) }) => {
            return findings::of_unloadable(options, path, error);
        }
        report => report?,
    };
    Ok(match unfused(options, &report)? {
        Some(plain) => with_interior(report, plain),
        None => report,
    })
}

/// The comparison of both sides' plain bodies, where a culprit may hide behind stages that a fused op keeps to itself.
fn unfused(options: &DiffOptions, report: &Report) -> Result<Option<Report>, DiffError> {
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
    let plain = |s: &ModelSource| Source::Model(ModelSource { unfused: true, ..s.clone() });
    let plain = compare(&DiffOptions { a: plain(a), b: plain(b), ..options.clone() })?;
    // A fault of the fused op itself is not in its plain body.
    Ok((!plain.findings.is_empty()).then_some(plain))
}

/// A report with the findings and the isolated stages of the plain bodies.
fn with_interior(report: Report, plain: Report) -> Report {
    let mut places = plain.places;
    for place in &mut places {
        if let Some(own) = report.places.iter().find(|p| p.place == place.place) {
            place.free = own.free;
        }
    }
    let mut notes = report.notes;
    notes.push("stages inside fused ops, and all isolated ones, are of both sides run unfused".to_string());
    Report { places, findings: plain.findings, isolated: plain.isolated, notes, ..report }
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

fn compare(options: &DiffOptions) -> Result<Report, DiffError> {
    let (tape, a) = passes::side_a(options)?;
    if tape.header.tokens.is_empty() {
        return Err(DiffError::Empty);
    }
    let (b, rule, passes) = passes::side_b(options, &tape, &a)?;
    if passes.free.is_empty() && passes.shapes.is_empty() {
        return Err(DiffError::NothingShared);
    }
    report(options, (a, b, rule), &tape, passes)
}

/// Puts everything together and names what was found.
fn report(
    options: &DiffOptions,
    (a, b, rule): (SideInfo, SideInfo, Rule),
    tape: &SavedTrace,
    passes: Passes,
) -> Result<Report, DiffError> {
    let none = Measured::new();
    let free =
        Judge::new(rule, Mode::Free, &passes.free, &passes.noise_free.0, &[&passes.routes, &passes.noise_free.1]);
    let measured = passes.isolated.as_ref().unwrap_or(&none);
    let isolated = Judge::new(rule, Mode::Isolated, measured, &passes.noise_isolated, &[]);
    let files = Files::open(options)?;
    let mut findings: Vec<Finding> = passes.shapes.iter().map(|s| files.shape(s)).collect();
    let culprits = match passes.isolated {
        Some(_) => isolated.culprits(),
        // What follows the first difference of a free-running pass inherits it.
        None => free.culprits().into_iter().take(1).collect(),
    };
    findings.extend(files.one_sided());
    findings.extend(culprits.iter().map(|c| files.finding(c, rule, tape)));
    findings.sort_by_key(|f| f.place);
    if let (Source::Model(source_a), Source::Model(source_b), Some(file), None) =
        (&options.a, &options.b, &files.a, &files.b)
    {
        blocks::name(&mut findings, (file, tape), [(source_a, &a), (source_b, &b)])?;
    }
    if findings.is_empty()
        && let Some(unreached) = files.unreached(tape)
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
    let (places, flips) = (places.collect(), flips(&passes, rule));
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
        metadata: files.metadata,
        tokens: tape.header.tokens.clone(),
        positions: tape.header.positions.clone(),
        notes: passes.free_only.into_iter().map(str::to_string).collect(),
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
        Flip { route: route.clone(), noise, near_tie, cost_kld: passes.costs.get(i).copied().flatten() }
    };
    flipped.enumerate().map(flip).collect()
}
