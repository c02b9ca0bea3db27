//! The thread pool: one leader, some workers, one parallel loop at a time.
//!
//! A forward pass runs hundreds of short loops per token. The leader opens a loop, workers that are awake join it, every thread works
//! through a run of tasks of its own and then takes from the ends of the others', and the leader closes the loop when the tasks are
//! gone. Neighbouring tasks mostly read neighbouring memory, which a thread that keeps to its run streams without a break. A worker
//! that the system has descheduled has not joined and is not waited for; others do its tasks. Workers spin briefly between loops, then
//! yield, then sleep until the next one is opened.

use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;

/// Work of one loop: called as `f(thread, task)`.
type Job<'a> = dyn Fn(usize, usize) + Sync + 'a;

const OPEN: u64 = 1 << 31;
const JOINED: u64 = OPEN - 1;
const SPINS: u32 = 4_000;
const YIELDS: u32 = 200;

struct Shared {
    /// Generation in the high half; [`OPEN`] while a loop takes workers; the number that have joined below.
    word: AtomicU64,
    job: UnsafeCell<Option<*const Job<'static>>>,
    /// The tasks left of each thread's run.
    runs: Box<[Run]>,
    panicked: AtomicBool,
    stop: AtomicBool,
    asleep: AtomicUsize,
    lock: Mutex<()>,
    wake: Condvar,
}

/// Consecutive tasks: the first in the high half, the end in the low half. On a cache line of its own, as several threads write it.
#[repr(align(128))]
struct Run(AtomicU64);

impl Run {
    /// Begins a run. No loop is open, so nobody takes from it.
    fn set(&self, tasks: std::ops::Range<usize>) {
        self.0.store((tasks.start as u64) << 32 | tasks.end as u64, Ordering::Relaxed);
    }

    /// The first task left.
    fn first(&self) -> Option<usize> {
        self.take(|start, end| (start + 1, end)).map(|(start, _)| start)
    }

    /// The last task left.
    fn last(&self) -> Option<usize> {
        self.take(|start, end| (start, end - 1)).map(|(_, end)| end - 1)
    }

    /// Replaces the run by what `rest` leaves of it, unless it is empty; what it was is returned.
    fn take(&self, rest: impl Fn(usize, usize) -> (usize, usize)) -> Option<(usize, usize)> {
        let halves = |run: u64| ((run >> 32) as usize, (run & 0xffff_ffff) as usize);
        let shorter = |run| {
            let (start, end) = halves(run);
            let (first, last) = if start < end { rest(start, end) } else { return None };
            Some((first as u64) << 32 | last as u64)
        };
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, shorter).ok().map(halves)
    }
}

// SAFETY: `job` is written by the leader only while no loop is open and no worker is joined, and read by workers only after they
// joined an open loop through `word`, whose acquire and release order the accesses. The pointer it holds is to a `Sync` closure.
unsafe impl Sync for Shared {}
// SAFETY: as above; nothing in it belongs to one thread.
unsafe impl Send for Shared {}

/// Threads that run loops together.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Held by the leader of the loop in progress.
    leader: Mutex<()>,
}

impl Pool {
    /// A pool of `n_threads` threads, the caller of [`run`](Self::run) being one of them.
    ///
    /// # Errors
    /// A thread that the system does not start.
    pub fn new(n_threads: usize) -> std::io::Result<Pool> {
        assert!(n_threads >= 1, "a pool has at least its leader");
        let shared = Arc::new(Shared {
            word: AtomicU64::new(0),
            job: UnsafeCell::new(None),
            runs: (0..n_threads).map(|_| Run(AtomicU64::new(0))).collect(),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            asleep: AtomicUsize::new(0),
            lock: Mutex::new(()),
            wake: Condvar::new(),
        });
        // Dropping an incomplete pool ends the workers it has.
        let mut pool = Pool { shared, workers: Vec::new(), leader: Mutex::new(()) };
        for thread in 1..n_threads {
            let shared = pool.shared.clone();
            let named = std::thread::Builder::new().name(format!("apr-worker-{thread}"));
            pool.workers.push(named.spawn(move || work(&shared, thread))?);
        }
        Ok(pool)
    }

