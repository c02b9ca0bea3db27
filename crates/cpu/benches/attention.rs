//! Speed of attention: its two products from cache as a share of what the multiply-add units can do, and the whole op in a
//! prefill and in a decode, the latter beside a plain read of the keys and values that it needs.
//!
//! `cargo bench -p apr-cpu --bench attention [-- ISA…]` measures the named instruction sets in turns, without a name what
//! start-up would choose. Shapes are those of Qwen3-30B-A3B: 32 query heads on 4 heads of keys and values, of 128 columns.

use std::hint::black_box;
use std::time::Instant;

use apr_core::backend::{Backend, Heads, KV_BLOCK, KvShape, KvType};
use apr_core::batch::{Batch, Row, Wants};
use apr_core::probe::NoProbe;
use apr_cpu::CpuBackend;
use apr_cpu::float::codes::{Coded, Product};
use apr_cpu::float::{FloatKernels, Gemm, Softmax};
use apr_cpu::kernels::{Isa, Kernels};
use apr_cpu::kv::{KvCache, Part};
use apr_cpu::peak;
use apr_cpu::tensor::CpuTensor;

const HEADS: Heads = Heads { n_head: 32, n_head_kv: 4, head_dim: 128 };
const N_LAYER: usize = 8;
const POSITIONS: usize = 4096;
const N_THREADS: usize = 2;
const TRIES: usize = 5;

fn main() {
    let mut isas: Vec<Isa> = std::env::args().skip(1).filter_map(|a| a.parse().ok()).collect();
    if isas.is_empty() {
        isas.push(Kernels::detect().isa());
    }
    let tables: Vec<&Kernels> =
        isas.iter().map(|&isa| Kernels::for_isa(isa).unwrap_or_else(|| panic!("this CPU lacks {isa}"))).collect();
    // Two vectors of eight floats a cycle.
    let peak = 16.0 * peak::clock_hz() / 1e9;
    println!("one thread, from cache; 16 multiply-adds a cycle are {peak:.1} GMAC/s");
    for (m, n, k) in [(128, 64, 128), (128, 128, 64), (8, 64, 128), (8, 128, 64)] {
        for in_integers in [true, false] {
            print!("{m:3} x {n:3} x {k:3} {}:", if in_integers { "i16" } else { "f32" });
            for kernels in &tables {
                let rate = product(kernels.float(), m, n, k, in_integers);
                print!("  {} {rate:.1} GMAC/s, {:.0} %", kernels.isa(), 100.0 * rate / peak);
            }
            println!();
        }
    }
    for kernels in &tables {
        row_by_row(kernels);
        coding(kernels);
    }
    println!("{N_THREADS} threads, {N_LAYER} layers");
    for kv_type in [KvType::F16, KvType::Q8_0] {
        let mut ops: Vec<Op> = isas.iter().map(|&isa| Op::new(isa, kv_type)).collect();
        for (n_rows, from) in [(256, 0), (256, POSITIONS - 256), (1, POSITIONS - 1)] {
            whole_op(&mut ops, kv_type, n_rows, from, N_THREADS as f64 * peak);
        }
    }
}

/// The median of the seconds of some runs of each of `works`, which take turns, after one that is not counted.
fn median_seconds<W>(works: &mut [W], mut run: impl FnMut(&mut W)) -> Vec<f64> {
    works.iter_mut().for_each(&mut run);
    let mut times = vec![[0.0; TRIES]; works.len()];
    for i in 0..TRIES {
        for (work, times) in works.iter_mut().zip(&mut times) {
            let start = Instant::now();
            run(work);
            times[i] = start.elapsed().as_secs_f64();
        }
    }
    times.iter_mut().for_each(|t| t.sort_by(f64::total_cmp));
    times.iter().map(|t| t[TRIES / 2]).collect()
}

fn values(n: usize) -> Vec<f32> {
    (0..n).map(|i| (i as f32 * 0.37).sin()).collect()
}

