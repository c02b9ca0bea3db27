// The 8-bit form of activations: 32 values to a group, a code each, and the group's scale with what a weight of 1 adds to a product,
// scale · Σ codes. A group that is not finite makes NaN of every product it takes part in.
#pragma once

#include "prims.cuh"

// The group of `n` neighbouring lanes that hold 32 values between them, of which this lane has some: the largest magnitude, and
// whether all are finite. The sum of magnitudes keeps NaN, which the largest loses.
template <int n> DEVICE bool group_scale(f32 largest, f32 magnitudes, f32 &d, f32 &inverse) {
    largest = warp_max<n>(largest);
    const f32 all = warp_sum<n>(magnitudes);
    const bool finite = largest < INFINITY && all == all;
    d = largest / 127;
    inverse = d > 0 && finite ? 1 / d : 0;
    return finite;
}

// Quantizes four neighbouring values, number 4 i and on; eight lanes have a group. All 32 lanes take part, those without values
// with `there` false.
DEVICE void quantize_four(u32 *codes, f32x2 *scales, f32x4 v, u64 i, bool there) {
    f32 d, inverse;
    const f32 largest = most(most(fabsf(v.x), fabsf(v.y)), most(fabsf(v.z), fabsf(v.w)));
    const bool finite = group_scale<8>(largest, fabsf(v.x) + fabsf(v.y) + fabsf(v.z) + fabsf(v.w), d, inverse);
    const i32 a = (i32)rintf(v.x * inverse), b = (i32)rintf(v.y * inverse);
    const i32 c = (i32)rintf(v.z * inverse), e = (i32)rintf(v.w * inverse);
    const f32 sum = warp_sum<8>((f32)(a + b + c + e));
    if (!there) return;
    codes[i] = finite ? (u32)(a & 255) | (u32)(b & 255) << 8 | (u32)(c & 255) << 16 | (u32)e << 24 : 0;
    if (i % 8 == 0) scales[i / 8] = finite ? f32x2{d, d * sum} : f32x2{NAN, NAN};
}

// Quantizes what the block of `threads` has written before a barrier: `n` values of x from number `first` on, both multiples of 32.
template <u32 threads> DEVICE void quantize_written(u32 *codes, f32x2 *scales, const f32 *x, u64 first, u32 n) {
    for (u32 at = 0; at < n; at += 4 * threads) {
        const u32 i = at + 4 * thread_x();
        const f32x4 v = i < n ? *(const f32x4 *)(x + first + i) : f32x4{0, 0, 0, 0};
        quantize_four(codes, scales, v, (first + i) / 4, i < n);
    }
}
