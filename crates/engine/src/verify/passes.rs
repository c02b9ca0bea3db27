//! Ways to run the same tokens, which must all give the same logits, and where two of them differ.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use apr_core::backend::Result as BackendResult;
use apr_core::backend::fed::Feed;
use apr_core::batch::{Batch, Row};
use apr_core::probe::{StageValue, Watch};
use apr_core::stage::{Place, Stage};

use super::At;
use crate::generate::PREFILL_CHUNK;
use crate::session::{Logits, Look, Part, SavedSequence, Sequence, Session, StepError};

/// Tokens at the end of a line whose logits are compared.
pub const TAIL: usize = 8;

/// Logits by position.
pub type Rows = BTreeMap<u32, Vec<f32>>;

/// A way to run a line's tail, or all of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// The tail in one step.
    Whole,
    /// The tail in steps of one token.
    Singles,
    /// The tail in one step with two other sequences.
    Beside,
    /// Everything from the first token on; the tail in one step.
    Anew,
    /// Everything from the first token on, in steps of uneven lengths.
    Cut,
}

/// Tokens whose first part has been run once, and whose tail is run again and again.
pub struct Line {
    pub sequence: Sequence,
    pub tokens: Vec<u32>,
    pub n_prefix: usize,
    /// Logits of the tail, run in one step after the prefix.
    pub rows: Rows,
}

/// How a pass is looked at, if at all.
#[derive(Default)]
pub struct Eyes<'a> {
    pub watch: Option<&'a mut dyn Watch>,
    pub feed: Option<&'a mut dyn Feed>,
}

/// Tokens that look random and are the same every time.
pub fn some_tokens(n: usize, n_vocab: usize, seed: u32) -> Vec<u32> {
    let mix = |i: u32| (i ^ seed.rotate_left(16)).wrapping_mul(2_654_435_761).rotate_left(13).wrapping_mul(0x9E37_79B1);
    (0..n as u32).map(|i| ((u64::from(mix(i + 1)) * n_vocab as u64) >> 32) as u32).collect()
}

/// One step of one sequence, and the logits of those of its rows that want them.
pub fn step(
    session: &mut dyn Session,
    sequence: &mut Sequence,
    tokens: &[u32],
    logits: Logits,
    eyes: &mut Eyes<'_>,
) -> Result<Rows, StepError> {
    step_beside(session, (sequence, tokens, logits), None, eyes)
}

/// As [`step`], between a sequence before that wants a row of logits and one behind that wants none.
fn step_beside(
    session: &mut dyn Session,
    (sequence, tokens, logits): (&mut Sequence, &[u32], Logits),
    others: Option<[(&mut Sequence, &[u32]); 2]>,
    eyes: &mut Eyes<'_>,
) -> Result<Rows, StepError> {
    let from = sequence.n_tokens();
    let mut parts = vec![Part { sequence, tokens, logits }];
    let n_before = usize::from(others.is_some());
    if let Some([before, behind]) = others {
        parts.insert(0, Part { sequence: before.0, tokens: before.1, logits: Logits::Last });
        parts.push(Part { sequence: behind.0, tokens: behind.1, logits: Logits::None });
    }
    match (&mut eyes.watch, &mut eyes.feed) {
        (None, None) => session.step(&mut parts)?,
        (watch, feed) => {
            let mut blind = Blind;
            let watch = watch.as_mut().map_or(&mut blind as &mut dyn Watch, |w| &mut **w);
            let feed = feed.as_mut().map(|f| &mut **f as &mut dyn Feed);
            session.step_watched(&mut parts, Look { watch, unfused: false, feed })?;
        }
    }
    let wanted = match logits {
        Logits::None | Logits::OnlyNorm => 0..0,
        Logits::Last => tokens.len() - 1..tokens.len(),
        Logits::All => 0..tokens.len(),
    };
    let mut rows = Rows::new();
    for (i, row) in wanted.enumerate() {
        let mut values = Vec::new();
        session.logits(n_before + i, &mut values)?;
        rows.insert((from + row) as u32, values);
    }
    Ok(rows)
}

impl Line {
    /// Runs all tokens but the last [`TAIL`] as a prompt is run, then those in one step.
    pub fn start(session: &mut dyn Session, tokens: Vec<u32>) -> Result<Line, StepError> {
        let n_prefix = tokens.len() - TAIL;
        let mut line = Line { sequence: Sequence::default(), tokens, n_prefix, rows: Rows::new() };
        for chunk in line.tokens[..n_prefix].chunks(PREFILL_CHUNK) {
            step(session, &mut line.sequence, chunk, Logits::None, &mut Eyes::default())?;
        }
        line.rows = line.run(session, Way::Whole, Eyes::default())?;
        Ok(line)
    }

    /// A line that goes on from keys and values that another session has saved.
    pub fn resume(
        session: &mut dyn Session,
        saved: &SavedSequence,
        tokens: Vec<u32>,
        n_prefix: usize,
    ) -> Result<Line, StepError> {
        let sequence = session.restore(saved)?;
        let mut line = Line { sequence, tokens, n_prefix, rows: Rows::new() };
        line.rows = line.run(session, Way::Whole, Eyes::default())?;
        Ok(line)
    }

