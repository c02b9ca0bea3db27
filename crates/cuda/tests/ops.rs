//! Every op of the CUDA backend on the emulation against the reference backend, on odd shapes and in several orders of threads.

#[path = "../../core/tests/support/blocks.rs"]
mod blocks;
#[path = "support/devices.rs"]
mod devices;

use apr_core::backend::reference::Reference;
use apr_core::backend::{
    BEST_MAX, Backend, BackendError, Best, Bytes, FfnScratch, FfnWeights, Heads, KvShape, KvType, Routing, WeightData,
};
use apr_core::batch::{Batch, Row, Wants};
use apr_core::probe::NoProbe;
use apr_core::qtype::GgmlType;
use apr_core::rope::{Pairing, Rope, Scaling};
use apr_cuda::CudaBackend;
use apr_cuda::driver::{Arg, Launch};
use apr_cuda_emu::{Order, connect, connect_with};
use blocks::{Blocks, Rng};
use devices::Make;

const QUANTIZED: [GgmlType; 8] = [
    GgmlType::Q4_K,
    GgmlType::Q5_K,
    GgmlType::Q6_K,
    GgmlType::Q8_0,
    GgmlType::Q4_0,
    GgmlType::Q4_1,
    GgmlType::Q5_0,
    GgmlType::Q5_1,
];
const FLOATS: [GgmlType; 3] = [GgmlType::F32, GgmlType::F16, GgmlType::BF16];

fn weight(qtype: GgmlType, (n_mat, n_rows, n_cols): (usize, usize, usize), rng: &mut Rng) -> WeightData {
    let bytes = Bytes::from_vec(Blocks::of(qtype).random(n_mat * n_rows * n_cols, rng));
    WeightData { name: format!("{qtype}"), qtype, n_cols, n_rows, n_mat, bytes }
}

fn vector(values: &[f32]) -> WeightData {
    let bytes = Bytes::from_vec(values.iter().flat_map(|v| v.to_le_bytes()).collect());
    WeightData { name: "v".into(), qtype: GgmlType::F32, n_cols: values.len(), n_rows: 1, n_mat: 1, bytes }
}

/// Activations as products with quantized weights see them: 32 to a scale, codes of -127..=127.
fn rounded(x: &[f32]) -> Vec<f32> {
    let group = |x: &[f32]| {
        let d = x.iter().fold(0f32, |m, v| m.max(v.abs())) / 127.0;
        x.iter().map(|v| if d > 0.0 { (v * (1.0 / d)).round_ties_even() * d } else { 0.0 }).collect::<Vec<f32>>()
    };
    x.chunks(32).flat_map(group).collect()
}

/// A tensor of a backend with these values.
fn tensor<B: Backend>(b: &B, n_cols: usize, values: &[f32]) -> B::Tensor {
    let mut t = b.tensor(n_cols, &[]);
    b.write(&mut t, values).unwrap();
    t
}

fn values<B: Backend>(b: &B, t: &B::Tensor) -> Vec<f32> {
    let mut out = Vec::new();
    b.read(t, &mut out).unwrap();
    out
}

/// Values agree to `bound` of the largest.
fn assert_close(got: &[f32], expected: &[f32], bound: f32, what: &str) {
    assert_eq!(got.len(), expected.len(), "{what}: values");
    let largest = expected.iter().fold(1e-6f32, |m, v| m.max(v.abs()));
    for (i, (g, e)) in got.iter().zip(expected).enumerate() {
        assert!((g - e).abs() <= bound * largest, "{what}: value {i} is {g}, expected {e} of at most {largest}");
    }
}

/// `x wᵀ` on a backend, into the middle of a wider tensor.
fn matmul<B: Backend>(b: &B, w: &WeightData, x: &[f32]) -> Vec<f32> {
    let n_rows = x.len() / w.n_cols;
    let mut out = tensor(b, w.n_rows + 5, &vec![0.0; n_rows * (w.n_rows + 5)]);
    b.matmul(&mut out, 3, &b.upload(w).unwrap(), &tensor(b, w.n_cols, x)).unwrap();
    values(b, &out)
}

fn products_of_every_type_are_those_of_the_reference(cuda: Make) {
    let mut rng = Rng(1);
    for (qtype, n_cols) in
        QUANTIZED.iter().flat_map(|q| [(*q, 256), (*q, 768)]).chain(FLOATS.iter().flat_map(|q| [(*q, 40), (*q, 256)]))
    {
        // From 16 on tensor cores take over, with tiles of 32 and then of 64, where there are rows enough for them.
        for (n_tokens, n_rows) in [(1, 11), (3, 11), (9, 11), (16, 11), (16, 200), (17, 130), (40, 150), (70, 11)] {
            let w = weight(qtype, (1, n_rows, n_cols), &mut rng);
            let x = rng.activations(n_tokens * n_cols);
            let seen = if qtype.is_float() { x.clone() } else { rounded(&x) };
            let what = format!("{qtype}, {n_cols} columns, {n_tokens} tokens");
            assert_close(&matmul(&cuda(), &w, &x), &matmul(&Reference, &w, &seen), 2e-6, &what);
        }
    }
}

fn rows_of_32_weight_blocks_may_end_with_half_a_unit(cuda: Make) {
    let mut rng = Rng(2);
    for qtype in QUANTIZED.into_iter().filter(|q| q.block_len() == 32) {
        for (n_tokens, n_cols) in [(2, 96), (20, 32), (35, 96), (20, 160), (35, 224)] {
            // Rows enough for tensor cores, where tokens are.
            let w = weight(qtype, (1, if n_tokens < 16 { 7 } else { 129 }, n_cols), &mut rng);
            let x = rng.activations(n_tokens * n_cols);
            let what = format!("{qtype}, {n_cols} columns, {n_tokens} tokens");
            assert_close(&matmul(&cuda(), &w, &x), &matmul(&Reference, &w, &rounded(&x)), 2e-6, &what);
        }
    }
}

