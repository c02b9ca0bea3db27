//! Changes to the weights and the metadata of a fixture that was taken apart.
//!
//! Weights of quantized types are changed in the fields of their blocks, so that nothing beside the change moves by rounding. A row
//! of a tensor of experts counts from the first row of its expert; a block counts from the start of its row.

use std::ops::Range;

use apr_core::gguf::Value;
use apr_core::qtype::{GgmlType, dequantize_row, float, quantize_row};

use crate::model::{Model, Tensor};

/// Half-precision floats as they stand in a block.
pub const ZERO: [u8; 2] = [0, 0];
pub const INFINITY: [u8; 2] = [0, 0x7c];
pub const NAN: [u8; 2] = [0, 0x7e];

impl Tensor {
    /// Bytes of one row.
    pub fn row_bytes(&self) -> usize {
        self.qtype.row_bytes(self.ne[0] as usize)
    }

    /// Rows of one expert's matrix, or of the only one.
    pub fn n_rows(&self) -> usize {
        self.ne.get(1).map_or(1, |&n| n as usize)
    }

    fn rows(&mut self, expert: usize, rows: Range<usize>) -> &mut [u8] {
        let (n, first) = (self.row_bytes(), expert * self.n_rows());
        &mut self.data[(first + rows.start) * n..(first + rows.end) * n]
    }
}

pub fn tensor<'a>(m: &'a mut Model, name: &str) -> &'a mut Tensor {
    m.tensors.iter_mut().find(|t| t.name == name).unwrap_or_else(|| panic!("the fixture has {name}"))
}

/// Sets a metadata key, in its place where the file has it.
pub fn put(m: &mut Model, key: &str, value: Value) {
    *m = m.clone().set(key, value);
}

/// Multiplies rows of an expert's matrix, or one block of each, by `factor`.
pub fn scale(m: &mut Model, name: &str, expert: usize, rows: Range<usize>, block: Option<usize>, factor: f32) {
    let t = tensor(m, name);
    let (qtype, row_bytes, n) = (t.qtype, t.row_bytes(), t.qtype.block_bytes());
    for row in t.rows(expert, rows).chunks_exact_mut(row_bytes) {
        for (_, bytes) in row.chunks_exact_mut(n).enumerate().filter(|(i, _)| block.is_none_or(|b| b == *i)) {
            scale_block(qtype, bytes, factor);
        }
    }
}

fn scale_block(qtype: GgmlType, block: &mut [u8], factor: f32) {
    if qtype == GgmlType::F32 {
        let value = f32::from_le_bytes(block.try_into().expect("four bytes"));
        return block.copy_from_slice(&(value * factor).to_le_bytes());
    }
    for &at in halves(qtype) {
        let value = float::f16_to_f32([block[at], block[at + 1]]);
        block[at..at + 2].copy_from_slice(&float::f32_to_f16(value * factor));
    }
}

/// Where a block has the half-precision floats that all its weights are multiples of, or sums of such multiples.
fn halves(qtype: GgmlType) -> &'static [usize] {
    match qtype {
        GgmlType::Q4_0 | GgmlType::Q8_0 => &[0],
        GgmlType::Q4_K => &[0, 2],
        GgmlType::Q6_K => &[208],
        other => panic!("the layout of {other} is not known here"),
    }
}

/// Gives the scale of one block other bits.
pub fn set_scale(m: &mut Model, name: &str, expert: usize, row: usize, block: usize, bits: [u8; 2]) {
    let t = tensor(m, name);
    let (at, n) = (halves(t.qtype)[0], t.qtype.block_bytes());
    t.rows(expert, row..row + 1)[block * n + at..][..2].copy_from_slice(&bits);
}

/// Makes element `i` of a tensor of F32 `change(i, old value)`.
pub fn elements(m: &mut Model, name: &str, change: impl Fn(usize, f32) -> f32) {
    let t = tensor(m, name);
    assert_eq!(t.qtype, GgmlType::F32);
    for (i, bytes) in t.data.chunks_exact_mut(4).enumerate() {
        let old = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        bytes.copy_from_slice(&change(i, old).to_le_bytes());
    }
}

