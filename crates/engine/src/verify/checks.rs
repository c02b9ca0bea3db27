//! How each contract is checked: which passes are run, and what is compared.

use std::collections::BTreeMap;
use std::time::Instant;

use apr_core::backend::Result as BackendResult;
use apr_core::backend::fed::Feed;
use apr_core::backend::unfused::INTERIOR;
use apr_core::batch::Batch;
use apr_core::models;
use apr_core::probe::{Recorder, Recording};
use apr_core::stage::Stage;

use super::passes::{Eyes, Line, Rows, TAIL, Way, difference, some_tokens, step};
use super::report::{Finding, Reporter};
use super::stages::StageChecks;
use super::{At, Measure, Subject, VerifyError};
use crate::session::{Logits, Look, Part, Sequence, StepError};

/// Tokens of the short line: enough to route to many experts.
const N_SHORT: usize = 40;
const N_SHORT_MIN: usize = 16;
/// Tokens before the tail of the long line, where wrong rotations and KV positions show.
const N_LONG: usize = 1024;
/// Seconds that a pass over the short line may take, of which there are about ten.
const SHORT_S: f64 = 2.0;
/// Seconds that running the long line may take by the speed of a short step; long ones are faster.
const LONG_S: f64 = 45.0;
/// What a feed-forward block may differ from its plain body by, for the median row: float sums in another order. Single rows may
/// differ by more, where an activation lies between two 8-bit codes.
const FUSED_BOUND: f64 = 1e-5;

/// What a row of logits may differ by where sums are in another order from one batch to another, for the median row.
const BATCH_BOUND: f64 = 2e-2;

/// Scripts, white space, code, and characters of several code points, all composed as Unicode's NFC has them.
const TEXTS: [&str; 5] = [
    "The quick brown fox doesn't jump over 1,234.5 lazy dogs!  Two spaces,\ta tab.\r\n\n   Done.",
    "fn main() { println!(\"{:?}\", vec![0u8; 1 << 10]); } // <|im_end|> is text here",
    "Größe, naïve façade, Ελληνικά, Русский, العربية, עברית, हिन्दी, ไทย",
    "大規模言語モデル 专家混合 한국어 模型",
    "👩\u{200d}🔬 🇩🇪 1️⃣ \u{feff} x\u{300} \u{a0}\u{2028}§¶±×÷€",
];

/// Checks what a model, its device and its session can show by themselves, in the order of the table. Returns the tokens of the longest
/// line.
pub fn run(subject: &mut Subject<'_>, reporter: &mut Reporter<'_>) -> Result<Vec<u32>, VerifyError> {
    let n_ctx = subject.session.n_ctx();
    if n_ctx < N_SHORT_MIN {
        return Err(VerifyError::Context { need: N_SHORT_MIN, n_ctx });
    }
    reporter.found("FALSIFY-TOKENIZER-001", text_comes_back(subject));
    let mut lines = lines(subject, n_ctx)?;
    let watched = check_stages(subject, &mut lines, reporter)?;
    reporter.found("FALSIFY-TRACE-001", watched);
    for (id, way) in [
        ("FALSIFY-BATCHING-001", Way::Anew),
        ("FALSIFY-BATCHING-002", Way::Cut),
        ("FALSIFY-BATCHING-003", Way::Singles),
        ("FALSIFY-BATCHING-004", Way::Beside),
    ] {
        reporter.found(id, same_logits(subject, &mut lines, way)?);
    }
    reporter.found("FALSIFY-FORWARD-005", nan_is_seen(subject, &lines[0])?);
    match INTERIOR.iter().any(|&s| !subject.session.shows(s, false)) {
        true => reporter.found("FALSIFY-TRACE-002", fused_is_plain(subject, &lines[0].tokens)?),
        false => reporter.skipped("FALSIFY-TRACE-002", "this device has no fused blocks"),
    }
    reporter.found("FALSIFY-KV-001", saved_goes_on(subject, &mut lines)?);
    match threads(subject, &mut lines)? {
        Some(finding) => reporter.found("FALSIFY-BATCHING-005", finding),
        None => {
            reporter.skipped("FALSIFY-BATCHING-005", "this device does not compute in threads of the caller's choice")
        }
    }
    lines.iter_mut().for_each(|line| subject.session.release(&mut line.sequence));
    Ok(lines.pop().map_or(Vec::new(), |line| line.tokens))
}

