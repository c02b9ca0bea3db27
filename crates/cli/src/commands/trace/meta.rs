//! `apr trace` without a pass: the model's stages, shapes and layers from the file's metadata. No weight is read.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

use apr_engine::gguf::TensorInfo;
use apr_engine::model_file::ModelFile;
use apr_engine::stage::Stage;
use apr_engine::{Hparams, models};
use serde_json::{Value, json};

use crate::failure::{Done, Failure, MODEL, Result};
use crate::print::{bytes, harmless, one_line, say};

/// Columns of attention's scores: one for each position so far.
const N_KV: &str = "n_kv";

/// Prints what the metadata says about a pass.
pub fn run(path: &Path, as_json: bool) -> Result<Done> {
    let file = ModelFile::open(path)?;
    let h = file.hparams().map_err(|e| Failure { code: MODEL, error: e.into() })?;
    h.notes.iter().for_each(|note| say(format_args!("note: {note}")));
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    if as_json {
        writeln!(out, "{}", one_line(&report(&file, &h)))?;
    } else {
        write_text(&mut out, &file, &h)?;
    }
    out.flush()?;
    Ok(Done::Ok)
}

/// The shape of a stage for one position; the number of positions so far has a name instead.
fn shape(h: &Hparams, stage: Stage) -> Vec<Value> {
    let grows = matches!(stage, Stage::AttnScores | Stage::AttnSoftmax);
    let mut shape: Vec<Value> = models::stage_shape(h, stage, 0).into_iter().map(Value::from).collect();
    if let (true, Some(last)) = (grows, shape.last_mut()) {
        *last = N_KV.into();
    }
    shape
}

/// Tensors of layer `il`, or of none.
fn tensors_of(file: &ModelFile, il: Option<usize>) -> impl Iterator<Item = &TensorInfo> {
    let layer_of = |t: &TensorInfo| t.name.strip_prefix("blk.")?.split_once('.')?.0.parse::<usize>().ok();
    file.gguf.tensors.iter().filter(move |t| layer_of(t) == il)
}

fn n_weights<'a>(tensors: impl Iterator<Item = &'a TensorInfo>) -> u64 {
    tensors.map(|t| t.ne.iter().product::<u64>()).sum()
}

fn report(file: &ModelFile, h: &Hparams) -> Value {
    let stages = models::stages(h, &file.gguf);
    let stage = |s: &Stage| json!({"stage": s.name(), "per_layer": !s.is_global(), "shape": shape(h, *s)});
    let tensor = |t: &TensorInfo| json!({"name": t.name, "type": t.qtype.name(), "shape": t.ne, "bytes": t.n_bytes});
    let layer = |il: usize| {
        json!({
            "layer_idx": il, "name": format!("blk.{il}"), "hidden_dim": h.n_embd,
            "parameters": n_weights(tensors_of(file, Some(il))),
            "bytes": tensors_of(file, Some(il)).map(|t| t.n_bytes).sum::<u64>(),
            "tensors": tensors_of(file, Some(il)).map(tensor).collect::<Vec<_>>(),
        })
    };
    json!({
        "schema": "apr.trace-meta/1",
        "file": file.path.display().to_string(),
        "format": format!("GGUF ({})", h.arch),
        "architecture": h.arch.to_string(),
        "stats_source": "metadata-only",
        "num_layers": h.n_layer,
        "hidden_dim": h.n_embd,
        "vocab_size": h.n_vocab,
        "num_heads": h.heads.n_head,
        "num_kv_heads": h.heads.n_head_kv,
        "head_dim": h.heads.head_dim,
        "n_expert": h.experts.map(|e| e.n_expert),
        "n_expert_used": h.experts.map(|e| e.n_expert_used),
        "feed_forward_dim": h.experts.map_or(h.n_ff, |e| e.n_ff_exp),
        "context_length": h.n_ctx_train,
        "file_bytes": file.file_bytes,
        "notes": h.notes,
        "stages": stages.iter().map(stage).collect::<Vec<_>>(),
        "tensors": tensors_of(file, None).map(tensor).collect::<Vec<_>>(),
        "layers": (0..h.n_layer).map(layer).collect::<Vec<_>>(),
        "summary": {"total_layers": h.n_layer, "total_parameters": n_weights(file.gguf.tensors.iter())},
    })
}

fn write_text(out: &mut dyn Write, file: &ModelFile, h: &Hparams) -> std::io::Result<()> {
    let n = n_weights(file.gguf.tensors.iter());
    writeln!(out, "{}, {} layers, {n} parameters, {}", h.arch, h.n_layer, bytes(file.file_bytes))?;
    writeln!(out, "\n{:<20} {:<9} shape for one position", "stage", "where")?;
    for stage in models::stages(h, &file.gguf) {
        let shape: Vec<String> = shape(h, stage).iter().map(|n| n.to_string().replace('"', "")).collect();
        let place = if stage.is_global() { "once" } else { "per layer" };
        writeln!(out, "{:<20} {place:<9} {}", stage.name(), shape.join(" x "))?;
    }
    writeln!(out, "\n{:<12} {:>14} {:>12}  tensor types", "layer", "parameters", "bytes")?;
    let mut line = |name: String, il: Option<usize>| {
        let mut types: BTreeMap<&str, u32> = BTreeMap::new();
        tensors_of(file, il).for_each(|t| *types.entry(t.qtype.name()).or_default() += 1);
        let types: Vec<String> = types.iter().map(|(name, n)| format!("{n} {name}")).collect();
        let (n, size) = (n_weights(tensors_of(file, il)), tensors_of(file, il).map(|t| t.n_bytes).sum());
        writeln!(out, "{:<12} {n:>14} {:>12}  {}", harmless(&name), bytes(size), types.join(", "))
    };
    (0..h.n_layer).try_for_each(|il| line(il.to_string(), Some(il)))?;
    line("other".to_string(), None)?;
    writeln!(out, "\nadd --payload or --prompt TEXT to run the forward pass")
}
