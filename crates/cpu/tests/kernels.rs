//! Every matrix kernel of every instruction set: against the exact values of golden blocks, against the portable
//! kernels bit for bit, and against itself with other tokens and rows around.

#[path = "../../core/tests/support/blocks.rs"]
mod blocks;

use apr_core::qtype::GgmlType;
use apr_cpu::kernels::{Isa, Kernels, Out, PanelScratch, Q8Rows, WeightRows};
use blocks::Rng;

/// One tensor of the golden file: its bytes.
fn golden(name: &str) -> Vec<u8> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/qtypes-8x256.safetensors");
    let file = std::fs::read(path).expect("the golden file is in the repository");
    let header_len = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let header = std::str::from_utf8(&file[8..8 + header_len]).unwrap();
    let entry = header.split_once(&format!("\"{name}\"")).unwrap_or_else(|| panic!("no golden {name}")).1;
    let offsets =
        entry.split_once("\"data_offsets\":").unwrap().1.split_once('[').unwrap().1.split_once(']').unwrap().0;
    let mut offsets = offsets.split(',').map(|n| 8 + header_len + n.trim().parse::<usize>().unwrap());
    file[offsets.next().unwrap()..offsets.next().unwrap()].to_vec()
}

/// A weight matrix made of golden blocks in random order, and its exact values.
struct Matrix {
    qtype: GgmlType,
    n_cols: usize,
    bytes: Vec<u8>,
    values: Vec<f32>,
}

impl Matrix {
    fn random(qtype: GgmlType, n_rows: usize, n_cols: usize, rng: &mut Rng) -> Matrix {
        let (blocks, values) = match qtype {
            GgmlType::F32 => (golden("source"), golden("source")),
            _ => (golden(&format!("{qtype}.blocks")), golden(&format!("{qtype}.values"))),
        };
        let values: Vec<f32> = values.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        let (len, size) = (qtype.block_len(), qtype.block_bytes());
        let mut m = Matrix { qtype, n_cols, bytes: Vec::new(), values: Vec::new() };
        for _ in 0..n_rows * n_cols / len {
            let i = rng.below(values.len() / len);
            m.bytes.extend(&blocks[i * size..(i + 1) * size]);
            m.values.extend(&values[i * len..(i + 1) * len]);
        }
        m
    }

    fn rows(&self) -> WeightRows<'_> {
        WeightRows::new(self.qtype, &self.bytes, self.n_cols)
    }
}

/// The tables of every instruction set: with its instructions where the CPU has them, and lane by lane where there is
/// such a table.
fn tables() -> Vec<&'static Kernels> {
    let missing = Isa::ALL.into_iter().filter(|&isa| Kernels::for_isa(isa).is_none());
    missing.for_each(|isa| println!("skipped: needs a CPU with {isa}"));
    Isa::ALL.into_iter().flat_map(|isa| [Kernels::for_isa(isa), Kernels::emulated(isa)]).flatten().collect()
}

fn quantize(k: &Kernels, x: &[f32], n_cols: usize) -> Q8Rows {
    let mut rows = Q8Rows::new();
    rows.resize(x.len() / n_cols, n_cols);
    for (i, row) in x.chunks_exact(n_cols).enumerate() {
        k.quantize_row(row, rows.row_mut(i));
    }
    rows
}

/// The product of all rows with the tokens `x_rows`, in the order of `x_rows`.
fn product(k: &Kernels, w: WeightRows<'_>, x: &[f32], x_rows: &[u32]) -> Vec<f32> {
    let mut out = vec![f32::NAN; x_rows.len() * w.n_rows()];
    let out_rows: Vec<u32> = (0..x_rows.len() as u32).collect();
    let mut to = Out::new(&mut out, w.n_rows());
    if w.qtype().is_float() {
        k.matmul_f32(w, x, x_rows, &mut to, &out_rows);
    } else {
        let q8 = quantize(k, x, w.n_cols());
        k.matmul_q8(w, &q8, x_rows, &mut to, &out_rows, &mut PanelScratch::new());
    }
    out
}

