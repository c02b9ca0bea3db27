//! The stages of a forward pass: the one list of names that users, probes and goldens share.

/// A value of the forward pass that can be looked at. In order of computation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Stage {
    Embedding,
    AttnNorm,
    QkvMatmul,
    QkvBias,
    QPostRope,
    KPostRope,
    AttnScores,
    AttnSoftmax,
    Attention,
    AttnOut,
    PostAttnResidual,
    FfnNorm,
    FfnGate,
    FfnUp,
    FfnSilu,
    FfnSwigl,
    FfnOut,
    MoeRouterLogits,
    MoeRouter,
    MoeRouterIndices,
    MoeExpertGate,
    MoeExpertUp,
    MoeExpertSwigl,
    MoeExpertOut,
    MoeFfnOut,
    PostFfnResidual,
    FinalNorm,
    LmHead,
}

/// Stage, its name, the names llama.cpp and Hugging Face give the same value.
const TABLE: [(Stage, &str, &[&str]); 28] = [
    (Stage::Embedding, "embedding", &["inp_embd", "embed_tokens"]),
    (Stage::AttnNorm, "attn_norm", &["input_layernorm"]),
    (Stage::QkvMatmul, "qkv_matmul", &["qkv"]),
    (Stage::QkvBias, "qkv_bias", &[]),
    (Stage::QPostRope, "q_post_rope", &["qcur"]),
    (Stage::KPostRope, "k_post_rope", &["kcur"]),
    (Stage::AttnScores, "attn_scores", &["kq"]),
    (Stage::AttnSoftmax, "attn_softmax", &["kq_soft_max"]),
    (Stage::Attention, "attention", &["kqv_out"]),
    (Stage::AttnOut, "attn_out", &["o_proj", "self_attn.o_proj"]),
    (Stage::PostAttnResidual, "post_attn_residual", &["ffn_inp"]),
    (Stage::FfnNorm, "ffn_norm", &["post_attention_layernorm"]),
    (Stage::FfnGate, "ffn_gate", &["gate_proj", "mlp.gate_proj"]),
    (Stage::FfnUp, "ffn_up", &["up_proj", "mlp.up_proj"]),
    (Stage::FfnSilu, "ffn_silu", &["act_fn", "mlp.act_fn"]),
    (Stage::FfnSwigl, "ffn_swigl", &["ffn_gate_par", "ffn_swiglu"]),
    (Stage::FfnOut, "ffn_out", &["down_proj", "mlp.down_proj"]),
    (Stage::MoeRouterLogits, "moe_router_logits", &["ffn_moe_logits", "mlp.gate"]),
    (Stage::MoeRouter, "moe_router", &["ffn_moe_weights", "ffn_moe_weights_norm"]),
    (Stage::MoeRouterIndices, "moe_router_indices", &["ffn_moe_topk"]),
    (Stage::MoeExpertGate, "moe_expert_gate", &["ffn_moe_gate"]),
    (Stage::MoeExpertUp, "moe_expert_up", &["ffn_moe_up"]),
    (Stage::MoeExpertSwigl, "moe_expert_swigl", &["ffn_moe_swiglu", "ffn_moe_gate_par"]),
    (Stage::MoeExpertOut, "moe_expert_out", &["ffn_moe_down"]),
    (Stage::MoeFfnOut, "moe_ffn_out", &["ffn_moe_out", "mlp.experts"]),
    (Stage::PostFfnResidual, "post_ffn_residual", &["l_out", "layer_output"]),
    (Stage::FinalNorm, "final_norm", &["result_norm", "norm"]),
    (Stage::LmHead, "lm_head", &["result_output", "logits"]),
];

impl Stage {
    /// Every stage, in order of computation.
    pub fn all() -> impl Iterator<Item = Stage> {
        TABLE.iter().map(|row| row.0)
    }

