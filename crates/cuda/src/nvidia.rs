//! NVIDIA GPUs through their driver, which is loaded when it is asked for: `apr` builds and starts without it.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::{Arc, Mutex, MutexGuard};

use cudarc::driver::{DriverError as Raw, result, sys};

use crate::compile::{Toolchain, modules};
use crate::driver::{Description, Driver, DriverError, Launch, Result};
use crate::nvrtc::NvrtcError;

/// Why there is no GPU to compute on.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("no GPU: NVIDIA's driver (libcuda) is not found; install it, or leave --gpu out to run on the CPU")]
    NoDriver,
    #[error("no GPU: NVIDIA's driver does not start: {0}; leave --gpu out to run on the CPU")]
    Init(String),
    #[error("no GPU: NVIDIA's driver lists none that this process may use; leave --gpu out to run on the CPU")]
    NoDevice,
    #[error("GPU {ordinal} does not exist: there are {n}, numbered from 0")]
    Ordinal { ordinal: usize, n: usize },
    #[error("{name} has compute capability {}.{}, apr's kernels need 8.0 (Ampere) or newer", .arch / 10, .arch % 10)]
    TooOld { name: String, arch: u32 },
    #[error("{0}")]
    Nvrtc(#[from] NvrtcError),
    #[error("{0}: {1}")]
    Failed(String, String),
}

/// The oldest architecture with the instructions that the kernels use.
pub const ARCH_MIN: u32 = 80;

/// Launches in the graphs that are kept, about 64 steps of a large model: a step's shapes are few at a time. One that goes to the host
/// and back in every layer is as many graphs.
const N_LAUNCH_MAX: usize = 1 << 15;

/// A GPU, its kernels loaded.
struct Nvidia {
    description: Description,
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    modules: Vec<sys::CUmodule>,
    /// Held by whoever puts something on the stream: while one thread records a graph, what another puts there would be in it.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    functions: HashMap<&'static str, Function>,
    /// Steps that have been run, by a fingerprint of their launches.
    steps: HashMap<u64, Step>,
    n_steps: u64,
}

#[derive(Clone, Copy)]
struct Function(sys::CUfunction);

/// A step that comes for the second time is recorded, and replayed from then on.
struct Step {
    launches: Vec<Launch>,
    graph: Option<Graph>,
    last_used: u64,
}

struct Graph {
    graph: sys::CUgraph,
    exec: sys::CUgraphExec,
}

// SAFETY: contexts, streams, modules and graphs are handles that the driver guards itself; each call makes the context current on
// its own thread first.
unsafe impl Send for Nvidia {}
// SAFETY: as above, and what changes lies behind a mutex.
unsafe impl Sync for Nvidia {}
// SAFETY: handles of the driver.
unsafe impl Send for Function {}
// SAFETY: handles of the driver.
unsafe impl Send for Graph {}

fn text(e: Raw) -> String {
    let name = |s: std::result::Result<&std::ffi::CStr, Raw>| s.map(|s| s.to_string_lossy().into_owned());
    match (name(e.error_name()), name(e.error_string())) {
        (Ok(name), Ok(what)) => format!("{what} ({name})"),
        _ => format!("error {:?}", e.0),
    }
}

fn failed(e: Raw) -> DriverError {
    DriverError::Failed(text(e))
}

/// What GPUs there are.
///
/// # Errors
/// No driver, or one that does not start.
pub fn devices() -> std::result::Result<Vec<Description>, ConnectError> {
    // SAFETY: loading NVIDIA's driver runs nothing but its initialisers.
    if !unsafe { sys::is_culib_present() } {
        return Err(ConnectError::NoDriver);
    }
    match result::init() {
        Ok(()) => {}
        Err(Raw(sys::CUresult::CUDA_ERROR_NO_DEVICE)) => return Err(ConnectError::NoDevice),
        Err(e) => return Err(ConnectError::Init(text(e))),
    }
    let n = result::device::get_count().map_err(|e| ConnectError::Init(text(e)))?;
    (0..n).map(|i| describe(i).map_err(|e| ConnectError::Init(text(e)))).collect()
}

