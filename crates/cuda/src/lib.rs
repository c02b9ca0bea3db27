//! The CUDA backend: the ops of the models as kernels that are compiled on the user's machine.
//!
//! Ops put launches in a queue; a step hands its queue to the device as one, which replays it where it has run it before. An op whose
//! input the last launch in the queue has just written may become part of that launch, where a kernel does both. Quantized
//! weights meet activations quantized to 8 bits, 32 to a scale; everything else is computed in 32-bit floats. Nothing that changes
//! from one step to the next of the same shape is an argument of a launch: it lies in device memory.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use apr_core::backend::{
    Backend, BackendError, Best, FfnScratch, FfnWeights, Heads, KvShape, Precision, Result, Routing, WeightData,
    check_restore, unfused,
};
use apr_core::batch::Batch;
use apr_core::probe::{Probe, seen};
use apr_core::rope::{Pairing, Rope};
use apr_core::stage::Stage;

mod attention;
mod batch;
mod best;
pub mod compile;
pub mod driver;
pub mod host;
mod kv;
mod memory;
pub mod nvidia;
pub mod nvrtc;
mod products;
mod tensor;

use batch::DeviceBatch;
use driver::{Arg, Driver, DriverError};
use host::{HostCall, HostExperts, HostWeight};
pub use kv::KvCache;
use memory::{Buffer, Device};
use products::Groups;
pub use tensor::{CudaIds, CudaTensor, CudaWeight};

/// Runs models on an NVIDIA GPU, or on whatever else implements [`Driver`].
pub struct CudaBackend {
    device: Device,
    shared: Mutex<Shared>,
    /// Who has experts that the device has no room for.
    host: Option<Box<dyn HostExperts>>,
}

/// Buffers that ops share.
#[derive(Default)]
struct Shared {
    batch: DeviceBatch,
    groups: Groups,
    /// Parts of attention that are yet to be merged.
    parts: Option<Buffer>,
    /// Rows on their way to another place.
    moved: Option<Buffer>,
    /// Zeros that kernels count their blocks with.
    counters: Option<Buffer>,
    call: HostCall,
    /// Best values of rows.
    best: Option<Buffer>,
}

/// A driver's error as a backend's.
pub(crate) fn failed(device: &Device, e: DriverError) -> BackendError {
    match e {
        DriverError::OutOfMemory { need_bytes } => BackendError::OutOfMemory {
            what: format!("a buffer on {}", device.driver().description().name),
            need_bytes,
        },
        DriverError::Failed(what) => BackendError::Device { device: device.driver().description().name.clone(), what },
    }
}

/// At least `n` zeros, which kernels that count with them leave as they were.
fn counters(device: &Device, buffer: &mut Option<Buffer>, n: usize) -> driver::Result<Arg> {
    let n_bytes = 4 * n.next_power_of_two().max(64);
    if buffer.as_ref().is_none_or(|b| b.n_bytes() < n_bytes) {
        *buffer = Some(device.alloc_with(&vec![0; n_bytes])?);
    }
    Ok(buffer.as_ref().expect("it was just made").arg())
}

impl CudaBackend {
    /// A backend on a device.
    pub fn new(driver: Arc<dyn Driver>) -> CudaBackend {
        CudaBackend { device: Device::new(driver), shared: Mutex::default(), host: None }
    }

    /// The same with experts on the host, those that `host` takes.
    pub fn with_host(self, host: Box<dyn HostExperts>) -> CudaBackend {
        CudaBackend { host: Some(host), ..self }
    }

    fn host(&self) -> &dyn HostExperts {
        &**self.host.as_ref().expect("whoever took a weight is there")
    }

