//! The CPU backend: kernel tables per instruction set, a thread pool, and the ops of the models on top of them.
//!
//! Quantized weights meet activations quantized to 8 bits; everything else is computed in 32-bit floats. Work is split by output rows
//! or by whole attention rows, never along a sum, so results do not depend on the number of threads or on how tokens are batched.

use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use apr_core::backend::{
    Backend, Best, FfnScratch, FfnWeights, Heads, KvShape, Precision, Result, Routing, WeightData, check_restore,
};
use apr_core::batch::Batch;
use apr_core::probe::{Probe, seen};
use apr_core::rope::Rope;
use apr_core::stage::Stage;
use apr_core::stats::RowStats;

#[cfg(target_arch = "x86_64")]
mod avx2;
pub mod float;
pub mod kernels;
pub mod kv;
mod lines;
mod ops;
pub mod peak;
pub mod pool;
mod scalar;
pub mod tensor;

use float::FloatKernels;
use kernels::{Isa, Kernels, PanelScratch, SharedOut};
use kv::KvCache;
use ops::attention;
use ops::experts::{Groups, Machine};
use ops::route::route_row;
use pool::Pool;
use tensor::{CpuIds, CpuTensor, CpuWeight, write_rows};

/// Runs models on the host's cores.
pub struct CpuBackend {
    pool: Pool,
    kernels: &'static Kernels,
    float: &'static FloatKernels,
    panels: Vec<Mutex<PanelScratch>>,
    attention: Vec<Mutex<attention::Scratch>>,
    shared: Mutex<Shared>,
    read_bytes: AtomicU64,
}

/// Why the host's cores cannot be used as asked.
#[derive(Debug, thiserror::Error)]
pub enum CpuError {
    #[error("this CPU lacks the instruction set '{0}'; leave --isa out to use the fastest it has")]
    Isa(Isa),
    #[error("the system does not start {n_threads} threads: {source}; use fewer with --threads")]
    Threads { n_threads: usize, source: std::io::Error },
}

/// Buffers of the ops that the leader fills before a parallel loop.
#[derive(Default)]
struct Shared {
    groups: Groups,
    attention: attention::Plan,
    angles: Angles,
}

/// Sines and cosines of the last step's positions.
#[derive(Default)]
struct Angles {
    positions: Vec<u32>,
    inv_freq: Vec<f32>,
    magnitude: f32,
    /// `[n_tokens, n_pair]`
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Angles {
    /// Computes the table unless it is there from another layer of the same step.
    fn prepare(&mut self, rope: &Rope, batch: &Batch) {
        let same = self.inv_freq == rope.inv_freq
            && self.magnitude == rope.magnitude
            && self.positions.len() == batch.rows().len()
            && self.positions.iter().zip(batch.rows()).all(|(p, r)| *p == r.position);
        if same {
            return;
        }
        self.inv_freq.clone_from(&rope.inv_freq);
        self.magnitude = rope.magnitude;
        self.positions.clear();
        self.positions.extend(batch.rows().iter().map(|r| r.position));
        let n = rope.inv_freq.len();
        self.cos.resize(n * self.positions.len(), 0.0);
        self.sin.resize(n * self.positions.len(), 0.0);
        for (i, &p) in self.positions.iter().enumerate() {
            rope.angles(p, &mut self.cos[i * n..(i + 1) * n], &mut self.sin[i * n..(i + 1) * n]);
        }
    }
}

impl CpuBackend {
    /// A backend of `n_threads` threads with the kernels of `isa`, or the fastest this CPU has.
    ///
    /// # Errors
    /// An instruction set that this CPU lacks, or threads that the system does not start.
    pub fn new(n_threads: usize, isa: Option<Isa>) -> std::result::Result<CpuBackend, CpuError> {
        let kernels = match isa {
            Some(isa) => Kernels::for_isa(isa).ok_or(CpuError::Isa(isa))?,
            None => Kernels::detect(),
        };
        Ok(CpuBackend {
            pool: Pool::new(n_threads).map_err(|source| CpuError::Threads { n_threads, source })?,
            kernels,
            float: kernels.float(),
            panels: (0..n_threads).map(|_| Mutex::default()).collect(),
            attention: (0..n_threads).map(|_| Mutex::default()).collect(),
            shared: Mutex::default(),
            read_bytes: AtomicU64::new(0),
        })
    }

