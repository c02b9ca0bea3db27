//! Quant types.
