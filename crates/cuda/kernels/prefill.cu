// Attention of many tokens of a sequence at once, on the tensor cores.
#include "halves.cuh"

// Rows of a step that stand together and are of one sequence: `n` from `first` on. Their parts begin at row `part` of all parts.
struct RowTile {
    u32 first, n, part, _;
};

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

// As `attention` in halves, of `chunk` heads of a tile's tokens; heads of at most D values, in whole eights.
// Grid: tiles, n_head / chunk, splits.
#define PREFILL_ARGS                                                                                                  \
    f32 *out, f32 *parts, const RowTile *tiles, const f32 *qkv, u8 *const *blocks, const u32 *tables,                 \
        const u32 *positions, u32 n_qkv, u32 n_head, u32 n_head_kv, u32 head_dim, u32 layer, u32 chunk, u32 n_split,  \
        u32 per_split

template <u32 D> DEVICE void prefill(PREFILL_ARGS) {
    SHARED(u16, keys, KV_ROWS *(D + 8));
    SHARED(u16, vals, KV_ROWS *(D + 8));
    const RowTile tile = tiles[block_x()];
    const u32 lane = thread_x() % 32, g = lane / 4, t = lane % 4, first_head = block_y() * chunk;
    const u32 n_kv = positions[tile.first + tile.n - 1] + 1, n_blocks = (n_kv + KV_ROWS - 1) / KV_ROWS;
    const u64 head_bytes = (u64)KV_ROWS * head_dim * 2;
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
    const u32 first_block = block_z() * per_split, last_block = least(first_block + per_split, n_blocks);
    if (first_block < last_block) {
        stage<D, KV_ROWS, 128>(keys, table[first_block] + at, head_dim, n_kv - first_block * KV_ROWS);
        copy_async_commit();
        stage<D, KV_ROWS, 128>(vals, table[first_block] + at + n_head_kv * head_bytes, head_dim, n_kv - first_block * KV_ROWS);
        copy_async_commit();
    }
    for (u32 b = first_block; b < last_block; b++) {
        const bool more = b + 1 < last_block;
        const u8 *const next = table[more ? b + 1 : b] + at;
        f32 scores[8][4];
        // One group, the values', may still be under way; then the next keys'.
        copy_async_wait<1>();
        barrier();
        score(scores, rows, keys);
        barrier();
        if (more) stage<D, KV_ROWS, 128>(keys, next, head_dim, n_kv - (b + 1) * KV_ROWS);
        copy_async_commit();
        weigh<D>(scores, rows, b * KV_ROWS);
        copy_async_wait<1>();
        barrier();
        add_values(rows, scores, vals);
        barrier();
        if (more) stage<D, KV_ROWS, 128>(vals, next + n_head_kv * head_bytes, head_dim, n_kv - (b + 1) * KV_ROWS);
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
