//! Statistics of a pass as JSON: what `apr trace --json` and the answers of served requests share (schema `apr.trace/1`).

use apr_core::stage::Stage;
use apr_core::stats::RowStats;
use serde_json::{Map, Value, json};

use super::stats::Stats;

/// One block of statistics. What is no number, as the mean of nothing, is null.
pub fn stats(s: &RowStats) -> Value {
    json!({
        "min": s.min, "max": s.max, "mean": s.mean(), "std_dev": s.std_dev(), "l2": s.l2(),
        "nan_count": s.n_nan, "inf_count": s.n_inf, "zero_count": s.n_zero, "count": s.count,
    })
}

/// Statistics of a stage that exists once; null where it was not seen.
pub fn global(all: &Stats, stage: Stage) -> Value {
    all.of(0, stage).map_or(Value::Null, stats)
}

/// All layers, in order.
pub fn layers(all: &Stats) -> Vec<Value> {
    (0..all.n_layer()).map(|index| layer(all, index)).collect()
}

/// A layer by the names of the seed, then by those of the stages.
fn layer(all: &Stats, layer: usize) -> Value {
    let mut out = Map::new();
    out.insert("layer_idx".to_string(), layer.into());
    let mut put = |name: &str, either: &[Stage]| {
        if let Some(s) = either.iter().find_map(|&stage| all.of(layer, stage)) {
            out.entry(name).or_insert_with(|| stats(s));
        }
    };
    put("attn_norm", &[Stage::AttnNorm]);
    put("qkv", &[Stage::QkvBias, Stage::QkvMatmul]);
    put("attn_out", &[Stage::AttnOut]);
    put("ffn_norm", &[Stage::FfnNorm]);
    put("ffn_out", &[Stage::FfnOut, Stage::MoeFfnOut]);
    put("output", &[Stage::PostFfnResidual]);
    Stage::all().filter(|stage| !stage.is_global()).for_each(|stage| put(stage.name(), &[stage]));
    Value::Object(out)
}
