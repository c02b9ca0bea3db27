//! How likely the tokens of a prompt were: taken from the steps that compute it, so that nothing is computed twice.
//!
//! Every position of such a prompt reaches the output matrix, [`LOGITS_CHUNK`](crate::generate::LOGITS_CHUNK) of them in a step, and of
//! its logits only the standing of the token that comes next is kept.

use std::ops::Range;

use crate::answer::{Standing, standing};
use crate::generate::{GenerateError, Request};
use crate::sampler::{SamplerError, check_numbers};
use crate::session::Session;

/// A prompt that is being scored.
pub(crate) struct Scoring {
    n_best: usize,
    /// Positions whose logits have been taken in; the token after each has been told.
    n_scored: usize,
}

impl Scoring {
    /// What a request asks for; `None` also where no token follows another.
    pub(crate) fn of(request: &Request) -> Option<Scoring> {
        let n_best = request.n_best_of_prompt.filter(|_| request.prompt.len() > 1)?;
        Some(Scoring { n_best, n_scored: 0 })
    }

    /// Positions of the prompt whose logits are not wanted any more.
    pub(crate) fn n_scored(&self) -> usize {
        self.n_scored
    }

    /// Where tokens of the `prompt` stand in a step's `rows` of logits, which are those of the positions from `at` on. A token is told
    /// once, however often its positions are computed.
    ///
    /// # Errors
    /// Logits that are not numbers.
    pub(crate) fn take(
        &mut self,
        session: &dyn Session,
        prompt: &[u32],
        at: usize,
        rows: Range<usize>,
    ) -> Result<Vec<Standing>, GenerateError> {
        let (mut logits, mut standings) = (Vec::new(), Vec::new());
        for (position, row) in (at..prompt.len() - 1).zip(rows) {
            if position == self.n_scored {
                session.logits(row, &mut logits)?;
                check_numbers(&logits)?;
                if logits.iter().all(|logit| *logit == f32::NEG_INFINITY) {
                    return Err(SamplerError::NothingLeft { vocabulary: logits.len() }.into());
                }
                standings.push(standing(&logits, prompt[position + 1], self.n_best));
                self.n_scored += 1;
            }
        }
        Ok(standings)
    }
}
