// What kernels use beyond plain C++: where a thread stands, shuffles, barriers, products of packed integers, tensor cores,
// asynchronous copies. On a device each is an instruction; on a host `emulation.h` gives each the meaning that the PTX manual gives
// the instruction, so that every kernel also runs, thread by thread, on a machine without a GPU. No CUDA header is needed.
#pragma once

typedef signed char i8;
typedef unsigned char u8;
typedef short i16;
typedef unsigned short u16;
typedef int i32;
typedef unsigned int u32;
typedef float f32;
typedef double f64;
typedef unsigned long long u64;

struct alignas(16) u32x4 { u32 x, y, z, w; };
struct alignas(8) u32x2 { u32 x, y; };
struct alignas(16) f32x4 { f32 x, y, z, w; };
struct alignas(8) f32x2 { f32 x, y; };

#ifdef __CUDACC__

#define DEVICE static __device__ __forceinline__
#define DEVICE_MEMBER __device__ __forceinline__
// A kernel of `threads` threads per block; each multiple of 32.
#define KERNEL(name, threads, ...) extern "C" __global__ void __launch_bounds__(threads) name(__VA_ARGS__)
// One of whose blocks a multiprocessor has registers for at least `blocks` at a time.
#define KERNEL_BESIDE(name, threads, blocks, ...)                                                                     \
    extern "C" __global__ void __launch_bounds__(threads, blocks) name(__VA_ARGS__)
// `n` values that the threads of a block share.
#define SHARED(type, name, n) __shared__ __align__(16) type name[n]
#define UNROLL _Pragma("unroll")
#define INFINITY __int_as_float(0x7f800000)
#define NAN __int_as_float(0x7fffffff)

DEVICE u32 thread_x() { return threadIdx.x; }
DEVICE u32 block_x() { return blockIdx.x; }
DEVICE u32 block_y() { return blockIdx.y; }
DEVICE u32 block_z() { return blockIdx.z; }
DEVICE u32 grid_x() { return gridDim.x; }

// Waits for all threads of the block; what they wrote before is seen after.
DEVICE void barrier() { __syncthreads(); }

// Waits for the 32 threads of the warp, likewise.
DEVICE void warp_barrier() { asm volatile("bar.warp.sync 0xffffffff;" ::: "memory"); }

// The value of another lane of the warp; all 32 take part.
DEVICE u32 shuffle(u32 v, u32 lane) {
    u32 r;
    asm volatile("shfl.sync.idx.b32 %0, %1, %2, 31, 0xffffffff;" : "=r"(r) : "r"(v), "r"(lane));
    return r;
}

// The value of the lane whose number differs in the bits of `mask`.
DEVICE u32 shuffle_xor(u32 v, u32 mask) {
    u32 r;
    asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 31, 0xffffffff;" : "=r"(r) : "r"(v), "r"(mask));
    return r;
}

// A bit for each lane of the warp that has the same value.
DEVICE u32 lanes_alike(u32 v) {
    u32 r;
    asm volatile("match.any.sync.b32 %0, %1, 0xffffffff;" : "=r"(r) : "r"(v));
    return r;
}

DEVICE u32 count_bits(u32 v) {
    u32 r;
    asm("popc.b32 %0, %1;" : "=r"(r) : "r"(v));
    return r;
}

// Counts who comes, from 0 to `n - 1` and then over again, and gives the count so far. What a thread that comes has written, or has
// seen written, is seen by all that come later.
DEVICE u32 arrive(u32 *counter, u32 n) {
    u32 r;
    asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(r) : "l"(counter), "r"(n - 1) : "memory");
    return r;
}

// Where something lies in shared memory, as instructions of such memory take it.
DEVICE u32 shared_address(const void *p) { return (u32)__cvta_generic_to_shared(p); }

// Adds to a word in shared memory, one thread after the other in any order, and gives what was there before.
DEVICE u32 add_shared(u32 *to, u32 v) {
    u32 r;
    asm volatile("atom.shared.add.u32 %0, [%1], %2;" : "=r"(r) : "r"(shared_address(to)), "r"(v) : "memory");
    return r;
}