fn describe(ordinal: i32) -> std::result::Result<Description, Raw> {
    use sys::CUdevice_attribute as Attribute;
    let device = result::device::get(ordinal)?;
    // SAFETY: the device exists.
    let attribute = |a| unsafe { result::device::get_attribute(device, a) };
    Ok(Description {
        name: result::device::get_name(device)?,
        arch: (10 * attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?
            + attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?) as u32,
        n_sm: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32,
        // SAFETY: the device exists.
        total_bytes: unsafe { result::device::total_mem(device)? } as u64,
    })
}

/// The driver's version as NVIDIA counts CUDA's, 13010 for 13.1. There is a driver.
///
/// # Errors
/// A driver that does not tell.
pub fn driver_version() -> std::result::Result<u32, ConnectError> {
    let mut version = 0;
    // SAFETY: an integer to write to.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result().map_err(|e| ConnectError::Init(text(e)))?;
    Ok(version as u32)
}

/// A GPU by its number, with all kernels compiled and loaded.
///
/// # Errors
/// What is missing, and what to do about it.
pub fn connect(ordinal: usize, toolchain: &Toolchain) -> std::result::Result<Arc<dyn Driver>, ConnectError> {
    let devices = devices()?;
    let n = devices.len();
    if n == 0 {
        return Err(ConnectError::NoDevice);
    }
    let description = devices.into_iter().nth(ordinal).ok_or(ConnectError::Ordinal { ordinal, n })?;
    let (name, arch) = (description.name.clone(), description.arch);
    if arch < ARCH_MIN {
        return Err(ConnectError::TooOld { name, arch });
    }
    let failed = |e: Raw| ConnectError::Failed(name.clone(), text(e));
    let code = modules(toolchain, arch, driver_version()?)?;
    Ok(Arc::new(Nvidia::new(ordinal as i32, description, &code).map_err(failed)?))
}

impl Nvidia {
    fn new(ordinal: i32, description: Description, code: &[Vec<u8>]) -> std::result::Result<Nvidia, Raw> {
        let device = result::device::get(ordinal)?;
        // SAFETY: the device exists; its context is released when this is dropped, and current before anything else is asked for.
        let context = unsafe {
            let context = result::primary_ctx::retain(device)?;
            result::ctx::set_current(context)?;
            context
        };
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking)?;
        let load = |code: &Vec<u8>| {
            // SAFETY: whole machine code as the compiler gave it.
            unsafe { result::module::load_data(code.as_ptr().cast()) }
        };
        let modules = code.iter().map(load).collect::<std::result::Result<Vec<_>, Raw>>()?;
        Ok(Nvidia { description, device, context, stream, modules, state: Mutex::default() })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn make_current(&self) -> Result<()> {
        // SAFETY: the context lives as long as this.
        unsafe { result::ctx::set_current(self.context) }.map_err(failed)
    }

    fn function(&self, functions: &mut HashMap<&'static str, Function>, name: &'static str) -> Result<Function> {
        if let Some(&function) = functions.get(name) {
            return Ok(function);
        }
        for &module in &self.modules {
            let name_text = CString::new(name).expect("names have no zeros");
            // SAFETY: the module is loaded.
            if let Ok(f) = unsafe { result::module::get_function(module, name_text) } {
                functions.insert(name, Function(f));
                return Ok(Function(f));
            }
        }
        Err(DriverError::Failed(format!("there is no kernel {name}")))
    }

