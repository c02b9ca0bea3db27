//! The emulation shows what it is there to show: kernels with a fault each.

use apr_cuda::driver::{Arg, DriverError, Launch};
use apr_cuda_emu::{Order, connect};

/// What a kernel of 64 or 32 threads makes of the numbers from 0 on: its `n_out` floats or words.
fn run(order: Order, kernel: &'static str, threads: u32, n_out: usize, more: &[Arg]) -> Result<Vec<u32>, DriverError> {
    let device = connect(order);
    let x: Vec<u8> = (0..128u32).flat_map(|i| (i as f32).to_le_bytes()).collect();
    let (from, to) = (device.alloc(x.len())?, device.alloc(4 * n_out)?);
    let mut args = vec![Arg::Address(to)];
    if !more.is_empty() {
        args.push(Arg::Address(from));
    }
    args.extend(more);
    let launch = Launch { kernel, grid: [1, 1, 1], threads, args };
    let mut out = vec![0u8; 4 * n_out];
    // SAFETY: both addresses are of this device, and the kernels read and write no more than was allocated.
    unsafe {
        device.write(from, &x)?;
        let done = device.run(&[launch], false);
        device.read(to, &mut out)?;
        device.free(from, x.len());
        device.free(to, 4 * n_out);
        done?;
    }
    Ok(out.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect())
}

const ORDERS: [Order; 3] = [Order::Ascending, Order::Descending, Order::Shuffled(3)];

#[test]
fn a_missing_barrier_shows_in_some_order() {
    let of = |faulty: u32| ORDERS.map(|o| run(o, "fault_barrier", 64, 64, &[Arg::U32(faulty)]).unwrap());
    let sum = (0..64).sum::<u32>() as f32;
    assert!(of(0).iter().flatten().all(|&bits| f32::from_bits(bits) == sum), "with its barrier the kernel is right");
    let faulty = of(1);
    assert!(faulty.iter().any(|out| out != &faulty[0]), "orders differ");
    assert!(faulty.iter().all(|out| out.iter().any(|&bits| f32::from_bits(bits) != sum)), "and none is right");
}

#[test]
fn a_barrier_in_a_branch_is_an_error() {
    for order in ORDERS {
        let e = run(order, "fault_branch", 64, 64, &[]).unwrap_err().to_string();
        assert!(e.contains("fault_branch") && e.contains("barrier"), "{e}");
    }
}

#[test]
fn an_asynchronous_copy_arrives_when_it_is_waited_for() {
    let expected: Vec<u32> = (0..128u32).rev().map(|i| (i as f32).to_bits()).collect();
    assert_eq!(run(Order::Ascending, "fault_copy", 32, 128, &[Arg::U32(0)]).unwrap(), expected);
    let faulty = run(Order::Ascending, "fault_copy", 32, 128, &[Arg::U32(1)]).unwrap();
    assert!(faulty.iter().all(|&word| word == 0xa5a5_a5a5), "nothing has arrived");
}

#[test]
fn wrong_arguments_are_an_error() {
    let e = run(Order::Ascending, "fault_barrier", 64, 64, &[Arg::F32(0)]).unwrap_err().to_string();
    assert!(e.contains("ppu") && e.contains("ppf"), "{e}");
    let e = run(Order::Ascending, "fault_barrier", 32, 64, &[Arg::U32(0)]).unwrap_err().to_string();
    assert!(e.contains("64 threads"), "{e}");
    let e = run(Order::Ascending, "nothing", 32, 64, &[Arg::U32(0)]).unwrap_err().to_string();
    assert!(e.contains("no such kernel"), "{e}");
}
