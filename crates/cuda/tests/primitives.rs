//! The primitives that kernels are made of: by definition on the emulation, and the same bits on a GPU.

#[path = "../../core/tests/support/blocks.rs"]
mod blocks;
#[path = "support/devices.rs"]
mod devices;

use apr_cuda::driver::{Arg, Driver, Launch};
use apr_cuda_emu::{Order, connect};
use blocks::Rng;

const N_BLOCKS: usize = 64;
const N_IN: usize = 8;
const N_OUT: usize = 48;

fn words() -> Vec<u32> {
    let mut rng = Rng(11);
    (0..N_BLOCKS * 32 * N_IN).map(|_| rng.next() as u32).collect()
}

/// What the primitives make of `x` on a device: `[N_BLOCKS, 32, N_OUT]`.
fn outputs(device: &dyn Driver, x: &[u32]) -> Vec<u32> {
    let x: Vec<u8> = x.iter().flat_map(|w| w.to_le_bytes()).collect();
    let mut y = vec![0u8; N_BLOCKS * 32 * N_OUT * 4];
    let (from, to) = (device.alloc(x.len()).unwrap(), device.alloc(y.len()).unwrap());
    let args = vec![Arg::Address(to), Arg::Address(from)];
    let launch = Launch { kernel: "primitives", grid: [N_BLOCKS as u32, 1, 1], threads: 32, args };
    // SAFETY: both addresses are of this device, and the kernel reads and writes as much as was allocated.
    unsafe {
        device.write(from, &x).unwrap();
        device.run(&[launch], false).unwrap();
        device.read(to, &mut y).unwrap();
        device.free(from, x.len());
        device.free(to, y.len());
    }
    y.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect()
}

/// A signed byte of a word.
fn byte(word: u32, i: usize) -> i32 {
    i32::from((word >> (8 * i)) as u8 as i8)
}

/// A matrix product with 32 columns of `a` as PTX lays it out, element by element: `[16, 8]`.
fn product_k32(x: &[&[u32]]) -> Vec<i32> {
    // Row r of a is in lanes 4 (r % 8) + t: word r / 8 holds columns 4t.., word 2 + r / 8 columns 16 + 4t...
    let a = |r: usize, k: usize| byte(x[4 * (r % 8) + k % 16 / 4][r / 8 + 2 * (k / 16)], k % 4);
    let b = |k: usize, n: usize| byte(x[4 * n + k % 16 / 4][4 + k / 16], k % 4);
    let element = |r: usize, n: usize| (0..32).map(|k| a(r, k) * b(k, n)).sum();
    (0..16).flat_map(|r| (0..8).map(move |n| (r, n))).map(|(r, n)| element(r, n)).collect()
}

#[test]
fn the_emulation_does_what_the_manual_says() {
    let x = words();
    let y = outputs(&*connect(Order::Shuffled(1)), &x);
    for block in 0..N_BLOCKS {
        let x: Vec<&[u32]> = x[block * 32 * N_IN..][..32 * N_IN].chunks_exact(N_IN).collect();
        let y: Vec<&[u32]> = y[block * 32 * N_OUT..][..32 * N_OUT].chunks_exact(N_OUT).collect();
        let product = product_k32(&x);
        for lane in 0..32 {
            let (x_l, y_l) = (x[lane], y[lane]);
            assert_eq!(y_l[0], x[x_l[1] as usize % 32][0], "shuffle");
            (0..5).for_each(|i| assert_eq!(y_l[1 + i], x[lane ^ 1 << i][0], "shuffle_xor"));
            let dot: i32 = (0..4).map(|i| byte(x_l[0], i) * byte(x_l[1], i)).sum();
            assert_eq!(y_l[6], (x_l[2] as i32).wrapping_add(dot) as u32, "dp4a");
            let bytes = |w: u32| w.to_le_bytes();
            let less: Vec<u8> = bytes(x_l[0]).iter().zip(bytes(x_l[1])).map(|(a, b)| a.wrapping_sub(b)).collect();
            assert_eq!(bytes(y_l[7]).to_vec(), less, "sub_bytes");
            for i in 0..4 {
                let (row, column) = (lane / 4 + 8 * (i / 2), 2 * (lane % 4) + i % 2);
                let expected = (x_l[4 + i] as i32).wrapping_add(product[row * 8 + column]);
                assert_eq!(y_l[12 + i], expected as u32, "mma_s8_k32, row {row}, column {column}");
            }
            (0..4).for_each(|i| assert_eq!(y_l[24 + i], x[31 - lane][3 - i], "copy_async"));
            let there = |word: u32| if lane % 2 == 0 { word } else { 0 };
            (0..4).for_each(|i| assert_eq!(y_l[44 + i], there(x[31 - lane][3 - i]), "copy_async of what is not there"));
            let alike =
                (0..32).filter(|&other| x[other][3] % 4 == x_l[3] % 4).fold(0u32, |bits, other| bits | 1 << other);
            assert_eq!((y_l[30], y_l[31]), (alike, x_l[0].count_ones()), "lanes_alike, count_bits");
            assert_eq!((y_l[41], y_l[42], y_l[43]), (u32::MAX, 496f32.to_bits(), 0), "add_shared");
            // Row g of matrix i is where lane 8 i + g says: the first words of that lane.
            (0..4).for_each(|i| assert_eq!(y_l[33 + i], x[8 * i + lane / 4][lane % 4], "load_matrices"));
            let half = |row: usize, column: usize| {
                let words = &x[(row * 5 + 3) % 32];
                (words[column / 2] >> (16 * (column % 2))) as u16
            };
            for i in 0..4 {
                let row = 8 * i + 2 * (lane % 4);
                let expected = u32::from(half(row, lane / 4)) | u32::from(half(row + 1, lane / 4)) << 16;
                assert_eq!(y_l[37 + i], expected, "load_matrices_transposed");
            }
        }
    }
}

#[test]
fn a_gpu_does_what_the_emulation_does() {
    let Some(gpu) = devices::gpu() else { return };
    let x = words();
    let (expected, got) = (outputs(&*connect(Order::Ascending), &x), outputs(&*gpu, &x));
    for (i, (e, g)) in expected.iter().zip(&got).enumerate() {
        let (block, lane, what) = (i / (32 * N_OUT), i / N_OUT % 32, i % N_OUT);
        assert_eq!(g, e, "output {what} of lane {lane} in block {block}: see kernels/primitives.cu");
    }
}