    /// Puts launches on the stream.
    fn enqueue(&self, state: &mut State, launches: &[Launch]) -> Result<()> {
        for launch in launches {
            let function = self.function(&mut state.functions, launch.kernel)?;
            let mut words: Vec<u64> = launch.args.iter().map(|a| a.word()).collect();
            let mut args: Vec<*mut c_void> = words.iter_mut().map(|w| (w as *mut u64).cast()).collect();
            let (grid, block) = (launch.grid.into(), (launch.threads, 1, 1));
            // SAFETY: the arguments are as many as the kernel has and of its kinds, which the emulation checks for every launch
            // of the tests; a little-endian word begins with its low bytes. Where they point to is the caller's promise.
            unsafe { result::launch_kernel(function.0, grid, block, 0, self.stream, &mut args) }
                .map_err(|e| DriverError::Failed(format!("kernel {}: {}", launch.kernel, text(e))))?;
        }
        Ok(())
    }

    /// Records launches as a graph.
    fn record(&self, state: &mut State, launches: &[Launch]) -> Result<Graph> {
        use sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL as THREAD_LOCAL;
        // SAFETY: the stream is this device's, and nothing but launches is put on it until the capture ends.
        unsafe { result::stream::begin_capture(self.stream, THREAD_LOCAL) }.map_err(failed)?;
        let enqueued = self.enqueue(state, launches);
        // SAFETY: the capture began above.
        let graph = unsafe { result::stream::end_capture(self.stream) }.map_err(failed)?;
        let mut exec = std::ptr::null_mut();
        let instantiated = enqueued.and_then(|()| {
            // SAFETY: the graph was just recorded.
            unsafe { sys::cuGraphInstantiateWithFlags(&mut exec, graph, 0) }.result().map_err(failed)
        });
        if let Err(e) = instantiated {
            // SAFETY: nothing has been made of the graph.
            let _ = unsafe { result::graph::destroy(graph) };
            return Err(e);
        }
        Ok(Graph { graph, exec })
    }

    fn step(&self, launches: &[Launch]) -> Result<()> {
        let mut state = self.state();
        let state = &mut *state;
        state.n_steps += 1;
        let (now, key) = (state.n_steps, fingerprint(launches));
        let mut step = match state.steps.remove(&key) {
            Some(step) if step.launches == launches => step,
            other => {
                self.forget(other)?;
                self.make_room(state, launches.len())?;
                state.steps.insert(key, Step { launches: launches.to_vec(), graph: None, last_used: now });
                return self.enqueue(state, launches);
            }
        };
        if step.graph.is_none() {
            step.graph = Some(self.record(state, launches)?);
        }
        step.last_used = now;
        let exec = step.graph.as_ref().expect("it was just recorded").exec;
        state.steps.insert(key, step);
        // SAFETY: the graph's launches are these, and what their addresses are is the caller's promise.
        unsafe { result::graph::launch(exec, self.stream) }.map_err(failed)
    }

    /// Makes room for another step, by forgetting those that have not come for the longest time.
    fn make_room(&self, state: &mut State, n_launches: usize) -> Result<()> {
        let mut n: usize = state.steps.values().map(|s| s.launches.len()).sum();
        while n > 0 && n + n_launches > N_LAUNCH_MAX {
            let oldest = state.steps.iter().min_by_key(|(_, s)| s.last_used).map(|(k, _)| *k);
            let step = oldest.and_then(|k| state.steps.remove(&k));
            n -= step.as_ref().map_or(n, |s| s.launches.len());
            self.forget(step)?;
        }
        Ok(())
    }

    fn forget(&self, step: Option<Step>) -> Result<()> {
        if let Some(step) = step {
            // What is destroyed may still run.
            self.wait()?;
            destroy(step);
        }
        Ok(())
    }

    fn wait(&self) -> Result<()> {
        // SAFETY: the stream is this device's.
        unsafe { result::stream::synchronize(self.stream) }.map_err(failed)
    }
}

