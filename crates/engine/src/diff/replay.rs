//! Runs the op of a bundle on a device and says whether the difference is there again.

use apr_core::backend::Precision;

use super::bundle::{Bundle, BundleError};
use super::exact::{exact, with_kv_of};
use super::measure::{RowDiff, is_tie};
use super::op::{Kind, StageOp};
use super::verdict::FLOAT_NOISE;
use crate::device::{self, Device, DeviceInfo};

/// How many times the noise all results together may be off.
pub const RATIO_MAX: f64 = 3.0;
/// The same of one result. Rounding errors of products are sums of many, so even one of a million is less.
pub const ELEMENT_RATIO_MAX: f64 = 8.0;

/// What a device made of a bundle's op.
#[derive(Clone, Debug)]
pub struct Replay {
    pub device: DeviceInfo,
    pub precision: Precision,
    pub n_values: usize,
    /// Root mean square of the difference to what is expected, relative to the expected values.
    pub error: f64,
    /// The same of the op computed by the reference with activations rounded as the device declares, to what it would give unrounded.
    pub noise: f64,
    pub ratio: f64,
    /// The result that is furthest off.
    pub worst: usize,
    pub worst_expected: f64,
    pub worst_got: f32,
    /// The difference there, in units of the noise.
    pub worst_ratio: f64,
    pub n_bad_expected: usize,
    pub n_bad_got: usize,
    /// Results whose bits differ from what the device makes of side A's weight and constants, where they are others.
    pub n_differ: Option<usize>,
    /// Why the difference is there again, or nothing.
    pub reproduced_by: Option<Reason>,
}

/// How a difference shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// A result is a number here and none there.
    NotFinite,
    /// Other experts.
    Ids,
    /// All results together are more than [`RATIO_MAX`] times the noise off.
    Ratio,
    /// One result is more than [`ELEMENT_RATIO_MAX`] times the noise off.
    Element,
    /// Two sides that had to compute the same bits do not.
    Bits,
}

impl Reason {
    pub fn name(self) -> &'static str {
        match self {
            Reason::NotFinite => "not_finite",
            Reason::Ids => "ids",
            Reason::Ratio => "ratio",
            Reason::Element => "element",
            Reason::Bits => "bits",
        }
    }
}

/// Runs a bundle's op, with side B's weight and constants, on a device.
///
/// # Errors
/// A device that is not there or cannot compute the op.
pub fn replay(bundle: &Bundle, device: Device) -> Result<Replay, BundleError> {
    let (op, op_a) = (&bundle.op, bundle.op_a.as_ref());
    let ops: Vec<&StageOp> = [op].into_iter().chain(op_a).collect();
    let (mut results, precision, device) = device::run_ops(device, &ops)?;
    let of_a = if op_a.is_some() { results.pop() } else { None };
    let got = results.pop().expect("an op gives a result");
    let n_differ = of_a.map(|of_a| RowDiff::of(0, &of_a, &got).n_differ);
    let declared = Device::Reference { activations: precision };
    let rounded = device::run_ops(declared, &[op])?.0.pop().expect("an op gives a result");
    // Keys and values that the sides store otherwise are part of the noise.
    let unrounded = numbers(&exact(&op_a.map_or(op.clone(), |a| with_kv_of(op, a))));
    let expected = numbers(&bundle.expected);
    let got = numbers_of(&got);
    let (rounded, noise) = (numbers_of(&rounded), RowDiff::of(0, &unrounded, &numbers_of(&rounded)));
    let noise_rms = (noise.sum_sq / noise.n.max(1) as f64).sqrt().hypot(FLOAT_NOISE * noise.rms_a());
    let d = RowDiff::of(0, &expected, &got);
    let of_element = |i: usize| {
        let off = |a: &[f32], b: &[f32]| (f64::from(a[i]) - f64::from(b[i])).abs();
        quotient(off(&expected, &got), noise_rms.max(off(&unrounded, &rounded)))
    };
    let finite = |i: &usize| expected[*i].is_finite() && got[*i].is_finite();
    let largest = (0..got.len()).filter(finite).max_by(|&a, &b| of_element(a).total_cmp(&of_element(b)));
    let worst = if d.is_bad { d.worst } else { largest.unwrap_or_default() };
    let worst_ratio = if d.is_bad { f64::INFINITY } else { largest.map_or(0.0, of_element) };
    let size = if d.sum_sq_a > 0.0 { d.rms_a() } else { 1.0 };
    let ratio = quotient(d.rms(), noise_rms);
    let reproduced_by = match () {
        () if matches!(op.kind, Kind::Route { ids: true, .. }) => other_ids(op, &expected, &got).then_some(Reason::Ids),
        () if d.is_bad => Some(Reason::NotFinite),
        () if ratio > RATIO_MAX => Some(Reason::Ratio),
        () if worst_ratio > ELEMENT_RATIO_MAX => Some(Reason::Element),
        () => (bundle.by_bits && n_differ.is_some_and(|n| n > 0)).then_some(Reason::Bits),
    };
    Ok(Replay {
        device,
        precision,
        n_values: got.len(),
        error: d.rms() / size,
        noise: noise_rms / size,
        ratio,
        worst,
        worst_expected: bundle.expected[worst],
        worst_got: got[worst],
        worst_ratio,
        n_bad_expected: d.n_bad_a,
        n_bad_got: d.n_bad_b,
        n_differ,
        reproduced_by,
    })
}

