// Every primitive on words from outside, so that a GPU's instructions can be held against the emulation bit for bit.
#include "prims.cuh"

// A small whole number as a half: products and sums of such are exact.
DEVICE u32 small_halves(u32 word) {
    const u16 low = float_to_half((f32)((i32)(word & 31) - 16)), high = float_to_half((f32)((i32)(word >> 8 & 31) - 16));
    return (u32)low | (u32)high << 16;
}

// What is not a number has one form.
DEVICE u32 plain(f32 v) { return v == v ? bits(v) : 0x7fffffffu; }

// x: [n_blocks, 32, 8] words, y: [n_blocks, 32, 48]. Grid: n_blocks.
KERNEL(primitives, 32, u32 *y, const u32 *x) {
    SHARED(u32, copied, 128);
    SHARED(u32, half_copied, 128);
    const u32 lane = thread_x();
    x += (block_x() * 32 + lane) * 8;
    y += (block_x() * 32 + lane) * 48;
    y[0] = shuffle(x[0], x[1] % 32);
    for (u32 i = 0; i < 5; i++) y[1 + i] = shuffle_xor(x[0], 1u << i);
    y[6] = (u32)dp4a(x[0], x[1], (i32)x[2]);
    y[7] = sub_bytes(x[0], x[1]);
    y[8] = plain(half_to_float((u16)x[0]));
    // Any float, and floats near those that a half can hold.
    y[9] = float_to_half(from_bits(x[1]));
    y[10] = float_to_half(half_to_float((u16)x[2]) * (1 + (f32)(x[3] % 4096) / 4096));
    y[11] = plain(rintf((f32)(i32)x[4] / 256));
    i32 c[4] = {(i32)x[4], (i32)x[5], (i32)x[6], (i32)x[7]};
    const u32 a[4] = {x[0], x[1], x[2], x[3]}, b[2] = {x[4], x[5]};
    mma_s8_k32(c, a, b);
    for (u32 i = 0; i < 4; i++) y[12 + i] = (u32)c[i];
    i32 d[4] = {(i32)x[0], 1, 2, 3};
    const u32 e[2] = {x[6], x[7]};
    mma_s8_k16(d, e, x[5]);
    for (u32 i = 0; i < 4; i++) y[16 + i] = (u32)d[i];
    f32 f[4] = {(f32)(x[0] % 64), 0, 1, -3};
    const u32 g[4] = {small_halves(x[0]), small_halves(x[1]), small_halves(x[2]), small_halves(x[3])};
    const u32 h[2] = {small_halves(x[4]), small_halves(x[5])};
    mma_f16(f, g, h);
    for (u32 i = 0; i < 4; i++) y[20 + i] = plain(f[i]);
    copy_async(copied + 4 * lane, x);
    copy_async(half_copied + 4 * lane, x, lane % 2 == 1);
    copy_async_commit();
    copy_async_wait<0>();
    warp_barrier();
    for (u32 i = 0; i < 4; i++) y[24 + i] = copied[127 - 4 * lane - i];
    y[28] = bits(warp_sum<8>((f32)(x[0] % 1000)));
    y[29] = bits(warp_max((f32)(x[1] % 100000)));
    y[30] = lanes_alike(x[3] % 4);
    y[31] = count_bits(x[0]);
    y[32] = floats_to_halves(half_to_float((u16)(x[2] % 31000)) * (1 + (f32)(x[3] % 4096) / 4096), (f32)(i32)x[4] / 65536);
    u32 r[4];
    load_matrices(r, copied + 4 * lane);
    for (u32 i = 0; i < 4; i++) y[33 + i] = r[i];
    load_matrices_transposed(r, copied + 4 * ((lane * 5 + 3) % 32));
    for (u32 i = 0; i < 4; i++) y[37 + i] = r[i];
    // Whoever came before is among the bits that were there: none, one, two and so on, in any order.
    SHARED(u32, came, 1);
    if (lane == 0) came[0] = 0;
    warp_barrier();
    const u32 before = add_shared(came, 1u << lane);
    warp_barrier();
    y[41] = came[0];
    y[42] = bits(warp_sum((f32)count_bits(before)));
    y[43] = before >> lane & 1;
    for (u32 i = 0; i < 4; i++) y[44 + i] = half_copied[127 - 4 * lane - i];
}