    /// The name a user types.
    pub fn name(self) -> &'static str {
        TABLE[self as usize].1
    }

    /// Reads a name or an alias, in any case, blanks around it ignored.
    ///
    /// # Errors
    /// Lists every valid name.
    pub fn parse(name: &str) -> Result<Stage, UnknownStage> {
        let wanted = name.trim().to_ascii_lowercase();
        let found = TABLE.iter().find(|row| row.1 == wanted || row.2.contains(&wanted.as_str()));
        found.map(|row| row.0).ok_or_else(|| UnknownStage { name: name.trim().to_string() })
    }

    /// True for the stages that exist once per model, not once per layer.
    pub fn is_global(self) -> bool {
        matches!(self, Stage::Embedding | Stage::FinalNorm | Stage::LmHead)
    }

    /// The tensor name in a saved trace: `blk.3.attn_norm`, or the bare name of a global stage.
    pub fn tensor_name(self, layer: usize) -> String {
        if self.is_global() { self.name().to_string() } else { format!("blk.{layer}.{}", self.name()) }
    }
}

/// Where in a pass a value is computed: a stage, and its layer unless it is one of those that exist once. Ordered as computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Place {
    /// 0 for what comes before the layers, `usize::MAX` for what comes after them.
    order: usize,
    pub stage: Stage,
}

impl Place {
    /// The place of a stage. The layer of a global stage does not matter.
    pub fn new(layer: usize, stage: Stage) -> Place {
        let order = match stage {
            Stage::Embedding => 0,
            Stage::FinalNorm | Stage::LmHead => usize::MAX,
            _ => layer,
        };
        Place { order, stage }
    }

    /// The layer, where the stage has one.
    pub fn layer(self) -> Option<usize> {
        (!self.stage.is_global()).then_some(self.order)
    }

    /// Reads the name of a tensor in a saved trace.
    pub fn parse(tensor_name: &str) -> Option<Place> {
        let place = match tensor_name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) {
            Some((layer, stage)) => Place::new(layer.parse().ok()?, Stage::parse(stage).ok()?),
            None => Place::new(0, Stage::parse(tensor_name).ok()?),
        };
        (place.to_string() == tensor_name).then_some(place)
    }
}

impl std::fmt::Display for Place {
    /// As [`Stage::tensor_name`].
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.stage.tensor_name(self.order))
    }
}

/// A stage name that does not exist.
#[derive(Debug, thiserror::Error)]
#[error("unknown stage '{name}'; the stages are: {}", Stage::all().map(Stage::name).collect::<Vec<_>>().join(", "))]
pub struct UnknownStage {
    name: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_aliases_lead_back_to_their_stage() {
        for (i, row) in TABLE.iter().enumerate() {
            assert_eq!(row.0 as usize, i, "the table is in the order of the enum");
            for name in row.2.iter().chain([&row.1]) {
                assert_eq!(Stage::parse(&format!(" {} ", name.to_uppercase())).unwrap(), row.0);
            }
        }
    }

    #[test]
    fn places_are_ordered_as_computed_and_named_as_in_files() {
        let places = [
            Place::new(7, Stage::Embedding),
            Place::new(0, Stage::AttnNorm),
            Place::new(0, Stage::PostFfnResidual),
            Place::new(1, Stage::AttnNorm),
            Place::new(1, Stage::FinalNorm),
            Place::new(0, Stage::LmHead),
        ];
        assert!(places.is_sorted());
        for place in places {
            assert_eq!(Place::parse(&place.to_string()), Some(place));
        }
        for bad in ["blk.attn_norm", "blk.x.attn_norm", "blk.1.embedding", "attn_norm", "tokens", "blk.1.attn_nrm"] {
            assert_eq!(Place::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn an_unknown_name_lists_the_valid_ones() {
        let message = Stage::parse("moe_routr").unwrap_err().to_string();
        assert!(message.contains("moe_routr") && message.contains("moe_router_indices"), "{message}");
    }
}