/// Which of the two sides' experts are not the same but for ties.
fn other_ids(op: &StageOp, expected: &[f32], got: &[f32]) -> bool {
    let logits = &op.inputs[0].values;
    expected.iter().zip(got).any(|(&a, &b)| !is_tie(logits, a, b))
}

/// Values in 32 bits. What is no number may be infinite or NaN, depending on the order of sums: both become NaN.
fn numbers(values: &[f64]) -> Vec<f32> {
    numbers_of(&values.iter().map(|&v| v as f32).collect::<Vec<_>>())
}

fn numbers_of(values: &[f32]) -> Vec<f32> {
    values.iter().map(|&v| if v.is_finite() { v } else { f32::NAN }).collect()
}

/// `a / b`, where nothing over nothing is nothing.
fn quotient(a: f64, b: f64) -> f64 {
    if a == 0.0 { 0.0 } else { a / b }
}

#[cfg(test)]
mod tests {
    use apr_core::backend::{Bytes, Heads, KvType, WeightData};
    use apr_core::qtype::{GgmlType, quantize_row};
    use apr_core::rope::{Pairing, Rope, Scaling};

    use super::*;
    use crate::diff::op::Input;

    /// Values that look like a model's, the same each time.
    fn values(n: usize, seed: u64) -> Vec<f32> {
        let mut x = 0x9E37_79B9_7F4A_7C15u64.wrapping_mul(seed + 1);
        let mut uniform = || {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (x >> 40) as f32 / (1 << 24) as f32 - 0.5
        };
        (0..n).map(|_| uniform() + uniform() + uniform() + uniform()).collect()
    }

    fn weight(qtype: GgmlType, n_rows: usize, n_cols: usize) -> Option<WeightData> {
        let bytes = quantize_row(qtype, &values(n_rows * n_cols, 7)).expect("the type has a quantizer");
        Some(WeightData { name: "w".to_string(), qtype, n_cols, n_rows, n_mat: 1, bytes: Bytes::from_vec(bytes) })
    }

    fn op(kind: Kind, inputs: &[(usize, usize)], weight: Option<WeightData>) -> StageOp {
        let input = |(i, &(n_rows, n_cols)): (usize, &(usize, usize))| Input {
            n_cols,
            values: values(n_rows * n_cols, i as u64),
        };
        StageOp { kind, inputs: inputs.iter().enumerate().map(input).collect(), weight }
    }

    fn every_kind() -> Vec<StageOp> {
        use GgmlType::{F32, Q4_K, Q8_0};
        let heads = Heads { n_head: 6, n_head_kv: 2, head_dim: 64 };
        let attention =
            |n: usize, kv_type| op(Kind::Attention { heads, kv_type }, &[(1, 384), (n, 128), (n, 128)], None);
        let rotate = |pairing, n_rot| Kind::Rotate {
            eps: 1e-6,
            head_dim: 64,
            rope: Rope::new(pairing, n_rot, 1e4, Scaling::None, None),
            position: 1234,
        };
        vec![
            op(Kind::Product { of_expert: false }, &[(1, 512)], weight(Q4_K, 40, 512)),
            op(Kind::Product { of_expert: true }, &[(3, 96)], weight(Q8_0, 17, 96)),
            op(Kind::Product { of_expert: false }, &[(1, 40)], weight(F32, 1, 40)),
            op(Kind::Norm { eps: 1e-5 }, &[(1, 40)], weight(F32, 1, 40)),
            op(Kind::Bias, &[(1, 40)], weight(GgmlType::F16, 1, 40)),
            op(rotate(Pairing::Halves, 64), &[(1, 192)], weight(F32, 1, 64)),
            op(rotate(Pairing::Adjacent, 32), &[(1, 192)], None),
            op(Kind::Embedding, &[], weight(Q4_K, 1, 256)),
            attention(1, KvType::F32),
            attention(64, KvType::F16),
            attention(65, KvType::Q8_0),
            attention(200, KvType::F16),
            op(Kind::Route { n_used: 8, ids: false }, &[(1, 128)], None),
            op(Kind::Route { n_used: 8, ids: true }, &[(1, 128)], None),
            op(Kind::Silu, &[(1, 100)], None),
            op(Kind::Swiglu, &[(1, 100), (1, 100)], None),
            op(Kind::WeightedSum, &[(1, 320), (1, 8)], None),
            op(Kind::Add, &[(1, 100), (1, 100)], None),
        ]
    }

    fn bundle(op: StageOp) -> Bundle {
        op.check().unwrap();
        let expected = exact(&op);
        assert_eq!(expected.len(), op.n_results());
        Bundle { op, op_a: None, expected, got_a: None, got_b: None, about: Vec::new(), by_bits: false }
    }

