// Norms and rotary embedding.
#include "prims.cuh"

// out[t] = x[t] / rms(x[t]) · w; [n_tokens, n_cols]. Grid: tokens.
KERNEL(rms_norm, 512, f32 *out, const f32 *x, const f32 *w, u32 n_cols, f32 eps) {
    SHARED(f32, scratch, 16);
    x += (u64)block_x() * n_cols;
    out += (u64)block_x() * n_cols;
    f32 sum = 0;
    for (u32 i = thread_x(); i < n_cols; i += 512) sum += x[i] * x[i];
    sum = block_sum<512>(sum, scratch);
    const f32 scale = 1 / sqrtf(sum / (f32)n_cols + eps);
    for (u32 i = thread_x(); i < n_cols; i += 512) out[i] = x[i] * scale * w[i];
}

// Each head of a row's columns `at..at + n_heads · head_dim` likewise, in place; a warp per head. Grid: heads / 4, tokens.
KERNEL(head_norm, 128, f32 *x, const f32 *w, u32 n_cols, u32 at, u32 n_heads, u32 head_dim, f32 eps) {
    const u32 head = block_x() * 4 + thread_x() / 32, lane = thread_x() % 32;
    if (head >= n_heads) return;
    x += (u64)block_y() * n_cols + at + head * head_dim;
    f32 sum = 0;
    for (u32 i = lane; i < head_dim; i += 32) sum += x[i] * x[i];
    const f32 scale = 1 / sqrtf(warp_sum(sum) / (f32)head_dim + eps);
    for (u32 i = lane; i < head_dim; i += 32) x[i] = x[i] * scale * w[i];
}

// Cosine and sine of every pair at every token's position; cos, sin: [n_tokens, n_pair]. Grid: tokens.
KERNEL(rope_angles, 128, f32 *cosines, f32 *sines, const u32 *positions, const f32 *inv_freq, u32 n_pair, f32 magnitude) {
    for (u32 i = thread_x(); i < n_pair; i += 128) {
        // The angle is taken to one turn in doubles, where it is still exact enough at any position.
        const f64 turn = 6.283185307179586476925;
        const f64 angle = (f64)positions[block_x()] * (f64)inv_freq[i];
        const f32 rest = (f32)(angle - rint(angle / turn) * turn);
        cosines[(u64)block_x() * n_pair + i] = cosf(rest) * magnitude;
        sines[(u64)block_x() * n_pair + i] = sinf(rest) * magnitude;
    }
}

// Rotates each head of a row's columns from `at` on; pairs are halves of what rotates, or neighbours. Grid: heads / 4, tokens.
KERNEL(rope, 128, f32 *x, const f32 *cosines, const f32 *sines, u32 n_cols, u32 at, u32 n_heads, u32 head_dim, u32 n_pair,
       u32 neighbours) {
    const u32 head = block_x() * 4 + thread_x() / 32;
    if (head >= n_heads) return;
    x += (u64)block_y() * n_cols + at + head * head_dim;
    for (u32 i = thread_x() % 32; i < n_pair; i += 32) {
        const f32 c = cosines[(u64)block_y() * n_pair + i], s = sines[(u64)block_y() * n_pair + i];
        const u32 a = neighbours ? 2 * i : i, b = neighbours ? 2 * i + 1 : i + n_pair;
        const f32 first = x[a], second = x[b];
        x[a] = first * c - second * s;
        x[b] = first * s + second * c;
    }
}
