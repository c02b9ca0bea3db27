//! From a finding to the computation behind it: the stage's op with its inputs from a recorded pass and its weights from a file.

use std::ops::Range;

use apr_core::backend::{Bytes, KvType, WeightData};
use apr_core::hparams::Hparams;
use apr_core::qtype;
use apr_core::rope::Rope;
use apr_core::stage::{Place, Stage};

use super::Finding;
use super::op::{Input, Kind, StageOp};
use super::weights::{self, Spot};
use crate::model_file::ModelFile;
use crate::trace::file::SavedTrace;

/// Bytes of a matrix that is taken whole. Of a larger one the rows around the culprit are taken.
const WHOLE_MAX: usize = 16 << 20;

/// A finding's computation.
#[derive(Clone)]
pub(super) struct Taken {
    pub op: StageOp,
    pub position: u32,
    /// The weight; a row is that of the whole matrix.
    pub spot: Spot,
    /// The first row of the matrix that was taken.
    pub first_row: usize,
    /// Columns of the stage's value that the op computes.
    pub columns: Range<usize>,
}

/// What a finding is taken from.
pub(super) struct Site<'a> {
    tape: &'a SavedTrace,
    file: &'a ModelFile,
    h: Hparams,
    kv_type: KvType,
    layer: usize,
    position: u32,
    spot: Spot,
    ids: Vec<u32>,
}

/// Takes the computation of a finding: weights and constants of `file`, inputs of `tape`, keys and values stored as `kv_type`.
///
/// # Errors
/// Why there is none, in words.
pub(super) fn take(tape: &SavedTrace, file: &ModelFile, kv_type: KvType, finding: &Finding) -> Result<Taken, String> {
    let place = finding.place.ok_or("the finding belongs to no stage")?;
    let first = tape.header.positions.first().copied().unwrap_or_default();
    let (layer, position) = (place.layer().unwrap_or_default(), finding.position.unwrap_or(first));
    let (h, mut ids) = (file.hparams().map_err(|e| e.to_string())?, Vec::new());
    tape.read(Place::new(layer, Stage::MoeRouterIndices), position, &mut ids);
    let ids: Vec<u32> = ids.iter().map(|&id| id as u32).collect();
    let token = tape.header.tokens.get(position as usize).copied().unwrap_or_default();
    let spot = match finding.column {
        Some(column) => weights::spot(file, &h, place, column, token, &ids),
        None => finding.spot.clone(),
    };
    let site = Site { tape, file, h, kv_type, layer, position, spot, ids };
    let taken = site.taken(place.stage)?;
    taken.op.check()?;
    Ok(taken)
}

