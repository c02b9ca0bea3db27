// Attention of many tokens of a sequence at once, on the tensor cores: keys and values in halves, in blocks of 64 positions.
#include "prims.cuh"

#define KV_BLOCK 64

// Rows of a step that stand together and are of one sequence: `n` from `first` on. Their parts begin at row `part` of all parts.
struct RowTile {
    u32 first, n, part, _;
};

// Begins to copy the rows of a block of keys or values; those from `n_here` on become zeros.
template <u32 D> DEVICE void stage(u16 *to, const u8 *from, u32 head_dim, u32 n_here) {
    const u32 beside = D / 8, piece = thread_x() % beside;
    UNROLL for (u32 i = 0; i < KV_BLOCK * beside / 128; i++) {
        const u32 row = thread_x() / beside + i * (128 / beside);
        u16 *const at = to + row * (D + 8) + 8 * piece;
        if (8 * piece >= head_dim) continue;
        if (row < n_here) copy_async(at, from + (row * head_dim + 8 * piece) * 2);
        else *(u32x4 *)at = u32x4{0, 0, 0, 0};
    }
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

// Scores of a block's positions.
template <u32 D> DEVICE void score(f32 (&scores)[8][4], const Rows<D> &rows, const u16 *keys) {
    const u32 lane = thread_x() % 32;
    UNROLL for (u32 i = 0; i < 32; i++) scores[i / 4][i % 4] = 0;
    UNROLL for (u32 k = 0; k < D / 16; k++) {
        UNROLL for (u32 n = 0; n < 4; n++) {
            u32 r[4];
            load_matrices(r, keys + (16 * n + lane / 16 * 8 + lane % 8) * (D + 8) + 16 * k + lane / 8 % 2 * 8);
            const u32 left[2] = {r[0], r[1]}, right[2] = {r[2], r[3]};
            mma_f16(scores[2 * n], rows.q[k], left);
            mma_f16(scores[2 * n + 1], rows.q[k], right);
        }
    }
}

// Makes weights of scores, relative to the largest so far, to which all before is brought.
template <u32 D> DEVICE void weigh(f32 (&scores)[8][4], Rows<D> &rows, u32 first_position) {
    const u32 t = thread_x() % 4;
    f32 base[2], rescale[2];
    UNROLL for (u32 h = 0; h < 2; h++) {
        f32 largest = rows.largest[h];
        UNROLL for (u32 i = 0; i < 16; i++) {
            f32 &s = scores[i / 2][2 * h + i % 2];
            if (first_position + i / 2 * 8 + 2 * t + i % 2 > rows.position[h]) s = -INFINITY;
            largest = fmaxf(largest, s);
        }
        largest = warp_max<4>(largest);
        // Where a row has no position yet every weight is zero, not infinity less infinity.
        base[h] = largest == -INFINITY ? 0 : largest;
        rescale[h] = exp2f(rows.largest[h] - base[h]);
        rows.largest[h] = largest;
        rows.sum[h] *= rescale[h];
        UNROLL for (u32 i = 0; i < 16; i++) {
            f32 &s = scores[i / 2][2 * h + i % 2];
            s = exp2f(s - base[h]);
            rows.sum[h] += s;
        }
    }
    UNROLL for (u32 n = 0; n < D / 8; n++)
        UNROLL for (u32 i = 0; i < 4; i++) rows.values[n][i] *= rescale[i / 2];
}

// Adds a block's values by their weights.
template <u32 D> DEVICE void add_values(Rows<D> &rows, const f32 (&weights)[8][4], const u16 *vals) {
    const u32 lane = thread_x() % 32;
    UNROLL for (u32 k = 0; k < 4; k++) {
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

// As `attention` in halves, of `chunk` heads of a tile's tokens; heads of at most D values, in whole eights.
// Grid: tiles, n_head / chunk, splits.
#define PREFILL_ARGS                                                                                                  \
    f32 *out, f32 *parts, const RowTile *tiles, const f32 *qkv, u8 *const *blocks, const u32 *tables,                 \
        const u32 *positions, u32 n_qkv, u32 n_head, u32 n_head_kv, u32 head_dim, u32 layer, u32 chunk, u32 n_split,  \
        u32 per_split

template <u32 D> DEVICE void prefill(PREFILL_ARGS) {
    SHARED(u16, keys, KV_BLOCK *(D + 8));
    SHARED(u16, vals, KV_BLOCK *(D + 8));
    const RowTile tile = tiles[block_x()];
    const u32 lane = thread_x() % 32, g = lane / 4, t = lane % 4, first_head = block_y() * chunk;
    const u32 n_kv = positions[tile.first + tile.n - 1] + 1, n_blocks = (n_kv + KV_BLOCK - 1) / KV_BLOCK;
    const u64 head_bytes = (u64)KV_BLOCK * head_dim * 2;
    const u64 at = ((u64)layer * 2 * n_head_kv + first_head / (n_head / n_head_kv)) * head_bytes;
    u8 *const *const table = blocks + tables[tile.first];

    Rows<D> rows;
    // Powers of two take one instruction.
    const f32 scale = 1.44269504f / sqrtf((f32)head_dim);
    UNROLL for (u32 h = 0; h < 2; h++) {
        const u32 row = thread_x() / 32 * 16 + g + 8 * h;
        // Rows past the last are that one, and are not written.
        const u32 of = tile.first + least(row / chunk, tile.n - 1);
        rows.position[h] = positions[of];
        rows.largest[h] = -INFINITY, rows.sum[h] = 0;
        const f32 *const q = qkv + (u64)of * n_qkv + (first_head + row % chunk) * head_dim;
        UNROLL for (u32 i = 0; i < D / 8; i++) {
            const u32 d = 8 * i + 2 * t;
            const f32x2 two = d < head_dim ? *(const f32x2 *)(q + d) : f32x2{0, 0};
            rows.q[i / 2][i % 2 * 2 + h] = floats_to_halves(two.x * scale, two.y * scale);
        }
    }
    UNROLL for (u32 i = 0; i < D / 2; i++) rows.values[i / 4][i % 4] = 0;
    // Columns that no head has meet zeros of queries, and must be numbers.
    for (u32 i = thread_x(); i < KV_BLOCK * (D - head_dim); i += 128) {
        const u32 d = head_dim + i % (D - head_dim), row = i / (D - head_dim);
        keys[row * (D + 8) + d] = vals[row * (D + 8) + d] = 0;
    }

    const u32 first_block = block_z() * per_split, last_block = least(first_block + per_split, n_blocks);
    if (first_block < last_block) {
        stage<D>(keys, table[first_block] + at, head_dim, n_kv - first_block * KV_BLOCK);
        copy_async_commit();
        stage<D>(vals, table[first_block] + at + n_head_kv * head_bytes, head_dim, n_kv - first_block * KV_BLOCK);
        copy_async_commit();
    }
    for (u32 b = first_block; b < last_block; b++) {
        const bool more = b + 1 < last_block;
        const u8 *const next = table[more ? b + 1 : b] + at;
        f32 scores[8][4];
        // One group, the values', may still be under way; then the next keys'.
        copy_async_wait<1>();
        barrier();
        score<D>(scores, rows, keys);
        barrier();
        if (more) stage<D>(keys, next, head_dim, n_kv - (b + 1) * KV_BLOCK);
        copy_async_commit();
        weigh<D>(scores, rows, b * KV_BLOCK);
        copy_async_wait<1>();
        barrier();
        add_values<D>(rows, scores, vals);
        barrier();
        if (more) stage<D>(vals, next + n_head_kv * head_bytes, head_dim, n_kv - (b + 1) * KV_BLOCK);
        copy_async_commit();
    }
    copy_async_wait<0>();

    UNROLL for (u32 h = 0; h < 2; h++) {
        const f32 sum = warp_sum<4>(rows.sum[h]);
        const u32 row = thread_x() / 32 * 16 + g + 8 * h, token = row / chunk, head = first_head + row % chunk;
        if (token >= tiles[block_x()].n) continue;
        const u64 of = (u64)(tiles[block_x()].first + token) * n_head + head;
        const u64 of_parts = ((u64)(tiles[block_x()].part + token) * n_head + head) * n_split + block_z();
        f32 *const part = parts + of_parts * (2 + head_dim);
        f32 *const to = n_split == 1 ? out + of * head_dim : part + 2;
        const f32 divisor = n_split == 1 ? sum : 1;
        if (n_split > 1 && t == 0) part[0] = rows.largest[h] * 0.693147181f, part[1] = sum;
        UNROLL for (u32 n = 0; n < D / 8; n++) {
            if (8 * n >= head_dim) break;
            const f32 *const two = rows.values[n] + 2 * h;
            *(f32x2 *)(to + 8 * n + 2 * t) = f32x2{two[0] / divisor, two[1] / divisor};
        }
    }
}

#define PREFILL(D)                                                                                                    \
    KERNEL_BESIDE(attention_prefill_##D, 128, 2, PREFILL_ARGS) {                                                      \
        prefill<D>(out, parts, tiles, qkv, blocks, tables, positions, n_qkv, n_head, n_head_kv, head_dim, layer,      \
                   chunk, n_split, per_split);                                                                        \
    }
PREFILL(64)
PREFILL(128)
#undef PREFILL
#undef PREFILL_ARGS
#undef KV_BLOCK