/// Products with experts on a backend, one input per token and one per slot.
fn matmul_experts<B: Backend>(b: &B, w: &WeightData, ids: &[u32], k: usize, x: &[f32]) -> Vec<f32> {
    let mut out = b.tensor(k * w.n_rows, &[]);
    let mut on_device = b.ids(k);
    b.write_ids(&mut on_device, ids).unwrap();
    let x = tensor(b, x.len() / (ids.len() / k), x);
    b.matmul_experts(&mut out, &b.upload(w).unwrap(), &on_device, &x).unwrap();
    values(b, &out)
}

fn experts_get_their_tokens(cuda: Make) {
    let mut rng = Rng(3);
    let (n_expert, k) = (6, 2);
    for qtype in QUANTIZED.into_iter().chain([GgmlType::F16]) {
        for n_tokens in [1, 2, 5, 40, 300] {
            let w = weight(qtype, (n_expert, 9, 256), &mut rng);
            // Expert 5 gets nobody, and expert 0 nearly half of the slots.
            let ids: Vec<u32> = (0..n_tokens).flat_map(|_| [0, 1 + rng.below(4) as u32]).collect();
            for n_parts in [1, k] {
                let x = rng.activations(n_tokens * n_parts * 256);
                let seen = if qtype.is_float() { x.clone() } else { rounded(&x) };
                let expected = matmul_experts(&Reference, &w, &ids, k, &seen);
                let what = format!("{qtype}, {n_tokens} tokens, {n_parts} inputs each");
                assert_close(&matmul_experts(&cuda(), &w, &ids, k, &x), &expected, 2e-6, &what);
            }
        }
    }
}

fn what_is_not_finite_stays_so(cuda: Make) {
    let mut rng = Rng(4);
    let w = weight(GgmlType::Q4_K, (1, 4, 256), &mut rng);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for n_tokens in [3, 18] {
            let mut x = rng.activations(n_tokens * 256);
            x[256 + 77] = bad;
            let out = matmul(&cuda(), &w, &x);
            let rows: Vec<&[f32]> = out.chunks(9).map(|row| &row[3..7]).collect();
            assert!(rows[1].iter().all(|v| v.is_nan()), "{bad}: {:?}", rows[1]);
            assert!(rows[0].iter().chain(&rows[2..].concat()).all(|v| v.is_finite()), "{bad} stays in its row");
        }
    }
}

fn tokens_are_looked_up_in_every_type(cuda: Make) {
    let mut rng = Rng(5);
    for (qtype, n_cols) in QUANTIZED.into_iter().map(|q| (q, q.block_len().max(96))).chain(FLOATS.map(|q| (q, 40))) {
        let w = weight(qtype, (1, 12, n_cols), &mut rng);
        let rows = [11, 0, 5].map(|token| Row { token, position: token, sequence: token, wants: Wants::Logits });
        let batch = Batch::new(rows.to_vec(), vec![vec![0]; 12]);
        let mut here = Reference.tensor(n_cols, &[]);
        Reference.embed(&mut here, &w, &batch).unwrap();
        let b = cuda();
        let mut there = b.tensor(n_cols, &[]);
        b.embed(&mut there, &b.upload(&w).unwrap(), &batch).unwrap();
        assert_close(&values(&b, &there), &here.data, 1e-6, &format!("{qtype}"));
    }
}

/// What ops on rows give on a backend.
fn rows_of<B: Backend>(b: &B, x: &[f32], y: &[f32], w: &[f32]) -> Vec<(&'static str, Vec<f32>)> {
    let n = w.len();
    let (x, y, w) = (|| tensor(b, n, x), tensor(b, n, y), b.upload(&vector(w)).unwrap());
    let mut all = Vec::new();
    let mut out = b.tensor(n, &[]);
    b.rms_norm(&mut out, &x(), &w, 1e-6).unwrap();
    all.push(("rms_norm", values(b, &out)));
    let mut t = x();
    b.add(&mut t, &y).unwrap();
    all.push(("add", values(b, &t)));
    let mut t = x();
    b.mul(&mut t, &y).unwrap();
    all.push(("mul", values(b, &t)));
    let mut t = x();
    b.silu(&mut t).unwrap();
    all.push(("silu", values(b, &t)));
    let mut t = x();
    b.add_bias(&mut t, 0, &w).unwrap();
    all.push(("add_bias", values(b, &t)));
    let mut t = x();
    b.keep_rows(&mut t, &[1, 3]).unwrap();
    all.push(("keep_rows", values(b, &t)));
    all
}

fn ops_on_rows_are_those_of_the_reference(cuda: Make) {
    let mut rng = Rng(6);
    for n in [40, 576, 2048] {
        let (x, y, w) = (rng.activations(4 * n), rng.activations(4 * n), rng.activations(n));
        for ((what, got), (_, expected)) in rows_of(&cuda(), &x, &y, &w).iter().zip(rows_of(&Reference, &x, &y, &w)) {
            assert_close(got, &expected, 1e-6, &format!("{what} of {n}"));
        }
    }
}

/// Ids and weights that a backend routes by.
fn routed<B: Backend>(b: &B, logits: &[f32], n_expert: usize, k: usize) -> (Vec<u32>, Vec<f32>) {
    let mut r = Routing { logits: tensor(b, n_expert, logits), ids: b.ids(k), weights: b.tensor(k, &[]) };
    b.route(&mut r).unwrap();
    let mut ids = Vec::new();
    b.read_ids(&r.ids, &mut ids).unwrap();
    (ids, values(b, &r.weights))
}

