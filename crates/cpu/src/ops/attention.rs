//! Attention over the KV cache: grouped queries as a small matrix product, tile by tile.
//!
//! One task is one KV head and a few consecutive rows of a sequence. All query heads that share the KV head run together, so that
//! a tile of keys and values is read once for all of them. Tiles of [`KV_BLOCK`] absolute positions are summed in ascending
//! order, in spans of [`SPAN_TILES`]: what a span has so far is scaled down where a tile has a larger score (online softmax,
//! arXiv:1805.02867). Spans, each with a maximum, a sum and weighted values, are merged into the row in ascending order. Where
//! rows are too few to occupy all threads, as in decoding, the spans of a row are tasks of their own and are merged afterwards. A
//! row's result depends on its own query and the cache only, never on which rows are computed with it or on how the work was cut.

use std::ops::Range;
use std::sync::Mutex;

use apr_core::backend::{Heads, KV_BLOCK, KvType};
use apr_core::batch::Batch;

use crate::float::codes::Product;
use crate::float::{FloatKernels, Gemm, Softmax};
use crate::kernels::SharedOut;
use crate::kv::{KvCache, Part, Room, Tile};
use crate::lines::Lines;
use crate::pool::Pool;

/// Rows of one sequence that one task computes.
const ROWS_PER_TASK: usize = 16;

/// Scores are computed in groups of so many positions.
const COLUMNS: usize = 16;

/// Tiles that are summed before they join the row: what one task of a split row covers.
const SPAN_TILES: usize = 8;

/// Buffers of one thread.
#[derive(Default)]
pub struct Scratch {
    /// A tile of keys, and then of values.
    tile: Room,
    /// `[n_q, head_dim]`, `n_q` being rows times query heads per KV head
    q: Lines,
    /// `[n_q, KV_BLOCK]`
    scores: Lines,
    codes: Codes,
    /// One span.
    span: Merged,
    /// The spans so far.
    row: Merged,
}

/// What is multiplied in integers, and what a unit of each row or position is worth.
#[derive(Default)]
struct Codes {
    /// `[n_q, head_dim / 2]` pairs
    q: Lines,
    of_q: Vec<f32>,
    /// `[n_q, KV_BLOCK / 2]` pairs
    weights: Lines,
    of_weights: Vec<f32>,
}

/// Per query the softmax over some positions, not yet normalised.
#[derive(Default)]
struct Merged {
    max: Vec<f32>,
    total: Vec<f32>,
    /// `[n_q, head_dim]`
    sum: Lines,
}

/// What [`attend`] needs beside the step itself.
pub struct Machine<'a> {
    pub pool: &'a Pool,
    pub float: &'a FloatKernels,
    /// One per thread.
    pub scratch: &'a [Mutex<Scratch>],
}

/// Queries, keys and values of one layer's step.
#[derive(Clone, Copy)]
pub struct Layer<'a> {
    /// `[n_tokens, n_qkv]`
    pub qkv: &'a [f32],
    pub kv: &'a KvCache,
    pub il: usize,
    pub heads: Heads,
    pub batch: &'a Batch,
}

/// How a step's attention is cut into tasks; kept from step to step.
#[derive(Default)]
pub struct Plan {
    /// Rows of the batch that one task computes: consecutive, of one sequence.
    rows: Vec<Range<usize>>,
    /// Block and row of every key and value that the step stores, sorted.
    stored: Vec<(u32, usize)>,
    /// In a split step: the index in `rows` and the span of each task.
    spans: Vec<(usize, usize)>,
    /// In a split step: where the spans of `rows[i]` begin in `partial`, counted in queries.
    starts: Vec<usize>,
    /// In a split step, per span and query of a row: `head_dim` weighted values, the maximum and the sum.
    partial: Vec<f32>,
}

