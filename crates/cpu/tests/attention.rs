//! Attention against exact arithmetic: how much each type of cache adds to it.

use apr_core::backend::{Backend, Heads, KV_BLOCK, KvShape, KvType};
use apr_core::batch::{Batch, Row, Wants};
use apr_core::probe::NoProbe;
use apr_cpu::CpuBackend;
use apr_cpu::kernels::{Isa, Kernels};

const N_ROWS: usize = 2 * KV_BLOCK + 17;

/// Queries, keys and values with the distribution of a normal one but for its tails; the values `[N_ROWS, n_qkv]`.
fn values(heads: Heads, gain: f32) -> Vec<f32> {
    let mut state = 7u64;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    let (n, scores) = (heads.n_qkv(), heads.k().end);
    let mut normal = || gain * 2f32.sqrt() * (0..6).map(|_| uniform()).sum::<f32>();
    (0..N_ROWS * n).map(|i| if i % n < scores { normal() } else { normal() / gain }).collect()
}

/// The attention of every row in f64, keys and values rounded by `round` before.
fn exact(heads: Heads, qkv: &[f32], round: impl Fn(f32) -> f32) -> Vec<f64> {
    let (d, n) = (heads.head_dim, heads.n_qkv());
    let mut out = Vec::new();
    for (r, row) in qkv.chunks_exact(n).enumerate() {
        for head in 0..heads.n_head {
            let q = &row[head * d..(head + 1) * d];
            let at = |p: usize, cols: std::ops::Range<usize>| {
                qkv[p * n..(p + 1) * n][cols].iter().map(|&v| f64::from(round(v)))
            };
            let scores = (0..=r)
                .map(|p| at(p, heads.k()).zip(q).map(|(k, q)| k * f64::from(*q)).sum::<f64>() / (d as f64).sqrt());
            let scores: Vec<f64> = scores.collect();
            let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|s| (s - largest).exp()).collect();
            let mut sum = vec![0.0; d];
            for (p, w) in weights.iter().enumerate() {
                sum.iter_mut().zip(at(p, heads.v())).for_each(|(s, v)| *s += w * v);
            }
            let total: f64 = weights.iter().sum();
            out.extend(sum.iter().map(|s| s / total));
        }
    }
    out
}

/// The same on a backend, all rows in one step.
fn computed(isa: Isa, kv_type: KvType, heads: Heads, qkv: &[f32]) -> Vec<f64> {
    let b = CpuBackend::new(2, Some(isa)).unwrap();
    let mut kv = b.kv_cache(KvShape { n_layer: 1, n_head_kv: heads.n_head_kv, head_dim: heads.head_dim, kv_type });
    let n_block = N_ROWS.div_ceil(KV_BLOCK);
    b.kv_reserve(&mut kv, n_block).unwrap();
    let rows = (0..N_ROWS as u32).map(|position| Row { token: 0, position, sequence: 0, wants: Wants::Logits });
    let batch = Batch::new(rows.collect(), vec![(0..n_block as u32).collect()]);
    let (mut x, mut out) = (b.tensor(heads.n_qkv(), &[]), b.tensor(heads.n_head * heads.head_dim, &[]));
    let mut read = Vec::new();
    b.write(&mut x, qkv).unwrap();
    b.attention(&mut out, &x, &mut kv, 0, heads, &batch, &mut NoProbe).unwrap();
    b.read(&out, &mut read).unwrap();
    read.into_iter().map(f64::from).collect()
}

/// The size of the difference, relative to what is expected.
fn error(expected: &[f64], got: &[f64]) -> f64 {
    assert_eq!(expected.len(), got.len());
    let (e, s) = expected.iter().zip(got).fold((0.0, 0.0), |(e, s), (x, y)| (e + (x - y) * (x - y), s + x * x));
    (e / s).sqrt()
}

/// Integers of 16 bits add less to attention than half floats would, with products and sums of no error at all.
#[test]
fn sixteen_bits_are_more_precise_than_half_floats() {
    for (head_dim, n_head, gain) in
        [(32, 2, 1.0), (64, 3, 2.0), (128, 8, 1.0), (128, 2, 3.0), (24, 1, 1.0), (256, 4, 1.0)]
    {
        let heads = Heads { n_head, n_head_kv: 1, head_dim };
        let qkv = values(heads, gain);
        let expected = exact(heads, &qkv, |v| v);
        let of_halves = error(&expected, &exact(heads, &qkv, |v| half::f16::from_f32(v).to_f32()));
        for isa in Isa::ALL.into_iter().filter(|&isa| Kernels::for_isa(isa).is_some()) {
            let of = |kv_type| error(&expected, &computed(isa, kv_type, heads, &qkv));
            let (f16, f32) = (of(KvType::F16), of(KvType::F32));
            println!(
                "{isa}, {head_dim} columns, gain {gain}: f16 {f16:.2e} (half floats {of_halves:.2e}), f32 {f32:.2e}"
            );
            assert!(f16 < of_halves, "{isa}, {head_dim} columns: {f16:.2e}, half floats {of_halves:.2e}");
            assert!(f32 < 3e-6, "{isa}, {head_dim} columns: {f32:.2e}");
            if head_dim % 32 == 0 {
                let (q8_0, bound) = (of(KvType::Q8_0), 0.01 * f64::from(gain));
                assert!(q8_0 < bound, "{isa}, {head_dim} columns: q8_0 {q8_0:.2e}");
            }
        }
    }
}

/// A column of keys that is larger than all others takes bits from them, which half floats, with exponents of their own, keep.
#[test]
fn a_column_of_keys_that_stands_out_costs_little() {
    let heads = Heads { n_head: 4, n_head_kv: 1, head_dim: 128 };
    for (of_key, of_query) in [(10.0, 1.0), (30.0, 1.0), (100.0, 0.01)] {
        let mut qkv = values(heads, 1.0);
        for row in qkv.chunks_exact_mut(heads.n_qkv()) {
            row[heads.k()][5] *= of_key;
            row[heads.q()].chunks_exact_mut(heads.head_dim).for_each(|q| q[5] *= of_query);
        }
        let expected = exact(heads, &qkv, |v| v);
        let of_halves = error(&expected, &exact(heads, &qkv, |v| half::f16::from_f32(v).to_f32()));
        for isa in Isa::ALL.into_iter().filter(|&isa| Kernels::for_isa(isa).is_some()) {
            let f16 = error(&expected, &computed(isa, KvType::F16, heads, &qkv));
            println!("{isa}, a column times {of_key}, {of_query}: f16 {f16:.2e} (half floats {of_halves:.2e})");
            assert!(f16 < 1e-3, "{isa}, a column times {of_key}: {f16:.2e}, half floats {of_halves:.2e}");
        }
    }
}
