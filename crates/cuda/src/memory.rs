//! Device memory that gives itself back, and the queue of launches that use it.

use std::sync::{Arc, Mutex, MutexGuard};

use crate::driver::{Arg, Driver, Launch, Result};

/// A device and the launches that wait for it. A step's launches are collected, so that the device gets them as one.
#[derive(Clone)]
pub(crate) struct Device {
    driver: Arc<dyn Driver>,
    queue: Arc<Mutex<Queue>>,
}

#[derive(Default)]
struct Queue {
    launches: Vec<Launch>,
    /// Whether what waits began with a step and nothing of the step has been run yet.
    is_step: bool,
    /// Bytes that are to be on the device before the launches run, and where.
    staged: Vec<(u64, Vec<u8>)>,
    /// What the last launch writes, if its kernel, or another in its place, can do more with that.
    open: Option<Arg>,
}

/// Memory of a device.
pub(crate) struct Buffer {
    device: Device,
    at: u64,
    n_bytes: usize,
}

impl Device {
    pub fn new(driver: Arc<dyn Driver>) -> Device {
        Device { driver, queue: Arc::default() }
    }

    pub fn driver(&self) -> &dyn Driver {
        &*self.driver
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Memory whose content is not defined yet.
    pub fn alloc(&self, n_bytes: usize) -> Result<Buffer> {
        let at = self.driver.alloc(n_bytes.max(1))?;
        Ok(Buffer { device: self.clone(), at, n_bytes })
    }

    /// Memory with this content.
    pub fn alloc_with(&self, bytes: &[u8]) -> Result<Buffer> {
        let mut buffer = self.alloc(bytes.len())?;
        buffer.write(0, bytes)?;
        Ok(buffer)
    }

    /// Puts a launch at the end of the queue. One without blocks is none.
    pub fn launch(&self, kernel: &'static str, threads: u32, grid: [usize; 3], args: &[Arg]) {
        let grid = grid.map(|n| u32::try_from(n).expect("a grid's sizes fit 32 bits"));
        if !grid.contains(&0) {
            self.push(Launch { kernel, grid, threads, args: args.to_vec() });
        }
    }

    /// As [`launch`](Self::launch), of a kernel that writes all of the tensor that is its first argument, and leaves to the op that
    /// comes next to do more with it in the same launch.
    pub fn launch_open(&self, kernel: &'static str, threads: u32, grid: [usize; 3], args: &[Arg]) {
        if !grid.contains(&0) {
            self.launch(kernel, threads, grid, args);
            self.queue().open = Some(args[0]);
        }
    }

    /// Puts a launch at the end of the queue.
    pub fn push(&self, launch: Launch) {
        let mut queue = self.queue();
        queue.open = None;
        queue.launches.push(launch);
    }

    /// The launch at the end of the queue, out of it, if it was left open with `written` and `kernel` names one that does what it does
    /// and more. Whoever takes it puts it back with what that one needs: an op that does not come directly behind another, because
    /// somebody has looked at what lies between them, is launched by itself.
    pub fn take_open(&self, written: Arg, kernel: impl FnOnce(&Launch) -> Option<&'static str>) -> Option<Launch> {
        let mut queue = self.queue();
        let last = queue.launches.last().filter(|_| queue.open == Some(written))?;
        let kernel = kernel(last)?;
        queue.launches.pop().map(|launch| Launch { kernel, ..launch })
    }

    /// Writes bytes at an offset before the launches run that wait: those that lie side by side in one copy.
    pub fn stage(&self, to: &Buffer, offset: usize, bytes: &[u8]) {
        let at = to.address(offset);
        assert!(offset + bytes.len() <= to.n_bytes, "{} bytes at {offset} fit {}", bytes.len(), to.n_bytes);
        let mut queue = self.queue();
        match queue.staged.last_mut().filter(|(begin, run)| begin + run.len() as u64 == at) {
            Some((_, run)) => run.extend_from_slice(bytes),
            None => queue.staged.push((at, bytes.to_vec())),
        }
    }

    /// Begins a step: what is launched until the next flush is replayed where it has been seen before.
    pub fn begin_step(&self) -> Result<()> {
        self.flush()?;
        self.queue().is_step = true;
        Ok(())
    }

    /// Hands the queue to the device.
    pub fn flush(&self) -> Result<()> {
        let mut queue = self.queue();
        let step = std::mem::take(&mut queue.is_step);
        let launches = std::mem::take(&mut queue.launches);
        queue.open = None;
        for (at, bytes) in std::mem::take(&mut queue.staged) {
            // SAFETY: the range was checked to be in a buffer, and a buffer is freed only after a flush.
            unsafe { self.driver.write(at, &bytes) }?;
        }
        if launches.is_empty() {
            return Ok(());
        }
        // SAFETY: launches take addresses from buffers alone, whose sizes the ops check against their shapes, and a buffer is
        // freed only after a flush.
        unsafe { self.driver.run(&launches, step) }
    }
}

impl Buffer {
    pub fn n_bytes(&self) -> usize {
        self.n_bytes
    }

    /// The address as an argument.
    pub fn arg(&self) -> Arg {
        Arg::Address(self.at)
    }

    /// The address `offset` bytes in.
    pub fn address(&self, offset: usize) -> u64 {
        assert!(offset <= self.n_bytes, "{offset} is in a buffer of {} bytes", self.n_bytes);
        self.at + offset as u64
    }

    /// Writes bytes at an offset. Launches in the queue that read the buffer see the new ones.
    pub fn write(&mut self, offset: usize, bytes: &[u8]) -> Result<()> {
        assert!(offset + bytes.len() <= self.n_bytes, "{} bytes at {offset} fit {}", bytes.len(), self.n_bytes);
        // SAFETY: the range is in this buffer.
        unsafe { self.device.driver.write(self.at + offset as u64, bytes) }
    }

    /// Reads bytes at an offset once everything in the queue is done.
    pub fn read(&self, offset: usize, bytes: &mut [u8]) -> Result<()> {
        assert!(offset + bytes.len() <= self.n_bytes, "{} bytes at {offset} are in {}", bytes.len(), self.n_bytes);
        self.device.flush()?;
        // SAFETY: the range is in this buffer.
        unsafe { self.device.driver.read(self.at + offset as u64, bytes) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // A device that has failed keeps nothing that could be in use.
        let _ = self.device.flush();
        // SAFETY: the address is this buffer's, and nobody else has it.
        unsafe { self.device.driver.free(self.at, self.n_bytes.max(1)) };
    }
}
