//! A stage as one stand-alone computation: what goes into it at one position, the weights it meets, the constants of the op.
//!
//! [`StageOp::run`] computes it with a backend's own ops. What it should give is in [`exact`](super::exact).

use std::ops::Range;

use apr_core::backend::{Backend, Heads, KV_BLOCK, KvShape, KvType, Result, Routing, WeightData};
use apr_core::batch::{Batch, Row, Wants};
use apr_core::probe::NoProbe;
use apr_core::rope::Rope;

/// The largest head that backends have buffers for.
const HEAD_DIM_MAX: usize = 1024;

/// An op and its constants. Inputs are named in [`inputs`](Self::inputs).
#[derive(Clone, Debug, PartialEq)]
pub enum Kind {
    /// `weight · x`, one result per row of the weight; `of_expert` by the op that experts are multiplied with.
    Product { of_expert: bool },
    /// `x / rms(x) * weight`, `eps` added to the mean square.
    Norm { eps: f32 },
    /// `x + weight`
    Bias,
    /// Every head normalised where there is a weight `[head_dim]`, then rotated by the position.
    Rotate { eps: f32, head_dim: usize, rope: Rope, position: u32 },
    /// The weight's only row.
    Embedding,
    /// `q` attends to all rows of `k` and `v`, the last of which is its own position.
    Attention { heads: Heads, kv_type: KvType },
    /// The largest logits: their ids, or their weights.
    Route { n_used: usize, ids: bool },
    /// `x * sigmoid(x)`
    Silu,
    /// `gate * sigmoid(gate) * up`
    Swiglu,
    /// The parts of `x` times their weights.
    WeightedSum,
    /// `x + y`
    Add,
}

/// Rows of values that go into an op.
#[derive(Clone, Debug, PartialEq)]
pub struct Input {
    pub n_cols: usize,
    /// `[n_rows, n_cols]`
    pub values: Vec<f32>,
}

/// An op with all it needs.
#[derive(Clone)]
pub struct StageOp {
    pub kind: Kind,
    /// As [`Kind::inputs`] names them.
    pub inputs: Vec<Input>,
    /// One matrix, or a vector.
    pub weight: Option<WeightData>,
}

impl Kind {
    /// The name in files.
    pub fn name(&self) -> &'static str {
        match self {
            Kind::Product { of_expert: false } => "product",
            Kind::Product { of_expert: true } => "expert_product",
            Kind::Norm { .. } => "norm",
            Kind::Bias => "bias",
            Kind::Rotate { .. } => "head_norm_rope",
            Kind::Embedding => "embedding",
            Kind::Attention { .. } => "attention",
            Kind::Route { ids: false, .. } => "route_weights",
            Kind::Route { ids: true, .. } => "route_ids",
            Kind::Silu => "silu",
            Kind::Swiglu => "swiglu",
            Kind::WeightedSum => "weighted_sum",
            Kind::Add => "add",
        }
    }

    /// Names of the inputs.
    pub fn inputs(&self) -> &'static [&'static str] {
        match self {
            Kind::Embedding => &[],
            Kind::Attention { .. } => &["q", "k", "v"],
            Kind::Route { .. } => &["logits"],
            Kind::Swiglu => &["gate", "up"],
            Kind::WeightedSum => &["x", "weights"],
            Kind::Add => &["x", "y"],
            _ => &["x"],
        }
    }

    /// Whether the op needs a weight; `None` where it may have one.
    fn needs_weight(&self) -> Option<bool> {
        match self {
            Kind::Rotate { .. } => None,
            Kind::Product { .. } | Kind::Norm { .. } | Kind::Bias | Kind::Embedding => Some(true),
            _ => Some(false),
        }
    }
}

impl Input {
    pub fn n_rows(&self) -> usize {
        self.values.len() / self.n_cols
    }

    pub fn rows(&self) -> std::slice::ChunksExact<'_, f32> {
        self.values.chunks_exact(self.n_cols)
    }

    /// One row.
    pub fn row(values: Vec<f32>) -> Input {
        Input { n_cols: values.len(), values }
    }
}

