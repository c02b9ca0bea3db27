// Which experts a token goes to.
#pragma once

#include "prims.cuh"

// Logits that a lane keeps, those of the first 32 · KEPT experts.
#define KEPT 4

// A logit's place among a token's: the order of floats as the order of integers, NaN on top, lower experts above among equals. None is 0.
DEVICE u64 place_of_logit(f32 logit, u32 expert) {
    const u32 b = bits(logit);
    return (u64)(b >> 31 ? ~b : b | 0x80000000u) << 32 | (~expert & 0xffffffffu);
}

// The k largest logits of a token, lower expert first on ties, and their softmax among themselves, which is the renormalised softmax
// over all. A warp does it.
DEVICE void route_token(u32 *ids, f32 *weights, const f32 *logits, u32 token, u32 n_expert, u32 k) {
    const u32 lane = thread_x() % 32;
    logits += (u64)token * n_expert;
    ids += (u64)token * k;
    weights += (u64)token * k;
    u64 kept[KEPT];
    UNROLL for (u32 i = 0; i < KEPT; i++) {
        const u32 e = lane + 32 * i;
        kept[i] = e < n_expert ? place_of_logit(logits[e], e) : 0;
    }
    // What has been given already, and the best of what is left.
    u64 below = ~0ull;
    f32 largest = 0, sum = 0;
    for (u32 slot = 0; slot < k; slot++) {
        u64 best = 0;
        UNROLL for (u32 i = 0; i < KEPT; i++)
            if (kept[i] < below && kept[i] > best) best = kept[i];
        for (u32 e = lane + 32 * KEPT; e < n_expert; e += 32) {
            const u64 place = place_of_logit(logits[e], e);
            if (place < below && place > best) best = place;
        }
        UNROLL for (int mask = 16; mask > 0; mask /= 2) {
            const u64 other = (u64)shuffle_xor((u32)(best >> 32), mask) << 32 | shuffle_xor((u32)best, mask);
            best = most(best, other);
        }
        below = best;
        // A place tells its logit: nothing is read again.
        const u32 order = (u32)(best >> 32);
        const f32 logit = from_bits(order >> 31 ? order ^ 0x80000000u : ~order);
        if (slot == 0) largest = logit;
        const f32 weight = expf(logit - largest);
        sum += weight;
        if (lane == 0) {
            ids[slot] = ~(u32)best;
            weights[slot] = weight;
        }
    }
    warp_barrier();
    for (u32 slot = lane; slot < k; slot += 32) weights[slot] /= sum;
}
#undef KEPT
