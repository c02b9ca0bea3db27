// Attention over keys and values in blocks of 64 positions.
//
// A block of a sequence lies at an address of its own: [n_layer, 2 (keys, values), n_head_kv, 64, head_dim] in the cache's type.
#include "heads.cuh"
#include "q8.cuh"

#define KV_BLOCK 64
// Heads and values that one block of threads holds at once.
#define MAX_HEADS 16
#define MAX_VALUES 2048

// Reads 8 neighbouring values of a row, and says how many bytes a head's 64 rows have.
struct KvF32 {
    static DEVICE_MEMBER u64 bytes(u32 head_dim) { return (u64)KV_BLOCK * head_dim * 4; }
    static DEVICE_MEMBER f32 at(const u8 *tile, u32 head_dim, u32 row, u32 d) { return ((const f32 *)tile)[row * head_dim + d]; }
    static DEVICE_MEMBER void read8(f32 *to, const u8 *tile, u32 head_dim, u32 row, u32 d) {
        UNROLL for (u32 i = 0; i < 8; i++) to[i] = at(tile, head_dim, row, d + i);
    }
    static DEVICE_MEMBER void write(u8 *tile, u32 head_dim, u32 row, const f32 *from) {
        for (u32 d = thread_x() % 32; d < head_dim; d += 32) ((f32 *)tile)[row * head_dim + d] = from[d];
    }
};

struct KvF16 {
    static DEVICE_MEMBER u64 bytes(u32 head_dim) { return (u64)KV_BLOCK * head_dim * 2; }
    static DEVICE_MEMBER f32 at(const u8 *tile, u32 head_dim, u32 row, u32 d) {
        return half_to_float(((const u16 *)tile)[row * head_dim + d]);
    }
    static DEVICE_MEMBER void read8(f32 *to, const u8 *tile, u32 head_dim, u32 row, u32 d) {
        const u32x4 v = *(const u32x4 *)(tile + (row * head_dim + d) * 2);
        const u32 words[4] = {v.x, v.y, v.z, v.w};
        UNROLL for (u32 i = 0; i < 8; i++) to[i] = half_to_float((u16)(words[i / 2] >> i % 2 * 16));
    }
    static DEVICE_MEMBER void write(u8 *tile, u32 head_dim, u32 row, const f32 *from) {
        for (u32 d = thread_x() % 32; d < head_dim; d += 32) ((u16 *)tile)[row * head_dim + d] = float_to_half(from[d]);
    }
};

// 64 rows of codes, then 64 rows of a half for every 32 of them.
struct KvQ80 {
    static DEVICE_MEMBER u64 bytes(u32 head_dim) { return (u64)KV_BLOCK * (head_dim / 32) * 34; }
    static DEVICE_MEMBER f32 scale(const u8 *tile, u32 head_dim, u32 row, u32 d) {
        return half_to_float(((const u16 *)(tile + KV_BLOCK * head_dim))[row * (head_dim / 32) + d / 32]);
    }
    static DEVICE_MEMBER f32 at(const u8 *tile, u32 head_dim, u32 row, u32 d) {
        return scale(tile, head_dim, row, d) * (f32)((const i8 *)tile)[row * head_dim + d];
    }
    static DEVICE_MEMBER void read8(f32 *to, const u8 *tile, u32 head_dim, u32 row, u32 d) {
        const u32x2 v = *(const u32x2 *)(tile + row * head_dim + d);
        const f32 s = scale(tile, head_dim, row, d);
        UNROLL for (u32 i = 0; i < 8; i++) to[i] = s * (f32)(i8)((i < 4 ? v.x : v.y) >> i % 4 * 8);
    }
    static DEVICE_MEMBER void write(u8 *tile, u32 head_dim, u32 row, const f32 *from) {
        const u32 lane = thread_x() % 32;
        for (u32 g = 0; g < head_dim / 32; g++) {
            const f32 v = from[32 * g + lane];
            const u16 d = float_to_half(warp_max(fabsf(v)) / 127);
            const f32 scale = half_to_float(d), inverse = scale > 0 ? 1 / scale : 0;
            // What is not finite stays so: the scale is not.
            const f32 code = most(-127.0f, least(127.0f, rintf(v * inverse)));
            ((i8 *)tile)[row * head_dim + 32 * g + lane] = (i8)(code == code ? code : 0);
            const f32 all = warp_sum(fabsf(v));
            if (lane == 0) ((u16 *)(tile + KV_BLOCK * head_dim))[row * (head_dim / 32) + g] = all < INFINITY ? d : 0x7e00;
        }
    }
};

