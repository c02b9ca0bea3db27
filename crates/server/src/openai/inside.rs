//! What answers tell of how they were computed: the experts that each token went to.

use apr_engine::onlook::Experts;
use serde::Serialize;

/// The experts of the position that gave a token.
#[derive(Serialize)]
pub(super) struct TokenExperts {
    /// By layer: ids, the greatest weight first. Empty in a model without experts.
    layers: Vec<Vec<u32>>,
}

impl From<Experts> for TokenExperts {
    fn from(experts: Experts) -> TokenExperts {
        TokenExperts { layers: experts.layers }
    }
}

/// What of each token is told beside its text.
#[derive(Clone, Copy)]
pub(super) struct Shown {
    pub(super) logprobs: bool,
    pub(super) experts: bool,
    /// Its id.
    pub(super) tokens: bool,
}

impl Shown {
    /// Those of a whole answer, where they were asked for.
    pub(super) fn experts(self, of_tokens: Vec<Experts>) -> Option<Vec<TokenExperts>> {
        self.experts.then(|| of_tokens.into_iter().map(TokenExperts::from).collect())
    }
}