fn assert_same_bits(got: &[f32], want: &[f32], what: impl Fn() -> String) {
    assert_eq!(got.len(), want.len());
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        let same = g.to_bits() == w.to_bits() || (g.is_nan() && w.is_nan());
        assert!(same, "{}: value {i} is {g:e}, expected {w:e}", what());
    }
}

fn widths(qtype: GgmlType) -> &'static [usize] {
    match qtype.block_len() {
        1 => &[256, 512, 96, 576, 1, 7, 33, 259, 1100],
        32 => &[256, 512, 32, 96, 576],
        _ => &[256, 512, 768],
    }
}

fn quantized() -> impl Iterator<Item = GgmlType> {
    GgmlType::ALL.into_iter().filter(|q| !q.is_float())
}

#[test]
fn start_up_chooses_only_what_is_proven() {
    assert!(Isa::PROVEN.contains(&Kernels::detect().isa()));
    let unproven = Isa::ALL.into_iter().filter(|isa| !Isa::PROVEN.contains(isa));
    for isa in unproven.filter(|_| Kernels::for_isa(Isa::Avx2).is_some()) {
        assert_eq!(Kernels::emulated(isa).map(|k| k.isa()), Some(isa), "{isa} is tested in emulation");
    }
}

#[test]
fn products_are_those_of_the_exact_values() {
    let mut rng = Rng(1);
    for qtype in GgmlType::ALL {
        for &n_cols in widths(qtype) {
            let m = Matrix::random(qtype, 9, n_cols, &mut rng);
            let x = rng.activations(3 * n_cols);
            for k in tables() {
                let values: Vec<f32> = if qtype.is_float() {
                    x.clone()
                } else {
                    let rows = quantize(k, &x, n_cols);
                    let row = |t| rows.row(t).iter().flat_map(|b| b.dequantize()).take(n_cols);
                    (0..3).flat_map(row).collect()
                };
                let got = product(k, m.rows(), &x, &[0, 1, 2]);
                for (t, x) in values.chunks_exact(n_cols).enumerate() {
                    for (r, w) in m.values.chunks_exact(n_cols).enumerate() {
                        let terms = w.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x));
                        let (want, size): (f64, f64) = (terms.clone().sum(), terms.map(f64::abs).sum());
                        let got = f64::from(got[t * 9 + r]);
                        let off = (got - want).abs() / size;
                        assert!(off < 1e-5, "{} {qtype} {n_cols}: {got} is not {want}, off {off:e}", k.isa());
                    }
                }
            }
        }
    }
}

#[test]
fn quantized_activations_are_close_to_the_floats() {
    let mut rng = Rng(2);
    for k in tables() {
        let mut x = rng.activations(1000);
        x[512..544].fill(0.0);
        let rows = quantize(k, &x, 1000);
        let back: Vec<f32> = rows.row(0).iter().flat_map(|b| b.dequantize()).collect();
        assert_eq!(back.len(), 1024);
        assert!(back[1000..].iter().chain(&back[512..544]).all(|v| *v == 0.0));
        for (s, block) in x.chunks(256).enumerate() {
            let amax = |x: &[f32]| x.iter().fold(0.0f32, |a, v| a.max(v.abs()));
            for (j, x) in block.chunks(32).enumerate() {
                // Half a step of the sub-block's scale, which is rounded up by at most 1/32 of the super-block's.
                let bound = 0.5 / 127.0 * (amax(x) + amax(block) / 32.0) * 1.0001;
                for (c, v) in x.iter().enumerate() {
                    let off = (back[256 * s + 32 * j + c] - v).abs();
                    assert!(off <= bound, "{}: {v} is off by {off}, allowed {bound}", k.isa());
                }
            }
        }
    }
}

