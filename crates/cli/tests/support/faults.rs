//! Faults to plant in model files, and where each must be found: the table that holds `apr diff`.
//!
//! An edit changes a fixture that was taken apart ([`Model`]); its [`Fault`] says at which stage, layer, expert, tensor, row and
//! block that shows first, and where else.

#![allow(dead_code)] // Each test binary uses a part of it.

use std::ops::Range;

use apr_core::gguf::Value;
use apr_core::qtype::GgmlType;

use crate::edit::*;
use crate::model::Model;

/// Where a fault lies and shows.
#[derive(Clone, Debug)]
pub struct Place {
    pub stage: &'static str,
    /// `None` at the stages that exist once per model.
    pub layer: Option<usize>,
    /// The tensor that holds the fault; `None` where metadata does.
    pub tensor: Option<String>,
    /// The experts any of which may be named; empty outside the experts.
    pub experts: Vec<usize>,
    /// Rows that differ, within the tensor or its expert's matrix; `None` where most do. Elements of a vector count as rows.
    pub rows: Option<Range<usize>>,
    /// Blocks of the row that differ, in the tensor's own block length.
    pub blocks: Option<Range<usize>>,
}

/// An edit of a fixture and what must be found in it.
pub struct Fault {
    pub name: &'static str,
    /// Below `fixtures/`.
    pub fixture: &'static str,
    pub tokens: Vec<u32>,
    pub edit: fn(&mut Model),
    pub first: Place,
    /// The other places where a stage differs although its inputs are the good model's.
    pub others: Vec<Place>,
    /// Metadata keys that differ.
    pub keys: Vec<&'static str>,
    /// The first position that differs, where the table says it.
    pub position: Option<usize>,
    /// False for faults that no token of the prompt meets.
    pub reached: bool,
    /// True where the first stage's shape differs.
    pub reshaped: bool,
}

pub const TINY: &str = "tiny-qwen3moe.gguf";

/// Twenty-four tokens, which meet every expert of every layer of the tiny model. Token 113 is at position 2.
pub fn many() -> Vec<u32> {
    (0..24).map(|i| (7 + 53 * i) % 2048).collect()
}

/// Twelve tokens of a vocabulary of 272. Token 43 is at position 2.
fn few() -> Vec<u32> {
    (0..12).map(|i| (5 + 19 * i) % 272).collect()
}

/// A stage that differs because of `tensor`, in its layer; of metadata, where `tensor` is empty.
fn place(stage: &'static str, tensor: &str) -> Place {
    let layer = tensor.strip_prefix("blk.").map(|rest| rest.split('.').next().unwrap_or_default());
    Place {
        stage,
        layer: layer.map(|l| l.parse().expect("blk. is followed by a number")),
        tensor: (!tensor.is_empty()).then(|| tensor.to_string()),
        experts: Vec::new(),
        rows: None,
        blocks: None,
    }
}

/// A fault of the tiny model that shows first at `stage`, in whose layer `tensor` lies.
fn tiny(name: &'static str, stage: &'static str, tensor: &str, edit: fn(&mut Model)) -> Fault {
    Fault {
        name,
        fixture: TINY,
        tokens: many(),
        edit,
        first: place(stage, tensor),
        others: Vec::new(),
        keys: Vec::new(),
        position: None,
        reached: true,
        reshaped: false,
    }
}

/// A fault of one of the small fixtures.
fn small(fixture: &'static str, name: &'static str, stage: &'static str, tensor: &str, edit: fn(&mut Model)) -> Fault {
    Fault { fixture, tokens: few(), ..tiny(name, stage, tensor, edit) }
}

impl Fault {
    fn experts(mut self, experts: &[usize]) -> Fault {
        self.first.experts = experts.to_vec();
        self
    }

    fn row(self, row: usize) -> Fault {
        self.rows(row..row + 1)
    }

    fn rows(mut self, rows: Range<usize>) -> Fault {
        self.first.rows = Some(rows);
        self
    }

    fn block(mut self, block: usize) -> Fault {
        self.first.blocks = Some(block..block + 1);
        self
    }

    fn position(mut self, position: usize) -> Fault {
        self.position = Some(position);
        self
    }

    /// Shows here too, in the same experts where the tensor has experts.
    fn also(mut self, stage: &'static str, tensor: &str) -> Fault {
        let experts = if tensor.contains("_exps.") { self.first.experts.clone() } else { Vec::new() };
        self.others.push(Place { experts, ..place(stage, tensor) });
        self
    }