    /// Logits of the tail, and of the row before it where that is run too.
    pub fn run(&mut self, session: &mut dyn Session, way: Way, mut eyes: Eyes<'_>) -> Result<Rows, StepError> {
        let (prefix, tail) = self.tokens.split_at(self.n_prefix);
        self.sequence.truncate(self.n_prefix);
        let mut fresh = Sequence::default();
        let mut rows = Rows::new();
        match way {
            Way::Whole => rows = step(session, &mut self.sequence, tail, Logits::All, &mut eyes)?,
            Way::Singles => {
                for token in tail {
                    rows.extend(step(session, &mut self.sequence, &[*token], Logits::All, &mut eyes)?);
                }
            }
            Way::Beside => {
                let mut behind = Sequence::default();
                let (a, b) = (&tail[TAIL / 2..], &tail[..TAIL - 1]);
                let others = Some([(&mut fresh, a), (&mut behind, b)]);
                rows = step_beside(session, (&mut self.sequence, tail, Logits::All), others, &mut eyes)?;
                session.release(&mut behind);
            }
            Way::Anew => {
                rows = step(session, &mut fresh, prefix, Logits::Last, &mut eyes)?;
                rows.extend(step(session, &mut fresh, tail, Logits::All, &mut eyes)?);
            }
            Way::Cut => {
                let mut rest = &self.tokens[..];
                for n in [1, 2, 7, 3].into_iter().cycle() {
                    let chunk = &rest[..n.min(rest.len())];
                    rest = &rest[chunk.len()..];
                    rows.extend(step(session, &mut fresh, chunk, Logits::All, &mut eyes)?);
                    if rest.is_empty() {
                        break;
                    }
                }
            }
        }
        session.release(&mut fresh);
        Ok(rows)
    }

    /// Where running the tail in this way differs first from running it in one step.
    pub fn locate(&mut self, session: &mut dyn Session, way: Way) -> Result<Option<At>, StepError> {
        let whole = self.fingerprint(session, Way::Whole)?;
        Ok(whole.first_difference(&self.fingerprint(session, way)?))
    }

    /// What every stage holds when the tail is run in this way.
    pub fn fingerprint(&mut self, session: &mut dyn Session, way: Way) -> Result<Fingerprint, StepError> {
        let mut print = Fingerprint { sequence: u32::from(way == Way::Beside), ..Fingerprint::default() };
        self.run(session, way, Eyes { watch: Some(&mut print), feed: None })?;
        Ok(print)
    }

    /// The positions whose logits are compared, for people.
    pub fn sampled(&self) -> String {
        format!("{}..{}", self.n_prefix, self.tokens.len())
    }
}

/// How many logits at common positions have different bits, and the first position where some have.
pub fn difference(a: &Rows, b: &Rows) -> (u64, Option<At>) {
    let (mut n, mut at) = (0, None);
    for (&position, x) in a {
        let Some(y) = b.get(&position) else { continue };
        let differ = x.iter().zip(y).filter(|(x, y)| x.to_bits() != y.to_bits()).count() as u64;
        if differ > 0 && at.is_none() {
            at = Some(At::logits(position));
        }
        n += differ;
    }
    (n, at)
}

/// A hash of every row of every stage of one of a batch's sequences.
#[derive(Default)]
pub struct Fingerprint {
    sequence: u32,
    batch: Batch,
    seen: BTreeMap<(Place, u32), u64>,
}

impl Fingerprint {
    /// The first stage and position that differ, of those that both have.
    pub fn first_difference(&self, other: &Fingerprint) -> Option<At> {
        let differs = |(key, hash): &(&(Place, u32), &u64)| other.seen.get(*key).is_some_and(|h| h != *hash);
        self.seen.iter().find(differs).map(|((place, position), _)| At { place: *place, position: *position })
    }
}

impl Watch for Fingerprint {
    fn begin(&mut self, batch: &Batch) {
        self.batch = batch.clone();
    }

    fn wants(&self, stage: Stage, _: usize) -> bool {
        !matches!(stage, Stage::AttnScores | Stage::AttnSoftmax)
    }

    fn seen(&mut self, stage: Stage, layer: usize, value: &dyn StageValue) -> BackendResult<()> {
        let (mut values, rows) = (Vec::new(), rows_of(&self.batch, value.shape().0));
        for (i, row) in rows.into_iter().enumerate().filter(|(_, row)| row.sequence == self.sequence) {
            value.read(i..i + 1, &mut values)?;
            let mut hasher = DefaultHasher::new();
            values.iter().for_each(|v| v.to_bits().hash(&mut hasher));
            self.seen.insert((Place::new(layer, stage), row.position), hasher.finish());
        }
        Ok(())
    }
}

/// The rows of a batch that a stage of `n_rows` rows has: all, or those that want logits.
fn rows_of(batch: &Batch, n_rows: usize) -> Vec<Row> {
    let rows = batch.rows();
    if n_rows == rows.len() { rows.to_vec() } else { batch.kept().iter().map(|&i| rows[i as usize]).collect() }
}

/// Looks at nothing.
struct Blind;

impl Watch for Blind {
    fn begin(&mut self, _: &Batch) {}
    fn wants(&self, _: Stage, _: usize) -> bool {
        false
    }
    fn seen(&mut self, _: Stage, _: usize, _: &dyn StageValue) -> BackendResult<()> {
        Ok(())
    }
}
