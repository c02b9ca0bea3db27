//! `apr bench`: prefill, decode, decode of several sequences, depth and load in one table, beside what the machine can do at best,
//! measured in the same run.

mod load;

use std::io::Write;
use std::ops::ControlFlow;
use std::time::{SystemTime, UNIX_EPOCH};

use apr_engine::bench::{ActiveWeights, BenchOptions, BenchResult, Limits, bench};
use apr_engine::device::{self, DeviceInfo, default_threads};
use apr_engine::model_file::ModelFile;
use apr_engine::{EngineError, Hparams, memory};
use serde_json::{Value, json};

use crate::failure::{Done, Result, usage};
use crate::options::{LoadArgs, model_name};
use crate::print::{bytes, one_line, rfc3339};

#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    load: LoadArgs,
    /// Tokens of the prefill tests, as in 512,2048; 0 leaves them out
    #[arg(short = 'p', long, value_delimiter = ',', default_value = "512", value_name = "N,...")]
    n_prompt: Vec<usize>,
    /// Tokens of the decode tests; 0 leaves them out
    #[arg(short = 'n', long, value_delimiter = ',', default_value = "64", value_name = "N,...")]
    n_gen: Vec<usize>,
    /// Tokens already in the context; every test runs at every depth
    #[arg(short = 'd', long, value_delimiter = ',', default_value = "0", value_name = "N,...")]
    depth: Vec<usize>,
    /// Sequences that decode together, one token each in a step
    #[arg(short = 'b', long, value_delimiter = ',', default_value = "1", value_name = "N,...")]
    batch: Vec<usize>,
    /// Counted repetitions; one more runs first and is dropped
    #[arg(long, short = 'r', default_value_t = 5, value_name = "N")]
    reps: usize,
    /// Leave out the load test: a process of its own, from its start to its first token
    #[arg(long)]
    no_load: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// What is measured, and on what.
struct Subject {
    name: String,
    file_bytes: u64,
    hparams: Hparams,
    device: DeviceInfo,
    n_threads: usize,
    kv: String,
}

pub fn run(args: Args) -> Result<Done> {
    let options = BenchOptions {
        n_prompt: args.n_prompt.clone(),
        n_gen: args.n_gen.clone(),
        depth: args.depth.clone(),
        batch: args.batch.clone(),
        reps: args.reps,
    };
    check(&args, &options)?;
    let has_tests = !options.tests().is_empty();
    let engine = has_tests.then(|| args.load.load()).transpose()?;
    let subject = match &engine {
        Some(engine) => subject(&args.load, engine.device.clone(), &engine.file)?,
        None => subject(&args.load, device::info(args.load.device())?, &ModelFile::open(&args.load.model)?)?,
    };
    let mut out = std::io::stdout();
    let mut results = Vec::new();
    let mut limits: Option<Limits> = None;
    if let Some(mut engine) = engine {
        options.check(&engine)?;
        if !args.json {
            write!(out, "{}", subject.head())?;
        }
        let mut written = Ok(());
        bench(&mut engine, &options, &mut |r| {
            limits = r.limits.map(|of_test| limits.map_or(of_test, |l| l.best(of_test)));
            results.push(entry(r));
            if !args.json {
                written = writeln!(out, "{}", line(r));
            }
            // Nobody reads the rest when writing fails.
            if written.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        })?;
        written?;
    }
    // The engine is gone by now: two processes need not hold one model.
    if !args.no_load {
        let load = load::measure(&args.load, args.reps)?;
        results.push(load.entry());
        if !args.json {
            write!(out, "{}{}", if has_tests { String::new() } else { subject.head() }, load.line())?;
        }
    }
    match args.json {
        true => writeln!(out, "{}", one_line(&subject.report(limits, results)))?,
        false => write!(out, "{}", limits.map_or(String::new(), |l| foot(&l)))?,
    }
    Ok(Done::Ok)
}

fn check(args: &Args, options: &BenchOptions) -> Result<()> {
    if args.reps == 0 {
        return Err(usage("--reps is 0, expected at least 1"));
    }
    if args.batch.contains(&0) {
        return Err(usage("-b has a 0, expected numbers of sequences of at least 1"));
    }
    if options.tests().is_empty() && args.no_load {
        return Err(usage("-p and -n are all 0, and --no-load: there is nothing to measure"));
    }
    Ok(())
}

fn subject(load: &LoadArgs, device: DeviceInfo, file: &ModelFile) -> Result<Subject> {
    let hparams = file.hparams().map_err(EngineError::from)?;
    let n_threads = device.n_threads.unwrap_or_else(default_threads);
    let (name, kv) = (model_name(&load.model), load.kv.to_string());
    Ok(Subject { name, file_bytes: file.file_bytes, hparams, device, n_threads, kv })
}

impl Subject {
    /// What stands above the table.
    fn head(&self) -> String {
        let w = ActiveWeights::of(&self.hparams);
        let titles = format!(
            "{:<16} {:>9} {:>8} {:>9} {:>7} {:>8} {:>8} {:>10} {:>8}  bound by",
            "test", "tok/s", "±", "MB/token", "GB/s", "of read", "GMAC/s", "MAC/cycle", "of int8"
        );
        let (file, layers, head) = (bytes(self.file_bytes), w.layers as f64 / 1e6, w.head as f64 / 1e6);
        format!(
            "{}, {file}, on {}, KV {}; a token meets {layers:.1} M weights and {head:.1} M of the output matrix\n{titles}\n",
            self.name, self.device.name, self.kv
        )
    }

