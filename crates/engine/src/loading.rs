//! Getting weights from disk into memory: before they are needed where memory holds them all, as they are needed where it does not.
//!
//! Nothing waits for this: the first prompt is computed meanwhile, from the first layer on as the readers are, and what it needs and is
//! not there yet it reads itself.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::JoinHandle;

use apr_core::gguf::{Gguf, TensorInfo};

use crate::mapping::{Mapping, PAGE_BYTES_MAX};
use crate::memory;
use crate::model_file::ModelFile;

/// Bytes that a reader reads before it looks whether to go on.
const PIECE_BYTES: usize = 8 << 20;
/// One thread reads up to 2 GB/s: making room for pages costs it more time than waiting does. More than one per some cores would take
/// them from the first prompt.
const CORES_PER_READER: usize = 4;
const N_READER_MAX: usize = 4;
/// Pieces between two looks at the memory that is left.
const PIECES_PER_LOOK: usize = 16;
/// Pages that are looked at, at most, to see whether a file is in memory; and how far apart they are at least.
const N_SAMPLE_MAX: usize = 8192;
const SAMPLE_STEP_MIN: usize = 1 << 20;

/// How a model's weights come into memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// They are in memory; or the system tells nothing of its memory, and reads what is touched.
    Cached,
    /// They are read in the background.
    ReadAhead,
    /// Memory does not hold them all: the experts that a step chose are read for the step.
    OnDemand { need_bytes: u64, available_bytes: u64 },
}

/// A model's weights on their way into memory. Dropping it ends the reading.
pub struct Loading {
    pub way: Way,
    progress: Arc<Progress>,
    readers: Vec<JoinHandle<()>>,
}

/// How far the reading is.
#[derive(Default)]
pub struct Progress {
    n_bytes: u64,
    n_read: AtomicU64,
    n_reader: AtomicUsize,
    stop: AtomicBool,
}

impl Progress {
    /// Bytes to be read in the background, those included that turn out to be in memory.
    pub fn n_bytes(&self) -> u64 {
        self.n_bytes
    }

    /// Bytes that have been read.
    pub fn n_read(&self) -> u64 {
        self.n_read.load(Ordering::Relaxed)
    }

    /// Whether nothing is being read any more.
    pub fn is_done(&self) -> bool {
        self.n_reader.load(Ordering::Acquire) == 0
    }
}

impl Loading {
    /// Begins to read a model that needs `need_bytes` of memory in all, of which the system says that `available_bytes` are there.
    pub fn start(file: &ModelFile, need_bytes: u64, available_bytes: Option<u64>) -> Loading {
        let tensors = in_order(&file.gguf);
        let is_cached = || tensors.iter().all(|t| is_cached(&file.mappings[t.part], bytes_of(t)));
        match available_bytes {
            Some(available_bytes) if available_bytes < need_bytes => {
                let experts: (Vec<_>, Vec<_>) = tensors.into_iter().partition(|t| t.name.ends_with("_exps.weight"));
                on_demand(file, experts, need_bytes, available_bytes)
            }
            Some(_) if !is_cached() => read(file, &tensors, Way::ReadAhead, need_bytes),
            _ => Loading { way: Way::Cached, progress: Arc::default(), readers: Vec::new() },
        }
    }

    /// How far the reading is, for whoever shows it.
    pub fn progress(&self) -> Arc<Progress> {
        self.progress.clone()
    }
}

impl Drop for Loading {
    fn drop(&mut self) {
        self.progress.stop.store(true, Ordering::Relaxed);
        for reader in self.readers.drain(..) {
            // One that panicked has said so; weights are then read by whoever touches them.
            let _ = reader.join();
        }
    }
}

/// Experts are left on disk until a step has chosen them. What every token needs is read, as long as there is room for the rest beside it.
fn on_demand(
    file: &ModelFile,
    (experts, others): (Vec<&TensorInfo>, Vec<&TensorInfo>),
    need_bytes: u64,
    available_bytes: u64,
) -> Loading {
    experts.iter().for_each(|t| file.mappings[t.part].read_at_random(bytes_of(t)));
    let way = Way::OnDemand { need_bytes, available_bytes };
    let n_bytes: u64 = others.iter().map(|t| t.n_bytes).sum();
    let others = if n_bytes <= available_bytes / 2 { others } else { Vec::new() };
    read(file, &others, way, n_bytes)
}

