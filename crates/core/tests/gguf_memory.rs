//! The heap that the GGUF reader takes for hostile files: a count or length in the file must not decide how much is
//! allocated. A binary of its own with a single test, as its allocator counts for the whole process.

#[path = "support/gguf_writer.rs"]
mod gguf_writer;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use apr_core::gguf::{Array, Value, parse};
use apr_core::qtype::GgmlType;
use gguf_writer::{GgufWriter, text};

const FIXTURE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/tiny-qwen3moe.gguf");
/// Bytes of heap for everything the test holds, the 5.6 MB of the fixture included.
const LIMIT: usize = 200 << 20;

struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to `System` with the same arguments; the counters do not touch the memory. `realloc` and
// `alloc_zeroed` keep their default implementations, which are built on these two.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let live = LIVE.fetch_add(layout.size(), Relaxed) + layout.size();
        PEAK.fetch_max(live, Relaxed);
        // SAFETY: the caller's promise about `layout` is the one that `System` asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the pointer came from `System` with this layout, as `alloc` above passes both on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Bytes of heap that parsing takes above what was live before, whether the file is accepted or refused.
fn peak_of(bytes: &[u8]) -> usize {
    let before = LIVE.load(Relaxed);
    PEAK.store(before, Relaxed);
    let result = parse(bytes);
    if let Err(e) = &result {
        assert!(!e.to_string().is_empty());
    }
    let peak = PEAK.load(Relaxed);
    assert!(peak < LIMIT, "the heap reached {peak} bytes with a file of {} bytes: {result:?}", bytes.len());
    peak - before
}

/// Numbers that overflow something, or ask for much that the rest of a file of `len` bytes seems to hold.
fn numbers(len: usize) -> [u64; 12] {
    let len = len as u64;
    let near = [len, len / 2, len / 8, len / 14, len / 33, len / 64];
    let far = [u64::MAX, i64::MAX as u64, u64::from(u32::MAX), 1 << 30, 1 << 26, 1 << 18];
    std::array::from_fn(|i| if i < 6 { near[i] } else { far[i - 6] })
}

/// Puts every number at every `step`th position of the first `header` bytes, one at a time.
fn mutate(file: &mut [u8], header: usize, step: usize) {
    for at in (0..header).step_by(step) {
        let original: [u8; 8] = file[at..at + 8].try_into().unwrap();
        for n in numbers(file.len()) {
            file[at..at + 8].copy_from_slice(&n.to_le_bytes());
            peak_of(file);
        }
        file[at..at + 8].copy_from_slice(&original);
    }
}

/// Files of about `len` bytes that hold as many small things as fit, each the dearest of its kind.
fn crowded(len: usize) -> Vec<Vec<u8>> {
    let strings = Array::String(vec![String::new(); len / 8]);
    let keys = (0..len / 20).fold(GgufWriter::new(), |w, i| {
        let key = format!("{i:07}");
        w.raw_meta([text(key.as_bytes()), 0u32.to_le_bytes().to_vec(), vec![0]].concat())
    });
    let short_strings = Array::String(vec!["a".into(); len / 9]);
    let tensors =
        (0..len / 70).fold(GgufWriter::new(), |w, i| w.zeros(&format!("{i:06}"), GgmlType::F32, &[1, 1, 1, 1]));
    vec![
        GgufWriter::new().array("k", strings).bytes(),
        GgufWriter::new().array("k", short_strings).bytes(),
        GgufWriter::new().meta("k", &Value::Array(Array::U8(vec![0; len]))).bytes(),
        keys.bytes(),
        tensors.bytes(),
    ]
}

#[test]
fn the_heap_stays_small_whatever_the_file_claims() {
    let mut tiny = GgufWriter::new()
        .split(0, 1, 2)
        .strings("tokens", &["a", "b", ""])
        .array("scores", Array::F32(vec![0.0; 8]))
        .zeros("a", GgmlType::F32, &[8])
        .zeros("b", GgmlType::Q4_K, &[256, 2])
        .bytes();
    let header = tiny.len() - 8;
    mutate(&mut tiny, header, 1);

    let mut real = std::fs::read(FIXTURE).unwrap();
    // All of the first keys and the start of the vocabulary byte by byte; strided through the rest of the header, with a
    // stride that meets every alignment.
    mutate(&mut real, 1_500, 1);
    mutate(&mut real, 61_260, 61);

    for file in crowded(2 << 20) {
        let peak = peak_of(&file);
        assert!(peak < 16 * file.len(), "{peak} bytes of heap for a file of {} bytes", file.len());
    }
}