/// Stores the batch's keys and values in layer `il`: a head and block are a task. `qkv` is `[n_tokens, n_qkv]`.
pub fn store_kv(pool: &Pool, plan: &Plan, kv: &mut KvCache, qkv: &[f32], il: usize, heads: Heads, batch: &Batch) {
    let of_blocks: Vec<&[(u32, usize)]> = plan.stored.chunk_by(|a, b| a.0 == b.0).collect();
    let to: Vec<_> = kv.heads_mut(of_blocks.iter().map(|rows| rows[0].0), il).into_iter().map(Mutex::new).collect();
    let store = |task: usize| {
        let (rows, head) = (of_blocks[task / heads.n_head_kv], task % heads.n_head_kv);
        let mut to = to[task].lock().unwrap_or_else(|e| e.into_inner());
        for &(_, i) in rows {
            let slot = batch.rows()[i].position as usize % KV_BLOCK;
            for (part, cols) in [(Part::Key, heads.k()), (Part::Value, heads.v())] {
                let x = &qkv[i * heads.n_qkv()..][cols][head * heads.head_dim..][..heads.head_dim];
                to.store(slot, part, x);
            }
        }
    };
    // Waking another thread costs more than a few rows.
    match plan.stored.len() < ROWS_PER_TASK {
        true => (0..to.len()).for_each(store),
        false => pool.run(to.len(), &|_, task| store(task)),
    }
}

impl Plan {
    /// Cuts a step into groups of rows, and sorts what it stores by block.
    pub fn prepare(&mut self, batch: &Batch) {
        self.stored.clear();
        self.stored.extend(batch.rows().iter().enumerate().map(|(i, row)| (batch.slot(row).0, i)));
        self.stored.sort_unstable();
        self.rows.clear();
        for (i, row) in batch.rows().iter().enumerate() {
            match self.rows.last_mut() {
                Some(last) if batch.rows()[last.start].sequence == row.sequence && last.len() < ROWS_PER_TASK => {
                    last.end = i + 1
                }
                _ => self.rows.push(i..i + 1),
            }
        }
    }

    /// Bytes of keys and values that the tasks read in one layer.
    pub fn read_bytes(&self, layer: &Layer<'_>) -> u64 {
        let per_position = layer.kv.block_bytes() / layer.kv.shape().n_layer / KV_BLOCK;
        let positions = self.rows.iter().map(|rows| layer.batch.rows()[rows.end - 1].position as u64 + 1);
        positions.sum::<u64>() * per_position as u64
    }

    /// Cuts every group of rows into spans, and makes room for what they give.
    fn split(&mut self, layer: &Layer<'_>) {
        self.spans.clear();
        self.starts.clear();
        let mut n_q = 0;
        for (i, rows) in self.rows.iter().enumerate() {
            let n_span = n_span(layer.batch, rows);
            self.starts.push(n_q);
            self.spans.extend((0..n_span).map(|span| (i, span)));
            n_q += n_span * rows.len() * layer.heads.n_head;
        }
        self.partial.resize(n_q * (layer.heads.head_dim + 2), 0.0);
    }
}

/// Spans that the last of `rows` sees.
fn n_span(batch: &Batch, rows: &Range<usize>) -> usize {
    batch.rows()[rows.end - 1].position as usize / (SPAN_TILES * KV_BLOCK) + 1
}

/// Attends: `out` `[n_tokens, n_head * head_dim]`.
pub fn attend(m: &Machine<'_>, plan: &mut Plan, layer: Layer<'_>, out: SharedOut<'_>) {
    let n_threads = m.pool.n_threads();
    let n_span: usize = plan.rows.iter().map(|rows| n_span(layer.batch, rows)).sum();
    if plan.rows.len() * layer.heads.n_head_kv >= 4 * n_threads || n_span == plan.rows.len() {
        attend_whole(m, &plan.rows, layer, out);
    } else {
        plan.split(&layer);
        attend_split(m, plan, layer, out);
    }
}

/// Every task goes through all spans of its rows.
fn attend_whole(m: &Machine<'_>, rows: &[Range<usize>], layer: Layer<'_>, out: SharedOut<'_>) {
    let (n_head_kv, n_threads) = (layer.heads.n_head_kv, m.pool.n_threads());
    let n = rows.len() * n_head_kv;
    // Later rows see more positions. Threads work through runs of tasks, so tasks are dealt out in turns, the longest ones first.
    let per_thread = n.div_ceil(n_threads);
    m.pool.run(per_thread * n_threads, &|thread, task| {
        let nth = task % per_thread * n_threads + task / per_thread;
        if nth >= n {
            return;
        }
        let rows = rows[rows.len() - 1 - nth / n_head_kv].clone();
        let mut s = m.scratch[thread].lock().unwrap_or_else(|e| e.into_inner());
        let task = Task::new(m.float, layer, nth % n_head_kv, rows);
        task.start(&mut s);
        s.row.clear(task.n_q(), layer.heads.head_dim);
        for span in 0..n_span(layer.batch, &task.rows) {
            task.attend_span(&mut s, span);
            let Scratch { span, row, .. } = &mut *s;
            for (q, sum) in span.sum.chunks_exact(layer.heads.head_dim).enumerate() {
                row.add(m.float, q, span.max[q], span.total[q], sum);
            }
        }
        task.write(&s.row, &out);
    });
}

