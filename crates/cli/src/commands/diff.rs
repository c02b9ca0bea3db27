//! `apr diff`: compares two models, devices or saved traces, and names the first difference.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use apr_engine::demo;
use apr_engine::device::Device;
use apr_engine::diff::bundle::{self, BundleError};
use apr_engine::diff::{DiffOptions, ModelSource, Prompt, Report, Source, diff, replay};
use apr_engine::{EngineOptions, Isa, KvType};

use self::fail_on::Condition;
use crate::failure::{Done, Failure, Result, USAGE, usage};
use crate::options::{DEVICES, device_of};
use crate::options::{TokenList, token_list};
use crate::print::{one_line, say};

mod fail_on;
mod report;

#[derive(clap::Args)]
pub struct Args {
    /// Side A: a GGUF file, demo, or a saved trace (a file, or the folder of --save-tensor-dir)
    a: PathBuf,
    /// Side B [default: the same file as A, run as the options for B say]
    b: Option<PathBuf>,
    /// Text to run both sides on, without the chat template
    #[arg(long, short = 'p', value_name = "TEXT", conflicts_with = "tokens", allow_hyphen_values = true)]
    prompt: Option<String>,
    /// Token ids to run both sides on, as in 1,2,3
    #[arg(long, value_name = "IDS", value_parser = token_list)]
    tokens: Option<TokenList>,
    #[command(flatten)]
    sides: SideArgs,
    /// The model behind two saved traces, for the noise between them
    #[arg(long, value_name = "FILE")]
    model: Option<PathBuf>,
    /// How many times its noise a difference may be, where the two sides do not compute the same bits
    #[arg(long, value_name = "X", default_value_t = 3.0)]
    threshold: f64,
    /// End with exit code 1 on this instead of the verdict, as in ratio>5 or mean_kld>0.01; may be given several times
    #[arg(long, value_name = "CONDITION", value_delimiter = ',')]
    fail_on: Vec<Condition>,
    /// Show every layer of every stage
    #[arg(long)]
    all: bool,
    /// Write a page that shows everything
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Write a repro of the first difference: inputs, weights and expected results of the one op, for `apr replay`
    #[arg(long, value_name = "FILE")]
    bundle: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// How the sides are run. What is not said for one side holds for both.
#[derive(clap::Args)]
struct SideArgs {
    /// Where to compute: cpu, cuda (an NVIDIA GPU), or reference (plain loops in high precision, slow)
    #[arg(long, value_name = "DEVICE", default_value = "cpu", value_parser = DEVICES)]
    device: String,
    #[arg(long, value_name = "DEVICE", value_parser = DEVICES)]
    device_a: Option<String>,
    #[arg(long, value_name = "DEVICE", value_parser = DEVICES)]
    device_b: Option<String>,
    /// Instruction set of the kernels: scalar, avx2, avx-vnni or avx512-vnni [default: the fastest of scalar, avx2 and
    /// avx512-vnni that this CPU has; avx-vnni has not run on such a CPU yet]
    #[arg(long, value_name = "ISA")]
    isa: Option<Isa>,
    #[arg(long, value_name = "ISA")]
    isa_a: Option<Isa>,
    #[arg(long, value_name = "ISA")]
    isa_b: Option<Isa>,
    /// Run the plain bodies of fused ops
    #[arg(long)]
    unfused: bool,
    #[arg(long)]
    unfused_a: bool,
    #[arg(long)]
    unfused_b: bool,
    /// Type of the KV cache: f32, f16 or q8_0
    #[arg(long, value_name = "TYPE", default_value = "f16")]
    kv: KvType,
    #[arg(long, value_name = "TYPE")]
    kv_a: Option<KvType>,
    #[arg(long, value_name = "TYPE")]
    kv_b: Option<KvType>,
    /// Threads that compute [default: all that this process may use]
    #[arg(long, short = 't', value_name = "N")]
    threads: Option<usize>,
    /// On a GPU, leave the experts of the first N layers to the CPU [default: of as few as it takes for the model to fit]
    #[arg(long, value_name = "N")]
    n_cpu_moe: Option<usize>,
    /// Positions of the context
    #[arg(long, short = 'c', visible_alias = "ctx-size", value_name = "N")]
    ctx: Option<usize>,
}

impl SideArgs {
    fn source(&self, path: &Path, is_a: bool) -> Result<Source> {
        if !is_gguf(path)? {
            self.refuse_for_trace(path, is_a)?;
            return Ok(Source::Trace(if path.is_dir() { path.join("trace.safetensors") } else { path.to_path_buf() }));
        }
        let (device, isa, unfused, kv) = match is_a {
            true => (&self.device_a, self.isa_a, self.unfused_a, self.kv_a),
            false => (&self.device_b, self.isa_b, self.unfused_b, self.kv_b),
        };
        let device = device_of(device.as_ref().unwrap_or(&self.device), self.threads, isa.or(self.isa), self.n_cpu_moe);
        let options = EngineOptions { device, kv_type: kv.unwrap_or(self.kv), n_ctx: self.ctx };
        Ok(Source::Model(ModelSource { path: path.to_path_buf(), options, unfused: unfused || self.unfused }))
    }
}

impl SideArgs {
    /// A saved trace has run already.
    fn refuse_for_trace(&self, path: &Path, is_a: bool) -> Result<()> {
        let (side, device, isa, unfused, kv) = match is_a {
            true => ("a", &self.device_a, self.isa_a, self.unfused_a, self.kv_a),
            false => ("b", &self.device_b, self.isa_b, self.unfused_b, self.kv_b),
        };
        if device.is_some() || isa.is_some() || unfused || kv.is_some() {
            let path = path.display();
            return Err(usage(format!(
                "{path} is a saved trace, which cannot be run: leave out the options for side {side}"
            )));
        }
        Ok(())
    }
}

/// Whether a path is a model; anything else is taken for a trace.
fn is_gguf(path: &Path) -> Result<bool> {
    if demo::is_meant(path) {
        return Ok(true);
    }
    if path.is_dir() {
        return Ok(false);
    }
    let mut magic = [0; 4];
    let read = File::open(path).and_then(|mut f| f.read(&mut magic));
    let n = read.map_err(|e| usage(format!("{}: {e}", path.display())))?;
    Ok(n == 4 && &magic == b"GGUF")
}

/// As diff(1) has it: whatever keeps two sides from being compared is exit code 2.
pub fn run(args: Args) -> Result<Done> {
    compare(&args).map_err(|failure| Failure { code: USAGE, ..failure })
}

fn compare(args: &Args) -> Result<Done> {
    let (a, b) = (args.sides.source(&args.a, true)?, args.sides.source(args.b.as_ref().unwrap_or(&args.a), false)?);
    let runs_alike = match (&a, &b) {
        (Source::Model(a), Source::Model(b)) => a.options == b.options && a.unfused == b.unfused,
        _ => true,
    };
    if args.b.is_none() && runs_alike {
        return Err(usage(
            "side B is not named and would run as A does: name a second file or trace, or give --device-b, --isa-b, --kv-b or --unfused-b",
        ));
    }
    if !(args.threshold.is_finite() && args.threshold > 0.0) {
        return Err(usage(format!("--threshold is {}, expected a number above 0", args.threshold)));
    }
    let scratch = tempfile::tempdir()?;
    let text = args.prompt.clone().map(Prompt::Text);
    let options = DiffOptions {
        a,
        b,
        prompt: args.tokens.clone().map(Prompt::Tokens).or(text),
        threshold: args.threshold,
        model: args.model.clone(),
        scratch: scratch.path().to_path_buf(),
    };
    let found = diff(&options).map_err(|e| Failure { code: USAGE, error: e.into() })?;
    let json = report::json(&found);
    let mut out = std::io::stdout().lock();
    let written = match args.json {
        true => writeln!(out, "{}", one_line(&json)),
        false => report::text(&found, args.all, &mut out),
    };
    // Whoever reads the first lines only still learns the verdict.
    written.or_else(|e| if e.kind() == std::io::ErrorKind::BrokenPipe { Ok(()) } else { Err(e) })?;
    if let Some(path) = &args.html {
        let page = crate::page::diff_page(&json);
        std::fs::write(path, page).map_err(|e| usage(format!("{}: {e}", path.display())))?;
    }
    if let Some(path) = &args.bundle {
        write_bundle(&options, &found, path)?;
    }
    let differs = match args.fail_on.is_empty() {
        true => !found.findings.is_empty(),
        false => args.fail_on.iter().any(|condition| condition.holds(&found)),
    };
    Ok(if differs { Done::Differs } else { Done::Ok })
}

/// Writes a repro of the first finding, or says why there is none.
fn write_bundle(options: &DiffOptions, found: &Report, path: &Path) -> Result<()> {
    let bundle = match bundle::bundle(options, found) {
        Err(none @ BundleError::None(_)) => {
            say(none);
            return Ok(());
        }
        other => other?,
    };
    bundle.write(path)?;
    let device =
        if let Source::Model(b) = &options.b { b.options.device } else { Device::Cpu { n_threads: None, isa: None } };
    let done = replay::replay(&bundle, device)?;
    let again = if done.reproduced_by.is_some() { "is there again" } else { "is not there" };
    say(format_args!(
        "wrote {}; on {}, the difference {again} when this op runs alone: apr replay {}",
        path.display(),
        done.device.name,
        path.display()
    ));
    Ok(())
}
