//! A traced pass for people: one line per stage and layer, the logits, and what is odd.

use std::io::{Result, Write};

use apr_engine::RowStats;
use apr_engine::stage::Stage;
use apr_engine::trace::Output;

use super::report::{N_TOP, View, ms};
use crate::print::harmless;

/// Prints the pass.
pub fn write(out: &mut dyn Write, v: &View<'_>) -> Result<()> {
    header(out, v)?;
    stages(out, v)?;
    logits(out, v, &v.traced.output)?;
    decode(out, v)?;
    summary(out, v)
}

fn header(out: &mut dyn Write, v: &View<'_>) -> Result<()> {
    let (h, session) = (&v.engine.hparams, &v.engine.session);
    let experts = h.experts.map_or(String::new(), |e| format!(", experts {} of {}", e.n_expert_used, e.n_expert));
    writeln!(out, "Architecture: {}   Layers: {}   Hidden: {}   Vocab: {}", h.arch, h.n_layer, h.n_embd, h.n_vocab)?;
    writeln!(out, "Heads: {} query, {} KV{experts}", h.heads.n_head, h.heads.n_head_kv)?;
    let ops = if v.request.unfused { "unfused" } else { "fused" };
    let (precision, kv) = (session.precision(), session.kv_type());
    writeln!(out, "Device: {}, activations {precision}, KV {kv}, ops {ops}", v.engine.device.name)?;
    let ids: Vec<String> = v.request.prompt.iter().take(32).map(u32::to_string).collect();
    let more = if v.request.prompt.len() > ids.len() { " ..." } else { "" };
    writeln!(out, "Prompt: {}", shown(&v.text_of(&v.request.prompt), 200))?;
    writeln!(out, "Tokens: {} ({}{more})", v.request.prompt.len(), ids.join(" "))?;
    writeln!(out, "Statistics of positions {}", v.positions())
}

/// Text of strangers, quoted, on one line.
fn shown(text: &str, n: usize) -> String {
    let start: String = text.chars().take(n).collect();
    let more = if text.chars().count() > n { " ..." } else { "" };
    format!("{:?}{more}", harmless(&start))
}

fn stages(out: &mut dyn Write, v: &View<'_>) -> Result<()> {
    let stats = &v.traced.stats;
    let columns = ["mean", "std", "min", "max", "L2", "NaN", "Inf"];
    write!(out, "\n{:<22}", "stage")?;
    columns.iter().try_for_each(|c| write!(out, " {c:>w$}", w = if matches!(*c, "NaN" | "Inf") { 6 } else { 11 }))?;
    writeln!(out)?;
    let line = |out: &mut dyn Write, name: &str, s: Option<&RowStats>| s.map_or(Ok(()), |s| row(out, name, s));
    line(out, "embedding", stats.of(0, Stage::Embedding))?;
    let n_layer = stats.n_layer();
    for layer in 0..n_layer {
        let of_layer = || stats.stages.iter().filter(|(place, _)| place.layer() == Some(layer));
        let verdict = if of_layer().all(|(_, s)| s.first_bad.is_none()) { "OK" } else { "NOT FINITE" };
        writeln!(out, "layer {layer}/{n_layer} [{verdict}]")?;
        of_layer().try_for_each(|(place, s)| row(out, &format!("  {}", place.stage.name()), &s.stats))?;
    }
    line(out, "final_norm", stats.of(0, Stage::FinalNorm))?;
    line(out, "lm_head", stats.of(0, Stage::LmHead))
}

fn row(out: &mut dyn Write, name: &str, s: &RowStats) -> Result<()> {
    write!(out, "{name:<22}")?;
    for value in [s.mean(), s.std_dev(), f64::from(s.min), f64::from(s.max), s.l2()] {
        write!(out, " {:>11}", number(value))?;
    }
    writeln!(out, " {:>6} {:>6}", s.n_nan, s.n_inf)
}

/// Five digits that count. Nothing finite is a dash.
fn number(value: f64) -> String {
    match value.abs() {
        _ if !value.is_finite() => "-".to_string(),
        0.0 => "0".to_string(),
        a if (1e-3..1e5).contains(&a) => format!("{value:.*}", (4 - a.log10().floor() as i32).max(0) as usize),
        _ => format!("{value:.3e}"),
    }
}

fn logits(out: &mut dyn Write, v: &View<'_>, o: &Output) -> Result<()> {
    let (n_vocab, l2) = (v.engine.hparams.n_vocab, number(o.stats.l2()));
    writeln!(
        out,
        "\nlogits of position {}: {n_vocab} tokens, L2 {l2}, entropy {} bits",
        o.position,
        number(o.entropy)
    )?;
    for (i, r) in o.best.iter().take(N_TOP).enumerate() {
        let text = shown(&v.engine.tokenizer.piece(r.token), 60);
        writeln!(out, "  {}. token {:<8} logit {:>9.4}  p {:.4}  {text}", i + 1, r.token, r.logit, r.p)?;
    }
    Ok(())
}

fn decode(out: &mut dyn Write, v: &View<'_>) -> Result<()> {
    if v.traced.steps.is_empty() {
        return Ok(());
    }
    writeln!(out, "\ndecoded {}", shown(&v.text_of(&v.decoded()), 400))?;
    for step in &v.traced.steps {
        let last = step.stats.n_layer().checked_sub(1).and_then(|il| step.stats.of(il, Stage::PostFfnResidual));
        let residual = last.map_or("-".to_string(), |s| number(s.std_dev()));
        let text = shown(&v.engine.tokenizer.piece(step.token), 60);
        let (position, l2) = (step.output.position, number(step.output.stats.l2()));
        let token = step.token;
        writeln!(
            out,
            "  position {position:<6} token {token:<8} residual std {residual:>9}  logits L2 {l2:>9}  {text}"
        )?;
    }
    Ok(())
}

fn summary(out: &mut dyn Write, v: &View<'_>) -> Result<()> {
    let (total, n) = (v.total(), v.request.prompt.len());
    let rate = n as f64 / total.time.as_secs_f64();
    writeln!(out, "\nsummary")?;
    writeln!(out, "  prompt of {n} tokens in {:.1} ms ({rate:.1} tok/s), looking on not counted", ms(total))?;
    let anomalies = v.anomalies();
    if anomalies.is_empty() {
        let n: u64 = v.traced.stats.stages.values().map(|s| s.stats.count).sum();
        writeln!(out, "  nothing odd: all {n} values seen are finite, and none of the checks found anything")?;
    }
    anomalies.iter().try_for_each(|a| writeln!(out, "  anomaly: {}", a.text))
}
