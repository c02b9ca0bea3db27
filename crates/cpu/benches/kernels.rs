//! Speed of the matrix kernels: from cache in GMAC/s, and over a matrix far larger than any cache as a share of a plain
//! read of the same bytes.
//!
//! `cargo bench -p apr-cpu --bench kernels [-- ISA] [NAME…]` measures the named quant types, without names the common
//! ones, on the named instruction set, without one on what start-up would choose.

use std::hint::black_box;
use std::time::Instant;

use apr_core::qtype::GgmlType;
use apr_cpu::kernels::{Isa, Kernels, PanelScratch, Q8Rows, SharedOut, WeightRows};

const N_COLS: usize = 2048;
const STREAMED_BYTES: usize = 600 << 20;

fn main() {
    let arguments = std::env::args().skip(1).filter(|a| !a.starts_with('-'));
    let (isas, named): (Vec<String>, Vec<String>) = arguments.partition(|a| a.parse::<Isa>().is_ok());
    let common = ["Q4_K", "Q6_K", "Q5_K", "Q8_0", "Q4_1", "Q4_0", "Q5_0"].map(String::from);
    let names = if named.is_empty() { common.to_vec() } else { named };
    let types = GgmlType::ALL.into_iter().filter(|q| !q.is_float() && names.iter().any(|n| n == q.name()));
    let k = match isas.first().map(|name| name.parse().unwrap()) {
        None => Kernels::detect(),
        Some(isa) => Kernels::for_isa(isa).unwrap_or_else(|| panic!("this CPU lacks {isa}")),
    };
    let memory: Vec<u8> = (0..STREAMED_BYTES).map(|i| (i as u32).wrapping_mul(0x9e37_79b1) as u8 & 0x3f).collect();
    println!("{}; {N_COLS} columns", k.isa());
    for qtype in types {
        print!("{qtype:7} GMAC/s:");
        for n_tokens in [1, 2, 3, 4, 8, 32, 128] {
            print!("  {n_tokens} tokens {:.1}", tiles(k, qtype, &memory, n_tokens));
        }
        println!();
        for n_threads in [1, 2] {
            let read = stream(n_threads, &memory, |part| _ = black_box(plain_read(part)));
            print!("{qtype:7} {n_threads} threads, of a plain read's {read:.1} GB/s:");
            for n_tokens in [1, 2, 3, 4, 6, 8] {
                let share = 100.0 * streamed(k, qtype, &memory, n_threads, n_tokens) / read;
                print!("  {n_tokens} tokens {share:.0} %");
            }
            let weights_per_byte = qtype.block_len() as f64 / qtype.block_bytes() as f64;
            let rate = 32.0 * weights_per_byte * streamed(k, qtype, &memory, n_threads, 32);
            println!("  32 tokens {rate:.0} GMAC/s");
        }
    }
}

/// The median of the seconds of five runs, after one that is not counted.
fn median_seconds(mut run: impl FnMut()) -> f64 {
    run();
    let mut times = std::array::from_fn::<f64, 5, _>(|_| {
        let start = Instant::now();
        run();
        start.elapsed().as_secs_f64()
    });
    times.sort_by(f64::total_cmp);
    times[2]
}

fn activations(k: &Kernels, n_tokens: usize) -> Q8Rows {
    let x: Vec<f32> = (0..N_COLS).map(|i| (i as f32 * 0.7).sin()).collect();
    let mut rows = Q8Rows::new();
    rows.resize(n_tokens, N_COLS);
    (0..n_tokens).for_each(|t| k.quantize_row(&x, rows.row_mut(t)));
    rows
}

/// 10⁹ multiply-adds per second of one thread, unpacking included, for 64 rows that stay in cache.
fn tiles(k: &Kernels, qtype: GgmlType, memory: &[u8], n_tokens: usize) -> f64 {
    let n_rows = 64;
    let w = WeightRows::new(qtype, &memory[..n_rows * qtype.row_bytes(N_COLS)], N_COLS);
    let x = activations(k, n_tokens);
    let tokens: Vec<u32> = (0..n_tokens as u32).collect();
    let mut out = vec![0.0; n_tokens * n_rows];
    let mut scratch = PanelScratch::new();
    let repeats = (512 / n_tokens).max(1);
    let seconds = median_seconds(|| {
        for _ in 0..repeats {
            let mut to = apr_cpu::kernels::Out::new(&mut out, n_rows);
            k.matmul_q8(w, black_box(&x), &tokens, &mut to, &tokens, &mut scratch);
        }
    });
    (repeats * n_rows * N_COLS * n_tokens) as f64 / seconds / 1e9
}

/// GB/s of `work` over all of `memory`, cut into one part per thread.
fn stream(n_threads: usize, memory: &[u8], work: impl Fn(&[u8]) + Sync) -> f64 {
    let seconds = median_seconds(|| {
        std::thread::scope(|s| {
            for part in memory.chunks(memory.len().div_ceil(n_threads)) {
                s.spawn(|| work(part));
            }
        });
    });
    memory.len() as f64 / seconds / 1e9
}

/// Reads every byte, in words wide enough that memory is the limit.
fn plain_read(memory: &[u8]) -> u64 {
    let mut sums = [0u64; 16];
    for chunk in memory.as_chunks::<128>().0 {
        for (sum, word) in sums.iter_mut().zip(chunk.as_chunks::<8>().0) {
            *sum = sum.wrapping_add(u64::from_le_bytes(*word));
        }
    }
    sums.into_iter().fold(0, u64::wrapping_add)
}

/// GB/s of weights multiplied with tokens, 64 rows a call.
fn streamed(k: &Kernels, qtype: GgmlType, memory: &[u8], n_threads: usize, n_tokens: usize) -> f64 {
    let row_bytes = qtype.row_bytes(N_COLS);
    let n_rows = memory.len() / row_bytes / 128 * 128;
    let w = WeightRows::new(qtype, &memory[..n_rows * row_bytes], N_COLS);
    let x = activations(k, n_tokens);
    let tokens: Vec<u32> = (0..n_tokens as u32).collect();
    let mut out = vec![0.0; n_tokens * n_rows];
    let per_thread = n_rows / n_threads;
    let seconds = median_seconds(|| {
        let shared = SharedOut::new(&mut out, n_rows);
        std::thread::scope(|s| {
            for thread in 0..n_threads {
                let (x, tokens) = (&x, &tokens[..]);
                s.spawn(move || {
                    let mut scratch = PanelScratch::new();
                    for r in (thread * per_thread..(thread + 1) * per_thread).step_by(64) {
                        // SAFETY: every call of every thread has columns of its own.
                        let mut to = unsafe { shared.cols(r..r + 64) };
                        k.matmul_q8(w.rows(r..r + 64), x, tokens, &mut to, tokens, &mut scratch);
                    }
                });
            }
        });
    });
    (n_rows * row_bytes) as f64 / seconds / 1e9
}
