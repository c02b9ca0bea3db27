//! Fuzzes the GGUF reader: no input may panic, and an accepted file has its tensors inside it and apart.
//!
//! Run from the root of the repository, with a nightly toolchain and `cargo install cargo-fuzz`; the real header makes a
//! good first input (its tensor data is not needed, as a truncated file is read up to its tensors):
//!
//! ```text
//! mkdir -p fuzz/corpus/gguf && head -c 61260 fixtures/tiny-qwen3moe.gguf > fuzz/corpus/gguf/tiny
//! cargo +nightly fuzz run gguf -- -max_len=131072 -rss_limit_mb=512 -timeout=5
//! ```
#![no_main]

use apr_core::gguf::{join, parse};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(gguf) = parse(bytes) else { return };
    let mut spans: Vec<(u64, u64)> = gguf.tensors.iter().map(|t| (t.offset, t.offset + t.n_bytes)).collect();
    spans.sort_unstable();
    assert!(spans.iter().all(|s| s.0 % gguf.alignment == 0 && s.0 < s.1 && s.1 <= bytes.len() as u64));
    assert!(spans.windows(2).all(|w| w[0].1 <= w[1].0));
    let _ = join(vec![gguf]);
});