pub fn swap_rows(m: &mut Model, name: &str, a: usize, b: usize) {
    let t = tensor(m, name);
    let (n, (low, high)) = (t.row_bytes(), (a.min(b), a.max(b)));
    let (head, tail) = t.data.split_at_mut(high * n);
    head[low * n..][..n].swap_with_slice(&mut tail[..n]);
}

pub fn swap_experts(m: &mut Model, name: &str, a: usize, b: usize) {
    let n_rows = tensor(m, name).n_rows();
    (0..n_rows).for_each(|i| swap_rows(m, name, a * n_rows + i, b * n_rows + i));
}

/// Exchanges the bytes of two tensors of one type and shape.
pub fn swap_tensors(m: &mut Model, a: &str, b: &str) {
    let (first, second) = (tensor(m, a).clone(), tensor(m, b).clone());
    assert_eq!((first.qtype, &first.ne), (second.qtype, &second.ne));
    tensor(m, a).data = second.data;
    tensor(m, b).data = first.data;
}

/// Moves each of the rows, counted over all experts, to the place of the next, the last to that of the first.
pub fn rotate_rows(m: &mut Model, name: &str, rows: Range<usize>) {
    let t = tensor(m, name);
    let n = t.row_bytes();
    t.data[rows.start * n..rows.end * n].rotate_right(n);
}

/// Puts the rows of each head that are pairs of neighbours into halves of the head: the conversion between the two ways of rotating.
pub fn halves_together(m: &mut Model, name: &str, head_dim: usize) {
    let t = tensor(m, name);
    let n = t.row_bytes();
    for head in t.data.chunks_exact_mut(head_dim * n) {
        let old = head.to_vec();
        for (i, row) in head.chunks_exact_mut(n).enumerate() {
            let from = i % (head_dim / 2) * 2 + i / (head_dim / 2);
            row.copy_from_slice(&old[from * n..][..n]);
        }
    }
}

/// Exchanges the two codes of every byte of codes of a Q4_K tensor.
pub fn exchange_nibbles(m: &mut Model, name: &str) {
    let t = tensor(m, name);
    assert_eq!(t.qtype, GgmlType::Q4_K);
    let n = t.qtype.block_bytes();
    t.data.chunks_exact_mut(n).flat_map(|block| &mut block[16..]).for_each(|byte| *byte = byte.rotate_left(4));
}

/// Declares the bytes to be of a type that takes no more of them. They all stay in the file, the last of them unused.
pub fn declare(m: &mut Model, name: &str, qtype: GgmlType) {
    let t = tensor(m, name);
    assert!(qtype.block_len() == t.qtype.block_len() && qtype.block_bytes() <= t.qtype.block_bytes());
    t.qtype = qtype;
}

/// Drops the bytes that the declared type leaves unused.
pub fn cut(m: &mut Model, name: &str) {
    let t = tensor(m, name);
    let n: u64 = t.ne.iter().product();
    t.data.truncate(t.qtype.row_bytes(n as usize));
}

/// Stores the weights as another type.
pub fn store(m: &mut Model, name: &str, qtype: GgmlType) {
    let t = tensor(m, name);
    let mut weights = vec![0.0; t.ne.iter().product::<u64>() as usize];
    dequantize_row(t.qtype, &t.data, &mut weights);
    t.data = quantize_row(qtype, &weights).unwrap_or_else(|| panic!("{qtype} has a quantizer"));
    t.qtype = qtype;
}

/// Takes the last block of 32 from the inside of every feed-forward block of a dense Qwen3.
pub fn narrow(m: &mut Model) {
    let n_ff = tensor(m, "blk.0.ffn_gate.weight").ne[1] - 32;
    for t in &mut m.tensors {
        let row_bytes = t.row_bytes();
        if t.name.contains(".ffn_gate.") || t.name.contains(".ffn_up.") {
            t.ne[1] = n_ff;
            t.data.truncate(n_ff as usize * row_bytes);
        } else if t.name.contains(".ffn_down.") {
            t.ne[0] = n_ff;
            let kept = t.row_bytes();
            t.data = t.data.chunks_exact(row_bytes).flat_map(|row| &row[..kept]).copied().collect();
        }
    }
    put(m, "qwen3.feed_forward_length", Value::U32(n_ff as u32));
}
