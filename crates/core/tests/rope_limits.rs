//! Rotations that cannot be computed are refused at load, not met as NaN logits.

use std::sync::Arc;

use apr_core::backend::reference::Reference;
use apr_core::gguf;
use apr_core::hparams::Hparams;
use apr_core::models;

#[test]
fn a_frequency_factor_of_zero_is_refused() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/arch/llama3-ropefreqs.gguf");
    let mut bytes = std::fs::read(path).unwrap();
    let gguf = gguf::parse(&bytes).unwrap();
    let factors = gguf.tensor("rope_freqs.weight").unwrap();
    bytes[factors.offset as usize..][..factors.n_bytes as usize].fill(0);
    let h = Hparams::from_gguf(&gguf).unwrap();
    assert!(models::load(&Reference, &gguf, &h, &[Arc::new(bytes)]).is_err(), "angles are divided by zero");
}
