//! A repro in one file: the op at which two sides part, with its inputs, its weights and what it should give.
//!
//! A safetensors file (<https://github.com/huggingface/safetensors>). Metadata is text, `format` being `apr.bundle/1`; `op` holds the
//! op's kind and constants as JSON. Tensors: `input.NAME` F32; `weight` U8 `[n_rows, bytes of a row]` as the model file stores it, side
//! B's, and `weight_a` where A's differs; `expected` F64, computed from A's; `got_a` and `got_b` F32, what the sides computed.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use apr_core::backend::{Bytes, Heads, WeightData};
use apr_core::qtype::GgmlType;
use apr_core::rope::{Pairing, Rope};
use apr_core::stage::Stage;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

use super::exact::exact;
use super::op::{Input, Kind, StageOp};
use super::site::{self, Taken};
use super::verdict::{Mode, Rule};
use super::{DiffOptions, Finding, Report, SideInfo, Source};
use crate::device;
use crate::engine::EngineError;
use crate::model_file::{ModelFile, OpenError};
use crate::trace::file::{SavedTrace, TraceFileError};

/// The format's name in the metadata.
const FORMAT: &str = "apr.bundle/1";
/// A larger file is no bundle of ours.
const FILE_MAX: u64 = 4 << 30;

/// A repro.
#[derive(Clone)]
pub struct Bundle {
    /// As side B computes it.
    pub op: StageOp,
    /// As side A computes it, where its weight or constants differ.
    pub op_a: Option<StageOp>,
    /// What it gives with A's.
    pub expected: Vec<f64>,
    /// What the sides computed in their passes, as far as it is known.
    pub got_a: Option<Vec<f32>>,
    pub got_b: Option<Vec<f32>>,
    /// Where it is from, for people: stage, layer, position, expert, tensor, row, the two sides. Keys in the order of the file.
    pub about: Vec<(String, String)>,
    /// Whether the two sides had to compute the same bits.
    pub by_bits: bool,
}

/// What can be wrong with a bundle.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    #[error("no bundle: {0}")]
    None(String),
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{path} is no bundle: {what}")]
    Container { path: PathBuf, what: String },
    #[error("{path} is no bundle of apr: metadata '{key}' is '{got}', expected {expected}")]
    Metadata { path: PathBuf, key: &'static str, got: String, expected: String },
    #[error("{path}: tensor '{name}' {what}")]
    Tensor { path: PathBuf, name: String, what: String },
    #[error("{path}: the op cannot be computed: {what}")]
    Op { path: PathBuf, what: String },
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(transparent)]
    Trace(#[from] TraceFileError),
}

/// Makes a bundle of the first finding of a comparison whose scratch files are still there.
///
/// # Errors
/// A finding that is no computation of its own, such as values of other shapes, or one whose inputs or weights are not known.
pub fn bundle(options: &DiffOptions, report: &Report) -> Result<Bundle, BundleError> {
    let none = |what: &str| BundleError::None(what.to_string());
    let finding = report.findings.first().ok_or_else(|| none("nothing differs"))?;
    if finding.mode == Mode::Shape {
        return Err(BundleError::None(format!("{}, so there is no result to compare", finding.why)));
    }
    let model = |source: &Source| if let Source::Model(m) = source { Some(m.path.clone()) } else { None };
    // A trace knows its model's path, which may be gone.
    let of_trace = |side: &SideInfo| {
        Some(PathBuf::from(&side.header.model)).filter(|path| side.is_trace && ModelFile::open(path).is_ok())
    };
    let path_b = model(&options.b).or_else(|| of_trace(&report.b));
    let path_a = model(&options.a).or_else(|| options.model.clone()).or_else(|| of_trace(&report.a));
    let unknown = "the weights of the two traces are not known; name their model with --model";
    let path_a = path_a.or_else(|| path_b.clone()).ok_or_else(|| none(unknown))?;
    let path_b = path_b.unwrap_or_else(|| path_a.clone());
    let tape = options.tape()?;
    let take = |path: &Path, side: &SideInfo| {
        let file = ModelFile::open(path)?;
        site::take(&tape, &file, side.kv_type(), finding).map_err(BundleError::None)
    };
    let (a, b) = (take(&path_a, &report.a)?, take(&path_b, &report.b)?);
    if a.columns != b.columns || a.op.inputs != b.op.inputs || a.op.weight.is_some() != b.op.weight.is_some() {
        return Err(none("the two sides' ops take other inputs"));
    }
    let mut row = Vec::new();
    let place = finding.place.ok_or_else(|| none("the finding belongs to no stage"))?;
    let mut value = |trace: &SavedTrace| {
        trace.read(place, a.position, &mut row).then(|| row.get(a.columns.clone()).map(<[f32]>::to_vec)).flatten()
    };
    let is_reached = finding.position.is_some();
    let got_a = is_reached.then(|| value(&tape)).flatten();
    let got_b = match &options.b {
        Source::Trace(path) => value(&SavedTrace::open(path)?),
        Source::Model(m) => device::run_ops(m.options.device, &[&b.op])?.0.pop(),
    };
    Ok(Bundle {
        expected: exact(&a.op),
        about: about(report, finding, &b),
        op_a: (!same_op(&a.op, &b.op)).then_some(a.op),
        op: b.op,
        got_a,
        got_b,
        by_bits: report.rule == Rule::Bits,
    })
}