/// Every span of some rows is a task, and what they give is merged afterwards.
fn attend_split(m: &Machine<'_>, plan: &mut Plan, layer: Layer<'_>, out: SharedOut<'_>) {
    let Heads { n_head, n_head_kv, head_dim } = layer.heads;
    let (group, n_cols) = (n_head / n_head_kv, head_dim + 2);
    // Where query `q` of a task finds its place: spans of some rows lie together, then heads, then rows.
    let at =
        |i: usize, span: usize, n_rows: usize, head: usize| plan.starts[i] + (span * n_head_kv + head) * n_rows * group;
    let partial = SharedOut::new(&mut plan.partial, n_cols);
    m.pool.run(plan.spans.len() * n_head_kv, &|thread, task| {
        let ((i, span), head) = (plan.spans[task / n_head_kv], task % n_head_kv);
        let mut s = m.scratch[thread].lock().unwrap_or_else(|e| e.into_inner());
        let task = Task::new(m.float, layer, head, plan.rows[i].clone());
        task.start(&mut s);
        task.attend_span(&mut s, span);
        for q in 0..task.n_q() {
            // SAFETY: every span, head and query has a row of its own.
            let to = unsafe { partial.cells(at(i, span, task.rows.len(), head) + q, 0..n_cols) };
            to[..head_dim].copy_from_slice(&s.span.sum[q * head_dim..(q + 1) * head_dim]);
            (to[head_dim], to[head_dim + 1]) = (s.span.max[q], s.span.total[q]);
        }
    });
    m.pool.run(plan.rows.len() * n_head_kv, &|thread, task| {
        let (i, head) = (task / n_head_kv, task % n_head_kv);
        let mut s = m.scratch[thread].lock().unwrap_or_else(|e| e.into_inner());
        let task = Task::new(m.float, layer, head, plan.rows[i].clone());
        s.row.clear(task.n_q(), head_dim);
        for span in 0..n_span(layer.batch, &task.rows) {
            for q in 0..task.n_q() {
                // SAFETY: the loop that wrote these rows has ended.
                let from = unsafe { partial.cells(at(i, span, task.rows.len(), head) + q, 0..n_cols) };
                s.row.add(m.float, q, from[head_dim], from[head_dim + 1], &from[..head_dim]);
            }
        }
        task.write(&s.row, &out);
    });
}

impl Merged {
    /// Makes room for `n_q` queries that have seen nothing yet.
    fn clear(&mut self, n_q: usize, head_dim: usize) {
        self.sum.resize(n_q * head_dim);
        self.sum.fill(0.0);
        self.max.clear();
        self.max.resize(n_q, f32::NEG_INFINITY);
        self.total.clear();
        self.total.resize(n_q, 0.0);
    }

    /// Adds positions that query `q` has seen elsewhere. Positions that it does not see at all change nothing.
    fn add(&mut self, f: &FloatKernels, q: usize, max: f32, total: f32, sum: &[f32]) {
        if total == 0.0 {
            return;
        }
        let merged = self.max[q].max(max);
        // One of both is `exp(0)`.
        let weight = |max: f32| if max == merged { 1.0 } else { (max - merged).exp() };
        let (keep, add) = (weight(self.max[q]), weight(max));
        self.max[q] = merged;
        self.total[q] = keep * self.total[q] + add * total;
        f.axpby(&mut self.sum[q * sum.len()..(q + 1) * sum.len()], keep, sum, add);
    }
}

/// What a task works on: the query heads of KV head `head` in `rows`.
struct Task<'a> {
    f: &'a FloatKernels,
    layer: Layer<'a>,
    head: usize,
    /// Query heads per KV head.
    group: usize,
    rows: Range<usize>,
}

