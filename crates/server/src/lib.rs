//! HTTP over the engine: the only crate that knows wire types.
