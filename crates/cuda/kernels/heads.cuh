// Queries and keys of a head before attention: normalised, then rotated by their token's position.
#pragma once

#include "prims.cuh"

// A warp normalises one head.
DEVICE void normalise_head(f32 *x, const f32 *w, u32 head_dim, f32 eps) {
    const u32 lane = thread_x() % 32;
    f32 sum = 0;
    for (u32 i = lane; i < head_dim; i += 32) sum += x[i] * x[i];
    const f32 scale = 1 / sqrtf(warp_sum(sum) / (f32)head_dim + eps);
    for (u32 i = lane; i < head_dim; i += 32) x[i] = x[i] * scale * w[i];
}

// A warp rotates one head of token `block_y`.
DEVICE void rotate_head(f32 *x, const f32 *cosines, const f32 *sines, u32 n_pair, u32 neighbours) {
    for (u32 i = thread_x() % 32; i < n_pair; i += 32) {
        const f32 c = cosines[(u64)block_y() * n_pair + i], s = sines[(u64)block_y() * n_pair + i];
        const u32 a = neighbours ? 2 * i : i, b = neighbours ? 2 * i + 1 : i + n_pair;
        const f32 first = x[a], second = x[b];
        x[a] = first * c - second * s;
        x[b] = first * s + second * c;
    }
}

// Both; not the first where `norm` is null.
DEVICE void norm_rope_head(f32 *x, const f32 *norm, const f32 *cosines, const f32 *sines, u32 head_dim, u32 n_pair, u32 neighbours,
                           f32 eps) {
    if (norm) {
        normalise_head(x, norm, head_dim, eps);
        warp_barrier();
    }
    rotate_head(x, cosines, sines, n_pair, neighbours);
}

// Of kernels that normalise and rotate the heads of x, [n_tokens, n_cols]: the first `n_head` of `n_heads` are queries, then come keys.
#define NORM_ROPE_ARGS                                                                                                \
    f32 *x, const f32 *q_norm, const f32 *k_norm, const f32 *cosines, const f32 *sines, u32 n_cols, u32 n_head,       \
        u32 n_heads, u32 head_dim, u32 n_pair, u32 neighbours, f32 eps
