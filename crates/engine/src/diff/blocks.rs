//! Which quantized block of a weight's row two devices read differently: where the file is the same, only what they compute can tell.
//!
//! The op runs on both with all but one block of its input zeroed, one row of the batch per block. The block whose two results are
//! furthest apart is named, if rounding does not explain it.

use apr_core::backend::Precision;

use super::exact::exact;
use super::measure::RowDiff;
use super::op::{Input, Kind, StageOp};
use super::site::{self, rows_of};
use super::verdict::{FLOAT_NOISE, Mode};
use super::{Finding, ModelSource, SideInfo};
use crate::device::{self, Device};
use crate::engine::EngineError;
use crate::model_file::ModelFile;
use crate::trace::file::SavedTrace;

/// Findings that are looked into: each makes two backends.
const FINDINGS_MAX: usize = 4;
/// How many times the noise the results of a block must be apart.
const RATIO_MIN: f64 = 3.0;

/// Names the blocks of the first findings whose weights are one file's. `tape` is side A's pass.
pub(super) fn name(
    findings: &mut [Finding],
    (file, tape): (&ModelFile, &SavedTrace),
    sides: [(&ModelSource, &SideInfo); 2],
) -> Result<(), EngineError> {
    let open = |f: &&mut Finding| matches!(f.mode, Mode::Isolated | Mode::Free) && f.spot.super_block.is_none();
    for finding in findings.iter_mut().filter(open).take(FINDINGS_MAX) {
        let Ok(taken) = site::take(tape, file, sides[0].1.kv_type(), finding) else { continue };
        let row = taken.spot.row.and_then(|r| r.checked_sub(taken.first_row));
        let (Kind::Product { .. }, Some(row)) = (&taken.op.kind, row) else { continue };
        let Some(masked) = masked(&taken.op) else { continue };
        let mut results = Vec::new();
        for (source, _) in sides {
            results.extend(device::run_ops(source.options.device, &[&masked])?.0);
        }
        let is_int8 = sides.iter().any(|(_, info)| info.precision() == Precision::Int8);
        let activations = if is_int8 { Precision::Int8 } else { Precision::F32 };
        finding.spot.super_block = standing_out(&masked, row, &results[0], &results[1], activations)?;
    }
    Ok(())
}

/// The op with a row of input per block of the weight's row, zero outside the block. `None` where weights are no blocks.
fn masked(op: &StageOp) -> Option<StageOp> {
    let n = op.weight().qtype.block_len();
    let x = &op.inputs[0].values;
    if n == 1 {
        return None;
    }
    let mut values = vec![0.0; x.len() * (x.len() / n)];
    for (i, row) in values.chunks_exact_mut(x.len()).enumerate() {
        row[i * n..(i + 1) * n].copy_from_slice(&x[i * n..(i + 1) * n]);
    }
    Some(StageOp { inputs: vec![Input { n_cols: x.len(), values }], ..op.clone() })
}

/// The block at which two results of a masked op are furthest apart in weight row `row`, if by more than rounding.
fn standing_out(
    masked: &StageOp,
    row: usize,
    a: &[f32],
    b: &[f32],
    activations: Precision,
) -> Result<Option<usize>, EngineError> {
    let weight = rows_of(masked.weight(), 0, row..row + 1).expect("the row has been computed");
    let alone = StageOp { weight: Some(weight), ..masked.clone() };
    let exact: Vec<f32> = exact(&alone).iter().map(|&v| v as f32).collect();
    let rounded = device::run_ops(Device::Reference { activations }, &[&alone])?.0.concat();
    let noise = RowDiff::of(0, &exact, &rounded);
    let rms = (noise.sum_sq / noise.n.max(1) as f64).sqrt().hypot(FLOAT_NOISE * noise.rms_a());
    let n_rows = masked.weight().n_rows;
    let (a, b) = (a.chunks_exact(n_rows), b.chunks_exact(n_rows));
    let apart = a.zip(b).map(|(a, b)| RowDiff::of(0, &a[row..row + 1], &b[row..row + 1]).rms());
    let largest = apart.enumerate().max_by(|x, y| x.1.total_cmp(&y.1));
    Ok(largest.filter(|(_, apart)| *apart > RATIO_MIN * rms).map(|(block, _)| block))
}

#[cfg(test)]
mod tests {
    use apr_core::backend::faulty::{Fault, Faulty};
    use apr_core::backend::reference::Reference;
    use apr_core::backend::{Bytes, WeightData};
    use apr_core::qtype::{GgmlType, quantize_row};

    use super::*;

    const N_COLS: usize = 1024;

    fn wave(n: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * i + 3 * i) as f32 * 0.37).sin()).collect()
    }

    fn product(qtype: GgmlType) -> StageOp {
        let (n_rows, n_cols) = (5, N_COLS);
        let bytes = Bytes::from_vec(quantize_row(qtype, &wave(n_rows * n_cols)).unwrap());
        let weight = Some(WeightData { name: "w".to_string(), qtype, n_cols, n_rows, n_mat: 1, bytes });
        StageOp { kind: Kind::Product { of_expert: false }, inputs: vec![Input::row(wave(n_cols))], weight }
    }

    /// The op as a device computes it that reads one byte of row 3 wrongly.
    fn misread(op: &StageOp, byte: usize) -> StageOp {
        let w = op.weight();
        let mut bytes = w.bytes.to_vec();
        bytes[3 * w.row_bytes() + byte] ^= 0x40;
        StageOp { weight: Some(WeightData { bytes: Bytes::from_vec(bytes), ..w.clone() }), ..op.clone() }
    }

    #[test]
    fn the_block_that_a_device_misreads_is_named() {
        let cpu = Device::Cpu { n_threads: Some(2), isa: None };
        for (qtype, n_block) in [(GgmlType::Q4_K, 144), (GgmlType::Q6_K, 210), (GgmlType::Q8_0, 34)] {
            let good = masked(&product(qtype)).unwrap();
            let a = Reference;
            let a = good.run(&a).unwrap();
            for block in [0, 2, 3] {
                // A high byte of the block's scale.
                let at = if qtype == GgmlType::Q6_K { 209 } else { 1 };
                let bad = misread(&good, block * n_block + at);
                let b = device::run_ops(cpu, &[&bad]).unwrap().0.concat();
                let found = |row| standing_out(&good, row, &a, &b, Precision::Int8).unwrap();
                assert_eq!(found(3), Some(block), "{qtype}");
                assert_eq!(found(2), None, "{qtype}");
            }
        }
    }

    #[test]
    fn rounding_names_no_block_and_floats_have_none() {
        let good = masked(&product(GgmlType::Q4_K)).unwrap();
        let cpu = Device::Cpu { n_threads: Some(1), isa: None };
        let (a, b) = (good.run(&Reference).unwrap(), device::run_ops(cpu, &[&good]).unwrap().0.concat());
        for row in 0..5 {
            assert_eq!(standing_out(&good, row, &a, &b, Precision::Int8).unwrap(), None);
        }
        assert!(masked(&product(GgmlType::F32)).is_none());
    }

    #[test]
    fn a_wrong_decoder_is_found_in_every_row() {
        let good = masked(&product(GgmlType::Q6_K)).unwrap();
        let (a, b) = (good.run(&Reference).unwrap(), good.run(&Faulty(Reference, Fault::ReadQ6kAsQ4k)).unwrap());
        for row in 0..5 {
            assert!(standing_out(&good, row, &a, &b, Precision::F32).unwrap().is_some());
        }
    }
}
