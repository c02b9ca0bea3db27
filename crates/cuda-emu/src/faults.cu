// Kernels with a fault each, which the emulation must make visible.
#include "prims.cuh"

// Sums a block's values, with the barrier between writing and reading left out where `faulty`.
KERNEL(fault_barrier, 64, f32 *out, const f32 *x, u32 faulty) {
    SHARED(f32, parts, 64);
    parts[thread_x()] = x[thread_x()];
    if (!faulty) barrier();
    f32 sum = 0;
    for (u32 i = 0; i < 64; i++) sum += parts[i];
    out[thread_x()] = sum;
}

// Half of the threads wait at a barrier that the others do not reach.
KERNEL(fault_branch, 64, f32 *out) {
    if (thread_x() < 32) barrier();
    out[thread_x()] = 0;
}

// Reads a copy before it has been waited for where `faulty`.
KERNEL(fault_copy, 32, u32 *out, const u32 *x, u32 faulty) {
    SHARED(u32, words, 128);
    copy_async(words + 4 * thread_x(), x + 4 * thread_x());
    copy_async_commit();
    if (!faulty) copy_async_wait<0>();
    warp_barrier();
    for (u32 i = 0; i < 4; i++) out[4 * thread_x() + i] = words[127 - 4 * thread_x() - i];
}
