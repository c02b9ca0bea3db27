//! How many kernels a decode step launches and how often it is written to: what it costs to begin a kernel or a copy is a good part of a
//! step on a GPU, so their number may not creep up, and looking on may not change which values they give.

#[path = "support/devices.rs"]
mod devices;
#[path = "../../core/tests/support/runs.rs"]
mod runs;

use std::sync::{Arc, Mutex};

use apr_core::backend::KvType;
use apr_core::probe::Recorder;
use apr_core::stage::Stage;
use apr_cuda::CudaBackend;
use apr_cuda::driver::{Description, Driver, Launch, Result};
use apr_cuda_emu::{Order, connect};
use runs::Run;

const TINY: &str = "tiny-qwen3moe.gguf";
const N_LAYER: usize = 4;

/// A device that keeps the launches of its last step, and how often it has been written to.
struct Counting(Arc<dyn Driver>, Mutex<(Vec<Launch>, usize)>);

impl Driver for Counting {
    fn description(&self) -> &Description {
        self.0.description()
    }
    fn free_bytes(&self) -> Result<u64> {
        self.0.free_bytes()
    }
    fn alloc(&self, n_bytes: usize) -> Result<u64> {
        self.0.alloc(n_bytes)
    }
    unsafe fn free(&self, at: u64, n_bytes: usize) {
        // SAFETY: the caller's promise.
        unsafe { self.0.free(at, n_bytes) }
    }
    unsafe fn write(&self, to: u64, bytes: &[u8]) -> Result<()> {
        self.1.lock().unwrap().1 += 1;
        // SAFETY: the caller's promise.
        unsafe { self.0.write(to, bytes) }
    }
    unsafe fn read(&self, from: u64, bytes: &mut [u8]) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.0.read(from, bytes) }
    }
    unsafe fn run(&self, launches: &[Launch], step: bool) -> Result<()> {
        if step {
            self.1.lock().unwrap().0 = launches.to_vec();
        }
        // SAFETY: the caller's promise.
        unsafe { self.0.run(launches, step) }
    }
}

/// Kernels of a step in which sequences of `n` tokens each are given another one, `file` being the model.
fn kernels_of_a_decode(file: &str, n: usize, n_sequences: usize) -> Vec<&'static str> {
    let driver = Arc::new(Counting(connect(Order::Ascending), Mutex::default()));
    let mut run = Run::new(CudaBackend::new(driver.clone()), file, KvType::F16, |_| {});
    let tokens: Vec<u32> = (0..n as u32).map(|i| 3 + i % 200).collect();
    let mut none = Recorder::of(&[]);
    let step = |from: usize, to: usize| (0..n_sequences).map(move |s| (s, from, to));
    for (from, to) in [(0, n - 1), (n - 1, n)] {
        let parts: Vec<_> = step(from, to).map(|(s, from, to)| (s, &tokens[from..to], from, 1)).collect();
        run.step_many(&parts, &mut none);
    }
    run.last_logits();
    let kernels: Vec<_> = driver.1.lock().unwrap().0.iter().map(|l| l.kernel).collect();
    println!("{file}, {n_sequences} sequences of {n}: {} launches: {kernels:?}", kernels.len());
    kernels
}

#[test]
fn a_decode_step_launches_nine_kernels_per_layer() {
    // Besides: tokens, angles, the last norm, the head. Contexts of more than a KV block are put together by one more per layer.
    assert_eq!(kernels_of_a_decode(TINY, 20, 1).len(), 4 + 9 * N_LAYER);
    assert_eq!(kernels_of_a_decode(TINY, 100, 1).len(), 4 + 10 * N_LAYER);
    // Slots of many sequences are sorted by expert, and summed up by themselves.
    assert_eq!(kernels_of_a_decode(TINY, 20, 6).len(), 4 + 11 * N_LAYER);
}

#[test]
fn a_decode_step_takes_one_copy_and_is_the_same_as_the_one_before() {
    let driver = Arc::new(Counting(connect(Order::Ascending), Mutex::default()));
    let mut run = Run::new(CudaBackend::new(driver.clone()), TINY, KvType::F16, |_| {});
    let mut decode = |position: usize| {
        let n_before = driver.1.lock().unwrap().1;
        run.step(&[9], position, 1, &mut Recorder::of(&[]));
        let (launches, n_writes) = driver.1.lock().unwrap().clone();
        (launches, n_writes - n_before)
    };
    // The first makes the buffers.
    decode(0);
    let (first, n_copies) = decode(1);
    let (second, n_copies_again) = decode(2);
    assert_eq!((n_copies, n_copies_again), (1, 1), "tokens, positions and where keys and values lie go together");
    assert!(first == second, "a step of the same shape is replayed");
}

#[test]
fn a_decode_step_of_a_dense_model_launches_eight_kernels_per_layer() {
    assert_eq!(kernels_of_a_decode("arch/qwen3.gguf", 20, 1).len(), 4 + 8 * 2);
}

#[test]
fn decodes_are_the_same_with_a_probe_between_any_two_ops() {
    let tokens: Vec<u32> = (0..12).map(|i| 7 * i + 5).collect();
    let decode = |probe: &mut Recorder| {
        let mut run = Run::new(devices::emulated(), TINY, KvType::F16, |_| {});
        tokens.iter().enumerate().for_each(|(i, token)| run.step(std::slice::from_ref(token), i, 1, probe));
        run.last_logits()
    };
    let alone = decode(&mut Recorder::of(&[]));
    for stage in Stage::all() {
        assert!(decode(&mut Recorder::of(&[stage])) == alone, "bitwise the same with a probe at {}", stage.name());
    }
}
