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