// Where token `block_y`'s keys and values are stored: `blocks` has addresses of all sequences' blocks, the token's sequence's from
// `tables[token]` on.
#define PLACES u8 *const *blocks, const u32 *tables, const u32 *positions, u32 n_head_kv, u32 layer

// Stores a head of keys, or from number `n_head_kv` on of values.
template <class Kv> DEVICE void kv_store(const f32 *from, u32 head, u32 head_dim, PLACES) {
    const u32 position = positions[block_y()];
    u8 *block = blocks[tables[block_y()] + position / KV_BLOCK];
    u8 *tile = block + ((u64)layer * 2 * n_head_kv + head) * Kv::bytes(head_dim);
    Kv::write(tile, head_dim, position % KV_BLOCK, from);
}

// What a block of threads finds in its part of a row's keys and values is put together by `attention_merge`.
// parts: [n_rows, n_head, n_split, 2 + head_dim]: largest score, sum of weights, weighted sum of values.
//
// rows: [n_rows], the tokens that are computed. codes, scales: the 8-bit form of out, written together with it where they are not null.
// q: [n_tokens, n_qkv] from column 0; out: [n_tokens, n_head · head_dim], written where n_split is 1. A block of threads has
// `chunk` of the heads that share a KV head, and the KV blocks split · per_split...
// Grid: rows, n_head / chunk, splits.
template <class Kv>
DEVICE void attention(f32 *out, f32 *parts, const u32 *rows, const f32 *qkv, u8 *const *blocks, const u32 *tables,
                      const u32 *positions, u32 n_qkv, u32 n_head, u32 n_head_kv, u32 head_dim, u32 layer, u32 chunk, u32 n_split, u32 per_split,
                      u32 *codes, f32x2 *scales) {
    SHARED(f32, q, MAX_VALUES);
    SHARED(f32, weights, MAX_HEADS * KV_BLOCK);
    SHARED(f32, largest, MAX_HEADS);
    SHARED(f32, sums, MAX_HEADS);
    SHARED(f32, rescale, MAX_HEADS);
    const u32 t = thread_x(), warp = t / 32, lane = t % 32, first_head = block_y() * chunk, token = rows[block_x()];
    const u32 head_kv = first_head / (n_head / n_head_kv), n_kv = positions[token] + 1;
    const u64 head_bytes = Kv::bytes(head_dim);
    const f32 scale = 1 / sqrtf((f32)head_dim);
    for (u32 i = t; i < chunk * head_dim; i += 128) q[i] = qkv[(u64)token * n_qkv + first_head * head_dim + i] * scale;
    if (t < chunk) largest[t] = -INFINITY, sums[t] = 0;

    // Threads stand side by side along a head's values; where a head is short they share out the heads.
    const u32 n_beside = most(1u, 128 / head_dim), beside = t / head_dim, d = head_dim > 128 ? t : t % head_dim;
    f32 values[2][MAX_HEADS];
    UNROLL for (u32 i = 0; i < MAX_HEADS; i++) values[0][i] = values[1][i] = 0;

    const u32 last_block = least((block_z() + 1) * per_split, (n_kv + KV_BLOCK - 1) / KV_BLOCK);
    for (u32 b = block_z() * per_split; b < last_block; b++) {
        const u8 *block = blocks[tables[token] + b];
        const u8 *keys = block + ((u64)layer * 2 * n_head_kv + head_kv) * head_bytes;
        const u8 *vals = keys + n_head_kv * head_bytes;
        const u32 n_here = least((u32)KV_BLOCK, n_kv - b * KV_BLOCK);
        barrier();
        // Scores: a thread has one position and every other head.
        const u32 p = t % KV_BLOCK;
        f32 scores[MAX_HEADS / 2];
        UNROLL for (u32 i = 0; i < MAX_HEADS / 2; i++) scores[i] = 0;
        if (p < n_here) {
            // Keys are taken 32 values at a time.
            for (u32 at = 0; at < head_dim; at += 32) {
                const u32 n_eights = least(4u, (head_dim - at) / 8);
                f32 k[4][8];
                UNROLL for (u32 e = 0; e < 4; e++)
                    if (e < n_eights) Kv::read8(k[e], keys, head_dim, p, at + 8 * e);
                UNROLL for (u32 i = 0; i < MAX_HEADS / 2; i++) {
                    const u32 h = 2 * i + t / KV_BLOCK;
                    if (h >= chunk) break;
                    UNROLL for (u32 e = 0; e < 4; e++) {
                        if (e >= n_eights) break;
                        UNROLL for (u32 j = 0; j < 8; j++) scores[i] += k[e][j] * q[h * head_dim + at + 8 * e + j];
                    }
                }
            }
        }
        UNROLL for (u32 i = 0; i < MAX_HEADS / 2; i++) {
            const u32 h = 2 * i + t / KV_BLOCK;
            if (h < chunk) weights[h * KV_BLOCK + p] = p < n_here ? scores[i] : -INFINITY;
        }
        barrier();
        // Weights relative to the largest score so far: a warp per head.
        for (u32 h = warp; h < chunk; h += 4) {
            const f32 a = weights[h * KV_BLOCK + lane], c = weights[h * KV_BLOCK + lane + 32];
            const f32 before = largest[h], now = fmaxf(before, warp_max(fmaxf(a, c)));
            const f32 wa = expf(a - now), wc = expf(c - now), sum = warp_sum(wa + wc);
            weights[h * KV_BLOCK + lane] = wa;
            weights[h * KV_BLOCK + lane + 32] = wc;
            warp_barrier();
            if (lane == 0) {
                rescale[h] = expf(before - now);
                sums[h] = sums[h] * rescale[h] + sum;
                largest[h] = now;
            }
        }
        barrier();
        UNROLL for (u32 i = 0; i < MAX_HEADS; i++) {
            const u32 h = i * n_beside + beside;
            if (h >= chunk) break;
            values[0][i] *= rescale[h];
            values[1][i] *= rescale[h];
        }
        if (beside < n_beside || head_dim > 128) {
            UNROLL for (u32 far = 0; far < 2; far++) {
                if (d + 128 * far >= head_dim) break;
                // Values of eight rows are asked for at a time, and memory answers all in the time of one. Rows past the last are that
                // one, and have no weight.
                for (u32 row = 0; row < n_here; row += 8) {
                    f32 v[8];
                    UNROLL for (u32 j = 0; j < 8; j++) v[j] = Kv::at(vals, head_dim, least(row + j, n_here - 1), d + 128 * far);
                    UNROLL for (u32 i = 0; i < MAX_HEADS; i++) {
                        const u32 h = i * n_beside + (head_dim > 128 ? 0 : beside);
                        if (h >= chunk) break;
                        UNROLL for (u32 j = 0; j < 8; j++) values[far][i] += weights[h * KV_BLOCK + row + j] * v[j];
                    }
                }
            }
        }
    }
    barrier();
    const bool has_values = head_dim > 128 || beside < n_beside;
    UNROLL for (u32 i = 0; i < MAX_HEADS; i++) {
        const u32 h = i * n_beside + (head_dim > 128 ? 0 : beside);
        if (!has_values || h >= chunk) break;
        UNROLL for (u32 far = 0; far < 2; far++) {
            const u32 at = d + 128 * far;
            if (at >= head_dim) break;
            if (n_split == 1) {
                out[((u64)token * n_head + first_head + h) * head_dim + at] = values[far][i] / sums[h];
            } else {
                f32 *part = parts + (((u64)block_x() * n_head + first_head + h) * n_split + block_z()) * (2 + head_dim);
                if (at == 0) part[0] = largest[h], part[1] = sums[h];
                part[2 + at] = values[far][i];
            }
        }
    }
    if (n_split > 1 || !codes) return;
    barrier();
    quantize_written<128>(codes, scales, out, ((u64)token * n_head + first_head) * head_dim, chunk * head_dim);
}