impl DiffOptions {
    /// The recorded pass of side A, once it has been compared.
    fn tape(&self) -> Result<SavedTrace, TraceFileError> {
        match &self.a {
            Source::Trace(path) => SavedTrace::open(path),
            Source::Model(_) => SavedTrace::open(&self.scratch.join(super::TAPE_FILE)),
        }
    }
}

fn same_op(a: &StageOp, b: &StageOp) -> bool {
    let weight = |op: &StageOp| op.weight.as_ref().map(|w| (w.qtype, w.bytes.to_vec()));
    a.kind == b.kind && weight(a) == weight(b)
}

fn about(report: &Report, finding: &Finding, taken: &Taken) -> Vec<(String, String)> {
    let spot = &taken.spot;
    let side = |s: &SideInfo| {
        let h = &s.header;
        json!({
            "path": s.path.to_string_lossy(), "producer": h.producer, "device": h.device, "isa": h.isa,
            "precision": h.precision, "kv": h.kv, "fused": h.fused,
        })
    };
    let mut out = Vec::new();
    let mut add = |key: &str, value: Option<String>| out.extend(value.map(|v| (key.to_string(), v)));
    add("producer", Some(concat!("apr ", env!("CARGO_PKG_VERSION")).to_string()));
    add("stage", finding.place.map(|p| p.stage.name().to_string()));
    add("layer", finding.place.and_then(|p| p.layer()).map(|il| il.to_string()));
    add("position", Some(taken.position.to_string()));
    add("expert", spot.expert.map(|e| e.to_string()));
    add("tensor", spot.tensor.clone());
    add("row", finding.spot.row.or(spot.row).map(|r| r.to_string()));
    add("super_block", finding.spot.super_block.map(|b| b.to_string()));
    add("first_row", Some(taken.first_row.to_string()));
    add("first_column", Some(taken.columns.start.to_string()));
    add("why", Some(finding.why.clone()));
    add("a", Some(side(&report.a).to_string()));
    add("b", Some(side(&report.b).to_string()));
    out
}

