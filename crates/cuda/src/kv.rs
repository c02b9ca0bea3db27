//! The KV cache on a device: blocks of 64 positions in slabs that never move, so that growing copies nothing.

use apr_core::backend::{BackendError, KvShape, KvType};

use crate::driver::{DriverError, Result};
use crate::memory::{Buffer, Device};

/// Bytes that a slab has at most where a block is smaller. The first ones are small: a short conversation takes little.
const SLAB_BYTES: usize = 64 << 20;

/// Keys and values of all sequences: a block is `[n_layer, 2 (keys, values), n_head_kv, 64, head_dim]` in the cache's type; in
/// `q8_0`, 64 rows of codes and then 64 rows of scales.
pub struct KvCache {
    device: Device,
    shape: KvShape,
    slabs: Vec<Buffer>,
    /// Slab and offset of every block.
    blocks: Vec<(usize, usize)>,
}

impl KvCache {
    pub(crate) fn new(device: &Device, shape: KvShape) -> KvCache {
        KvCache { device: device.clone(), shape, slabs: Vec::new(), blocks: Vec::new() }
    }

    pub fn shape(&self) -> &KvShape {
        &self.shape
    }

    /// Makes room for blocks `0..n_blocks`.
    pub(crate) fn reserve(&mut self, n_blocks: usize) -> std::result::Result<(), BackendError> {
        let dim = self.shape.head_dim;
        let multiple = if self.shape.kv_type == KvType::Q8_0 { 32 } else { 8 };
        if dim > 256 || !dim.is_multiple_of(multiple) {
            let what = format!("heads of {dim} values with {} keys and values", self.shape.kv_type);
            return Err(BackendError::UnsupportedShape { device: "cuda", what });
        }
        let block_bytes = self.shape.block_bytes();
        while self.blocks.len() < n_blocks {
            // As many as there are, so that the number of slabs stays small.
            let n = self.blocks.len().clamp(1, (SLAB_BYTES / block_bytes).max(1));
            let need_bytes = n * block_bytes;
            let slab = self.device.alloc(need_bytes).map_err(|e| match e {
                DriverError::OutOfMemory { .. } => {
                    BackendError::OutOfMemory { what: "the KV cache".to_string(), need_bytes }
                }
                other => crate::failed(&self.device, other),
            })?;
            self.blocks.extend((0..n).map(|i| (self.slabs.len(), i * block_bytes)));
            self.slabs.push(slab);
        }
        Ok(())
    }

    /// Where a block begins.
    pub(crate) fn address(&self, block: u32) -> u64 {
        let (slab, offset) = self.blocks[block as usize];
        self.slabs[slab].address(offset)
    }

    pub(crate) fn save(&self, block: u32, out: &mut Vec<u8>) -> Result<()> {
        let (slab, offset) = self.blocks[block as usize];
        let (n, from) = (self.shape.block_bytes(), out.len());
        out.resize(from + n, 0);
        self.slabs[slab].read(offset, &mut out[from..])
    }

    /// Whatever was launched before is done with the block first.
    pub(crate) fn restore(&mut self, block: u32, saved: &[u8]) -> Result<()> {
        self.device.flush()?;
        let (slab, offset) = self.blocks[block as usize];
        self.slabs[slab].write(offset, saved)
    }
}