// `c + Σ a[i] b[i]` over four signed bytes.
DEVICE i32 dp4a(u32 a, u32 b, i32 c) {
    i32 r;
    asm("dp4a.s32.s32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}

// Per byte `a - b`, without borrows between bytes.
DEVICE u32 sub_bytes(u32 a, u32 b) {
    // The top bits are taken out, subtracted without carry, and put back by exclusive or.
    const u32 top = 0x80808080u;
    return ((a | top) - (b & ~top)) ^ ((a ^ ~b) & top);
}

DEVICE u32 bits(f32 v) { return __float_as_uint(v); }
DEVICE f32 from_bits(u32 v) { return __uint_as_float(v); }

DEVICE f32 half_to_float(u16 v) {
    f32 r;
    asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(v));
    return r;
}

// Two halves in a word, `low` in the low bits, rounded to nearest, ties to even.
DEVICE u32 floats_to_halves(f32 low, f32 high) {
    u32 r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

// Rounded to nearest, ties to even.
DEVICE u16 float_to_half(f32 v) {
    u16 r;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(v));
    return r;
}

// `c += a b`, a warp's product of 16 x 32 by 32 x 8 signed bytes. PTX `mma.m16n8k32`: with g = lane / 4 and t = lane % 4,
// a: rows g, g + 8, g, g + 8, bytes 4t.. of the first two and 16 + 4t.. of the last; b: column g, bytes 4t.. and 16 + 4t..;
// c: row g columns 2t, 2t + 1, row g + 8 likewise.
DEVICE void mma_s8_k32(i32 (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The same of 16 x 16 by 16 x 8: a: rows g and g + 8, bytes 4t..; b: column g, bytes 4t...
DEVICE void mma_s8_k16(i32 (&c)[4], const u32 (&a)[2], u32 b) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(b));
}

// `c += a b` of 16 x 16 by 16 x 8 halves, summed in floats. PTX `mma.m16n8k16`: a: rows g, g + 8, g, g + 8, halves 2t.. of the first
// two and 8 + 2t.. of the last; b: column g, halves 2t.. and 8 + 2t..; c as above.
DEVICE void mma_f16(f32 (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four matrices of 8 rows of 16 bytes in shared memory, a row where each lane says: lane i has row i % 8 of matrix i / 8. Of each
// matrix a lane gets word t of row g.
DEVICE void load_matrices(u32 (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)));
}

// The same of the transposed matrices of 8 x 8 halves: a lane gets column g of rows 2t and 2t + 1.
DEVICE void load_matrices_transposed(u32 (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)));
}

// Begins to copy 16 bytes from global to shared memory, both on a boundary of 16; where they are not there, zeros, and nothing is read.
DEVICE void copy_async(void *shared, const void *global, bool there = true) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(there ? 16 : 0)
                 : "memory");
}

// Ends a group of this thread's copies.
DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `n` of this thread's groups are under way.
template <int n> DEVICE void copy_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory"); }

#else

#include "emulation.h"

#endif

template <class T> DEVICE T least(T a, T b) { return a < b ? a : b; }
template <class T> DEVICE T most(T a, T b) { return a > b ? a : b; }

DEVICE f32 shuffle_xor(f32 v, u32 mask) { return from_bits(shuffle_xor(bits(v), mask)); }

// Sum of a value over groups of `n` neighbouring lanes, a power of two; every lane gets it.
template <int n = 32> DEVICE f32 warp_sum(f32 v) {
    UNROLL for (int mask = n / 2; mask > 0; mask /= 2) v += shuffle_xor(v, mask);
    return v;
}

// Largest of a value over groups of `n` neighbouring lanes. NaN loses.
template <int n = 32> DEVICE f32 warp_max(f32 v) {
    UNROLL for (int mask = n / 2; mask > 0; mask /= 2) v = fmaxf(v, shuffle_xor(v, mask));
    return v;
}

// Sum of a value over the block of `threads`; `scratch` is shared and holds `threads / 32` floats. Every thread gets it.
template <int threads> DEVICE f32 block_sum(f32 v, f32 *scratch) {
    v = warp_sum(v);
    if (thread_x() % 32 == 0) scratch[thread_x() / 32] = v;
    barrier();
    f32 sum = 0;
    UNROLL for (int i = 0; i < threads / 32; i++) sum += scratch[i];
    barrier();
    return sum;
}

// Whether this block is the last of `n` to come by `counter`, which is 0 before and after: it sees what all of them have written.
DEVICE bool is_last_block(u32 *counter, u32 n) {
    SHARED(u32, before, 1);
    barrier();
    if (thread_x() == 0) before[0] = arrive(counter, n);
    barrier();
    return before[0] == n - 1;
}
