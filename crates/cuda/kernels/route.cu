// Routing: which experts a token goes to, and which tokens an expert gets.
#include "tiles.cuh"

// The k largest logits of a token, lower expert first on ties, and their softmax among themselves, which is the renormalised softmax
// over all. ids, weights: [n_tokens, k]; a warp per token. Grid: tokens / 4.
KERNEL(route, 128, u32 *ids, f32 *weights, const f32 *logits, u32 n_tokens, u32 n_expert, u32 k) {
    const u32 token = block_x() * 4 + thread_x() / 32, lane = thread_x() % 32;
    if (token >= n_tokens) return;
    logits += (u64)token * n_expert;
    ids += (u64)token * k;
    weights += (u64)token * k;
    // What this lane has given already, and its best of what is left: the order of floats as the order of integers, NaN on top.
    u64 below = ~0ull;
    f32 largest = 0, sum = 0;
    for (u32 slot = 0; slot < k; slot++) {
        u64 best = 0;
        for (u32 e = lane; e < n_expert; e += 32) {
            const u32 b = bits(logits[e]);
            const u64 key = (u64)(b >> 31 ? ~b : b | 0x80000000u) << 32 | (~e & 0xffffffffu);
            if (key < below && key > best) best = key;
        }
        UNROLL for (int mask = 16; mask > 0; mask /= 2) {
            const u64 other = (u64)shuffle_xor((u32)(best >> 32), mask) << 32 | shuffle_xor((u32)best, mask);
            best = most(best, other);
        }
        below = best;
        const u32 id = ~(u32)best;
        const f32 logit = logits[id];
        if (slot == 0) largest = logit;
        const f32 weight = expf(logit - largest);
        sum += weight;
        if (lane == 0) {
            ids[slot] = id;
            weights[slot] = weight;
        }
    }
    warp_barrier();
    for (u32 slot = lane; slot < k; slot += 32) weights[slot] /= sum;
}

// Sorts the slots (token · k + slot) by expert and cuts every expert's into tiles of at most `tile`. order: [n_slots];
// tiles: [at most n_tiles_max]; those past the last have n = 0. Slots of an expert stay in order. One block.
KERNEL(group_by_expert, 1024, u32 *order, Tile *tiles, const u32 *ids, u32 n_slots, u32 n_expert, u32 tile, u32 n_tiles_max) {
    SHARED(u32, counts, 1024);
    SHARED(u32, firsts, 1024);
    SHARED(u32, tile_firsts, 1025);
    const u32 e = thread_x();
    counts[e] = 0;
    barrier();
    // A thread per expert: what it gets, counted in order, needs no atomic.
    if (e < n_expert) {
        u32 n = 0;
        for (u32 s = 0; s < n_slots; s++) n += ids[s] == e;
        counts[e] = n;
    }
    barrier();
    if (e == 0) {
        u32 at = 0, tile_at = 0;
        for (u32 i = 0; i < n_expert; i++) {
            firsts[i] = at;
            tile_firsts[i] = tile_at;
            at += counts[i];
            tile_at += (counts[i] + tile - 1) / tile;
        }
        tile_firsts[n_expert] = tile_at;
    }
    barrier();
    if (e < n_expert && counts[e] > 0) {
        u32 at = firsts[e];
        for (u32 s = 0; s < n_slots; s++)
            if (ids[s] == e) order[at++] = s;
        for (u32 i = 0; i * tile < counts[e]; i++) {
            const u32 first = i * tile;
            tiles[tile_firsts[e] + i] = Tile{e, firsts[e] + first, least(tile, counts[e] - first), 0};
        }
    }
    for (u32 i = tile_firsts[n_expert] + e; i < n_tiles_max; i += 1024) tiles[i] = Tile{0, 0, 0, 0};
}