/// Reads tensors in the background, unless less than `need_bytes` of memory are left meanwhile.
fn read(file: &ModelFile, tensors: &[&TensorInfo], way: Way, need_bytes: u64) -> Loading {
    let n_bytes = tensors.iter().map(|t| t.n_bytes).sum();
    let mut loading =
        Loading { way, progress: Arc::new(Progress { n_bytes, ..Progress::default() }), readers: Vec::new() };
    let (mappings, pieces) = (file.mappings.clone(), pieces(tensors));
    match way {
        Way::OnDemand { .. } => mappings.iter().for_each(|m| m.expect_parts()),
        Way::ReadAhead | Way::Cached => mappings.iter().for_each(|m| m.expect_all()),
    }
    let reading = Arc::new(Reading { mappings, pieces, next: AtomicUsize::new(0), need_bytes });
    let n_core = std::thread::available_parallelism().map_or(1, |n| n.get());
    for _ in 0..(n_core / CORES_PER_READER).clamp(1, N_READER_MAX) {
        let (reading, progress) = (reading.clone(), loading.progress.clone());
        progress.n_reader.fetch_add(1, Ordering::Relaxed);
        let reader = std::thread::Builder::new().name("apr-reader".to_string()).spawn(move || reading.run(&progress));
        match reader {
            Ok(reader) => loading.readers.push(reader),
            // Weights are then read by whoever touches them.
            Err(_) => drop(loading.progress.n_reader.fetch_sub(1, Ordering::Relaxed)),
        }
    }
    loading
}

/// What the readers share.
struct Reading {
    mappings: Vec<Arc<Mapping>>,
    pieces: Vec<(usize, Range<usize>)>,
    next: AtomicUsize,
    need_bytes: u64,
}

impl Reading {
    /// A reader's life.
    fn run(&self, progress: &Progress) {
        self.read_pieces(progress);
        progress.n_reader.fetch_sub(1, Ordering::AcqRel);
    }

    /// Reads pieces until there are none left, or no memory for them.
    fn read_pieces(&self, progress: &Progress) {
        loop {
            let i = self.next.fetch_add(1, Ordering::Relaxed);
            let Some((part, range)) = self.pieces.get(i) else { return };
            // What has been read counts as available, so the need stays the same.
            if i.is_multiple_of(PIECES_PER_LOOK) && memory::shortage(self.need_bytes).is_some() {
                progress.stop.store(true, Ordering::Relaxed);
                self.mappings.iter().for_each(|m| m.expect_parts());
            }
            if progress.stop.load(Ordering::Relaxed) {
                return;
            }
            self.mappings[*part].read(range.clone());
            progress.n_read.fetch_add(range.len() as u64, Ordering::Relaxed);
        }
    }
}

/// Tensors in the order in which a forward pass needs them. Of the embedding table it needs a few rows only.
fn in_order(gguf: &Gguf) -> Vec<&TensorInfo> {
    let layer = |t: &TensorInfo| {
        let n = t.name.strip_prefix("blk.").and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
        n.unwrap_or(if t.name.starts_with("token_embd") { usize::MAX } else { usize::MAX - 1 })
    };
    let place = |t: &TensorInfo| (t.name.contains(".ffn_"), t.name.contains(".ffn_down"));
    let mut tensors: Vec<_> = gguf.tensors.iter().collect();
    tensors.sort_by_key(|t| (layer(t), place(t), t.part, t.offset));
    tensors
}

/// Parts and ranges of at most [`PIECE_BYTES`].
fn pieces(tensors: &[&TensorInfo]) -> Vec<(usize, Range<usize>)> {
    let cut = |t: &&TensorInfo| {
        let (part, range) = (t.part, bytes_of(t));
        let end = range.end;
        range.step_by(PIECE_BYTES).map(move |at| (part, at..(at + PIECE_BYTES).min(end))).collect::<Vec<_>>()
    };
    tensors.iter().flat_map(cut).collect()
}

/// Whether all of some pages spread over a range are in memory.
fn is_cached(mapping: &Mapping, range: Range<usize>) -> bool {
    let step = (mapping.as_ref().len() / N_SAMPLE_MAX).max(SAMPLE_STEP_MIN).next_multiple_of(PAGE_BYTES_MAX);
    let first = range.start / PAGE_BYTES_MAX * PAGE_BYTES_MAX;
    (first..range.end).step_by(step).all(|at| mapping.is_resident(at))
}

