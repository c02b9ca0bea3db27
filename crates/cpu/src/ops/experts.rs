//! Products with weights: one matrix, or the routed experts of every token.
//!
//! Tokens are grouped by expert, so that each expert's weights come from memory once per step whatever the number of tokens. A task is
//! some weight rows of one expert with a group of its tokens; neighbouring tasks have the same tokens and neighbouring rows.

use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::float::FloatKernels;
use crate::kernels::{Kernels, LANES, PanelScratch, SPAN, SharedOut};
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
    groups: Vec<Group>,
    /// Slots ordered by expert, ascending within one.
    slots: Vec<u32>,
    /// The token of each slot in `slots`.
    tokens: Vec<u32>,
}

/// Slots of one expert that tasks take together.
struct Group {
    expert: usize,
    /// Of [`Groups::slots`].
    slots: Range<usize>,
    /// Whether no group before this one reads the expert's weights.
    is_first: bool,
}

impl Groups {
    /// Groups the slots of a routing by expert; those with most slots come first.
    pub fn by_expert(&mut self, ids: &CpuIds, n_expert: usize) {
        let mut starts = vec![0usize; n_expert + 1];
        ids.data.iter().for_each(|&e| starts[e as usize + 1] += 1);
        (0..n_expert).for_each(|e| starts[e + 1] += starts[e]);
        let slots = |e: usize| starts[e]..starts[e + 1];
        let mut experts: Vec<usize> = (0..n_expert).filter(|&e| !slots(e).is_empty()).collect();
        experts.sort_by_key(|&e| (std::cmp::Reverse(slots(e).len()), e));
        self.groups.clear();
        self.groups.extend(experts.into_iter().flat_map(|e| in_groups(e, slots(e))));
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
        self.groups.clear();
        self.groups.extend(in_groups(0, 0..n_rows));
        self.slots.clear();
        self.slots.extend(0..n_rows as u32);
        self.tokens.clone_from(&self.slots);
    }

    /// Tells that these experts' matrices are about to be read, in the order in which they are.
    pub fn will_need(&self, gate: &CpuWeight, up: &CpuWeight, down: &CpuWeight) {
        let experts = || self.groups.iter().filter(|g| g.is_first).map(|g| g.expert);
        experts().for_each(|e| [gate, up].iter().for_each(|w| w.will_need(e)));
        experts().for_each(|e| down.will_need(e));
    }

    fn slots(&self, group: &Group) -> &[u32] {
        &self.slots[group.slots.clone()]
    }

    fn tokens(&self, group: &Group) -> &[u32] {
        &self.tokens[group.slots.clone()]
    }
}

/// An expert's slots in groups of [`SPAN`] at most, about as many in each. What a thread makes of a group's tokens then serves all its
/// tasks of that group, where a larger group would begin again with every task.
fn in_groups(expert: usize, slots: Range<usize>) -> impl Iterator<Item = Group> {
    let n_group = slots.len().div_ceil(SPAN).max(1);
    let size = slots.len().div_ceil(n_group).next_multiple_of(LANES);
    let Range { start, end } = slots;
    let group = move |at: usize| Group { expert, slots: at..(at + size).min(end), is_first: at == start };
    (start..end).step_by(size.max(1)).map(group)
}

impl Machine<'_> {
    /// Weight rows per task: enough tasks for all threads, strips of sixteen whole.
    fn rows_per_task(&self, n_rows: usize, n_group: usize) -> usize {
        let tasks_wanted = (4 * self.pool.n_threads()).div_ceil(n_group);
        n_rows.div_ceil(tasks_wanted).next_multiple_of(16).clamp(16, 128)
    }

    /// Calls `f(thread, group, weight rows)` for every group and every range of `n_rows` weight rows.
    fn each_task(&self, groups: &Groups, n_rows: usize, f: &(dyn Fn(usize, &Group, Range<usize>) + Sync)) {
        let groups = &groups.groups;
        let step = self.rows_per_task(n_rows, groups.len().max(1));
        let per_group = n_rows.div_ceil(step);
        self.pool.run(groups.len() * per_group, &|thread, task| {
            let from = task % per_group * step;
            f(thread, &groups[task / per_group], from..(from + step).min(n_rows));
        });
    }

    /// `out[out_rows[t], at + rows] = w[expert of the group][rows] x[x_rows[t]]`
    fn product(
        &self,
        thread: usize,
        (w, group, rows): (&CpuWeight, &Group, Range<usize>),
        (x, x_rows): (&CpuTensor, &[u32]),
        (out, at, out_rows): (SharedOut<'_>, usize, &[u32]),
    ) {
        let weights = w.rows(group.expert, rows.clone());
        if group.is_first {
            self.read_bytes.fetch_add((weights.n_rows() * weights.row_bytes()) as u64, Ordering::Relaxed);
        }
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
            self.product(thread, (w, g, rows), (x, groups.tokens(g)), (to, at, groups.slots(g)));
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
            self.product(thread, (w, g, rows), (x, x_rows), (to, 0, groups.slots(g)));
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
            let (x_rows, slots) = (groups.tokens(g), groups.slots(g));
            self.product(thread, (w_gate, g, rows.clone()), (x, x_rows), (to_gate, 0, slots));
            self.product(thread, (w_up, g, rows.clone()), (x, x_rows), (to_up, 0, slots));
            for &slot in slots {
                // SAFETY: these cells were written by this task, and no other task reaches them.
                let (gate, up) =
                    unsafe { (to_gate.cells(slot as usize, rows.clone()), to_up.cells(slot as usize, rows.clone())) };
                self.float.swiglu(gate, up);
            }
        });
    }
}
