// Products of a weight matrix with a few rows: decode. Bound by reading the weights, each of which is read once per tile of rows.
#include "qtypes.cuh"
#include "tiles.cuh"

// out[slot, at + r] = w_expert[r] · x[slot / x_div] for the slots of tile `block_y`; w: [n_mat, n_rows, n_cols],
// x: codes [.., n_cols] and scales [.., n_cols / 32], out: [n_slots, ld]. `lanes` lanes share a row of w, a power of two.
// Grid: rows / (128 / lanes), tiles.
#define MATVEC_ARGS                                                                                                   \
    f32 *out, PLANES, const u32 *codes, const f32x2 *scales, const Tile *tiles, const u32 *order, const u32 *ids,     \
        u32 n_slots, u32 n_rows, u32 n_cols, u32 x_div, u32 ld, u32 at, u32 lanes

template <class Q, u32 T> DEVICE void matvec(MATVEC_ARGS) {
    const Work work = work_of(tiles, order, ids, block_y(), T, n_slots);
    if (work.n == 0) return;
    const u32 row = block_x() * (128 / lanes) + thread_x() / lanes, lane = thread_x() % lanes;
    const u64 row_of_all = (u64)work.expert * n_rows + least(row, n_rows - 1);
    const u64 block = row_of_all * (n_cols / Q::BLOCK);
    f32 sums[T];
    u64 x_rows[T];
    UNROLL for (u32 i = 0; i < T; i++) {
        sums[i] = 0;
        x_rows[i] = work.slot(least(i, work.n - 1)) / x_div;
    }
    for (u32 unit = lane; unit < (n_cols + 63) / 64; unit += lanes) {
        Sub s[2];
        Q::load(Planes{w0, w1, w2, w3}, block, unit, n_cols, s);
        UNROLL for (int h = 0; h < 2; h++) {
            const u32 column = Q::column(unit, h);
            if (column >= n_cols) break;
            UNROLL for (u32 i = 0; i < T; i++) {
                if (i >= work.n) break;
                const u32x4 *x = (const u32x4 *)(codes + (x_rows[i] * n_cols + column) / 4);
                const u32x4 low = x[0], high = x[1];
                const f32x2 scale = scales[x_rows[i] * (n_cols / 32) + column / 32];
                const u32 *c = s[h].codes;
                i32 dot = dp4a(c[0], low.x, dp4a(c[1], low.y, dp4a(c[2], low.z, dp4a(c[3], low.w, 0))));
                f32 product;
                if (Q::HALVES) {
                    product = s[h].scale[0] * (f32)dot;
                    dot = dp4a(c[4], high.x, dp4a(c[5], high.y, dp4a(c[6], high.z, dp4a(c[7], high.w, 0))));
                    product += s[h].scale[1] * (f32)dot;
                } else {
                    dot = dp4a(c[4], high.x, dp4a(c[5], high.y, dp4a(c[6], high.z, dp4a(c[7], high.w, dot))));
                    product = s[h].scale[0] * (f32)dot;
                }
                sums[i] += scale.x * product - s[h].min * scale.y;
            }
        }
    }
    UNROLL for (u32 i = 0; i < T; i++) {
        if (i >= work.n) break;
        for (u32 mask = lanes / 2; mask > 0; mask /= 2) sums[i] += shuffle_xor(sums[i], mask);
        if (lane == 0 && row < n_rows) out[(u64)work.slot(i) * ld + at + row] = sums[i];
    }
}

// The same with weights that are floats and x as floats, [.., n_cols]; a warp per row of w. Grid: rows / 4, tiles.
#define MATVEC_FLOAT_ARGS                                                                                             \
    f32 *out, PLANES, const f32 *x, const Tile *tiles, const u32 *order, const u32 *ids, u32 n_slots, u32 n_rows,     \
        u32 n_cols, u32 x_div, u32 ld, u32 at

template <class F, u32 T> DEVICE void matvec_float(MATVEC_FLOAT_ARGS) {
    const Work work = work_of(tiles, order, ids, block_y(), T, n_slots);
    const u32 row = block_x() * 4 + thread_x() / 32, lane = thread_x() % 32;
    if (work.n == 0 || row >= n_rows) return;
    const u64 w = ((u64)work.expert * n_rows + row) * n_cols;
    f32 sums[T];
    u64 x_rows[T];
    UNROLL for (u32 i = 0; i < T; i++) {
        sums[i] = 0;
        x_rows[i] = work.slot(least(i, work.n - 1)) / x_div;
    }
    for (u32 column = lane; column < n_cols; column += 32) {
        const f32 weight = F::at(w0, w + column);
        UNROLL for (u32 i = 0; i < T; i++) {
            if (i >= work.n) break;
            sums[i] += weight * x[x_rows[i] * n_cols + column];
        }
    }
    UNROLL for (u32 i = 0; i < T; i++) {
        if (i >= work.n) break;
        const f32 sum = warp_sum(sums[i]);
        if (lane == 0) out[(u64)work.slot(i) * ld + at + row] = sum;
    }
}

#define MATVEC(name, Q, T)                                                                                            \
    KERNEL(matvec_##name##_##T, 128, MATVEC_ARGS) {                                                                   \
        matvec<Q, T>(out, w0, w1, w2, w3, codes, scales, tiles, order, ids, n_slots, n_rows, n_cols, x_div, ld, at,   \
                     lanes);                                                                                          \
    }
#define MATVECS(name, Q) MATVEC(name, Q, 1) MATVEC(name, Q, 4) MATVEC(name, Q, 8)
FOR_QUANTIZED(MATVECS)
#undef MATVECS
#undef MATVEC

#define MATVEC(name, F, T)                                                                                            \
    KERNEL(matvec_##name##_##T, 128, MATVEC_FLOAT_ARGS) {                                                             \
        matvec_float<F, T>(out, w0, w1, w2, w3, x, tiles, order, ids, n_slots, n_rows, n_cols, x_div, ld, at);        \
    }
#define MATVECS(name, F) MATVEC(name, F, 1) MATVEC(name, F, 4) MATVEC(name, F, 8)
FOR_FLOATS(MATVECS)
#undef MATVECS
#undef MATVEC