// kv_store: stores a step's keys and values. qkv: [n_tokens, n_qkv], keys at column `k_at`, values behind them. A warp per head.
// Grid: 2 · n_head_kv / 4, tokens.
// norm_rope_store: as `norm_rope`, and then that. Grid: (n_heads + n_head_kv) / 4, tokens.
#define ATTENTION(name, Kv)                                                                                           \
    KERNEL(kv_store_##name, 128, const f32 *qkv, u32 n_qkv, u32 k_at, u32 head_dim, PLACES) {                         \
        const u32 head = block_x() * 4 + thread_x() / 32;                                                             \
        if (head >= 2 * n_head_kv) return;                                                                            \
        qkv += (u64)block_y() * n_qkv + k_at + head * head_dim;                                                       \
        kv_store<Kv>(qkv, head, head_dim, blocks, tables, positions, n_head_kv, layer);                               \
    }                                                                                                                 \
    KERNEL(norm_rope_store_##name, 128, NORM_ROPE_ARGS, PLACES) {                                                     \
        const u32 head = block_x() * 4 + thread_x() / 32;                                                             \
        if (head >= n_heads + n_head_kv) return;                                                                      \
        x += (u64)block_y() * n_cols + head * head_dim;                                                               \
        if (head < n_heads)                                                                                           \
            norm_rope_head(x, head < n_head ? q_norm : k_norm, cosines, sines, head_dim, n_pair, neighbours, eps);    \
        if (head < n_head) return;                                                                                    \
        warp_barrier();                                                                                               \
        kv_store<Kv>(x, head - n_head, head_dim, blocks, tables, positions, n_head_kv, layer);                        \
    }                                                                                                                 \
    KERNEL(attention_##name, 128, f32 *out, f32 *parts, const u32 *rows, const f32 *qkv, u8 *const *blocks,           \
           const u32 *tables, const u32 *positions, u32 n_qkv, u32 n_head, u32 n_head_kv, u32 head_dim, u32 layer,    \
           u32 chunk, u32 n_split, u32 per_split, u32 *codes, f32x2 *scales) {                                        \
        attention<Kv>(out, parts, rows, qkv, blocks, tables, positions, n_qkv, n_head, n_head_kv, head_dim, layer,    \
                      chunk, n_split, per_split, codes, scales);                                                      \
    }
