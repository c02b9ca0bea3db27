//! `apr inspect`: what a model file holds. Works on files whose architecture cannot be run, and says so at the end.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;

use apr_engine::Hparams;
use apr_engine::gguf::{Array, Value};
use apr_engine::model_file::ModelFile;
use serde_json::{Map, Value as Json, json};

use crate::failure::{Done, Failure, MODEL, Result};
use crate::print::{bytes, harmless, one_line};

/// Elements of an array that are shown.
const ARRAY_SHOWN: usize = 6;
/// Characters of a string that are shown.
const STRING_SHOWN: usize = 100;

#[derive(clap::Args)]
pub struct Args {
    /// A GGUF file, any part of a split model; or demo
    model: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Tensors, weights and bytes of one quant type.
#[derive(Default)]
struct Mix {
    n_tensors: u64,
    n_weights: u64,
    n_bytes: u64,
}

pub fn run(args: Args) -> Result<Done> {
    let file = ModelFile::open(&args.model)?;
    let hparams = file.hparams();
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    if args.json {
        writeln!(out, "{}", one_line(&report(&file, hparams.as_ref().ok())))?;
    } else {
        write_text(&mut out, &file, hparams.as_ref().ok())?;
    }
    out.flush()?;
    hparams.map_err(|e| Failure { code: MODEL, error: e.into() })?;
    Ok(Done::Ok)
}

fn mix(file: &ModelFile) -> BTreeMap<&'static str, Mix> {
    let mut mix: BTreeMap<&'static str, Mix> = BTreeMap::new();
    for t in &file.gguf.tensors {
        let m = mix.entry(t.qtype.name()).or_default();
        m.n_tensors += 1;
        m.n_weights += t.ne.iter().product::<u64>();
        m.n_bytes += t.n_bytes;
    }
    mix
}

fn template(file: &ModelFile) -> Option<&str> {
    file.gguf.metadata.string("tokenizer.chat_template").ok().flatten()
}

fn write_text(out: &mut dyn Write, file: &ModelFile, h: Option<&Hparams>) -> std::io::Result<()> {
    let g = &file.gguf;
    let parts = if file.parts.len() > 1 { format!(", {} parts", file.parts.len()) } else { String::new() };
    writeln!(out, "GGUF version {}, {}{parts}, {} tensors", g.version, bytes(file.file_bytes), g.tensors.len())?;
    if let Some(h) = h {
        write_hparams(out, file, h)?;
    }
    writeln!(out, "\nquant types")?;
    for (name, m) in mix(file) {
        writeln!(out, "  {name:<8} {:>5} tensors {:>14} weights {:>12}", m.n_tensors, m.n_weights, bytes(m.n_bytes))?;
    }
    writeln!(out, "\nmetadata")?;
    for (key, value) in g.metadata.iter().filter(|(key, _)| *key != "tokenizer.chat_template") {
        writeln!(out, "  {} = {}", harmless(key), shown(value))?;
    }
    writeln!(out, "\ntensors")?;
    for t in &g.tensors {
        let shape = t.ne.iter().map(u64::to_string).collect::<Vec<_>>().join(" x ");
        writeln!(out, "  {:<40} {:<8} {shape:<24} {:>12}", harmless(&t.name), t.qtype.name(), bytes(t.n_bytes))?;
    }
    match template(file) {
        Some(source) => writeln!(out, "\nchat template\n{}", harmless(source)),
        None => writeln!(out, "\nno chat template"),
    }
}

fn write_hparams(out: &mut dyn Write, file: &ModelFile, h: &Hparams) -> std::io::Result<()> {
    writeln!(out, "\narchitecture      {}", h.arch)?;
    writeln!(out, "layers            {}", h.n_layer)?;
    writeln!(out, "embedding         {}", h.n_embd)?;
    writeln!(out, "heads             {} query, {} KV, {} wide", h.heads.n_head, h.heads.n_head_kv, h.heads.head_dim)?;
    match &h.experts {
        Some(e) => {
            writeln!(out, "experts           {} of {} per token, {} wide", e.n_expert_used, e.n_expert, e.n_ff_exp)?
        }
        None => writeln!(out, "feed-forward      {}", h.n_ff)?,
    }
    writeln!(out, "vocabulary        {}", h.n_vocab)?;
    writeln!(out, "context           {}", h.n_ctx_train)?;
    writeln!(out, "rope              base {}, {}, {} values of a head", h.rope_base, h.rope_scaling, h.n_rot)?;
    for note in &h.notes {
        writeln!(out, "                  ({note})")?;
    }
    writeln!(out, "bytes per token   {}", bytes(file.bytes_per_token(h)))
}