    /// Threads, the leader included.
    pub fn n_threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `f(thread, task)` once for every task below `n_tasks`, on any thread below [`n_threads`](Self::n_threads), and returns
    /// when all are done. Panics if a task panicked.
    pub fn run(&self, n_tasks: usize, f: &Job<'_>) {
        if n_tasks <= 1 || self.workers.is_empty() {
            (0..n_tasks).for_each(|task| f(0, task));
            return;
        }
        let _leader = self.leader.lock().unwrap_or_else(|e| e.into_inner());
        let s = &*self.shared;
        // SAFETY: the lifetime is erased only until this function returns: the loop is closed and left by all workers before that.
        let job: *const Job<'static> = unsafe { std::mem::transmute::<&Job<'_>, &'static Job<'static>>(f) };
        // SAFETY: no loop is open and nobody is joined (the previous `run` waited for that), so no worker reads `job` now.
        unsafe { *s.job.get() = Some(job) };
        assert!(n_tasks <= u32::MAX as usize, "{n_tasks} tasks are more than a run can count");
        let share = n_tasks.div_ceil(s.runs.len());
        for (i, run) in s.runs.iter().enumerate() {
            run.set((i * share).min(n_tasks)..((i + 1) * share).min(n_tasks));
        }
        let generation = (s.word.load(Ordering::Relaxed) >> 32) + 1;
        s.word.store(generation << 32 | OPEN, Ordering::Release);
        fence(Ordering::SeqCst);
        if s.asleep.load(Ordering::Relaxed) > 0 {
            let _guard = s.lock.lock().unwrap_or_else(|e| e.into_inner());
            s.wake.notify_all();
        }
        let mine = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| take_tasks(s, f, 0)));
        s.word.fetch_and(!OPEN, Ordering::AcqRel);
        let mut waited = 0u32;
        while s.word.load(Ordering::Acquire) & JOINED != 0 {
            waited += 1;
            if waited < SPINS { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
        let theirs = s.panicked.swap(false, Ordering::Relaxed);
        if let Err(panic) = mine {
            std::panic::resume_unwind(panic);
        }
        assert!(!theirs, "a task of a parallel loop panicked");
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        {
            let _guard = self.shared.lock.lock().unwrap_or_else(|e| e.into_inner());
            self.shared.wake.notify_all();
        }
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
    }
}

/// Takes the thread's own tasks, then the others' from their ends, until none is left.
fn take_tasks(s: &Shared, f: &Job<'_>, thread: usize) {
    while let Some(task) = s.runs[thread].first() {
        f(thread, task);
    }
    for other in (1..s.runs.len()).map(|i| &s.runs[(thread + i) % s.runs.len()]) {
        while let Some(task) = other.last() {
            f(thread, task);
        }
    }
}

/// A worker's life: join every loop that is open, rest between loops.
fn work(s: &Shared, thread: usize) {
    let mut last = 0;
    while let Some(word) = wait_for_loop(s, last) {
        if s.word.compare_exchange(word, word + 1, Ordering::AcqRel, Ordering::Relaxed).is_err() {
            continue;
        }
        last = word >> 32;
        // SAFETY: this worker has joined an open loop, so the leader waits for it before it changes or drops the job.
        let job = unsafe { (*s.job.get()).expect("an open loop has a job") };
        // SAFETY: as above; the closure outlives the loop.
        let job = unsafe { &*job };
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| take_tasks(s, job, thread)));
        if done.is_err() {
            s.panicked.store(true, Ordering::Relaxed);
        }
        s.word.fetch_sub(1, Ordering::Release);
    }
}

/// The word of an open loop that is not the one of generation `last`, or `None` when the pool ends.
fn wait_for_loop(s: &Shared, last: u64) -> Option<u64> {
    let open = |word: u64| word & OPEN != 0 && word >> 32 != last;
    let mut rest = 0;
    loop {
        let word = s.word.load(Ordering::Acquire);
        if s.stop.load(Ordering::Relaxed) {
            return None;
        }
        if open(word) {
            return Some(word);
        }
        rest += 1;
        if rest < SPINS {
            std::hint::spin_loop();
        } else if rest < SPINS + YIELDS {
            std::thread::yield_now();
        } else {
            let guard = s.lock.lock().unwrap_or_else(|e| e.into_inner());
            s.asleep.fetch_add(1, Ordering::SeqCst);
            fence(Ordering::SeqCst);
            if !open(s.word.load(Ordering::SeqCst)) && !s.stop.load(Ordering::SeqCst) {
                drop(s.wake.wait(guard).unwrap_or_else(|e| e.into_inner()));
            }
            s.asleep.fetch_sub(1, Ordering::SeqCst);
            rest = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        for n_threads in 1..5 {
            let pool = Pool::new(n_threads).unwrap();
            for n_tasks in [0, 1, 2, 3, 100, 1000] {
                let counts: Vec<AtomicUsize> = (0..n_tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(n_tasks, &|thread, task| {
                    assert!(thread < n_threads);
                    counts[task].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn many_short_loops_and_pauses_between_them() {
        let pool = Pool::new(3).unwrap();
        let sum = AtomicUsize::new(0);
        for i in 0..20_000 {
            pool.run(4, &|_, task| {
                sum.fetch_add(task, Ordering::Relaxed);
            });
            if i % 5_000 == 0 {
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
        }
        assert_eq!(sum.load(Ordering::Relaxed), 6 * 20_000);
    }

    #[test]
    fn a_panicking_task_reaches_the_leader_and_the_pool_lives_on() {
        let pool = Pool::new(2).unwrap();
        let broken = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            pool.run(8, &|_, task| assert!(task != 3, "task 3 breaks"));
        }));
        assert!(broken.is_err());
        let n = AtomicUsize::new(0);
        pool.run(8, &|_, _| {
            n.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(n.load(Ordering::Relaxed), 8);
    }

    #[test]
    fn panics_on_several_threads_leave_the_next_loop_alone() {
        let pool = Pool::new(2).unwrap();
        for _ in 0..20 {
            let broken = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                pool.run(64, &|_, _| {
                    std::thread::sleep(std::time::Duration::from_micros(50));
                    panic!("every task breaks");
                });
            }));
            assert!(broken.is_err());
            pool.run(8, &|_, _| {});
        }
    }
}