fn tokens_are_routed_as_by_the_reference(cuda: Make) {
    let mut rng = Rng(7);
    for (n_expert, k) in [(4, 2), (6, 6), (128, 8), (160, 8)] {
        let mut logits = rng.activations(9 * n_expert);
        // A tie, which the lower id wins, and logits of which softmax leaves nothing.
        logits[..4].copy_from_slice(&[1.0, 9.0, 2.0, 9.0]);
        logits[n_expert..n_expert + 4].copy_from_slice(&[0.0, 400.0, -300.0, 200.0]);
        let (ids, weights) = routed(&cuda(), &logits, n_expert, k);
        let (expected_ids, expected) = routed(&Reference, &logits, n_expert, k);
        assert_eq!(ids, expected_ids, "{k} of {n_expert}");
        assert_close(&weights, &expected, 1e-6, &format!("{k} of {n_expert}"));
    }
}

fn experts_exist_even_where_no_logit_is_a_number(cuda: Make) {
    let (ids, weights) = routed(&cuda(), &[f32::NAN; 16], 16, 4);
    assert!(ids.iter().all(|&id| id < 16), "{ids:?}");
    assert!(weights.iter().all(|w| w.is_nan()), "{weights:?}");
}

/// Slots in the order of their experts, and tiles `(expert, first, n)`, as a kernel sorts them.
fn grouped(ids: &[u32], n_expert: u32, tile: u32, n_tiles_max: usize) -> (Vec<u32>, Vec<[u32; 3]>) {
    let device = connect(Order::Shuffled(3));
    let sizes = [4 * ids.len(), 16 * n_tiles_max, 4 * ids.len()];
    let [order_at, tiles_at, ids_at] = sizes.map(|n| device.alloc(n).unwrap());
    let numbers = [ids.len() as u32, n_expert, tile, n_tiles_max as u32].map(Arg::U32);
    let args = [&[order_at, tiles_at, ids_at].map(Arg::Address)[..], &numbers].concat();
    let launch = Launch { kernel: "group_by_expert", grid: [1, 1, 1], threads: 1024, args };
    let (mut order, mut tiles) = (vec![0u8; sizes[0]], vec![0u8; sizes[1]]);
    let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    // SAFETY: the addresses are of this device, and the kernel writes no more than was allocated.
    unsafe {
        device.write(ids_at, &bytes).unwrap();
        device.run(&[launch], false).unwrap();
        device.read(order_at, &mut order).unwrap();
        device.read(tiles_at, &mut tiles).unwrap();
        [order_at, tiles_at, ids_at].into_iter().zip(sizes).for_each(|(at, n)| device.free(at, n));
    }
    let words = |b: &[u8]| b.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect::<Vec<u32>>();
    (words(&order), words(&tiles).chunks_exact(4).map(|t| [t[0], t[1], t[2]]).collect())
}

#[test]
fn slots_are_sorted_by_expert_and_stay_in_order() {
    let mut rng = Rng(10);
    // Ids of few experts, of all, and nearly all of one; numbers of slots that fill no warp, and more than a warp looks at at once.
    for (n_slots, n_expert, tile, n_used) in
        [(5, 4, 4, 4), (800, 6, 8, 2), (9000, 128, 32, 128), (4100, 1024, 4, 1024), (20000, 1000, 64, 3)]
    {
        let skewed = |rng: &mut Rng| if rng.below(8) > 0 && n_expert < 128 { 1 } else { rng.below(n_used) };
        let ids: Vec<u32> = (0..n_slots).map(|_| (n_expert - 1 - skewed(&mut rng)) as u32).collect();
        let n_tiles_max = n_slots / tile + n_expert;
        let mut expected: Vec<u32> = (0..n_slots as u32).collect();
        expected.sort_by_key(|&slot| ids[slot as usize]);
        let mut tiles = Vec::new();
        for of_one in expected.chunk_by(|&a, &b| ids[a as usize] == ids[b as usize]) {
            let before = tiles.last().map_or(0, |&[_, first, n]: &[u32; 3]| first + n);
            let cut = of_one.chunks(tile).enumerate();
            tiles.extend(cut.map(|(i, t)| [ids[t[0] as usize], before + (i * tile) as u32, t.len() as u32]));
        }
        tiles.resize(n_tiles_max, [0, 0, 0]);
        let what = format!("{n_slots} slots, {n_used} of {n_expert} experts, tiles of {tile}");
        let got = grouped(&ids, n_expert as u32, tile as u32, n_tiles_max);
        assert!(got == (expected, tiles), "{what}");
    }
}