    /// Shows in this layer, which the tensor's name does not say.
    fn in_layer(mut self, layer: usize) -> Fault {
        self.first.layer = Some(layer);
        self
    }

    /// No tensor is at fault but this key, which shows first in layer 0.
    fn key(mut self, key: &'static str) -> Fault {
        self.keys.push(key);
        self.in_layer(0)
    }

    /// Shows at these stages of `layers` too.
    fn also_in(mut self, stages: &[&'static str], layers: Range<usize>) -> Fault {
        for layer in layers {
            for &stage in stages {
                let place = Place { stage, layer: Some(layer), ..self.first.clone() };
                if (place.stage, place.layer) != (self.first.stage, self.first.layer) {
                    self.others.push(place);
                }
            }
        }
        self
    }

    fn unreached(mut self, tokens: &[u32]) -> Fault {
        self.tokens = tokens.to_vec();
        self.reached = false;
        self
    }

    fn reshaped(mut self) -> Fault {
        self.reshaped = true;
        self
    }
}

/// The whole table, in groups.
pub fn all() -> Vec<Fault> {
    let groups = [projections(), norms(), routers(), experts(), ends(), types(), metadata(), dense(), several()];
    groups.into_iter().flatten().chain(unreached()).collect()
}

/// Weights of attention.
pub fn projections() -> Vec<Fault> {
    vec![
        tiny("a scale of attn_q zeroed", "qkv_matmul", "blk.1.attn_q.weight", |m| {
            set_scale(m, "blk.1.attn_q.weight", 0, 300, 0, ZERO)
        })
        .row(300)
        .block(0),
        tiny("a scale of attn_q NaN", "qkv_matmul", "blk.0.attn_q.weight", |m| {
            set_scale(m, "blk.0.attn_q.weight", 0, 17, 0, NAN)
        })
        .row(17)
        .block(0)
        .position(0),
        tiny("halves of every byte of attn_q exchanged", "qkv_matmul", "blk.3.attn_q.weight", |m| {
            exchange_nibbles(m, "blk.3.attn_q.weight")
        }),
        tiny("K rows of two heads exchanged", "qkv_matmul", "blk.2.attn_k.weight", |m| {
            swap_rows(m, "blk.2.attn_k.weight", 3, 128 + 3)
        })
        .rows(3..132),
        tiny("all K rows of two heads exchanged", "qkv_matmul", "blk.1.attn_k.weight", |m| {
            (0..128).for_each(|i| swap_rows(m, "blk.1.attn_k.weight", i, 128 + i))
        }),
        tiny("V of the first KV head shifted by one row", "qkv_matmul", "blk.1.attn_v.weight", |m| {
            rotate_rows(m, "blk.1.attn_v.weight", 0..128)
        })
        .rows(0..128),
        tiny("V of the second KV head shifted by one row, Q6_K", "qkv_matmul", "blk.3.attn_v.weight", |m| {
            rotate_rows(m, "blk.3.attn_v.weight", 128..256)
        })
        .rows(128..256),
        tiny("a scale of attn_v zeroed, Q6_K", "qkv_matmul", "blk.2.attn_v.weight", |m| {
            set_scale(m, "blk.2.attn_v.weight", 0, 200, 0, ZERO)
        })
        .row(200)
        .block(0),
        tiny("a block of attn_output of the other sign", "attn_out", "blk.1.attn_output.weight", |m| {
            scale(m, "blk.1.attn_output.weight", 0, 77..78, Some(1), -1.0)
        })
        .row(77)
        .block(1),
        tiny("a scale of attn_output Inf", "attn_out", "blk.3.attn_output.weight", |m| {
            set_scale(m, "blk.3.attn_output.weight", 0, 255, 0, INFINITY)
        })
        .row(255)
        .block(0),
        tiny("attn_output of two layers exchanged", "attn_out", "blk.1.attn_output.weight", |m| {
            swap_tensors(m, "blk.1.attn_output.weight", "blk.2.attn_output.weight")
        })
        .also("attn_out", "blk.2.attn_output.weight"),
    ]
}

/// Norms of the residual, of queries and of keys.
pub fn norms() -> Vec<Fault> {
    vec![
        tiny("Q norm dropped", "q_post_rope", "blk.1.attn_q_norm.weight", |m| {
            elements(m, "blk.1.attn_q_norm.weight", |_, _| 1.0)
        }),
        tiny("Q norm scaled", "q_post_rope", "blk.3.attn_q_norm.weight", |m| {
            elements(m, "blk.3.attn_q_norm.weight", |_, v| v * 1.5)
        }),
        tiny("one element of Q norm negated", "q_post_rope", "blk.0.attn_q_norm.weight", |m| {
            elements(m, "blk.0.attn_q_norm.weight", |i, v| if i == 70 { -v } else { v })
        })
        .row(70)
        .position(0),
        tiny("K norm dropped", "k_post_rope", "blk.0.attn_k_norm.weight", |m| {
            elements(m, "blk.0.attn_k_norm.weight", |_, _| 1.0)
        }),
        tiny("K norm scaled", "k_post_rope", "blk.2.attn_k_norm.weight", |m| {
            elements(m, "blk.2.attn_k_norm.weight", |_, v| v * 0.9)
        }),
        tiny("one element of attn_norm NaN", "attn_norm", "blk.2.attn_norm.weight", |m| {
            elements(m, "blk.2.attn_norm.weight", |i, v| if i == 99 { f32::NAN } else { v })
        })
        .row(99)
        .position(0),
        tiny("one element of ffn_norm doubled", "ffn_norm", "blk.1.ffn_norm.weight", |m| {
            elements(m, "blk.1.ffn_norm.weight", |i, v| if i == 255 { v * 2.0 } else { v })
        })
        .row(255)
        .position(0),
        tiny("final norm scaled", "final_norm", "output_norm.weight", |m| {
            elements(m, "output_norm.weight", |_, v| v * 1.1)
        }),
        tiny("one element of the final norm zeroed", "final_norm", "output_norm.weight", |m| {
            elements(m, "output_norm.weight", |i, v| if i == 128 { 0.0 } else { v })
        })
        .row(128),
    ]
}

/// Routers.
pub fn routers() -> Vec<Fault> {
    let stage = "moe_router_logits";
    vec![
        tiny("a router row negated", stage, "blk.2.ffn_gate_inp.weight", |m| {
            scale(m, "blk.2.ffn_gate_inp.weight", 0, 5..6, None, -1.0)
        })
        .row(5)
        .position(0),
        tiny("a router row zeroed", stage, "blk.0.ffn_gate_inp.weight", |m| {
            scale(m, "blk.0.ffn_gate_inp.weight", 0, 0..1, None, 0.0)
        })
        .row(0),
        tiny("two router rows exchanged", stage, "blk.3.ffn_gate_inp.weight", |m| {
            swap_rows(m, "blk.3.ffn_gate_inp.weight", 1, 6)
        })
        .rows(1..7),
        tiny("a router row slightly longer", stage, "blk.1.ffn_gate_inp.weight", |m| {
            scale(m, "blk.1.ffn_gate_inp.weight", 0, 7..8, None, 1.001)
        })
        .row(7),
        small(ODD, "a router row negated, 12 experts", stage, "blk.0.ffn_gate_inp.weight", |m| {
            scale(m, "blk.0.ffn_gate_inp.weight", 0, 11..12, None, -1.0)
        })
        .row(11),
    ]
}

/// Experts that the tokens meet.
pub fn experts() -> Vec<Fault> {
    let (gate, up, out) = ("moe_expert_gate", "moe_expert_up", "moe_expert_out");
    vec![
        tiny("two experts exchanged", gate, "blk.1.ffn_gate_exps.weight", |m| {
            ["gate", "up", "down"]
                .iter()
                .for_each(|part| swap_experts(m, &format!("blk.1.ffn_{part}_exps.weight"), 2, 5))
        })
        .experts(&[2, 5])
        .also(up, "blk.1.ffn_up_exps.weight")
        .also(out, "blk.1.ffn_down_exps.weight"),
        tiny("down projections of two experts exchanged", out, "blk.3.ffn_down_exps.weight", |m| {
            swap_experts(m, "blk.3.ffn_down_exps.weight", 0, 7)
        })
        .experts(&[0, 7]),
        tiny("an expert's down projection x 1.02", out, "blk.0.ffn_down_exps.weight", |m| {
            scale(m, "blk.0.ffn_down_exps.weight", 6, 0..256, None, 1.02)
        })
        .experts(&[6]),
        tiny("an expert's down projection x 1.02, Q6_K", out, "blk.2.ffn_down_exps.weight", |m| {
            scale(m, "blk.2.ffn_down_exps.weight", 1, 0..256, None, 1.02)
        })
        .experts(&[1]),
        tiny("an expert's gate x 1.05", gate, "blk.3.ffn_gate_exps.weight", |m| {
            scale(m, "blk.3.ffn_gate_exps.weight", 4, 0..256, None, 1.05)
        })
        .experts(&[4]),
        tiny("a row of an expert's up zeroed", up, "blk.2.ffn_up_exps.weight", |m| {
            scale(m, "blk.2.ffn_up_exps.weight", 3, 200..201, None, 0.0)
        })
        .experts(&[3])
        .row(200)
        .block(0),
        tiny("a scale of an expert's down NaN", out, "blk.1.ffn_down_exps.weight", |m| {
            set_scale(m, "blk.1.ffn_down_exps.weight", 7, 31, 0, NAN)
        })
        .experts(&[7])
        .row(31)
        .block(0),
        tiny("a scale of an expert's down NaN, Q6_K", out, "blk.3.ffn_down_exps.weight", |m| {
            set_scale(m, "blk.3.ffn_down_exps.weight", 2, 0, 0, NAN)
        })
        .experts(&[2])
        .row(0)
        .block(0),
        tiny("a scale of an expert's gate zeroed", gate, "blk.0.ffn_gate_exps.weight", |m| {
            set_scale(m, "blk.0.ffn_gate_exps.weight", 0, 255, 0, ZERO)
        })
        .experts(&[0])
        .row(255)
        .block(0),
        tiny("an expert's down shifted by one row", out, "blk.1.ffn_down_exps.weight", |m| {
            rotate_rows(m, "blk.1.ffn_down_exps.weight", 4 * 256..5 * 256)
        })
        .experts(&[4]),
        small(ODD, "a block of an expert's gate of the other sign", gate, "blk.0.ffn_gate_exps.weight", |m| {
            scale(m, "blk.0.ffn_gate_exps.weight", 3, 9..10, Some(1), -1.0)
        })
        .experts(&[3])
        .row(9)
        .block(1),
    ]
}

/// The embedding and the LM head.
pub fn ends() -> Vec<Fault> {
    vec![
        tiny("an embedding row x 1.1", "embedding", "token_embd.weight", |m| {
            scale(m, "token_embd.weight", 0, 113..114, None, 1.1)
        })
        .row(113)
        .block(0)
        .position(2),
        tiny("a scale of an embedding NaN", "embedding", "token_embd.weight", |m| {
            set_scale(m, "token_embd.weight", 0, 7, 0, NAN)
        })
        .row(7)
        .block(0)
        .position(0),
        tiny("an LM head row negated", "lm_head", "output.weight", |m| {
            scale(m, "output.weight", 0, 1999..2000, None, -1.0)
        })
        .row(1999)
        .block(0)
        .position(0),
        tiny("a scale of the LM head NaN", "lm_head", "output.weight", |m| set_scale(m, "output.weight", 0, 0, 0, NAN))
            .row(0)
            .block(0),
        tiny("two LM head rows exchanged", "lm_head", "output.weight", |m| swap_rows(m, "output.weight", 10, 2047))
            .rows(10..2048),
    ]
}

/// Tensors stored as another type.
pub fn types() -> Vec<Fault> {
    vec![
        tiny("Q6_K bytes of attn_v declared Q4_K", "qkv_matmul", "blk.2.attn_v.weight", |m| {
            declare(m, "blk.2.attn_v.weight", GgmlType::Q4_K)
        }),
        tiny("Q6_K bytes of the experts' down declared Q4_K", "moe_expert_out", "blk.3.ffn_down_exps.weight", |m| {
            declare(m, "blk.3.ffn_down_exps.weight", GgmlType::Q4_K)
        })
        .experts(&[0, 1, 2, 3, 4, 5, 6, 7]),
        tiny("Q6_K bytes of the LM head cut to Q4_K", "lm_head", "output.weight", |m| {
            declare(m, "output.weight", GgmlType::Q4_K);
            cut(m, "output.weight");
        }),
        tiny("attn_k stored as Q8_0", "qkv_matmul", "blk.1.attn_k.weight", |m| {
            store(m, "blk.1.attn_k.weight", GgmlType::Q8_0)
        }),
        tiny("attn_output stored as Q5_0", "attn_out", "blk.0.attn_output.weight", |m| {
            store(m, "blk.0.attn_output.weight", GgmlType::Q5_0)
        }),
        tiny("router stored as BF16", "moe_router_logits", "blk.2.ffn_gate_inp.weight", |m| {
            store(m, "blk.2.ffn_gate_inp.weight", GgmlType::BF16)
        }),
    ]
}

/// Metadata that changes the computation.
pub fn metadata() -> Vec<Fault> {
    let (q, k) = ("q_post_rope", "k_post_rope");
    vec![
        tiny("RoPE base x 10", q, "", |m| put(m, "qwen3moe.rope.freq_base", Value::F32(1e7)))
            .key("qwen3moe.rope.freq_base")
            .position(1)
            .also_in(&[q, k], 0..4),
        tiny("epsilon x 1000", "attn_norm", "", |m| {
            put(m, "qwen3moe.attention.layer_norm_rms_epsilon", Value::F32(1e-3))
        })
        .key("qwen3moe.attention.layer_norm_rms_epsilon")
        .also_in(&["attn_norm", q, k, "ffn_norm"], 0..4)
        .also("final_norm", ""),
        tiny("three experts per token", "moe_router", "", |m| put(m, "qwen3moe.expert_used_count", Value::U32(3)))
            .key("qwen3moe.expert_used_count")
            .reshaped(),
        small(LLAMA, "RoPE base given where the default holds", q, "", |m| {
            put(m, "llama.rope.freq_base", Value::F32(5e5))
        })
        .key("llama.rope.freq_base")
        .also_in(&[q, k], 0..2),
        small(LINEAR, "linear RoPE scaling doubled", q, "", |m| put(m, "llama.rope.scaling.factor", Value::F32(4.0)))
            .key("llama.rope.scaling.factor")
            .also_in(&[q, k], 0..1),
        small(YARN, "YaRN scaling halved", q, "", |m| put(m, "qwen3.rope.scaling.factor", Value::F32(2.0)))
            .key("qwen3.rope.scaling.factor")
            .also_in(&[q, k], 0..1),
        small(QWEN2, "twice the heads of half the size", q, "", |m| {
            put(m, "qwen2.attention.head_count", Value::U32(4));
            put(m, "qwen2.attention.head_count_kv", Value::U32(2));
        })
        .key("qwen2.attention.head_count")
        .key("qwen2.attention.head_count_kv")
        .also_in(&[q, k, "attention"], 0..1),
    ]
}

/// Dense models.
pub fn dense() -> Vec<Fault> {
    vec![
        small(QWEN3, "a row of ffn_gate zeroed", "ffn_gate", "blk.1.ffn_gate.weight", |m| {
            scale(m, "blk.1.ffn_gate.weight", 0, 95..96, None, 0.0)
        })
        .row(95)
        .block(0),
        small(QWEN3, "a row of ffn_up x 1.01", "ffn_up", "blk.0.ffn_up.weight", |m| {
            scale(m, "blk.0.ffn_up.weight", 0, 40..41, None, 1.01)
        })
        .row(40)
        .block(0),
        small(QWEN3, "a block of ffn_down of the other sign", "ffn_out", "blk.0.ffn_down.weight", |m| {
            scale(m, "blk.0.ffn_down.weight", 0, 20..21, Some(2), -1.0)
        })
        .row(20)
        .block(2),
        small(QWEN3, "Q norm of a dense model dropped", "q_post_rope", "blk.1.attn_q_norm.weight", |m| {
            elements(m, "blk.1.attn_q_norm.weight", |_, _| 1.0)
        }),
        small(QWEN3, "a narrower feed-forward", "ffn_gate", "blk.0.ffn_gate.weight", narrow)
            .key("qwen3.feed_forward_length")
            .reshaped()
            .also("ffn_up", "blk.0.ffn_up.weight")
            .also("ffn_out", "blk.0.ffn_down.weight")
            .also("ffn_gate", "blk.1.ffn_gate.weight")
            .also("ffn_up", "blk.1.ffn_up.weight")
            .also("ffn_out", "blk.1.ffn_down.weight"),
        small(QWEN2, "an element of K bias x 2", "qkv_bias", "blk.0.attn_k.bias", |m| {
            elements(m, "blk.0.attn_k.bias", |i, v| if i == 30 { v * 2.0 } else { v })
        })
        .row(30)
        .position(0),
        small(QWEN2, "Q bias dropped", "qkv_bias", "blk.0.attn_q.bias", |m| {
            elements(m, "blk.0.attn_q.bias", |_, _| 0.0)
        }),
        small(QWEN2, "a scale of attn_v zeroed", "qkv_matmul", "blk.0.attn_v.weight", |m| {
            set_scale(m, "blk.0.attn_v.weight", 0, 8, 1, ZERO)
        })
        .row(8)
        .block(1),
        small(LLAMA, "Q rows in the order of the other rotation", "qkv_matmul", "blk.1.attn_q.weight", |m| {
            halves_together(m, "blk.1.attn_q.weight", 32)
        }),
        small(LLAMA, "a weight of ffn_down zeroed, F32", "ffn_out", "blk.1.ffn_down.weight", |m| {
            scale(m, "blk.1.ffn_down.weight", 0, 31..32, Some(19), 0.0)
        })
        .row(31),
        small(LLAMA, "a row of a tied embedding x 1.1", "embedding", "token_embd.weight", |m| {
            scale(m, "token_embd.weight", 0, 43..44, None, 1.1)
        })
        .row(43)
        .block(0)
        .position(2)
        .also("lm_head", "token_embd.weight"),
        small(LLAMA, "a row of a tied LM head only", "lm_head", "token_embd.weight", |m| {
            scale(m, "token_embd.weight", 0, 271..272, None, -1.0)
        })
        .row(271)
        .block(0),
        small(FREQS, "a RoPE frequency factor x 4", "q_post_rope", "rope_freqs.weight", |m| {
            elements(m, "rope_freqs.weight", |i, v| if i == 2 { v * 4.0 } else { v })
        })
        .in_layer(0)
        .row(2)
        .position(1)
        .also_in(&["k_post_rope"], 0..1),
    ]
}

/// More than one fault in a file: each is found where it is, the first in order of computation first.
pub fn several() -> Vec<Fault> {
    vec![
        tiny("an expert x 1.02 before a dropped Q norm", "moe_expert_out", "blk.1.ffn_down_exps.weight", |m| {
            elements(m, "blk.3.attn_q_norm.weight", |_, _| 1.0);
            scale(m, "blk.1.ffn_down_exps.weight", 3, 0..256, None, 1.02);
        })
        .experts(&[3])
        .also("q_post_rope", "blk.3.attn_q_norm.weight"),
        tiny("NaN in attn_v before a final norm scaled", "qkv_matmul", "blk.0.attn_v.weight", |m| {
            elements(m, "output_norm.weight", |_, v| v * 1.5);
            set_scale(m, "blk.0.attn_v.weight", 0, 60, 0, NAN);
        })
        .row(60)
        .block(0)
        .also("final_norm", "output_norm.weight"),
    ]
}

/// Faults that no token of the prompt meets, which only the weights tell.
pub fn unreached() -> Vec<Fault> {
    vec![
        tiny("an expert's down x 1.02, never met", "moe_expert_out", "blk.2.ffn_down_exps.weight", |m| {
            scale(m, "blk.2.ffn_down_exps.weight", 1, 0..256, None, 1.02)
        })
        .experts(&[1])
        .unreached(&[1, 2, 3]),
        tiny("a scale of an expert's gate NaN, never met", "moe_expert_gate", "blk.0.ffn_gate_exps.weight", |m| {
            set_scale(m, "blk.0.ffn_gate_exps.weight", 6, 12, 0, NAN)
        })
        .experts(&[6])
        .row(12)
        .block(0)
        .unreached(&[1, 2, 3]),
        tiny("an embedding row of no token", "embedding", "token_embd.weight", |m| {
            scale(m, "token_embd.weight", 0, 2000..2001, None, -1.0)
        })
        .row(2000)
        .block(0)
        .unreached(&[1, 2, 3]),
    ]
}

const ODD: &str = "arch/qwen3moe-odd.gguf";
const QWEN3: &str = "arch/qwen3.gguf";
const QWEN2: &str = "arch/qwen2.gguf";
const LLAMA: &str = "arch/llama.gguf";
const FREQS: &str = "arch/llama3-ropefreqs.gguf";
const LINEAR: &str = "arch/llama-linear.gguf";
const YARN: &str = "arch/qwen3-yarn.gguf";
