//! The server over a socket, on the tiny model: formats, faults, and many clients at once.

mod access;
mod anthropic;
mod embeddings;
mod faults;
mod infill;
mod inside;
mod limits;
mod llama;
mod load;
mod metrics;
mod ollama;
mod openai;
mod openapi;
mod page;
mod responses;
mod structured;
mod support;
mod tls;
mod vllm;
