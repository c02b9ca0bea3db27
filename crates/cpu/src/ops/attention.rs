//! Attention over the KV cache: grouped queries as a small matrix product, tile by tile.
//!
//! One task is one KV head and a few consecutive rows of a sequence. All query heads that share the KV head run together, so that a
//! tile of keys and values is read once for all of them. Each tile of [`KV_BLOCK`] absolute positions gives a maximum, a sum and a
//! weighted value; tiles are merged in ascending order (online softmax, arXiv:1805.02867). A row's result depends on its own query and
//! the cache only, never on which rows are computed with it.

use std::ops::Range;

use apr_core::backend::{Heads, KV_BLOCK};
use apr_core::batch::Batch;

use crate::float::{FloatKernels, Gemm};
use crate::kernels::SharedOut;
use crate::kv::{KvCache, Part, Tile};
use crate::pool::Pool;

/// Rows of one sequence that one task computes.
const ROWS_PER_TASK: usize = 8;

/// Buffers of one thread.
#[derive(Default)]
pub struct Scratch {
    key: Tile,
    value: Tile,
    /// `[n_q, head_dim]`, `n_q` being rows times query heads per KV head
    q: Vec<f32>,
    /// `[n_q, KV_BLOCK]`
    scores: Vec<f32>,
    /// `[n_q, head_dim]`: the weighted values of one tile
    part: Vec<f32>,
    /// `[n_q, head_dim]`: merged so far
    sum: Vec<f32>,
    /// Per query: largest score and sum of exponentials in one tile.
    tile: Vec<(f32, f32)>,
    /// Per query: the same, merged so far.
    max: Vec<f32>,
    total: Vec<f32>,
}

/// Stores the batch's keys and values in layer `il`. `qkv` is `[n_tokens, n_qkv]`.
pub fn store_kv(kv: &mut KvCache, qkv: &[f32], il: usize, heads: Heads, batch: &Batch) {
    for (row, values) in batch.rows().iter().zip(qkv.chunks_exact(heads.n_qkv())) {
        let (block, slot) = batch.slot(row);
        for (part, cols) in [(Part::Key, heads.k()), (Part::Value, heads.v())] {
            for (h, x) in values[cols].chunks_exact(heads.head_dim).enumerate() {
                kv.store(block, slot, il, part, h, x);
            }
        }
    }
}

/// Rows of the batch that one task computes: consecutive, of one sequence.
pub fn tasks(batch: &Batch, out: &mut Vec<Range<usize>>) {
    out.clear();
    for (i, row) in batch.rows().iter().enumerate() {
        match out.last_mut() {
            Some(last) if batch.rows()[last.start].sequence == row.sequence && last.len() < ROWS_PER_TASK => {
                last.end = i + 1
            }
            _ => out.push(i..i + 1),
        }
    }
}

/// Bytes of keys and values that the tasks read in one layer.
pub fn read_bytes(kv: &KvCache, heads: Heads, batch: &Batch, tasks: &[Range<usize>]) -> u64 {
    let per_position = 2 * heads.n_head_kv * kv.shape().kv_type.bytes(heads.head_dim);
    let positions = tasks.iter().map(|rows| batch.rows()[rows.end - 1].position as u64 + 1);
    positions.sum::<u64>() * per_position as u64
}

/// Attends: `out` `[n_tokens, n_head * head_dim]`.
pub fn attend(
    pool: &Pool,
    f: &FloatKernels,
    scratch: &[std::sync::Mutex<Scratch>],
    out: SharedOut<'_>,
    qkv: &[f32],
    kv: &KvCache,
    il: usize,
    heads: Heads,
    batch: &Batch,
    tasks: &[Range<usize>],
) {
    // Later rows see more positions: longest tasks first, so that threads end together.
    pool.run(tasks.len() * heads.n_head_kv, &|thread, task| {
        let rows = tasks[tasks.len() - 1 - task / heads.n_head_kv].clone();
        let mut s = scratch[thread].lock().unwrap_or_else(|e| e.into_inner());
        attend_rows(f, &mut s, &out, qkv, kv, (il, task % heads.n_head_kv), heads, batch, rows);
    });
}

/// What a task works on.
struct Task<'a> {
    f: &'a FloatKernels,
    kv: &'a KvCache,
    il: usize,
    /// The KV head.
    head: usize,
    head_dim: usize,
    /// Query heads per KV head.
    group: usize,
    batch: &'a Batch,
    rows: Range<usize>,
}

