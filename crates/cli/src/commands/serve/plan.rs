//! `apr serve plan`: what memory a server of a model takes and how fast it can be, without touching a weight.

use std::io::Write;
use std::num::NonZeroUsize;

use apr_engine::bench::Limits;
use apr_engine::device::{self, Device, default_threads};
use apr_engine::model_file::ModelFile;
use apr_engine::plan::{self, Plan};
use apr_engine::{EngineError, Hparams, memory};
use serde_json::{Value, json};

use crate::failure::{Done, Failure, RESOURCE, Result};
use crate::options::{LoadArgs, model_name};
use crate::print::{bytes, one_line};

#[derive(clap::Args)]
pub struct PlanArgs {
    #[command(flatten)]
    load: LoadArgs,
    /// Answers in the making at a time
    #[arg(long, env = "APR_PARALLEL", default_value = "8", value_name = "N")]
    parallel: NonZeroUsize,
    /// How fast this machine, or with --gpu the GPU, reads memory; by default the machine is measured, in less than a second
    #[arg(long, env = "APR_READ_GB_PER_S", value_name = "GB/S", value_parser = rate)]
    read_gb_per_s: Option<f64>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Tokens of the prompt whose speed is told.
const N_PROMPT: usize = 512;

/// The most tokens per second that the machine's limits allow.
struct Speed {
    read_gb_per_s: f64,
    is_measured: bool,
    /// Answers together, positions that each has, bytes of a step, and tokens per second of all.
    decode: Vec<(usize, usize, u64, f64)>,
    prefill: Option<f64>,
}

pub fn run(args: PlanArgs) -> Result<Done> {
    let (file, h) = open(&args.load)?;
    let plan = plan_of(&args.load, &file, &h, args.parallel)?;
    let speed = speed(&args, &file, &h, &plan)?;
    let refusal = plan.check().err();
    let text = match args.json {
        true => one_line(&report(&args, &plan, speed.as_ref(), refusal.as_ref())) + "\n",
        false => text(&args, &plan, speed.as_ref()),
    };
    write!(std::io::stdout(), "{text}")?;
    // A plan that does not work out is told in full, and is an error all the same; the error of a GPU tells its plan itself.
    match refusal {
        Some(e) => Err(Failure { code: RESOURCE, error: e.into() }),
        None => Ok(Done::Ok),
    }
}

/// Refuses what the machine's memory will not hold, before anything is allocated. What a GPU will not hold, loading refuses before it
/// uploads: planning here too would connect to it twice.
pub fn check(load: &LoadArgs, n_parallel: NonZeroUsize) -> Result<()> {
    if matches!(load.device(), Device::Cuda(_)) {
        return Ok(());
    }
    let (file, h) = open(load)?;
    let plan = plan_of(load, &file, &h, n_parallel)?;
    plan.check()?;
    tracing::debug!(
        kv_positions = plan.n_kv_position,
        kv_bytes = plan.kv_bytes,
        "room for keys and values, all answers together"
    );
    Ok(())
}

fn open(load: &LoadArgs) -> Result<(ModelFile, Hparams)> {
    let file = ModelFile::open(&load.model)?;
    let h = file.hparams().map_err(EngineError::from)?;
    Ok((file, h))
}

fn plan_of(load: &LoadArgs, file: &ModelFile, h: &Hparams, n_parallel: NonZeroUsize) -> Result<Plan> {
    Ok(Plan::new(load.device(), file, h, (load.kv, load.ctx), n_parallel.get())?)
}

/// `None` for a device that is not built for speed, and for a GPU that does not hold all or of which nobody said how fast it reads.
fn speed(args: &PlanArgs, file: &ModelFile, h: &Hparams, plan: &Plan) -> Result<Option<Speed>> {
    let n_ctx = plan.n_ctx;
    let (read_gb_per_s, limits) = match (&plan.gpu, args.read_gb_per_s) {
        (Some(gpu), Some(given)) if gpu.n_host_layer == 0 => (given, None),
        (Some(_), _) => return Ok(None),
        (None, given) => {
            let device = device::info(args.load.device())?;
            let Some(isa) = device.isa else { return Ok(None) };
            match given {
                Some(given) => (given, None),
                None => {
                    let limits = Limits::measure(device.n_threads.unwrap_or_else(default_threads), isa);
                    (limits.read_gb_per_s, Some(limits))
                }
            }
        }
    };
    let decode = |(n, filled): (usize, usize)| {
        let n_bytes = plan.bytes_per_step(file, h, n, filled);
        (n, filled, n_bytes, n as f64 * read_gb_per_s * 1e9 / n_bytes as f64)
    };
    let n = args.parallel.get();
    let mut cases = vec![(1, 0), (1, n_ctx), (n, 0)];
    cases.dedup();
    let prefill = limits.as_ref().map(|limits| plan::prefill_per_s(h, limits, N_PROMPT.min(n_ctx)));
    let is_measured = args.read_gb_per_s.is_none();
    Ok(Some(Speed { read_gb_per_s, is_measured, decode: cases.into_iter().map(decode).collect(), prefill }))
}

fn text(args: &PlanArgs, p: &Plan, speed: Option<&Speed>) -> String {
    let mut lines = vec![format!("{}, {} answers at a time", model_name(&args.load.model), p.n_parallel)];
    let mut line = |name: &str, n: u64, what: String| lines.push(format!("{name:<18} {:>10}  {what}", bytes(n)));
    match &p.gpu {
        None => line("weights", p.weight_bytes, "mapped from the file, shared between processes".to_string()),
        Some(gpu) => {
            line("weights", p.weight_bytes, "on the GPU".to_string());
            if gpu.n_host_layer > 0 {
                let of =
                    format!("of the first {} of {} layers, in the machine's memory", gpu.n_host_layer, gpu.n_layer);
                line("experts", gpu.host_bytes, of);
            }
        }
    }
    let n_whole = p.n_kv_position / p.n_ctx.max(1) as u64;
    let room = format!(
        "up to {} positions, {n_whole} whole contexts of {}; {} each, taken as used",
        p.n_kv_position,
        p.n_ctx,
        bytes(p.context_bytes)
    );
    line("keys and values", p.kv_bytes, room);
    line("activations", p.buffer_bytes, "of a step".to_string());
    line("total", p.total_bytes(), String::new());
    if let Some(available) = p.available_bytes {
        let of = match p.gpu {
            Some(_) => "of the GPU's memory".to_string(),
            None => memory::total().map_or(String::new(), |n| format!("of {}", bytes(n))),
        };
        line("available", available, of);
    }
    if p.spilled_bytes() > 0 {
        line("read from disk", p.spilled_bytes(), "of the weights, again and again, once all is in use".to_string());
    }
    if let Some(s) = speed {
        let how = if s.is_measured { "measured" } else { "as given" };
        lines.push(format!("at most, reading {:.1} GB/s ({how}):", s.read_gb_per_s));
        for (n, filled, n_bytes, rate) in &s.decode {
            let who = if *n == 1 { "one answer".to_string() } else { format!("{n} answers together") };
            lines.push(format!("  {rate:8.1} tok/s  {who}, {filled} positions filled, {} a step", bytes(*n_bytes)));
        }
        s.prefill.iter().for_each(|rate| {
            lines.push(format!("  {rate:8.1} tok/s  reading a prompt of {} tokens", N_PROMPT.min(p.n_ctx)));
        });
    }
    lines.iter().map(|line| line.trim_end().to_string() + "\n").collect()
}

fn report(args: &PlanArgs, p: &Plan, speed: Option<&Speed>, refusal: Option<&EngineError>) -> Value {
    let decode = |(n, filled, n_bytes, rate): &(usize, usize, u64, f64)| json!({"n_sequence": n, "depth": filled, "bytes_per_step": n_bytes, "tok_per_s": rate});
    json!({
        "schema": "apr.serve-plan/1", "model": model_name(&args.load.model), "n_ctx": p.n_ctx, "n_parallel": p.n_parallel,
        "memory": {
            "weights": p.weight_bytes, "kv": p.kv_bytes, "kv_positions": p.n_kv_position, "kv_of_a_context": p.context_bytes,
            "activations": p.buffer_bytes, "total": p.total_bytes(), "available": p.available_bytes,
            "machine": memory::total(), "read_from_disk": p.spilled_bytes(),
        },
        "gpu": p.gpu.map(|gpu| json!({
            "free": gpu.free_bytes, "weights": gpu.weight_bytes, "host_layers": gpu.n_host_layer, "host_weights": gpu.host_bytes,
        })),
        "speed": speed.map(|s| json!({
            "read_gb_per_s": s.read_gb_per_s, "measured": s.is_measured,
            "decode_at_most": s.decode.iter().map(decode).collect::<Vec<_>>(),
            "prefill_at_most": s.prefill.map(|rate| json!({"n_prompt": N_PROMPT.min(p.n_ctx), "tok_per_s": rate})),
        })),
        "refused": refusal.map(ToString::to_string),
    })
}

fn rate(text: &str) -> std::result::Result<f64, String> {
    let is_rate = |x: &f64| x.is_finite() && *x > 0.0;
    text.parse().ok().filter(is_rate).ok_or_else(|| "expected a number of GB per second".to_string())
}
