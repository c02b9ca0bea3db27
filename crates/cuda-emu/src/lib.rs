//! A device without a GPU: the CUDA backend's kernels, compiled as C++ and run on the host, a fiber for every thread.
//!
//! It shows what a kernel computes, that no thread needs another's work before it is done, and that nothing outside its memory is
//! touched. It cannot show that NVIDIA's instructions do what the emulation takes them to do.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use apr_cuda::driver::{Arg, Description, Driver, DriverError, Launch, Result};

/// The folder of a `libcuda.so` that stands in for NVIDIA's driver: a program that is started with it in the loader's path finds a
/// GPU. What it checks, and what it reads of the environment, is in `libcuda.cpp`.
pub const LIBCUDA_FOLDER: &str = concat!(env!("OUT_DIR"), "/driver");

/// The order in which the threads of a block run from one barrier to the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    Ascending,
    Descending,
    /// Another one every time, from this seed.
    Shuffled(u64),
}

/// A device whose threads run on the host.
pub struct Emulated {
    description: Description,
    used_bytes: AtomicU64,
    order: Order,
}

/// A device that runs threads in an order.
pub fn connect(order: Order) -> Arc<dyn Driver> {
    connect_with(order, 1 << 34)
}

/// As [`connect`], a device that has so much memory.
pub fn connect_with(order: Order, total_bytes: u64) -> Arc<dyn Driver> {
    let description = Description { name: "emulation".to_string(), arch: 0, n_sm: 2, total_bytes };
    Arc::new(Emulated { description, used_bytes: AtomicU64::new(0), order })
}

/// Names of all kernels.
pub fn kernels() -> Vec<String> {
    (0..)
        .map(|i| {
            // SAFETY: any number may be asked for; past the last it gives null.
            unsafe { apr_emulation_kernel(i) }
        })
        .take_while(|name| !name.is_null())
        .map(|name| {
            // SAFETY: a name is a string in the program's own data.
            unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
        })
        .collect()
}

impl Emulated {
    fn launch(&self, launch: &Launch) -> Result<()> {
        let args: Vec<u64> = launch.args.iter().map(|a| a.word()).collect();
        let kinds: String = launch.args.iter().map(|a: &Arg| a.letter()).collect();
        let (name, kinds) = (CString::new(launch.kernel), CString::new(kinds));
        let (name, kinds) = (name.expect("names have no zeros"), kinds.expect("letters are not zero"));
        let (order, seed) = match self.order {
            Order::Ascending => (0, 0),
            Order::Descending => (1, 0),
            Order::Shuffled(seed) => (2, seed),
        };
        let mut error = [0u8; 256];
        // SAFETY: the strings end with zeros and live through the call, the kernel checks number and kinds of its arguments, and
        // what they point to is the caller's promise.
        let rc = unsafe {
            apr_emulation_launch(
                name.as_ptr(),
                launch.grid.as_ptr(),
                launch.threads,
                args.as_ptr(),
                kinds.as_ptr(),
                order,
                seed,
                error.as_mut_ptr().cast(),
                error.len(),
            )
        };
        if rc == 0 {
            return Ok(());
        }
        let what = CStr::from_bytes_until_nul(&error).map_or("no reason given".into(), |e| e.to_string_lossy());
        Err(DriverError::Failed(format!(
            "kernel {}: {what}, launched with '{}'",
            launch.kernel,
            kinds.to_string_lossy()
        )))
    }
}

impl Driver for Emulated {
    fn description(&self) -> &Description {
        &self.description
    }

    fn free_bytes(&self) -> Result<u64> {
        Ok(self.description.total_bytes.saturating_sub(self.used_bytes.load(Ordering::Relaxed)))
    }

    fn alloc(&self, n_bytes: usize) -> Result<u64> {
        let out_of_memory = Err(DriverError::OutOfMemory { need_bytes: n_bytes });
        if n_bytes as u64 > self.free_bytes()? {
            return out_of_memory;
        }
        // SAFETY: any size may be asked for.
        let at = unsafe { apr_emulation_alloc(n_bytes) };
        if at.is_null() {
            return out_of_memory;
        }
        self.used_bytes.fetch_add(n_bytes as u64, Ordering::Relaxed);
        Ok(at as u64)
    }

    unsafe fn free(&self, at: u64, n_bytes: usize) {
        self.used_bytes.fetch_sub(n_bytes as u64, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { apr_emulation_free(at as *mut c_void, n_bytes) }
    }

    unsafe fn write(&self, to: u64, bytes: &[u8]) -> Result<()> {
        // SAFETY: the caller's promise; a slice does not overlap memory that only addresses name.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to as *mut u8, bytes.len()) }
        Ok(())
    }

    unsafe fn read(&self, from: u64, bytes: &mut [u8]) -> Result<()> {
        // SAFETY: as for writing.
        unsafe { std::ptr::copy_nonoverlapping(from as *const u8, bytes.as_mut_ptr(), bytes.len()) }
        Ok(())
    }

    unsafe fn run(&self, launches: &[Launch], _: bool) -> Result<()> {
        launches.iter().try_for_each(|launch| self.launch(launch))
    }
}

// What `emulation.cpp` offers.
unsafe extern "C" {
    fn apr_emulation_launch(
        name: *const c_char,
        grid: *const u32,
        threads: u32,
        args: *const u64,
        kinds: *const c_char,
        order: u32,
        seed: u64,
        error: *mut c_char,
        error_bytes: usize,
    ) -> c_int;
    fn apr_emulation_kernel(i: u32) -> *const c_char;
    fn apr_emulation_alloc(n_bytes: usize) -> *mut c_void;
    fn apr_emulation_free(at: *mut c_void, n_bytes: usize);
}
