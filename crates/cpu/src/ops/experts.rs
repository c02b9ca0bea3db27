//! Products with weights: one matrix, or the routed experts of every token.
//!
//! Tokens are grouped by expert, so that each expert's weights are read once per step whatever the number of tokens. A task is some
//! weight rows of one expert with all its tokens; neighbouring tasks read neighbouring rows.

use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::float::FloatKernels;
use crate::kernels::{Kernels, PanelScratch, SharedOut};
use crate::pool::Pool;
use crate::tensor::{CpuIds, CpuTensor, CpuWeight};

/// What products run on.
pub struct Machine<'a> {
    pub pool: &'a Pool,
    pub kernels: &'static Kernels,
    pub float: &'static FloatKernels,
    /// One per thread.
    pub panels: &'a [Mutex<PanelScratch>],
    /// Bytes of weights read so far.
    pub read_bytes: &'a AtomicU64,
}

/// Which slots (token times experts per token, plus place) go to which expert.
#[derive(Default)]
pub struct Groups {
    /// Experts that have slots, most slots first, with their range of `slots`.
    experts: Vec<(usize, Range<usize>)>,
    /// Slots ordered by expert, ascending within one.
    slots: Vec<u32>,
    /// The token of each slot in `slots`.
    tokens: Vec<u32>,
}

impl Groups {
    /// Groups the slots of a routing by expert.
    pub fn by_expert(&mut self, ids: &CpuIds, n_expert: usize) {
        let mut starts = vec![0usize; n_expert + 1];
        ids.data.iter().for_each(|&e| starts[e as usize + 1] += 1);
        (0..n_expert).for_each(|e| starts[e + 1] += starts[e]);
        self.experts.clear();
        self.experts
            .extend((0..n_expert).map(|e| (e, starts[e]..starts[e + 1])).filter(|(_, slots)| !slots.is_empty()));
        self.experts.sort_by_key(|(e, slots)| (std::cmp::Reverse(slots.len()), *e));
        self.slots.resize(ids.data.len(), 0);
        self.tokens.resize(ids.data.len(), 0);
        for (slot, &e) in ids.data.iter().enumerate() {
            let at = &mut starts[e as usize];
            self.slots[*at] = slot as u32;
            self.tokens[*at] = (slot / ids.n_cols) as u32;
            *at += 1;
        }
    }

    /// One matrix that every row goes through.
    pub fn one(&mut self, n_rows: usize) {
        self.experts.clear();
        self.experts.push((0, 0..n_rows));
        self.slots.clear();
        self.slots.extend(0..n_rows as u32);
        self.tokens.clone_from(&self.slots);
    }

    /// Tells that these experts' matrices are about to be read, in the order in which they are.
    pub fn will_need(&self, gate: &CpuWeight, up: &CpuWeight, down: &CpuWeight) {
        self.experts.iter().for_each(|(e, _)| [gate, up].iter().for_each(|w| w.will_need(*e)));
        self.experts.iter().for_each(|(e, _)| down.will_need(*e));
    }

    /// The slots of the `i`-th group.
    fn slots(&self, i: usize) -> &[u32] {
        &self.slots[self.experts[i].1.clone()]
    }

    /// The tokens of the `i`-th group.
    fn tokens(&self, i: usize) -> &[u32] {
        &self.tokens[self.experts[i].1.clone()]
    }
}

