//! What is at fault, as closely as it can be named: from a place and a column to weights, metadata, or the op itself.

use std::path::PathBuf;

use apr_core::gguf::TensorInfo;
use apr_core::models::{self, LoadError};
use apr_core::stage::{Place, Stage};

use super::measure::ShapeDiff;
use super::sides::{Loaded, ModelSource, SideInfo, Source};
use super::verdict::{Culprit, Mode, Rule};
use super::weights::{self, Spot};
use super::{DiffError, DiffOptions, Finding, MetadataDiff, Prompt, Report};
use crate::model_file::ModelFile;
use crate::trace::file::{SavedTrace, TraceHeader};

/// The files behind the sides, to name weights by.
pub(super) struct Files {
    pub a: Option<ModelFile>,
    /// Where it is another file than A's.
    pub b: Option<ModelFile>,
    /// Keys that differ between the two.
    pub metadata: Vec<MetadataDiff>,
}

impl Files {
    pub fn open(options: &DiffOptions) -> Result<Files, DiffError> {
        let path = |source: &Source| if let Source::Model(m) = source { Some(m.path.clone()) } else { None };
        let (a, b) = (path(&options.a), path(&options.b));
        let open = |path: Option<PathBuf>| path.map(|p| ModelFile::open(&p)).transpose();
        let b = b.filter(|b| a.as_ref() != Some(b));
        let (a, b) = (open(a.or_else(|| options.model.clone()))?, open(b)?);
        let metadata = a.as_ref().zip(b.as_ref()).map_or(Vec::new(), |(a, b)| differing_keys(a, b));
        Ok(Files { a, b, metadata })
    }

    /// Both files, where there are two.
    fn two(&self) -> Option<(&ModelFile, &ModelFile)> {
        Some((self.a.as_ref()?, self.b.as_ref()?))
    }

