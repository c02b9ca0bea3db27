//! Runs a fixture through a backend and compares what a probe saw with a golden.
// Each test binary uses a part of this.
#![allow(dead_code)]

use std::collections::BTreeMap;
use std::sync::Arc;

use apr_core::backend::fed::{Fed, Feed, Feeding};
use apr_core::backend::unfused::Unfused;
use apr_core::backend::{Backend, KvShape, KvType};
use apr_core::batch::{Batch, Row, Wants};
use apr_core::gguf;
use apr_core::hparams::Hparams;
use apr_core::models;
use apr_core::probe::{Recorder, Recording};
use apr_core::stage::Stage;
use safetensors::{Dtype, SafeTensors};

pub fn fixture(name: &str) -> Vec<u8> {
    let path = format!("{}/../../fixtures/{name}", env!("CARGO_MANIFEST_DIR"));
    std::fs::read(&path).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// A golden: tensors by name, as floats.
pub struct Golden(BTreeMap<String, (Vec<usize>, Vec<f32>)>);

impl Golden {
    pub fn read(name: &str) -> Golden {
        let bytes = fixture(name);
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let value = |dtype, b: &[u8]| match dtype {
            Dtype::F32 => f32::from_le_bytes(b.try_into().unwrap()),
            Dtype::I32 => i32::from_le_bytes(b.try_into().unwrap()) as f32,
            other => panic!("golden of type {other:?}"),
        };
        let values =
            |t: &safetensors::tensor::TensorView| t.data().chunks_exact(4).map(|b| value(t.dtype(), b)).collect();
        Golden(file.tensors().iter().map(|(name, t)| (name.clone(), (t.shape().to_vec(), values(t)))).collect())
    }

    pub fn get(&self, name: &str) -> Option<&[f32]> {
        self.0.get(name).map(|t| t.1.as_slice())
    }

    pub fn ids(&self, name: &str) -> Vec<u32> {
        self.get(name).unwrap_or_else(|| panic!("golden has {name}")).iter().map(|&v| v as u32).collect()
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// Values per position of a stage.
    pub fn n_cols(&self, name: &str) -> usize {
        self.0[name].0[1..].iter().product()
    }
}

/// KV blocks that [`Run`] gives each sequence: 1,088 positions.
const BLOCKS_PER_SEQUENCE: usize = 17;

/// A fixture loaded into a backend, with its changes to the hyper-parameters.
pub struct Run<B: Backend> {
    backend: B,
    hparams: Hparams,
    model: models::Model<B::Weight>,
    state: models::StateOf<B>,
    kv: B::KvCache,
}

impl<B: Backend> Run<B> {
    pub fn new(backend: B, name: &str, kv_type: KvType, change: impl FnOnce(&mut Hparams)) -> Run<B> {
        let bytes = fixture(name);
        let parsed = gguf::parse(&bytes).unwrap();
        let mut hparams = Hparams::from_gguf(&parsed).unwrap();
        change(&mut hparams);
        let model = models::load(&backend, &parsed, &hparams, &[Arc::new(bytes)]).unwrap();
        let state = models::state(&backend, &hparams, &model);
        let heads = hparams.heads;
        let shape = KvShape { n_layer: hparams.n_layer, n_head_kv: heads.n_head_kv, head_dim: heads.head_dim, kv_type };
        let kv = backend.kv_cache(shape);
        Run { backend, hparams, model, state, kv }
    }

    /// One step over `tokens` from position `from` of one sequence; the last `n_logits` want logits.
    pub fn step(&mut self, tokens: &[u32], from: usize, n_logits: usize, probe: &mut Recorder) {
        self.step_many(&[(0, tokens, from, n_logits)], probe);
    }

    /// One step of several sequences: number, new tokens, position of the first, how many of the last want logits.
    pub fn step_many(&mut self, parts: &[(usize, &[u32], usize, usize)], probe: &mut Recorder) {
        let batch = self.batch(parts);
        models::step(&self.backend, &self.model, &mut self.state, &mut self.kv, &batch, probe).unwrap();
    }

    /// One step over all of a prompt by the plain bodies of the fusable ops; every row wants logits.
    pub fn step_unfused(&mut self, tokens: &[u32], probe: &mut Recorder) {
        let batch = self.batch(&[(0, tokens, 0, tokens.len())]);
        let unfused = Unfused(&self.backend);
        models::step(&unfused, &self.model, &mut self.state, &mut self.kv, &batch, probe).unwrap();
    }

    /// One step over all of a prompt with values of `feed` in place of the run's own; every row wants logits.
    pub fn step_fed(&mut self, tokens: &[u32], unfused: bool, feed: &mut dyn Feed, watch: &mut Recorder) {
        let batch = self.batch(&[(0, tokens, 0, tokens.len())]);
        let fed = Fed::new(&self.backend, unfused);
        let mut state = models::state(&fed, &self.hparams, &self.model);
        let mut probe = Feeding { watch, feed };
        models::step(&fed, &self.model, &mut state, &mut self.kv, &batch, &mut probe).unwrap();
    }

    fn batch(&mut self, parts: &[(usize, &[u32], usize, usize)]) -> Batch {
        let n_sequence = parts.iter().map(|p| p.0 + 1).max().unwrap();
        self.backend.kv_reserve(&mut self.kv, n_sequence * BLOCKS_PER_SEQUENCE).unwrap();
        let mut rows = Vec::new();
        for (i, (_, tokens, from, n_logits)) in parts.iter().enumerate() {
            let row = |(k, &token): (usize, &u32)| Row {
                token,
                position: (from + k) as u32,
                sequence: i as u32,
                wants: if k + n_logits >= tokens.len() { Wants::Logits } else { Wants::Nothing },
            };
            rows.extend(tokens.iter().enumerate().map(row));
        }
        // The blocks of a sequence lie in descending order, so that no test passes by their being in ascending order.
        let table = |s: usize| (0..BLOCKS_PER_SEQUENCE).rev().map(|b| (s * BLOCKS_PER_SEQUENCE + b) as u32).collect();
        Batch::new(rows, parts.iter().map(|p| table(p.0)).collect())
    }

    /// All logits of the last step, `[rows that wanted them, n_vocab]`.
    pub fn logits(&self) -> Vec<f32> {
        let mut out = Vec::new();
        self.backend.read(&self.state.logits, &mut out).unwrap();
        out
    }

    /// Logits of the last row of the last step.
    pub fn last_logits(&self) -> Vec<f32> {
        let (n, mut out) = (self.backend.shape(&self.state.logits).0, Vec::new());
        self.backend.read_row(&self.state.logits, n - 1, &mut out).unwrap();
        out
    }

    /// Greedy continuation of a prompt.
    pub fn greedy(&mut self, prompt: &[u32], n: usize) -> Vec<u32> {
        let mut out = Vec::new();
        self.step(prompt, 0, 1, &mut Recorder::of(&[]));
        while out.len() < n {
            out.push(argmax(&self.last_logits()));
            self.step(&out[out.len() - 1..], prompt.len() + out.len() - 1, 1, &mut Recorder::of(&[]));
        }
        out
    }
}

pub fn argmax(x: &[f32]) -> u32 {
    (0..x.len()).max_by(|&a, &b| x[a].total_cmp(&x[b]).then(b.cmp(&a))).unwrap() as u32
}

/// Kullback-Leibler divergence of the softmax of `b` from that of `a`, in nats.
pub fn kl_divergence(a: &[f32], b: &[f32]) -> f64 {
    let log_softmax = |x: &[f32]| {
        let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = x.iter().map(|&v| f64::from(v - max).exp()).sum();
        x.iter().map(|&v| f64::from(v - max) - sum.ln()).collect::<Vec<f64>>()
    };
    log_softmax(a).iter().zip(log_softmax(b)).map(|(p, q)| p.exp() * (p - q)).sum()
}

/// `|a - b| / |b|`, root mean square.
pub fn relative_rms(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let square = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>();
    let error = square(&mut a.iter().zip(b).map(|(&a, &b)| f64::from(a) - f64::from(b)));
    (error / square(&mut b.iter().map(|&b| f64::from(b))).max(1e-30)).sqrt()
}

/// The first stage and position where a run leaves a golden by more than `bound`, or where expert ids differ.
/// `skip` positions were recorded before the golden's first.
pub fn first_difference(golden: &Golden, seen: &BTreeMap<(usize, Stage), Recording>, bound: f64) -> Option<String> {
    let mut n_compared = 0;
    for (&(layer, stage), recording) in seen {
        let name = stage.tensor_name(layer);
        let Some(expected) = golden.get(&name) else { continue };
        let n = golden.n_cols(&name);
        let rows: Vec<_> = expected.chunks_exact(n).collect();
        assert_eq!(recording.n_cols(), n, "{name}: values per position");
        let first = recording.positions.len() - rows.len();
        for (i, expected) in rows.iter().enumerate() {
            let got = recording.row(first + i);
            let error = relative_rms(got, expected);
            let differs =
                if stage == Stage::MoeRouterIndices { got != *expected } else { error.is_nan() || error > bound };
            if differs {
                let position = recording.positions[first + i];
                return Some(format!("{name} at position {position}: relative RMS {error:e}, bound {bound:e}"));
            }
            n_compared += 1;
        }
    }
    assert!(n_compared > 0, "the golden and the run share stages");
    None
}
