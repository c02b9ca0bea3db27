//! Multiply-adds of a pass, from the sizes of the model: what its speed is held against the limit of the cores by.

use apr_core::hparams::Hparams;

/// Weights that a token is multiplied with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ActiveWeights {
    /// In every layer: projections, router, and of the experts those that a token uses.
    pub layers: u64,
    /// The part of `layers` that lies in the last layer behind its attention, where only rows that want logits are computed.
    pub last_after_attention: u64,
    /// The output matrix, for rows that want logits.
    pub head: u64,
}

impl ActiveWeights {
    /// Counts a model's; norms and biases are no products and do not count.
    pub fn of(h: &Hparams) -> ActiveWeights {
        let size = |n: usize| n as u64;
        let (n_embd, heads) = (size(h.n_embd), h.heads);
        let attn_width = size(heads.n_head * heads.head_dim);
        let qkv = n_embd * size((heads.n_head + 2 * heads.n_head_kv) * heads.head_dim);
        let ffn = match &h.experts {
            Some(e) => size(e.n_expert) * n_embd + 3 * n_embd * size(e.n_ff_exp) * size(e.n_expert_used),
            None => 3 * n_embd * size(h.n_ff),
        };
        let after_attention = attn_width * n_embd + ffn;
        ActiveWeights {
            layers: size(h.n_layer) * (qkv + after_attention),
            last_after_attention: after_attention,
            head: size(h.n_vocab) * n_embd,
        }
    }
}

/// Multiply-adds of computing `n` tokens from position `from` on, where `n_kept` of them want logits: products with weights, and in
/// attention a query's scores and its weighted values over every position up to its own.
pub fn macs(h: &Hparams, from: usize, n: usize, n_kept: usize) -> u64 {
    let w = ActiveWeights::of(h);
    let (from, n, n_kept) = (from as u64, n as u64, n_kept as u64);
    let attended = n * from + n * (n + 1) / 2;
    let attention = 2 * (h.n_layer * h.heads.n_head * h.heads.head_dim) as u64 * attended;
    n * (w.layers - w.last_after_attention) + n_kept * (w.last_after_attention + w.head) + attention
}

#[cfg(test)]
mod tests {
    use apr_core::backend::Heads;
    use apr_core::hparams::{Architecture, Experts, Hparams};
    use apr_core::rope::{Pairing, Scaling};

    use super::*;

    fn qwen3_30b_a3b() -> Hparams {
        Hparams {
            arch: Architecture::Qwen3Moe,
            n_layer: 48,
            n_embd: 2048,
            n_ff: 0,
            n_vocab: 151_936,
            n_ctx_train: 262_144,
            heads: Heads { n_head: 32, n_head_kv: 4, head_dim: 128 },
            experts: Some(Experts { n_expert: 128, n_expert_used: 8, n_ff_exp: 768 }),
            rms_eps: 1e-6,
            pairing: Pairing::Halves,
            n_rot: 128,
            rope_base: 1e7,
            rope_scaling: Scaling::None,
            notes: Vec::new(),
        }
    }

    #[test]
    fn active_weights_are_those_of_the_published_model() {
        // Counted from the tensors of Qwen3-30B-A3B: 2,730.5 M in its layers, 311.2 M in the output matrix.
        let w = ActiveWeights::of(&qwen3_30b_a3b());
        assert_eq!((w.layers, w.head), (2_730_491_904, 311_164_928));
        let eight = ActiveWeights::of(&Hparams { n_layer: 8, ..qwen3_30b_a3b() });
        assert_eq!(eight.layers, 455_081_984);
        assert_eq!(eight.last_after_attention, 2048 * (4096 + 128 + 3 * 768 * 8));
        let dense = Hparams { experts: None, n_ff: 6144, ..qwen3_30b_a3b() };
        assert_eq!(ActiveWeights::of(&dense).layers, 48 * 2048 * (4096 + 1024 + 4096 + 3 * 6144));
    }

    #[test]
    fn attention_counts_every_position_up_to_a_tokens_own() {
        let h = qwen3_30b_a3b();
        let (w, per_position) = (ActiveWeights::of(&h), 2 * 48 * 32 * 128);
        assert_eq!(macs(&h, 0, 1, 1), w.layers + w.head + per_position);
        assert_eq!(macs(&h, 4096, 1, 1), w.layers + w.head + 4097 * per_position);
        // Four tokens, of which one wants logits: 5 + 6 + 7 + 8 positions.
        let weights = 4 * w.layers - 3 * w.last_after_attention + w.head;
        assert_eq!(macs(&h, 4, 4, 1), weights + 26 * per_position);
        assert_eq!(macs(&h, 4, 4, 1), macs(&h, 4, 3, 0) + macs(&h, 7, 1, 1));
    }
}
