//! A shadow of what is served: some answers are computed once more on the reference, when nobody waits, and their next-token
//! distributions compared.
//!
//! What is compared is what tokens were sampled from: the logits of the served steps are kept, of one short answer at a time. The
//! reference reads the same mapping of the weights, on one thread that the system runs when nothing else wants to; it computes a token
//! at a time, and rests while anybody is answered.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use apr_core::backend::Precision;

use crate::device::{self, Device};
use crate::diff::end::{EndMetrics, EndSum, kld};
use crate::engine::{About, Engine, EngineError};
use crate::session::{Logits, Part, Sequence, Session, SessionSettings, StepError};

/// Tokens that a replayed request has at most, its answer included. Logits of 151,936 tokens are then 78 MB.
pub const N_TOKENS_MAX: usize = 128;
/// How many times the noise of the declared precision an error may be, as `apr verify` has it; divergence goes with its square.
const RATIO_MAX: f64 = 3.0;
/// The divergence that is no more than rounding, where the precision makes no noise.
const KLD_MIN: f64 = 1e-6;
/// How long the thread rests before it looks again whether somebody is answered.
const REST: Duration = Duration::from_millis(20);

/// What came of the replays so far.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ShadowCounts {
    pub n_replayed: u64,
    /// Requests whose turn it was while another was kept or replayed.
    pub n_skipped: u64,
    /// Replays that the reference could not make.
    pub n_failed: u64,
    /// Positions compared, and those whose most likely token differs.
    pub n_positions: u64,
    pub n_disagreeing: u64,
    /// Divergence of what was served from the reference, in nats: the sum over the positions, and the largest.
    pub kld_sum: f64,
    pub kld_max: f64,
    /// Replays that differ by more than the precision explains.
    pub n_above: u64,
}

/// One replay.
#[derive(Clone, Copy, Debug)]
pub struct Replay {
    /// What was served, against the reference.
    pub served: EndMetrics,
    /// Divergence at half of the positions, in nats. A token that goes to other experts by a near tie moves the mean of a short
    /// answer, and not this.
    pub median_kld: f64,
    /// The median that the declared precision may make here.
    pub bound: f64,
}

impl Replay {
    /// Whether what was served differs by more than the precision explains. What is no number does.
    pub fn is_above(&self) -> bool {
        self.median_kld.is_nan() || self.median_kld > self.bound
    }
}

/// The counts of a shadow, for whoever shows them.
#[derive(Clone, Default)]
pub struct ShadowMeter(Arc<Shared>);

impl ShadowMeter {
    pub fn counts(&self) -> ShadowCounts {
        *self.0.counts.lock().unwrap_or_else(|e| e.into_inner())
    }
}

#[derive(Default)]
struct Shared {
    counts: Mutex<ShadowCounts>,
    /// Whether somebody is answered.
    is_busy: AtomicBool,
    /// Whether an answer's logits are being kept, or replayed.
    is_taken: AtomicBool,
    is_over: AtomicBool,
}

impl Shared {
    fn count(&self, change: impl FnOnce(&mut ShadowCounts)) {
        change(&mut self.counts.lock().unwrap_or_else(|e| e.into_inner()));
    }
}

/// The right to keep logits, of which there is one.
pub(crate) struct Ticket(Arc<Shared>);

impl Drop for Ticket {
    fn drop(&mut self) {
        self.0.is_taken.store(false, Ordering::Release);
    }
}

/// What was served: the tokens that were computed, and the logits of the last `logits.len()` of them.
pub(crate) struct Served {
    pub(crate) tokens: Vec<u32>,
    pub(crate) logits: Vec<Vec<f32>>,
    /// Given back when this is dropped, replayed or not.
    pub(crate) _ticket: Ticket,
}

/// Picks answers and has them replayed.
pub struct Shadow {
    every: u64,
    /// Finished requests that were short enough, since the last that was replayed.
    n_since: u64,
    shared: Arc<Shared>,
    inbox: Option<SyncSender<Served>>,
    thread: Option<JoinHandle<()>>,
}

impl Shadow {
    /// Replays every `every`-th finished request of at most [`N_TOKENS_MAX`] tokens. `told` hears of each replay.
    ///
    /// # Errors
    /// A system that starts no thread.
    pub fn start(
        engine: &Engine,
        every: u64,
        told: impl FnMut(Result<Replay, EngineError>) + Send + 'static,
    ) -> std::io::Result<Shadow> {
        assert!(every > 0, "every so many requests");
        let (inbox, received) = sync_channel(1);
        let shared = Arc::new(Shared::default());
        let settings = SessionSettings { kv_type: engine.session.kv_type(), n_ctx: N_TOKENS_MAX };
        let replayer = Replayer {
            about: engine.about.clone(),
            settings,
            precision: engine.session.precision(),
            shared: shared.clone(),
        };
        let run = move || replayer.run(&received, told);
        let thread = std::thread::Builder::new().name("shadow".into()).spawn(run)?;
        Ok(Shadow { every, n_since: 0, shared, inbox: Some(inbox), thread: Some(thread) })
    }

    /// Where the counts can be read.
    pub fn meter(&self) -> ShadowMeter {
        ShadowMeter(self.shared.clone())
    }

    /// A ticket for a request that begins now, where its logits are to be kept.
    pub(crate) fn ticket(&mut self, n_prompt: usize) -> Option<Ticket> {
        if n_prompt >= N_TOKENS_MAX || self.n_since + 1 < self.every {
            return None;
        }
        if self.shared.is_taken.swap(true, Ordering::AcqRel) {
            self.shared.count(|c| c.n_skipped += 1);
            return None;
        }
        Some(Ticket(self.shared.clone()))
    }