    pub fn finding(&self, c: &Culprit, rule: Rule, tape: &SavedTrace) -> Finding {
        let column = if rule == Rule::Bits { c.row.first } else { c.row.worst };
        let mut ids = Vec::new();
        if let Some(il) = c.place.layer() {
            tape.read(Place::new(il, Stage::MoeRouterIndices), c.row.position, &mut ids);
        }
        let ids: Vec<u32> = ids.iter().map(|&id| id as u32).collect();
        let token = tape.header.tokens[c.row.position as usize];
        let file = self.a.as_ref().or(self.b.as_ref());
        let named = file.and_then(|f| Some(weights::spot(f, &f.hparams().ok()?, c.place, column, token, &ids)));
        let named = named.unwrap_or_else(|| Spot { expert: expert_of(c.place, column, tape, &ids), ..Spot::default() });
        let (spot, why) = match self.two() {
            Some((a, b)) => self.between(a, b, c, column, &named),
            None => (named, inputs(c, column)),
        };
        let why = match (c.row.n_bad_a, c.row.n_bad_b) {
            (0, 0) => why,
            (a, b) => format!("{why}; of {} values {a} in A and {b} in B are NaN or infinite", c.row.n),
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

    /// What of two files explains a difference: weights, how they are stored, or metadata.
    fn between(&self, a: &ModelFile, b: &ModelFile, c: &Culprit, column: usize, named: &Spot) -> (Spot, String) {
        if let Some(spot) = weights::differing_spot(a, b, c.place, named) {
            return (spot, "the weights of the two files differ there".to_string());
        }
        kind(a, b, c.place, named).unwrap_or_else(|| {
            let why = format!("{}, though the weights are the same; {}", inputs(c, column), self.keys());
            (Spot { expert: named.expert, ..Spot::default() }, why)
        })
    }

    /// Stages and layers that only one of two files computes.
    pub fn one_sided(&self) -> Vec<Finding> {
        let Some((a, b)) = self.two() else { return Vec::new() };
        let (Ok(h_a), Ok(h_b)) = (a.hparams(), b.hparams()) else { return Vec::new() };
        let (stages_a, stages_b) = (models::stages(&h_a, &a.gguf), models::stages(&h_b, &b.gguf));
        let only = |side: &str, place: Place| of_structure(Some(place), None, format!("only {side} computes this"));
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

    /// A difference between two files that no compared value shows.
    pub fn unreached(&self, tape: &SavedTrace) -> Option<Finding> {
        let (a, b) = self.two()?;
        let (place, spot) = weights::first_differing(a, b)?;
        let why = match reaches(tape, place, &spot) {
            true => "the weights of the two files differ there, which changes nothing that counts on this prompt",
            false => "the weights of the two files differ there, which this prompt does not reach",
        };
        let (why, mode, position, column) = (why.to_string(), Mode::Weights, None, None);
        Some(Finding { place, position, column, spot, mode, error: 0.0, noise: 0.0, ratio: 0.0, why })
    }

    /// A place whose values have another shape on the other side.
    pub fn shape(&self, s: &ShapeDiff) -> Finding {
        let keys = if self.metadata.is_empty() { String::new() } else { format!("; {}", self.keys()) };
        of_structure(Some(s.place), None, format!("a value has shape {:?} in A and {:?} in B{keys}", s.a, s.b))
    }

    fn keys(&self) -> String {
        let keys: Vec<&str> = self.metadata.iter().map(|m| m.key.as_str()).collect();
        match keys.len() {
            0 => "so is the metadata".to_string(),
            1..=4 => format!("metadata that differs: {}", keys.join(", ")),
            n => format!("metadata that differs: {} and {} more keys", keys[..3].join(", "), n - 3),
        }
    }
}

/// Tensors behind a place that only one file has, or that the files store as other types.
fn kind(a: &ModelFile, b: &ModelFile, place: Place, named: &Spot) -> Option<(Spot, String)> {
    let of_place = |f: &ModelFile| -> Vec<(String, String)> {
        let own = |t: &&TensorInfo| weights::place_of(&t.name) == Some(place) || Some(&t.name) == named.tensor.as_ref();
        f.gguf.tensors.iter().filter(own).map(|t| (t.name.clone(), t.qtype.to_string())).collect()
    };
    let (in_a, in_b) = (of_place(a), of_place(b));
    let (name, _) = in_a.iter().chain(&in_b).find(|t| !in_a.contains(t) || !in_b.contains(t))?;
    let stored = |tensors: &[(String, String)]| {
        tensors.iter().find(|t| t.0 == *name).map_or("absent".to_string(), |t| t.1.clone())
    };
    let why = format!("the tensor is {} in A and {} in B", stored(&in_a), stored(&in_b));
    Some((Spot { tensor: Some(name.clone()), row: None, super_block: None, expert: named.expert }, why))
}

/// Metadata keys whose values differ.
fn differing_keys(a: &ModelFile, b: &ModelFile) -> Vec<MetadataDiff> {
    let (a, b) = (&a.gguf.metadata, &b.gguf.metadata);
    let mut keys: Vec<&str> = a.iter().chain(b.iter()).map(|(key, _)| key).collect();
    keys.sort_unstable();
    keys.dedup();
    let differ = keys.into_iter().filter(|key| a.get(key) != b.get(key));
    differ.map(|key| MetadataDiff { key: key.to_string(), a: a.get(key).cloned(), b: b.get(key).cloned() }).collect()
}

/// The expert of a column, where there is no file to ask.
fn expert_of(place: Place, column: usize, tape: &SavedTrace, ids: &[u32]) -> Option<usize> {
    use Stage::*;
    let by_slot = matches!(
        place.stage,
        MoeRouter | MoeRouterIndices | MoeExpertGate | MoeExpertUp | MoeExpertSwigl | MoeExpertOut
    );
    let n_cols: usize = tape.shape(place).filter(|_| by_slot)?.iter().product();
    let per_slot = n_cols.checked_div(ids.len()).filter(|&n| n > 0)?;
    ids.get(column / per_slot).map(|&id| id as usize)
}

/// Whether weights take part in a pass: those of an expert or of a token only where it occurs.
fn reaches(tape: &SavedTrace, place: Option<Place>, spot: &Spot) -> bool {
    let mut ids = Vec::new();
    match (spot.expert, place.and_then(Place::layer), spot.tensor.as_deref()) {
        (Some(expert), Some(layer), _) => tape.header.positions.iter().any(|&p| {
            tape.read(Place::new(layer, Stage::MoeRouterIndices), p, &mut ids);
            ids.contains(&(expert as f32))
        }),
        (_, _, Some("token_embd.weight")) => spot.row.is_some_and(|row| tape.header.tokens.contains(&(row as u32))),
        _ => true,
    }
}

/// A difference in what is computed, where there are no values to compare.
fn of_structure(place: Option<Place>, tensor: Option<String>, why: String) -> Finding {
    Finding {
        place,
        position: None,
        column: None,
        spot: Spot { tensor, ..Spot::default() },
        mode: Mode::Shape,
        error: f64::INFINITY,
        noise: 0.0,
        ratio: f64::INFINITY,
        why,
    }
}

/// Two files of which one cannot be loaded for a tensor that the other has right: that tensor is the difference.
///
/// # Errors
/// The error itself, where it names no tensor, or the other side is no sound file either.
pub(super) fn of_unloadable(options: &DiffOptions, path: PathBuf, error: LoadError) -> Result<Report, DiffError> {
    let refused = |error: LoadError| Err(DiffError::Load { path, source: error.into() });
    let tensor = match &error {
        LoadError::Missing { name, .. }
        | LoadError::Shape { name, .. }
        | LoadError::NotFloat { name, .. }
        | LoadError::Unknown { name, .. } => name.clone(),
        _ => return refused(error),
    };
    let (Source::Model(a), Source::Model(b)) = (&options.a, &options.b) else { return refused(error) };
    let tokens = if let Some(Prompt::Tokens(tokens)) = &options.prompt { tokens.clone() } else { Vec::new() };
    let (loaded_a, loaded_b) = (Loaded::load(a).ok(), Loaded::load(b).ok());
    let Some(sound) = loaded_a.as_ref().or(loaded_b.as_ref()) else { return refused(error) };
    let header = TraceHeader { fused: !sound.unfused, ..sound.header(&tokens, &[]) };
    let info = |source: &ModelSource| SideInfo { is_trace: false, path: source.path.clone(), header: header.clone() };
    let side = if loaded_a.is_some() { "B" } else { "A" };
    let place = weights::place_of(&tensor);
    Ok(Report {
        a: info(a),
        b: info(b),
        tokens,
        positions: Vec::new(),
        rule: Rule::Bits,
        isolated: false,
        places: Vec::new(),
        findings: vec![of_structure(place, Some(tensor), format!("{side} cannot be loaded: {error}"))],
        end: None,
        routes: Vec::new(),
        flips: Vec::new(),
        metadata: Files::open(options)?.metadata,
        notes: vec![format!("nothing was run, as {side} cannot be loaded")],
    })
}

/// What is known of a difference that no weight explains.
fn inputs(c: &Culprit, column: usize) -> String {
    match c.mode {
        Mode::Isolated => format!("the two sides compute column {column} differently from the same inputs"),
        _ => format!("the two sides differ in column {column}; the weights named are those behind it"),
    }
}
