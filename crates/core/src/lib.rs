//! What a model is: the GGUF format, quant types, hyper-parameters, the `Backend` and `Probe` traits and one file
//! per architecture. No threads, no files, no devices.
#![deny(unsafe_code)]

pub mod gguf;
pub mod qtype;