/// One task: the query heads of KV head `head` in `rows`.
fn attend_rows(
    f: &FloatKernels,
    s: &mut Scratch,
    out: &SharedOut<'_>,
    qkv: &[f32],
    kv: &KvCache,
    (il, head): (usize, usize),
    heads: Heads,
    batch: &Batch,
    rows: Range<usize>,
) {
    let (d, group) = (heads.head_dim, heads.n_head / heads.n_head_kv);
    let q_cols = head * group * d..(head + 1) * group * d;
    s.start(rows.len() * group, d);
    for (i, q) in rows.clone().zip(s.q.chunks_exact_mut(group * d)) {
        q.copy_from_slice(&qkv[i * heads.n_qkv()..][q_cols.clone()]);
    }
    let task = Task { f, kv, il, head, head_dim: d, group, batch, rows: rows.clone() };
    let table = batch.table(batch.rows()[rows.start].sequence);
    let last = batch.rows()[rows.end - 1].position as usize;
    for (t, &block) in table[..=last / KV_BLOCK].iter().enumerate() {
        task.attend_tile(s, t, block);
    }
    for (n, i) in rows.enumerate() {
        // SAFETY: tasks cover disjoint rows and, within a row, disjoint KV heads.
        let out = unsafe { out.cells(i, q_cols.clone()) };
        for (q, out) in (n * group..).zip(out.chunks_exact_mut(d)) {
            let total = s.total[q];
            out.iter_mut().zip(&s.sum[q * d..]).for_each(|(o, v)| *o = v / total);
        }
    }
}

impl Scratch {
    /// Makes room for `n_q` queries that have seen nothing yet.
    fn start(&mut self, n_q: usize, head_dim: usize) {
        self.q.resize(n_q * head_dim, 0.0);
        self.part.resize(n_q * head_dim, 0.0);
        self.scores.resize(n_q * KV_BLOCK, 0.0);
        self.tile.resize(n_q, (0.0, 0.0));
        self.sum.clear();
        self.sum.resize(n_q * head_dim, 0.0);
        self.max.clear();
        self.max.resize(n_q, f32::NEG_INFINITY);
        self.total.clear();
        self.total.resize(n_q, 0.0);
    }
}

impl Task<'_> {
    /// Attends to the `t`-th tile of the sequence and merges it into what came before.
    fn attend_tile(&self, s: &mut Scratch, t: usize, block: u32) {
        let (d, rows) = (self.head_dim, &self.batch.rows()[self.rows.clone()]);
        // Rows that end before this tile have nothing in it; positions ascend.
        let first = rows.partition_point(|r| (r.position as usize) < t * KV_BLOCK);
        let (from, n_q) = (first * self.group, rows.len() * self.group);
        let seen = |row: usize| (rows[row].position as usize + 1 - t * KV_BLOCK).min(KV_BLOCK);
        let b = self.kv.tile(block, self.il, Part::Key, self.head, &mut s.key);
        let (a, c) = (&s.q[from * d..], &mut s.scores[from * KV_BLOCK..]);
        self.f.gemm(Gemm { m: n_q - from, n: KV_BLOCK, k: d, a, lda: d, b, ldb: KV_BLOCK, c, ldc: KV_BLOCK });
        for q in from..n_q {
            let scores = &mut s.scores[q * KV_BLOCK..(q + 1) * KV_BLOCK];
            scores[seen(q / self.group)..].fill(f32::NEG_INFINITY);
            s.tile[q] = self.f.softmax_tile(scores, 1.0 / (d as f32).sqrt());
        }
        let b = self.kv.tile(block, self.il, Part::Value, self.head, &mut s.value);
        // Rows that see equally much go together. A row never touches values it does not see: zero times infinity is no zero.
        let mut row = first;
        while row < rows.len() {
            let k = seen(row);
            let m = rows[row..].iter().enumerate().take_while(|(i, _)| seen(row + i) == k).count() * self.group;
            let (a, c) = (&s.scores[row * self.group * KV_BLOCK..], &mut s.part[row * self.group * d..]);
            self.f.gemm(Gemm { m, n: d, k, a, lda: KV_BLOCK, b, ldb: d, c, ldc: d });
            row += m / self.group;
        }
        for q in from..n_q {
            let (max, total) = s.tile[q];
            let merged = s.max[q].max(max);
            let (keep, add) = ((s.max[q] - merged).exp(), (max - merged).exp());
            s.max[q] = merged;
            s.total[q] = keep * s.total[q] + add * total;
            self.f.axpby(&mut s.sum[q * d..(q + 1) * d], keep, &s.part[q * d..(q + 1) * d], add);
        }
    }
}
