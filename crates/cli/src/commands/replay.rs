//! `apr replay`: runs the op of a bundle on a device and says whether the difference is there again.

use std::io::{self, Write};
use std::path::PathBuf;

use apr_engine::diff::bundle::Bundle;
use apr_engine::diff::replay::{ELEMENT_RATIO_MAX, RATIO_MAX, Reason, Replay, replay};
use apr_engine::{Isa, Precision};
use serde_json::{Value, json};

use crate::failure::{Done, Result};
use crate::options::{DEVICES, device_of};
use crate::print::{command_line, harmless, number, one_line};

#[derive(clap::Args)]
pub struct Args {
    /// A bundle, as `apr diff --bundle` writes it
    file: PathBuf,
    /// Where to compute: cpu, cuda (an NVIDIA GPU), or reference (plain loops in high precision)
    #[arg(long, value_name = "DEVICE", default_value = "cpu", value_parser = DEVICES)]
    device: String,
    /// Instruction set of the kernels: scalar, avx2, avx-vnni or avx512-vnni [default: the fastest of scalar, avx2 and
    /// avx512-vnni that this CPU has; avx-vnni has not run on such a CPU yet]
    #[arg(long, value_name = "ISA")]
    isa: Option<Isa>,
    /// Threads that compute [default: all that this process may use]
    #[arg(long, short = 't', value_name = "N")]
    threads: Option<usize>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// As with `apr diff`, whatever keeps the op from running is exit code 2.
pub fn run(args: Args) -> Result<Done> {
    let bundle = Bundle::read(&args.file)?;
    let device = device_of(&args.device, args.threads, args.isa, None);
    let done = replay(&bundle, device)?;
    if args.json {
        writeln!(io::stdout(), "{}", one_line(&report(&args, &bundle, &done)))?;
    } else {
        text(&args, &bundle, &done, &mut io::stdout().lock())?;
    }
    Ok(if done.reproduced_by.is_some() { Done::Differs } else { Done::Ok })
}

fn report(args: &Args, bundle: &Bundle, done: &Replay) -> Value {
    let weight = bundle.op.weight.as_ref();
    json!({
        "schema": "apr.replay/1",
        "verdict": if done.reproduced_by.is_some() { "reproduces" } else { "does_not_reproduce" },
        "by": done.reproduced_by.map(Reason::name),
        "command": command_line(),
        "version": env!("CARGO_PKG_VERSION"),
        "file": args.file.to_string_lossy(),
        "op": bundle.op.kind.name(),
        "weight": weight.map(|w| json!({"type": w.qtype.name(), "n_rows": w.n_rows, "n_cols": w.n_cols})),
        "about": bundle.about.iter().cloned().collect::<std::collections::BTreeMap<_, _>>(),
        "device": done.device.kind,
        "isa": done.device.isa.map(|isa| isa.to_string()),
        "precision": precision(done.precision),
        "n_values": done.n_values,
        "error": number(done.error),
        "noise": number(done.noise),
        "ratio": number(done.ratio),
        "worst": {
            "index": done.worst, "expected": number(done.worst_expected), "got": number(done.worst_got.into()),
            "ratio": number(done.worst_ratio),
        },
        "n_bad_expected": done.n_bad_expected,
        "n_bad_got": done.n_bad_got,
        "n_differ_a": done.n_differ,
    })
}

fn precision(p: Precision) -> &'static str {
    match p {
        Precision::F32 => "f32",
        Precision::Int8 => "int8",
    }
}

fn text(args: &Args, bundle: &Bundle, done: &Replay, out: &mut impl Write) -> io::Result<()> {
    let named = |key: &str| bundle.get(key).map(|v| format!("{} {v}", key.replace('_', " ")));
    let place = ["stage", "layer", "position", "expert", "tensor", "row", "super_block"].into_iter().filter_map(named);
    let place: Vec<String> = place.collect();
    writeln!(out, "{}", harmless(&format!("{}: {}", args.file.display(), place.join(", "))))?;
    if let Some(why) = bundle.get("why") {
        writeln!(out, "found because {}", harmless(why))?;
    }
    let weight = bundle.op.weight.as_ref();
    let weight = weight.map(|w| format!(" with {} x {} weights of {}", w.n_rows, w.n_cols, w.qtype));
    writeln!(
        out,
        "ran {}{} on {}, activations {}: {} results",
        bundle.op.kind.name(),
        weight.unwrap_or_default(),
        done.device.name,
        precision(done.precision),
        done.n_values
    )?;
    writeln!(out, "\nerror {:.3e}, noise {:.3e}, ratio {:.2}", done.error, done.noise, done.ratio)?;
    writeln!(
        out,
        "worst: result {}, expected {:e}, got {:e}, {:.1} times the noise",
        done.worst, done.worst_expected, done.worst_got, done.worst_ratio
    )?;
    if let Some(n) = done.n_differ {
        writeln!(out, "with side A's weights or constants {n} results have other bits here")?;
    }
    if done.n_bad_expected + done.n_bad_got > 0 {
        writeln!(out, "no numbers: {} expected, {} got", done.n_bad_expected, done.n_bad_got)?;
    }
    let why = match done.reproduced_by {
        None => return writeln!(out, "\ndoes not reproduce: the op gives what it should"),
        Some(Reason::NotFinite) => "a result is a number on one side only".to_string(),
        Some(Reason::Ids) => "other experts are chosen".to_string(),
        Some(Reason::Ratio) => format!("the error is more than {RATIO_MAX} times the noise"),
        Some(Reason::Element) => format!("one result is more than {ELEMENT_RATIO_MAX} times the noise off"),
        Some(Reason::Bits) => "the error is within the noise, but both sides run alike and the bits differ".to_string(),
    };
    writeln!(out, "\nreproduces: {why}")
}
