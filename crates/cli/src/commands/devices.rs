//! `apr devices`: what models can be computed on.

use std::io::Write;

use apr_engine::device::{ConnectError, Description, Device, Nvrtc, info, nvidia_devices, nvidia_driver_version};
use serde_json::{Value, json};

use crate::failure::{Done, Result};
use crate::print::{bytes, one_line};

#[derive(clap::Args)]
pub struct Args {
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// What was found, or why nothing was.
struct Found {
    cpu: String,
    gpus: std::result::Result<Vec<Description>, ConnectError>,
    /// Asked only where there is a GPU.
    compiler: Option<std::result::Result<Nvrtc, String>>,
}

pub fn run(args: Args) -> Result<Done> {
    let gpus = nvidia_devices();
    let toolchain = crate::gpu::toolchain();
    let find = || {
        let newest = nvidia_driver_version().map_err(|e| e.to_string())? / 1000;
        let (folders, prefixes) = (&toolchain.nvrtc_folders, &toolchain.python_prefixes);
        Nvrtc::find(folders, prefixes, Some(newest)).map_err(|e| e.to_string())
    };
    let compiler = gpus.as_ref().ok().map(|_| find());
    let found = Found { cpu: info(Device::Cpu { n_threads: None, isa: None })?.name, gpus, compiler };
    let mut out = std::io::stdout();
    match args.json {
        true => writeln!(out, "{}", one_line(&to_json(&found)))?,
        false => write!(out, "{}", to_text(&found))?,
    }
    Ok(Done::Ok)
}

fn to_text(found: &Found) -> String {
    let mut text = format!("{}\n", found.cpu);
    match &found.gpus {
        Ok(gpus) => {
            for (i, d) in gpus.iter().enumerate() {
                let (name, memory, n_sm) = (&d.name, bytes(d.total_bytes), d.n_sm);
                text += &format!("cuda {i} ({name}, sm_{}, {memory}, {n_sm} multiprocessors)\n", d.arch);
            }
        }
        Err(e) => text += &format!("cuda: {e}\n"),
    }
    match &found.compiler {
        Some(Ok(nvrtc)) => {
            let (major, minor) = nvrtc.version;
            text += &format!("kernels are compiled by NVRTC {major}.{minor} of {}\n", nvrtc.path.display());
        }
        Some(Err(e)) => text += &format!("kernels: {e}\n"),
        None => {}
    }
    text + "reference (plain loops in high precision, slow)\n"
}

fn to_json(found: &Found) -> Value {
    let gpu = |(i, d): (usize, &Description)| {
        let compute = format!("{}.{}", d.arch / 10, d.arch % 10);
        json!({
            "device": "cuda", "ordinal": i, "name": d.name, "compute_capability": compute,
            "memory_bytes": d.total_bytes, "multiprocessors": d.n_sm,
        })
    };
    let (gpus, error) = match &found.gpus {
        Ok(gpus) => (gpus.iter().enumerate().map(gpu).collect(), None),
        Err(e) => (Vec::new(), Some(e.to_string())),
    };
    let compiler = found.compiler.as_ref().map(|c| match c {
        Ok(nvrtc) => {
            json!({"version": format!("{}.{}", nvrtc.version.0, nvrtc.version.1), "path": nvrtc.path.to_string_lossy()})
        }
        Err(e) => json!({"error": e}),
    });
    json!({"schema": "apr.devices/1", "cpu": found.cpu, "gpus": gpus, "gpu_error": error, "nvrtc": compiler})
}

#[cfg(test)]
mod tests {
    use super::*;

    fn h200() -> Description {
        Description { name: "NVIDIA H200".to_string(), arch: 90, n_sm: 132, total_bytes: 150_754_820_096 }
    }

    #[test]
    fn a_gpu_and_a_missing_compiler_are_named() {
        let compiler = Some(Err("libnvrtc is not found".to_string()));
        let found = Found { cpu: "cpu (avx2, 2 threads)".to_string(), gpus: Ok(vec![h200()]), compiler };
        let text = to_text(&found);
        assert!(text.contains("cuda 0 (NVIDIA H200, sm_90, 150.75 GB, 132 multiprocessors)\n"), "{text}");
        assert!(text.contains("kernels: libnvrtc is not found\n"), "{text}");
        let json = to_json(&found);
        assert_eq!(json["gpus"][0]["compute_capability"], "9.0");
        assert_eq!(json["nvrtc"]["error"], "libnvrtc is not found");
    }

    #[test]
    fn without_a_driver_the_reason_is_given() {
        let found = Found { cpu: "cpu".to_string(), gpus: Err(ConnectError::NoDriver), compiler: None };
        assert!(
            to_text(&found).contains("cuda: no GPU: NVIDIA's driver (libcuda) is not found"),
            "{}",
            to_text(&found)
        );
        assert_eq!(to_json(&found)["gpus"], json!([]));
    }
}