impl Machine<'_> {
    /// Weight rows per task: enough tasks for all threads, strips of sixteen whole.
    fn rows_per_task(&self, n_rows: usize, n_group: usize) -> usize {
        let tasks_wanted = (4 * self.pool.n_threads()).div_ceil(n_group);
        n_rows.div_ceil(tasks_wanted).next_multiple_of(16).clamp(16, 128)
    }

    /// Calls `f(thread, group, weight rows)` for every group and every range of `n_rows` weight rows.
    fn each_task(&self, groups: &Groups, n_rows: usize, f: &(dyn Fn(usize, usize, Range<usize>) + Sync)) {
        let step = self.rows_per_task(n_rows, groups.experts.len().max(1));
        let per_group = n_rows.div_ceil(step);
        self.pool.run(groups.experts.len() * per_group, &|thread, task| {
            let from = task % per_group * step;
            f(thread, task / per_group, from..(from + step).min(n_rows));
        });
    }

    /// `out[out_rows[t], at + rows] = w[mat][rows] x[x_rows[t]]`; `out` is a matrix of `out_cols` columns.
    fn product(
        &self,
        thread: usize,
        (w, mat, rows): (&CpuWeight, usize, Range<usize>),
        (x, x_rows): (&CpuTensor, &[u32]),
        (out, at, out_rows): (SharedOut<'_>, usize, &[u32]),
    ) {
        let weights = w.rows(mat, rows.clone());
        self.read_bytes.fetch_add((weights.n_rows() * weights.row_bytes()) as u64, Ordering::Relaxed);
        // SAFETY: tasks write disjoint cells: other weight rows are other columns, other groups other rows.
        let mut out = unsafe { out.cols(at + rows.start..at + rows.end) };
        if w.is_float() {
            self.kernels.matmul_f32(weights, x.values(), x_rows, &mut out, out_rows);
        } else {
            let mut panels = self.panels[thread].lock().unwrap_or_else(|e| e.into_inner());
            self.kernels.matmul_q8(weights, x.q8(), x_rows, &mut out, out_rows, &mut panels);
        }
    }

    /// `out[:, at..] = x wᵀ`
    pub fn matmul(&self, groups: &mut Groups, out: &mut CpuTensor, at: usize, w: &CpuWeight, x: &CpuTensor) {
        groups.one(x.n_rows());
        out.set_rows(x.n_rows());
        if x.n_rows() == 0 {
            return;
        }
        let (groups, n_cols) = (&*groups, out.n_cols());
        let to = SharedOut::new(out.values_mut(), n_cols);
        self.each_task(groups, w.n_rows(), &|thread, g, rows| {
            self.product(thread, (w, 0, rows), (x, groups.tokens(g)), (to, at, groups.slots(g)));
        });
    }

    /// `out[slot] = w[expert of slot] x`, where `x` has a row per token, or a part per slot.
    pub fn matmul_grouped(&self, groups: &Groups, out: &mut CpuTensor, w: &CpuWeight, x: &CpuTensor) {
        let per_slot = x.n_cols() != w.n_cols();
        out.set_rows(x.n_rows());
        if x.n_rows() == 0 {
            return;
        }
        let to = SharedOut::new(out.values_mut(), w.n_rows());
        self.each_task(groups, w.n_rows(), &|thread, g, rows| {
            let x_rows = if per_slot { groups.slots(g) } else { groups.tokens(g) };
            self.product(thread, (w, groups.experts[g].0, rows), (x, x_rows), (to, 0, groups.slots(g)));
        });
    }

    /// `gate[slot] = silu(w_gate x) * (w_up x)` in one pass over both matrices; `up` keeps `w_up x`.
    pub fn gate_up(
        &self,
        groups: &Groups,
        (gate, w_gate): (&mut CpuTensor, &CpuWeight),
        (up, w_up): (&mut CpuTensor, &CpuWeight),
        x: &CpuTensor,
    ) {
        gate.set_rows(x.n_rows());
        up.set_rows(x.n_rows());
        if x.n_rows() == 0 {
            return;
        }
        let n_ff = w_gate.n_rows();
        let (to_gate, to_up) = (SharedOut::new(gate.values_mut(), n_ff), SharedOut::new(up.values_mut(), n_ff));
        self.each_task(groups, n_ff, &|thread, g, rows| {
            let (mat, x_rows, slots) = (groups.experts[g].0, groups.tokens(g), groups.slots(g));
            self.product(thread, (w_gate, mat, rows.clone()), (x, x_rows), (to_gate, 0, slots));
            self.product(thread, (w_up, mat, rows.clone()), (x, x_rows), (to_up, 0, slots));
            for &slot in slots {
                // SAFETY: these cells were written by this task, and no other task reaches them.
                let (gate, up) =
                    unsafe { (to_gate.cells(slot as usize, rows.clone()), to_up.cells(slot as usize, rows.clone())) };
                self.float.swiglu(gate, up);
            }
        });
    }
}