impl Bundle {
    /// An entry of the metadata.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.about.iter().find(|(k, _)| k == key).map(|(_, v)| v.as_str())
    }

    /// Writes the file.
    ///
    /// # Errors
    /// What the system says.
    pub fn write(&self, path: &Path) -> Result<(), BundleError> {
        let floats = |v: &[f32]| v.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
        let mut tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
        for (name, input) in self.op.kind.inputs().iter().zip(&self.op.inputs) {
            let shape = vec![input.n_rows(), input.n_cols];
            tensors.push((format!("input.{name}"), Dtype::F32, shape, floats(&input.values)));
        }
        let weight_a = self.op_a.as_ref().and_then(|a| a.weight.as_ref());
        let mut metadata: HashMap<String, String> = self.about.iter().cloned().collect();
        for (name, w) in [("weight", &self.op.weight), ("weight_a", &weight_a.cloned())] {
            let Some(w) = w else { continue };
            tensors.push((name.to_string(), Dtype::U8, vec![w.n_rows, w.row_bytes()], w.bytes.to_vec()));
            metadata.insert(format!("{name}_type"), w.qtype.name().to_string());
        }
        let expected = self.expected.iter().flat_map(|v| v.to_le_bytes()).collect();
        tensors.push(("expected".to_string(), Dtype::F64, vec![self.expected.len()], expected));
        for (name, got) in [("got_a", &self.got_a), ("got_b", &self.got_b)] {
            tensors.extend(got.as_ref().map(|v| (name.to_string(), Dtype::F32, vec![v.len()], floats(v))));
        }
        metadata.insert("format".to_string(), FORMAT.to_string());
        metadata.insert("op".to_string(), kind_json(&self.op.kind).to_string());
        metadata.extend(self.op_a.as_ref().map(|a| ("op_a".to_string(), kind_json(&a.kind).to_string())));
        metadata.insert("rule".to_string(), if self.by_bits { "bits" } else { "ratio" }.to_string());
        let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
            let view = TensorView::new(*dtype, shape.clone(), bytes);
            (name.clone(), view.expect("a tensor's bytes are its shape's"))
        });
        let views: Vec<_> = views.collect();
        let bytes = safetensors::serialize(views, Some(metadata))
            .map_err(|e| BundleError::Container { path: path.to_path_buf(), what: e.to_string() })?;
        std::fs::write(path, bytes).map_err(|source| BundleError::Io { path: path.to_path_buf(), source })
    }

    /// Reads a file, written by `apr` or by a stranger.
    ///
    /// # Errors
    /// What is no bundle, and ops whose sizes or constants do not fit: the file's mistakes by name.
    pub fn read(path: &Path) -> Result<Bundle, BundleError> {
        let io = |source| BundleError::Io { path: path.to_path_buf(), source };
        let container = |what: String| BundleError::Container { path: path.to_path_buf(), what };
        let n_bytes = std::fs::metadata(path).map_err(io)?.len();
        if n_bytes > FILE_MAX {
            return Err(container(format!("it has {n_bytes} bytes, expected at most {FILE_MAX}")));
        }
        Bundle::parse(path, &std::fs::read(path).map_err(io)?)
    }

    /// Reads the bytes of the file `path`.
    pub(super) fn parse(path: &Path, bytes: &[u8]) -> Result<Bundle, BundleError> {
        let container = |what: String| BundleError::Container { path: path.to_path_buf(), what };
        let tensors = SafeTensors::deserialize(bytes).map_err(|e| container(e.to_string()))?;
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(|e| container(e.to_string()))?;
        Reader { path, tensors, metadata: header.metadata().clone().unwrap_or_default() }.bundle()
    }
}

/// A bundle file taken apart.
struct Reader<'a> {
    path: &'a Path,
    tensors: SafeTensors<'a>,
    metadata: HashMap<String, String>,
}

