//! What this machine can do at best with a number of threads: the figures that a model's speed is held against.

use std::hint::black_box;
use std::sync::Barrier;
use std::time::Instant;

use apr_cpu::kernels::Isa;
use apr_cpu::peak;

/// Limits of the threads that compute, measured while all of them do the same.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    pub n_threads: usize,
    /// Reading memory that no cache holds, all threads together.
    pub read_gb_per_s: f64,
    /// Multiply-adds of bytes, all threads together; see [`peak::int8_macs_per_s`].
    pub int8_macs_per_s: f64,
    /// Clock of one thread, the mean of all.
    pub clock_hz: f64,
}

impl Limits {
    /// Measures; a third of a second.
    pub fn measure(n_threads: usize, isa: Isa) -> Limits {
        let n_threads = n_threads.max(1);
        Limits {
            n_threads,
            read_gb_per_s: read_gb_per_s(n_threads),
            int8_macs_per_s: on_all(n_threads, || peak::int8_macs_per_s(isa)),
            clock_hz: on_all(n_threads, peak::clock_hz) / n_threads as f64,
        }
    }

    /// The better of two measurements of one machine, figure by figure.
    pub fn best(self, other: Limits) -> Limits {
        Limits {
            n_threads: self.n_threads,
            read_gb_per_s: self.read_gb_per_s.max(other.read_gb_per_s),
            int8_macs_per_s: self.int8_macs_per_s.max(other.int8_macs_per_s),
            clock_hz: self.clock_hz.max(other.clock_hz),
        }
    }

    /// Multiply-adds per cycle of one core, of a rate of all threads together.
    pub fn per_cycle_and_core(&self, macs_per_s: f64) -> f64 {
        macs_per_s / self.n_threads as f64 / self.clock_hz
    }
}

/// The sum of what threads measure at the same time.
fn on_all(n_threads: usize, measure: impl Fn() -> f64 + Sync) -> f64 {
    let (start, measure) = (Barrier::new(n_threads), &measure);
    std::thread::scope(|scope| {
        let one = || {
            start.wait();
            measure()
        };
        let threads: Vec<_> = (0..n_threads).map(|_| scope.spawn(one)).collect();
        threads.into_iter().map(|t| t.join().expect("a measurement does not panic")).sum()
    })
}

/// Bytes that are read in a pass, and those that a thread reads at least: far more than caches hold.
const READ_BYTES: usize = 256 << 20;
const THREAD_READ_BYTES: usize = 64 << 20;
const N_PASS: usize = 9;

/// How fast `n_threads` threads read memory: a plain loop over 256 MiB or more, every thread its own part, which it has written
/// itself, so that it lies near its core. The best pass counts, as whatever disturbs only slows.
pub fn read_gb_per_s(n_threads: usize) -> f64 {
    let n_threads = n_threads.max(1);
    let part = READ_BYTES.div_ceil(n_threads).max(THREAD_READ_BYTES) / 8;
    let (barrier, origin) = (Barrier::new(n_threads), Instant::now());
    let read = || {
        let buffer = vec![1u64; part];
        let pass = || {
            barrier.wait();
            let start = origin.elapsed().as_secs_f64();
            black_box(sum(black_box(&buffer)));
            (start, origin.elapsed().as_secs_f64())
        };
        std::array::from_fn::<_, N_PASS, _>(|_| pass())
    };
    let passes: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..n_threads).map(|_| scope.spawn(read)).collect();
        threads.into_iter().map(|t| t.join().expect("a pass does not panic")).collect()
    });
    // A pass lasts from the first thread's start to the last one's end.
    let seconds = |i: usize| {
        let first = passes.iter().map(|p| p[i].0).fold(f64::INFINITY, f64::min);
        passes.iter().map(|p| p[i].1).fold(0.0, f64::max) - first
    };
    let best = (0..N_PASS).map(seconds).fold(f64::INFINITY, f64::min);
    (8 * part * n_threads) as f64 / best / 1e9
}

/// A sum that the memory, not the adder, limits.
fn sum(x: &[u64]) -> u64 {
    let (chunks, rest) = x.as_chunks::<16>();
    let mut lanes = [0u64; 16];
    for chunk in chunks {
        lanes.iter_mut().zip(chunk).for_each(|(lane, v)| *lane = lane.wrapping_add(*v));
    }
    lanes.iter().chain(rest).fold(0, |a, b| a.wrapping_add(*b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_of_all_threads_and_a_core_has_its_share() {
        let limits = Limits::measure(2, Isa::Scalar);
        assert!((0.1..10_000.0).contains(&limits.read_gb_per_s), "{limits:?}");
        assert!((2e8..2e10).contains(&limits.clock_hz), "{limits:?}");
        let known = Limits { n_threads: 2, read_gb_per_s: 20.0, int8_macs_per_s: 2e11, clock_hz: 3e9 };
        assert_eq!(known.per_cycle_and_core(1.2e11), 20.0);
        let better = Limits { read_gb_per_s: 10.0, int8_macs_per_s: 3e11, ..known };
        assert_eq!(known.best(better), Limits { int8_macs_per_s: 3e11, ..known });
    }

    #[test]
    fn every_word_is_summed() {
        assert_eq!(sum(&[3; 35]), 105);
    }
}