/// A number that other launches hardly have; who goes by it compares the launches too.
fn fingerprint(launches: &[Launch]) -> u64 {
    let mix = |hash: u64, word: u64| (hash ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(23);
    launches.iter().fold(launches.len() as u64, |hash, launch| {
        // Names are constants of the program: where one lies tells it.
        let hash = mix(hash, launch.kernel.as_ptr() as u64);
        let hash = launch.grid.iter().fold(hash, |hash, &n| mix(hash, n.into()));
        launch.args.iter().fold(hash, |hash, arg| mix(hash, arg.word()))
    })
}

fn destroy(step: Step) {
    if let Some(Graph { graph, exec }) = step.graph {
        // SAFETY: both are whole and not used again. A driver that refuses has lost the device and them with it.
        unsafe {
            let _ = result::graph::exec_destroy(exec);
            let _ = result::graph::destroy(graph);
        }
    }
}

impl Driver for Nvidia {
    fn description(&self) -> &Description {
        &self.description
    }

    fn free_bytes(&self) -> Result<u64> {
        self.make_current()?;
        Ok(result::mem_get_info().map_err(failed)?.0 as u64)
    }

    fn alloc(&self, n_bytes: usize) -> Result<u64> {
        self.make_current()?;
        // SAFETY: any size above zero may be asked for.
        match unsafe { result::malloc_sync(n_bytes) } {
            Ok(at) => Ok(at),
            Err(Raw(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => Err(DriverError::OutOfMemory { need_bytes: n_bytes }),
            Err(e) => Err(failed(e)),
        }
    }

    unsafe fn free(&self, at: u64, _: usize) {
        let _state = self.state();
        if self.make_current().is_ok() {
            let _ = self.wait();
            // SAFETY: the caller's promise. A driver that refuses has lost the device and the memory with it.
            let _ = unsafe { result::free_sync(at) };
        }
    }

    unsafe fn write(&self, to: u64, bytes: &[u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let _state = self.state();
        self.make_current()?;
        // SAFETY: the caller's promise. The bytes are not let go of before the copy is done: a driver need not have taken one of its
        // own when the call returns.
        unsafe { result::memcpy_htod_async(to, bytes, self.stream) }.map_err(failed)?;
        self.wait()
    }

    unsafe fn read(&self, from: u64, bytes: &mut [u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let _state = self.state();
        self.make_current()?;
        // SAFETY: the caller's promise.
        unsafe { result::memcpy_dtoh_async(bytes, from, self.stream) }.map_err(failed)?;
        self.wait()
    }

    unsafe fn run(&self, launches: &[Launch], step: bool) -> Result<()> {
        self.make_current()?;
        if step { self.step(launches) } else { self.enqueue(&mut self.state(), launches) }
    }
}

impl Drop for Nvidia {
    fn drop(&mut self) {
        if self.make_current().is_err() {
            return;
        }
        let _ = self.wait();
        self.state().steps.drain().for_each(|(_, step)| destroy(step));
        // SAFETY: nothing of this device is used again. A driver that refuses has lost the device and all of it.
        unsafe {
            self.modules.iter().for_each(|&module| {
                let _ = result::module::unload(module);
            });
            let _ = result::stream::destroy(self.stream);
            let _ = result::primary_ctx::release(self.device);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::Arg;

    #[test]
    fn launches_that_differ_in_anything_have_other_fingerprints() {
        let launch = |kernel, n: u32, at: u64| {
            let args = vec![Arg::Address(at), Arg::U32(n)];
            Launch { kernel, grid: [n, 1, 1], threads: 32, args }
        };
        let all = [
            vec![launch("add", 1, 16)],
            vec![launch("mul", 1, 16)],
            vec![launch("add", 2, 16)],
            vec![launch("add", 1, 32)],
            vec![launch("add", 1, 16), launch("mul", 1, 16)],
            vec![launch("mul", 1, 16), launch("add", 1, 16)],
        ];
        let distinct: std::collections::HashSet<u64> = all.iter().map(|launches| fingerprint(launches)).collect();
        assert_eq!(distinct.len(), all.len());
        assert_eq!(fingerprint(&all[4].clone()), fingerprint(&all[4]));
    }
}
