//! The KV cache of the CPU backend: blocks of [`KV_BLOCK`] positions, contiguous per layer and KV head.
//!
//! A tile holds the keys of one head in one block transposed, `[head_dim, KV_BLOCK]`, and its values as `[KV_BLOCK, head_dim]`, so that
//! both products of attention run along rows without sums across lanes. Types are:
//!
//! - f32.
//! - f16: 16 bits a value. They are no half floats, but the integers that attention multiplies ([`codes`], which says how precise
//!   they are), in pairs of neighbouring rows. Behind the integers of a tile lies a scale for every position.
//! - q8_0: 8-bit integers with an f16 scale per 32 values along the head, made such integers of when they are read.

use std::ops::Range;

use apr_core::backend::{BackendError, KV_BLOCK, KvShape, KvType, Result};
use bytemuck::Zeroable;
use half::f16;

use crate::float::FloatKernels;
use crate::float::codes::{self, Coded, Pair};
use crate::lines::{Line, Lines};

/// Keys and values of all sequences.
pub struct KvCache {
    shape: KvShape,
    blocks: Vec<Box<[Line]>>,
}

/// One head's keys or values in one block.
#[derive(Clone, Copy)]
pub enum Tile<'a> {
    /// Keys `[head_dim, KV_BLOCK]` or values `[KV_BLOCK, head_dim]`.
    Floats(&'a [f32]),
    /// The same, of half as many rows of pairs, and what a unit of each position's codes is worth.
    Codes(&'a [Pair], &'a [f32; KV_BLOCK]),
}

/// Room for a tile that is not stored as it is multiplied.
#[derive(Default)]
pub struct Room {
    pairs: Lines,
    units: Lines,
    scales: Vec<f32>,
}

/// Keys or values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Key,
    Value,
}

/// One head's keys and values in one block, to be written.
pub struct HeadMut<'a> {
    kv_type: KvType,
    head_dim: usize,
    /// The tile of keys and the tile of values.
    tiles: [&'a mut [u8]; 2],
}

impl KvCache {
    pub fn new(shape: KvShape) -> KvCache {
        assert!(
            shape.kv_type != KvType::Q8_0 || shape.head_dim.is_multiple_of(32),
            "8-bit KV needs heads of whole blocks of 32"
        );
        assert!(
            shape.head_dim.is_multiple_of(2) && shape.head_dim <= 1024,
            "heads have an even number of columns to 1,024"
        );
        KvCache { shape, blocks: Vec::new() }
    }

    pub fn shape(&self) -> &KvShape {
        &self.shape
    }

    /// Makes room for blocks `0..n_blocks`, zeroed.
    pub fn reserve(&mut self, n_blocks: usize) -> Result<()> {
        let n_lines = self.block_bytes().div_ceil(size_of::<Line>());
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

    /// Bytes of a block with its scales.
    pub(crate) fn block_bytes(&self) -> usize {
        block_bytes(&self.shape)
    }

    /// The bytes of a block.
    pub fn block(&self, block: u32) -> &[u8] {
        &bytemuck::cast_slice(&self.blocks[block as usize])[..self.block_bytes()]
    }

    /// The bytes of a block.
    pub fn block_mut(&mut self, block: u32) -> &mut [u8] {
        let n = self.block_bytes();
        &mut bytemuck::cast_slice_mut(&mut self.blocks[block as usize])[..n]
    }

    /// Where a tile lies in its block.
    fn tile_range(&self, il: usize, part: Part, head: usize) -> Range<usize> {
        let n = tile_bytes(&self.shape);
        let at = ((il * self.shape.n_head_kv + head) * 2 + part as usize) * n;
        at..at + n
    }

    /// What layer `il` keeps in `blocks`, which ascend: all heads of the first block, then of the next.
    pub fn heads_mut(&mut self, blocks: impl Iterator<Item = u32>, il: usize) -> Vec<HeadMut<'_>> {
        let KvShape { n_head_kv, head_dim, kv_type, .. } = self.shape;
        let first = self.tile_range(il, Part::Key, 0);
        let (n_tile, n_head) = (first.len(), 2 * first.len());
        let (mut rest, mut n_before) = (&mut self.blocks[..], 0);
        let mut heads = Vec::new();
        for block in blocks {
            let (before, after) = rest.split_at_mut(block as usize + 1 - n_before);
            let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut before[before.len() - 1]);
            let of_layer = bytes[first.start..][..n_head_kv * n_head].chunks_exact_mut(n_head);
            heads.extend(of_layer.map(|tiles| HeadMut { kv_type, head_dim, tiles: tiles.split_at_mut(n_tile).into() }));
            (rest, n_before) = (after, block as usize + 1);
        }
        heads
    }

    /// The bytes of a head's keys or values in a block.
    pub fn tile_of(&self, block: u32, il: usize, part: Part, head: usize) -> &[u8] {
        &self.block(block)[self.tile_range(il, part, head)]
    }

    /// A head's keys or values in a block, as attention multiplies them.
    pub fn tile<'a>(
        &'a self,
        f: &FloatKernels,
        block: u32,
        il: usize,
        part: Part,
        head: usize,
        room: &'a mut Room,
    ) -> Tile<'a> {
        let tile = self.tile_of(block, il, part, head);
        match self.shape.kv_type {
            KvType::F32 => Tile::Floats(bytemuck::cast_slice(tile)),
            KvType::F16 => {
                let (codes, units) = tile.split_at(tile.len() - UNITS_BYTES);
                let units: &[f32] = bytemuck::cast_slice(units);
                Tile::Codes(bytemuck::cast_slice(codes), units.first_chunk().expect("a scale per position"))
            }
            KvType::Q8_0 => {
                let (codes, scales) = tile.split_at(self.shape.head_dim * KV_BLOCK);
                room.pairs.resize(codes.len() / 2);
                room.units.resize(KV_BLOCK);
                room.scales.resize(scales.len() / 2, 0.0);
                f.widen(bytemuck::cast_slice(scales), &mut room.scales);
                let codes = bytemuck::cast_slice(codes);
                let units = room.units.first_chunk_mut().expect("a scale per position");
                let to = Coded { pairs: bytemuck::cast_slice_mut(&mut room.pairs), scales: units };
                match part {
                    Part::Key => f.widen_keys(codes, &room.scales, to),
                    Part::Value => f.widen_values(codes, &room.scales, to),
                }
                Tile::Codes(bytemuck::cast_slice(&room.pairs), room.units.first_chunk().expect("a scale per position"))
            }
        }
    }
}