#[test]
fn every_instruction_set_gives_the_bits_of_the_portable_kernels() {
    let mut rng = Rng(3);
    let scalar = Kernels::for_isa(Isa::Scalar).unwrap();
    for k in tables() {
        for qtype in quantized() {
            for &n_cols in widths(qtype) {
                for n_rows in [1, 7, 8, 9, 17] {
                    let m = Matrix::random(qtype, n_rows, n_cols, &mut rng);
                    let x = rng.activations(33 * n_cols);
                    for n in (1..=9).chain([33]) {
                        let tokens: Vec<u32> = (0..n).collect();
                        let want = product(scalar, m.rows(), &x, &tokens);
                        let got = product(k, m.rows(), &x, &tokens);
                        assert_same_bits(&got, &want, || format!("{} {qtype} {n_rows}x{n_cols}, {n} tokens", k.isa()));
                    }
                }
            }
        }
    }
}

/// As many rows and tokens as make every kind of tile: whole sets of strips and a last one, two to five groups of eight
/// tokens at a time, the last one full or not, one to four tokens beside them, and more tokens than are interleaved at a time.
#[test]
fn tiles_of_every_size_give_the_bits_of_the_portable_kernels() {
    let mut rng = Rng(5);
    let scalar = Kernels::for_isa(Isa::Scalar).unwrap();
    for k in tables() {
        for qtype in quantized() {
            let (n_rows, n_cols) = (43, widths(qtype)[0]);
            let m = Matrix::random(qtype, n_rows, n_cols, &mut rng);
            let x = rng.activations(147 * n_cols);
            for n in [11, 13, 15, 16, 17, 22, 26, 35, 44, 53, 63, 147] {
                let tokens: Vec<u32> = (0..n).collect();
                let want = product(scalar, m.rows(), &x, &tokens);
                let got = product(k, m.rows(), &x, &tokens);
                assert_same_bits(&got, &want, || format!("{} {qtype} {n_rows}x{n_cols}, {n} tokens", k.isa()));
            }
        }
    }
}

/// What a kernel keeps from one call to the next is used again only for the same tokens of the same rows in the same order.
#[test]
fn products_one_after_another_are_those_of_each_alone() {
    let mut rng = Rng(6);
    let (n_rows, n_cols) = (16, 256);
    for k in tables() {
        let (mut scratch, mut q8) = (PanelScratch::new(), Q8Rows::new());
        let types: Vec<GgmlType> = quantized().collect();
        for call in 0..12 * types.len() {
            let m = Matrix::random(types[rng.below(types.len())], n_rows, n_cols, &mut rng);
            // Now and then the rows are written again, one of them, or all, or they are others at the same place.
            match rng.below(5) {
                _ if call == 0 => q8 = quantize(k, &rng.activations(40 * n_cols), n_cols),
                0 => k.quantize_row(&rng.activations(n_cols), q8.row_mut(3)),
                // SAFETY: nobody else asks for rows meanwhile.
                1 => k.quantize_row(&rng.activations(n_cols), unsafe { q8.shared().row(5) }),
                2 => q8 = quantize(k, &rng.activations(40 * n_cols), n_cols),
                _ => {}
            }
            let from = rng.below(3) as u32;
            let tokens: Vec<u32> = (from..from + [9, 17, 33][rng.below(3)]).collect();
            let out_rows: Vec<u32> = (0..tokens.len() as u32).collect();
            let (mut got, mut want) = (vec![f32::NAN; n_rows * tokens.len()], vec![f32::NAN; n_rows * tokens.len()]);
            k.matmul_q8(m.rows(), &q8, &tokens, &mut Out::new(&mut got, n_rows), &out_rows, &mut scratch);
            let fresh = &mut PanelScratch::new();
            k.matmul_q8(m.rows(), &q8, &tokens, &mut Out::new(&mut want, n_rows), &out_rows, fresh);
            assert_same_bits(&got, &want, || format!("{} {} call {call}", k.isa(), m.qtype));
        }
    }
}