/// 10⁹ multiply-adds per second of a product from cache, in 16-bit integers or in floats.
fn product(f: &FloatKernels, m: usize, n: usize, k: usize, in_integers: bool) -> f64 {
    let (a, b, mut c) = (values(m * k), values(k * n), vec![0.0; m * n]);
    let pairs = |x: &[f32]| x.chunks_exact(2).map(|x| [(1e3 * x[0]) as i16, (1e3 * x[1]) as i16]).collect::<Vec<_>>();
    let (a_pairs, b_pairs, of_a) = (pairs(&a), pairs(&b), vec![1e-3; m]);
    let repeats = 30_000_000 / (m * n * k);
    let seconds = median_seconds(&mut [()], |_| {
        for _ in 0..repeats {
            let (a, a_pairs, c) = (black_box(&a), black_box(&a_pairs), &mut c);
            if in_integers {
                let (n_pairs, of_a, b, ahead) = (k / 2, &of_a, &b_pairs, &[]);
                f.weigh(Product { m, n, n_pairs, a: a_pairs, lda: n_pairs, of_a, b, ldb: n, c, ldc: n, ahead });
            } else {
                f.gemm(Gemm { m, n, k: 0..k, a, lda: k, ldb: n, c, ldc: n, add: false, ahead: &[] }, &b);
            }
        }
    });
    (repeats * m * n * k) as f64 / seconds[0] / 1e9
}

/// What makes codes of an 8-bit tile of keys and values, of queries and of weights, in nanoseconds.
fn coding(k: &Kernels) {
    let (f, d) = (k.float(), HEADS.head_dim);
    let (bytes, scales): (Vec<i8>, _) =
        ((0..d * KV_BLOCK).map(|i| (i * 37) as i8).collect(), values(d * KV_BLOCK / 32));
    let (mut pairs, mut units) = (vec![[0; 2]; d / 2 * KV_BLOCK], [0.0; KV_BLOCK]);
    let (queries, weights) = (values(8 * d), values(8 * KV_BLOCK).iter().map(|v| v.abs()).collect::<Vec<_>>());
    let mut timed = |run: &mut dyn FnMut(Coded<'_>)| {
        let seconds = median_seconds(&mut [()], |_| {
            (0..2000).for_each(|_| run(Coded { pairs: black_box(&mut pairs), scales: &mut units }));
        });
        1e9 * seconds[0] / 2000.0
    };
    let (mut codes, mut of_weights) = (vec![[0; 2]; 8 * KV_BLOCK / 2], [0.0; 8]);
    println!(
        "{}, ns: codes of a q8_0 tile of keys {:.0}, of values {:.0}; of 8 queries {:.0}, of their weights {:.0}",
        k.isa(),
        timed(&mut |to| f.widen_keys(black_box(&bytes), &scales, to)),
        timed(&mut |to| f.widen_values(black_box(&bytes), &scales, to)),
        timed(&mut |to| f.code_queries(black_box(&queries), &mut to.pairs[..4 * d], &mut to.scales[..8])),
        timed(&mut |to| f.code_weights(black_box(&weights), to.scales, &mut codes, &mut of_weights)),
    );
}

/// What is done row by row, in nanoseconds for a row.
fn row_by_row(k: &Kernels) {
    let f = k.float();
    let timed = |n: usize, run: &mut dyn FnMut(&mut [f32])| {
        let before = values(n);
        let mut x = before.clone();
        let seconds = median_seconds(&mut [()], |_| {
            for _ in 0..20_000 {
                x.copy_from_slice(&before);
                run(black_box(&mut x));
            }
        });
        1e9 * seconds[0] / 20_000.0
    };
    let (w, mut out) = (values(2048), vec![0.0; 2048]);
    let mut blocks = apr_cpu::kernels::Q8Rows::new();
    blocks.resize(1, 2048);
    println!(
        "{}, ns a row, a copy of it included: softmax of 64 {:.1}, swiglu of 768 {:.1}, norm of 2048 {:.1}, \
         quantizing 2048 {:.1}",
        k.isa(),
        timed(KV_BLOCK, &mut |scores| {
            let (max, total, sum) = (&mut [0.0], &mut [0.0], &mut [0.0; HEADS.head_dim]);
            f.softmax(Softmax { scores, scale: 0.1, max, total, sum });
        }),
        timed(768, &mut |x| f.swiglu(x, &w[..768])),
        timed(2048, &mut |x| f.normalise(x, &w, 1e-6, &mut out)),
        timed(2048, &mut |x| k.quantize_row(x, blocks.row_mut(0))),
    );
}

