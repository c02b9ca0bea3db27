//! Faults in model files that must be refused when the file is loaded, or break a contract when the model is verified.

#![allow(dead_code)] // Each test binary uses a part of it.

use apr_core::gguf::{Array, Value};

use crate::model::Model;

/// A fault of `fixtures/arch/qwen3moe-odd.gguf`.
pub struct FileFault {
    /// What contracts call it.
    pub name: &'static str,
    pub edit: fn(Model) -> Model,
    pub shows: Shows,
}

/// How a fault must show.
pub enum Shows {
    /// The file is not loaded, and the message has these words.
    Refused(&'static [&'static str]),
    /// This contract is broken first, where it is told at this stage and layer.
    Breaks(&'static str, Option<(&'static str, u64)>),
}

pub const FILE_FAULTS: [FileFault; 6] = [
    FileFault {
        name: "unknown-architecture",
        edit: |m| m.string("general.architecture", "qwen3_5moe"),
        shows: Shows::Refused(&["'qwen3_5moe'", "qwen3moe", "llama"]),
    },
    FileFault {
        name: "missing-tensor",
        edit: |m| m.without_tensor("blk.0.ffn_up_exps.weight"),
        shows: Shows::Refused(&["blk.0.ffn_up_exps.weight", "missing"]),
    },
    FileFault {
        name: "extra-tensor",
        edit: |m| m.with_tensor("blk.0.attn_sinks.weight", &[2]),
        shows: Shows::Refused(&["blk.0.attn_sinks.weight", "not part"]),
    },
    FileFault {
        name: "nan-in-norm",
        edit: |m| m.filled("blk.0.ffn_norm.weight", f32::NAN),
        shows: Shows::Breaks("FALSIFY-FORWARD-004", Some(("ffn_norm", 0))),
    },
    FileFault {
        name: "overflow-in-norm",
        edit: |m| m.filled("blk.0.attn_norm.weight", 3e38),
        shows: Shows::Breaks("FALSIFY-FORWARD-004", Some(("attn_norm", 0))),
    },
    FileFault {
        name: "byte-without-token",
        edit: |m| rename_token(m, "z", "zzzz").u32("tokenizer.ggml.unknown_token_id", 0),
        shows: Shows::Breaks("FALSIFY-TOKENIZER-001", None),
    },
];

fn rename_token(m: Model, from: &str, to: &str) -> Model {
    let key = "tokenizer.ggml.tokens";
    let (_, value) = m.metadata.iter().find(|(k, _)| k == key).expect("the fixture has tokens");
    let Value::Array(Array::String(tokens)) = value else { panic!("tokens are strings") };
    let renamed = tokens.iter().map(|t| if t == from { to.to_string() } else { t.clone() }).collect();
    m.set(key, Value::Array(Array::String(renamed)))
}