impl StageOp {
    /// Checks that sizes fit each other, so that neither the op nor its exact computation can fail.
    ///
    /// # Errors
    /// What does not fit.
    pub fn check(&self) -> std::result::Result<(), String> {
        let names = self.kind.inputs();
        if self.inputs.len() != names.len() {
            return Err(format!(
                "'{}' takes {} inputs, there are {}",
                self.kind.name(),
                names.len(),
                self.inputs.len()
            ));
        }
        for (input, name) in self.inputs.iter().zip(names) {
            let whole = input.n_cols > 0 && !input.values.is_empty() && input.values.len().is_multiple_of(input.n_cols);
            let many = matches!(self.kind, Kind::Attention { .. } | Kind::Product { .. }) && *name != "q";
            if !whole || (!many && input.n_rows() != 1) {
                return Err(format!("input '{name}' has {} values in rows of {}", input.values.len(), input.n_cols));
            }
        }
        match (&self.weight, self.kind.needs_weight()) {
            (None, Some(true)) => return Err(format!("'{}' needs a weight", self.kind.name())),
            (Some(_), Some(false)) => return Err(format!("'{}' takes no weight", self.kind.name())),
            (Some(w), _) => check_weight(w)?,
            (None, _) => {}
        }
        self.check_sizes()
    }

    fn check_sizes(&self) -> std::result::Result<(), String> {
        let cols = |i: usize| self.inputs[i].n_cols;
        let same = |what: &str, got: usize, expected: usize| match got == expected {
            true => Ok(()),
            false => Err(format!("{what} has {got} values, expected {expected}")),
        };
        match &self.kind {
            Kind::Product { .. } => same("a row of the weight", self.weight().n_cols, cols(0)),
            Kind::Norm { eps } => positive("eps", *eps).and_then(|()| self.check_vector(cols(0))),
            Kind::Bias => self.check_vector(cols(0)),
            Kind::Rotate { eps, head_dim, rope, .. } => {
                let (n, n_rot) = (*head_dim, rope.n_rot());
                positive("eps", *eps)?;
                check_head(n)?;
                if n_rot == 0 || n_rot > n || !cols(0).is_multiple_of(n) {
                    return Err(format!("{n_rot} of {n} values of a head rotate, in a row of {}", cols(0)));
                }
                if !rope.inv_freq.iter().chain([&rope.magnitude]).all(|v| v.is_finite()) {
                    return Err("a rotation is not finite".to_string());
                }
                if self.weight.is_some() { self.check_vector(n) } else { Ok(()) }
            }
            Kind::Embedding => same("the number of rows", self.weight().n_rows, 1),
            Kind::Attention { heads, kv_type } => {
                check_head(heads.head_dim)?;
                if heads.n_head == 0 || heads.n_head_kv == 0 || !heads.n_head.is_multiple_of(heads.n_head_kv) {
                    return Err(format!("{} query heads share {} KV heads", heads.n_head, heads.n_head_kv));
                }
                if *kv_type == KvType::Q8_0 && !heads.head_dim.is_multiple_of(32) {
                    return Err(format!("8-bit KV takes heads of whole 32 values, these have {}", heads.head_dim));
                }
                same("q", cols(0), heads.q().len())?;
                same("a row of k", cols(1), heads.k().len())?;
                same("a row of v", cols(2), heads.v().len())?;
                same("the rows of v", self.inputs[2].n_rows(), self.inputs[1].n_rows())
            }
            Kind::Route { n_used, .. } => match (1..=cols(0)).contains(n_used) {
                true => Ok(()),
                false => Err(format!("{n_used} of {} experts are used", cols(0))),
            },
            Kind::Silu => Ok(()),
            Kind::Swiglu => same("up", cols(1), cols(0)),
            Kind::Add => same("y", cols(1), cols(0)),
            Kind::WeightedSum => match cols(0).is_multiple_of(cols(1)) {
                true => Ok(()),
                false => Err(format!("{} values are no {} equal parts", cols(0), cols(1))),
            },
        }
    }