    /// The instruction set of the kernels.
    pub fn isa(&self) -> Isa {
        self.kernels.isa()
    }

    /// Threads that compute.
    pub fn n_threads(&self) -> usize {
        self.pool.n_threads()
    }

    fn machine(&self) -> Machine<'_> {
        let (pool, panels, read_bytes) = (&self.pool, &self.panels[..], &self.read_bytes);
        Machine { pool, kernels: self.kernels, float: self.float, panels, read_bytes }
    }

    fn shared(&self) -> std::sync::MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn write_rows(&self, t: &mut CpuTensor, f: &(dyn Fn(usize, &mut [f32]) + Sync)) {
        write_rows(&self.pool, self.kernels, t, f);
    }
}

impl Backend for CpuBackend {
    type Tensor = CpuTensor;
    type Ids = CpuIds;
    type Weight = CpuWeight;
    type KvCache = KvCache;

    fn precision(&self) -> Precision {
        Precision::Int8
    }

    fn read_bytes(&self) -> Option<u64> {
        Some(self.read_bytes.load(Ordering::Relaxed))
    }

    fn shows(&self, stage: Stage) -> bool {
        use Stage::*;
        !matches!(stage, AttnScores | AttnSoftmax | FfnGate | FfnSilu | MoeExpertGate)
    }

    fn upload(&self, data: &WeightData) -> Result<CpuWeight> {
        Ok(CpuWeight::new(data))
    }

    fn tensor(&self, n_cols: usize, consumers: &[&CpuWeight]) -> CpuTensor {
        CpuTensor::new(n_cols, consumers)
    }

    fn ids(&self, n_cols: usize) -> CpuIds {
        CpuIds { data: Vec::new(), n_cols }
    }

    fn shape(&self, t: &CpuTensor) -> (usize, usize) {
        (t.n_rows(), t.n_cols())
    }

    fn read(&self, t: &CpuTensor, out: &mut Vec<f32>) -> Result<()> {
        out.clear();
        out.extend_from_slice(t.values());
        Ok(())
    }

    fn write(&self, t: &mut CpuTensor, values: &[f32]) -> Result<()> {
        t.set_rows(values.len() / t.n_cols());
        t.values_mut().copy_from_slice(values);
        self.write_rows(t, &|_, _| {});
        Ok(())
    }

    fn read_row(&self, t: &CpuTensor, row: usize, out: &mut Vec<f32>) -> Result<()> {
        out.clear();
        out.extend_from_slice(t.row(row));
        Ok(())
    }

    fn read_ids(&self, ids: &CpuIds, out: &mut Vec<u32>) -> Result<(usize, usize)> {
        out.clone_from(&ids.data);
        Ok(self.ids_shape(ids))
    }

    fn ids_shape(&self, ids: &CpuIds) -> (usize, usize) {
        (ids.data.len() / ids.n_cols, ids.n_cols)
    }

    fn write_ids(&self, ids: &mut CpuIds, values: &[u32]) -> Result<()> {
        ids.data.clear();
        ids.data.extend_from_slice(values);
        Ok(())
    }

    fn row_stats(&self, t: &CpuTensor, rows: Range<usize>, cols: Range<usize>, out: &mut Vec<RowStats>) -> Result<()> {
        let (first, n) = (rows.start, out.len());
        out.resize(n + rows.len(), RowStats::EMPTY);
        // Waking another thread costs more than a few rows.
        let per_task = rows.len().div_ceil(4 * self.n_threads()).max(4);
        let parts: Vec<Mutex<&mut [RowStats]>> = out[n..].chunks_mut(per_task).map(Mutex::new).collect();
        self.pool.run(parts.len(), &|_, task| {
            let mut part = parts[task].lock().unwrap_or_else(|e| e.into_inner());
            for (i, stats) in part.iter_mut().enumerate() {
                *stats = self.float.row_stats(&t.row(first + task * per_task + i)[cols.clone()]);
            }
        });
        Ok(())
    }

    fn best(&self, t: &CpuTensor, k: usize, out: &mut Vec<Best>) -> Result<()> {
        ops::best::best(&self.pool, self.float, t, k, out);
        Ok(())
    }

    fn kv_block_bytes(&self, shape: &KvShape) -> usize {
        kv::block_bytes(shape)
    }

    fn kv_cache(&self, shape: KvShape) -> KvCache {
        KvCache::new(shape)
    }

