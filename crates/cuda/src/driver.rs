//! What the backend needs of a device: memory, copies, and kernels run in order.
//!
//! [`Driver`] is what stands between the ops and NVIDIA's driver, so that the same ops also run on the emulation that tests use.

use std::fmt;

/// Why a device does not do what it is asked to.
#[derive(Clone, Debug, thiserror::Error)]
pub enum DriverError {
    #[error("out of device memory: {need_bytes} bytes more do not fit")]
    OutOfMemory { need_bytes: usize },
    #[error("{0}")]
    Failed(String),
}

/// Result of a device's work.
pub type Result<T> = std::result::Result<T, DriverError>;

/// What a device is.
#[derive(Clone, Debug, PartialEq)]
pub struct Description {
    /// For people, as `NVIDIA H200`.
    pub name: String,
    /// Compute capability, as 90 for 9.0.
    pub arch: u32,
    /// Multiprocessors.
    pub n_sm: u32,
    /// Device memory in all.
    pub total_bytes: u64,
}

/// One kernel over a grid.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Launch {
    pub kernel: &'static str,
    /// Blocks along x, y and z.
    pub grid: [u32; 3],
    /// Threads of a block, as the kernel is written for.
    pub threads: u32,
    /// The kernel's arguments, in order.
    pub args: Vec<Arg>,
}

/// A kernel's argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Arg {
    /// An address in device memory, or 0.
    Address(u64),
    U32(u32),
    /// The bits of a float.
    F32(u32),
}

impl Arg {
    /// The argument in the low bytes of a word.
    pub fn word(self) -> u64 {
        match self {
            Arg::Address(at) => at,
            Arg::U32(v) | Arg::F32(v) => u64::from(v),
        }
    }

    /// A letter for its kind: `p`, `u` or `f`.
    pub fn letter(self) -> char {
        match self {
            Arg::Address(_) => 'p',
            Arg::U32(_) => 'u',
            Arg::F32(_) => 'f',
        }
    }
}

impl From<u32> for Arg {
    fn from(v: u32) -> Arg {
        Arg::U32(v)
    }
}

impl From<usize> for Arg {
    fn from(v: usize) -> Arg {
        Arg::U32(u32::try_from(v).expect("sizes of a step fit 32 bits"))
    }
}

impl From<bool> for Arg {
    fn from(v: bool) -> Arg {
        Arg::U32(u32::from(v))
    }
}

impl From<f32> for Arg {
    fn from(v: f32) -> Arg {
        Arg::F32(v.to_bits())
    }
}

/// A device. Its work is done in the order it was asked for.
pub trait Driver: Send + Sync {
    /// What the device is.
    fn description(&self) -> &Description;

    /// Device memory that nobody has taken.
    fn free_bytes(&self) -> Result<u64>;

    /// Memory of `n_bytes`, at an address that is a multiple of 16.
    fn alloc(&self, n_bytes: usize) -> Result<u64>;

    /// Gives memory back, once the work that was asked for before is done.
    ///
    /// # Safety
    /// `at` came from [`alloc`](Self::alloc) with this size and is not used again.
    unsafe fn free(&self, at: u64, n_bytes: usize);

    /// Copies bytes to the device. They may be changed once this returns.
    ///
    /// # Safety
    /// `to` has room for them in memory of this device.
    unsafe fn write(&self, to: u64, bytes: &[u8]) -> Result<()>;

    /// Copies bytes from the device, once the work that was asked for before is done.
    ///
    /// # Safety
    /// `from` has as many bytes in memory of this device.
    unsafe fn read(&self, from: u64, bytes: &mut [u8]) -> Result<()>;

    /// Runs kernels one after the other. A `step` comes again and again, its launches unchanged: a device may record and replay it.
    ///
    /// # Safety
    /// Every address among the arguments is that of memory of this device, as large as the kernel reads or writes there.
    unsafe fn run(&self, launches: &[Launch], step: bool) -> Result<()>;
}

impl fmt::Debug for dyn Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.description().fmt(f)
    }
}