#[test]
fn a_product_does_not_depend_on_the_tokens_and_rows_around_it() {
    let mut rng = Rng(4);
    for k in tables() {
        for qtype in GgmlType::ALL {
            for &n_cols in widths(qtype) {
                let n_rows = 17;
                let m = Matrix::random(qtype, n_rows, n_cols, &mut rng);
                let x = rng.activations(12 * n_cols);
                let alone: Vec<Vec<f32>> = (0..12).map(|t| product(k, m.rows(), &x, &[t])).collect();
                for n in (1..=9).chain([24, 29]) {
                    let tokens: Vec<u32> = (0..n).map(|_| rng.below(12) as u32).collect();
                    let got = product(k, m.rows(), &x, &tokens);
                    for (got, t) in got.chunks_exact(n_rows).zip(&tokens) {
                        assert_same_bits(got, &alone[*t as usize], || format!("{} {qtype} token {t}", k.isa()));
                    }
                    let first = rng.below(n_rows);
                    let part = product(k, m.rows().rows(first..n_rows), &x, &tokens);
                    for (got, t) in part.chunks_exact(n_rows - first).zip(&tokens) {
                        assert_same_bits(got, &alone[*t as usize][first..], || format!("{} {qtype} rows", k.isa()));
                    }
                }
            }
        }
    }
}

/// Two accumulators of eight lanes take groups of eight columns in turns; what fills no group joins the first.
#[test]
fn avx2_sums_float_products_in_the_order_it_tells() {
    let Some(k) = Kernels::for_isa(Isa::Avx2) else { return println!("skipped: needs a CPU with avx2") };
    let mut rng = Rng(6);
    for qtype in GgmlType::ALL.into_iter().filter(|q| q.is_float()) {
        for &n_cols in widths(qtype) {
            let m = Matrix::random(qtype, 7, n_cols, &mut rng);
            let x = rng.activations(26 * n_cols);
            let mut want = Vec::new();
            for x in x.chunks_exact(n_cols) {
                for w in m.values.chunks_exact(n_cols) {
                    let mut acc = [[0f32; 8]; 2];
                    for c in 0..n_cols {
                        let whole = c < n_cols / 8 * 8;
                        let sum = &mut acc[if whole { c / 8 % 2 } else { 0 }][c % 8];
                        *sum = w[c].mul_add(x[c], *sum);
                    }
                    let v: [f32; 8] = std::array::from_fn(|i| acc[0][i] + acc[1][i]);
                    want.push(((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7])));
                }
            }
            let tokens: Vec<u32> = (0..26).collect();
            assert_same_bits(&product(k, m.rows(), &x, &tokens), &want, || format!("{qtype} {n_cols}"));
        }
    }
}

/// Blocks of random bytes, with the float scales set to finite numbers: every code and scale a file can hold.
fn random_bytes(qtype: GgmlType, n_blocks: usize, fill: Option<u8>, rng: &mut Rng) -> Vec<u8> {
    let floats: &[usize] = match qtype {
        GgmlType::Q4_1 | GgmlType::Q5_1 | GgmlType::Q4_K | GgmlType::Q5_K => &[0, 2],
        GgmlType::Q2_K => &[80, 82],
        GgmlType::Q3_K => &[108],
        GgmlType::Q6_K => &[208],
        GgmlType::MXFP4 => &[],
        _ => &[0],
    };
    let mut bytes: Vec<u8> =
        (0..n_blocks * qtype.block_bytes()).map(|_| fill.unwrap_or_else(|| rng.next() as u8)).collect();
    for block in bytes.chunks_exact_mut(qtype.block_bytes()) {
        for &at in floats {
            block[at..at + 2].copy_from_slice(&half::f16::from_f32(rng.activation() * 0.01).to_le_bytes());
        }
        if qtype == GgmlType::MXFP4 {
            block[0] = 100 + (block[0] & 31);
        }
    }
    bytes
}