ATTENTION(f32, KvF32)
ATTENTION(f16, KvF16)
ATTENTION(q8_0, KvQ80)
#undef ATTENTION
#undef PLACES

// Parts whose values a thread of `attention_merge` asks for at once, so that it waits for memory once for all of them.
#define MERGED_AT_ONCE 16

// Puts the parts of every head of these rows together, in order; codes, scales as above. Grid: rows, n_head.
KERNEL(attention_merge, 128, f32 *out, const f32 *parts, const u32 *rows, u32 n_head, u32 head_dim, u32 n_split, u32 *codes,
       f32x2 *scales) {
    SHARED(f32, weights, 128);
    SHARED(f32, scratch, 4);
    const u32 t = thread_x(), part_size = 2 + head_dim;
    const u64 row = (u64)rows[block_x()] * n_head + block_y();
    parts += ((u64)block_x() * n_head + block_y()) * n_split * part_size;
    f32 largest = -INFINITY;
    for (u32 s = t; s < n_split; s += 128) largest = fmaxf(largest, parts[s * part_size]);
    largest = warp_max(largest);
    if (t % 32 == 0) scratch[t / 32] = largest;
    barrier();
    UNROLL for (u32 i = 0; i < 4; i++) largest = fmaxf(largest, scratch[i]);
    barrier();
    f32 sum = 0, values[2] = {0, 0};
    for (u32 first = 0; first < n_split; first += 128) {
        // A thread has the weight of a part. One beyond the row's end has none, which -1 stands for, and what it holds is not looked at:
        // other rows of a tile may have seen values there that are no numbers.
        const u32 s = least(first + t, n_split - 1);
        const f32 share = parts[s * part_size + 1];
        const bool is_there = first + t < n_split && share != 0;
        weights[t] = is_there ? expf(parts[s * part_size] - largest) : -1;
        if (is_there) sum += weights[t] * share;
        barrier();
        UNROLL for (u32 far = 0; far < 2; far++) {
            const u32 d = t + 128 * far;
            if (d >= head_dim) break;
            for (u32 i = 0; i < 128 && first + i < n_split; i += MERGED_AT_ONCE) {
                f32 v[MERGED_AT_ONCE];
                UNROLL for (u32 j = 0; j < MERGED_AT_ONCE; j++)
                    v[j] = parts[least(first + i + j, n_split - 1) * part_size + 2 + d];
                UNROLL for (u32 j = 0; j < MERGED_AT_ONCE; j++)
                    if (weights[i + j] != -1) values[far] += weights[i + j] * v[j];
            }
        }
        barrier();
    }
    sum = block_sum<128>(sum, scratch);
    UNROLL for (u32 far = 0; far < 2; far++)
        if (t + 128 * far < head_dim) out[row * head_dim + t + 128 * far] = values[far] / sum;
    if (!codes) return;
    barrier();
    quantize_written<128>(codes, scales, out, row * head_dim, head_dim);
}
#undef MERGED_AT_ONCE
#undef MAX_VALUES
#undef MAX_HEADS
#undef KV_BLOCK
