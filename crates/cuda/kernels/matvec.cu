// Products of a weight matrix with a few rows: see `matvec.cuh`.
#include "matvec.cuh"
#include "route.cuh"

// out[slot, at + r] = w_expert[r] · x[slot / x_div] for the slots of tile `block_y`, and where `sum` is not null that is added to it
// too; w: [n_mat, n_rows, n_cols], x: codes [.., n_cols] and scales [.., n_cols / 32], out, sum: [n_slots, ld]. `lanes` lanes share two
// rows of w. Grid: rows / (256 / lanes), tiles.
#define MATVEC_ARGS                                                                                                   \
    f32 *out, PLANES, const u32 *codes, const f32x2 *scales, const Tile *tiles, const u32 *order, const u32 *ids,     \
        u32 n_slots, u32 n_rows, u32 n_cols, u32 x_div, u32 ld, u32 at, u32 lanes, f32 *sum

// The rows of w from `first_row` on, two to each `lanes` threads.
template <class Q, u32 T>
DEVICE void matvec(f32 *out, const Planes &w, const u32 *codes, const f32x2 *scales, const Work &work, u32 first_row, u32 n_rows, u32 n_cols,
                   u32 x_div, u32 ld, u32 at, u32 lanes, f32 *sum) {
    const u32 row = first_row + thread_x() / lanes * 2;
    const Inputs<T> x(work, x_div);
    f32 sums[2][T];
    const u64 first = (u64)work.expert * n_rows, per_row = n_cols / Q::BLOCK;
    const u64 block[2] = {(first + least(row, n_rows - 1)) * per_row, (first + least(row + 1, n_rows - 1)) * per_row};
    const Planes both[2] = {w, w};
    dot_rows<Q, T, 2>(sums, both, block, codes, scales, x, n_cols, lanes);
    if (thread_x() % lanes != 0) return;
    UNROLL for (u32 i = 0; i < T; i++) {
        if (i >= work.n) break;
        const u64 to = (u64)work.slot(i) * ld + at + row;
        UNROLL for (u32 r = 0; r < 2; r++) {
            if (row + r >= n_rows) break;
            out[to + r] = sums[r][i];
            if (sum) sum[to + r] += sums[r][i];
        }
    }
}

#define MATVEC(name, Q, T)                                                                                            \
    KERNEL(matvec_##name##_##T, 128, MATVEC_ARGS) {                                                                   \
        const Work work = work_of(tiles, order, ids, block_y(), T, n_slots);                                          \
        if (work.n == 0) return;                                                                                      \
        matvec<Q, T>(out, PLANES_OF_ARGS, codes, scales, work, block_x() * (256 / lanes), n_rows, n_cols, x_div, ld,  \
                     at, lanes, sum);                                                                                 \
    }
#define MATVECS(name, Q) MATVEC(name, Q, 1) MATVEC(name, Q, 4) MATVEC(name, Q, 8)
FOR_QUANTIZED(MATVECS)
#undef MATVECS
#undef MATVEC

// Queries, keys and values: three matrices of the same input, each of its own type, which is GGUF's number of it. Rows of w0 are columns
// 0.. of out, those of the others stand behind them; w1 and w2 have n_kv rows. Grid: blocks of each matrix as above, tiles.
#define QKV_ARGS                                                                                                      \
    f32 *out, PLANES_OF(q), PLANES_OF(k), PLANES_OF(v), u32 q_type, u32 k_type, u32 v_type, const u32 *codes,         \
        const f32x2 *scales, u32 n_slots, u32 n_q, u32 n_kv, u32 n_cols, u32 lanes
