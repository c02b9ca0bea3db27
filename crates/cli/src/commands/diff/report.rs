//! A comparison as JSON (`apr.diff/1`) and as text.

use std::collections::BTreeSet;
use std::io::{self, Write};

use apr_engine::diff::routing::Choice;
use apr_engine::diff::verdict::{Mode, Rule, Summary};
use apr_engine::diff::{Finding, MetadataDiff, PlaceReport, Report, SideInfo};
use apr_engine::gguf::Value as MetadataValue;
use apr_engine::stage::Place;
use serde_json::{Value, json};

use crate::commands::inspect::{elements, shown};
use crate::print::{command_line, harmless, number};

/// Findings after the first that are listed.
const CULPRITS_SHOWN: usize = 32;
/// Flips of experts that are listed.
const FLIPS_SHOWN: usize = 64;

/// The report as one object.
pub fn json(r: &Report) -> Value {
    let mode = if r.isolated { "isolated+free" } else { "free" };
    let (rule, threshold) = match r.rule {
        Rule::Bits => ("bits", None),
        Rule::Ratio { threshold } => ("ratio", Some(threshold)),
    };
    let metadata: Vec<Value> = r
        .metadata
        .iter()
        .map(|m| {
            let (a, b) = metadata_values(m);
            json!({"key": m.key, "a": a, "b": b})
        })
        .collect();
    json!({
        "schema": "apr.diff/1",
        "verdict": verdict(r),
        "mode": mode,
        "rule": rule,
        "threshold": threshold,
        "command": command_line(),
        "version": env!("CARGO_PKG_VERSION"),
        "a": side(&r.a),
        "b": side(&r.b),
        "tokens": r.tokens,
        "positions": r.positions,
        "first": r.findings.first().map(finding),
        "culprits": r.findings.iter().skip(1).take(CULPRITS_SHOWN).map(finding).collect::<Vec<_>>(),
        "end": r.end.map(|e| json!({
            "n_positions": e.n_positions, "mean_kld": number(e.mean_kld), "max_kld": number(e.max_kld),
            "same_top_p": e.same_top_p, "rms_delta_p": number(e.rms_delta_p),
        })),
        "moe": moe(r),
        "stages": r.places.iter().map(|p| place(p, r.rule)).collect::<Vec<_>>(),
        "metadata": metadata,
        "notes": r.notes,
    })
}

fn verdict(r: &Report) -> &'static str {
    if r.findings.is_empty() { "same" } else { "differs" }
}

/// Both sides of a key; of long arrays the first element that differs.
fn metadata_values(m: &MetadataDiff) -> (Option<String>, Option<String>) {
    if let (Some(MetadataValue::Array(a)), Some(MetadataValue::Array(b))) = (&m.a, &m.b)
        && a.len() == b.len()
    {
        let (a, b) = (elements(a, a.len()), elements(b, b.len()));
        if let Some(i) = a.iter().zip(&b).position(|(a, b)| a != b) {
            return (Some(format!("element {i}: {}", a[i])), Some(format!("element {i}: {}", b[i])));
        }
    }
    (m.a.as_ref().map(metadata_value), m.b.as_ref().map(metadata_value))
}

/// Short text as it is, anything else as `apr inspect` shows it.
fn metadata_value(v: &MetadataValue) -> String {
    match v {
        MetadataValue::String(s) if s.len() <= 256 => s.clone(),
        other => shown(other),
    }
}

fn side(s: &SideInfo) -> Value {
    let h = &s.header;
    json!({
        "kind": if s.is_trace { "trace" } else { "model" },
        "path": s.path.to_string_lossy(),
        "producer": h.producer,
        "architecture": h.architecture,
        "device": h.device,
        "isa": (!h.isa.is_empty()).then_some(&h.isa),
        "precision": h.precision,
        "kv": h.kv,
        "fused": h.fused,
    })
}

fn finding(f: &Finding) -> Value {
    json!({
        "stage": f.place.map(|p| p.stage.name()),
        "layer": f.place.and_then(Place::layer),
        "position": f.position,
        "expert": f.spot.expert,
        "tensor": f.spot.tensor,
        "row": f.spot.row,
        "column": f.column,
        "super_block": f.spot.super_block,
        "mode": f.mode.name(),
        "error": number(f.error),
        "noise": number(f.noise),
        "ratio": number(f.ratio),
        "why": f.why,
    })
}

fn summary(s: &Summary, rule: Rule) -> Value {
    let judged = rule != Rule::Bits;
    json!({
        "error": number(s.error),
        "noise": number(s.noise),
        "ratio": if judged { number(s.ratio) } else { Value::Null },
        "max_abs": s.max_abs,
        "worst_position": s.worst_position,
        "n_differ": s.n_differ,
        "nan_a": s.n_bad_a,
        "nan_b": s.n_bad_b,
    })
}

