//! From a value that differs to the weights behind it: tensor, expert, row, quant super-block.

use std::sync::Arc;

use apr_core::backend::{Bytes, WeightData};
use apr_core::gguf::TensorInfo;
use apr_core::hparams::Hparams;
use apr_core::qtype;
use apr_core::stage::{Place, Stage};

use crate::model_file::ModelFile;

/// Weights that a value was computed with.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Spot {
    pub expert: Option<usize>,
    pub tensor: Option<String>,
    /// Row of the tensor, within the expert; the element of a vector.
    pub row: Option<usize>,
    /// Which of the row's quantized blocks.
    pub super_block: Option<usize>,
}

/// What a value's column says about the weights behind it. `token` is the input at the position, `ids` the experts chosen there.
pub fn spot(file: &ModelFile, h: &Hparams, place: Place, column: usize, token: u32, ids: &[u32]) -> Spot {
    use Stage::*;
    let blk = |part: &str| place.layer().map(|il| format!("blk.{il}.{part}"));
    let of = |tensor: Option<String>, row: usize| Spot {
        tensor: tensor.filter(|name| file.gguf.tensor(name).is_some()),
        row: Some(row),
        ..Spot::default()
    };
    let of_qkv = |kind: &str| {
        let parts = [("q", h.heads.q()), ("k", h.heads.k()), ("v", h.heads.v())];
        let found = parts.into_iter().find(|(_, cols)| cols.contains(&column));
        found.map_or(Spot::default(), |(part, cols)| of(blk(&format!("attn_{part}.{kind}")), column - cols.start))
    };
    let of_expert = |part: &str, n_cols: usize| {
        let expert = ids.get(column / n_cols).map(|&id| id as usize);
        Spot { expert, ..of(blk(part), column % n_cols) }
    };
    let n_ff_exp = h.experts.as_ref().map_or(1, |e| e.n_ff_exp);
    match place.stage {
        Embedding => of(Some("token_embd.weight".to_string()), token as usize),
        AttnNorm => of(blk("attn_norm.weight"), column),
        QkvMatmul => of_qkv("weight"),
        QkvBias => of_qkv("bias"),
        QPostRope => of(blk("attn_q_norm.weight"), column % h.heads.head_dim),
        KPostRope => of(blk("attn_k_norm.weight"), column % h.heads.head_dim),
        AttnOut => of(blk("attn_output.weight"), column),
        FfnNorm => of(blk("ffn_norm.weight"), column),
        FfnGate => of(blk("ffn_gate.weight"), column),
        FfnUp => of(blk("ffn_up.weight"), column),
        FfnOut => of(blk("ffn_down.weight"), column),
        MoeRouterLogits => Spot { expert: Some(column), ..of(blk("ffn_gate_inp.weight"), column) },
        MoeRouterIndices | MoeRouter => Spot { expert: ids.get(column).map(|&id| id as usize), ..Spot::default() },
        MoeExpertGate => of_expert("ffn_gate_exps.weight", n_ff_exp),
        MoeExpertUp => of_expert("ffn_up_exps.weight", n_ff_exp),
        MoeExpertSwigl => Spot { tensor: None, ..of_expert("ffn_up_exps.weight", n_ff_exp) },
        MoeExpertOut => of_expert("ffn_down_exps.weight", h.n_embd),
        FinalNorm => of(Some("output_norm.weight".to_string()), column),
        LmHead => of(Some(output_name(file).to_string()), column),
        AttnScores | AttnSoftmax | Attention | PostAttnResidual | FfnSilu | FfnSwigl | MoeFfnOut | PostFfnResidual => {
            Spot::default()
        }
    }
}

fn output_name(file: &ModelFile) -> &'static str {
    if file.gguf.tensor("output.weight").is_some() { "output.weight" } else { "token_embd.weight" }
}

/// The place whose value a tensor is used for first, with the expert's tensors in order of computation.
pub fn place_of(tensor: &str) -> Option<Place> {
    use Stage::*;
    let (layer, part) = match tensor.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) {
        Some((layer, part)) => (layer.parse().ok()?, part),
        None => (0, tensor),
    };
    let stage = match part {
        "token_embd.weight" => Embedding,
        "attn_norm.weight" => AttnNorm,
        "attn_q.weight" | "attn_k.weight" | "attn_v.weight" => QkvMatmul,
        "attn_q.bias" | "attn_k.bias" | "attn_v.bias" => QkvBias,
        "attn_q_norm.weight" | "rope_freqs.weight" => QPostRope,
        "attn_k_norm.weight" => KPostRope,
        "attn_output.weight" => AttnOut,
        "ffn_norm.weight" => FfnNorm,
        "ffn_gate.weight" => FfnGate,
        "ffn_up.weight" => FfnUp,
        "ffn_down.weight" => FfnOut,
        "ffn_gate_inp.weight" => MoeRouterLogits,
        "ffn_gate_exps.weight" => MoeExpertGate,
        "ffn_up_exps.weight" => MoeExpertUp,
        "ffn_down_exps.weight" => MoeExpertOut,
        "output_norm.weight" => FinalNorm,
        "output.weight" => LmHead,
        _ => return None,
    };
    Some(Place::new(layer, stage))
}

