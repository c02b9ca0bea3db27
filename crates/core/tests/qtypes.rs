//! Every quant type against its golden, which holds blocks and the exact values they stand for, and the reference
//! quantizers against their bounds.

use apr_core::qtype::{GgmlType, dequantize_row, quantize_row};
use proptest::prelude::*;
use safetensors::SafeTensors;

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/qtypes-8x256.safetensors");
const ROWS: usize = 8;
const COLUMNS: usize = 256;

/// The types with a quantizer, and how far a weight may move, as a share of the largest magnitude in its block: half a
/// step, or a whole one where the codes reach farther on one side; a little more for scales that are rounded
/// themselves.
const QUANTIZERS: [(GgmlType, f32); 10] = [
    (GgmlType::F32, 0.0),
    (GgmlType::F16, 1.0 / 2048.0),
    (GgmlType::BF16, 1.0 / 256.0),
    (GgmlType::Q8_0, 1.05 / 254.0),
    (GgmlType::Q4_0, 1.01 / 8.0),
    (GgmlType::Q4_1, 1.05 / 15.0),
    (GgmlType::Q5_0, 1.01 / 16.0),
    (GgmlType::Q5_1, 1.05 / 31.0),
    (GgmlType::Q4_K, 1.0 / 15.0 + 1.0 / 63.0 + 1.0 / 126.0 + 0.005),
    (GgmlType::Q6_K, 1.0 / 32.0 + 1.0 / 128.0),
];

fn golden() -> Vec<u8> {
    std::fs::read(GOLDEN).expect("the golden of the quant types is in fixtures/")
}

/// The bytes of one golden tensor; fails, by name, where it is missing.
fn bytes<'a>(file: &SafeTensors<'a>, name: &str) -> &'a [u8] {
    file.tensor(name).unwrap_or_else(|e| panic!("{name} in {GOLDEN}: {e}")).data()
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

fn dequantized(qtype: GgmlType, bytes: &[u8], n: usize) -> Vec<f32> {
    let mut out = vec![f32::NAN; n];
    dequantize_row(qtype, bytes, &mut out);
    out
}

fn rms_error(a: &[f32], b: &[f32]) -> f64 {
    let sum: f64 = a.iter().zip(b).map(|(x, y)| f64::from(x - y).powi(2)).sum();
    (sum / a.len() as f64).sqrt()
}

#[test]
fn every_type_reads_its_golden_bit_for_bit() {
    let file = golden();
    let file = SafeTensors::deserialize(&file).unwrap();
    for qtype in GgmlType::ALL {
        // The golden has no F32 blocks: its source is one.
        let (blocks, values) = match qtype {
            GgmlType::F32 => ("source".to_string(), "source".to_string()),
            _ => (format!("{qtype}.blocks"), format!("{qtype}.values")),
        };
        let (blocks, values) = (bytes(&file, &blocks), floats(bytes(&file, &values)));
        assert_eq!(values.len(), ROWS * COLUMNS, "{qtype}");
        let row_bytes = qtype.row_bytes(COLUMNS);
        assert_eq!(blocks.len(), ROWS * row_bytes, "{qtype}");
        for row in 0..ROWS {
            let got = dequantized(qtype, &blocks[row * row_bytes..][..row_bytes], COLUMNS);
            for (i, (got, expected)) in got.iter().zip(&values[row * COLUMNS..]).enumerate() {
                assert_eq!(got.to_bits(), expected.to_bits(), "{qtype} row {row} weight {i}: {got} is not {expected}");
            }
        }
    }
}

#[test]
fn a_row_of_many_blocks_at_an_odd_address_reads_as_its_blocks_do() {
    let file = golden();
    let file = SafeTensors::deserialize(&file).unwrap();
    for qtype in GgmlType::ALL.into_iter().filter(|t| *t != GgmlType::F32) {
        let mut shifted = vec![0xff];
        shifted.extend_from_slice(bytes(&file, &format!("{qtype}.blocks")));
        let got = dequantized(qtype, &shifted[1..], ROWS * COLUMNS);
        assert_eq!(got, floats(bytes(&file, &format!("{qtype}.values"))), "{qtype}");
        dequantize_row(qtype, &[], &mut []);
    }
}

#[test]
#[should_panic(expected = "weights of Q4_K")]
fn a_row_of_the_wrong_length_is_refused() {
    dequantize_row(GgmlType::Q4_K, &[0; 143], &mut [0.0; 256]);
}

#[test]
fn the_simple_quantizers_lose_little_more_than_the_goldens() {
    let file = golden();
    let file = SafeTensors::deserialize(&file).unwrap();
    let source = floats(bytes(&file, "source"));
    for (qtype, _) in QUANTIZERS.into_iter().skip(1) {
        let ours = dequantized(qtype, &quantize_row(qtype, &source).unwrap(), source.len());
        let theirs = floats(bytes(&file, &format!("{qtype}.values")));
        let (ours, theirs) = (rms_error(&source, &ours), rms_error(&source, &theirs));
        println!("{qtype}: {ours:.3e} against {theirs:.3e}");
        assert!(ours <= 1.1 * theirs, "{qtype}: rms error {ours:e} against {theirs:e}");
    }
}

#[test]
fn types_without_a_quantizer_say_so() {
    for qtype in GgmlType::ALL {
        let has_one = QUANTIZERS.iter().any(|q| q.0 == qtype);
        assert_eq!(quantize_row(qtype, &[0.0; COLUMNS]).is_some(), has_one, "{qtype}");
    }
}

#[test]
fn zeros_and_weights_below_every_scale_survive_a_round_trip() {
    for (qtype, _) in QUANTIZERS {
        for x in [[0.0; COLUMNS], [1e-30; COLUMNS], [-1e-30; COLUMNS]] {
            let got = dequantized(qtype, &quantize_row(qtype, &x).unwrap(), COLUMNS);
            assert!(got.iter().all(|v| v.abs() <= 1.01e-30), "{qtype}: {:?} of {:?}", got[0], x[0]);
        }
    }
}

proptest! {
    // The failing case is printed in full; a file beside the test would add nothing.
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_round_trip_stays_within_the_bound(
        unit in prop::collection::vec(-1f32..=1.0, 2 * COLUMNS),
        magnitudes in prop::collection::vec(-3..=10i32, 2),
        offset in -1f32..=1.0,
    ) {
        let x: Vec<f32> =
            unit.iter().enumerate().map(|(i, u)| (u + offset) * 2f32.powi(magnitudes[i / COLUMNS])).collect();
        for (qtype, share) in QUANTIZERS {
            let blocks = quantize_row(qtype, &x).unwrap();
            prop_assert_eq!(blocks.len(), qtype.row_bytes(x.len()));
            let got = dequantized(qtype, &blocks, x.len());
            let n = qtype.block_len();
            for (x, got) in x.chunks(n).zip(got.chunks(n)) {
                let bound = share * x.iter().fold(0.0, |a: f32, v| a.max(v.abs())) + f32::EPSILON;
                for (x, got) in x.iter().zip(got) {
                    prop_assert!((x - got).abs() <= bound, "{}: {} became {}, bound {}", qtype, x, got, bound);
                }
            }
        }
    }
}
