//! What a traced pass is printed from, and its JSON: schema `apr.trace/1`, one object.

use std::path::Path;

use apr_engine::Engine;
use apr_engine::stage::Stage;
use apr_engine::trace::anomalies::{self, Anomaly};
use apr_engine::trace::json::{global, layers, stats};
use apr_engine::trace::stats::Cost;
use apr_engine::trace::{Output, TraceRequest, Traced};
use serde_json::{Value, json};

/// Tokens that are listed where logits are.
pub const N_TOP: usize = 5;

/// A pass and what it was of.
pub struct View<'a> {
    pub engine: &'a Engine,
    pub request: &'a TraceRequest,
    pub traced: &'a Traced,
    /// The model, as it was named.
    pub path: &'a Path,
}

impl View<'_> {
    /// The text of some tokens.
    pub fn text_of(&self, tokens: &[u32]) -> String {
        let mut bytes = Vec::new();
        tokens.iter().for_each(|&id| self.engine.tokenizer.decode_bytes(id, &mut bytes, true));
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The decoded tokens.
    pub fn decoded(&self) -> Vec<u32> {
        self.traced.steps.iter().map(|s| s.token).collect()
    }

    /// Positions that the statistics are of, as they are typed.
    pub fn positions(&self) -> String {
        format!("{}..{}", self.request.positions.start, self.request.positions.end)
    }

    pub fn anomalies(&self) -> Vec<Anomaly> {
        anomalies::find(self.traced)
    }

    /// What the prompt's pass took, without looking on.
    pub fn total(&self) -> Cost {
        self.traced.stats.total()
    }

    /// The best tokens of an output, at most `n`.
    pub fn top(&self, output: &Output, n: usize) -> Vec<Value> {
        let entry = |r: &apr_engine::sampler::Ranked| json!({"token_id": r.token, "logit": r.logit, "p": r.p, "text": self.engine.tokenizer.piece(r.token)});
        output.best.iter().take(n).map(entry).collect()
    }
}

/// The report of a pass.
pub fn json(v: &View<'_>) -> Value {
    let (h, t) = (&v.engine.hparams, v.traced);
    let global = |stage| global(&t.stats, stage);
    json!({
        "schema": "apr.trace/1",
        "format": format!("GGUF ({})", h.arch),
        "architecture": h.arch.to_string(),
        "model": v.path.display().to_string(),
        "num_layers": h.n_layer,
        "hidden_dim": h.n_embd,
        "vocab_size": h.n_vocab,
        "num_heads": h.heads.n_head,
        "num_kv_heads": h.heads.n_head_kv,
        "device": v.engine.device.name,
        "precision": v.engine.session.precision().to_string(),
        "kv": v.engine.session.kv_type().to_string(),
        "fused": !v.request.unfused,
        "prompt": v.text_of(&v.request.prompt),
        "encoded_tokens": v.request.prompt,
        "positions": [v.request.positions.start, v.request.positions.end],
        "embedding": global(Stage::Embedding),
        "layers": layers(&t.stats),
        "final_norm": global(Stage::FinalNorm),
        "logits_stats": global(Stage::LmHead),
        "logits": {
            "position": t.output.position, "vocab_size": h.n_vocab, "l2_norm": t.output.stats.l2(),
            "entropy_bits": t.output.entropy, "top_k": v.top(&t.output, N_TOP),
        },
        "decode": t.steps.iter().map(|step| json_step(v, step)).collect::<Vec<_>>(),
        "anomalies": v.anomalies().iter().map(json_anomaly).collect::<Vec<_>>(),
        "time": time(v),
        "saved": t.saved.as_ref().map(|path| path.display().to_string()),
    })
}

fn json_step(v: &View<'_>, step: &apr_engine::trace::DecodeStep) -> Value {
    let output = |layer| step.stats.of(layer, Stage::PostFfnResidual).map_or(Value::Null, stats);
    let layer = |layer: usize| json!({"layer_idx": layer, "output": output(layer)});
    json!({
        "position": step.output.position, "token_id": step.token, "text": v.engine.tokenizer.piece(step.token),
        "l2_norm": step.output.stats.l2(), "entropy_bits": step.output.entropy, "top_k": v.top(&step.output, N_TOP),
        "layers": (0..step.stats.n_layer()).map(layer).collect::<Vec<_>>(),
    })
}

fn json_anomaly(a: &Anomaly) -> Value {
    let (stage, layer) = (a.place.map(|p| p.stage.name()), a.place.and_then(|p| p.layer()));
    json!({"kind": a.kind, "stage": stage, "layer": layer, "position": a.position, "text": a.text})
}

/// Time and traffic of the prompt's pass.
pub fn time(v: &View<'_>) -> Value {
    let stage = |(stage, cost): (Stage, Cost)| json!({"stage": stage.name(), "ms": ms(cost), "bytes": cost.bytes, "gb_per_s": gb_per_s(cost)});
    let stats = &v.traced.stats;
    json!({
        "total_ms": ms(v.total()),
        "stages": stats.cost_by_stage().into_iter().map(stage).collect::<Vec<_>>(),
        "layers_ms": stats.cost_by_layer().into_values().map(ms).collect::<Vec<_>>(),
    })
}

pub fn ms(cost: Cost) -> f64 {
    cost.time.as_secs_f64() * 1e3
}

/// Bytes read per second, where any were.
fn gb_per_s(cost: Cost) -> Option<f64> {
    cost.bytes.filter(|&n| n > 0).map(|n| n as f64 / cost.time.as_secs_f64() / 1e9)
}
