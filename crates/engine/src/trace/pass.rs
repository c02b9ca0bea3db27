//! Tokens through a session while someone looks on: the steps that answering takes too, with logits for the positions of interest.

use std::ops::Range;

use apr_core::backend::fed::Feed;
use apr_core::probe::Watch;

use crate::generate::PREFILL_CHUNK;
use crate::session::{Logits, Look, Part, Sequence, Session, StepError};

/// How a pass is looked at: see [`Look`], which this makes one of for every step.
pub struct PassLook<'a> {
    pub watch: &'a mut dyn Watch,
    pub unfused: bool,
    pub feed: Option<&'a mut dyn Feed>,
}

/// Called after a step with the positions whose logits the session then holds.
pub type AfterStep<'a> = dyn FnMut(&dyn Session, &[u32]) -> Result<(), StepError> + 'a;

/// Feeds tokens to a sequence, after those it has. Rows of `positions` (absolute, ascending) reach the output; others are dropped after
/// the last layer's attention.
///
/// # Errors
/// What a step refuses.
pub fn run(
    session: &mut dyn Session,
    sequence: &mut Sequence,
    tokens: &[u32],
    positions: &[u32],
    mut look: PassLook<'_>,
    after: &mut AfterStep<'_>,
) -> Result<(), StepError> {
    let first = sequence.n_tokens();
    for (chunk, wanted) in chunks(first..first + tokens.len(), positions) {
        let logits = if wanted { Logits::All } else { Logits::None };
        let part = Part { sequence: &mut *sequence, tokens: &tokens[chunk.start - first..chunk.end - first], logits };
        let feed = look.feed.as_mut().map(|feed| &mut **feed as &mut dyn Feed);
        session.step_watched(&mut [part], Look { watch: &mut *look.watch, unfused: look.unfused, feed })?;
        let kept: Vec<u32> = if wanted { chunk.map(|p| p as u32).collect() } else { Vec::new() };
        after(&*session, &kept)?;
    }
    Ok(())
}

/// Cuts positions into steps: at most [`PREFILL_CHUNK`] long, and all or none of a step's rows among `wanted`.
fn chunks(all: Range<usize>, wanted: &[u32]) -> Vec<(Range<usize>, bool)> {
    let mut out: Vec<(Range<usize>, bool)> = Vec::new();
    for p in all {
        let is_wanted = wanted.binary_search(&(p as u32)).is_ok();
        match out.last_mut() {
            Some((last, same)) if *same == is_wanted && last.len() < PREFILL_CHUNK => last.end = p + 1,
            _ => out.push((p..p + 1, is_wanted)),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_cut_where_wanted_rows_begin_and_end() {
        assert_eq!(chunks(0..3, &[2]), [(0..2, false), (2..3, true)]);
        assert_eq!(chunks(5..9, &[0, 1, 5, 6]), [(5..7, true), (7..9, false)]);
        assert_eq!(chunks(0..2054, &[]), [(0..1024, false), (1024..2048, false), (2048..2054, false)]);
        assert_eq!(chunks(3..3, &[3]), []);
    }
}
