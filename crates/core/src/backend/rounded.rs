//! A backend that rounds activations where others declare that they do, and is otherwise the backend it wraps. Around the reference it
//! makes the error that a precision must have, which is the noise that comparisons judge by.

use super::decorator::delegate;
use super::{Backend, Precision, Result, WeightData};
use crate::stage::Stage;

/// `B` with the inputs of quantized weights rounded as [`Precision::Int8`] says.
pub struct Rounded<B>(pub B);

impl<B: Backend<Weight = WeightData>> Backend for Rounded<B> {
    delegate!(types);
    delegate!(plain);
    delegate!(attention);

    fn precision(&self) -> Precision {
        Precision::Int8
    }

    fn shows(&self, stage: Stage) -> bool {
        self.0.shows(stage)
    }

    fn matmul(&self, out: &mut Self::Tensor, at: usize, w: &Self::Weight, x: &Self::Tensor) -> Result<()> {
        self.0.matmul(out, at, w, &self.rounded(x, w)?)
    }

    fn matmul_experts(
        &self,
        out: &mut Self::Tensor,
        w: &Self::Weight,
        ids: &Self::Ids,
        x: &Self::Tensor,
    ) -> Result<()> {
        self.0.matmul_experts(out, w, ids, &self.rounded(x, w)?)
    }
}

impl<B: Backend<Weight = WeightData>> Rounded<B> {
    /// `x` as a product with `w` sees it.
    fn rounded(&self, x: &B::Tensor, w: &WeightData) -> Result<B::Tensor> {
        let mut values = Vec::new();
        self.0.read(x, &mut values)?;
        if !w.qtype.is_float() {
            values.chunks_exact_mut(w.n_cols).for_each(round_int8);
        }
        let mut out = self.0.tensor(self.0.shape(x).1, &[w]);
        self.0.write(&mut out, &values)?;
        Ok(out)
    }
}

/// Columns that share a float scale.
const SUPER: usize = 256;
/// The largest code.
const MAX_CODE: f32 = 127.0;
/// The largest integer sub-scale, of which every 32 columns have one.
const MAX_SCALE: f32 = 32.0;

/// Rounds a row of activations to 8-bit codes with a float scale per 256 and an integer sub-scale per 32 columns. What is not finite
/// makes NaN of its 256 columns, as it does of every product they take part in.
pub fn round_int8(x: &mut [f32]) {
    let amax = |x: &[f32]| x.iter().fold(0f32, |a, v| a.max(v.abs()));
    for x in x.chunks_mut(SUPER) {
        let d = amax(x) / (MAX_CODE * MAX_SCALE);
        if x.iter().any(|v| !v.is_finite()) {
            x.fill(f32::NAN);
        } else if d < f32::MIN_POSITIVE {
            x.fill(0.0);
        } else {
            for x in x.chunks_mut(32) {
                let scale = (amax(x) / (MAX_CODE * d)).ceil().clamp(1.0, MAX_SCALE) * d;
                x.iter_mut().for_each(|v| *v = (*v / scale).round_ties_even().clamp(-MAX_CODE, MAX_CODE) * scale);
            }
        }
    }
}
