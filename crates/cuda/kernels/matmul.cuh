// Products of a weight matrix with many rows: prefill. 8-bit codes meet on the tensor cores, and sums of 32 get their scales.
#pragma once

#include "qtypes.cuh"
#include "tiles.cuh"

// A block of threads computes 128 rows of w by a tile of T slots, in steps of 128 columns, two units of weights.
static const u32 TILE_ROWS = 128;
static const u32 STEP_COLUMNS = 128;
static const u32 STEP_SUBS = 4;
// Words from a row of codes to the next in shared memory: lanes that read the same word of eight rows, and four words of each, meet 32
// banks.
static const u32 CODES_STRIDE = 36;

#define MATMUL_ARGS                                                                                                   \
    f32 *out, PLANES, const u32 *codes, const f32x2 *scales, const Tile *tiles, const u32 *order, const u32 *ids,     \
        u32 n_slots, u32 n_rows, u32 n_cols, u32 x_div, u32 ld, u32 at

// 8 warps: 4 side by side along the rows of w, 2 along the slots.
template <u32 T> struct Part {
    static const u32 N = T / 16;
    u32 row, slot;
    // Sums of 16 rows by 8 slots, twice by N times.
    f32 sums[2][N][4];
};

// What a thread brings from global memory for a step: a unit of a row of w, and T / 32 pieces of 16 codes and a scale of x.
template <class Q, u32 T> struct Loader {
    Planes w;
    const u32x4 *codes;
    const f32x2 *scales;
    u32 n_cols;
    // Where its rows begin, in blocks, pieces and scales: half the registers of addresses.
    u32 block, x[T / 32], x_scales;
    Sub subs[2];
    f32x2 x_scale;

    // Past the last column the codes of others are read; no scale goes with them.
    DEVICE_MEMBER void load(u32 step, u32 *x_codes) {
        const u32 unit = 2 * step + thread_x() % 2, last = (n_cols - 1) / 64;
        Q::load(w, block, least(unit, last), n_cols, subs);
        if (unit > last) UNROLL for (int h = 0; h < 2; h++) subs[h].scale[0] = subs[h].scale[1] = subs[h].min = 0;
        UNROLL for (u32 i = 0; i < T / 32; i++) {
            const u32 piece = thread_x() % 8, row = thread_x() / 8 + 32 * i;
            copy_async(x_codes + row * CODES_STRIDE + 4 * piece, codes + x[i] + least(STEP_COLUMNS / 16 * step + piece, n_cols / 16 - 1));
        }
        copy_async_commit();
        const u32 group = STEP_SUBS * step + thread_x() % STEP_SUBS;
        x_scale = group < n_cols / 32 && thread_x() < STEP_SUBS * T ? scales[x_scales + group] : f32x2{0, 0};
    }

    DEVICE_MEMBER void store(u32 *w_codes, f32x2 *w_scales, f32x2 *x_scales) const {
        const u32 row = thread_x() / 2;
        UNROLL for (int h = 0; h < 2; h++) {
            const u32 sub = Q::column(thread_x() % 2, h) / 32;
            const u32 *c = subs[h].codes;
            u32x4 *to = (u32x4 *)(w_codes + row * CODES_STRIDE + 8 * sub);
            to[0] = u32x4{c[0], c[1], c[2], c[3]};
            to[1] = u32x4{c[4], c[5], c[6], c[7]};
            w_scales[sub * TILE_ROWS + row] = f32x2{subs[h].scale[0], Q::HALVES ? subs[h].scale[1] : subs[h].min};
        }
        if (thread_x() < STEP_SUBS * T) x_scales[thread_x() % STEP_SUBS * T + thread_x() / STEP_SUBS] = x_scale;
    }
};

// Adds 32 columns of 16 rows by 8 slots. w: scale and min, or two scales, of rows g and g + 8; x: scale and sum of slots 2t and
// 2t + 1.
template <class Q> DEVICE void add_products(f32 (&sums)[4], const u32 (&a)[4], const u32 (&b)[2], const f32x2 (&w)[2], const f32x4 &x) {
    const f32 scale[2] = {x.x, x.z}, sum[2] = {x.y, x.w};
    i32 c[4] = {0, 0, 0, 0};
    if (Q::HALVES) {
        i32 e[4] = {0, 0, 0, 0};
        const u32 first[2] = {a[0], a[1]}, second[2] = {a[2], a[3]};
        mma_s8_k16(c, first, b[0]);
        mma_s8_k16(e, second, b[1]);
        UNROLL for (int i = 0; i < 4; i++) sums[i] += scale[i % 2] * (w[i / 2].x * (f32)c[i] + w[i / 2].y * (f32)e[i]);
    } else {
        mma_s8_k32(c, a, b);
        UNROLL for (int i = 0; i < 4; i++) {
            sums[i] += w[i / 2].x * scale[i % 2] * (f32)c[i];
            if (Q::MINS) sums[i] -= w[i / 2].y * sum[i % 2];
        }
    }
}