    /// Experts on the host: what they need is copied there, and what they give back. The step is cut in two.
    fn host_ffn<P: Probe<Self>>(
        &self,
        out: &mut CudaTensor,
        s: &mut FfnScratch<CudaTensor>,
        block: usize,
        routing: &Routing<CudaTensor, CudaIds>,
        x: &CudaTensor,
        il: usize,
        probe: &mut P,
    ) -> Result<()> {
        use Stage::{MoeExpertOut, MoeExpertSwigl, MoeExpertUp};
        let mut shared = self.shared();
        let call = &mut shared.call;
        call.wants_parts = [MoeExpertUp, MoeExpertSwigl, MoeExpertOut].iter().any(|&stage| probe.wants(stage, il));
        self.read_for_host(call, &routing.ids, x)?;
        self.ok(routing.weights.read(0..routing.weights.n_rows(), &mut call.weights))?;
        self.host().experts_ffn(block, call)?;
        self.ok(out.write(&call.out))?;
        if call.wants_parts {
            let parts = [&mut s.up, &mut s.gate, &mut s.down].into_iter().zip(&call.parts);
            parts.into_iter().try_for_each(|(t, values)| self.ok(t.write(values)))?;
        }
        self.ok(shared.batch.go_on(&self.device))
    }

    /// Inputs of a product with experts on the host.
    fn read_for_host(&self, call: &mut HostCall, ids: &CudaIds, x: &CudaTensor) -> Result<()> {
        call.n_used = ids.n_cols();
        self.ok(x.read(0..x.n_rows(), &mut call.x))?;
        self.ok(ids.read(&mut call.ids))
    }

    /// A product with experts on the host.
    fn host_matmul(&self, out: &mut CudaTensor, w: HostWeight, ids: &CudaIds, x: &CudaTensor) -> Result<()> {
        let mut shared = self.shared();
        let call = &mut shared.call;
        self.read_for_host(call, ids, x)?;
        self.host().matmul_experts(w, call)?;
        self.ok(out.write(&call.out))?;
        self.ok(shared.batch.go_on(&self.device))
    }

    fn shared(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn ok<T>(&self, result: driver::Result<T>) -> Result<T> {
        result.map_err(|e| failed(&self.device, e))
    }

    /// Launches a kernel with a thread per value of `n`.
    fn each(&self, kernel: &'static str, n: usize, args: &[Arg]) {
        self.device.launch(kernel, 256, [n.div_ceil(256), 1, 1], args);
    }
}

impl Backend for CudaBackend {
    type Tensor = CudaTensor;
    type Ids = CudaIds;
    type Weight = CudaWeight;
    type KvCache = KvCache;

    fn precision(&self) -> Precision {
        Precision::Int8
    }

    fn is_batch_invariant(&self) -> bool {
        false
    }

    fn free_bytes(&self) -> Option<u64> {
        self.device.driver().free_bytes().ok()
    }

    fn shows(&self, stage: Stage) -> bool {
        use Stage::*;
        !matches!(stage, AttnScores | AttnSoftmax | FfnGate | FfnSilu | MoeExpertGate)
    }

    fn upload(&self, data: &WeightData) -> Result<CudaWeight> {
        let on_host = self.host.as_ref().map_or(Ok(None), |host| host.take(data))?;
        if on_host.is_some() {
            return Ok(CudaWeight::without_values(data, on_host));
        }
        if products::kernel_of(data.qtype, 1).is_none() {
            let (tensor, qtype) = (data.name.clone(), data.qtype);
            return Err(BackendError::UnsupportedType { tensor, qtype, device: "cuda" });
        }
        self.ok(CudaWeight::upload(&self.device, data))
    }

    fn tensor(&self, n_cols: usize, consumers: &[&CudaWeight]) -> CudaTensor {
        CudaTensor::new(&self.device, n_cols, consumers)
    }

    fn ids(&self, n_cols: usize) -> CudaIds {
        CudaIds::new(&self.device, n_cols)
    }

    fn shape(&self, t: &CudaTensor) -> (usize, usize) {
        (t.n_rows(), t.n_cols())
    }

    fn read(&self, t: &CudaTensor, out: &mut Vec<f32>) -> Result<()> {
        self.ok(t.read(0..t.n_rows(), out))
    }

    fn write(&self, t: &mut CudaTensor, values: &[f32]) -> Result<()> {
        self.ok(t.write(values))
    }

    fn read_row(&self, t: &CudaTensor, row: usize, out: &mut Vec<f32>) -> Result<()> {
        assert!(row < t.n_rows(), "row {row} of {}", t.n_rows());
        self.ok(t.read(row..row + 1, out))
    }

