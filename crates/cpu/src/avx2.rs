//! Kernels for x86-64 with AVX2, FMA and F16C.
use crate::kernels::{Isa, Kernels};
use crate::scalar;

pub(crate) static KERNELS: Kernels =
    Kernels::new(Isa::Avx2, scalar::quantize_row, scalar::matmul_q8, scalar::matmul_f32);
