//! A file's bytes as memory: the mapping, what the system is told about it and what it says. Weights are used where they lie in the
//! page cache; the only copy is the system's own.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use apr_core::backend::Storage;
use memmap2::{Advice, Mmap};

/// Bytes asked for in one call. The system asks the disk for no more than the disk takes in one request, and forgets the rest:
/// 512 KiB is what the smallest of common disks take.
const ASK_BYTES: usize = 512 << 10;
/// Machines have pages of 4 to 64 KiB.
const PAGE_BYTES_MIN: usize = 4 << 10;
pub const PAGE_BYTES_MAX: usize = 64 << 10;

/// A mapped file, or one that is part of the program.
pub struct Mapping {
    bytes: Held,
    /// Whether to ask the disk for what is about to be read.
    asks: AtomicBool,
}

/// Where the bytes are.
enum Held {
    Mapped(Mmap),
    /// The system reads them as it reads the program: nothing is asked of it or told to it.
    Embedded(&'static [u8]),
}

impl Mapping {
    /// Maps a file as a whole.
    ///
    /// # Errors
    /// What the system says.
    pub fn new(file: &File) -> io::Result<Mapping> {
        // SAFETY: the mapping is read-only and private to this process. Another process that writes to or truncates the file while it
        // is mapped breaks this; that is the documented price of running from the page cache, as in every engine that maps its weights.
        let map = unsafe { Mmap::map(file) }?;
        Ok(Mapping { bytes: Held::Mapped(map), asks: AtomicBool::new(false) })
    }

    /// A file that is part of the program.
    pub fn embedded(bytes: &'static [u8]) -> Mapping {
        Mapping { bytes: Held::Embedded(bytes), asks: AtomicBool::new(false) }
    }

    /// Says that the whole file will be read and kept. The system then reads it into huge pages, where the file system has them: that
    /// takes half the time, and weights stream faster ever after, as their addresses are found in a few steps less. Asking for ranges
    /// would bring them in small pages, which stay as they are.
    pub fn expect_all(&self) {
        self.asks.store(false, Ordering::Relaxed);
        // Advice that is not taken changes no result.
        #[cfg(target_os = "linux")]
        if let Held::Mapped(map) = &self.bytes {
            let _ = map.advise(Advice::HugePage);
        }
    }

    /// Says that parts of the file will be read, and are to be asked for before: a call to the system for every expert, which pays
    /// while weights come from disk.
    pub fn expect_parts(&self) {
        self.asks.store(true, Ordering::Relaxed);
        #[cfg(target_os = "linux")]
        if let Held::Mapped(map) = &self.bytes {
            let _ = map.advise(Advice::NoHugePage);
        }
    }

    /// Whether what is about to be read is asked for.
    #[cfg(test)]
    pub fn asks(&self) -> bool {
        self.asks.load(Ordering::Relaxed)
    }

    /// Whether the page at `offset`, a multiple of [`PAGE_BYTES_MAX`], is in memory. True where the system does not tell, as Linux
    /// does not for a file that belongs to another user.
    #[cfg(target_os = "linux")]
    pub fn is_resident(&self, offset: usize) -> bool {
        assert!(offset.is_multiple_of(PAGE_BYTES_MAX), "offset {offset} begins a page");
        let Held::Mapped(map) = &self.bytes else { return true };
        let (start, mut page) = (map[offset..].as_ptr(), 1u8);
        // SAFETY: one byte at `start` lies in the mapping, which lives as long as `self`; a mapping begins with a page, so `start` is
        // aligned. The system writes one byte, for the one page that holds it.
        let status = unsafe { libc::mincore(start.cast_mut().cast(), 1, &mut page) };
        status != 0 || page & 1 == 1
    }

    #[cfg(not(target_os = "linux"))]
    pub fn is_resident(&self, _: usize) -> bool {
        true
    }

    /// Reads a range from disk and returns when it is in memory.
    pub fn read(&self, range: Range<usize>) {
        if self.populate(&range).is_err() {
            // An older system, or another one: touching a page does the same, one at a time.
            for at in range.step_by(PAGE_BYTES_MIN) {
                std::hint::black_box(self.as_ref()[at]);
            }
        }
    }

    #[cfg(target_os = "linux")]
    fn populate(&self, range: &Range<usize>) -> io::Result<()> {
        let Held::Mapped(map) = &self.bytes else { return Err(io::ErrorKind::Unsupported.into()) };
        match map.advise_range(Advice::PopulateRead, range.start, range.len()) {
            Err(e) if e.kind() == io::ErrorKind::InvalidInput => Err(e),
            // What cannot be read is found by whoever computes with it.
            _ => Ok(()),
        }
    }

    #[cfg(not(target_os = "linux"))]
    fn populate(&self, _: &Range<usize>) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Asks for a range without waiting for it.
    fn ask(&self, range: Range<usize>) {
        #[cfg(unix)]
        if let Held::Mapped(map) = &self.bytes {
            for at in range.clone().step_by(ASK_BYTES) {
                // Advice that is not taken changes no result.
                let _ = map.advise_range(Advice::WillNeed, at, ASK_BYTES.min(range.end - at));
            }
        }
    }

    /// Says that pages of a range are read in no order, so that no neighbours are read with them.
    pub fn read_at_random(&self, range: Range<usize>) {
        #[cfg(unix)]
        if let Held::Mapped(map) = &self.bytes {
            let _ = map.advise_range(Advice::Random, range.start, range.len());
        }
    }
}

impl AsRef<[u8]> for Mapping {
    fn as_ref(&self) -> &[u8] {
        match &self.bytes {
            Held::Mapped(map) => map,
            Held::Embedded(bytes) => bytes,
        }
    }
}

impl Storage for Mapping {
    fn will_need(&self, range: Range<usize>) {
        if self.asks.load(Ordering::Relaxed) {
            self.ask(range);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn reading_and_asking_change_no_byte_at_any_edge() {
        let bytes: Vec<u8> = (0..1_200_001u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        let embedded = Mapping::embedded(Vec::leak(bytes.clone()));
        for mapping in [Mapping::new(&file).unwrap(), embedded] {
            check(&mapping, &bytes);
        }
    }

    fn check(mapping: &Mapping, bytes: &[u8]) {
        for range in [0..bytes.len(), 4097..4097, 5000..700_001, bytes.len() - 1..bytes.len()] {
            mapping.read(range.clone());
            mapping.read_at_random(range.clone());
            mapping.expect_parts();
            mapping.will_need(range.clone());
            mapping.expect_all();
            mapping.read(range);
        }
        assert!(mapping.as_ref() == bytes);
        assert!((0..bytes.len()).step_by(PAGE_BYTES_MAX).all(|at| mapping.is_resident(at)), "it was just written");
    }
}
