//! Floats that begin on a boundary of 64 bytes: vectors of sixteen of them lie each in one line of the cache, where an ordinary
//! allocation puts every one across two.

use std::ops::{Deref, DerefMut};

use bytemuck::{Pod, Zeroable};

/// A line of the cache.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct Line([f32; 16]);

// SAFETY: sixteen floats fill a line, so it has no padding, and all zeros are one.
unsafe impl Zeroable for Line {}
// SAFETY: as above, and all bits are floats.
unsafe impl Pod for Line {}

/// A vector of floats that begins with a line.
#[derive(Default)]
pub struct Lines {
    lines: Vec<Line>,
    len: usize,
}

impl Lines {
    /// Makes it `len` floats. Those that were there stay, as many as they are; the others are zeros or what was there before.
    pub fn resize(&mut self, len: usize) {
        let n_lines = len.div_ceil(16);
        if self.lines.len() < n_lines {
            self.lines.resize(n_lines, Line::zeroed());
        }
        self.len = len;
    }
}

impl Deref for Lines {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        &bytemuck::cast_slice(&self.lines)[..self.len]
    }
}

impl DerefMut for Lines {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_begin_on_a_boundary_and_stay_while_more_come() {
        let mut floats = Lines::default();
        assert!(floats.is_empty());
        for len in [1, 17, 100, 5000] {
            let before = floats.len();
            floats.resize(len);
            assert_eq!((floats.len(), floats.as_ptr() as usize % 64), (len, 0));
            assert!(floats[..before].iter().all(|&v| v == 1.0) && floats[before..].iter().all(|&v| v == 0.0));
            floats.fill(1.0);
        }
    }
}