/// That text is not changed by becoming tokens.
fn text_comes_back(subject: &Subject<'_>) -> Finding {
    let (mut n_token, mut n_changed) = (0, 0);
    for text in TEXTS {
        let tokens = subject.tokenizer.encode_text(text, false);
        let mut bytes = Vec::new();
        tokens.iter().for_each(|&t| subject.tokenizer.decode_bytes(t, &mut bytes, false));
        n_token += tokens.len();
        n_changed += usize::from(bytes != text.as_bytes());
    }
    Finding {
        sampled: format!("{} texts of {n_token} tokens", TEXTS.len()),
        measure: Measure { value: n_changed as f64, bound: 0.0, unit: "texts that changed" },
        at: None,
    }
}

/// A short line and, where context and speed allow, a long one.
fn lines(subject: &mut Subject<'_>, n_ctx: usize) -> Result<Vec<Line>, VerifyError> {
    let n_vocab = subject.hparams.n_vocab.min(subject.tokenizer.n_vocab());
    let mut once = |n: usize| -> Result<f64, StepError> {
        let (mut sequence, start) = (Sequence::default(), Instant::now());
        step(subject.session, &mut sequence, &some_tokens(n, n_vocab, 1), Logits::Last, &mut Eyes::default())?;
        subject.session.release(&mut sequence);
        Ok(start.elapsed().as_secs_f64() / n as f64)
    };
    // The first time, weights come from the disk, and any time something else may have the cores.
    let mut timed = |n: usize| -> Result<f64, StepError> { Ok(once(n)?.min(once(n)?).min(once(n)?)) };
    let n_short = ((SHORT_S / timed(TAIL)?) as usize).clamp(N_SHORT_MIN, N_SHORT).min(n_ctx);
    let n_long = (LONG_S / timed(n_short)?) as usize;
    let n_long = n_long.min(N_LONG).min(n_ctx - TAIL);
    let mut all = vec![Line::start(subject.session, some_tokens(n_short, n_vocab, 2))?];
    if n_long >= 4 * n_short {
        all.push(Line::start(subject.session, some_tokens(n_long + TAIL, n_vocab, 3))?);
    }
    Ok(all)
}

/// The positions of the lines' tails, for people.
fn tails(lines: &[Line]) -> String {
    format!("logits at positions {}", lines.iter().map(Line::sampled).collect::<Vec<_>>().join(" and "))
}

/// That no logit has other bits.
fn bitwise(n_differ: u64, lines: &[Line], at: Option<At>) -> Finding {
    Finding {
        sampled: tails(lines),
        measure: Measure { value: n_differ as f64, bound: 0.0, unit: "logits that differ" },
        at,
    }
}

/// What holds of every stage of a pass; and that the pass, looked at, gives the logits it gives unseen.
fn check_stages(
    subject: &mut Subject<'_>,
    lines: &mut [Line],
    reporter: &mut Reporter<'_>,
) -> Result<Finding, VerifyError> {
    let mut checks = StageChecks::new(subject.hparams, subject.gguf, subject.session);
    let (mut n_differ, mut at) = (0, None);
    for (i, line) in lines.iter_mut().enumerate() {
        let way = if i == 0 { Way::Anew } else { Way::Whole };
        let rows = line.run(subject.session, way, Eyes { watch: Some(&mut checks), feed: None })?;
        let (n, first) = difference(&line.rows, &rows);
        n_differ += n;
        at = at.or(first);
    }
    checks.finish();
    let positions = lines
        .iter()
        .enumerate()
        .map(|(i, line)| if i == 0 { format!("0..{}", line.tokens.len()) } else { line.sampled() });
    let positions =
        format!("at positions {} in {} layers", positions.collect::<Vec<_>>().join(" and "), subject.hparams.n_layer);
    let of = |what: &str| format!("{what} {positions}");
    reporter.tally("FALSIFY-FORWARD-003", &checks.shape, "wrong shapes", &of("stages"));
    reporter.tally("FALSIFY-FORWARD-004", &checks.finite, "values of a row that are no number", &of("rows"));
    for (id, tally, unit) in [
        ("FALSIFY-MOE-ROUTER-001", &checks.sum, "off 1"),
        ("FALSIFY-MOE-ROUTER-002", &checks.distinct, "wrong or repeated ids"),
        ("FALSIFY-MOE-ROUTER-003", &checks.likeliest, "logits above one chosen before"),
        ("FALSIFY-MOE-ROUTER-004", &checks.softmax, "off the softmax"),
    ] {
        match subject.hparams.experts {
            Some(_) => reporter.tally(id, tally, unit, &of("routings")),
            None => reporter.skipped(id, "the model has no experts"),
        }
    }
    Ok(bitwise(n_differ, lines, at))
}

