//! A cursor over the bytes of a file that refuses to pass their end, and says how far beyond it a read would go.

use std::fmt::Display;

use super::GgufError;

/// Every method names what it reads in `what`, for the message of a file that ends too early.
pub(super) struct Reader<'a> {
    bytes: &'a [u8],
    position: usize,
}

impl<'a> Reader<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Reader { bytes, position: 0 }
    }

    /// The whole file.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Bytes read so far.
    pub fn position(&self) -> u64 {
        self.position as u64
    }

    fn left(&self) -> u64 {
        (self.bytes.len() - self.position) as u64
    }

    /// The next `n` bytes.
    pub fn take(&mut self, n: u64, what: &dyn Display) -> Result<&'a [u8], GgufError> {
        if n > self.left() {
            return Err(GgufError::Truncated { what: what.to_string(), missing: n - self.left() });
        }
        let start = self.position;
        self.position += n as usize;
        Ok(&self.bytes[start..self.position])
    }

    fn chunk<const N: usize>(&mut self, what: &dyn Display) -> Result<[u8; N], GgufError> {
        let bytes = self.take(N as u64, what)?;
        Ok(bytes.try_into().expect("take returns as many bytes as asked for"))
    }

    pub fn u32(&mut self, what: &dyn Display) -> Result<u32, GgufError> {
        self.chunk(what).map(u32::from_le_bytes)
    }

    pub fn u64(&mut self, what: &dyn Display) -> Result<u64, GgufError> {
        self.chunk(what).map(u64::from_le_bytes)
    }

    /// One number of `N` bytes.
    pub fn number<const N: usize, T>(&mut self, from: fn([u8; N]) -> T, what: &dyn Display) -> Result<T, GgufError> {
        self.chunk(what).map(from)
    }

    /// `count` numbers of `N` bytes each.
    pub fn numbers<const N: usize, T>(
        &mut self,
        count: u64,
        from: fn([u8; N]) -> T,
        what: &dyn Display,
    ) -> Result<Vec<T>, GgufError> {
        let bytes = self.take(count.saturating_mul(N as u64), what)?;
        let (chunks, _) = bytes.as_chunks::<N>();
        Ok(chunks.iter().map(|&c| from(c)).collect())
    }

    /// The next `n` bytes as text.
    pub fn utf8(&mut self, n: u64, what: &dyn Display) -> Result<&'a str, GgufError> {
        let bytes = self.take(n, what)?;
        str::from_utf8(bytes).map_err(|e| GgufError::NotUtf8 { what: what.to_string(), at: e.valid_up_to() })
    }

    /// Refuses `count` items of at least `min_bytes` each when there are more than `max` or they cannot be in the
    /// bytes left.
    pub fn expect_count(&self, items: &dyn Display, count: u64, max: u64, min_bytes: u64) -> Result<(), GgufError> {
        if count > max {
            return Err(GgufError::TooMany { what: items.to_string(), got: count, max });
        }
        let needed = count.saturating_mul(min_bytes);
        if needed > self.left() {
            let what = format!("the list of {count} {items}");
            return Err(GgufError::Truncated { what, missing: needed - self.left() });
        }
        Ok(())
    }
}
