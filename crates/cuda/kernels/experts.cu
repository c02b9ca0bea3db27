// Feed-forward blocks of a few tokens in two launches: gate, up and SiLU with the 8-bit form of what they give; down, the weighted sum
// over a token's experts and the sum with what the block's output is added to.
#include "matvec.cuh"
#include "q8.cuh"

// Outputs that a block of threads computes: a group of their 8-bit form.
#define ROWS 32

// gate[slot] = silu(g_expert · x[slot / x_div]) · up[slot], up[slot] = u_expert · x[slot / x_div] for the slots of tile `block_y`, and
// the 8-bit form of gate where `to_codes` is not null. g, u: [n_mat, n_rows, n_cols], gate, up: [n_slots, n_rows], n_rows a multiple of
// 32. Grid: rows / 32, tiles.
#define GATE_UP_ARGS                                                                                                  \
    f32x4 *gate, f32x4 *up, u32 *to_codes, f32x2 *to_scales, PLANES_OF(g), PLANES_OF(u), const u32 *codes,            \
        const f32x2 *scales, const Tile *tiles, const u32 *order, const u32 *ids, u32 n_slots, u32 n_rows, u32 n_cols,\
        u32 x_div, u32 lanes

// Threads of a block: one slot's rows are all asked for in two turns; tiles have work to do meanwhile, and smaller blocks beside them.
#define THREADS(T) (T == 1 ? 512 : 256)

template <class Q, u32 T> DEVICE void gate_up(GATE_UP_ARGS) {
    SHARED(f32, values, 2 * T * ROWS);
    const Work work = work_of(tiles, order, ids, block_y(), T, n_slots);
    if (work.n == 0) return;
    const u32 first = block_x() * ROWS;
    const Inputs<T> x(work, x_div);
    const Planes both[2] = {{g0, g1, g2, g3}, {u0, u1, u2, u3}};
    // Gate's and up's product of a row go together. Whole warps have one or none.
    for (u32 row = thread_x() / lanes; row < ROWS; row += THREADS(T) / lanes) {
        f32 sums[2][T];
        const u64 begin = ((u64)work.expert * n_rows + first + row) * (n_cols / Q::BLOCK), block[2] = {begin, begin};
        dot_rows<Q, T, 2>(sums, both, block, codes, scales, x, n_cols, lanes);
        if (thread_x() % lanes == 0) UNROLL for (u32 i = 0; i < 2 * T; i++) values[i * ROWS + row] = sums[i / T][i % T];
    }
    barrier();
    const u32 i = thread_x() / (ROWS / 4), four = thread_x() % (ROWS / 4);
    // Whole warps go on.
    if (i / 4 * 4 >= T) return;
    const bool there = i < work.n;
    const f32x4 *all = (const f32x4 *)values;
    const f32x4 g = there ? all[i * (ROWS / 4) + four] : f32x4{0, 0, 0, 0};
    const f32x4 u = there ? all[(T + i) * (ROWS / 4) + four] : f32x4{0, 0, 0, 0};
    const f32x4 v = {g.x / (1 + expf(-g.x)) * u.x, g.y / (1 + expf(-g.y)) * u.y, g.z / (1 + expf(-g.z)) * u.z,
                     g.w / (1 + expf(-g.w)) * u.w};
    const u64 to = ((u64)work.slot(there ? i : 0) * n_rows + first) / 4 + four;
    if (there) gate[to] = v, up[to] = u;
    if (to_codes) quantize_four(to_codes, to_scales, v, to, there);
}
#undef ROWS

#define GATE_UP(name, Q, T)                                                                                           \
    KERNEL_BESIDE(gate_up_##name##_##T, THREADS(T), 2, GATE_UP_ARGS) {                                                \
        gate_up<Q, T>(gate, up, to_codes, to_scales, g0, g1, g2, g3, u0, u1, u2, u3, codes, scales, tiles, order, ids,\
                      n_slots, n_rows, n_cols, x_div, lanes);                                                         \
    }
#define GATE_UPS(name, Q) GATE_UP(name, Q, 1) GATE_UP(name, Q, 4) GATE_UP(name, Q, 8)
FOR_QUANTIZED(GATE_UPS)
#undef GATE_UPS
#undef GATE_UP
#undef THREADS

// Products of outputs with slots that a block of threads holds at most.
#define PRODUCTS 256

// parts[t, s] = w_id · x[t, s], s one of the k slots of token t and `id` its expert; out[t] = Σ_s weights[t, s] parts[t, s], in order
// of slots, and where `sum` is not null that is added to it. w: [n_mat, n_rows, n_cols]; out, sum: [n_tokens, n_rows]. A block has
// `per_block` of the rows, an even number, at most 256 / k. Grid: rows / per_block, tokens.
#define DOWN_ARGS                                                                                                     \
    f32 *out, f32 *parts, PLANES, const u32 *codes, const f32x2 *scales, const u32 *ids, const f32 *weights, u32 k,   \
        u32 n_rows, u32 n_cols, u32 lanes, u32 per_block, f32 *sum

template <class Q> DEVICE void down(DOWN_ARGS) {
    SHARED(f32, values, PRODUCTS);
    const u32 first = block_x() * per_block, n = per_block * k;
    const u64 first_slot = (u64)block_y() * k;
    const Planes both[2] = {PLANES_OF_ARGS, PLANES_OF_ARGS};
    // Two rows of a slot go together: of pairs of rows, the slots stand side by side.
    for (u32 at = 0; at < n / 2; at += 256 / lanes) {
        const u32 pair = at + thread_x() / lanes, slot = pair % k, row = pair / k * 2;
        Inputs<1> x(Work{0, (u32)first_slot + slot, 1, 0}, 1);
        f32 sums[2][1];
        const u64 expert = (u64)ids[first_slot + slot] * n_rows, per_row = n_cols / Q::BLOCK;
        const u64 block[2] = {(expert + least(first + row, n_rows - 1)) * per_row,
                              (expert + least(first + row + 1, n_rows - 1)) * per_row};
        dot_rows<Q, 1, 2>(sums, both, block, codes, scales, x, n_cols, lanes);
        if (thread_x() % lanes != 0 || pair >= n / 2) continue;
        UNROLL for (u32 r = 0; r < 2; r++) {
            values[(row + r) * k + slot] = sums[r][0];
            if (first + row + r < n_rows) parts[(first_slot + slot) * n_rows + first + row + r] = sums[r][0];
        }
    }
    barrier();
    const u32 row = first + thread_x();
    if (thread_x() >= per_block || row >= n_rows) return;
    f32 all = 0;
    for (u32 slot = 0; slot < k; slot++) all += weights[first_slot + slot] * values[thread_x() * k + slot];
    const u64 to = (u64)block_y() * n_rows + row;
    out[to] = all;
    if (sum) sum[to] += all;
}
#undef PRODUCTS

#define DOWN(name, Q)                                                                                                 \
    KERNEL_BESIDE(down_##name, 256, 4, DOWN_ARGS) {                                                                   \
        down<Q>(out, parts, w0, w1, w2, w3, codes, scales, ids, weights, k, n_rows, n_cols, lanes, per_block, sum);   \
    }
FOR_QUANTIZED(DOWN)
#undef DOWN
