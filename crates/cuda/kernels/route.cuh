// Which experts a token goes to.
#pragma once

#include "prims.cuh"

// The k largest logits of a token, lower expert first on ties, and their softmax among themselves, which is the renormalised softmax
// over all. A warp does it.
DEVICE void route_token(u32 *ids, f32 *weights, const f32 *logits, u32 token, u32 n_expert, u32 k) {
    const u32 lane = thread_x() % 32;
    logits += (u64)token * n_expert;
    ids += (u64)token * k;
    weights += (u64)token * k;
    // What this lane has given already, and its best of what is left: the order of floats as the order of integers, NaN on top.
    u64 below = ~0ull;
    f32 largest = 0, sum = 0;
    for (u32 slot = 0; slot < k; slot++) {
        u64 best = 0;
        for (u32 e = lane; e < n_expert; e += 32) {
            const u32 b = bits(logits[e]);
            const u64 key = (u64)(b >> 31 ? ~b : b | 0x80000000u) << 32 | (~e & 0xffffffffu);
            if (key < below && key > best) best = key;
        }
        UNROLL for (int mask = 16; mask > 0; mask /= 2) {
            const u64 other = (u64)shuffle_xor((u32)(best >> 32), mask) << 32 | shuffle_xor((u32)best, mask);
            best = most(best, other);
        }
        below = best;
        const u32 id = ~(u32)best;
        const f32 logit = logits[id];
        if (slot == 0) largest = logit;
        const f32 weight = expf(logit - largest);
        sum += weight;
        if (lane == 0) {
            ids[slot] = id;
            weights[slot] = weight;
        }
    }
    warp_barrier();
    for (u32 slot = lane; slot < k; slot += 32) weights[slot] /= sum;
}