fn place(p: &PlaceReport, rule: Rule) -> Value {
    json!({
        "stage": p.place.stage.name(),
        "layer": p.place.layer(),
        "free": p.free.as_ref().map(|s| summary(s, rule)),
        "isolated": p.isolated.as_ref().map(|s| summary(s, rule)),
        "shape": p.shape.as_ref().map(|(a, b)| json!({"a": a, "b": b})),
    })
}

/// Routes of a kind, in one layer or in all.
fn count(r: &Report, choice: Choice, layer: Option<usize>) -> usize {
    r.routes.iter().filter(|route| route.choice == choice && layer.is_none_or(|il| route.layer == il)).count()
}

fn moe(r: &Report) -> Option<Value> {
    let seen: BTreeSet<usize> = r.routes.iter().map(|route| route.layer).collect();
    seen.first()?;
    let counts = |layer| {
        json!({
            "n_equal": count(r, Choice::Equal, layer),
            "n_permuted": count(r, Choice::Permuted, layer),
            "n_flipped": count(r, Choice::Flipped, layer),
        })
    };
    let layers = seen.into_iter().map(|il| {
        let mut entry = counts(Some(il));
        entry["layer"] = json!(il);
        entry
    });
    let flips = r.flips.iter().take(FLIPS_SHOWN).map(|f| {
        json!({
            "layer": f.route.layer, "position": f.route.position, "only_a": f.route.only_a, "only_b": f.route.only_b,
            "margin": number(f.route.margin), "noise": f.noise.map(number), "near_tie": f.near_tie,
            "cost_kld": f.cost_kld.map(number),
        })
    });
    let mut out = counts(None);
    out["layers"] = layers.collect();
    out["flips"] = flips.collect();
    Some(out)
}

/// The report for people.
pub fn text(r: &Report, all: bool, out: &mut impl Write) -> io::Result<()> {
    writeln!(out, "A  {}", side_line(&r.a))?;
    writeln!(out, "B  {}", side_line(&r.b))?;
    let (n, all_positions) = (r.positions.len(), r.positions.len() == r.tokens.len());
    let positions = if all_positions { String::new() } else { format!(", {n} positions compared") };
    writeln!(out, "   {} tokens{positions}", r.tokens.len())?;
    verdict_lines(r, out)?;
    stage_lines(r, all, out)?;
    moe_lines(r, out)?;
    if let Some(e) = r.end {
        writeln!(
            out,
            "\nnext token over {} positions: Mean KLD {:.6}, max {:.6}; Same top p {:.2} %; RMS Δp {:.3} %",
            e.n_positions, e.mean_kld, e.max_kld, e.same_top_p, e.rms_delta_p
        )?;
    }
    for m in &r.metadata {
        let (a, b) = metadata_values(m);
        let show = |v: Option<String>| harmless(&v.unwrap_or("absent".to_string()));
        writeln!(out, "metadata {}: {} in A, {} in B", harmless(&m.key), show(a), show(b))?;
    }
    r.notes.iter().try_for_each(|note| writeln!(out, "note: {note}"))
}

fn side_line(s: &SideInfo) -> String {
    let h = &s.header;
    let isa = if h.isa.is_empty() { String::new() } else { format!(" {}", h.isa) };
    let fused = if h.fused { "" } else { ", unfused" };
    let trace = if s.is_trace { format!(" (trace of {})", h.producer) } else { String::new() };
    harmless(&format!(
        "{}{trace}: {}, {}{isa}, activations {}, KV {}{fused}",
        s.path.display(),
        h.architecture,
        h.device,
        h.precision,
        h.kv
    ))
}

fn verdict_lines(r: &Report, out: &mut impl Write) -> io::Result<()> {
    let rule = match r.rule {
        Rule::Bits => "both sides must compute the same bits".to_string(),
        Rule::Ratio { threshold } => {
            format!("differences may be {threshold} times the noise of the declared precisions")
        }
    };
    let Some(first) = r.findings.first() else {
        return writeln!(out, "\nsame ({rule})");
    };
    writeln!(out, "\ndiffers ({rule})")?;
    writeln!(out, "first: {}", finding_line(first))?;
    for f in r.findings.iter().skip(1).take(if r.findings.len() > 9 { 8 } else { CULPRITS_SHOWN }) {
        writeln!(out, "also:  {}", finding_line(f))?;
    }
    if r.findings.len() > 9 {
        writeln!(out, "       and {} more", r.findings.len() - 9)?;
    }
    Ok(())
}

