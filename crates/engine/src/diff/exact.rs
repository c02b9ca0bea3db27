//! What a stage's op should give: 64-bit floats from its inputs to its result, weights dequantized, no rounding in between but that of
//! keys and values.

use apr_core::backend::reference::round_kv;
use apr_core::backend::{Heads, WeightData};
use apr_core::qtype;
use apr_core::rope::{Pairing, Rope};

use super::op::{Kind, StageOp};

/// The result of an op that has been checked.
pub fn exact(op: &StageOp) -> Vec<f64> {
    let input = |i: usize| wide(&op.inputs[i].values);
    match &op.kind {
        Kind::Product { .. } => {
            let rows: Vec<Vec<f64>> = (0..op.weight().n_rows).map(|i| row(op.weight(), i)).collect();
            op.inputs[0].rows().flat_map(|x| rows.iter().map(|w| dot(w, &wide(x))).collect::<Vec<_>>()).collect()
        }
        Kind::Norm { eps } => normalised(&input(0), &row(op.weight(), 0), *eps),
        Kind::Bias => input(0).iter().zip(row(op.weight(), 0)).map(|(x, b)| x + b).collect(),
        Kind::Rotate { eps, head_dim, rope, position } => {
            let weight = op.weight.as_ref().map(|w| row(w, 0));
            let head = |x: &[f64]| {
                let x = weight.as_ref().map_or(x.to_vec(), |w| normalised(x, w, *eps));
                rotated(x, rope, *position)
            };
            input(0).chunks_exact(*head_dim).flat_map(head).collect()
        }
        Kind::Embedding => row(op.weight(), 0),
        Kind::Attention { heads, kv_type } => {
            let rounded = |i: usize| {
                let mut values = op.inputs[i].values.clone();
                values.chunks_exact_mut(heads.head_dim).for_each(|head| round_kv(*kv_type, head));
                wide(&values)
            };
            attention(&input(0), &rounded(1), &rounded(2), *heads)
        }
        Kind::Route { n_used, ids } => {
            let (logits, p) = (input(0), softmax(&input(0)));
            let mut order: Vec<usize> = (0..p.len()).collect();
            order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
            order.truncate(*n_used);
            let sum: f64 = order.iter().map(|&e| p[e]).sum();
            order.iter().map(|&e| if *ids { e as f64 } else { p[e] / sum }).collect()
        }
        Kind::Silu => input(0).into_iter().map(silu).collect(),
        Kind::Swiglu => input(0).into_iter().zip(input(1)).map(|(gate, up)| silu(gate) * up).collect(),
        Kind::WeightedSum => {
            let (x, weights) = (input(0), input(1));
            let n = x.len() / weights.len();
            (0..n).map(|j| weights.iter().enumerate().map(|(s, w)| w * x[s * n + j]).sum()).collect()
        }
        Kind::Add => input(0).iter().zip(input(1)).map(|(x, y)| x + y).collect(),
    }
}

/// The same op with keys and values stored as another one has them.
pub fn with_kv_of(op: &StageOp, other: &StageOp) -> StageOp {
    let mut op = op.clone();
    if let (Kind::Attention { kv_type, .. }, Kind::Attention { kv_type: of, .. }) = (&mut op.kind, &other.kind) {
        *kv_type = *of;
    }
    op
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&v| f64::from(v)).collect()
}

/// Row `i` of a matrix.
fn row(w: &WeightData, i: usize) -> Vec<f64> {
    let (n, mut out) = (w.row_bytes(), vec![0.0; w.n_cols]);
    qtype::dequantize_row(w.qtype, &w.bytes[i * n..(i + 1) * n], &mut out);
    wide(&out)
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

fn normalised(x: &[f64], w: &[f64], eps: f32) -> Vec<f64> {
    let scale = 1.0 / (dot(x, x) / x.len() as f64 + f64::from(eps)).sqrt();
    x.iter().zip(w).map(|(x, w)| x * scale * w).collect()
}

fn rotated(mut head: Vec<f64>, rope: &Rope, position: u32) -> Vec<f64> {
    let n_pair = rope.inv_freq.len();
    for (i, &f) in rope.inv_freq.iter().enumerate() {
        let (a, b) = match rope.pairing {
            Pairing::Halves => (i, i + n_pair),
            Pairing::Adjacent => (2 * i, 2 * i + 1),
        };
        let (sin, cos) = (f64::from(position) * f64::from(f)).sin_cos();
        let (x, y, m) = (head[a], head[b], f64::from(rope.magnitude));
        (head[a], head[b]) = (m * (x * cos - y * sin), m * (x * sin + y * cos));
    }
    head
}

fn softmax(x: &[f64]) -> Vec<f64> {
    let largest = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let exp: Vec<f64> = x.iter().map(|v| (v - largest).exp()).collect();
    let sum: f64 = exp.iter().sum();
    exp.iter().map(|e| e / sum).collect()
}

fn attention(q: &[f64], k: &[f64], v: &[f64], heads: Heads) -> Vec<f64> {
    let (n, n_cols) = (heads.head_dim, heads.k().len());
    let of_head = |h: usize| {
        let at = h / (heads.n_head / heads.n_head_kv) * n;
        let scores = k.chunks_exact(n_cols).map(|k| dot(&q[h * n..][..n], &k[at..][..n]) / (n as f64).sqrt());
        let p = softmax(&scores.collect::<Vec<_>>());
        let mut out = vec![0.0; n];
        for (v, p) in v.chunks_exact(n_cols).zip(p) {
            out.iter_mut().zip(&v[at..][..n]).for_each(|(o, v)| *o += p * v);
        }
        out
    };
    (0..heads.n_head).flat_map(of_head).collect()
}