    fn check_vector(&self, n: usize) -> std::result::Result<(), String> {
        let w = self.weight();
        match w.n_rows == 1 && w.n_cols == n && w.qtype.is_float() {
            true => Ok(()),
            false => Err(format!("the weight is {} x {} of {}, expected {n} floats", w.n_rows, w.n_cols, w.qtype)),
        }
    }

    /// How many values the op gives.
    pub fn n_results(&self) -> usize {
        let input = |i: usize| &self.inputs[i];
        match &self.kind {
            Kind::Product { .. } => input(0).n_rows() * self.weight().n_rows,
            Kind::Embedding => self.weight().n_cols,
            Kind::Route { n_used, .. } => *n_used,
            Kind::WeightedSum => input(0).n_cols / input(1).n_cols.max(1),
            _ => input(0).n_cols,
        }
    }

    /// The weight of an op that needs one.
    pub(super) fn weight(&self) -> &WeightData {
        self.weight.as_ref().expect("the op has been checked to have a weight")
    }

    /// Computes the op. It must have passed [`check`](Self::check).
    pub(crate) fn run<B: Backend>(&self, b: &B) -> Result<Vec<f32>> {
        let w = self.weight.as_ref().map(|w| b.upload(w)).transpose()?;
        let w = || w.as_ref().expect("the op has been checked to have a weight");
        let load = |i: usize, consumers: &[&B::Weight]| {
            let mut t = b.tensor(self.inputs[i].n_cols, consumers);
            b.write(&mut t, &self.inputs[i].values).map(|()| t)
        };
        let read = |t: B::Tensor| {
            let mut out = Vec::new();
            b.read(&t, &mut out).map(|()| out)
        };
        match &self.kind {
            Kind::Product { of_expert } => read(self.multiply(b, w(), &load(0, &[w()])?, *of_expert)?),
            Kind::Norm { eps } => {
                let (x, mut out) = (load(0, &[])?, b.tensor(self.inputs[0].n_cols, &[]));
                b.rms_norm(&mut out, &x, w(), *eps)?;
                read(out)
            }
            Kind::Bias => {
                let mut x = load(0, &[])?;
                b.add_bias(&mut x, 0, w())?;
                read(x)
            }
            Kind::Rotate { eps, head_dim, rope, position } => {
                let (mut x, cols) = (load(0, &[])?, 0..self.inputs[0].n_cols);
                if self.weight.is_some() {
                    b.head_norm(&mut x, cols.clone(), w(), *eps)?;
                }
                b.rope(&mut x, cols, *head_dim, rope, &at_position(*position))?;
                read(x)
            }
            Kind::Embedding => {
                let mut out = b.tensor(self.weight().n_cols, &[]);
                b.embed(&mut out, w(), &at_position(0))?;
                read(out)
            }
            Kind::Attention { heads, kv_type } => self.attend(b, *heads, *kv_type),
            Kind::Route { n_used, ids } => route(b, load(0, &[])?, *n_used, *ids),
            Kind::Silu => {
                let mut x = load(0, &[])?;
                b.silu(&mut x)?;
                read(x)
            }
            Kind::Swiglu => {
                let mut gate = load(0, &[])?;
                b.silu(&mut gate)?;
                b.mul(&mut gate, &load(1, &[])?)?;
                read(gate)
            }
            Kind::WeightedSum => {
                let (x, weights) = (load(0, &[])?, load(1, &[])?);
                let mut out = b.tensor(self.inputs[0].n_cols / self.inputs[1].n_cols, &[]);
                b.weighted_sum(&mut out, &x, &weights)?;
                read(out)
            }
            Kind::Add => {
                let mut x = load(0, &[])?;
                b.add(&mut x, &load(1, &[])?)?;
                read(x)
            }
        }
    }

    fn multiply<B: Backend>(&self, b: &B, w: &B::Weight, x: &B::Tensor, of_expert: bool) -> Result<B::Tensor> {
        let mut out = b.tensor(self.weight().n_rows, &[]);
        if of_expert {
            let mut ids = b.ids(1);
            b.write_ids(&mut ids, &vec![0; b.shape(x).0])?;
            b.matmul_experts(&mut out, w, &ids, x)?;
        } else {
            b.matmul(&mut out, 0, w, x)?;
        }
        Ok(out)
    }

