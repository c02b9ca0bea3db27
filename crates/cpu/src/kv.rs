//! The KV cache of the CPU backend: blocks of [`KV_BLOCK`] positions, contiguous per layer and KV head.
//!
//! A tile holds the keys of one head in one block transposed, `[head_dim, KV_BLOCK]`, and its values as `[KV_BLOCK, head_dim]`, so that
//! both products of attention run along rows without sums across lanes. Types are f32, f16, or 8-bit integers with an f16 scale per 32
//! values along the head.

use std::ops::Range;

use apr_core::backend::{BackendError, KV_BLOCK, KvShape, KvType, Result};
use bytemuck::Zeroable;
use half::f16;
use half::slice::HalfFloatSliceExt;

use crate::float::FloatKernels;
use crate::lines::{Line, Lines};

/// Keys and values of all sequences.
pub struct KvCache {
    shape: KvShape,
    blocks: Vec<Box<[Line]>>,
}

/// One head's keys or values in one block, as floats.
#[derive(Default)]
pub struct Tile {
    values: Lines,
    scales: Vec<f32>,
}

/// Keys or values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Key,
    Value,
}

impl KvCache {
    pub fn new(shape: KvShape) -> KvCache {
        assert!(
            shape.kv_type != KvType::Q8_0 || shape.head_dim.is_multiple_of(32),
            "8-bit KV needs heads of whole blocks of 32"
        );
        KvCache { shape, blocks: Vec::new() }
    }

    pub fn shape(&self) -> &KvShape {
        &self.shape
    }

    /// Makes room for blocks `0..n_blocks`, zeroed.
    pub fn reserve(&mut self, n_blocks: usize) -> Result<()> {
        let n_lines = self.shape.block_bytes().div_ceil(size_of::<Line>());
        while self.blocks.len() < n_blocks {
            let mut block = Vec::new();
            block.try_reserve_exact(n_lines).map_err(|_| BackendError::OutOfMemory {
                what: format!("KV block {}", self.blocks.len()),
                need_bytes: n_lines * size_of::<Line>(),
            })?;
            block.resize(n_lines, Line::zeroed());
            self.blocks.push(block.into_boxed_slice());
        }
        Ok(())
    }

    /// The bytes of a block.
    pub fn block(&self, block: u32) -> &[u8] {
        &bytemuck::cast_slice(&self.blocks[block as usize])[..self.shape.block_bytes()]
    }

    /// The bytes of a block.
    pub fn block_mut(&mut self, block: u32) -> &mut [u8] {
        let n = self.shape.block_bytes();
        &mut bytemuck::cast_slice_mut(&mut self.blocks[block as usize])[..n]
    }

    /// Bytes of one head's keys or values in a block.
    fn tile_bytes(&self) -> usize {
        KV_BLOCK * self.shape.kv_type.bytes(self.shape.head_dim)
    }

    /// Where a tile lies in its block.
    fn tile_range(&self, il: usize, part: Part, head: usize) -> Range<usize> {
        let at = ((il * self.shape.n_head_kv + head) * 2 + part as usize) * self.tile_bytes();
        at..at + self.tile_bytes()
    }

    /// Stores one position's key or value of a head.
    pub fn store(&mut self, block: u32, slot: usize, il: usize, part: Part, head: usize, x: &[f32]) {
        let (kv_type, range) = (self.shape.kv_type, self.tile_range(il, part, head));
        let tile = &mut self.block_mut(block)[range];
        let n = x.len();
        let at = |i: usize| if part == Part::Key { i * KV_BLOCK + slot } else { slot * n + i };
        match kv_type {
            KvType::F32 => {
                let tile: &mut [f32] = bytemuck::cast_slice_mut(tile);
                (0..n).for_each(|i| tile[at(i)] = x[i]);
            }
            KvType::F16 => {
                let tile: &mut [u16] = bytemuck::cast_slice_mut(tile);
                let mut rounded = [f16::ZERO; 1024];
                let rounded = &mut rounded[..n];
                rounded.convert_from_f32_slice(x);
                (0..n).for_each(|i| tile[at(i)] = rounded[i].to_bits());
            }
            KvType::Q8_0 => {
                let (codes, scales) = tile.split_at_mut(n * KV_BLOCK);
                let scales: &mut [u16] = bytemuck::cast_slice_mut(scales);
                for (j, x) in x.chunks_exact(32).enumerate() {
                    let largest = x.iter().fold(0f32, |m, v| m.max(v.abs()));
                    // A value that is no number makes NaN of its block, so that it shows.
                    let finite = x.iter().all(|v| v.is_finite());
                    let d = if finite { f16::from_f32(largest / 127.0) } else { f16::NAN };
                    let inverse = if d.to_f32() > 0.0 { 1.0 / d.to_f32() } else { 0.0 };
                    let scale_at = if part == Part::Key { j * KV_BLOCK + slot } else { slot * (n / 32) + j };
                    scales[scale_at] = d.to_bits();
                    for (i, v) in x.iter().enumerate() {
                        codes[at(32 * j + i)] = (v * inverse).round_ties_even().clamp(-127.0, 127.0) as i8 as u8;
                    }
                }
            }
        }
    }

