//! `apr bench`: prefill and decode speed, and the machine's read bandwidth measured in the same run.

use std::io::Write;
use std::ops::ControlFlow;

use apr_engine::bench::{BenchOptions, BenchResult, bench, read_gb_per_s};
use apr_engine::device::default_threads;
use serde_json::{Value, json};

use crate::failure::{Done, Result, usage};
use crate::options::{LoadArgs, model_name};
use crate::print::one_line;

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    load: LoadArgs,
    /// Tokens of the prefill test; 0 leaves it out
    #[arg(short = 'p', long, default_value_t = 512, value_name = "N")]
    n_prompt: usize,
    /// Tokens of the decode test; 0 leaves it out
    #[arg(short = 'n', long, default_value_t = 64, value_name = "N")]
    n_gen: usize,
    /// Tokens already in the context
    #[arg(short = 'd', long, default_value_t = 0, value_name = "N")]
    depth: usize,
    /// Counted repetitions; one more runs first and is dropped
    #[arg(long, short = 'r', default_value_t = 5, value_name = "N")]
    reps: usize,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> Result<Done> {
    if args.reps == 0 {
        return Err(usage("--reps is 0, expected at least 1"));
    }
    if args.n_prompt == 0 && args.n_gen == 0 {
        return Err(usage("-p and -n are both 0: there is nothing to measure"));
    }
    let mut engine = args.load.load()?;
    let options = BenchOptions { n_prompt: args.n_prompt, n_gen: args.n_gen, depth: args.depth, reps: args.reps };
    options.check(engine.session.n_ctx())?;
    let n_threads = args.load.threads.unwrap_or_else(default_threads);
    let (name, device) = (model_name(&args.load.model), engine.device.name.clone());
    let bandwidth = read_gb_per_s(n_threads);
    let mut out = std::io::stdout();
    if !args.json {
        writeln!(out, "{name} on {device}; this machine reads {bandwidth:.1} GB/s with {n_threads} threads")?;
        writeln!(out, "{:<16} {:>10} {:>8} {:>8} {:>12}", "test", "tok/s", "±", "GB/s", "of bandwidth")?;
    }
    let (mut results, mut written) = (Vec::new(), Ok(()));
    bench(&mut engine, options, &mut |r| {
        if !args.json {
            written = writeln!(out, "{}", line(r, bandwidth));
        }
        results.push(entry(r));
        // Nobody reads the rest when writing fails.
        if written.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    })?;
    written?;
    if args.json {
        let report = json!({
            "schema": "apr.bench/1", "model": name, "device": device, "threads": n_threads,
            "file_bytes": engine.file.file_bytes, "read_gb_per_s": bandwidth, "results": results,
        });
        writeln!(out, "{}", one_line(&report))?;
    }
    Ok(Done::Ok)
}

fn line(r: &BenchResult, bandwidth: f64) -> String {
    let gb = r.gb_per_s.map_or("-".to_string(), |g| format!("{g:.1}"));
    let share = r.gb_per_s.map_or("-".to_string(), |g| format!("{:.0} %", 100.0 * g / bandwidth));
    format!("{:<16} {:>10.2} {:>8.2} {gb:>8} {share:>12}", r.test, r.tok_per_s, r.spread_tok_per_s)
}

fn entry(r: &BenchResult) -> Value {
    json!({
        "test": r.test, "tok_per_s": r.tok_per_s, "spread_tok_per_s": r.spread_tok_per_s, "gb_per_s": r.gb_per_s,
        "read_bytes_per_token": r.bytes_per_token, "reps": r.reps,
    })
}