impl Site<'_> {
    fn taken(&self, stage: Stage) -> Result<Taken, String> {
        use Stage::*;
        let (il, eps) = (self.layer, self.h.rms_eps);
        let pair = |kind, a, b| self.whole(kind, vec![self.row(a)?, self.row(b)?], None);
        let of_attention = || self.row(PostAttnResidual);
        match stage {
            Embedding => self.embedding(),
            AttnNorm => self.norm("attn_norm.weight", self.residual()?),
            QkvMatmul | QkvBias => self.projection(stage),
            QPostRope => self.rotation(self.h.heads.q(), "attn_q_norm.weight"),
            KPostRope => self.rotation(self.h.heads.k(), "attn_k_norm.weight"),
            Attention => self.attention(),
            AttnOut => self.product(self.row(Attention)?, 0),
            PostAttnResidual => self.whole(Kind::Add, vec![self.residual()?, self.row(AttnOut)?], None),
            FfnNorm => self.norm("ffn_norm.weight", of_attention()?),
            FfnGate | FfnUp | MoeRouterLogits => self.product(self.row(FfnNorm)?, 0),
            FfnSilu => self.whole(Kind::Silu, vec![self.row(FfnGate)?], None),
            FfnSwigl => pair(Kind::Swiglu, FfnGate, FfnUp),
            FfnOut => self.product(self.row(FfnSwigl)?, 0),
            MoeRouter | MoeRouterIndices => {
                let n_used = self.h.experts.as_ref().map_or(0, |e| e.n_expert_used);
                let kind = Kind::Route { n_used, ids: stage == MoeRouterIndices };
                self.whole(kind, vec![self.row(MoeRouterLogits)?], None)
            }
            MoeExpertGate | MoeExpertUp => self.product(self.row(FfnNorm)?, self.slot()),
            MoeExpertSwigl => pair(Kind::Swiglu, MoeExpertGate, MoeExpertUp),
            MoeExpertOut => {
                let all = self.row(MoeExpertSwigl)?.values;
                let part = all.chunks_exact(all.len() / self.ids.len().max(1)).nth(self.slot());
                self.product(Input::row(part.ok_or("the experts' values are missing")?.to_vec()), self.slot())
            }
            MoeFfnOut => pair(Kind::WeightedSum, MoeExpertOut, MoeRouter),
            PostFfnResidual => {
                let out = if self.h.experts.is_some() { MoeFfnOut } else { FfnOut };
                self.whole(Kind::Add, vec![of_attention()?, self.row(out)?], None)
            }
            FinalNorm => {
                let x = self.value(Place::new(self.h.n_layer - 1, PostFfnResidual), self.position)?;
                let w = self.weight("output_norm.weight")?;
                self.whole(Kind::Norm { eps }, vec![Input::row(x)], Some(w))
            }
            LmHead => self.product(self.row(FinalNorm)?, 0),
            AttnScores | AttnSoftmax => Err(format!("{} of layer {il} is part of attention", stage.name())),
        }
    }

    fn value(&self, place: Place, position: u32) -> Result<Vec<f32>, String> {
        let mut out = Vec::new();
        match self.tape.read(place, position, &mut out) {
            true => Ok(out),
            false => Err(format!("side A has no {place} at position {position}, which goes into it")),
        }
    }

    /// A stage of the same layer and position.
    fn row(&self, stage: Stage) -> Result<Input, String> {
        self.value(Place::new(self.layer, stage), self.position).map(Input::row)
    }

    /// The residual stream that enters the layer.
    fn residual(&self) -> Result<Input, String> {
        let before = self.layer.checked_sub(1);
        let place = before.map_or(Place::new(0, Stage::Embedding), |il| Place::new(il, Stage::PostFfnResidual));
        self.value(place, self.position).map(Input::row)
    }

    fn weight(&self, name: &str) -> Result<WeightData, String> {
        weights::weight(self.file, name).ok_or_else(|| format!("'{}' has no tensor '{name}'", self.file.path.display()))
    }

    fn layer_weight(&self, part: &str) -> Result<WeightData, String> {
        self.weight(&format!("blk.{}.{part}", self.layer))
    }

    fn taken_as(&self, op: StageOp, first_row: usize, columns: Range<usize>) -> Taken {
        Taken { op, position: self.position, spot: self.spot.clone(), first_row, columns }
    }

    /// An op that computes the whole of the stage's value.
    fn whole(&self, kind: Kind, inputs: Vec<Input>, weight: Option<WeightData>) -> Result<Taken, String> {
        let op = StageOp { kind, inputs, weight };
        let n = op.n_results();
        Ok(self.taken_as(op, 0, 0..n))
    }

    fn norm(&self, part: &str, x: Input) -> Result<Taken, String> {
        self.whole(Kind::Norm { eps: self.h.rms_eps }, vec![x], Some(self.layer_weight(part)?))
    }

    fn embedding(&self) -> Result<Taken, String> {
        let table = self.weight("token_embd.weight")?;
        let (row, n) = (self.spot.row.unwrap_or_default(), table.n_cols);
        let weight = Some(rows_of(&table, 0, row..row + 1)?);
        Ok(self.taken_as(StageOp { kind: Kind::Embedding, inputs: Vec::new(), weight }, row, 0..n))
    }

    /// The slot of the expert; of an expert that is not used here, the first.
    fn slot(&self) -> usize {
        self.ids.iter().position(|&id| Some(id as usize) == self.spot.expert).unwrap_or_default()
    }

    /// A product with the tensor that the spot names, its first row being `slot` times its rows in the stage's value.
    fn product(&self, x: Input, slot: usize) -> Result<Taken, String> {
        let name = self.spot.tensor.as_deref().ok_or("no weight is known behind it")?;
        let all = self.weight(name)?;
        self.product_with(x, &all, slot * all.n_rows)
    }

    fn product_with(&self, x: Input, all: &WeightData, at: usize) -> Result<Taken, String> {
        let of_expert = all.n_mat > 1;
        let mat = self.spot.expert.filter(|_| of_expert).unwrap_or_default();
        let rows = window(all.n_rows, all.row_bytes(), self.spot.row.unwrap_or_default());
        let weight = Some(rows_of(all, mat, rows.clone())?);
        let op = StageOp { kind: Kind::Product { of_expert }, inputs: vec![x], weight };
        Ok(self.taken_as(op, rows.start, at + rows.start..at + rows.end))
    }

    /// Queries, keys or values before their norms: the product, or the bias on it.
    fn projection(&self, stage: Stage) -> Result<Taken, String> {
        let name = self.spot.tensor.clone().ok_or("no weight is known behind it")?;
        let heads = &self.h.heads;
        let parts = [("attn_q.", heads.q()), ("attn_k.", heads.k()), ("attn_v.", heads.v())];
        let found = parts.into_iter().find(|(part, _)| name.contains(part));
        let (_, cols) = found.ok_or_else(|| format!("'{name}' is no part of {}", stage.name()))?;
        if stage == Stage::QkvMatmul {
            return self.product_with(self.row(Stage::AttnNorm)?, &self.weight(&name)?, cols.start);
        }
        let x = Input::row(part_of(self.row(Stage::QkvMatmul)?.values, &cols)?);
        let op = StageOp { kind: Kind::Bias, inputs: vec![x], weight: Some(self.weight(&name)?) };
        Ok(self.taken_as(op, 0, cols))
    }

    /// Columns of queries, keys and values as they enter norm and rotation.
    fn projected(&self, cols: &Range<usize>, position: u32) -> Result<Vec<f32>, String> {
        let stage = |stage| self.value(Place::new(self.layer, stage), position);
        part_of(stage(Stage::QkvBias).or_else(|_| stage(Stage::QkvMatmul))?, cols)
    }

    fn rotation(&self, cols: Range<usize>, norm: &str) -> Result<Taken, String> {
        let h = &self.h;
        let factors = weights::weight(self.file, "rope_freqs.weight").map(|w| {
            let mut out = vec![0.0; w.n_cols];
            qtype::dequantize_row(w.qtype, &w.bytes, &mut out);
            out
        });
        if factors.as_ref().is_some_and(|f| f.len() != h.n_rot / 2) {
            return Err(format!("'rope_freqs.weight' has other than {} factors", h.n_rot / 2));
        }
        let rope = Rope::new(h.pairing, h.n_rot, h.rope_base, h.rope_scaling, factors.as_deref());
        let kind = Kind::Rotate { eps: h.rms_eps, head_dim: h.heads.head_dim, rope, position: self.position };
        self.whole(kind, vec![Input::row(self.projected(&cols, self.position)?)], self.layer_weight(norm).ok())
    }

    fn attention(&self) -> Result<Taken, String> {
        let heads = self.h.heads;
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for p in 0..=self.position {
            keys.extend(self.value(Place::new(self.layer, Stage::KPostRope), p)?);
            values.extend(self.projected(&heads.v(), p)?);
        }
        let rows = |values| Input { n_cols: heads.k().len(), values };
        let inputs = vec![self.row(Stage::QPostRope)?, rows(keys), rows(values)];
        self.whole(Kind::Attention { heads, kv_type: self.kv_type }, inputs, None)
    }
}