fn finding_line(f: &Finding) -> String {
    let mut parts = vec![f.place.map_or("weights".to_string(), |p| p.stage.name().to_string())];
    parts.extend(f.place.and_then(Place::layer).map(|il| format!("layer {il}")));
    parts.extend(f.position.map(|p| format!("position {p}")));
    parts.extend(f.spot.expert.map(|e| format!("expert {e}")));
    parts.extend(f.spot.tensor.clone());
    parts.extend(f.spot.row.map(|r| format!("row {r}")));
    parts.extend(f.spot.super_block.map(|b| format!("block {b}")));
    let size = match f.mode {
        Mode::Shape | Mode::Weights => String::new(),
        _ if f.noise > 0.0 => format!(" [error {:.2e}, {:.1} times the noise]", f.error, f.ratio),
        _ => format!(" [error {:.2e}]", f.error),
    };
    harmless(&format!("{}: {}{size}", parts.join(", "), f.why))
}

/// One line per stage: the layer where it is worst. With `all`, every layer.
fn stage_lines(r: &Report, all: bool, out: &mut impl Write) -> io::Result<()> {
    if r.places.is_empty() {
        return Ok(());
    }
    writeln!(
        out,
        "\n{:<20} {:>5}  {:>10} {:>10} {:>8} {:>9}  {:>10} {:>9}",
        "stage", "layer", "isolated", "noise", "ratio", "differ", "free", "differ"
    )?;
    let mut places: Vec<&PlaceReport> = r.places.iter().collect();
    if !all {
        places.sort_by_key(|p| p.place.stage);
        places = places.chunk_by(|a, b| a.place.stage == b.place.stage).filter_map(worst).collect();
    }
    for p in places {
        let layer = p.place.layer().map_or("-".to_string(), |il| il.to_string());
        let (error, noise, ratio, differ) = columns(p.isolated.as_ref(), r.rule);
        let (free, free_noise, free_ratio, free_differ) = columns(p.free.as_ref(), r.rule);
        let (noise, ratio) = if r.isolated { (noise, ratio) } else { (free_noise, free_ratio) };
        writeln!(
            out,
            "{:<20} {layer:>5}  {error:>10} {noise:>10} {ratio:>8} {differ:>9}  {free:>10} {free_differ:>9}",
            p.place.stage.name()
        )?;
    }
    Ok(())
}

fn worst<'a>(places: &[&'a PlaceReport]) -> Option<&'a PlaceReport> {
    let of = |s: Option<Summary>| s.map_or((0.0, 0.0), |s| (if s.ratio.is_finite() { s.ratio } else { 0.0 }, s.error));
    let key = |p: &PlaceReport| (of(p.isolated), of(p.free));
    places.iter().copied().max_by(|a, b| key(a).partial_cmp(&key(b)).unwrap_or(std::cmp::Ordering::Equal))
}

fn columns(s: Option<&Summary>, rule: Rule) -> (String, String, String, String) {
    let dash = || "-".to_string();
    let Some(s) = s else { return (dash(), dash(), dash(), dash()) };
    let judged = rule != Rule::Bits;
    let noise = if judged { format!("{:.2e}", s.noise) } else { dash() };
    let ratio = if judged { format!("{:.2}", s.ratio) } else { dash() };
    (format!("{:.2e}", s.error), noise, ratio, s.n_differ.to_string())
}

fn moe_lines(r: &Report, out: &mut impl Write) -> io::Result<()> {
    if r.routes.is_empty() {
        return Ok(());
    }
    let n = |choice| count(r, choice, None);
    writeln!(
        out,
        "\nexperts of {} tokens and layers: {} equal, {} in another order, {} flipped",
        r.routes.len(),
        n(Choice::Equal),
        n(Choice::Permuted),
        n(Choice::Flipped)
    )?;
    for f in r.flips.iter().take(8) {
        let cost = f.cost_kld.map_or(String::new(), |c| format!(", costs {c:.2e} nats of the next token"));
        let tie = match f.noise {
            Some(noise) if f.near_tie => format!(", a near-tie (noise {noise:.2e})"),
            Some(noise) => format!(", no near-tie (noise {noise:.2e})"),
            None => String::new(),
        };
        let (a, b) = (&f.route.only_a, &f.route.only_b);
        writeln!(
            out,
            "  layer {} position {}: A {a:?}, B {b:?}, margin {:.2e}{tie}{cost}",
            f.route.layer, f.route.position, f.route.margin
        )?;
    }
    if r.flips.len() > 8 {
        writeln!(out, "  and {} more", r.flips.len() - 8)?;
    }
    Ok(())
}
