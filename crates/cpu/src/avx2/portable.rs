//! The types that are unpacked by the portable code and multiplied by a fast tile.

use std::arch::x86_64::*;

use apr_core::qtype::GgmlType;

use super::{Format, Strip, tile};
use crate::kernels::{Panel, Q8Block, STRIP};
use crate::scalar::{Unpacked, unpack};

/// A type by its place in [`GgmlType::ALL`].
pub(super) struct Portable<const TYPE: usize>;

/// Unpacks and interleaves super-block `s` of eight rows, codes signed.
fn unpack_portably(qtype: GgmlType, strip: &Strip<'_>, s: usize, panel: &mut Panel) {
    let mut block = Unpacked::ZERO;
    for r in 0..STRIP {
        unpack(qtype, strip.rows[r], s, &mut block);
        for (c, code) in block.codes.into_iter().enumerate() {
            panel.codes[c / 32][c % 32 / 4][4 * r + c % 4] = code as u8;
        }
        for k in 0..16 {
            panel.scales[k][r] = [block.scales[k]; 2];
            panel.mins[k / 2][r][k % 2] = block.mins[k];
        }
        for j in 0..8 {
            (panel.d[j][r], panel.m[j][r]) = (block.d[j], block.m[j]);
        }
    }
}

impl<const TYPE: usize> Format for Portable<TYPE> {
    const TILES_FROM: usize = 0;

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn direct<const N: usize>(_: &Strip<'_>, _: [&[Q8Block]; N]) -> [__m256; N] {
        unreachable!("tiles are used from the first token on")
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn unpack(strip: &Strip<'_>, s: usize, panel: &mut Panel) {
        unpack_portably(GgmlType::ALL[TYPE], strip, s, panel);
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn tile<const N: usize>(panels: &[Panel], n_blocks: usize, x: [&[Q8Block]; N]) -> [__m256; N] {
        match GgmlType::ALL[TYPE] {
            // One exact sum per super-block; the others have a float scale per 32 columns.
            GgmlType::Q2_K | GgmlType::Q3_K => tile::super_16(panels, x),
            _ => tile::blocks_signed(panels, n_blocks, x),
        }
    }
}