    /// A request of `n_tokens` in all has ended, whose logits may have been kept.
    pub(crate) fn ended(&mut self, n_tokens: usize, served: Option<Served>) {
        self.n_since += u64::from(n_tokens <= N_TOKENS_MAX);
        if let (Some(served), Some(inbox)) = (served, &self.inbox)
            && inbox.try_send(served).is_ok()
        {
            self.n_since = 0;
        }
    }

    /// Whether anybody is answered now.
    pub(crate) fn set_busy(&self, is_busy: bool) {
        self.shared.is_busy.store(is_busy, Ordering::Release);
    }
}

impl Drop for Shadow {
    fn drop(&mut self) {
        self.shared.is_over.store(true, Ordering::Release);
        self.inbox = None;
        if let Some(thread) = self.thread.take() {
            _ = thread.join();
        }
    }
}

/// The thread's side.
struct Replayer {
    about: Arc<About>,
    settings: SessionSettings,
    /// Of what is served.
    precision: Precision,
    shared: Arc<Shared>,
}

impl Replayer {
    fn run(self, received: &Receiver<Served>, mut told: impl FnMut(Result<Replay, EngineError>)) {
        run_last();
        while let Ok(served) = received.recv() {
            let result = self.replay(&served);
            // The next may be kept.
            drop(served);
            match result {
                Ok(Some(replay)) => {
                    let end = replay.served;
                    let n_same = (end.same_top_p * end.n_positions as f64 / 100.0).round() as u64;
                    self.shared.count(|c| {
                        c.n_replayed += 1;
                        c.n_positions += end.n_positions as u64;
                        c.n_disagreeing += end.n_positions as u64 - n_same;
                        c.kld_sum += end.mean_kld * end.n_positions as f64;
                        c.kld_max =
                            if end.max_kld > c.kld_max || end.max_kld.is_nan() { end.max_kld } else { c.kld_max };
                        c.n_above += u64::from(replay.is_above());
                    });
                    told(Ok(replay));
                }
                // The server stops, or nothing was sampled.
                Ok(None) => {}
                Err(e) => {
                    self.shared.count(|c| c.n_failed += 1);
                    told(Err(e));
                }
            }
        }
    }

    fn replay(&self, served: &Served) -> Result<Option<Replay>, EngineError> {
        let Some(exact) = self.logits(Precision::F32, served)? else { return Ok(None) };
        let noise = match self.precision {
            Precision::F32 => Some(0.0),
            rounded => {
                self.logits(rounded, served)?.and_then(|rounded| compare(&exact, &rounded)).map(|(_, median)| median)
            }
        };
        let bound = |noise: f64| (RATIO_MAX * RATIO_MAX * noise).max(KLD_MIN);
        let compared = compare(&exact, &served.logits).zip(noise);
        Ok(compared.map(|((served, median_kld), noise)| Replay { served, median_kld, bound: bound(noise) }))
    }

    /// What the reference gives where logits were kept; `None` where the thread is to end.
    fn logits(&self, activations: Precision, served: &Served) -> Result<Option<Vec<Vec<f32>>>, EngineError> {
        let device = Device::Reference { activations };
        let (mut session, _) = device::open(device, &self.about.file, &self.about.hparams, self.settings)?;
        let (mut sequence, mut out) = (Sequence::default(), Vec::new());
        let n_before = served.tokens.len() - served.logits.len();
        for (i, token) in served.tokens.iter().enumerate() {
            if !self.may_go_on() {
                return Ok(None);
            }
            let is_kept = i >= n_before;
            step(&mut *session, &mut sequence, *token, is_kept).map_err(of_step)?;
            if is_kept {
                let mut row = Vec::new();
                session.logits(0, &mut row).map_err(of_step)?;
                out.push(row);
            }
        }
        Ok(Some(out))
    }

    /// Rests while anybody is answered; false when the thread is to end.
    fn may_go_on(&self) -> bool {
        let is_over = || self.shared.is_over.load(Ordering::Acquire);
        while self.shared.is_busy.load(Ordering::Acquire) && !is_over() {
            std::thread::sleep(REST);
        }
        !is_over()
    }
}

fn step(session: &mut dyn Session, sequence: &mut Sequence, token: u32, is_kept: bool) -> Result<(), StepError> {
    let logits = if is_kept { Logits::Last } else { Logits::None };
    session.step(&mut [Part { sequence, tokens: &[token], logits }])
}

fn of_step(e: StepError) -> EngineError {
    match e {
        StepError::Backend(e) => e.into(),
        other => unreachable!("tokens that were served fit: {other}"),
    }
}

/// What two passes' logits differ by, and the median of their divergences; not a number where most are none.
fn compare(a: &[Vec<f32>], b: &[Vec<f32>]) -> Option<(EndMetrics, f64)> {
    let mut sum = EndSum::default();
    a.iter().zip(b).for_each(|(a, b)| sum.add(a, b, None));
    let mut each: Vec<f64> = a.iter().zip(b).map(|(a, b)| kld(a, b)).collect();
    each.sort_unstable_by(f64::total_cmp);
    sum.metrics().zip(each.get(each.len() / 2).copied())
}

/// Makes the thread one that runs when nothing else wants to.
fn run_last() {
    #[cfg(target_os = "linux")]
    // SAFETY: a system call without pointers. On Linux 0 names the thread that calls.
    unsafe {
        // Where the system refuses, the thread is one of many.
        libc::setpriority(libc::PRIO_PROCESS, 0, 19);
    }
}