/// A backend with a cache of [`POSITIONS`] positions.
struct Op {
    backend: CpuBackend,
    kv: KvCache,
    qkv: CpuTensor,
    out: CpuTensor,
}

impl Op {
    fn new(isa: Isa, kv_type: KvType) -> Op {
        let backend = CpuBackend::new(N_THREADS, Some(isa)).unwrap();
        let shape = KvShape { n_layer: N_LAYER, n_head_kv: HEADS.n_head_kv, head_dim: HEADS.head_dim, kv_type };
        let mut kv = backend.kv_cache(shape);
        backend.kv_reserve(&mut kv, POSITIONS / KV_BLOCK).unwrap();
        let (qkv, out) = (backend.tensor(HEADS.n_qkv(), &[]), backend.tensor(HEADS.n_head * HEADS.head_dim, &[]));
        let x = values(2 * HEADS.head_dim);
        for il in 0..N_LAYER {
            for mut head in kv.heads_mut(0..(POSITIONS / KV_BLOCK) as u32, il) {
                for (slot, part) in (0..KV_BLOCK).flat_map(|slot| [(slot, Part::Key), (slot, Part::Value)]) {
                    head.store(slot, part, &x[slot..][..HEADS.head_dim]);
                }
            }
        }
        Op { backend, kv, qkv, out }
    }

    fn write(&mut self, n_rows: usize) {
        self.backend.write(&mut self.qkv, &values(n_rows * HEADS.n_qkv())).unwrap();
    }

    fn attend(&mut self, il: usize, batch: &Batch) {
        self.backend.attention(&mut self.out, &self.qkv, &mut self.kv, il, HEADS, batch, &mut NoProbe).unwrap();
    }
}

fn batch(n_rows: usize, from: usize) -> Batch {
    let row = |i| Row { token: 0, position: (from + i) as u32, sequence: 0, wants: Wants::Logits };
    Batch::new((0..n_rows).map(row).collect(), vec![(0..(POSITIONS / KV_BLOCK) as u32).collect()])
}

/// The op over all layers, `n_rows` rows from position `from` on, and a plain read of the whole cache.
fn whole_op(ops: &mut [Op], kv_type: KvType, n_rows: usize, from: usize, peak: f64) {
    let batch = batch(n_rows, from);
    ops.iter_mut().for_each(|op| op.write(n_rows));
    let seconds = median_seconds(ops, |op| (0..N_LAYER).for_each(|il| op.attend(il, &batch)));
    let pairs: usize = (from + 1..=from + n_rows).sum();
    let fmas = (2 * N_LAYER * HEADS.n_head * HEADS.head_dim * pairs) as f64;
    print!("{kv_type} {n_rows} rows from {from} on:");
    for (op, s) in ops.iter().zip(seconds) {
        let share = 100.0 * fmas / s / 1e9 / peak;
        print!("  {} {:.2} ms, {share:.0} % of multiply-adds", op.backend.isa(), 1e3 * s);
    }
    let s = median_seconds(&mut ops[..1], |op| plain_read(&op.kv))[0];
    println!("; all keys and values read {:.2} ms", 1e3 * s);
}

/// Reads every byte of the cache, in words wide enough that memory is the limit.
fn plain_read(kv: &KvCache) {
    std::thread::scope(|s| {
        for thread in 0..N_THREADS {
            s.spawn(move || {
                let mut sums = [0u64; 16];
                for block in (thread..POSITIONS / KV_BLOCK).step_by(N_THREADS) {
                    for chunk in kv.block(block as u32).as_chunks::<128>().0 {
                        for (sum, word) in sums.iter_mut().zip(chunk.as_chunks::<8>().0) {
                            *sum = sum.wrapping_add(u64::from_le_bytes(*word));
                        }
                    }
                }
                black_box(sums);
            });
        }
    });
}
