//! A model on a GPU that does not hold all of it: which layers' experts stay in the machine's memory, and the backend that computes them.

use std::sync::{Mutex, MutexGuard};

use apr_core::backend::{Backend, FfnScratch, FfnWeights, KV_BLOCK, KvShape, Result, Routing, WeightData};
use apr_core::gguf::Gguf;
use apr_core::hparams::Hparams;
use apr_core::probe::NoProbe;
use apr_cuda::host::{HostCall, HostExperts, HostWeight};

use crate::engine::EngineError;
use crate::model_file::ModelFile;
use crate::session::SessionSettings;

/// Device memory for activations and while weights are taken apart.
const BUFFER_BYTES: u64 = 512 << 20;

/// Memory of a model on a GPU, in bytes, planned before anything is allocated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GpuPlan {
    /// What was free of the GPU's memory.
    pub free_bytes: u64,
    /// Weights on the GPU.
    pub weight_bytes: u64,
    /// Weights that stay in the machine's memory: experts of the first `n_host_layer` of `n_layer` layers.
    pub host_bytes: u64,
    pub n_host_layer: usize,
    pub n_layer: usize,
    /// Keys and values of one whole context.
    pub kv_bytes: u64,
    /// Activations, and weights while they are taken apart.
    pub buffer_bytes: u64,
}

impl GpuPlan {
    /// Plans a model; with `asked` the experts of that many layers stay on the host, without of as few as it takes.
    ///
    /// # Errors
    /// What does not fit nevertheless, or a model without experts that are asked for.
    pub(crate) fn new(
        file: &ModelFile,
        h: &Hparams,
        settings: SessionSettings,
        free_bytes: u64,
        asked: Option<usize>,
    ) -> std::result::Result<GpuPlan, EngineError> {
        if h.experts.is_none() && asked.is_some_and(|n| n > 0) {
            return Err(EngineError::NoExperts);
        }
        let (n_head_kv, head_dim) = (h.heads.n_head_kv, h.heads.head_dim);
        let kv = KvShape { n_layer: h.n_layer, n_head_kv, head_dim, kv_type: settings.kv_type };
        let kv_bytes = (settings.n_ctx.div_ceil(KV_BLOCK) as u64).saturating_mul(kv.block_bytes() as u64);
        let plan = |n_host_layer: usize| {
            let host_bytes = expert_bytes(&file.gguf, n_host_layer);
            let (weight_bytes, n_layer, buffer_bytes) = (file.file_bytes - host_bytes, h.n_layer, BUFFER_BYTES);
            GpuPlan { free_bytes, weight_bytes, host_bytes, n_host_layer, n_layer, kv_bytes, buffer_bytes }
        };
        let most = if h.experts.is_some() { h.n_layer } else { 0 };
        let plan = match asked {
            Some(n) => plan(n.min(most)),
            None => (0..=most).map(plan).find(GpuPlan::fits).unwrap_or_else(|| plan(0)),
        };
        if plan.fits() { Ok(plan) } else { Err(EngineError::GpuMemory { plan, n_ctx: settings.n_ctx }) }
    }

    fn fits(&self) -> bool {
        let need = self.weight_bytes.saturating_add(self.kv_bytes).saturating_add(self.buffer_bytes);
        need <= self.free_bytes
    }
}

/// Bytes of the experts of the first `n_layer` layers.
fn expert_bytes(gguf: &Gguf, n_layer: usize) -> u64 {
    let is_here = |name: &str| place_of(name).is_some_and(|w| w.block < n_layer);
    gguf.tensors.iter().filter(|t| is_here(&t.name)).map(|t| t.n_bytes).sum()
}

/// The parts of a block of experts, as tensors are called.
const PARTS: [&str; 3] = ["ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"];

/// Which part of which layer's experts a tensor is.
fn place_of(name: &str) -> Option<HostWeight> {
    let (layer, part) = name.strip_prefix("blk.")?.split_once('.')?;
    let part = PARTS.iter().position(|p| part.strip_suffix(".weight") == Some(p))?;
    Some(HostWeight { block: layer.parse().ok()?, part })
}

/// The experts of the first layers on another backend than the rest of the model.
pub(crate) struct HostLayers<B: Backend> {
    backend: B,
    blocks: Mutex<Blocks<B>>,
}

struct Blocks<B: Backend> {
    /// Blocks whose parts are all there.
    whole: Vec<Option<FfnWeights<B::Weight>>>,
    /// Parts of the others.
    parts: Vec<[Option<B::Weight>; 3]>,
    /// Rows and columns of an expert's matrix, by part.
    sizes: [(usize, usize); 3],
    buffers: Option<Buffers<B>>,
}

/// Buffers of a step, which all blocks use.
struct Buffers<B: Backend> {
    x: B::Tensor,
    out: B::Tensor,
    scratch: FfnScratch<B::Tensor>,
    routing: Routing<B::Tensor, B::Ids>,
}

