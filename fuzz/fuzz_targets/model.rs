//! A whole model from hostile bytes: parsed, hyper-parameters read, weights taken to the reference backend. Refusing is fine, panicking
//! is not.
//!
//! Run with `cargo +nightly fuzz run model`; the files in `fixtures/arch` make a good corpus.
#![no_main]

use std::sync::Arc;

use apr_core::backend::reference::Reference;
use apr_core::gguf;
use apr_core::hparams::Hparams;
use apr_core::models;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(parsed) = gguf::parse(bytes) else { return };
    let Ok(hparams) = Hparams::from_gguf(&parsed) else { return };
    let _ = models::load(&Reference, &parsed, &hparams, &[Arc::new(bytes.to_vec())]);
});