/// That another way to run the same tokens gives the same logits. Ways that begin anew are run on the short line only.
fn same_logits(subject: &mut Subject<'_>, lines: &mut [Line], way: Way) -> Result<Finding, VerifyError> {
    let n_line = if matches!(way, Way::Anew | Way::Cut) { 1 } else { lines.len() };
    let lines = &mut lines[..n_line];
    if way != Way::Anew && !subject.session.is_batch_invariant() {
        return close_logits(subject, lines, way);
    }
    let (mut n_differ, mut at) = (0, None);
    for line in lines.iter_mut() {
        let rows = line.run(subject.session, way, Eyes::default())?;
        let (n, first) = difference(&line.rows, &rows);
        n_differ += n;
        if n > 0 && at.is_none() {
            at = line.locate(subject.session, way)?.or(first);
        }
    }
    Ok(bitwise(n_differ, lines, at))
}

/// As [`same_logits`] on a device that sums in another order in another batch: the logits are those of rounding.
fn close_logits(subject: &mut Subject<'_>, lines: &mut [Line], way: Way) -> Result<Finding, VerifyError> {
    let mut errors = Vec::new();
    for line in lines.iter_mut() {
        let rows = line.run(subject.session, way, Eyes::default())?;
        let of = |(position, row): (&u32, &Vec<f32>)| (relative_rms(&rows[position], row), At::logits(*position));
        errors.extend(line.rows.iter().map(of));
    }
    let at = errors.iter().find(|(e, _)| e.is_nan() || *e > BATCH_BOUND).map(|(_, at)| *at);
    errors.sort_by(|a, b| a.0.total_cmp(&b.0));
    let value = errors[errors.len() / 2].0;
    let measure = Measure { value, bound: BATCH_BOUND, unit: "relative RMS of the median row" };
    Ok(Finding { sampled: tails(lines), measure, at: at.filter(|_| value.is_nan() || value > BATCH_BOUND) })
}

/// Puts a NaN where one position's embedding is.
struct NanAt {
    position: u32,
    positions: Vec<u32>,
}

impl Feed for NanAt {
    fn begin(&mut self, batch: &Batch) {
        self.positions = batch.rows().iter().map(|row| row.position).collect();
    }

    fn has(&self, stage: Stage, _: usize) -> bool {
        stage == Stage::Embedding
    }

    fn replace(&mut self, _: Stage, _: usize, n_rows: usize, values: &mut [f32]) -> BackendResult<()> {
        if let Some(i) = self.positions.iter().position(|&p| p == self.position) {
            values[i * (values.len() / n_rows)] = f32::NAN;
        }
        Ok(())
    }
}

/// That no op takes what is not a number for one, and that none lets it reach back in time.
fn nan_is_seen(subject: &mut Subject<'_>, line: &Line) -> Result<Finding, VerifyError> {
    let position = (line.n_prefix + TAIL / 2) as u32;
    let (mut feed, mut sequence) = (NanAt { position, positions: Vec::new() }, Sequence::default());
    let mut rows = Rows::new();
    for (tokens, logits) in
        [(&line.tokens[..line.n_prefix], Logits::None), (&line.tokens[line.n_prefix..], Logits::All)]
    {
        rows = step(subject.session, &mut sequence, tokens, logits, &mut Eyes { watch: None, feed: Some(&mut feed) })?;
    }
    subject.session.release(&mut sequence);
    let hidden = rows[&position].iter().filter(|v| !v.is_nan()).count() as u64;
    let (changed, first) = difference(&line.rows.range(..position).map(|(p, r)| (*p, r.clone())).collect(), &rows);
    Ok(Finding {
        sampled: format!("a NaN in the embedding of position {position}"),
        measure: Measure {
            value: (hidden + changed) as f64,
            bound: 0.0,
            unit: "logits that hide it, or come before it",
        },
        at: first.or((hidden > 0).then(|| At::logits(position))),
    })
}

/// Feeds the inputs of feed-forward blocks that another pass had.
struct Inputs<'a>(&'a BTreeMap<(usize, Stage), Recording>);

impl Feed for Inputs<'_> {
    fn begin(&mut self, _: &Batch) {}

    fn has(&self, stage: Stage, _: usize) -> bool {
        stage == Stage::FfnNorm
    }

    fn replace(&mut self, stage: Stage, layer: usize, _: usize, values: &mut [f32]) -> BackendResult<()> {
        values.copy_from_slice(&self.0[&(layer, stage)].values);
        Ok(())
    }
}