/// What is made of the parts of one head, `2 + head_dim` floats each.
fn merged(parts: &[f32], n_split: usize, head_dim: usize) -> Vec<f32> {
    let device = connect(Order::Shuffled(4));
    let bytes: Vec<u8> = parts.iter().flat_map(|v| v.to_le_bytes()).collect();
    let sizes = [4 * head_dim, bytes.len(), 4];
    let [out_at, parts_at, rows_at] = sizes.map(|n| device.alloc(n).unwrap());
    let numbers = [1, head_dim as u32, n_split as u32].map(Arg::U32);
    let args = [&[out_at, parts_at, rows_at].map(Arg::Address)[..], &numbers, &[Arg::Address(0); 2]].concat();
    let launch = Launch { kernel: "attention_merge", grid: [1, 1, 1], threads: 128, args };
    let mut out = vec![0u8; sizes[0]];
    // SAFETY: the addresses are of this device, and the kernel reads and writes no more than was allocated.
    unsafe {
        device.write(parts_at, &bytes).unwrap();
        device.write(rows_at, &[0; 4]).unwrap();
        device.run(&[launch], false).unwrap();
        device.read(out_at, &mut out).unwrap();
        [out_at, parts_at, rows_at].into_iter().zip(sizes).for_each(|(at, n)| device.free(at, n));
    }
    out.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

#[test]
fn parts_of_attention_are_put_together() {
    let mut rng = Rng(21);
    for (n_split, head_dim) in [(2, 40), (7, 128), (128, 64), (131, 160), (300, 256)] {
        let mut parts = rng.activations(n_split * (2 + head_dim));
        for (s, part) in parts.chunks_exact_mut(2 + head_dim).enumerate() {
            part[1] = part[1].abs() + 1.0;
            // Every third is beyond the row's end, and of values that other rows of its tile see and that are no numbers.
            if s % 3 == 1 {
                (part[0], part[1]) = (f32::NEG_INFINITY, 0.0);
                part[2..].fill(f32::NAN);
            }
        }
        let part =
            |s: usize| parts[s * (2 + head_dim)..][..2 + head_dim].iter().map(|&v| f64::from(v)).collect::<Vec<_>>();
        let seen = || (0..n_split).filter(|s| s % 3 != 1);
        let largest = seen().map(|s| part(s)[0]).fold(f64::NEG_INFINITY, f64::max);
        let weight = |s: usize| (part(s)[0] - largest).exp();
        let sum: f64 = seen().map(|s| weight(s) * part(s)[1]).sum();
        let expected: Vec<f32> =
            (0..head_dim).map(|d| (seen().map(|s| weight(s) * part(s)[2 + d]).sum::<f64>() / sum) as f32).collect();
        assert_close(&merged(&parts, n_split, head_dim), &expected, 2e-6, &format!("{n_split} parts of {head_dim}"));
    }
}

/// Attention of some sequences after rotation, step by step.
fn attended<B: Backend>(b: &B, heads: Heads, kv_type: KvType, rope: &Rope, steps: &[(Batch, Vec<f32>)]) -> Vec<f32> {
    let shape = KvShape { n_layer: 2, n_head_kv: heads.n_head_kv, head_dim: heads.head_dim, kv_type };
    let mut kv = b.kv_cache(shape);
    b.kv_reserve(&mut kv, 12).unwrap();
    let mut all = Vec::new();
    for (batch, qkv) in steps {
        let (mut qkv, mut out) = (tensor(b, heads.n_qkv(), qkv), b.tensor(heads.q().len(), &[]));
        b.rope(&mut qkv, heads.q().start..heads.k().end, heads.head_dim, rope, batch).unwrap();
        all.extend(values(b, &qkv));
        b.attention(&mut out, &qkv, &mut kv, 1, heads, batch, &mut NoProbe).unwrap();
        all.extend(values(b, &out));
    }
    all
}

fn attention_is_that_of_the_reference(cuda: Make) {
    let mut rng = Rng(8);
    // The fifth has more values in its heads than a block of threads, the fourth as many heads as one has room for and more.
    for (n_head, n_head_kv, head_dim) in [(4, 2, 32), (8, 1, 128), (3, 3, 40), (40, 2, 64), (4, 2, 256)] {
        let heads = Heads { n_head, n_head_kv, head_dim };
        for kv_type in [KvType::F32, KvType::F16, KvType::Q8_0] {
            if kv_type == KvType::Q8_0 && head_dim % 32 != 0 {
                continue;
            }
            let pairing = if n_head == 3 { Pairing::Adjacent } else { Pairing::Halves };
            let rope = Rope::new(pairing, head_dim / 2, 1e4, Scaling::None, None);
            let tables = vec![vec![7, 2, 9, 4], vec![0, 11]];
            let row = |sequence: u32, position: u32| Row { token: 0, position, sequence, wants: Wants::Logits };
            // Many tokens of a sequence at once are computed with queries and weights in halves where keys and values are: of 11 bits,
            // so that a weight is off by 2^-11 of its score. Scores of some tens let many positions matter there.
            let is_halves = kv_type == KvType::F16 && head_dim <= 128;
            let (size, bound) = match kv_type {
                _ if is_halves => (0.15, 1e-3),
                // A last bit of a rotated key may be another code of it.
                KvType::Q8_0 => (1.0, 1e-4),
                _ => (1.0, 2e-5),
            };
            let mut step = |rows: Vec<Row>| {
                let qkv = rng.activations(rows.len() * heads.n_qkv()).iter().map(|v| size * v).collect();
                (Batch::new(rows, tables.clone()), qkv)
            };
            let steps = [
                step((0..70).map(|p| row(0, p)).chain((0..3).map(|p| row(1, p))).collect()),
                step((70..185).map(|p| row(0, p)).collect()),
                step(vec![row(1, 3), row(0, 185)]),
                // So few tiles that keys are split, and in the last part some rows have no position.
                step([row(1, 4)].into_iter().chain((186..203).map(|p| row(0, p))).collect()),
            ];
            let what = format!("{n_head} heads, {n_head_kv} of keys, of {head_dim}, {kv_type}");
            let expected = attended(&Reference, heads, kv_type, &rope, &steps);
            assert_close(&attended(&cuda(), heads, kv_type, &rope, &steps), &expected, bound, &what);
        }
    }
}

fn attention_of_few_tokens_is_exact_in_every_type(cuda: Make) {
    let mut rng = Rng(13);
    // Heads as wide as a kernel has room for and not, and more that share a key than it holds at once.
    for (n_head, n_head_kv, head_dim) in [(8, 2, 64), (8, 1, 128), (20, 1, 96), (3, 3, 40)] {
        let heads = Heads { n_head, n_head_kv, head_dim };
        let rope = Rope::new(Pairing::Halves, head_dim / 2, 1e4, Scaling::None, None);
        let row = |position: u32| Row { token: 0, position, sequence: 0, wants: Wants::Logits };
        let mut step = |from: u32, to: u32| {
            let batch = Batch::new((from..to).map(row).collect(), vec![vec![3, 1]]);
            (batch, rng.activations((to - from) as usize * heads.n_qkv()))
        };
        let mut steps: Vec<(Batch, Vec<f32>)> = (0..9).map(|i| step(11 * i, 11 * i + 11)).collect();
        // So few that keys are split.
        steps.push(step(99, 100));
        for kv_type in [KvType::F32, KvType::F16, KvType::Q8_0] {
            // Elsewhere a last bit of a rotated key is another code of it.
            if kv_type == KvType::Q8_0 && head_dim != 64 {
                continue;
            }
            let expected = attended(&Reference, heads, kv_type, &rope, &steps);
            let bound = if kv_type == KvType::Q8_0 { 1e-4 } else { 2e-5 };
            let what = format!("{n_head} heads, {n_head_kv} of keys, of {head_dim}, {kv_type}");
            assert_close(&attended(&cuda(), heads, kv_type, &rope, &steps), &expected, bound, &what);
        }
    }
}

fn blocks_of_keys_and_values_are_saved_and_restored(cuda: Make) {
    let b = cuda();
    let shape = KvShape { n_layer: 1, n_head_kv: 2, head_dim: 32, kv_type: KvType::F16 };
    let mut kv = b.kv_cache(shape);
    b.kv_reserve(&mut kv, 5).unwrap();
    let block: Vec<u8> = (0..shape.block_bytes()).map(|i| i as u8).collect();
    b.kv_restore(&mut kv, 3, &block).unwrap();
    let mut saved = Vec::new();
    b.kv_save(&kv, 3, &mut saved).unwrap();
    assert_eq!(saved, block);
    assert!(b.kv_restore(&mut kv, 3, &block[1..]).is_err(), "a block of another size");
}

fn a_type_without_a_kernel_is_refused_by_name(cuda: Make) {
    let mut rng = Rng(9);
    let mut w = weight(GgmlType::F32, (1, 1, 256), &mut rng);
    w.name = "blk.0.attn_q.weight".to_string();
    w.qtype = GgmlType::Q2_K;
    let e = cuda().upload(&w).err().map(|e| e.to_string()).unwrap_or_default();
    assert!(e.contains("blk.0.attn_q.weight") && e.contains("Q2_K"), "{e}");
}

/// A product with what a norm gave, the norm's output, and a product with a block's inner values.
fn normed<B: Backend>(b: &B, x: &[f32], norm: &[f32], w: &WeightData) -> [Vec<f32>; 2] {
    let w = b.upload(w).unwrap();
    let (mut xn, mut out) = (b.tensor(norm.len(), &[&w]), b.tensor(11, &[]));
    b.rms_norm(&mut xn, &tensor(b, norm.len(), x), &b.upload(&vector(norm)).unwrap(), 1e-6).unwrap();
    b.matmul(&mut out, 0, &w, &xn).unwrap();
    [values(b, &xn), values(b, &out)]
}

fn a_norm_that_quantizes_gives_the_same_twice_over(cuda: Make) {
    let mut rng = Rng(10);
    for n in [256, 768, 4096] {
        let w = weight(GgmlType::Q4_K, (1, 11, n), &mut rng);
        let (mut x, norm) = (rng.activations(3 * n), rng.activations(n));
        x[n..n + 64].fill(0.0);
        let [xn, out] = normed(&cuda(), &x, &norm, &w);
        let [expected, _] = normed(&Reference, &x, &norm, &w);
        assert_close(&xn, &expected, 1e-6, &format!("norm of {n}"));
        // Judged by what the device itself gave: the last bit of a value may be another code.
        assert_close(&out, &products_of(&Reference, &w, &rounded(&xn)), 2e-6, &format!("product with a norm of {n}"));
        x[2 * n + 5] = f32::NAN;
        let [_, out] = normed(&cuda(), &x, &norm, &w);
        assert!(
            out[..22].iter().all(|v| v.is_finite()) && out[22..].iter().all(|v| v.is_nan()),
            "NaN stays in its row"
        );
    }
}

fn products_of<B: Backend>(b: &B, w: &WeightData, x: &[f32]) -> Vec<f32> {
    let mut out = b.tensor(w.n_rows, &[]);
    b.matmul(&mut out, 0, &b.upload(w).unwrap(), &tensor(b, w.n_cols, x)).unwrap();
    values(b, &out)
}

/// Queries, keys and values after norms, where there are any, and rotation.
fn rotated<B: Backend>(b: &B, heads: Heads, norms: Option<&[Vec<f32>; 2]>, rope: &Rope, qkv: &[f32]) -> Vec<f32> {
    let rows = [3, 17, 100_000].map(|position| Row { token: 0, position, sequence: 0, wants: Wants::Logits });
    let batch = Batch::new(rows.to_vec(), vec![(0..1563).collect()]);
    let norms = norms.map(|norms| norms.each_ref().map(|w| b.upload(&vector(w)).unwrap()));
    let mut qkv = tensor(b, heads.n_qkv(), qkv);
    b.norm_rope(&mut qkv, heads, norms.as_ref().map(|norms| (norms, 1e-6)), rope, &batch).unwrap();
    values(b, &qkv)
}

fn heads_are_normalised_and_rotated_as_by_the_reference(cuda: Make) {
    let mut rng = Rng(12);
    for (n_head, n_head_kv, head_dim, n_rot) in [(4, 2, 128, 128), (3, 1, 40, 20), (2, 2, 256, 64)] {
        let heads = Heads { n_head, n_head_kv, head_dim };
        let qkv = rng.activations(3 * heads.n_qkv());
        let norms = [rng.activations(head_dim), rng.activations(head_dim)];
        for (pairing, norms) in
            [(Pairing::Halves, Some(&norms)), (Pairing::Adjacent, Some(&norms)), (Pairing::Halves, None)]
        {
            let rope = Rope::new(pairing, n_rot, 1e6, Scaling::None, None);
            let (got, expected) =
                (rotated(&cuda(), heads, norms, &rope, &qkv), rotated(&Reference, heads, norms, &rope, &qkv));
            assert_close(&got, &expected, 2e-6, &format!("{n_head} heads of {head_dim}, {n_rot} rotate, {pairing:?}"));
        }
    }
}

/// What a backend with this routing, or without one, leaves of a feed-forward block: up, gate, down where there are experts, output.
fn fed_forward<B: Backend>(
    b: &B,
    w: &[WeightData; 3],
    (ids, weights, k): (&[u32], &[f32], usize),
    x: &[f32],
) -> [Vec<f32>; 4] {
    let [gate, up, down] = w.each_ref().map(|w| b.upload(w).unwrap());
    let (n_embd, n_ff) = (w[0].n_cols, w[0].n_rows);
    let mut s = FfnScratch {
        gate: b.tensor(k * n_ff, &[&down]),
        up: b.tensor(k * n_ff, &[]),
        down: b.tensor(k * w[2].n_rows, &[]),
    };
    let weight = FfnWeights { gate, up, down };
    let (x, mut out) = (tensor(b, n_embd, x), b.tensor(w[2].n_rows, &[]));
    if ids.is_empty() {
        b.dense_ffn(&mut out, &mut s, &weight, &x, 0, &mut NoProbe).unwrap();
        return [values(b, &s.up), values(b, &s.gate), Vec::new(), values(b, &out)];
    }
    let mut routing = Routing { logits: b.tensor(w[0].n_mat, &[]), ids: b.ids(k), weights: tensor(b, k, weights) };
    b.write_ids(&mut routing.ids, ids).unwrap();
    b.experts_ffn(&mut out, &mut s, &weight, &routing, &x, 0, &mut NoProbe).unwrap();
    [&s.up, &s.gate, &s.down, &out].map(|t| values(b, t))
}

/// Gate, up and down of a type, and of the next one where `mixed`: then gate and up are not of one type.
fn ffn_weights(
    qtype: GgmlType,
    n_mat: usize,
    (n_embd, n_ff): (usize, usize),
    mixed: bool,
    rng: &mut Rng,
) -> [WeightData; 3] {
    let other = if mixed { GgmlType::Q8_0 } else { qtype };
    let shapes = [(qtype, n_ff, n_embd), (other, n_ff, n_embd), (other, n_embd, n_ff)];
    shapes.map(|(qtype, n_rows, n_cols)| weight(qtype, (n_mat, n_rows, n_cols), rng))
}

fn feed_forward_blocks_of_every_type_are_those_of_the_reference(cuda: Make) {
    let mut rng = Rng(14);
    let every = QUANTIZED.into_iter().chain([GgmlType::F16]).map(|q| (q, false)).chain([(GgmlType::Q4_K, true)]);
    for (qtype, mixed) in every {
        for (n_expert, k, n_tokens) in
            [(1, 1, 1), (1, 1, 3), (1, 1, 9), (1, 1, 20), (6, 3, 1), (6, 3, 2), (6, 4, 7), (6, 2, 60)]
        {
            // Outputs that no block of threads divides, and with 32-weight blocks an input that ends with half a unit.
            let (n_embd, n_ff) = if qtype.block_len() == 256 { (256, 256) } else { (96, 288) };
            let w = ffn_weights(qtype, n_expert, (n_embd, n_ff), mixed, &mut rng);
            let x = rng.activations(n_tokens * n_embd);
            let is_moe = n_expert > 1;
            let ids: Vec<u32> = (0..if is_moe { n_tokens } else { 0 })
                .flat_map(|t| (0..k).map(move |s| ((t + s) % 5) as u32))
                .collect();
            let weights: Vec<f32> = ids.iter().map(|_| 0.1 + rng.below(100) as f32 / 100.0).collect();
            let routing = (&ids[..], &weights[..], k);
            let [up, gate, down, out] = fed_forward(&cuda(), &w, routing, &x);
            let seen = |x: &[f32], w: &WeightData| if w.qtype.is_float() { x.to_vec() } else { rounded(x) };
            let what = format!("{qtype}, {n_expert} experts, {n_tokens} tokens");
            // Judged by what the device itself gave before: the last bit of a value may be another code.
            let product = |w: &WeightData, x: &[f32]| match is_moe {
                true => matmul_experts(&Reference, w, &ids, k, &seen(x, w)),
                false => products_of(&Reference, w, &seen(x, w)),
            };
            assert_close(&up, &product(&w[1], &x), 2e-6, &format!("up of {what}"));
            let silu = |g: f32| g / (1.0 + (-g).exp());
            let swiglu: Vec<f32> = product(&w[0], &x).iter().zip(&up).map(|(&g, u)| silu(g) * u).collect();
            assert_close(&gate, &swiglu, 4e-6, &format!("gate of {what}"));
            let parts = product(&w[2], &gate);
            if !is_moe {
                assert_close(&out, &parts, 2e-6, &format!("output of {what}"));
                continue;
            }
            assert_close(&down, &parts, 2e-6, &format!("down of {what}"));
            let of_token =
                |t: usize, i: usize| (0..k).map(|s| weights[t * k + s] * down[(t * k + s) * n_embd + i]).sum();
            let sums: Vec<f32> =
                (0..n_tokens).flat_map(|t| (0..n_embd).map(move |i| (t, i))).map(|(t, i)| of_token(t, i)).collect();
            assert_close(&out, &sums, 1e-6, &format!("output of {what}"));
        }
    }
}

/// Queries, keys and values of heads, all at once.
fn qkv_of<B: Backend>(b: &B, w: &[WeightData; 3], heads: Heads, x: &[f32]) -> Vec<f32> {
    let (w, x, mut out) =
        (w.each_ref().map(|w| b.upload(w).unwrap()), tensor(b, w[0].n_cols, x), b.tensor(heads.n_qkv(), &[]));
    b.qkv(&mut out, w.each_ref(), heads, &x).unwrap();
    values(b, &out)
}

fn queries_keys_and_values_may_be_of_different_types(cuda: Make) {
    use GgmlType::*;
    let mut rng = Rng(15);
    let heads = Heads { n_head: 5, n_head_kv: 2, head_dim: 8 };
    for types in [[Q4_K, Q4_K, Q6_K], [Q5_K, Q8_0, Q4_0], [Q4_1, Q5_0, Q5_1], [Q4_K, F16, Q6_K]] {
        for n_tokens in [1, 3, 9, 20] {
            let shapes = [(types[0], 40), (types[1], 16), (types[2], 16)];
            let w = shapes.map(|(qtype, n_rows)| weight(qtype, (1, n_rows, 256), &mut rng));
            let x = rng.activations(n_tokens * 256);
            let parts = w
                .each_ref()
                .map(|w| products_of(&Reference, w, &if w.qtype.is_float() { x.clone() } else { rounded(&x) }));
            let row = |t: usize| parts.iter().zip(&w).flat_map(move |(p, w)| p[t * w.n_rows..][..w.n_rows].to_vec());
            let expected: Vec<f32> = (0..n_tokens).flat_map(row).collect();
            assert_close(&qkv_of(&cuda(), &w, heads, &x), &expected, 2e-6, &format!("{types:?}, {n_tokens} tokens"));
        }
    }
}

/// Logits, ids and weights of a router, with somebody looking at the logits before they are used or not.
fn routed_by<B: Backend>(b: &B, w: &WeightData, k: usize, x: &[f32], looks: bool) -> (Vec<f32>, Vec<u32>, Vec<f32>) {
    let mut r = Routing { logits: b.tensor(w.n_rows, &[]), ids: b.ids(k), weights: b.tensor(k, &[]) };
    b.matmul(&mut r.logits, 0, &b.upload(w).unwrap(), &tensor(b, w.n_cols, x)).unwrap();
    if looks {
        values(b, &r.logits);
    }
    b.route(&mut r).unwrap();
    let mut ids = Vec::new();
    b.read_ids(&r.ids, &mut ids).unwrap();
    (values(b, &r.logits), ids, values(b, &r.weights))
}

fn routers_of_few_and_many_tokens_route_by_their_logits(cuda: Make) {
    let mut rng = Rng(16);
    let b = cuda();
    for (qtype, n_expert, k) in [(GgmlType::F32, 128, 8), (GgmlType::F32, 6, 2), (GgmlType::Q4_0, 16, 4)] {
        for n_tokens in [1, 4, 7, 21] {
            let w = weight(qtype, (1, n_expert, 64), &mut rng);
            let x = rng.activations(n_tokens * 64);
            let (logits, ids, weights) = routed_by(&b, &w, k, &x, false);
            let what = format!("{k} of {n_expert}, {n_tokens} tokens");
            let looked_at = routed_by(&b, &w, k, &x, true);
            assert!((&logits, &ids, &weights) == (&looked_at.0, &looked_at.1, &looked_at.2), "{what}");
            let (expected_ids, expected) = routed(&Reference, &logits, n_expert, k);
            assert_eq!(ids, expected_ids, "{what}");
            assert_close(&weights, &expected, 1e-6, &what);
        }
    }
}

fn the_best_values_are_found_where_they_are(cuda: Make) {
    let mut rng = Rng(19);
    let b = cuda();
    // Groups of columns are fewer and more than the values that are wanted; 20,001 equals are more than there is room for.
    for n_cols in [1, 40, 2048, 5001, 20_001] {
        let mut x = rng.activations(7 * n_cols);
        let row = |i: usize| i * n_cols;
        // Equals, of which one is a negative zero; nothing above negative infinity; a number that is none, behind one that is larger.
        x[row(1)..row(2)].fill(-0.0);
        x[row(2) - 1] = 0.0;
        x[row(2)..row(3)].fill(f32::NEG_INFINITY);
        x[row(3) + n_cols / 2] = f32::NAN;
        x[row(4) - 1] = f32::INFINITY;
        x[row(4)..row(5)].iter_mut().for_each(|v| *v = -v.abs() - 1.0);
        // Few kinds of values.
        x[row(5)..row(6)].iter_mut().for_each(|v| *v = (4.0 * *v).round());
        for k in [1, 2, 32, 100, BEST_MAX] {
            let (mut got, n) = (Vec::new(), k.min(n_cols));
            b.best(&tensor(&b, n_cols, &x), k, &mut got).unwrap();
            let mut expected = vec![Best::default(); 7 * n];
            x.chunks(n_cols).zip(expected.chunks_mut(n)).for_each(|(row, out)| Best::of(row, out));
            let bits = |b: &Best| (b.index, b.value.to_bits());
            assert!(got.iter().map(bits).eq(expected.iter().map(bits)), "{k} of {n_cols} columns");
        }
    }
}

/// `x + w x` where a product's output is added to something else, or to what it is made of.
fn a_sum_with_a_product_may_be_with_its_own_input(cuda: Make) {
    let mut rng = Rng(17);
    for qtype in [GgmlType::F32, GgmlType::Q4_0] {
        let (w, x, y) = (weight(qtype, (1, 64, 64), &mut rng), rng.activations(2 * 64), rng.activations(2 * 64));
        let b = cuda();
        let on_device = b.upload(&w).unwrap();
        let product = products_of(&b, &w, &x);
        for own in [false, true] {
            let (mut input, mut other, mut out) = (tensor(&b, 64, &x), tensor(&b, 64, &y), b.tensor(64, &[]));
            b.matmul(&mut out, 0, &on_device, &input).unwrap();
            b.add(if own { &mut input } else { &mut other }, &out).unwrap();
            let (sum, to) = if own { (values(&b, &input), &x) } else { (values(&b, &other), &y) };
            let expected: Vec<f32> = product.iter().zip(to).map(|(p, v)| v + p).collect();
            assert_eq!((sum, values(&b, &out)), (expected, product.clone()), "{qtype}");
        }
    }
}

/// Attention of steps whose heads are normalised, where there are norms, rotated and stored, nobody looking in between.
fn attended_at_once<B: Backend>(
    b: &B,
    heads: Heads,
    kv_type: KvType,
    norms: Option<&[Vec<f32>; 2]>,
    steps: &[(Batch, Vec<f32>)],
) -> Vec<f32> {
    let Heads { n_head_kv, head_dim, .. } = heads;
    let mut kv = b.kv_cache(KvShape { n_layer: 2, n_head_kv, head_dim, kv_type });
    b.kv_reserve(&mut kv, 12).unwrap();
    let rope = Rope::new(Pairing::Halves, head_dim, 1e4, Scaling::None, None);
    let norms = norms.map(|norms| norms.each_ref().map(|w| b.upload(&vector(w)).unwrap()));
    let mut all = Vec::new();
    for (batch, qkv) in steps {
        let (mut qkv, mut out) = (tensor(b, heads.n_qkv(), qkv), b.tensor(heads.q().len(), &[]));
        b.norm_rope(&mut qkv, heads, norms.as_ref().map(|norms| (norms, 1e-6)), &rope, batch).unwrap();
        b.attention(&mut out, &qkv, &mut kv, 1, heads, batch, &mut NoProbe).unwrap();
        all.extend(values(b, &out));
    }
    all
}

fn heads_are_rotated_and_stored_at_once_in_every_type(cuda: Make) {
    let mut rng = Rng(20);
    // Numbers of heads that four warps do not share evenly.
    let heads = Heads { n_head: 3, n_head_kv: 3, head_dim: 64 };
    let row = |position: u32, sequence: u32| Row { token: 0, position, sequence, wants: Wants::Logits };
    let tables = vec![vec![3, 1], vec![8]];
    let mut step = |rows: Vec<Row>| {
        let qkv = rng.activations(rows.len() * heads.n_qkv());
        (Batch::new(rows, tables.clone()), qkv)
    };
    let mut steps: Vec<_> = (0..7).map(|i| step((11 * i..11 * i + 11).map(|p| row(p, 0)).collect())).collect();
    steps.push(step(vec![row(0, 1), row(77, 0)]));
    let norms = [rng.activations(64), rng.activations(64)];
    for kv_type in [KvType::F32, KvType::F16, KvType::Q8_0] {
        for norms in [None, Some(&norms)] {
            let expected = attended_at_once(&Reference, heads, kv_type, norms, &steps);
            // A last bit of a rotated key may be another code or half of it.
            let bound = if kv_type == KvType::F32 { 2e-5 } else { 5e-4 };
            let what = format!("{kv_type}, norms: {}", norms.is_some());
            assert_close(&attended_at_once(&cuda(), heads, kv_type, norms, &steps), &expected, bound, &what);
        }
    }
}

fn products_with_what_attention_gave_are_those_with_its_values(cuda: Make) {
    let mut rng = Rng(18);
    for (n_head, n_head_kv, head_dim) in [(4, 2, 32), (8, 1, 128), (4, 4, 40)] {
        let heads = Heads { n_head, n_head_kv, head_dim };
        let n = heads.q().len();
        // Heads of 40 do not end where groups of 32 do.
        let w = weight(GgmlType::Q8_0, (1, 5, n), &mut rng);
        let b = cuda();
        let (on_device, mut kv) =
            (b.upload(&w).unwrap(), b.kv_cache(KvShape { n_layer: 1, n_head_kv, head_dim, kv_type: KvType::F16 }));
        b.kv_reserve(&mut kv, 4).unwrap();
        // A prompt in tiles, then contexts that are split and one that is not.
        for (rows, sequence) in [(0..150, 0), (150..151, 0), (0..1, 1)] {
            let row = |position: u32| Row { token: 0, position, sequence, wants: Wants::Logits };
            let batch = Batch::new(rows.clone().map(row).collect(), vec![vec![0, 1, 2], vec![3]]);
            let qkv = tensor(&b, heads.n_qkv(), &rng.activations(rows.len() * heads.n_qkv()));
            let (mut out, mut product) = (b.tensor(n, &[&on_device]), b.tensor(5, &[]));
            b.attention(&mut out, &qkv, &mut kv, 0, heads, &batch, &mut NoProbe).unwrap();
            b.matmul(&mut product, 0, &on_device, &out).unwrap();
            let expected = products_of(&b, &w, &values(&b, &out));
            assert!(values(&b, &product) == expected, "{n_head} heads of {head_dim}, {rows:?}");
        }
    }
}

#[test]
fn what_did_not_fit_leaves_what_fits() {
    let b = CudaBackend::new(connect_with(Order::Ascending, 1_900_000));
    let bytes = Bytes::from_vec((0..100_000u32).flat_map(|i| (i as f32).to_le_bytes()).collect());
    let w = WeightData { name: "w".into(), qtype: GgmlType::F32, n_cols: 1, n_rows: 100_000, n_mat: 1, bytes };
    let (w, mut out) = (b.upload(&w).unwrap(), b.tensor(100_000, &[]));
    b.matmul(&mut out, 0, &w, &tensor(&b, 1, &[2.0])).unwrap();
    let e = b.matmul(&mut out, 0, &w, &tensor(&b, 1, &[2.0; 3])).unwrap_err();
    assert!(matches!(e, BackendError::OutOfMemory { .. }), "{e}");
    b.matmul(&mut out, 0, &w, &tensor(&b, 1, &[3.0])).unwrap();
    assert_eq!(values(&b, &out)[7], 21.0);
}

devices::on_every_device!(
    products_of_every_type_are_those_of_the_reference,
    rows_of_32_weight_blocks_may_end_with_half_a_unit,
    experts_get_their_tokens,
    what_is_not_finite_stays_so,
    tokens_are_looked_up_in_every_type,
    ops_on_rows_are_those_of_the_reference,
    tokens_are_routed_as_by_the_reference,
    experts_exist_even_where_no_logit_is_a_number,
    attention_is_that_of_the_reference,
    attention_of_few_tokens_is_exact_in_every_type,
    blocks_of_keys_and_values_are_saved_and_restored,
    a_type_without_a_kernel_is_refused_by_name,
    a_norm_that_quantizes_gives_the_same_twice_over,
    heads_are_normalised_and_rotated_as_by_the_reference,
    feed_forward_blocks_of_every_type_are_those_of_the_reference,
    queries_keys_and_values_may_be_of_different_types,
    routers_of_few_and_many_tokens_route_by_their_logits,
    a_sum_with_a_product_may_be_with_its_own_input,
    the_best_values_are_found_where_they_are,
    heads_are_rotated_and_stored_at_once_in_every_type,
    products_with_what_attention_gave_are_those_with_its_values
);