#define QKV(T)                                                                                                        \
    KERNEL(qkv_##T, 128, QKV_ARGS) {                                                                                  \
        const u32 per_block = 256 / lanes, q_blocks = (n_q + per_block - 1) / per_block;                              \
        const u32 kv_blocks = (n_kv + per_block - 1) / per_block, block = block_x();                                  \
        const Work work = work_of(0, 0, 0, block_y(), T, n_slots);                                                    \
        const bool of_q = block < q_blocks, of_v = block >= q_blocks + kv_blocks;                                     \
        const Planes w = of_q ? Planes{q0, q1, q2, q3} : of_v ? Planes{v0, v1, v2, v3} : Planes{k0, k1, k2, k3};      \
        const u32 first_row = (block - (of_q ? 0 : of_v ? q_blocks + kv_blocks : q_blocks)) * per_block;              \
        const u32 at = of_q ? 0 : of_v ? n_q + n_kv : n_q, n_rows = of_q ? n_q : n_kv;                                \
        switch (of_q ? q_type : of_v ? v_type : k_type) { FOR_QUANTIZED_##T }                                         \
    }
#define OF_TYPE(Q, T)                                                                                                 \
    case Q::TYPE:                                                                                                     \
        matvec<Q, T>(out, w, codes, scales, work, first_row, n_rows, n_cols, 1, n_q + 2 * n_kv, at, lanes, 0);        \
        break;
#define OF_TYPE_1(name, Q) OF_TYPE(Q, 1)
#define OF_TYPE_4(name, Q) OF_TYPE(Q, 4)
#define OF_TYPE_8(name, Q) OF_TYPE(Q, 8)
#define FOR_QUANTIZED_1 FOR_QUANTIZED(OF_TYPE_1)
#define FOR_QUANTIZED_4 FOR_QUANTIZED(OF_TYPE_4)
#define FOR_QUANTIZED_8 FOR_QUANTIZED(OF_TYPE_8)
QKV(1)
QKV(4)
QKV(8)
#undef FOR_QUANTIZED_8
#undef FOR_QUANTIZED_4
#undef FOR_QUANTIZED_1
#undef OF_TYPE_8
#undef OF_TYPE_4
#undef OF_TYPE_1
#undef OF_TYPE
#undef QKV

// The same with weights that are floats and x as floats, [.., n_cols]; a warp per row of w. Grid: rows / 4, tiles.
#define MATVEC_FLOAT_ARGS                                                                                             \
    f32 *out, PLANES, const f32 *x, const Tile *tiles, const u32 *order, const u32 *ids, u32 n_slots, u32 n_rows,     \
        u32 n_cols, u32 x_div, u32 ld, u32 at, f32 *sum

template <class F, u32 T>
DEVICE void matvec_float(f32 *out, const u8 *weights, const f32 *x_all, const Work &work, u32 n_rows, u32 n_cols, u32 x_div, u32 ld, u32 at,
                         f32 *sum) {
    const u32 row = block_x() * 4 + thread_x() / 32, lane = thread_x() % 32;
    if (work.n == 0 || row >= n_rows) return;
    const u64 w = ((u64)work.expert * n_rows + row) * n_cols;
    const Inputs<T> x(work, x_div);
    f32 sums[T];
    UNROLL for (u32 i = 0; i < T; i++) sums[i] = 0;
    const u32 n_fours = n_cols % 4 == 0 ? n_cols / 4 : 0;
    for (u32 four = lane; four < n_fours; four += 32) {
        const f32x4 a = F::four(weights, w / 4 + four);
        UNROLL for (u32 i = 0; i < T; i++) {
            if (i >= work.n) break;
            const f32x4 b = ((const f32x4 *)(x_all + x.row[i] * n_cols))[four];
            sums[i] += a.x * b.x + a.y * b.y + (a.z * b.z + a.w * b.w);
        }
    }
    for (u32 column = 4 * n_fours + lane; column < n_cols; column += 32) {
        const f32 weight = F::at(weights, w + column);
        UNROLL for (u32 i = 0; i < T; i++) {
            if (i >= work.n) break;
            sums[i] += weight * x_all[x.row[i] * n_cols + column];
        }
    }
    UNROLL for (u32 i = 0; i < T; i++) {
        if (i >= work.n) break;
        const f32 all = warp_sum(sums[i]);
        const u64 to = (u64)work.slot(i) * ld + at + row;
        if (lane == 0) out[to] = all;
        if (lane == 0 && sum) sum[to] += all;
    }
}

#define MATVEC(name, F, T)                                                                                            \
    KERNEL(matvec_##name##_##T, 128, MATVEC_FLOAT_ARGS) {                                                             \
        const Work work = work_of(tiles, order, ids, block_y(), T, n_slots);                                          \
        matvec_float<F, T>(out, w0, x, work, n_rows, n_cols, x_div, ld, at, sum);                                     \
    }
#define MATVECS(name, F) MATVEC(name, F, 1) MATVEC(name, F, 4) MATVEC(name, F, 8)
FOR_FLOATS(MATVECS)
#undef MATVECS
#undef MATVEC

// A router's logits as by `matvec_f32`, and then what `route` makes of them: the last block of a tile routes its tokens. counters: zeros,
// one per tile.
#define ROUTER(T)                                                                                                     \
    KERNEL(router_f32_##T, 128, MATVEC_FLOAT_ARGS, u32 *to_ids, f32 *to_weights, u32 k, u32 *counters) {              \
        const Work work = work_of(tiles, order, ids, block_y(), T, n_slots);                                          \
        matvec_float<F32, T>(out, w0, x, work, n_rows, n_cols, x_div, ld, at, sum);                                   \
        if (!is_last_block(counters + block_y(), grid_x())) return;                                                   \
        for (u32 i = thread_x() / 32; i < work.n; i += 4)                                                             \
            route_token(to_ids, to_weights, out, work.slot(i), n_rows, k);                                            \
    }
ROUTER(1)
ROUTER(4)
ROUTER(8)
#undef ROUTER
