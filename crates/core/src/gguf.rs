//! Reads GGUF.
