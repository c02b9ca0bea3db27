//! `apr verify`: checks the project's contracts on a model, this machine and this build.

use std::io::Write;

use apr_engine::Engine;
use apr_engine::verify::{CheckResult, Measure, Outcome, VerifyOptions, VerifyReport, verify};
use serde_json::{Value, json};

use crate::failure::{Done, FAILED, Failure, Result};
use crate::options::{LoadArgs, model_name};
use crate::print::{one_line, say};

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    load: LoadArgs,
    /// Layers to hold against the reference, as in 0,24 [default: the first, one in the middle and the last]
    #[arg(long, value_name = "LAYERS", value_delimiter = ',', value_parser = number::<usize>)]
    layers: Vec<usize>,
    /// Positions to hold against the reference, as in 1,1000 [default: some early and some late ones]
    #[arg(long, value_name = "POSITIONS", value_delimiter = ',', value_parser = number::<u32>)]
    positions: Vec<u32>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

fn number<T: std::str::FromStr>(text: &str) -> std::result::Result<T, String> {
    text.trim()
        .parse()
        .map_err(|_| format!("'{text}' is no number; expected numbers with commas between them, as in 0,24"))
}

pub fn run(args: Args) -> Result<Done> {
    let mut engine = args.load.load_unchecked()?;
    let (name, device) = (model_name(&args.load.model), engine.device.name.clone());
    let mut out = std::io::stdout();
    let (mut written, mut head) = (Ok(()), format!("{name} on {device}\n"));
    let options = VerifyOptions {
        layers: Some(args.layers).filter(|layers| !layers.is_empty()),
        positions: Some(args.positions).filter(|positions| !positions.is_empty()),
    };
    let report = verify(&mut engine, &options, &mut |result| {
        if !args.json && written.is_ok() {
            written = writeln!(out, "{}{}", std::mem::take(&mut head), line(result));
        }
    })?;
    let last = if args.json { one_line(&json_of(&report, &name, &device)) } else { summary(&report) };
    let written = written.and_then(|()| writeln!(out, "{last}"));
    if !report.passed() {
        return Ok(Done::Differs); // Also to a reader who has left early.
    }
    written?;
    Ok(Done::Ok)
}

/// Verifies a model before it is asked anything, and refuses to go on where a contract is broken.
pub fn or_refuse(engine: &mut Engine) -> Result<()> {
    say("verifying the model before it answers");
    let report = verify(engine, &VerifyOptions::default(), &mut |result| {
        if result.outcome == Outcome::Failed {
            say(line(result));
        }
    })?;
    say(summary(&report));
    match report.broken().next() {
        None => Ok(()),
        Some(first) => {
            let what = format!("{}: {}", first.contract.id, first.contract.statement);
            let error = anyhow::anyhow!("the model breaks a contract ({what}), so it is not asked; see apr verify");
            Err(Failure { code: FAILED, error })
        }
    }
}

/// A result for people.
pub fn line(r: &CheckResult) -> String {
    let (mark, found) = match &r.outcome {
        Outcome::Passed => ("✓", format!("{} ({})", measured(r), r.sampled)),
        Outcome::Failed => {
            let at = r.at.map_or(String::new(), |at| format!(", first at {at}"));
            ("✗", format!("{}{at} ({})", measured(r), r.sampled))
        }
        Outcome::Skipped(why) => ("–", format!("skipped: {why}")),
    };
    format!("{mark} {:<22} {}: {found}", r.contract.id, r.contract.statement)
}

/// What was measured, and what is allowed where that is not nothing.
fn measured(r: &CheckResult) -> String {
    let number = |v: f64| if v == v.trunc() { format!("{v}") } else { format!("{v:.1e}") };
    let text = |m: Measure| {
        let allowed = if m.bound == 0.0 { String::new() } else { format!(", at most {}", number(m.bound)) };
        format!("{} {}{allowed}", number(m.value), m.unit)
    };
    r.measure.map_or(String::new(), text)
}

fn summary(report: &VerifyReport) -> String {
    let n = |outcome: fn(&Outcome) -> bool| report.results.iter().filter(|r| outcome(&r.outcome)).count();
    let (held, broken) = (n(|o| *o == Outcome::Passed), report.broken().count());
    let skipped = n(|o| matches!(o, Outcome::Skipped(_)));
    format!("{held} contracts hold, {broken} broken, {skipped} skipped; {:.1} s", report.time.as_secs_f64())
}

fn json_of(report: &VerifyReport, model: &str, device: &str) -> Value {
    json!({
        "schema": "apr.verify/1",
        "model": model,
        "device": device,
        "verdict": if report.passed() { "pass" } else { "fail" },
        "seconds": report.time.as_secs_f64(),
        "contracts": report.results.iter().map(entry).collect::<Vec<_>>(),
    })
}

fn entry(r: &CheckResult) -> Value {
    let (result, reason) = match &r.outcome {
        Outcome::Passed => ("pass", None),
        Outcome::Failed => ("fail", None),
        Outcome::Skipped(why) => ("skipped", Some(why)),
    };
    // JSON has no number for what is not a number.
    json!({
        "id": r.contract.id,
        "statement": r.contract.statement,
        "result": result,
        "reason": reason,
        "sampled": r.sampled,
        "measured": r.measure.map(|m| m.value),
        "bound": r.measure.map(|m| m.bound),
        "unit": r.measure.map(|m| m.unit),
        "stage": r.at.map(|at| at.place.stage.name()),
        "layer": r.at.and_then(|at| at.place.layer()),
        "position": r.at.map(|at| at.position),
    })
}
