// Attention of one token of a sequence, on the tensor cores: as `attention` in halves, and as exact.
//
// A product of a warp has 16 rows. Eight are heads that share their keys, the other eight what rounding to halves has taken from those:
// two halves hold nearly what a float holds, so that queries and weights count as floats. Every warp has 16 positions of each block to
// itself, so that it waits for its own copies only.
#include "halves.cuh"
#include "q8.cuh"

// Heads that a block of threads holds at once, and positions of a block that each of its warps has.
static const u32 DECODE_HEADS = 8, DECODE_ROWS = 16;

// What rounding a float to half takes from it.
DEVICE f32 rest_of(f32 v) { return v - half_to_float(float_to_half(v)); }

// Makes weights of a head's scores, as its rows g and g + 8 of the product have them in two parts, and gives each in two parts again.
// All are relative to the largest so far, to which all before is brought.
template <u32 D> DEVICE void weigh(f32 (&scores)[2][4], Rows<D> &rows, u32 first_position) {
    f32 largest = rows.largest[0], weights[4];
    UNROLL for (u32 i = 0; i < 4; i++) {
        weights[i] = scores[i / 2][i % 2] + scores[i / 2][2 + i % 2];
        if (first_position + i / 2 * 8 + thread_x() % 4 * 2 + i % 2 > rows.position[0]) weights[i] = -INFINITY;
        largest = fmaxf(largest, weights[i]);
    }
    largest = warp_max<4>(largest);
    // Where there is no position yet every weight is zero, not infinity less infinity.
    const f32 base = largest == -INFINITY ? 0 : largest, rescale = exp2f(rows.largest[0] - base);
    rows.largest[0] = largest;
    rows.sum[0] *= rescale;
    UNROLL for (u32 i = 0; i < 4; i++) {
        const f32 weight = exp2f(weights[i] - base);
        rows.sum[0] += weight;
        scores[i / 2][i % 2] = weight;
        scores[i / 2][2 + i % 2] = rest_of(weight);
    }
    UNROLL for (u32 i = 0; i < D / 2; i++) rows.values[i / 4][i % 4] *= rescale;
}

// Puts together what the four warps have found of `chunk` heads, and gives it as `attention` does. A warp's lies where its keys did.
template <u32 D>
DEVICE void put_together(f32 *out, f32 *parts, const f32 *found, const f32 *largests, const f32 *sums, u64 first_head, u64 first_part,
                         u32 head_dim, u32 chunk, u32 n_split) {
    for (u32 i = thread_x(); i < chunk * head_dim; i += 128) {
        const u32 head = i / head_dim, d = i % head_dim;
        f32 largest = -INFINITY, sum = 0, value = 0;
        UNROLL for (u32 w = 0; w < 4; w++) largest = fmaxf(largest, largests[w * DECODE_HEADS + head]);
        const f32 base = largest == -INFINITY ? 0 : largest;
        UNROLL for (u32 w = 0; w < 4; w++) {
            const f32 weight = exp2f(largests[w * DECODE_HEADS + head] - base);
            sum += weight * sums[w * DECODE_HEADS + head];
            value += weight * found[(w * DECODE_ROWS + head) * (D + 8) + d];
        }
        f32 *const part = parts + (first_part + head * n_split) * (2 + head_dim);
        if (n_split == 1) out[first_head * head_dim + i] = value / sum;
        else part[2 + d] = value;
        if (n_split > 1 && d == 0) part[0] = largest * 0.693147181f, part[1] = sum;
    }
}

#define DECODE_ARGS                                                                                                   \
    f32 *out, f32 *parts, const u32 *rows, const f32 *qkv, u8 *const *blocks, const u32 *tables, const u32 *positions,\
        u32 n_qkv, u32 n_head, u32 n_head_kv, u32 head_dim, u32 layer, u32 chunk, u32 n_split, u32 per_split,         \
        u32 *codes, f32x2 *scales