    fn report(&self, limits: Option<Limits>, results: Vec<Value>) -> Value {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let w = ActiveWeights::of(&self.hparams);
        json!({
            "schema": "apr.bench/2", "version": env!("CARGO_PKG_VERSION"), "date": rfc3339(now),
            "machine": {
                "cpu": cpu_model(), "arch": std::env::consts::ARCH, "os": std::env::consts::OS,
                "cpus": std::thread::available_parallelism().map_or(1, |n| n.get()), "memory_bytes": memory::total(),
            },
            "model": self.name, "architecture": self.hparams.arch.to_string(), "file_bytes": self.file_bytes,
            "active_weights": w.layers, "head_weights": w.head,
            "device": self.device.name, "isa": self.device.isa.map(|isa| isa.to_string()), "threads": self.n_threads,
            "kv": self.kv, "limits": limits.as_ref().map(limits_entry), "results": results,
        })
    }
}

/// What the CPU calls itself; the name of its architecture where it has none.
fn cpu_model() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    cpu_of(&text).unwrap_or(std::env::consts::ARCH.to_string())
}

/// The name in a `/proc/cpuinfo` with family and model, since CPUs of two generations may both be called "AMD EPYC".
fn cpu_of(cpuinfo: &str) -> Option<String> {
    let fields = || cpuinfo.lines().filter_map(|line| line.split_once(':'));
    let of = |field| fields().find_map(|(name, value)| (name.trim() == field).then_some(value.trim()));
    let name = of("model name")?;
    Some(match (of("cpu family"), of("model")) {
        (Some(family), Some(model)) => format!("{name} (family {family}, model {model})"),
        _ => name.to_string(),
    })
}

fn percent(share: f64) -> String {
    format!("{:.0} %", 100.0 * share)
}

fn line(r: &BenchResult) -> String {
    let or_dash = |text: Option<String>| text.unwrap_or("-".to_string());
    let (gb, of_read) = (or_dash(r.gb_per_s().map(|g| format!("{g:.1}"))), or_dash(r.share_of_read().map(percent)));
    let (bound, of_int8) = (or_dash(r.bound().map(|b| b.to_string())), or_dash(r.share_of_int8().map(percent)));
    let per_cycle = or_dash(r.limits.map(|l| format!("{:.2}", l.per_cycle_and_core(r.macs_per_s()))));
    let (mb, gmac) = (or_dash(r.bytes_per_token.map(|b| format!("{:.1}", b as f64 / 1e6))), r.macs_per_s() / 1e9);
    format!(
        "{:<16} {:>9.2} {:>8.2} {mb:>9} {gb:>7} {of_read:>8} {gmac:>8.1} {per_cycle:>10} {of_int8:>8}  {bound}",
        r.test.to_string(),
        r.tok_per_s,
        r.spread_tok_per_s
    )
}

/// What stands below the table.
fn foot(l: &Limits) -> String {
    let (gmac, per_cycle) = (l.int8_macs_per_s / 1e9, l.per_cycle_and_core(l.int8_macs_per_s));
    let (gb, clock, n_threads) = (l.read_gb_per_s, l.clock_hz / 1e9, l.n_threads);
    let threads = if n_threads == 1 { "1 thread".to_string() } else { format!("{n_threads} threads") };
    format!(
        "this machine with {threads}: reads {gb:.1} GB/s; {gmac:.1} GMAC/s of int8, {per_cycle:.1} per cycle and core, \
         at {clock:.2} GHz; MAC/cycle are per core\n"
    )
}

fn entry(r: &BenchResult) -> Value {
    json!({
        "test": r.test.to_string(), "tok_per_s": r.tok_per_s, "spread_tok_per_s": r.spread_tok_per_s, "reps": r.reps,
        "read_bytes_per_token": r.bytes_per_token, "gb_per_s": r.gb_per_s(), "share_of_read": r.share_of_read(),
        "mac_per_token": r.macs_per_token, "gmac_per_s": r.macs_per_s() / 1e9,
        "mac_per_cycle_per_core": r.limits.map(|l| l.per_cycle_and_core(r.macs_per_s())), "share_of_int8": r.share_of_int8(),
        "bound_by": r.bound().map(|b| b.to_string()), "limits": r.limits.as_ref().map(limits_entry),
    })
}

fn limits_entry(l: &Limits) -> Value {
    json!({
        "read_gb_per_s": l.read_gb_per_s, "int8_gmac_per_s": l.int8_macs_per_s / 1e9,
        "int8_mac_per_cycle_per_core": l.per_cycle_and_core(l.int8_macs_per_s), "clock_ghz": l.clock_hz / 1e9,
    })
}

#[cfg(test)]
mod tests {
    use super::cpu_of;

    #[test]
    fn two_generations_of_one_name_are_told_apart() {
        let cpuinfo = |model: u8| {
            format!("processor\t: 0\ncpu family\t: 25\nmodel\t\t: {model}\nmodel name\t: AMD EPYC\nstepping\t: 1\n")
        };
        assert_eq!(cpu_of(&cpuinfo(1)).unwrap(), "AMD EPYC (family 25, model 1)");
        assert_eq!(cpu_of(&cpuinfo(17)).unwrap(), "AMD EPYC (family 25, model 17)");
        assert_eq!(cpu_of("processor : 0\nmodel name : Cortex\n").unwrap(), "Cortex");
        assert_eq!(cpu_of("processor : 0\n"), None);
    }
}