/// Where a tensor lies in its part.
fn bytes_of(t: &TensorInfo) -> Range<usize> {
    t.offset as usize..(t.offset + t.n_bytes) as usize
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::{Duration, Instant};

    use super::*;

    fn tiny() -> ModelFile {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/tiny-qwen3moe.gguf");
        ModelFile::open(Path::new(path)).unwrap()
    }

    fn wait(progress: &Progress) {
        let start = Instant::now();
        while !progress.is_done() {
            assert!(start.elapsed() < Duration::from_secs(60), "{} of {} bytes", progress.n_read(), progress.n_bytes());
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn tensors_come_in_the_order_of_the_pass() {
        let file = tiny();
        let names: Vec<&str> = in_order(&file.gguf).iter().map(|t| t.name.as_str()).collect();
        let at = |name: &str| names.iter().position(|n| *n == name).unwrap_or_else(|| panic!("{name} is there"));
        let in_pass = [
            "blk.0.attn_q.weight",
            "blk.0.ffn_gate_inp.weight",
            "blk.0.ffn_down_exps.weight",
            "blk.1.attn_q.weight",
            "output_norm.weight",
            "token_embd.weight",
        ];
        assert!(in_pass.windows(2).all(|w| at(w[0]) < at(w[1])), "{names:?}");
        assert!(at("blk.0.ffn_gate_exps.weight") < at("blk.0.ffn_down_exps.weight"));
        assert_eq!(names.len(), file.gguf.tensors.len());
    }

    #[test]
    fn pieces_are_the_tensors_without_gap_or_overlap() {
        let file = tiny();
        let mut large = file.gguf.tensors[0].clone();
        (large.offset, large.n_bytes) = (100, 2 * PIECE_BYTES as u64 + 1);
        let ranges: Vec<_> = pieces(&[&large]).into_iter().map(|(_, range)| range).collect();
        let end = 100 + 2 * PIECE_BYTES;
        assert_eq!(ranges, [100..100 + PIECE_BYTES, 100 + PIECE_BYTES..end, end..end + 1]);
        let total: usize = pieces(&in_order(&file.gguf)).iter().map(|(_, range)| range.len()).sum();
        assert_eq!(total as u64, file.gguf.tensors.iter().map(|t| t.n_bytes).sum::<u64>());
    }

    #[test]
    fn everything_is_read_once_and_nothing_is_asked_for() {
        let file = tiny();
        let loading = read(&file, &in_order(&file.gguf), Way::ReadAhead, 0);
        let progress = loading.progress();
        wait(&progress);
        assert_eq!(progress.n_read(), progress.n_bytes());
        assert!(!file.mappings[0].asks());
        assert_eq!(Loading::start(&file, 1, Some(u64::MAX)).way, Way::Cached, "what has been read is found in memory");
    }

    #[test]
    fn experts_are_left_on_disk_where_memory_is_short() {
        let file = tiny();
        let is_expert = |t: &&TensorInfo| t.name.ends_with("_exps.weight");
        let others: u64 = file.gguf.tensors.iter().filter(|t| !is_expert(t)).map(|t| t.n_bytes).sum();
        for (available, n_read) in [(2 * others, others), (2 * others - 1, 0)] {
            let loading = Loading::start(&file, u64::MAX, Some(available));
            wait(&loading.progress);
            assert_eq!(loading.progress.n_read(), n_read);
            assert!(file.mappings[0].asks(), "what is chosen is asked for, all the time");
        }
    }

    #[test]
    fn reading_ends_where_memory_becomes_short_and_when_it_is_dropped() {
        let file = tiny();
        let loading = read(&file, &in_order(&file.gguf), Way::ReadAhead, u64::MAX);
        wait(&loading.progress);
        assert_eq!(loading.progress.n_read(), 0, "no machine has that much");
        assert!(file.mappings[0].asks());
        // A tensor that is read over and over stands for a large file.
        let large = vec![in_order(&file.gguf)[0]; 1_000_000];
        let start = Instant::now();
        let loading = read(&file, &large, Way::ReadAhead, 0);
        let (progress, began) = (loading.progress(), start.elapsed());
        drop(loading);
        assert!(progress.is_done() && progress.n_read() < progress.n_bytes());
        assert!(start.elapsed() - began < Duration::from_secs(5));
    }
}
