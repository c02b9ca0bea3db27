//! What a server of a model would need and could do, from the model's header alone: memory before anything is allocated, and the speed
//! that the machine's limits allow.

use apr_core::backend::{KV_BLOCK, KvShape, KvType};
use apr_core::hparams::Hparams;

use crate::bench::Limits;
use crate::bench::macs::macs;
use crate::device::{self, Device};
use crate::engine::{EngineError, context};
use crate::generate::PREFILL_CHUNK;
use crate::memory;
use crate::model_file::ModelFile;
use crate::offload::GpuPlan;
use crate::scheduler::n_blocks;
use crate::session::SessionSettings;

/// Memory of a server, in bytes: of the machine's, or where there is a [`Plan::gpu`] of the GPU's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Positions of a context, and answers in the making at a time.
    pub n_ctx: usize,
    pub n_parallel: usize,
    /// The model's file, mapped, or what of it is on the GPU.
    pub weight_bytes: u64,
    /// Keys and values of one whole context.
    pub context_bytes: u64,
    /// Keys and values of all that are kept at a time, and how many positions that is.
    pub kv_bytes: u64,
    pub n_kv_position: u64,
    /// Activations of a step.
    pub buffer_bytes: u64,
    /// What the system can give, cached pages of the file among it, or what is free of the GPU's memory.
    pub available_bytes: Option<u64>,
    /// What of the model goes where, with a GPU.
    pub gpu: Option<GpuPlan>,
}

impl Plan {
    /// Plans for a model on a device; `n_ctx` as in [`EngineOptions`](crate::EngineOptions).
    ///
    /// # Errors
    /// More positions than the model was trained for, a GPU that cannot be used, or one that does not hold the model and keys and values
    /// of one whole context.
    pub fn new(
        device: Device,
        file: &ModelFile,
        h: &Hparams,
        (kv_type, n_ctx): (KvType, Option<usize>),
        n_parallel: usize,
    ) -> Result<Plan, EngineError> {
        let n_ctx = context(h, n_ctx)?;
        Ok(match device::gpu_plan(device, file, h, SessionSettings { kv_type, n_ctx })? {
            Some(gpu) => Plan::on_gpu(gpu, kv_shape(h, kv_type), n_ctx, n_parallel),
            None => Plan::on_host(file, h, (kv_type, n_ctx), n_parallel, memory::available()),
        })
    }

    fn on_host(
        file: &ModelFile,
        h: &Hparams,
        (kv_type, n_ctx): (KvType, usize),
        n_parallel: usize,
        available_bytes: Option<u64>,
    ) -> Plan {
        let plan = Plan {
            n_ctx,
            n_parallel,
            weight_bytes: file.file_bytes,
            buffer_bytes: memory::buffer_bytes(h, n_ctx.min(PREFILL_CHUNK)),
            available_bytes,
            ..Plan::default()
        };
        plan.with_kv(apr_cpu::kv::block_bytes(&kv_shape(h, kv_type)), available_bytes)
    }

    fn on_gpu(gpu: GpuPlan, kv: KvShape, n_ctx: usize, n_parallel: usize) -> Plan {
        let (weight_bytes, buffer_bytes) = (gpu.weight_bytes, gpu.buffer_bytes);
        let available_bytes = Some(gpu.free_bytes);
        let plan =
            Plan { n_ctx, n_parallel, weight_bytes, buffer_bytes, available_bytes, gpu: Some(gpu), ..Plan::default() };
        // What is left beside weights and a step's buffers.
        plan.with_kv(kv.block_bytes(), Some(gpu.free_bytes - weight_bytes - buffer_bytes))
    }

    /// With keys and values, whose blocks take `block_bytes` and for which there is so much room.
    fn with_kv(self, block_bytes: usize, room: Option<u64>) -> Plan {
        let block_bytes = block_bytes as u64;
        let n_block = n_kv_block(block_bytes, self.n_ctx, self.n_parallel, room);
        Plan {
            context_bytes: block_bytes.saturating_mul(n_blocks(self.n_ctx) as u64),
            kv_bytes: block_bytes.saturating_mul(n_block),
            n_kv_position: n_block.saturating_mul(KV_BLOCK as u64),
            ..self
        }
    }

    /// Keys and values of a block.
    fn block_bytes(&self) -> u64 {
        self.context_bytes / n_blocks(self.n_ctx).max(1) as u64
    }

    /// All of it.
    pub fn total_bytes(&self) -> u64 {
        self.weight_bytes.saturating_add(self.kv_bytes).saturating_add(self.buffer_bytes)
    }

    /// Bytes of weights that memory does not hold beside the rest, and that are read from disk again and again. A GPU holds all of its.
    pub fn spilled_bytes(&self) -> u64 {
        let on_host = self.available_bytes.filter(|_| self.gpu.is_none());
        on_host.map_or(0, |available| self.total_bytes().saturating_sub(available).min(self.weight_bytes))
    }

    /// Bytes that a step of one token for each of `n` answers reads: weights, and keys and values of `n_filled` positions each. Experts
    /// are taken to be chosen evenly, so that answers share some of them: of E experts, a token using k, `E (1 - (1 - k/E)^n)` are read.
    pub fn bytes_per_step(&self, file: &ModelFile, h: &Hparams, n: usize, n_filled: usize) -> u64 {
        let used = |e: &apr_core::hparams::Experts| {
            let (all, k) = (e.n_expert as f64, e.n_expert_used as f64);
            all * (1.0 - (1.0 - k / all).powi(n as i32)) / k
        };
        let experts = file.gguf.tensors.iter().filter(|t| t.name.ends_with("_exps.weight"));
        let expert_bytes: u64 = experts.map(|t| t.n_bytes).sum();
        let one = file.bytes_per_token(h);
        let more = h.experts.as_ref().map_or(0.0, |e| {
            let of_one = expert_bytes as f64 * e.n_expert_used as f64 / e.n_expert as f64;
            of_one * (used(e) - 1.0)
        });
        one + more as u64 + (n * n_filled) as u64 * self.block_bytes() / KV_BLOCK as u64
    }