fn part_of(values: Vec<f32>, cols: &Range<usize>) -> Result<Vec<f32>, String> {
    let part = values.get(cols.clone()).map(<[f32]>::to_vec);
    part.ok_or_else(|| format!("columns {cols:?} of {} do not exist", values.len()))
}

/// The rows to take: all, or as many as there is room for around `row`.
fn window(n_rows: usize, row_bytes: usize, row: usize) -> Range<usize> {
    let n = (WHOLE_MAX / row_bytes.max(1)).clamp(1, n_rows);
    let start = row.saturating_sub(n / 2).min(n_rows - n);
    start..start + n
}

/// Rows of one matrix of a tensor, as a matrix of its own.
pub(super) fn rows_of(w: &WeightData, mat: usize, rows: Range<usize>) -> Result<WeightData, String> {
    let (n, first) = (w.row_bytes(), mat * w.n_rows);
    let bytes = w.bytes.get((first + rows.start) * n..(first + rows.end) * n);
    let bytes = bytes.ok_or_else(|| format!("'{}' has no rows {rows:?} of matrix {mat}", w.name))?;
    Ok(WeightData { n_rows: rows.len(), n_mat: 1, bytes: Bytes::from_vec(bytes.to_vec()), ..w.clone() })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::device::Device;
    use crate::diff::exact::exact;
    use crate::diff::measure::RowDiff;
    use crate::diff::sides::{Loaded, ModelSource};
    use crate::diff::verdict::Mode;
    use crate::engine::EngineOptions;
    use apr_core::backend::Precision;

    fn finding(place: Place, position: u32, column: usize) -> Finding {
        let (mode, spot, why) = (Mode::Isolated, Spot::default(), String::new());
        let (position, column) = (Some(position), Some(column));
        Finding { place: Some(place), position, column, spot, mode, error: 1.0, noise: 0.0, ratio: 2.0, why }
    }

    /// Computes every stage of a pass alone and compares it with the pass.
    fn check_all(fixture: &str, n_stages: usize) {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures").join(fixture);
        let device = Device::Reference { activations: Precision::F32 };
        let options = EngineOptions { device, kv_type: KvType::F16, n_ctx: None };
        let source = ModelSource { path, options, unfused: false };
        let (mut side, dir) = (Loaded::load(&source).unwrap(), tempfile::tempdir().unwrap());
        let (tokens, positions): (Vec<u32>, Vec<u32>) = ((0..70).map(|i| 7 + 3 * i % 200).collect(), (0..70).collect());
        let to = dir.path().join("tape.safetensors");
        let tape = side.record(&to, (&tokens, &positions), &|_| true, None, None).unwrap();
        let mut stages = std::collections::BTreeSet::new();
        for place in tape.places() {
            stages.insert(place.stage);
            for position in [0, 69] {
                let mut row = Vec::new();
                assert!(tape.read(place, position, &mut row));
                for column in [0, row.len() / 2, row.len() * 3 / 4, row.len() - 1] {
                    let taken = take(&tape, &side.engine.file, KvType::F16, &finding(place, position, column)).unwrap();
                    assert!(taken.columns.contains(&column), "{fixture} {place} {column}: {:?}", taken.columns);
                    let expected: Vec<f32> = exact(&taken.op).iter().map(|&v| v as f32).collect();
                    let d = RowDiff::of(position, &expected, &row[taken.columns]);
                    assert!(d.rms() <= 3e-6 * d.rms_a(), "{fixture} {place} position {position}: {d:?}");
                }
            }
        }
        assert_eq!(stages.len(), n_stages, "{stages:?}");
    }

    #[test]
    fn every_stage_of_a_pass_can_be_computed_alone() {
        check_all("tiny-qwen3moe.gguf", 20);
        check_all("arch/qwen2.gguf", 18);
        check_all("arch/llama3-ropefreqs.gguf", 17);
        check_all("arch/qwen3-yarn.gguf", 17);
    }

    #[test]
    fn rows_are_taken_around_the_culprit() {
        assert_eq!(window(512, 1024, 511), 0..512);
        assert_eq!(window(100_000, 1 << 20, 50), 42..58);
        assert_eq!(window(100_000, 1 << 20, 3), 0..16);
        assert_eq!(window(100_000, 1 << 20, 99_999), 99_984..100_000);
        assert_eq!(window(4, 64 << 20, 2), 2..3);
    }
}
