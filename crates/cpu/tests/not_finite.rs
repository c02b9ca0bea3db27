//! Attention is causal also for values that are not finite, and NaN is not lost in the cache.

use apr_core::backend::{BEST_MAX, Backend, Best, Heads, KvShape, KvType};
use apr_core::batch::{Batch, Row, Wants};
use apr_core::probe::NoProbe;
use apr_core::stats::RowStats;
use apr_cpu::CpuBackend;
use apr_cpu::kernels::{Isa, Kernels};
use apr_cpu::kv::{KvCache, Part, Room};

const HEADS: Heads = Heads { n_head: 1, n_head_kv: 1, head_dim: 32 };

/// The attention of rows `from..` of `qkv` in one step.
fn attend(b: &CpuBackend, kv: &mut KvCache, qkv: &[f32], from: u32) -> Vec<f32> {
    let n = HEADS.n_qkv();
    let rows =
        (0..qkv.len() / n).map(|i| Row { token: 0, position: from + i as u32, sequence: 0, wants: Wants::Logits });
    let batch = Batch::new(rows.collect(), vec![vec![0]]);
    let (mut x, mut out, mut read) = (b.tensor(n, &[]), b.tensor(HEADS.head_dim, &[]), Vec::new());
    b.write(&mut x, qkv).unwrap();
    b.attention(&mut out, &x, kv, 0, HEADS, &batch, &mut NoProbe).unwrap();
    b.read(&out, &mut read).unwrap();
    read
}

/// A value that is not finite at position 1 is no business of position 0, whichever rows share a step.
#[test]
fn a_later_position_that_is_infinite_does_not_reach_an_earlier_one() {
    let n = HEADS.n_qkv();
    let mut qkv: Vec<f32> = (0..2 * n).map(|i| (i % 7) as f32 * 0.25 - 0.5).collect();
    qkv[n + HEADS.v().start] = f32::INFINITY;
    for kv_type in [KvType::F16, KvType::Q8_0, KvType::F32] {
        let b = CpuBackend::new(1, None).unwrap();
        let shape = KvShape { n_layer: 1, n_head_kv: 1, head_dim: HEADS.head_dim, kv_type };
        let (mut kv, mut alone) = (b.kv_cache(shape), b.kv_cache(shape));
        b.kv_reserve(&mut kv, 1).unwrap();
        b.kv_reserve(&mut alone, 1).unwrap();
        let together = attend(&b, &mut kv, &qkv, 0);
        let single = attend(&b, &mut alone, &qkv[..n], 0);
        let bits = |x: &[f32]| x.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        assert_eq!(
            bits(&together[..HEADS.head_dim]),
            bits(&single),
            "{kv_type}: position 0 with and without position 1"
        );
    }
}

/// A key or value that is not a number is still none when read back.
#[test]
fn nan_is_not_lost_in_an_8_bit_cache() {
    let mut kv = KvCache::new(KvShape { n_layer: 1, n_head_kv: 1, head_dim: 32, kv_type: KvType::Q8_0 });
    kv.reserve(1).unwrap();
    let mut x = [1.0f32; 32];
    x[3] = f32::NAN;
    kv.heads_mut(std::iter::once(0), 0)[0].store(0, Part::Value, &x);
    let mut room = Room::default();
    let tile = kv.tile(Kernels::detect().float(), 0, 0, Part::Value, 0, &mut room);
    let read: Vec<f32> = (0..32).map(|i| tile.get(Part::Value, 0, i)).collect();
    assert!(read.iter().any(|v| v.is_nan()), "stored NaN, read {:?}", &read[..8]);
}

#[test]
fn statistics_are_of_the_rows_and_columns_asked_for() {
    let (n_rows, n_cols) = (37, 20);
    let mut values: Vec<f32> = (0..n_rows * n_cols).map(|i| (i % 13) as f32 - 6.0).collect();
    values[5 * n_cols + 7] = f32::NAN;
    values[30 * n_cols + 8] = f32::NEG_INFINITY;
    let expected = |rows: std::ops::Range<usize>, cols: std::ops::Range<usize>| {
        rows.map(|i| RowStats::of(&values[i * n_cols + cols.start..i * n_cols + cols.end])).collect::<Vec<_>>()
    };
    for n_threads in [1, 2, 3] {
        let b = CpuBackend::new(n_threads, None).unwrap();
        let mut x = b.tensor(n_cols, &[]);
        b.write(&mut x, &values).unwrap();
        for (rows, cols) in [(0..37, 0..20), (0..37, 3..9), (5..6, 7..8), (29..37, 8..20), (4..4, 0..20)] {
            let mut out = vec![RowStats::EMPTY];
            b.row_stats(&x, rows.clone(), cols.clone(), &mut out).unwrap();
            assert_eq!(out[1..], expected(rows, cols), "small integers sum exactly, in any order");
        }
    }
}

/// Rows are looked at side by side and in parts, each as a row of its own.
#[test]
fn the_best_of_every_row_are_found_or_what_is_no_number() {
    let mut random = 1u32;
    let mut next = || {
        random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        random >> 8
    };
    let isas = Isa::ALL.into_iter().filter(|isa| Kernels::for_isa(*isa).is_some());
    for (n_threads, isa) in isas.flat_map(|isa| [1, 2, 3].map(|n_threads| (n_threads, isa))) {
        let b = CpuBackend::new(n_threads, Some(isa)).unwrap();
        // Fewer columns than a block has, and more than a task has; no multiples of either.
        for (n_rows, n_cols) in [(5, 1), (5, 100), (1, 130), (3, 20_001), (1, 8192), (2, 9000)] {
            let mut x = b.tensor(n_cols, &[]);
            let mut values: Vec<f32> = (0..n_rows * n_cols).map(|_| (next() as f32).sqrt() - 2e3).collect();
            // A row of few kinds of values, one of none above negative infinity, and one that is no row of logits.
            values[..n_cols].iter_mut().for_each(|v| *v = (*v / 1e3).trunc());
            if n_rows > 2 {
                values[n_cols..2 * n_cols].fill(f32::NEG_INFINITY);
                values[2 * n_cols + n_cols / 2] = f32::NAN;
                values[3 * n_cols - 1] = f32::INFINITY;
            }
            b.write(&mut x, &values).unwrap();
            for k in [1, 2, 20, 65, BEST_MAX] {
                let mut got = vec![Best::default(); 3];
                b.best(&x, k, &mut got).unwrap();
                let k = k.min(n_cols);
                let mut expected = vec![Best::default(); n_rows * k];
                values.chunks(n_cols).zip(expected.chunks_mut(k)).for_each(|(row, out)| Best::of(row, out));
                let bits = |b: &Best| (b.index, b.value.to_bits());
                assert!(got.iter().map(bits).eq(expected.iter().map(bits)), "{isa}: {k} of {n_rows} rows of {n_cols}");
            }
        }
        let (mut none, mut got) = (b.tensor(100, &[]), vec![Best::default()]);
        b.write(&mut none, &[]).unwrap();
        b.best(&none, 4, &mut got).unwrap();
        assert!(got.is_empty());
    }
}
