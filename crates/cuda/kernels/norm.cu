// Norms and rotary embedding.
#include "heads.cuh"
#include "q8.cuh"

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

// The same where columns are in groups of 32, and its 8-bit form.
KERNEL(rms_norm_q8, 512, f32x4 *out, u32 *codes, f32x2 *scales, const f32x4 *x, const f32x4 *w, u32 n_cols, f32 eps) {
    SHARED(f32, scratch, 16);
    const u64 row = (u64)block_x() * (n_cols / 4);
    f32 sum = 0;
    for (u32 i = thread_x(); i < n_cols / 4; i += 512) {
        const f32x4 v = x[row + i];
        sum += v.x * v.x + v.y * v.y + (v.z * v.z + v.w * v.w);
    }
    sum = block_sum<512>(sum, scratch);
    const f32 scale = 1 / sqrtf(sum / (f32)n_cols + eps);
    for (u32 first = 0; first < n_cols / 4; first += 512) {
        const u32 i = first + thread_x();
        const bool there = i < n_cols / 4;
        f32x4 v = {0, 0, 0, 0};
        if (there) {
            v = x[row + i];
            const f32x4 by = w[i];
            v = f32x4{v.x * scale * by.x, v.y * scale * by.y, v.z * scale * by.z, v.w * scale * by.w};
            out[row + i] = v;
        }
        quantize_four(codes, scales, v, row + i, there);
    }
}

// Each head of a row's columns `at..at + n_heads · head_dim` likewise, in place; a warp per head. Grid: heads / 4, tokens.
KERNEL(head_norm, 128, f32 *x, const f32 *w, u32 n_cols, u32 at, u32 n_heads, u32 head_dim, f32 eps) {
    const u32 head = block_x() * 4 + thread_x() / 32;
    if (head >= n_heads) return;
    x += (u64)block_y() * n_cols + at + head * head_dim;
    normalise_head(x, w, head_dim, eps);
}

// Normalises every head of queries and keys, where there are norms, and rotates it. A warp per head. Grid: heads / 4, tokens.
KERNEL(norm_rope, 128, NORM_ROPE_ARGS) {
    const u32 head = block_x() * 4 + thread_x() / 32;
    if (head >= n_heads) return;
    x += (u64)block_y() * n_cols + head * head_dim;
    norm_rope_head(x, head < n_head ? q_norm : k_norm, cosines, sines, head_dim, n_pair, neighbours, eps);
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
    rotate_head(x, cosines, sines, n_pair, neighbours);
}