    const CPU: Device = Device::Cpu { n_threads: Some(2), isa: None };
    const REFERENCE: Device = Device::Reference { activations: Precision::F32 };

    #[test]
    fn every_op_gives_what_it_should_and_what_is_off_is_told() {
        for op in every_kind() {
            let (name, mut bundle) = (op.kind.name(), bundle(op));
            for device in [CPU, REFERENCE] {
                let done = replay(&bundle, device).unwrap();
                assert!(done.reproduced_by.is_none() && done.ratio < 1.5, "{name} on {device:?}: {done:?}");
            }
            let last = bundle.expected.len() - 1;
            bundle.expected[last] += 1.0;
            for device in [CPU, REFERENCE] {
                let done = replay(&bundle, device).unwrap();
                assert!(done.reproduced_by.is_some() && done.worst == last, "{name} on {device:?}: {done:?}");
            }
            bundle.expected[last] = f64::NAN;
            assert!(replay(&bundle, CPU).unwrap().reproduced_by.is_some(), "{name}");
        }
    }

    #[test]
    fn a_file_holds_all_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bundle");
        for op in every_kind() {
            let mut before = bundle(op);
            before.got_b = Some(vec![1.5; before.expected.len()]);
            before.about = vec![("stage".to_string(), "attn_norm".to_string())];
            before.write(&path).unwrap();
            let after = Bundle::read(&path).unwrap();
            assert_eq!((&after.op.kind, &after.op.inputs), (&before.op.kind, &before.op.inputs));
            assert_eq!((&after.expected, &after.got_b, &after.got_a), (&before.expected, &before.got_b, &None));
            let weight = |b: &Bundle| b.op.weight.as_ref().map(|w| (w.qtype, w.n_rows, w.n_cols, w.bytes.to_vec()));
            assert!(weight(&after) == weight(&before) && after.op_a.is_none());
            assert_eq!(after.get("stage"), Some("attn_norm"));
        }
    }

    proptest::proptest! {
        #[test]
        fn a_strangers_file_is_run_or_refused(
            which in 0..18usize,
            changes in proptest::collection::vec((proptest::num::usize::ANY, proptest::num::u8::ANY), 1..4),
            digits in proptest::bool::ANY,
        ) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("bundle");
            bundle(every_kind().swap_remove(which)).write(&path).unwrap();
            let mut bytes = std::fs::read(&path).unwrap();
            let n_header = 8 + bytes[0] as usize + 256 * bytes[1] as usize;
            // Numbers in the header are where a file can lie and still be read.
            let at: Vec<usize> = match digits {
                true => (8..n_header).filter(|&i| bytes[i].is_ascii_digit()).collect(),
                false => (0..bytes.len()).collect(),
            };
            for (i, byte) in changes {
                bytes[at[i % at.len()]] = if digits { b'0' + byte % 10 } else { byte };
            }
            if let Ok(bundle) = Bundle::parse(&path, &bytes) {
                replay(&bundle, REFERENCE).unwrap();
                replay(&bundle, CPU).unwrap();
            }
        }
    }

    #[test]
    fn an_op_whose_sizes_do_not_fit_is_refused() {
        for good in every_kind() {
            for i in 0..good.inputs.len() {
                let mut bad = good.clone();
                bad.inputs[i].n_cols = 0;
                assert!(bad.check().is_err(), "{}", good.kind.name());
                let mut bad = good.clone();
                bad.inputs.pop();
                assert!(bad.check().is_err(), "{}", good.kind.name());
            }
            if let Some(w) = &good.weight {
                let weight = WeightData { bytes: Bytes::from_vec(w.bytes[1..].to_vec()), ..w.clone() };
                assert!(StageOp { weight: Some(weight), ..good.clone() }.check().is_err(), "{}", good.kind.name());
            }
        }
    }

    #[test]
    fn keys_and_values_that_the_sides_store_otherwise_are_noise() {
        let heads = Heads { n_head: 2, n_head_kv: 1, head_dim: 32 };
        let of = |kv_type| op(Kind::Attention { heads, kv_type }, &[(1, 64), (90, 32), (90, 32)], None);
        let a = of(KvType::F16);
        let both = Bundle { op_a: Some(a.clone()), expected: exact(&a), ..bundle(of(KvType::Q8_0)) };
        let done = replay(&both, CPU).unwrap();
        assert!(done.error > 1e-3 && done.ratio < 1.5 && done.reproduced_by.is_none(), "{done:?}");
    }

    #[test]
    fn one_wrong_row_of_many_is_not_lost_among_them() {
        let mut b = bundle(op(Kind::Product { of_expert: false }, &[(1, 256)], weight(GgmlType::Q4_K, 4096, 256)));
        b.expected[4000] += 0.5;
        let done = replay(&b, CPU).unwrap();
        assert!(done.ratio < RATIO_MAX && done.worst == 4000, "{done:?}");
        assert_eq!(done.reproduced_by, Some(Reason::Element));
    }
}
