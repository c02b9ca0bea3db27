//! Options that several commands share.

use std::path::{Path, PathBuf};

use apr_engine::demo;
use apr_engine::device::{Cuda, Device};
use apr_engine::loading::Way;
use apr_engine::offload::GpuPlan;
use apr_engine::{Engine, EngineOptions, Isa, KvType, Precision};

use crate::failure::Result;
use crate::print::{bytes, say, show_reading};

/// What `--device` may be.
pub const DEVICES: [&str; 3] = ["cpu", "cuda", "reference"];

/// The device of a name among [`DEVICES`]. Threads and instruction set are those of the CPU, which with a GPU computes the experts of
/// some layers at most.
pub fn device_of(name: &str, n_threads: Option<usize>, isa: Option<Isa>, n_cpu_moe: Option<usize>) -> Device {
    match name {
        "cuda" => Device::Cuda(Cuda { n_cpu_moe, n_threads, isa, ..crate::gpu::CUDA }),
        "reference" => Device::Reference { activations: Precision::F32 },
        _ => Device::Cpu { n_threads, isa },
    }
}

/// The model and how to load it.
#[derive(clap::Args)]
pub struct LoadArgs {
    /// A GGUF file, any part of a split model; or demo, the small model in this program (a file of that name is ./demo)
    pub model: PathBuf,
    /// Positions of the context [default: the smaller of the file's and 32768]
    #[arg(long, short = 'c', visible_alias = "ctx-size", env = "APR_CTX", value_name = "N")]
    pub ctx: Option<usize>,
    /// Type of the KV cache: f32, f16 or q8_0
    #[arg(long, env = "APR_KV", default_value = "f16", value_name = "TYPE")]
    pub kv: KvType,
    /// Threads that compute [default: one per core that this process may use, or as many as its control groups grant CPUs]
    #[arg(long, short = 't', env = "APR_THREADS", value_name = "N")]
    pub threads: Option<usize>,
    /// Instruction set of the kernels: scalar, avx2, avx-vnni or avx512-vnni [default: the fastest of scalar, avx2 and
    /// avx512-vnni that this CPU has; avx-vnni has not run on such a CPU yet]
    #[arg(long, env = "APR_ISA", value_name = "ISA")]
    pub isa: Option<Isa>,
    /// Where to compute: cpu, cuda (an NVIDIA GPU), or reference (plain loops in high precision, slow)
    #[arg(long, env = "APR_DEVICE", default_value = "cpu", value_name = "DEVICE", value_parser = DEVICES)]
    pub device: String,
    /// Compute on a GPU; the same as --device cuda
    #[arg(long)]
    pub gpu: bool,
    /// Leave the experts of the first N layers in the machine's memory, where the CPU computes them [default: of as few layers as it takes
    /// for the model to fit the GPU]
    #[arg(long, env = "APR_N_CPU_MOE", value_name = "N")]
    pub n_cpu_moe: Option<usize>,
    /// Do not hold a GPU against the reference before a model is first used on it
    #[arg(long)]
    pub no_check: bool,
}

impl LoadArgs {
    /// Loads the model; what stood in for missing metadata is said on stderr, and how far the reading of a model is that is not in memory.
    pub fn load(&self) -> Result<Engine> {
        let engine = self.load_quietly()?;
        show_reading(engine.loading.progress());
        Ok(engine)
    }

    /// As [`load`](Self::load), without showing how far it is.
    pub fn load_quietly(&self) -> Result<Engine> {
        let mut engine = self.load_unchecked()?;
        if engine.device.kind == "cuda" && !self.no_check {
            crate::gpu::check_first_use(&mut engine, &self.model)?;
        }
        Ok(engine)
    }

