// Attention on the tensor cores, in tiles: keys and values in halves, in blocks of 64 positions, sums in floats.
#pragma once

#include "prims.cuh"

// Positions of a block.
static const u32 KV_ROWS = 64;

// Begins to copy `rows` rows of a block of keys or values, `threads` threads together. Those from `n_here` on become zeros, and so do
// columns past the last: they meet queries that are zero, and must be numbers.
template <u32 D, u32 rows, u32 threads> DEVICE void stage(u16 *to, const u8 *from, u32 head_dim, u32 n_here) {
    const u32 beside = D / 8, thread = thread_x() % threads, row = thread / beside, column = thread % beside * 8;
    to += row * (D + 8) + column;
    from += (row * head_dim + column) * 2;
    if (column >= head_dim) n_here = 0;
    UNROLL for (u32 i = 0; i < rows; i += threads / beside)
        copy_async(to + i * (D + 8), from + i * head_dim * 2, row + i < n_here);
}

// What a warp knows of its 16 rows: lane (g, t) of rows g and g + 8.
template <u32 D> struct Rows {
    u32 position[2];
    // Largest score so far, in powers of two, and this lane's share of the sum of weights.
    f32 largest[2], sum[2];
    // Queries, 16 values at a time; values, 8 at a time.
    u32 q[D / 16][4];
    f32 values[D / 8][4];
};

// Scores of 8 N positions.
template <u32 D, u32 N> DEVICE void score(f32 (&scores)[N][4], const Rows<D> &rows, const u16 *keys) {
    const u32 lane = thread_x() % 32;
    UNROLL for (u32 i = 0; i < 4 * N; i++) scores[i / 4][i % 4] = 0;
    UNROLL for (u32 k = 0; k < D / 16; k++) {
        UNROLL for (u32 n = 0; n < N / 2; n++) {
            u32 r[4];
            load_matrices(r, keys + (16 * n + lane / 16 * 8 + lane % 8) * (D + 8) + 16 * k + lane / 8 % 2 * 8);
            const u32 left[2] = {r[0], r[1]}, right[2] = {r[2], r[3]};
            mma_f16(scores[2 * n], rows.q[k], left);
            mma_f16(scores[2 * n + 1], rows.q[k], right);
        }
    }
}

// Adds the values of 8 N positions by their weights.
template <u32 D, u32 N> DEVICE void add_values(Rows<D> &rows, const f32 (&weights)[N][4], const u16 *vals) {
    const u32 lane = thread_x() % 32;
    UNROLL for (u32 k = 0; k < N / 2; k++) {
        u32 a[4];
        UNROLL for (u32 i = 0; i < 4; i++) {
            const f32 *const two = weights[2 * k + i / 2] + i % 2 * 2;
            a[i] = floats_to_halves(two[0], two[1]);
        }
        UNROLL for (u32 n = 0; n < D / 16; n++) {
            u32 r[4];
            load_matrices_transposed(r, vals + (16 * k + lane % 16) * (D + 8) + 16 * n + lane / 16 * 8);
            const u32 left[2] = {r[0], r[1]}, right[2] = {r[2], r[3]};
            mma_f16(rows.values[2 * n], a, left);
            mma_f16(rows.values[2 * n + 1], a, right);
        }
    }
}