/// A metadata value on one line.
pub fn shown(value: &Value) -> String {
    match value {
        Value::String(s) if s.chars().count() > STRING_SHOWN => {
            let start: String = s.chars().take(STRING_SHOWN).collect();
            format!("{start:?}... ({} characters)", s.chars().count())
        }
        Value::Array(a) => {
            let first: Vec<String> = elements(a, ARRAY_SHOWN).iter().map(Json::to_string).collect();
            let more = if a.len() > first.len() { ", ..." } else { "" };
            harmless(&format!("[{}{more}] ({} elements)", first.join(", "), a.len()))
        }
        other => harmless(&scalar(other).to_string()),
    }
}

/// The first `n` elements of an array.
pub fn elements(a: &Array, n: usize) -> Vec<Json> {
    match a {
        Array::U8(v) => v.iter().take(n).map(|&x| json!(x)).collect(),
        Array::I8(v) => v.iter().take(n).map(|&x| json!(x)).collect(),
        Array::U16(v) => v.iter().take(n).map(|&x| json!(x)).collect(),
        Array::I16(v) => v.iter().take(n).map(|&x| json!(x)).collect(),
        Array::U32(v) => v.iter().take(n).map(|&x| json!(x)).collect(),
        Array::I32(v) => v.iter().take(n).map(|&x| json!(x)).collect(),
        Array::U64(v) => v.iter().take(n).map(|&x| json!(x)).collect(),
        Array::I64(v) => v.iter().take(n).map(|&x| json!(x)).collect(),
        Array::F32(v) => v.iter().take(n).map(|&x| float(x)).collect(),
        Array::F64(v) => v.iter().take(n).map(|&x| json!(x)).collect(),
        Array::Bool(v) => v.iter().take(n).map(|&x| json!(x)).collect(),
        Array::String(v) => v.iter().take(n).map(|x| json!(x)).collect(),
    }
}

fn scalar(value: &Value) -> Json {
    match value {
        Value::U8(x) => json!(x),
        Value::I8(x) => json!(x),
        Value::U16(x) => json!(x),
        Value::I16(x) => json!(x),
        Value::U32(x) => json!(x),
        Value::I32(x) => json!(x),
        Value::U64(x) => json!(x),
        Value::I64(x) => json!(x),
        Value::F32(x) => float(*x),
        Value::F64(x) => json!(x),
        Value::Bool(x) => json!(x),
        Value::String(x) => json!(x),
        Value::Array(a) => json!(elements(a, a.len())),
    }
}

/// An f32 in the fewest digits that give it back: 1e-6, not the 9.999999974752427e-7 of its widening. Null where it is no number.
fn float(x: f32) -> Json {
    json!(x.to_string().parse::<f64>().expect("a float's text is a float"))
}

fn report(file: &ModelFile, h: Option<&Hparams>) -> Json {
    let g = &file.gguf;
    let metadata: Map<String, Json> = g.metadata.iter().map(|(k, v)| (k.to_string(), scalar(v))).collect();
    let tensor = |t: &apr_engine::gguf::TensorInfo| json!({"name": t.name, "type": t.qtype.name(), "shape": t.ne, "part": t.part, "offset": t.offset, "bytes": t.n_bytes});
    let tensors: Vec<Json> = g.tensors.iter().map(tensor).collect();
    let entry = |(name, m): (&'static str, Mix)| {
        (name.to_string(), json!({"tensors": m.n_tensors, "weights": m.n_weights, "bytes": m.n_bytes}))
    };
    json!({
        "schema": "apr.inspect/1",
        "gguf_version": g.version,
        "file_bytes": file.file_bytes,
        "parts": file.parts.len(),
        "architecture": g.metadata.string("general.architecture").ok().flatten(),
        "bytes_per_token": h.map(|h| file.bytes_per_token(h)),
        "qtypes": mix(file).into_iter().map(entry).collect::<Map<_, _>>(),
        "metadata": metadata,
        "tensors": tensors,
        "chat_template": template(file),
    })
}