impl<B: Backend> HostLayers<B> {
    /// The experts of the first `n_layer` layers on `backend`.
    pub(crate) fn new(backend: B, n_layer: usize) -> HostLayers<B> {
        let whole = (0..n_layer).map(|_| None).collect();
        let parts = (0..n_layer).map(|_| [None, None, None]).collect();
        HostLayers { backend, blocks: Mutex::new(Blocks { whole, parts, sizes: Default::default(), buffers: None }) }
    }

    fn blocks(&self) -> MutexGuard<'_, Blocks<B>> {
        self.blocks.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl<B: Backend> Blocks<B> {
    /// Makes blocks of the parts that have come.
    fn gather(&mut self) {
        for (whole, parts) in self.whole.iter_mut().zip(&mut self.parts) {
            if parts.iter().all(Option::is_some) {
                let [gate, up, down] = parts.each_mut().map(|w| w.take().expect("all are there"));
                *whole = Some(FfnWeights { gate, up, down });
                self.buffers = None;
            }
        }
    }

    fn weight(&self, w: HostWeight) -> &B::Weight {
        let of_whole = || self.whole[w.block].as_ref().map(|ffn| [&ffn.gate, &ffn.up, &ffn.down][w.part]);
        self.parts[w.block][w.part].as_ref().or_else(of_whole).expect("a weight that was taken")
    }
}

impl<B: Backend> Buffers<B> {
    fn new(b: &B, whole: &[Option<FfnWeights<B::Weight>>], sizes: &[(usize, usize); 3], k: usize) -> Buffers<B> {
        let [(n_ff, n_embd), _, _] = *sizes;
        let of_x: Vec<&B::Weight> = whole.iter().flatten().flat_map(|w| [&w.gate, &w.up]).collect();
        let of_gate: Vec<&B::Weight> = whole.iter().flatten().map(|w| &w.down).collect();
        Buffers {
            x: b.tensor(n_embd, &of_x),
            out: b.tensor(n_embd, &[]),
            scratch: FfnScratch {
                gate: b.tensor(k * n_ff, &of_gate),
                up: b.tensor(k * n_ff, &[]),
                down: b.tensor(k * n_embd, &[]),
            },
            // Which experts there are to choose from is nobody's concern here.
            routing: Routing { logits: b.tensor(1, &[]), ids: b.ids(k), weights: b.tensor(k, &[]) },
        }
    }
}

impl<B> HostExperts for HostLayers<B>
where
    B: Backend + Send + Sync,
    B::Tensor: Send,
    B::Ids: Send,
    B::Weight: Send,
{
    fn take(&self, data: &WeightData) -> Result<Option<HostWeight>> {
        let mut blocks = self.blocks();
        let Some(place) = place_of(&data.name).filter(|w| w.block < blocks.parts.len()) else { return Ok(None) };
        blocks.parts[place.block][place.part] = Some(self.backend.upload(data)?);
        blocks.sizes[place.part] = (data.n_rows, data.n_cols);
        Ok(Some(place))
    }

    fn experts_ffn(&self, block: usize, call: &mut HostCall) -> Result<()> {
        let b = &self.backend;
        let mut blocks = self.blocks();
        blocks.gather();
        let Blocks { whole, sizes, buffers, .. } = &mut *blocks;
        let Buffers { x, out, scratch, routing } =
            buffers.get_or_insert_with(|| Buffers::new(b, whole, sizes, call.n_used));
        b.write(x, &call.x)?;
        b.write_ids(&mut routing.ids, &call.ids)?;
        b.write(&mut routing.weights, &call.weights)?;
        let w = whole[block].as_ref().expect("gate, up and down were taken");
        b.experts_ffn(out, scratch, w, routing, x, block, &mut NoProbe)?;
        b.read(out, &mut call.out)?;
        if call.wants_parts {
            let tensors = [&scratch.up, &scratch.gate, &scratch.down];
            tensors.into_iter().zip(&mut call.parts).try_for_each(|(t, values)| b.read(t, values))?;
        }
        Ok(())
    }

    fn matmul_experts(&self, w: HostWeight, call: &mut HostCall) -> Result<()> {
        let (b, blocks) = (&self.backend, self.blocks());
        let ((n_rows, _), weight) = (blocks.sizes[w.part], blocks.weight(w));
        let n_tokens = call.ids.len() / call.n_used;
        let (mut x, mut out) = (b.tensor(call.x.len() / n_tokens, &[weight]), b.tensor(call.n_used * n_rows, &[]));
        let mut ids = b.ids(call.n_used);
        b.write(&mut x, &call.x)?;
        b.write_ids(&mut ids, &call.ids)?;
        b.matmul_experts(&mut out, weight, &ids, &x)?;
        b.read(&out, &mut call.out)
    }
}
