//! Weights made of golden blocks, and activations like real ones, the same in every run.
// Each test binary uses a part of this.
#![allow(dead_code)]

use apr_core::qtype::GgmlType;
use safetensors::SafeTensors;

/// A small generator (SplitMix64).
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// Roughly normal, with a heavy column now and then as in real activations.
    pub fn activation(&mut self) -> f32 {
        let unit = |r: u64| (r >> 40) as f32 / (1 << 24) as f32 - 0.5;
        let v = (0..4).map(|_| unit(self.next())).sum::<f32>();
        if self.below(61) == 0 { v * 30.0 } else { v }
    }

    pub fn activations(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.activation()).collect()
    }
}

/// Golden blocks of a type.
pub struct Blocks {
    bytes: Vec<u8>,
    /// Weights and bytes of a block.
    len: usize,
    size: usize,
}

impl Blocks {
    pub fn of(qtype: GgmlType) -> Blocks {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/qtypes-8x256.safetensors");
        let file = std::fs::read(path).expect("the golden file is in the repository");
        let file = SafeTensors::deserialize(&file).unwrap();
        let name = if qtype == GgmlType::F32 { "source".to_string() } else { format!("{qtype}.blocks") };
        let bytes = file.tensor(&name).unwrap_or_else(|e| panic!("{name}: {e}")).data().to_vec();
        Blocks { bytes, len: qtype.block_len(), size: qtype.block_bytes() }
    }

    /// `n` weights of blocks in random order.
    pub fn random(&self, n: usize, rng: &mut Rng) -> Vec<u8> {
        assert!(n.is_multiple_of(self.len), "{n} weights are whole blocks");
        let n_blocks = self.bytes.len() / self.size;
        let block = |rng: &mut Rng| self.bytes[rng.below(n_blocks) * self.size..][..self.size].to_vec();
        (0..n / self.len).flat_map(|_| block(rng)).collect()
    }
}