    fn read_ids(&self, ids: &CudaIds, out: &mut Vec<u32>) -> Result<(usize, usize)> {
        self.ok(ids.read(out))?;
        Ok(self.ids_shape(ids))
    }

    fn ids_shape(&self, ids: &CudaIds) -> (usize, usize) {
        (ids.n_rows(), ids.n_cols())
    }

    fn write_ids(&self, ids: &mut CudaIds, values: &[u32]) -> Result<()> {
        self.ok(ids.write(values))
    }

    fn best(&self, t: &CudaTensor, k: usize, out: &mut Vec<Best>) -> Result<()> {
        let Shared { counters, best, .. } = &mut *self.shared();
        self.ok(best::best(&self.device, counters, best, t, k, out))
    }

    fn kv_cache(&self, shape: KvShape) -> KvCache {
        KvCache::new(&self.device, shape)
    }

    fn kv_reserve(&self, kv: &mut KvCache, n_blocks: usize) -> Result<()> {
        kv.reserve(n_blocks)
    }

    fn kv_save(&self, kv: &KvCache, block: u32, out: &mut Vec<u8>) -> Result<()> {
        self.ok(kv.save(block, out))
    }

    fn kv_restore(&self, kv: &mut KvCache, block: u32, saved: &[u8]) -> Result<()> {
        check_restore(kv.shape().block_bytes(), saved.len())?;
        self.ok(kv.restore(block, saved))
    }

    fn embed(&self, out: &mut CudaTensor, table: &CudaWeight, batch: &Batch) -> Result<()> {
        let n_rows = batch.rows().len();
        self.ok(out.set_rows(n_rows))?;
        let tokens = self.ok(self.shared().batch.tokens(&self.device, batch))?;
        let [w0, w1, w2, w3] = table.planes();
        let args = [out.arg_mut(), w0, w1, w2, w3, tokens, table.n_cols.into()];
        self.device.launch(products::embed_kernel(table.qtype), 128, [n_rows, 1, 1], &args);
        Ok(())
    }

    fn rms_norm(&self, out: &mut CudaTensor, x: &CudaTensor, w: &CudaWeight, eps: f32) -> Result<()> {
        self.ok(out.set_rows(x.n_rows()))?;
        let (to, n_cols) = (out.arg_mut(), x.n_cols());
        let grid = [x.n_rows(), 1, 1];
        match self.ok(out.q8_mut())? {
            Some([codes, scales]) => {
                let args = [to, codes, scales, x.arg(), w.vector(), n_cols.into(), eps.into()];
                self.device.launch("rms_norm_q8", 512, grid, &args);
            }
            None => self.device.launch("rms_norm", 512, grid, &[to, x.arg(), w.vector(), n_cols.into(), eps.into()]),
        }
        Ok(())
    }

    fn matmul(&self, out: &mut CudaTensor, at: usize, w: &CudaWeight, x: &CudaTensor) -> Result<()> {
        if out.n_rows() != x.n_rows() {
            self.ok(out.set_rows(x.n_rows()))?;
        }
        self.ok(products::matmul(&self.device, out, at, w, x))
    }

    fn qkv(&self, out: &mut CudaTensor, w: [&CudaWeight; 3], heads: Heads, x: &CudaTensor) -> Result<()> {
        self.ok(out.set_rows(x.n_rows()))?;
        if self.ok(products::qkv(&self.device, out, w, x))? { Ok(()) } else { unfused::qkv(self, out, w, heads, x) }
    }

    fn add_bias(&self, x: &mut CudaTensor, at: usize, bias: &CudaWeight) -> Result<()> {
        let (n, rows) = (bias.n_cols, x.n_rows());
        let args = [x.arg_mut(), bias.vector(), x.n_cols().into(), at.into(), n.into()];
        self.device.launch("add_bias", 256, [n.div_ceil(256), rows, 1], &args);
        Ok(())
    }