    fn kv_reserve(&self, kv: &mut KvCache, n_blocks: usize) -> Result<()> {
        kv.reserve(n_blocks)
    }

    fn kv_save(&self, kv: &KvCache, block: u32, out: &mut Vec<u8>) -> Result<()> {
        out.extend_from_slice(kv.block(block));
        Ok(())
    }

    fn kv_restore(&self, kv: &mut KvCache, block: u32, saved: &[u8]) -> Result<()> {
        check_restore(kv.block_bytes(), saved.len())?;
        kv.block_mut(block).copy_from_slice(saved);
        Ok(())
    }

    fn embed(&self, out: &mut CpuTensor, table: &CpuWeight, batch: &Batch) -> Result<()> {
        out.set_rows(batch.rows().len());
        self.write_rows(out, &|i, row| table.dequantize(batch.rows()[i].token as usize, row));
        Ok(())
    }

    fn rms_norm(&self, out: &mut CpuTensor, x: &CpuTensor, w: &CpuWeight, eps: f32) -> Result<()> {
        out.set_rows(x.n_rows());
        self.write_rows(out, &|i, row| self.float.normalise(x.row(i), &w.vector, eps, row));
        Ok(())
    }

    fn matmul(&self, out: &mut CpuTensor, at: usize, w: &CpuWeight, x: &CpuTensor) -> Result<()> {
        self.machine().matmul(&mut self.shared().groups, out, at, w, x);
        Ok(())
    }

    fn add_bias(&self, x: &mut CpuTensor, at: usize, bias: &CpuWeight) -> Result<()> {
        self.write_rows(x, &|_, row| row[at..].iter_mut().zip(&bias.vector).for_each(|(x, b)| *x += b));
        Ok(())
    }

    fn head_norm(&self, x: &mut CpuTensor, cols: Range<usize>, w: &CpuWeight, eps: f32) -> Result<()> {
        self.write_rows(x, &|_, row| {
            let mut before = [0f32; 1024];
            let before = &mut before[..w.n_cols()];
            for head in row[cols.clone()].chunks_exact_mut(w.n_cols()) {
                before.copy_from_slice(head);
                self.float.normalise(before, &w.vector, eps, head);
            }
        });
        Ok(())
    }

    fn rope(&self, x: &mut CpuTensor, cols: Range<usize>, head_dim: usize, rope: &Rope, batch: &Batch) -> Result<()> {
        let mut shared = self.shared();
        shared.angles.prepare(rope, batch);
        let (angles, n) = (&shared.angles, rope.inv_freq.len());
        self.write_rows(x, &|i, row| {
            let (cos, sin) = (&angles.cos[i * n..(i + 1) * n], &angles.sin[i * n..(i + 1) * n]);
            row[cols.clone()].chunks_exact_mut(head_dim).for_each(|head| rope.rotate(head, cos, sin));
        });
        Ok(())
    }

    fn attention<P: Probe<Self>>(
        &self,
        out: &mut CpuTensor,
        qkv: &CpuTensor,
        kv: &mut KvCache,
        il: usize,
        heads: Heads,
        batch: &Batch,
        _: &mut P,
    ) -> Result<()> {
        let plan = &mut self.shared().attention;
        plan.prepare(batch);
        attention::store_kv(&self.pool, plan, kv, qkv.values(), il, heads, batch);
        out.set_rows(qkv.n_rows());
        let layer = attention::Layer { qkv: qkv.values(), kv, il, heads, batch };
        self.read_bytes.fetch_add(plan.read_bytes(&layer), Ordering::Relaxed);
        let machine = attention::Machine { pool: &self.pool, float: self.float, scratch: &self.attention };
        let n_cols = out.n_cols();
        attention::attend(&machine, plan, layer, SharedOut::new(out.values_mut(), n_cols));
        self.write_rows(out, &|_, _| {});
        Ok(())
    }

    fn keep_rows(&self, x: &mut CpuTensor, rows: &[u32]) -> Result<()> {
        let n = x.n_cols();
        for (to, &from) in rows.iter().enumerate() {
            let from = from as usize * n;
            x.values_mut().copy_within(from..from + n, to * n);
        }
        x.set_rows(rows.len());
        self.write_rows(x, &|_, _| {});
        Ok(())
    }