impl Reader<'_> {
    fn bundle(&self) -> Result<Bundle, BundleError> {
        let format = self.text("format");
        if format != FORMAT {
            return Err(self.wrong("format", FORMAT));
        }
        let by_bits = match self.text("rule") {
            "bits" => true,
            "ratio" => false,
            _ => return Err(self.wrong("rule", "'bits' or 'ratio'")),
        };
        let kind = self.kind("op")?;
        let inputs = kind.inputs().iter().map(|name| self.input(&format!("input.{name}")));
        let inputs = inputs.collect::<Result<Vec<_>, _>>()?;
        let op = self.checked(StageOp { kind, inputs, weight: self.weight("weight", "weight_type")? })?;
        let op_a = match (self.metadata.contains_key("op_a"), self.weight("weight_a", "weight_a_type")?) {
            (false, None) => None,
            (has_kind, weight) => {
                let kind = if has_kind { self.kind("op_a")? } else { op.kind.clone() };
                let weight = weight.or_else(|| op.weight.clone());
                Some(self.checked(StageOp { kind, inputs: op.inputs.clone(), weight })?)
            }
        };
        let n = op.n_results();
        let expected = self.values("expected", Dtype::F64, Some(n))?.ok_or_else(|| self.missing("expected"))?;
        let expected = expected.as_chunks().0.iter().map(|b| f64::from_le_bytes(*b)).collect();
        if op_a.as_ref().is_some_and(|a| a.n_results() != n) {
            return Err(self.wrong("op_a", "an op with as many results as 'op'"));
        }
        let got = |name: &str| self.values(name, Dtype::F32, Some(n)).map(|v| v.map(|bytes| floats(&bytes)));
        let (got_a, got_b) = (got("got_a")?, got("got_b")?);
        let mut about: Vec<(String, String)> = self.metadata.iter().map(|(k, v)| (k.clone(), v.clone())).collect();
        about.sort();
        if let Some(stage) = self.metadata.get("stage")
            && Stage::parse(stage).is_err()
        {
            return Err(self.wrong("stage", "a stage"));
        }
        Ok(Bundle { op, op_a, expected, got_a, got_b, about, by_bits })
    }

    fn text(&self, key: &str) -> &str {
        self.metadata.get(key).map_or("", String::as_str)
    }

    fn wrong(&self, key: &'static str, expected: impl Into<String>) -> BundleError {
        let got = self.text(key).chars().take(80).collect();
        BundleError::Metadata { path: self.path.to_path_buf(), key, got, expected: expected.into() }
    }

    fn bad(&self, name: &str, what: String) -> BundleError {
        BundleError::Tensor { path: self.path.to_path_buf(), name: name.to_string(), what }
    }

    fn missing(&self, name: &str) -> BundleError {
        self.bad(name, "is missing".to_string())
    }

    fn checked(&self, op: StageOp) -> Result<StageOp, BundleError> {
        match op.check() {
            Ok(()) => Ok(op),
            Err(what) => Err(BundleError::Op { path: self.path.to_path_buf(), what }),
        }
    }

    fn kind(&self, key: &'static str) -> Result<Kind, BundleError> {
        let value = serde_json::from_str(self.text(key)).map_err(|_| self.wrong(key, "a JSON object"))?;
        kind_of(&value).map_err(|expected| self.wrong(key, expected))
    }

    /// The bytes of a tensor that may be absent.
    fn values(&self, name: &str, dtype: Dtype, n: Option<usize>) -> Result<Option<Vec<u8>>, BundleError> {
        let Ok(t) = self.tensors.tensor(name) else { return Ok(None) };
        if t.dtype() != dtype {
            return Err(self.bad(name, format!("has type {:?}, expected {dtype:?}", t.dtype())));
        }
        match n {
            Some(n) if t.shape() != [n] => Err(self.bad(name, format!("has shape {:?}, expected [{n}]", t.shape()))),
            _ => Ok(Some(t.data().to_vec())),
        }
    }

    /// Rows and columns of a matrix that is there.
    fn shape(&self, name: &str) -> Result<(usize, usize), BundleError> {
        let t = self.tensors.tensor(name).map_err(|_| self.missing(name))?;
        match *t.shape() {
            [n_rows, n_cols] if n_rows > 0 && n_cols > 0 => Ok((n_rows, n_cols)),
            _ => Err(self.bad(name, format!("has shape {:?}, expected rows and columns", t.shape()))),
        }
    }

    fn input(&self, name: &str) -> Result<Input, BundleError> {
        let bytes = self.values(name, Dtype::F32, None)?.ok_or_else(|| self.missing(name))?;
        Ok(Input { n_cols: self.shape(name)?.1, values: floats(&bytes) })
    }

    fn weight(&self, name: &'static str, key: &'static str) -> Result<Option<WeightData>, BundleError> {
        let Some(bytes) = self.values(name, Dtype::U8, None)? else { return Ok(None) };
        let qtype = GgmlType::ALL.into_iter().find(|t| t.name() == self.text(key));
        let qtype = qtype.ok_or_else(|| self.wrong(key, "a GGUF type that apr reads, such as Q4_K"))?;
        let (n_rows, row_bytes) = self.shape(name)?;
        if !row_bytes.is_multiple_of(qtype.block_bytes()) {
            let n = qtype.block_bytes();
            return Err(
                self.bad(name, format!("has rows of {row_bytes} bytes, expected blocks of {n}, as {qtype} has"))
            );
        }
        let n_cols = row_bytes / qtype.block_bytes() * qtype.block_len();
        let bytes = Bytes::from_vec(bytes);
        Ok(Some(WeightData { name: name.to_string(), qtype, n_cols, n_rows, n_mat: 1, bytes }))
    }
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