/// Eleven tokens: all of the largest code, of one sign, of the other, by turns; the largest code and zero by turns; of so many of
/// them that a block's sum with codes of four bits just fits 16 bits or does not, in either sign; and three of random numbers.
fn extreme_activations(n_cols: usize, rng: &mut Rng) -> Vec<f32> {
    // Where the first of 256 columns is 508 and others are up to 127, sub-scales are 8 and codes what the columns are.
    let edge = |last: f32| {
        move |c: usize| match (c % 256, c % 32) {
            (0, _) => 508.0f32.copysign(last),
            (1..32, _) => 0.0,
            (_, 0..17) => 127f32.copysign(last),
            (_, 17) => last,
            _ => 0.0,
        }
    };
    let mut x = vec![3.5; n_cols];
    x.extend((0..n_cols).map(|_| -3.5));
    x.extend((0..n_cols).map(|c| if c % 2 == 0 { -3.5 } else { 3.5 }));
    x.extend((0..n_cols).map(|c| if c % 2 == 0 { 0.0 } else { 3.5 }));
    [25.0, 26.0, -25.0, -26.0].into_iter().for_each(|last| x.extend((0..n_cols).map(edge(last))));
    x.extend((0..3 * n_cols).map(|_| rng.activation()));
    x
}

#[test]
fn extreme_codes_and_scales_do_not_saturate() {
    let mut rng = Rng(5);
    let scalar = Kernels::for_isa(Isa::Scalar).unwrap();
    for k in tables() {
        for qtype in quantized() {
            for &n_cols in widths(qtype) {
                for fill in [None, None, Some(0xff), Some(0x00), Some(0x80), Some(0x7f)] {
                    let n_rows = 17;
                    let bytes = random_bytes(qtype, n_rows * n_cols / qtype.block_len(), fill, &mut rng);
                    let w = WeightRows::new(qtype, &bytes, n_cols);
                    let x = extreme_activations(n_cols, &mut rng);
                    // The last alone is ordinary; many of it with others make tiles with and without an extreme token.
                    let beside = |n: usize, t: u32| [vec![10; n], vec![t]].concat();
                    let several = [(0..6).collect(), (0..11).collect(), (0..24).map(|t| t % 11).collect()];
                    let alone = (0..11).map(|t| vec![t]).chain(several);
                    for tokens in alone.chain([beside(9, 0), beside(16, 0), beside(15, 0), beside(47, 5)]) {
                        let tokens = &tokens[..];
                        let want = product(scalar, w, &x, tokens);
                        let got = product(k, w, &x, tokens);
                        assert!(want.iter().all(|v| v.is_finite()));
                        assert_same_bits(&got, &want, || format!("{} {qtype} {n_cols} {fill:x?}", k.isa()));
                    }
                }
            }
        }
    }
}

#[test]
fn the_largest_sum_of_half_a_super_block_fits_32_bits() {
    // Codes 0 stand for -32; scales of -128; activations all at the largest magnitude.
    let mut block = [0u8; 210];
    block[192..208].fill(0x80);
    block[208..].copy_from_slice(&half::f16::ONE.to_le_bytes());
    let bytes = block.repeat(9);
    let w = WeightRows::new(GgmlType::Q6_K, &bytes, 256);
    for k in tables() {
        for value in [1.0f32, -1.0] {
            for n_tokens in [1, 2, 8, 16, 17] {
                let tokens: Vec<u32> = (0..n_tokens).collect();
                let got = product(k, w, &vec![value; 256 * n_tokens as usize], &tokens);
                // Activations are rounded to a code of 127 times two scales, so the product is not exact to the last bit.
                let want = value * 32.0 * 128.0 * 256.0;
                assert!(got.iter().all(|v| (v / want - 1.0).abs() < 1e-6), "{} {value} {n_tokens}: {got:?}", k.isa());
            }
        }
    }
}