    /// Refuses a machine that cannot hold keys and values of one whole context and activations, whatever becomes of the weights.
    ///
    /// # Errors
    /// What is needed and there, and the context that would fit.
    pub fn check(&self) -> Result<(), EngineError> {
        // What goes to a GPU was found to fit it.
        let Some(available) = self.available_bytes.filter(|_| self.gpu.is_none()) else { return Ok(()) };
        let need = self.context_bytes.saturating_add(self.buffer_bytes);
        if need <= available {
            return Ok(());
        }
        let fits = available.saturating_sub(self.buffer_bytes) / self.block_bytes().max(1) * KV_BLOCK as u64;
        Err(EngineError::KvMemory { asked: self.n_ctx, need, available, fits })
    }
}

/// Blocks of keys and values that a server keeps: as many whole contexts as answers in the making, but no more than half of the memory
/// that is left, and no less than one context.
pub fn n_kv_block(block_bytes: u64, n_ctx: usize, n_parallel: usize, available: Option<u64>) -> u64 {
    let n_whole = n_blocks(n_ctx) as u64;
    let n_wanted = n_whole.saturating_mul(n_parallel as u64);
    let n_fit = available.map_or(n_wanted, |bytes| bytes / 2 / block_bytes.max(1));
    n_wanted.min(n_fit).max(n_whole)
}

fn kv_shape(h: &Hparams, kv_type: KvType) -> KvShape {
    KvShape { n_layer: h.n_layer, n_head_kv: h.heads.n_head_kv, head_dim: h.heads.head_dim, kv_type }
}

/// The most tokens per second that the cores' multiply-adds allow for a prompt of `n_tokens`.
pub fn prefill_per_s(h: &Hparams, limits: &Limits, n_tokens: usize) -> f64 {
    n_tokens as f64 * limits.int8_macs_per_s / macs(h, 0, n_tokens, 1) as f64
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::{Engine, EngineOptions};

    const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/tiny-qwen3moe.gguf");

    fn plan(n_ctx: Option<usize>, n_parallel: usize, available: Option<u64>) -> Result<Plan, EngineError> {
        let file = ModelFile::open(Path::new(TINY)).unwrap();
        let h = file.hparams().unwrap();
        let n_ctx = context(&h, n_ctx)?;
        Ok(Plan::on_host(&file, &h, (KvType::F16, n_ctx), n_parallel, available))
    }

    #[test]
    fn keys_and_values_are_those_of_the_loaded_model() {
        let device = Device::Cpu { n_threads: Some(1), isa: None };
        let options = EngineOptions { device, kv_type: KvType::F16, n_ctx: Some(1000) };
        let engine = Engine::load(Path::new(TINY), options).unwrap();
        let plan = plan(Some(1000), 3, None).unwrap();
        assert_eq!(plan.context_bytes, engine.session.kv_bytes_of(1000));
        assert_eq!(plan.kv_bytes, 3 * plan.context_bytes);
        assert_eq!(plan.total_bytes(), plan.weight_bytes + plan.kv_bytes + plan.buffer_bytes);
        assert_eq!(plan.spilled_bytes(), 0);
        assert!(plan.check().is_ok(), "of a machine that says nothing nothing is known");
    }

    #[test]
    fn what_does_not_fit_is_refused_with_what_would() {
        let whole = plan(Some(1000), 1, None).unwrap();
        let need = whole.context_bytes + whole.buffer_bytes;
        assert!(plan(Some(1000), 4, Some(need)).unwrap().check().is_ok());
        let e = plan(Some(1000), 4, Some(need - 1)).unwrap().check().unwrap_err();
        let EngineError::KvMemory { asked: 1000, fits, .. } = e else { panic!("{e}") };
        assert!(e.is_resource() && fits < 1000, "exit code 4: {e}");
        let smaller = plan(Some(fits as usize), 1, Some(need - 1)).unwrap();
        assert!(smaller.check().is_ok(), "what is named does fit");
        assert!(plan(Some(1_000_000_000), 1, None).unwrap_err().is_usage());
        let short = plan(Some(1000), 1, Some(need)).unwrap();
        assert_eq!(short.spilled_bytes(), short.total_bytes() - need);
    }

    #[test]
    fn answers_share_weights_and_some_experts() {
        let file = ModelFile::open(Path::new(TINY)).unwrap();
        let h = file.hparams().unwrap();
        let p = plan(Some(1000), 3, None).unwrap();
        let step = |n, filled| p.bytes_per_step(&file, &h, n, filled);
        assert_eq!(step(1, 0), file.bytes_per_token(&h));
        assert!(step(2, 0) > step(1, 0) && step(2, 0) < 2 * step(1, 0));
        let experts = file.gguf.tensors.iter().filter(|t| t.name.ends_with("_exps.weight"));
        let all: u64 = experts.map(|t| t.n_bytes).sum();
        let e = h.experts.as_ref().unwrap();
        let dense = step(1, 0) - all / e.n_expert as u64 * e.n_expert_used as u64;
        assert!(step(10_000, 0).abs_diff(dense + all) <= 2, "in the end all experts are read");
        let block_bytes = apr_cpu::kv::block_bytes(&kv_shape(&h, KvType::F16)) as u64;
        assert_eq!(step(3, KV_BLOCK) - step(3, 0), 3 * block_bytes);
    }
}