    fn route(&self, r: &mut Routing<CpuTensor, CpuIds>) -> Result<()> {
        let (n_rows, k) = (r.logits.n_rows(), r.ids.n_cols);
        r.ids.data.resize(n_rows * k, 0);
        r.weights.set_rows(n_rows);
        // Waking another thread costs more than a few rows.
        let per_task = n_rows.div_ceil(4 * self.n_threads()).max(4);
        let ids = r.ids.data.chunks_mut(per_task * k);
        let parts: Vec<_> = ids.zip(r.weights.values_mut().chunks_mut(per_task * k)).map(Mutex::new).collect();
        self.pool.run(parts.len(), &|_, task| {
            let mut part = parts[task].lock().unwrap_or_else(|e| e.into_inner());
            let (ids, weights) = &mut *part;
            let rows = ids.chunks_exact_mut(k).zip(weights.chunks_exact_mut(k));
            let mut order = Vec::new();
            rows.enumerate().for_each(|(i, (ids, weights))| {
                route_row(r.logits.row(task * per_task + i), ids, weights, &mut order);
            });
        });
        Ok(())
    }

    fn matmul_experts(&self, out: &mut CpuTensor, w: &CpuWeight, ids: &CpuIds, x: &CpuTensor) -> Result<()> {
        let groups = &mut self.shared().groups;
        groups.by_expert(ids, w.n_mat());
        self.machine().matmul_grouped(groups, out, w, x);
        Ok(())
    }

    fn silu(&self, x: &mut CpuTensor) -> Result<()> {
        let ones = vec![1.0; x.n_cols()];
        self.write_rows(x, &|_, row| self.float.swiglu(row, &ones));
        Ok(())
    }

    fn mul(&self, x: &mut CpuTensor, y: &CpuTensor) -> Result<()> {
        self.write_rows(x, &|i, row| row.iter_mut().zip(y.row(i)).for_each(|(x, y)| *x *= y));
        Ok(())
    }

    fn weighted_sum(&self, out: &mut CpuTensor, x: &CpuTensor, weights: &CpuTensor) -> Result<()> {
        out.set_rows(weights.n_rows());
        self.write_rows(out, &|i, row| {
            row.fill(0.0);
            for (part, &w) in x.row(i).chunks_exact(row.len()).zip(weights.row(i)) {
                self.float.axpby(row, 1.0, part, w);
            }
        });
        Ok(())
    }

    fn add(&self, x: &mut CpuTensor, y: &CpuTensor) -> Result<()> {
        self.write_rows(x, &|i, row| row.iter_mut().zip(y.row(i)).for_each(|(x, y)| *x += y));
        Ok(())
    }

    fn dense_ffn<P: Probe<Self>>(
        &self,
        out: &mut CpuTensor,
        s: &mut FfnScratch<CpuTensor>,
        w: &FfnWeights<CpuWeight>,
        x: &CpuTensor,
        il: usize,
        probe: &mut P,
    ) -> Result<()> {
        {
            let groups = &mut self.shared().groups;
            groups.one(x.n_rows());
            self.machine().gate_up(groups, (&mut s.gate, &w.gate), (&mut s.up, &w.up), x);
        }
        self.write_rows(&mut s.gate, &|_, _| {});
        seen(probe, self, Stage::FfnUp, il, &s.up)?;
        seen(probe, self, Stage::FfnSwigl, il, &s.gate)?;
        self.matmul(out, 0, &w.down, &s.gate)
    }

    fn experts_ffn<P: Probe<Self>>(
        &self,
        out: &mut CpuTensor,
        s: &mut FfnScratch<CpuTensor>,
        w: &FfnWeights<CpuWeight>,
        routing: &Routing<CpuTensor, CpuIds>,
        x: &CpuTensor,
        il: usize,
        probe: &mut P,
    ) -> Result<()> {
        {
            let groups = &mut self.shared().groups;
            groups.by_expert(&routing.ids, w.gate.n_mat());
            groups.will_need(&w.gate, &w.up, &w.down);
            self.machine().gate_up(groups, (&mut s.gate, &w.gate), (&mut s.up, &w.up), x);
            self.write_rows(&mut s.gate, &|_, _| {});
            self.machine().matmul_grouped(groups, &mut s.down, &w.down, &s.gate);
        }
        seen(probe, self, Stage::MoeExpertUp, il, &s.up)?;
        seen(probe, self, Stage::MoeExpertSwigl, il, &s.gate)?;
        seen(probe, self, Stage::MoeExpertOut, il, &s.down)?;
        self.weighted_sum(out, &s.down, &routing.weights)
    }
}