    fn head_norm(&self, x: &mut CudaTensor, cols: Range<usize>, w: &CudaWeight, eps: f32) -> Result<()> {
        let (n_heads, rows) = (cols.len() / w.n_cols, x.n_rows());
        let n_cols = x.n_cols();
        let args =
            [x.arg_mut(), w.vector(), n_cols.into(), cols.start.into(), n_heads.into(), w.n_cols.into(), eps.into()];
        self.device.launch("head_norm", 128, [n_heads.div_ceil(4), rows, 1], &args);
        Ok(())
    }

    fn rope(&self, x: &mut CudaTensor, cols: Range<usize>, head_dim: usize, rope: &Rope, batch: &Batch) -> Result<()> {
        let [cosines, sines] = self.ok(self.shared().batch.angles(&self.device, batch, rope))?;
        let (n_heads, rows, n_cols) = (cols.len() / head_dim, x.n_rows(), x.n_cols());
        let args = [
            x.arg_mut(),
            cosines,
            sines,
            n_cols.into(),
            cols.start.into(),
            n_heads.into(),
            head_dim.into(),
            rope.inv_freq.len().into(),
            (rope.pairing == Pairing::Adjacent).into(),
        ];
        self.device.launch("rope", 128, [n_heads.div_ceil(4), rows, 1], &args);
        Ok(())
    }

    fn norm_rope(
        &self,
        qkv: &mut CudaTensor,
        heads: Heads,
        norms: Option<(&[CudaWeight; 2], f32)>,
        rope: &Rope,
        batch: &Batch,
    ) -> Result<()> {
        let [cosines, sines] = self.ok(self.shared().batch.angles(&self.device, batch, rope))?;
        let (q_norm, k_norm, eps) = match norms {
            Some(([q, k], eps)) => (q.vector(), k.vector(), eps),
            None => (Arg::Address(0), Arg::Address(0), 0.0),
        };
        let (n_heads, rows, n_cols) = (heads.n_head + heads.n_head_kv, qkv.n_rows(), qkv.n_cols());
        let args = [
            qkv.arg_mut(),
            q_norm,
            k_norm,
            cosines,
            sines,
            n_cols.into(),
            heads.n_head.into(),
            n_heads.into(),
            heads.head_dim.into(),
            rope.inv_freq.len().into(),
            (rope.pairing == Pairing::Adjacent).into(),
            eps.into(),
        ];
        self.device.launch_open("norm_rope", 128, [n_heads.div_ceil(4), rows, 1], &args);
        Ok(())
    }

    fn attention<P: Probe<Self>>(
        &self,
        out: &mut CudaTensor,
        qkv: &CudaTensor,
        kv: &mut KvCache,
        il: usize,
        heads: Heads,
        batch: &Batch,
        _: &mut P,
    ) -> Result<()> {
        let mut shared = self.shared();
        let Shared { batch: on_device, parts, .. } = &mut *shared;
        self.ok(attention::attention(&self.device, on_device, parts, out, qkv, kv, (il, heads), batch))
    }

    fn keep_rows(&self, x: &mut CudaTensor, rows: &[u32]) -> Result<()> {
        let n_cols = x.n_cols();
        if rows.len() == x.n_rows() {
            return Ok(());
        }
        if !rows.is_empty() {
            let mut shared = self.shared();
            let kept = self.ok(shared.batch.kept(&self.device, rows))?;
            let n_bytes = (rows.len() * n_cols * 4).next_power_of_two();
            self.ok(tensor::ensure(&self.device, &mut shared.moved, n_bytes))?;
            let moved = shared.moved.as_ref().expect("it was ensured").arg();
            let grid = [n_cols.div_ceil(256), rows.len(), 1];
            self.device.launch("gather_rows", 256, grid, &[moved, x.arg(), kept, n_cols.into()]);
            let n = rows.len() * n_cols;
            self.each("copy", n, &[x.arg_mut(), moved, n.into()]);
        }
        self.ok(x.set_rows(rows.len()))
    }