/// That fused feed-forward blocks give what their plain bodies give for the same input, layer by layer.
fn fused_is_plain(subject: &mut Subject<'_>, tokens: &[u32]) -> Result<Finding, VerifyError> {
    let out = if subject.hparams.experts.is_some() { Stage::MoeFfnOut } else { Stage::FfnOut };
    debug_assert!(models::stages(subject.hparams, subject.gguf).contains(&out), "a model has one kind of block");
    let mut record = |inputs: Option<&Recorder>| -> Result<Recorder, StepError> {
        let (mut recorder, mut sequence) = (Recorder::of(&[Stage::FfnNorm, out]), Sequence::default());
        let part = Part { sequence: &mut sequence, tokens, logits: Logits::All };
        let mut feed = inputs.map(|r| Inputs(&r.seen));
        let feed = feed.as_mut().map(|f| f as &mut dyn Feed);
        let look = Look { watch: &mut recorder, unfused: feed.is_some(), feed };
        subject.session.step_watched(&mut [part], look)?;
        subject.session.release(&mut sequence);
        Ok(recorder)
    };
    let fused = record(None)?;
    let plain = record(Some(&fused))?;
    let mut errors = Vec::new();
    for ((layer, stage), expected) in plain.seen.iter().filter(|((_, stage), _)| *stage == out) {
        let got = &fused.seen[&(*layer, *stage)];
        for (i, &position) in expected.positions.iter().enumerate() {
            errors.push((relative_rms(got.row(i), expected.row(i)), At::new(*layer, out, position)));
        }
    }
    let at = errors.iter().find(|(e, _)| e.is_nan() || *e > FUSED_BOUND).map(|(_, at)| *at);
    errors.sort_by(|a, b| a.0.total_cmp(&b.0));
    let value = errors[errors.len() / 2].0;
    let measure = Measure { value, bound: FUSED_BOUND, unit: "relative RMS of the median row" };
    let sampled = format!("{} rows of {} in {} layers", errors.len(), out.name(), subject.hparams.n_layer);
    // Single rows beyond the bound are no finding.
    Ok(Finding { sampled, measure, at: at.filter(|_| value.is_nan() || value > FUSED_BOUND) })
}

/// `|a - b| / |b|`, root mean square; 0 where both are 0.
fn relative_rms(a: &[f32], b: &[f32]) -> f64 {
    let square = |v: f64| v * v;
    let error: f64 = a.iter().zip(b).map(|(&a, &b)| square(f64::from(a) - f64::from(b))).sum();
    let norm: f64 = b.iter().map(|&b| square(f64::from(b))).sum();
    if error == 0.0 { 0.0 } else { (error / norm).sqrt() }
}

/// That saved keys and values, restored after another sequence has written where they were, are as good as the originals.
fn saved_goes_on(subject: &mut Subject<'_>, lines: &mut [Line]) -> Result<Finding, VerifyError> {
    let (mut n_differ, mut at) = (0, None);
    for line in lines.iter_mut() {
        line.sequence.truncate(line.n_prefix);
        let saved = subject.session.save(&line.sequence)?;
        subject.session.release(&mut line.sequence);
        let mut other = Sequence::default();
        let tokens = &line.tokens[line.n_prefix..];
        step(subject.session, &mut other, tokens, Logits::None, &mut Eyes::default())?;
        line.sequence = subject.session.restore(&saved)?;
        let rows = line.run(subject.session, Way::Whole, Eyes::default())?;
        let (n, first) = difference(&line.rows, &rows);
        subject.session.release(&mut other);
        n_differ += n;
        at = at.or(first);
    }
    Ok(bitwise(n_differ, lines, at))
}

/// That a session with another number of threads computes the same: the short line from its first token on, the long one from keys
/// and values that it is given.
fn threads(subject: &mut Subject<'_>, lines: &mut [Line]) -> Result<Option<Finding>, VerifyError> {
    let Some((n_threads, load)) = &subject.reload else { return Ok(None) };
    let (n_threads, mut session) = (*n_threads, load()?);
    let (mut n_differ, mut at) = (0, None);
    for (i, line) in lines.iter_mut().enumerate() {
        line.sequence.truncate(line.n_prefix);
        let mut same = match i {
            0 => Line::start(&mut *session, line.tokens.clone())?,
            _ => {
                let saved = subject.session.save(&line.sequence)?;
                Line::resume(&mut *session, &saved, line.tokens.clone(), line.n_prefix)?
            }
        };
        let (n, first) = difference(&line.rows, &same.rows);
        n_differ += n;
        if n > 0 && at.is_none() {
            let here = line.fingerprint(subject.session, Way::Whole)?;
            at = here.first_difference(&same.fingerprint(&mut *session, Way::Whole)?).or(first);
        }
    }
    let mut finding = bitwise(n_differ, lines, at);
    finding.sampled = format!("{} with {n_threads} threads", finding.sampled);
    Ok(Some(finding))
}
