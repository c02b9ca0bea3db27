//! The data of a trace's page: schema `apr.trace-page/1`.

use apr_engine::bench::read_gb_per_s;
use apr_engine::sampler::Ranked;
use apr_engine::stage::Stage;
use apr_engine::trace::stats::{Followed, RouterStats, Stats};
use apr_engine::trace::{N_BEST, json};
use serde_json::{Value, json};

use super::report::{self, N_TOP, View};
use crate::options::model_name;
use crate::print::command_line;

/// All that the page shows. `n_threads` read memory for the bandwidth that is shown beside the stages'.
pub fn data(v: &View<'_>, n_threads: usize) -> Value {
    let (h, t) = (&v.engine.hparams, v.traced);
    let s = &t.stats;
    let global = |stage| s.of(0, stage).map_or(Value::Null, json::stats);
    let tokens = v.request.prompt.iter().copied().chain(v.decoded());
    let mut time = report::time(v);
    time["machine_gb_per_s"] = v.engine.session.read_bytes().map(|_| read_gb_per_s(n_threads)).into();
    json!({
        "schema": "apr.trace-page/1",
        "version": env!("CARGO_PKG_VERSION"),
        "command": command_line(),
        "model": {
            "name": model_name(v.path), "path": v.path.display().to_string(), "architecture": h.arch.to_string(),
            "sha256": v.request.save.as_ref().map(|save| save.header.model_sha256.clone()),
            "file_bytes": v.engine.file.file_bytes, "num_layers": h.n_layer, "hidden_dim": h.n_embd, "vocab_size": h.n_vocab,
            "num_heads": h.heads.n_head, "num_kv_heads": h.heads.n_head_kv,
            "n_expert": h.experts.map(|e| e.n_expert), "n_expert_used": h.experts.map(|e| e.n_expert_used),
        },
        "run": {
            "device": v.engine.device.kind, "isa": v.engine.device.isa.map(|isa| isa.to_string()),
            "precision": v.engine.session.precision().to_string(), "kv": v.engine.session.kv_type().to_string(),
            "fused": !v.request.unfused, "n_prompt": v.request.prompt.len(), "n_decode": t.steps.len(), "positions": v.positions(),
        },
        "tokens": tokens.map(|id| json!({"id": id, "text": v.engine.tokenizer.piece(id)})).collect::<Vec<_>>(),
        "embedding": global(Stage::Embedding),
        "layers": (0..s.n_layer()).map(|layer| json_layer(s, layer)).collect::<Vec<_>>(),
        "final_norm": global(Stage::FinalNorm),
        "lm_head": global(Stage::LmHead),
        "residual": residual(s),
        "experts": experts(v),
        "margin": margin(s),
        "lens": lens(v),
        "logits": {
            "position": t.output.position, "l2_norm": t.output.stats.l2(), "entropy": t.output.entropy,
            "top": top(v, &t.output.best, N_BEST),
        },
        "position_rms": position_rms(s),
        "time": time,
        "anomalies": v.anomalies().iter().map(|a| a.text.clone()).collect::<Vec<_>>(),
    })
}

fn json_layer(s: &Stats, layer: usize) -> Value {
    let of_layer = s.stages.iter().filter(|(place, _)| place.layer() == Some(layer));
    let stage = of_layer.map(|(place, s)| json!({"stage": place.stage.name(), "stats": json::stats(&s.stats)}));
    json!({"layer_idx": layer, "stages": stage.collect::<Vec<_>>()})
}

/// How the residual stream grows, what blocks add to it, and how far each layer turns it.
fn residual(s: &Stats) -> Value {
    let layers = || 0..s.n_layer();
    let rms = |layer, stage| s.of(layer, stage).map(|s| s.rms());
    let share = |layer, part: &[Stage], whole| {
        let part = part.iter().find_map(|&stage| rms(layer, stage));
        part.zip(rms(layer, whole)).map(|(part, whole)| part / whole)
    };
    let mean = |f: &Followed| f.cosine.iter().map(|c| f64::from(*c)).sum::<f64>() / f.cosine.len() as f64;
    let ffn = [Stage::MoeFfnOut, Stage::FfnOut];
    json!({
        "rms": layers().map(|l| rms(l, Stage::PostFfnResidual)).collect::<Vec<_>>(),
        "attn_share": layers().map(|l| share(l, &[Stage::AttnOut], Stage::PostAttnResidual)).collect::<Vec<_>>(),
        "ffn_share": layers().map(|l| share(l, &ffn, Stage::PostFfnResidual)).collect::<Vec<_>>(),
        "cosine": s.followed.values().map(mean).collect::<Vec<_>>(),
    })
}

fn experts(v: &View<'_>) -> Value {
    let (Some(e), routers) = (v.engine.hparams.experts, &v.traced.stats.routers) else { return Value::Null };
    let sum = |r: &RouterStats| r.load.iter().sum::<u64>() as f64;
    let entropy = |r: &RouterStats| {
        let shares = r.load.iter().filter(|&&n| n > 0).map(|&n| n as f64 / sum(r));
        shares.map(|p| -p * p.log2()).sum::<f64>()
    };
    let most = |r: &RouterStats| r.load.iter().copied().max().unwrap_or(0) as f64;
    let of = |f: &dyn Fn(&RouterStats) -> f64| routers.values().map(f).collect::<Vec<_>>();
    json!({
        "n_expert": e.n_expert, "n_expert_used": e.n_expert_used,
        "load": routers.values().map(|r| r.load.clone()).collect::<Vec<_>>(),
        "entropy": of(&entropy),
        "imbalance": of(&|r| most(r) * r.load.len() as f64 / sum(r)),
        "dead": routers.values().map(|r| r.load.iter().filter(|&&n| n == 0).count()).collect::<Vec<_>>(),
    })
}

fn margin(s: &Stats) -> Value {
    let layer = |r: &RouterStats| {
        let mut sorted: Vec<f32> = r.margin.iter().copied().filter(|m| m.is_finite()).collect();
        sorted.sort_unstable_by(f32::total_cmp);
        let at = |share: f64| sorted.get((sorted.len().saturating_sub(1) as f64 * share).round() as usize);
        json!({"min": at(0.0), "p10": at(0.1), "median": at(0.5), "p90": at(0.9)})
    };
    match s.routers.values().any(|r| !r.margin.is_empty()) {
        true => s.routers.values().map(layer).collect(),
        false => Value::Null,
    }
}

fn lens(v: &View<'_>) -> Value {
    let layer = |(layer, o): (usize, &apr_engine::trace::Output)| json!({"layer": layer, "top": top(v, &o.best, N_TOP), "entropy": o.entropy});
    match v.traced.lens.is_empty() {
        true => Value::Null,
        false => v.traced.lens.iter().enumerate().map(layer).collect(),
    }
}

fn top(v: &View<'_>, best: &[Ranked], n: usize) -> Vec<Value> {
    let entry =
        |r: &Ranked| json!({"id": r.token, "text": v.engine.tokenizer.piece(r.token), "logit": r.logit, "p": r.p});
    best.iter().take(n).map(entry).collect()
}

fn position_rms(s: &Stats) -> Value {
    match s.followed.values().next() {
        Some(first) => json!({
            "positions": first.positions, "rms": s.followed.values().map(|f| f.rms.clone()).collect::<Vec<_>>(),
        }),
        None => Value::Null,
    }
}