    /// The bytes of a head's keys or values in a block.
    pub fn tile_of(&self, block: u32, il: usize, part: Part, head: usize) -> &[u8] {
        &self.block(block)[self.tile_range(il, part, head)]
    }

    /// The keys `[head_dim, KV_BLOCK]` or values `[KV_BLOCK, head_dim]` of a head in a block, as half floats' bits; `None` where they
    /// are stored otherwise.
    pub fn halves(&self, block: u32, il: usize, part: Part, head: usize) -> Option<&[u16]> {
        let tile = self.tile_of(block, il, part, head);
        (self.shape.kv_type == KvType::F16).then(|| bytemuck::cast_slice(tile))
    }

    /// The keys `[head_dim, KV_BLOCK]` or values `[KV_BLOCK, head_dim]` of a head in a block, as floats.
    pub fn tile<'a>(
        &'a self,
        f: &FloatKernels,
        block: u32,
        il: usize,
        part: Part,
        head: usize,
        scratch: &'a mut Tile,
    ) -> &'a [f32] {
        let tile = self.tile_of(block, il, part, head);
        let n = self.shape.head_dim;
        scratch.values.resize(n * KV_BLOCK);
        match self.shape.kv_type {
            KvType::F32 => return bytemuck::cast_slice(tile),
            KvType::F16 => f.widen(bytemuck::cast_slice(tile), &mut scratch.values),
            KvType::Q8_0 => {
                let (codes, scales) = tile.split_at(n * KV_BLOCK);
                scratch.scales.resize(scales.len() / 2, 0.0);
                f.widen(bytemuck::cast_slice(scales), &mut scratch.scales);
                let codes: &[i8] = bytemuck::cast_slice(codes);
                match part {
                    Part::Key => f.scale_keys(codes, &scratch.scales, &mut scratch.values),
                    Part::Value => f.scale_values(codes, &scratch.scales, &mut scratch.values),
                }
            }
        }
        &scratch.values
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::Kernels;

    #[test]
    fn what_is_stored_is_read_back_within_the_type() {
        let f = Kernels::detect().float();
        for (kv_type, bound) in [(KvType::F32, 0.0), (KvType::F16, 5e-4), (KvType::Q8_0, 4e-3)] {
            let mut kv = KvCache::new(KvShape { n_layer: 2, n_head_kv: 3, head_dim: 64, kv_type });
            kv.reserve(2).unwrap();
            let x: Vec<f32> = (0..64).map(|i| ((i * 37) % 64) as f32 / 32.0 - 1.0).collect();
            for part in [Part::Key, Part::Value] {
                kv.store(1, 5, 1, part, 2, &x);
                let (mut scratch, mut other) = (Tile::default(), Tile::default());
                let tile = kv.tile(f, 1, 1, part, 2, &mut scratch);
                for (i, x) in x.iter().enumerate() {
                    let got = if part == Part::Key { tile[i * KV_BLOCK + 5] } else { tile[5 * 64 + i] };
                    assert!((got - x).abs() <= bound * 1.01, "{kv_type} {part:?} {i}: {got} {x}");
                }
                assert!(kv.tile(f, 1, 1, part, 1, &mut other).iter().all(|&v| v == 0.0), "other heads are untouched");
            }
        }
    }
}