    fn route(&self, r: &mut Routing<CudaTensor, CudaIds>) -> Result<()> {
        let (n_rows, n_expert, k) = (r.logits.n_rows(), r.logits.n_cols(), r.ids.n_cols());
        self.ok(r.ids.set_rows(n_rows))?;
        self.ok(r.weights.set_rows(n_rows))?;
        if let Some(mut launch) = self.device.take_open(r.logits.arg(), products::router_kernel) {
            let mut shared = self.shared();
            let counters = self.ok(counters(&self.device, &mut shared.counters, launch.grid[1] as usize))?;
            launch.args.extend([r.ids.arg(), r.weights.arg_mut(), k.into(), counters]);
            self.device.push(launch);
            return Ok(());
        }
        let args = [r.ids.arg(), r.weights.arg_mut(), r.logits.arg(), n_rows.into(), n_expert.into(), k.into()];
        self.device.launch("route", 128, [n_rows.div_ceil(4), 1, 1], &args);
        Ok(())
    }

    fn matmul_experts(&self, out: &mut CudaTensor, w: &CudaWeight, ids: &CudaIds, x: &CudaTensor) -> Result<()> {
        if let Some(w) = w.host {
            return self.host_matmul(out, w, ids, x);
        }
        self.ok(out.set_rows(x.n_rows()))?;
        let groups = &mut self.shared().groups;
        self.ok(groups.prepare(&self.device, ids, &[w]))?;
        self.ok(products::matmul_experts(&self.device, groups, out, w, ids, x))
    }

    fn silu(&self, x: &mut CudaTensor) -> Result<()> {
        let n = x.n();
        self.each("silu", n, &[x.arg_mut(), n.into()]);
        Ok(())
    }

    fn mul(&self, x: &mut CudaTensor, y: &CudaTensor) -> Result<()> {
        let n = x.n();
        self.each("mul", n, &[x.arg_mut(), y.arg(), n.into()]);
        Ok(())
    }

    fn weighted_sum(&self, out: &mut CudaTensor, x: &CudaTensor, weights: &CudaTensor) -> Result<()> {
        self.ok(out.set_rows(weights.n_rows()))?;
        products::weighted_sum(&self.device, out, x, weights);
        Ok(())
    }

    fn add(&self, x: &mut CudaTensor, y: &CudaTensor) -> Result<()> {
        products::add(&self.device, x, y);
        Ok(())
    }

    fn dense_ffn<P: Probe<Self>>(
        &self,
        out: &mut CudaTensor,
        s: &mut FfnScratch<CudaTensor>,
        w: &FfnWeights<CudaWeight>,
        x: &CudaTensor,
        il: usize,
        probe: &mut P,
    ) -> Result<()> {
        self.ok(products::gate_up(&self.device, s, w, None, x))?;
        seen(probe, self, Stage::FfnUp, il, &s.up)?;
        seen(probe, self, Stage::FfnSwigl, il, &s.gate)?;
        self.matmul(out, 0, &w.down, &s.gate)
    }

    fn experts_ffn<P: Probe<Self>>(
        &self,
        out: &mut CudaTensor,
        s: &mut FfnScratch<CudaTensor>,
        w: &FfnWeights<CudaWeight>,
        routing: &Routing<CudaTensor, CudaIds>,
        x: &CudaTensor,
        il: usize,
        probe: &mut P,
    ) -> Result<()> {
        if let Some(HostWeight { block, .. }) = w.gate.host {
            self.host_ffn(out, s, block, routing, x, il, probe)?;
        } else {
            let (groups, device) = (&mut self.shared().groups, &self.device);
            self.ok(groups.prepare(device, &routing.ids, &[&w.gate, &w.up, &w.down]))?;
            self.ok(products::gate_up(device, s, w, Some((groups, &routing.ids)), x))?;
            self.ok(products::down(device, groups, out, s, &w.down, routing))?;
        }
        seen(probe, self, Stage::MoeExpertUp, il, &s.up)?;
        seen(probe, self, Stage::MoeExpertSwigl, il, &s.gate)?;
        seen(probe, self, Stage::MoeExpertOut, il, &s.down)
    }

    fn run_step(&self, step: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        self.ok(self.device.begin_step())?;
        self.shared().batch.set_step(true);
        let done = step();
        self.shared().batch.set_step(false);
        let flushed = self.ok(self.device.flush());
        done.and(flushed)
    }
}
