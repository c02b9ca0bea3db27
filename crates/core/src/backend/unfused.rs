//! Runs every op of a backend but never its fused overrides: the plain computation, without a second forward.

use super::Backend;
use super::decorator::delegate;

/// `B` with the default bodies of the fusable ops.
pub struct Unfused<B>(pub B);

impl<B: Backend> Backend for Unfused<B> {
    delegate!();
}