/// An op's kind and constants.
fn kind_json(kind: &Kind) -> Value {
    let mut out = json!({"kind": kind.name()});
    let constants = match kind {
        Kind::Norm { eps } => json!({"eps": eps}),
        Kind::Rotate { eps, head_dim, rope, position } => json!({
            "eps": eps, "head_dim": head_dim, "position": position, "inv_freq": rope.inv_freq, "magnitude": rope.magnitude,
            "pairing": if rope.pairing == Pairing::Halves { "halves" } else { "adjacent" },
        }),
        Kind::Attention { heads, kv_type } => json!({
            "n_head": heads.n_head, "n_head_kv": heads.n_head_kv, "head_dim": heads.head_dim, "kv": kv_type.to_string(),
        }),
        Kind::Route { n_used, .. } => json!({"n_used": n_used}),
        _ => json!({}),
    };
    if let (Some(out), Value::Object(constants)) = (out.as_object_mut(), constants) {
        out.extend(constants);
    }
    out
}

/// Reads what [`kind_json`] gave; the error is what was expected.
fn kind_of(v: &Value) -> Result<Kind, String> {
    let expected = |key: &str, what: &str| format!("a JSON object with {what} as '{key}'");
    let float = |v: &Value| v.as_f64().map(|v| v as f32);
    let number = |key: &str| float(&v[key]).ok_or_else(|| expected(key, "a number"));
    let size = |key: &str| {
        // Far above any model's, and products of two fit.
        let n = v[key].as_u64().filter(|n| (1..=1 << 24).contains(n)).map(|n| n as usize);
        n.ok_or_else(|| expected(key, "a size"))
    };
    Ok(match v["kind"].as_str().unwrap_or_default() {
        "product" => Kind::Product { of_expert: false },
        "expert_product" => Kind::Product { of_expert: true },
        "norm" => Kind::Norm { eps: number("eps")? },
        "bias" => Kind::Bias,
        "head_norm_rope" => {
            let inv_freq = v["inv_freq"].as_array().and_then(|a| a.iter().map(float).collect());
            let pairing = match v["pairing"].as_str() {
                Some("halves") => Pairing::Halves,
                Some("adjacent") => Pairing::Adjacent,
                _ => return Err(expected("pairing", "'halves' or 'adjacent'")),
            };
            let inv_freq = inv_freq.ok_or_else(|| expected("inv_freq", "numbers"))?;
            let position = v["position"].as_u64().and_then(|p| u32::try_from(p).ok());
            Kind::Rotate {
                eps: number("eps")?,
                head_dim: size("head_dim")?,
                rope: Rope { pairing, inv_freq, magnitude: number("magnitude")? },
                position: position.filter(|&p| p < 1 << 30).ok_or_else(|| expected("position", "a position"))?,
            }
        }
        "embedding" => Kind::Embedding,
        "attention" => Kind::Attention {
            heads: Heads { n_head: size("n_head")?, n_head_kv: size("n_head_kv")?, head_dim: size("head_dim")? },
            kv_type: v["kv"]
                .as_str()
                .and_then(|kv| kv.parse().ok())
                .ok_or_else(|| expected("kv", "f32, f16 or q8_0"))?,
        },
        "route_weights" => Kind::Route { n_used: size("n_used")?, ids: false },
        "route_ids" => Kind::Route { n_used: size("n_used")?, ids: true },
        "silu" => Kind::Silu,
        "swiglu" => Kind::Swiglu,
        "weighted_sum" => Kind::WeightedSum,
        "add" => Kind::Add,
        _ => return Err(expected("kind", "the name of an op")),
    })
}
