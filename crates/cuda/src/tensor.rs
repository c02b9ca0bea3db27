//! Tensors, ids and weights on a device.

use std::cell::RefCell;

use apr_core::backend::WeightData;
use apr_core::qtype::{self, GgmlType};

use crate::driver::{Arg, Result};
use crate::host::HostWeight;
use crate::memory::{Buffer, Device};

/// Rows of floats on a device, and their 8-bit form once a product has needed it.
pub struct CudaTensor {
    device: Device,
    /// At least `[n_rows, n_cols]`
    data: Option<Buffer>,
    n_rows: usize,
    n_cols: usize,
    /// Whether it is multiplied with quantized weights, so that ops that write it had better make its 8-bit form too.
    feeds_quantized: bool,
    q8: RefCell<Q8>,
}

/// The 8-bit form of a tensor: a byte per value, and scale and sum of every 32.
#[derive(Default)]
struct Q8 {
    codes: Option<Buffer>,
    scales: Option<Buffer>,
    /// Whether it is that of the tensor's present values.
    is_fresh: bool,
}

/// Rows of expert ids on a device.
pub struct CudaIds {
    device: Device,
    data: Option<Buffer>,
    n_rows: usize,
    n_cols: usize,
}

/// A weight tensor, its blocks taken apart into planes.
pub struct CudaWeight {
    pub qtype: GgmlType,
    pub n_cols: usize,
    pub n_rows: usize,
    pub n_mat: usize,
    planes: Vec<Buffer>,
    /// The values of a vector, such as a norm, as floats.
    vector: Option<Buffer>,
    /// Where it is if it is on the host, and then nothing of it is on the device.
    pub(crate) host: Option<HostWeight>,
}

/// Rows that a buffer has room for, so that it need not grow with every step.
fn roomy(n_rows: usize) -> usize {
    if n_rows <= 64 { n_rows.next_power_of_two() } else { n_rows.next_multiple_of(128) }
}

/// Gives `buffer` room for `n_bytes`; what it held is lost where it grows.
pub(crate) fn ensure(device: &Device, buffer: &mut Option<Buffer>, n_bytes: usize) -> Result<()> {
    if buffer.as_ref().is_none_or(|b| b.n_bytes() < n_bytes) {
        *buffer = None;
        *buffer = Some(device.alloc(n_bytes)?);
    }
    Ok(())
}

impl CudaTensor {
    pub(crate) fn new(device: &Device, n_cols: usize, consumers: &[&CudaWeight]) -> CudaTensor {
        let feeds_quantized = consumers.iter().any(|w| !w.qtype.is_float());
        CudaTensor { device: device.clone(), data: None, n_rows: 0, n_cols, feeds_quantized, q8: RefCell::default() }
    }

    pub fn n_rows(&self) -> usize {
        self.n_rows
    }

    pub fn n_cols(&self) -> usize {
        self.n_cols
    }

    /// Values in all rows.
    pub fn n(&self) -> usize {
        self.n_rows * self.n_cols
    }

    /// Changes the number of rows, whose values are not defined where there were fewer.
    pub(crate) fn set_rows(&mut self, n_rows: usize) -> Result<()> {
        // Where the buffer cannot grow there are no rows.
        self.n_rows = 0;
        ensure_rows(&self.device, &mut self.data, n_rows, 4 * self.n_cols)?;
        self.n_rows = n_rows;
        self.q8.get_mut().is_fresh = false;
        Ok(())
    }

    /// The values, to be read by a launch.
    pub(crate) fn arg(&self) -> Arg {
        self.data.as_ref().map_or(Arg::Address(0), Buffer::arg)
    }

    /// The values, to be written by a launch.
    pub(crate) fn arg_mut(&mut self) -> Arg {
        self.q8.get_mut().is_fresh = false;
        self.arg()
    }

    /// The 8-bit form, codes and scales, to be written together with the values by the launch that comes next, where it is needed.
    pub(crate) fn q8_mut(&mut self) -> Result<Option<[Arg; 2]>> {
        if !self.feeds_quantized {
            return Ok(None);
        }
        let (device, n_rows, n_cols) = (&self.device, self.n_rows, self.n_cols);
        let q8 = self.q8.get_mut();
        q8.is_fresh = true;
        q8.args(device, n_rows, n_cols).map(Some)
    }

    /// The 8-bit form: codes and scales. Made at most once per content.
    pub(crate) fn q8(&self) -> Result<[Arg; 2]> {
        let mut q8 = self.q8.borrow_mut();
        let args = q8.args(&self.device, self.n_rows, self.n_cols)?;
        if !q8.is_fresh {
            let grid = [(self.n() / 4).div_ceil(256), 1, 1];
            self.device.launch("quantize", 256, grid, &[args[0], args[1], self.arg(), self.n().into()]);
            q8.is_fresh = true;
        }
        Ok(args)
    }

    pub(crate) fn read(&self, rows: std::ops::Range<usize>, out: &mut Vec<f32>) -> Result<()> {
        out.clear();
        out.resize(rows.len() * self.n_cols, 0.0);
        match &self.data {
            Some(data) => data.read(rows.start * self.n_cols * 4, bytemuck::cast_slice_mut(out)),
            None => Ok(()),
        }
    }

    pub(crate) fn write(&mut self, values: &[f32]) -> Result<()> {
        self.device.flush()?;
        self.set_rows(values.len() / self.n_cols)?;
        self.data.as_mut().map_or(Ok(()), |data| data.write(0, bytemuck::cast_slice(values)))
    }
}

