//! Options that several commands share.

use std::path::{Path, PathBuf};

use apr_engine::device::Device;
use apr_engine::{Engine, EngineOptions, Isa, KvType, Precision};

use crate::failure::Result;
use crate::print::say;

/// The model and how to load it.
#[derive(clap::Args)]
pub struct LoadArgs {
    /// A GGUF file; any part of a split model.
    pub model: PathBuf,
    /// Positions of the context [default: the smaller of the file's and 32768]
    #[arg(long, short = 'c', visible_alias = "ctx-size", env = "APR_CTX", value_name = "N")]
    pub ctx: Option<usize>,
    /// Type of the KV cache: f32, f16 or q8_0
    #[arg(long, env = "APR_KV", default_value = "f16", value_name = "TYPE")]
    pub kv: KvType,
    /// Threads that compute [default: all that this process may use]
    #[arg(long, short = 't', env = "APR_THREADS", value_name = "N")]
    pub threads: Option<usize>,
    /// Instruction set of the kernels: scalar, avx2, avx-vnni or avx512-vnni [default: the fastest of scalar and avx2
    /// that this CPU has; the others have not run on such a CPU yet]
    #[arg(long, env = "APR_ISA", value_name = "ISA")]
    pub isa: Option<Isa>,
    /// Where to compute: cpu, or reference (plain loops in high precision, slow)
    #[arg(long, env = "APR_DEVICE", default_value = "cpu", value_name = "DEVICE", value_parser = ["cpu", "reference"])]
    pub device: String,
    /// Compute on a GPU
    #[arg(long)]
    pub gpu: bool,
}

impl LoadArgs {
    /// Loads the model; what stood in for missing metadata is said on stderr.
    pub fn load(&self) -> Result<Engine> {
        let device = match self.device.as_str() {
            _ if self.gpu => Device::Gpu,
            "reference" => {
                if self.threads.is_some() || self.isa.is_some() {
                    say("note: the reference device runs plain loops on one thread; --threads and --isa do not apply");
                }
                Device::Reference { activations: Precision::F32 }
            }
            _ => Device::Cpu { n_threads: self.threads, isa: self.isa },
        };
        let engine = Engine::load(&self.model, EngineOptions { device, kv_type: self.kv, n_ctx: self.ctx })?;
        engine.hparams.notes.iter().for_each(|note| say(format_args!("note: {note}")));
        Ok(engine)
    }
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
