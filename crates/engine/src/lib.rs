//! A loaded model you can talk to: device choice, KV cache, tokenizer, chat template, sampler, generation.
//!
//! [`Engine`] is the loaded model, a [`Sequence`](session::Sequence) is one timeline on it, and
//! [`generate`](generate::generate) is what a user asks for. Backends stay inside: nothing outside this crate names one.

pub mod answer;
pub mod bench;
pub mod chat_template;
pub mod constraint;
pub mod demo;
pub mod device;
pub mod diff;
pub mod draft;
mod embedding;
pub mod generate;
pub mod loading;
pub mod mapping;
pub mod memory;
pub mod model_file;
pub mod offload;
pub mod onlook;
pub mod output_parser;
pub mod plan;
pub mod prefix_cache;
pub mod sampler;
pub mod scheduler;
mod scoring;
pub mod session;
pub mod shadow;
pub mod speculate;
pub mod text_stream;
pub mod threads;
pub mod tokenizer;
pub mod trace;
pub mod verify;

mod cgroup;
mod engine;

pub use apr_core::backend::{BackendError, KV_BLOCK, KvType, Precision};
pub use apr_core::gguf;
pub use apr_core::hparams::Hparams;
pub use apr_core::models;
pub use apr_core::probe;
pub use apr_core::qtype::GgmlType;
pub use apr_core::stage;
pub use apr_core::stats::RowStats;
pub use apr_cpu::kernels::Isa;
pub use engine::{About, Engine, EngineError, EngineOptions, tokenizer_of};