impl HeadMut<'_> {
    /// Stores one position's key or value, `[head_dim]`.
    pub fn store(&mut self, slot: usize, part: Part, x: &[f32]) {
        let (tile, n) = (&mut *self.tiles[part as usize], self.head_dim);
        let at = |i: usize| if part == Part::Key { i * KV_BLOCK + slot } else { slot * n + i };
        match self.kv_type {
            KvType::F32 => {
                let tile: &mut [f32] = bytemuck::cast_slice_mut(tile);
                (0..n).for_each(|i| tile[at(i)] = x[i]);
            }
            KvType::F16 => {
                let (tile, units) = tile.split_at_mut(2 * n * KV_BLOCK);
                let tile: &mut [Pair] = bytemuck::cast_slice_mut(tile);
                let mut codes = [0; 1024];
                let codes = &mut codes[..n];
                let unit = match part {
                    Part::Key => {
                        let unit = codes::code_key(x, codes);
                        codes.as_chunks().0.iter().enumerate().for_each(|(i, pair)| tile[i * KV_BLOCK + slot] = *pair);
                        unit
                    }
                    Part::Value => {
                        let unit = codes::code_value(x, codes);
                        codes.iter().enumerate().for_each(|(i, c)| tile[slot / 2 * n + i][slot % 2] = *c);
                        unit
                    }
                };
                bytemuck::cast_slice_mut(units)[slot] = unit;
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
}

/// Bytes of what the positions of a tile are scaled with.
const UNITS_BYTES: usize = KV_BLOCK * size_of::<f32>();

/// Bytes of a block with its scales.
pub fn block_bytes(shape: &KvShape) -> usize {
    2 * shape.n_layer * shape.n_head_kv * tile_bytes(shape)
}

/// Bytes of one head's keys or values in a block.
fn tile_bytes(shape: &KvShape) -> usize {
    let units = if shape.kv_type == KvType::F16 { UNITS_BYTES } else { 0 };
    KV_BLOCK * shape.kv_type.bytes(shape.head_dim) + units
}

impl Tile<'_> {
    /// Entry `i` of the key or value at position `slot` of the block.
    pub fn get(&self, part: Part, slot: usize, i: usize) -> f32 {
        let at = |n_rows_in_one: usize| match part {
            Part::Key => (i / n_rows_in_one * KV_BLOCK + slot, i % n_rows_in_one),
            Part::Value => {
                let d = self.len() * n_rows_in_one / KV_BLOCK;
                (slot / n_rows_in_one * d + i, slot % n_rows_in_one)
            }
        };
        match self {
            Tile::Floats(x) => x[at(1).0],
            Tile::Codes(pairs, units) => f32::from(pairs[at(2).0][at(2).1]) * units[slot],
        }
    }

    /// Floats or pairs.
    fn len(&self) -> usize {
        match self {
            Tile::Floats(x) => x.len(),
            Tile::Codes(x, _) => x.len(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::Kernels;

    #[test]
    fn what_is_stored_is_read_back_within_the_type() {
        let f = Kernels::detect().float();
        for (kv_type, bound) in [(KvType::F32, 0.0), (KvType::F16, 7e-5), (KvType::Q8_0, 4e-3)] {
            let mut kv = KvCache::new(KvShape { n_layer: 2, n_head_kv: 3, head_dim: 64, kv_type });
            kv.reserve(2).unwrap();
            let x: Vec<f32> = (0..64).map(|i| ((i * 37) % 64) as f32 / 32.0 - 1.0).collect();
            for part in [Part::Key, Part::Value] {
                kv.heads_mut(std::iter::once(1), 1)[2].store(5, part, &x);
                let (mut room, mut other) = (Room::default(), Room::default());
                let tile = kv.tile(f, 1, 1, part, 2, &mut room);
                for (i, x) in x.iter().enumerate() {
                    let got = tile.get(part, 5, i);
                    assert!((got - x).abs() <= bound * 1.01, "{kv_type} {part:?} {i}: {got} {x}");
                }
                let tile = kv.tile(f, 1, 1, part, 1, &mut other);
                assert!((0..64).all(|i| tile.get(part, 5, i) == 0.0), "other heads are untouched");
            }
        }
    }
}