// Adds a step's products to the sums of a warp's part of the tile.
template <class Q, u32 T>
DEVICE void step_of(Part<T> &part, const u32 *w_codes, const f32x2 *w_scales, const u32 *x_codes, const f32x2 *x_scales) {
    const u32 lane = thread_x() % 32, g = lane / 4, t = lane % 4;
    UNROLL for (u32 sub = 0; sub < STEP_SUBS; sub++) {
        u32 a[2][4];
        f32x2 w[2][2];
        UNROLL for (u32 m = 0; m < 2; m++) {
            const u32 row = part.row + 16 * m;
            load_matrices(a[m], w_codes + (row + lane % 16) * CODES_STRIDE + 8 * sub + lane / 16 * 4);
            UNROLL for (u32 i = 0; i < 2; i++) w[m][i] = w_scales[sub * TILE_ROWS + row + g + 8 * i];
        }
        UNROLL for (u32 n = 0; n < Part<T>::N; n += 2) {
            const u32 slot = part.slot + 8 * n;
            u32 r[4];
            load_matrices(r, x_codes + (slot + lane / 16 * 8 + lane % 8) * CODES_STRIDE + 8 * sub + lane / 8 % 2 * 4);
            UNROLL for (u32 i = 0; i < 2; i++) {
                const u32 b[2] = {r[2 * i], r[2 * i + 1]};
                const f32x4 x = *(const f32x4 *)(x_scales + sub * T + slot + 8 * i + 2 * t);
                UNROLL for (u32 m = 0; m < 2; m++) add_products<Q>(part.sums[m][n + i], a[m], b, w[m], x);
            }
        }
    }
}

// As `matvec`. Grid: rows / 128, tiles.
template <class Q, u32 T> DEVICE void matmul(MATMUL_ARGS) {
    SHARED(u32, w_codes, TILE_ROWS * CODES_STRIDE);
    SHARED(f32x2, w_scales, STEP_SUBS * TILE_ROWS);
    SHARED(u32, x_codes, 2 * T * CODES_STRIDE);
    SHARED(f32x2, x_scales, STEP_SUBS * T);
    const Work work = work_of(tiles, order, ids, block_y(), T, n_slots);
    if (work.n == 0) return;
    const u32 first_row = block_x() * TILE_ROWS, warp = thread_x() / 32;
    // Rows of x past the tile's last are that one.
    Loader<Q, T> next{PLANES_OF_ARGS, (const u32x4 *)codes, scales, n_cols};
    next.block = (work.expert * n_rows + least(first_row + thread_x() / 2, n_rows - 1)) * (n_cols / Q::BLOCK);
    UNROLL for (u32 i = 0; i < T / 32; i++)
        next.x[i] = work.slot(least(thread_x() / 8 + 32 * i, work.n - 1)) / x_div * (n_cols / 16);
    next.x_scales = work.slot(least(thread_x() / STEP_SUBS, work.n - 1)) / x_div * (n_cols / 32);
    Part<T> part;
    part.row = warp % 4 * 32;
    part.slot = warp / 4 * (T / 2);
    UNROLL for (u32 i = 0; i < 2 * Part<T>::N * 4; i++) part.sums[i / 4 / Part<T>::N][i / 4 % Part<T>::N][i % 4] = 0;

    const u32 n_steps = (n_cols + STEP_COLUMNS - 1) / STEP_COLUMNS;
    next.load(0, x_codes);
    for (u32 step = 0; step < n_steps; step++) {
        next.store(w_codes, w_scales, x_scales);
        copy_async_wait<0>();
        // The last step loads itself again: without a branch the loads of a step are under way while the one before is computed.
        // They stand before the barrier because compilers move them as far down as it lets them.
        next.load(least(step + 1, n_steps - 1), x_codes + (step + 1) % 2 * T * CODES_STRIDE);
        barrier();
        step_of<Q, T>(part, w_codes, w_scales, x_codes + step % 2 * T * CODES_STRIDE, x_scales);
        barrier();
    }
    copy_async_wait<0>();

    const u32 g = thread_x() % 32 / 4, t = thread_x() % 4;
    UNROLL for (u32 n = 0; n < Part<T>::N; n++) {
        UNROLL for (u32 i = 0; i < 2; i++) {
            const u32 column = part.slot + 8 * n + 2 * t + i;
            if (column >= work.n) break;
            f32 *to = out + (u64)work.slot(column) * ld + at;
            UNROLL for (u32 m = 0; m < 4; m++) {
                const u32 row = first_row + part.row + 8 * m + g;
                if (row < n_rows) to[row] = part.sums[m / 2][n][m % 2 * 2 + i];
            }
        }
    }
}

#define MATMUL(name, Q, T)                                                                                            \
    KERNEL_BESIDE(matmul_##name##_##T, 256, 2, MATMUL_ARGS) {                                                         \
        matmul<Q, T>(out, w0, w1, w2, w3, codes, scales, tiles, order, ids, n_slots, n_rows, n_cols, x_div, ld, at);  \
    }
#define MATMULS(name, Q) MATMUL(name, Q, 32) MATMUL(name, Q, 64)
