//! Backend for CPUs.

#[cfg(target_arch = "x86_64")]
mod avx2;
pub mod kernels;
mod scalar;