/// Where two files' weights behind a place differ: first at the spot that the value names, else anywhere in the tensors of the place,
/// in the named expert first.
pub fn differing_spot(a: &ModelFile, b: &ModelFile, place: Place, named: &Spot) -> Option<Spot> {
    if let (Some(tensor), Some(row)) = (&named.tensor, named.row)
        && let (Some(a), Some(b)) = (weight(a, tensor), weight(b, tensor))
        && let Some(found) = differing_row(&a, &b, named.expert.filter(|_| a.n_mat > 1), row)
    {
        return Some(Spot { expert: named.expert, ..found });
    }
    let tensors =
        a.gguf.tensors.iter().filter(|t| place_of(&t.name) == Some(place) || Some(&t.name) == named.tensor.as_ref());
    let spots = tensors.flat_map(|t| differing_tensor(a, b, &t.name));
    spots.min_by_key(|s| named.expert.is_some() && s.expert != named.expert)
}

/// The first weights that differ between two files, in order of computation: what is not reached by a prompt shows here.
pub fn first_differing(a: &ModelFile, b: &ModelFile) -> Option<(Option<Place>, Spot)> {
    let mut names: Vec<(Option<Place>, &str)> =
        a.gguf.tensors.iter().map(|t| (place_of(&t.name), t.name.as_str())).collect();
    names.sort();
    names
        .into_iter()
        .find_map(|(place, name)| differing_tensor(a, b, name).into_iter().next().map(|spot| (place, spot)))
}

/// The first row that differs in each matrix of a tensor that differs at all.
fn differing_tensor(a: &ModelFile, b: &ModelFile, name: &str) -> Vec<Spot> {
    let (Some(a), Some(b)) = (weight(a, name), weight(b, name)) else { return Vec::new() };
    if a.qtype == b.qtype && a.bytes[..] == b.bytes[..] {
        return Vec::new();
    }
    let expert = |mat: usize| (a.n_mat > 1).then_some(mat);
    let first = |mat: usize| (0..a.n_rows).find_map(|row| differing_row(&a, &b, expert(mat), row));
    (0..a.n_mat).filter_map(first).collect()
}

/// Where a row differs between two files' tensors, by the values it stands for. The row of a vector is all of it.
fn differing_row(a: &WeightData, b: &WeightData, expert: Option<usize>, row: usize) -> Option<Spot> {
    let is_vector = a.n_rows == 1 && a.n_mat == 1;
    let at_row = if is_vector { 0 } else { row };
    let (bytes_a, bytes_b) = (row_bytes(a, expert, at_row)?, row_bytes(b, expert, at_row)?);
    if a.qtype == b.qtype && bytes_a == bytes_b {
        return None;
    }
    let (x, y) = (values(a, bytes_a), values(b, bytes_b));
    let at = x.iter().zip(&y).position(|(x, y)| x.to_bits() != y.to_bits())?;
    let n_block = a.qtype.block_len();
    Some(Spot {
        expert,
        tensor: Some(a.name.clone()),
        row: Some(if is_vector { at } else { row }),
        super_block: (n_block > 1).then(|| at / n_block),
    })
}

/// The bytes of a row, if the tensor has it.
fn row_bytes(data: &WeightData, expert: Option<usize>, row: usize) -> Option<&[u8]> {
    let n = data.row_bytes();
    let at = (expert.unwrap_or(0) * data.n_rows + row) * n;
    data.bytes.get(at..at + n)
}

/// A row as floats.
fn values(data: &WeightData, bytes: &[u8]) -> Vec<f32> {
    let mut out = vec![0.0; data.n_cols];
    qtype::dequantize_row(data.qtype, bytes, &mut out);
    out
}

/// A file's tensor.
pub fn weight(file: &ModelFile, name: &str) -> Option<WeightData> {
    let info: &TensorInfo = file.gguf.tensor(name)?;
    let dim = |i: usize| info.ne.get(i).map_or(1, |&n| n as usize);
    Some(WeightData {
        name: name.to_string(),
        qtype: info.qtype,
        n_cols: dim(0),
        n_rows: dim(1),
        n_mat: dim(2),
        bytes: Bytes::new(
            Arc::clone(&file.parts[info.part]),
            info.offset as usize..(info.offset + info.n_bytes) as usize,
        ),
    })
}