#[test]
fn quantized_rows_are_the_same_bits_everywhere() {
    let mut rng = Rng(6);
    let scalar = Kernels::for_isa(Isa::Scalar).unwrap();
    for k in tables() {
        for n_cols in [1, 16, 31, 32, 96, 255, 256, 257, 576, 1024] {
            for scale in [1.0, 1e-30, 1e-37, 1e-41, 1e30, 3e38] {
                let x: Vec<f32> = rng.activations(n_cols).iter().map(|v| (v * scale).clamp(-3e38, 3e38)).collect();
                let (got, want) = (quantize(k, &x, n_cols), quantize(scalar, &x, n_cols));
                for (g, w) in got.row(0).iter().zip(want.row(0)) {
                    assert_eq!(format!("{g:?}"), format!("{w:?}"), "{} {n_cols} {scale}", k.isa());
                }
            }
        }
    }
}

#[test]
fn a_value_that_is_not_finite_makes_nan_of_its_token_only() {
    let mut rng = Rng(7);
    for k in tables() {
        for qtype in GgmlType::ALL {
            let n_cols = 512;
            let m = Matrix::random(qtype, 9, n_cols, &mut rng);
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut x = rng.activations(5 * n_cols);
                x[2 * n_cols + 300] = bad;
                for tokens in [&[0u32, 1, 2, 3, 4][..], &[2]] {
                    let got = product(k, m.rows(), &x, tokens);
                    for (got, t) in got.chunks_exact(9).zip(tokens) {
                        assert!(got.iter().all(|v| v.is_finite() != (*t == 2)), "{} {qtype} {bad} {got:?}", k.isa());
                    }
                }
            }
        }
    }
}

#[test]
fn zero_rows_give_zeros() {
    let mut rng = Rng(8);
    for k in tables() {
        for qtype in GgmlType::ALL {
            let m = Matrix::random(qtype, 9, 256, &mut rng);
            let got = product(k, m.rows(), &[0.0; 4 * 256], &[0, 1, 2, 3]);
            assert!(got.iter().all(|v| *v == 0.0), "{} {qtype}", k.isa());
            assert!(product(k, m.rows(), &[0.0; 256], &[]).is_empty());
        }
    }
}

#[test]
fn results_go_to_the_rows_and_columns_asked_for() {
    let mut rng = Rng(9);
    for k in tables() {
        for qtype in GgmlType::ALL {
            let m = Matrix::random(qtype, 12, 256, &mut rng);
            let x = rng.activations(4 * 256);
            let want = product(k, m.rows(), &x, &[3, 1, 0, 2]);
            let mut got = vec![-1.0; 6 * 20];
            {
                let shared = apr_cpu::kernels::SharedOut::new(&mut got, 20);
                let q8 = quantize(k, &x, 256);
                std::thread::scope(|s| {
                    for (from, to) in [(0, 5), (5, 12)] {
                        let (m, x, q8) = (&m, &x, &q8);
                        s.spawn(move || {
                            // SAFETY: the two threads take disjoint columns.
                            let mut out = unsafe { shared.cols(4 + from..4 + to) };
                            let w = m.rows().rows(from..to);
                            let (x_rows, out_rows) = (&[3, 1, 0, 2], &[5, 0, 2, 4]);
                            match qtype.is_float() {
                                true => k.matmul_f32(w, x, x_rows, &mut out, out_rows),
                                false => k.matmul_q8(w, q8, x_rows, &mut out, out_rows, &mut PanelScratch::new()),
                            }
                        });
                    }
                });
            }
            let mut expected = vec![-1.0; 6 * 20];
            for (row, want) in [5, 0, 2, 4].into_iter().zip(want.chunks_exact(12)) {
                expected[row * 20 + 4..][..12].copy_from_slice(want);
            }
            assert_same_bits(&got, &expected, || format!("{} {qtype}", k.isa()));
        }
    }
}
