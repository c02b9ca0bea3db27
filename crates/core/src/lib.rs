//! What a model is: the GGUF format, quant types, hyper-parameters, the `Backend` and `Probe` traits and the architectures.
//! No threads, no files, no devices.
#![deny(unsafe_code)]

pub mod backend;
pub mod batch;
pub mod gguf;
pub mod hparams;
pub mod models;
pub mod probe;
pub mod qtype;
pub mod rope;
pub mod stage;
pub mod stats;