// Heads of at most D values, in whole eights; `chunk` is at most 8.
template <u32 D> DEVICE void decode(DECODE_ARGS) {
    // A warp's keys and values, and in their place what it found: D floats of each head, the next head's in other banks.
    SHARED(u16, staged, 2 * KV_ROWS * (D + 8));
    SHARED(f32, largests, 4 * DECODE_HEADS);
    SHARED(f32, sums, 4 * DECODE_HEADS);
    const u32 warp = thread_x() / 32, lane = thread_x() % 32, g = lane / 4, t = lane % 4, first_head = block_y() * chunk;
    const u32 token = rows[block_x()], n_kv = positions[token] + 1, n_blocks = (n_kv + KV_ROWS - 1) / KV_ROWS;
    const u64 head_bytes = (u64)KV_ROWS * head_dim * 2;
    const u64 at = ((u64)layer * 2 * n_head_kv + first_head / (n_head / n_head_kv)) * head_bytes + warp * DECODE_ROWS * head_dim * 2;
    u8 *const *const table = blocks + tables[token];
    u16 *const keys = staged + warp * 2 * DECODE_ROWS * (D + 8), *const vals = keys + DECODE_ROWS * (D + 8);
    // Begins to copy the warp's rows of keys or values of block number b, which begin at `from`.
    auto bring = [&](u16 *to, const u8 *from, u32 b) {
        const u32 first = b * KV_ROWS + warp * DECODE_ROWS;
        stage<D, DECODE_ROWS, 32>(to, from, head_dim, first < n_kv ? n_kv - first : 0);
        copy_async_commit();
    };

    const u32 first_block = block_z() * per_split, last_block = least(first_block + per_split, n_blocks);
    const u64 values_at = at + n_head_kv * head_bytes;
    if (first_block < last_block) {
        bring(keys, table[first_block] + at, first_block);
        bring(vals, table[first_block] + values_at, first_block);
    }
    Rows<D> here;
    here.position[0] = n_kv - 1, here.largest[0] = -INFINITY, here.sum[0] = 0;
    UNROLL for (u32 i = 0; i < D / 2; i++) here.values[i / 4][i % 4] = 0;
    // Powers of two take one instruction.
    const f32 scale = 1.44269504f / sqrtf((f32)head_dim);
    // Heads past the last are that one, and are not written.
    const f32 *const q = qkv + (u64)token * n_qkv + (first_head + least(g, chunk - 1)) * head_dim;
    UNROLL for (u32 i = 0; i < D / 8; i++) {
        const u32 d = 8 * i + 2 * t;
        f32x2 two = d < head_dim ? *(const f32x2 *)(q + d) : f32x2{0, 0};
        two.x *= scale, two.y *= scale;
        here.q[i / 2][i % 2 * 2] = floats_to_halves(two.x, two.y);
        here.q[i / 2][i % 2 * 2 + 1] = floats_to_halves(rest_of(two.x), rest_of(two.y));
    }
    for (u32 b = first_block; b < last_block; b++) {
        // The last block brings itself again, of which nothing is there: without a branch its address is on its way in time.
        const u8 *const next = table[least(b + 1, last_block - 1)];
        const u32 number = b + 1 < last_block ? b + 1 : n_blocks;
        f32 scores[2][4];
        // One group, the values', may still be under way; then the next keys'.
        copy_async_wait<1>();
        warp_barrier();
        score(scores, here, keys);
        warp_barrier();
        bring(keys, next + at, number);
        weigh(scores, here, b * KV_ROWS + warp * DECODE_ROWS);
        copy_async_wait<1>();
        warp_barrier();
        add_values(here, scores, vals);
        warp_barrier();
        bring(vals, next + values_at, number);
    }
    copy_async_wait<0>();
    warp_barrier();
    const f32 sum = warp_sum<4>(here.sum[0]);
    f32 *const own = (f32 *)keys + g * (D + 8);
    UNROLL for (u32 n = 0; n < D / 8; n++) {
        const f32 *const v = here.values[n];
        *(f32x2 *)(own + 8 * n + 2 * t) = f32x2{v[0] + v[2], v[1] + v[3]};
    }
    if (t == 0) largests[warp * DECODE_HEADS + g] = here.largest[0], sums[warp * DECODE_HEADS + g] = sum;
    barrier();
    const u64 first_part = ((u64)block_x() * n_head + first_head) * n_split + block_z();
    put_together<D>(out, parts, (const f32 *)staged, largests, sums, (u64)token * n_head + first_head, first_part, head_dim, chunk,
                    n_split);
    if (n_split > 1 || !codes) return;
    barrier();
    quantize_written<128>(codes, scales, out, ((u64)token * n_head + first_head) * head_dim, chunk * head_dim);
}

// Grid: rows, n_head / chunk, splits.
#define DECODE(D)                                                                                                     \
    KERNEL_BESIDE(attention_decode_##D, 128, 3, DECODE_ARGS) {                                                        \
        decode<D>(out, parts, rows, qkv, blocks, tables, positions, n_qkv, n_head, n_head_kv, head_dim, layer, chunk, \
                  n_split, per_split, codes, scales);                                                                 \
    }
DECODE(64)
DECODE(128)
#undef DECODE
#undef DECODE_ARGS