    /// As [`load`](Self::load), by a command that checks the device itself.
    pub fn load_unchecked(&self) -> Result<Engine> {
        let device = self.device();
        let is_reference = matches!(device, Device::Reference { .. });
        if is_reference && (self.threads.is_some() || self.isa.is_some()) {
            say("note: the reference device runs plain loops on one thread; --threads and --isa do not apply");
        }
        if self.n_cpu_moe.is_some() && !matches!(device, Device::Cuda(_)) {
            say("note: without a GPU all experts are on the CPU; --n-cpu-moe does not apply");
        }
        if demo::is_meant(&self.model) && self.model.is_file() {
            say("note: demo is the model in this program; the file of that name is ./demo");
        }
        let engine = Engine::load(&self.model, EngineOptions { device, kv_type: self.kv, n_ctx: self.ctx })?;
        if let Some(plan) = &engine.device.plan {
            say(gpu_plan(plan));
        }
        engine.hparams.notes.iter().for_each(|note| say(format_args!("note: {note}")));
        if let Way::OnDemand { need_bytes, available_bytes } = engine.loading.way {
            let per_token = engine.file.bytes_per_token(&engine.hparams);
            say(on_demand(need_bytes, available_bytes, per_token));
        }
        Ok(engine)
    }

    /// Where to compute.
    pub fn device(&self) -> Device {
        device_of(if self.gpu { "cuda" } else { &self.device }, self.threads, self.isa, self.n_cpu_moe)
    }

    /// These options on another command line of `apr`, the model left out.
    pub fn to_args(&self) -> Vec<String> {
        let mut args = vec![format!("--kv={}", self.kv), format!("--device={}", self.device)];
        args.extend(self.ctx.map(|n| format!("--ctx={n}")));
        args.extend(self.threads.map(|n| format!("--threads={n}")));
        args.extend(self.isa.map(|isa| format!("--isa={isa}")));
        args.extend(self.gpu.then(|| "--gpu".to_string()));
        args.extend(self.n_cpu_moe.map(|n| format!("--n-cpu-moe={n}")));
        args.extend(self.no_check.then(|| "--no-check".to_string()));
        args
    }
}

/// What is said of where a model's weights are.
fn gpu_plan(plan: &GpuPlan) -> String {
    let on_gpu = format!(
        "GPU memory: {} free; weights {}, keys and values up to {}, buffers {}",
        bytes(plan.free_bytes),
        bytes(plan.weight_bytes),
        bytes(plan.kv_bytes),
        bytes(plan.buffer_bytes)
    );
    match plan.n_host_layer {
        0 => on_gpu,
        n => {
            let (host, n_layer) = (bytes(plan.host_bytes), plan.n_layer);
            format!("{on_gpu}; the experts of the first {n} of {n_layer} layers, {host}, stay in the machine's memory")
        }
    }
}

/// What is said of a model that memory does not hold. `per_token` are the bytes of weights that a token reads.
fn on_demand(need: u64, available: u64, per_token: u64) -> String {
    let from_disk = (per_token as f64 * (1.0 - available as f64 / need as f64)) as u64;
    format!(
        "note: the model has {}, {} of memory are available: weights are read from disk as needed; expect about {} of it per token",
        bytes(need),
        bytes(available),
        bytes(from_disk)
    )
}

/// The name of a model: its file without folder and ending.
pub fn model_name(path: &Path) -> String {
    path.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default()
}

/// A list of token ids, which clap would otherwise take for one id per argument.
pub type TokenList = Vec<u32>;

/// Reads token ids, as in `1,2,3`.
pub fn token_list(text: &str) -> std::result::Result<TokenList, String> {
    let id = |part: &str| part.trim().parse().map_err(|_| format!("'{}' is no token id", part.trim()));
    text.split(',').map(id).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_says_what_is_where() {
        let plan = GpuPlan {
            free_bytes: 8_000_000_000,
            weight_bytes: 5_000_000_000,
            host_bytes: 13_000_000_000,
            n_host_layer: 36,
            n_layer: 48,
            kv_bytes: 1_000_000_000,
            buffer_bytes: 500_000_000,
        };
        let text = gpu_plan(&plan);
        assert!(
            text.contains("8.00 GB free; weights 5.00 GB") && text.contains("first 36 of 48 layers, 13.00 GB"),
            "{text}"
        );
        assert!(!gpu_plan(&GpuPlan { n_host_layer: 0, ..plan }).contains("machine's memory"));
    }

    #[test]
    fn what_does_not_fit_is_read_for_every_token() {
        let text = on_demand(20_000_000_000, 15_000_000_000, 2_000_000_000);
        assert!(text.contains("has 20.00 GB, 15.00 GB of memory are available"), "{text}");
        assert!(text.ends_with("about 500.00 MB of it per token"), "{text}");
    }
}