    /// Attention of the last position. The earlier ones only have to be stored: each block of them is a sequence of its own, so that
    /// none of them attends to more than its block.
    fn attend<B: Backend>(&self, b: &B, heads: Heads, kv_type: KvType) -> Result<Vec<f32>> {
        let (q, k, v) = (&self.inputs[0], &self.inputs[1], &self.inputs[2]);
        let n = k.n_rows();
        let (n_head_kv, head_dim) = (heads.n_head_kv, heads.head_dim);
        let mut kv = b.kv_cache(KvShape { n_layer: 1, n_head_kv, head_dim, kv_type });
        let table: Vec<u32> = (0..n.div_ceil(KV_BLOCK) as u32).collect();
        b.kv_reserve(&mut kv, table.len())?;
        let (mut qkv, mut out) = (b.tensor(heads.n_qkv(), &[]), b.tensor(heads.q().len(), &[]));
        let mut step = |rows: Range<usize>, batch: &Batch, out: &mut B::Tensor| {
            let row = |i: usize| {
                [&q.values[..], &k.values[i * k.n_cols..][..k.n_cols], &v.values[i * v.n_cols..][..v.n_cols]]
            };
            let values: Vec<f32> = rows.flat_map(|i| row(i).concat()).collect();
            b.write(&mut qkv, &values)?;
            b.attention(out, &qkv, &mut kv, 0, heads, batch, &mut NoProbe)
        };
        if n > 1 {
            let rows = (0..n - 1).map(|p| row((p % KV_BLOCK) as u32, (p / KV_BLOCK) as u32)).collect();
            step(0..n - 1, &Batch::new(rows, table.iter().map(|&block| vec![block]).collect()), &mut out)?;
        }
        step(n - 1..n, &Batch::new(vec![row(n as u32 - 1, 0)], vec![table.clone()]), &mut out)?;
        let mut values = Vec::new();
        b.read(&out, &mut values).map(|()| values)
    }
}

fn route<B: Backend>(b: &B, logits: B::Tensor, n_used: usize, wants_ids: bool) -> Result<Vec<f32>> {
    let mut routing = Routing { logits, ids: b.ids(n_used), weights: b.tensor(n_used, &[]) };
    b.route(&mut routing)?;
    let (mut weights, mut ids) = (Vec::new(), Vec::new());
    b.read(&routing.weights, &mut weights)?;
    b.read_ids(&routing.ids, &mut ids)?;
    Ok(if wants_ids { ids.iter().map(|&id| id as f32).collect() } else { weights })
}

fn row(position: u32, sequence: u32) -> Row {
    Row { token: 0, position, sequence, wants: Wants::Logits }
}

/// A batch of one row of token 0.
fn at_position(position: u32) -> Batch {
    Batch::new(vec![row(position, 0)], vec![vec![0; position as usize / KV_BLOCK + 1]])
}

fn check_weight(w: &WeightData) -> std::result::Result<(), String> {
    let whole = w.n_cols > 0 && w.n_rows > 0 && w.n_mat == 1 && w.n_cols.is_multiple_of(w.qtype.block_len());
    if !whole || w.row_bytes().checked_mul(w.n_rows) != Some(w.bytes.len()) {
        let n = w.bytes.len();
        return Err(format!("the weight is {} x {} of {} in {n} bytes", w.n_rows, w.n_cols, w.qtype));
    }
    Ok(())
}

fn check_head(head_dim: usize) -> std::result::Result<(), String> {
    match head_dim {
        n if n > 0 && n.is_multiple_of(2) && n <= HEAD_DIM_MAX => Ok(()),
        n => Err(format!("a head has {n} values, expected an even number of at most {HEAD_DIM_MAX}")),
    }
}

fn positive(name: &str, v: f32) -> std::result::Result<(), String> {
    if v.is_finite() && v > 0.0 { Ok(()) } else { Err(format!("{name} is {v}, expected a finite number above 0")) }
}
