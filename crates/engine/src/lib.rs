//! A loaded model you can talk to: device choice, KV cache, tokenizer, chat template, sampler, generation.

pub mod chat_template;
pub mod sampler;
pub mod text_stream;
pub mod tokenizer;