impl Q8 {
    /// Codes and scales, with room for so many rows.
    fn args(&mut self, device: &Device, n_rows: usize, n_cols: usize) -> Result<[Arg; 2]> {
        assert!(n_cols.is_multiple_of(32), "quantized weights have columns in groups of 32");
        ensure_rows(device, &mut self.codes, n_rows, n_cols)?;
        ensure_rows(device, &mut self.scales, n_rows, n_cols / 32 * 8)?;
        Ok([&self.codes, &self.scales].map(|b| b.as_ref().map_or(Arg::Address(0), Buffer::arg)))
    }
}

fn ensure_rows(device: &Device, buffer: &mut Option<Buffer>, n_rows: usize, row_bytes: usize) -> Result<()> {
    if buffer.as_ref().is_none_or(|b| b.n_bytes() < n_rows * row_bytes) {
        ensure(device, buffer, roomy(n_rows) * row_bytes)?;
    }
    Ok(())
}

impl CudaIds {
    pub(crate) fn new(device: &Device, n_cols: usize) -> CudaIds {
        CudaIds { device: device.clone(), data: None, n_rows: 0, n_cols }
    }

    pub fn n_rows(&self) -> usize {
        self.n_rows
    }

    pub fn n_cols(&self) -> usize {
        self.n_cols
    }

    pub(crate) fn set_rows(&mut self, n_rows: usize) -> Result<()> {
        // Where the buffer cannot grow there are no rows.
        self.n_rows = 0;
        ensure_rows(&self.device, &mut self.data, n_rows, 4 * self.n_cols)?;
        self.n_rows = n_rows;
        Ok(())
    }

    pub(crate) fn arg(&self) -> Arg {
        self.data.as_ref().map_or(Arg::Address(0), Buffer::arg)
    }

    pub(crate) fn read(&self, out: &mut Vec<u32>) -> Result<()> {
        out.clear();
        out.resize(self.n_rows * self.n_cols, 0);
        self.data.as_ref().map_or(Ok(()), |data| data.read(0, bytemuck::cast_slice_mut(out)))
    }

    pub(crate) fn write(&mut self, values: &[u32]) -> Result<()> {
        self.device.flush()?;
        self.set_rows(values.len() / self.n_cols)?;
        self.data.as_mut().map_or(Ok(()), |data| data.write(0, bytemuck::cast_slice(values)))
    }
}

/// Where the parts of a type's blocks lie: offset and length of each plane.
///
/// Source: the block types of the GGUF specification and ggml.
pub(crate) fn planes_of(qtype: GgmlType) -> Option<&'static [(usize, usize)]> {
    Some(match qtype {
        GgmlType::Q4_K => &[(16, 128), (0, 16)],
        GgmlType::Q5_K => &[(48, 128), (0, 16), (16, 32)],
        GgmlType::Q6_K => &[(0, 128), (192, 16), (128, 64), (208, 2)],
        GgmlType::Q8_0 => &[(2, 32), (0, 2)],
        GgmlType::Q4_0 => &[(2, 16), (0, 2)],
        GgmlType::Q4_1 => &[(4, 16), (0, 4)],
        GgmlType::Q5_0 => &[(6, 16), (0, 2), (2, 4)],
        GgmlType::Q5_1 => &[(8, 16), (0, 4), (4, 4)],
        _ => return None,
    })
}

/// Bytes of blocks that are on the device twice for a moment while a tensor is taken apart.
const STAGE_BYTES: usize = 64 << 20;

impl CudaWeight {
    /// A weight none of whose values are on the device.
    pub(crate) fn without_values(data: &WeightData, host: Option<HostWeight>) -> CudaWeight {
        let &WeightData { qtype, n_cols, n_rows, n_mat, .. } = data;
        CudaWeight { qtype, n_cols, n_rows, n_mat, planes: Vec::new(), vector: None, host }
    }

    /// Takes a weight to the device. Its type is one that [`planes_of`] knows, or a float type.
    pub(crate) fn upload(device: &Device, data: &WeightData) -> Result<CudaWeight> {
        let mut weight = CudaWeight::without_values(data, None);
        if data.n_rows == 1 && data.n_mat == 1 && data.qtype.is_float() {
            let mut values = vec![0.0; data.n_cols];
            qtype::dequantize_row(data.qtype, &data.bytes, &mut values);
            weight.vector = Some(device.alloc_with(bytemuck::cast_slice(&values))?);
        }
        match planes_of(data.qtype) {
            None => weight.planes.push(device.alloc_with(&data.bytes)?),
            Some(planes) => {
                let block_bytes: usize = planes.iter().map(|p| p.1).sum();
                let n_blocks = data.bytes.len() / block_bytes;
                for (_, length) in planes {
                    weight.planes.push(device.alloc(n_blocks * length)?);
                }
                let per_stage = (STAGE_BYTES / block_bytes).min(n_blocks);
                let mut stage = device.alloc(per_stage * block_bytes)?;
                for (i, part) in data.bytes.chunks(per_stage * block_bytes).enumerate() {
                    stage.write(0, part)?;
                    for (&(offset, length), plane) in planes.iter().zip(&weight.planes) {
                        let to = Arg::Address(plane.address(i * per_stage * length));
                        let n = part.len() / block_bytes;
                        let args = [to, stage.arg(), block_bytes.into(), offset.into(), length.into(), n.into()];
                        device.launch("take_plane", 256, [(n * length / 2).div_ceil(256), 1, 1], &args);
                    }
                    device.flush()?;
                }
            }
        }
        Ok(weight)
    }

    /// The four planes as a kernel takes them; those that a type does not have are null.
    pub(crate) fn planes(&self) -> [Arg; 4] {
        std::array::from_fn(|i| self.planes.get(i).map_or(Arg::Address(0), Buffer::arg))
    }

    /// The floats of a vector.
    pub(crate) fn vector(&self) -> Arg {
        self.vector.as_ref().expect("norms and biases are vectors of floats").arg()
    }
}