impl<'a> Task<'a> {
    fn new(f: &'a FloatKernels, layer: Layer<'a>, head: usize, rows: Range<usize>) -> Task<'a> {
        Task { f, layer, head, group: layer.heads.n_head / layer.heads.n_head_kv, rows }
    }

    fn n_q(&self) -> usize {
        self.rows.len() * self.group
    }

    /// Columns of the task's heads among the queries, and in the output.
    fn cols(&self) -> Range<usize> {
        let n = self.group * self.layer.heads.head_dim;
        self.head * n..(self.head + 1) * n
    }

    /// Makes room and gathers the queries.
    fn start(&self, s: &mut Scratch) {
        let (n_q, d) = (self.n_q(), self.layer.heads.head_dim);
        s.q.resize(n_q * d);
        s.scores.resize(n_q * KV_BLOCK);
        for (i, q) in self.rows.clone().zip(s.q.chunks_exact_mut(self.group * d)) {
            q.copy_from_slice(&self.layer.qkv[i * self.layer.heads.n_qkv()..][self.cols()]);
        }
        if self.in_integers() {
            let c = &mut s.codes;
            c.q.resize(n_q * d / 2);
            c.of_q.resize(n_q, 0.0);
            c.weights.resize(n_q * KV_BLOCK / 2);
            c.of_weights.resize(n_q, 0.0);
            self.f.code_queries(&s.q, bytemuck::cast_slice_mut(&mut c.q), &mut c.of_q);
        }
    }

    /// Whether keys and values are multiplied as integers of 16 bits, which have at least the precision of what the cache holds.
    fn in_integers(&self) -> bool {
        self.layer.kv.shape().kv_type != KvType::F32
    }

    /// Attends to the `span`-th span of the sequence, as far as the rows see.
    fn attend_span(&self, s: &mut Scratch, span: usize) {
        let batch = self.layer.batch;
        s.span.clear(self.n_q(), self.layer.heads.head_dim);
        let table = batch.table(batch.rows()[self.rows.start].sequence);
        let last = batch.rows()[self.rows.end - 1].position as usize / KV_BLOCK;
        let tiles = span * SPAN_TILES..((span + 1) * SPAN_TILES).min(last + 1);
        // The next task of a thread is mostly the next head in the same span.
        let other_head = (table[tiles.start], (self.head + 1) % self.layer.heads.n_head_kv);
        for t in tiles.clone() {
            let next = if t + 1 < tiles.end { (table[t + 1], self.head) } else { other_head };
            self.attend_tile(s, t, table[t], next);
        }
    }

    /// Attends to the `t`-th tile of the sequence, in addition to what came before in its span. The keys of the `next` block and
    /// head are fetched into the cache.
    fn attend_tile(&self, s: &mut Scratch, t: usize, block: u32, next: (u32, usize)) {
        let Layer { heads, batch, .. } = self.layer;
        let (d, rows) = (heads.head_dim, &batch.rows()[self.rows.clone()]);
        // Rows that end before this tile have nothing in it; positions ascend.
        let first = rows.partition_point(|r| (r.position as usize) < t * KV_BLOCK);
        let (from, n_q) = (first * self.group, rows.len() * self.group);
        let seen = |row: usize| (rows[row].position as usize + 1 - t * KV_BLOCK).min(KV_BLOCK);
        self.score(s, from..n_q, seen(rows.len() - 1).next_multiple_of(COLUMNS), block);
        for q in from..n_q {
            s.scores[q * KV_BLOCK..(q + 1) * KV_BLOCK][seen(q / self.group)..].fill(f32::NEG_INFINITY);
        }
        self.f.softmax(Softmax {
            scores: &mut s.scores[from * KV_BLOCK..n_q * KV_BLOCK],
            scale: 1.0 / (d as f32).sqrt(),
            max: &mut s.span.max[from..],
            total: &mut s.span.total[from..],
            sum: &mut s.span.sum[from * d..],
        });
        self.weigh(s, first..rows.len(), &seen, block, next);
    }

    /// The scores of queries `q` with the first `n` keys of a tile. Its values are fetched into the cache.
    fn score(&self, s: &mut Scratch, q: Range<usize>, n: usize, block: u32) {
        let (d, m, ldc) = (self.layer.heads.head_dim, q.len(), KV_BLOCK);
        let c = &mut s.scores[q.start * KV_BLOCK..];
        let ahead = self.bytes(block, Part::Value, self.head);
        match self.tile(block, Part::Key, &mut s.tile) {
            Tile::Floats(keys) => {
                let a = &s.q[q.start * d..];
                self.f.gemm(Gemm { m, n, k: 0..d, a, lda: d, ldb: KV_BLOCK, c, ldc, add: false, ahead }, keys);
            }
            Tile::Codes(b, units) => {
                let (n_pairs, of_a) = (d / 2, &s.codes.of_q[q.clone()]);
                let a = &bytemuck::cast_slice(&s.codes.q)[q.start * n_pairs..];
                let p = Product { m, n, n_pairs, a, lda: n_pairs, of_a, b, ldb: KV_BLOCK, c, ldc, ahead };
                self.f.score(p, &units[..n]);
            }
        }
    }

    /// Adds the weights of `rows` times a tile's values, of which row `i` sees the first `seen(i)`. The keys of the `next` block and
    /// head are fetched into the cache.
    fn weigh(
        &self,
        s: &mut Scratch,
        rows: Range<usize>,
        seen: &impl Fn(usize) -> usize,
        block: u32,
        next: (u32, usize),
    ) {
        let (d, q) = (self.layer.heads.head_dim, rows.start * self.group..rows.end * self.group);
        let mut ahead = self.bytes(next.0, Part::Key, next.1);
        match self.tile(block, Part::Value, &mut s.tile) {
            // No row touches values that it does not see, as zero times infinity is no zero: what all see goes first, the rest row by
            // row.
            Tile::Floats(values) => {
                let all = seen(rows.start);
                let later = rows.clone().filter(|&row| seen(row) > all).map(|row| (row..row + 1, all..seen(row)));
                for (rows, k) in std::iter::once((rows.clone(), 0..all)).chain(later) {
                    let (m, q) = (rows.len() * self.group, rows.start * self.group);
                    let (a, c) = (&s.scores[q * KV_BLOCK..], &mut s.span.sum[q * d..]);
                    self.f.gemm(Gemm { m, n: d, k, a, lda: KV_BLOCK, ldb: d, c, ldc: d, add: true, ahead }, values);
                    ahead = &[];
                }
            }
            // What a row does not see has weight 0, which adds nothing.
            Tile::Codes(b, units) => {
                let n_pairs = KV_BLOCK / 2;
                let weights = &s.scores[q.start * KV_BLOCK..q.end * KV_BLOCK];
                let a = &mut bytemuck::cast_slice_mut(&mut s.codes.weights)[q.start * n_pairs..q.end * n_pairs];
                let of_a = &mut s.codes.of_weights[q.clone()];
                self.f.code_weights(weights, units, a, of_a);
                let (c, m) = (&mut s.span.sum[q.start * d..], q.len());
                self.f.weigh(Product { m, n: d, n_pairs, a, lda: n_pairs, of_a, b, ldb: d, c, ldc: d, ahead });
            }
        }
    }

    /// What a product with these keys or values reads.
    fn bytes(&self, block: u32, part: Part, head: usize) -> &'a [u8] {
        self.layer.kv.tile_of(block, self.layer.il, part, head)
    }

    /// A tile of the head's keys or values.
    fn tile<'t>(&'t self, block: u32, part: Part, room: &'t mut Room) -> Tile<'t> {
        self.layer.kv.tile(self.f, block, self.layer.il, part, self.head, room)
    }

    /// Writes the normalised results of the task's rows.
    fn write(&self, row: &Merged, out: &SharedOut<'_>) {
        let d = self.layer.heads.head_dim;
        for (n, i) in self.rows.clone().enumerate() {
            // SAFETY: tasks cover disjoint rows and, within a row, disjoint KV heads.
            let out = unsafe { out.cells(i, self.cols()) };
            for (q, out) in (n * self.group..).zip(out.chunks_exact_mut(d)) {
                let total = row.total[q];
                out.iter_mut().zip(&row.sum[q * d..]).for_each(|(o, v)| *o = v / total);
            }
        }
    }
}
