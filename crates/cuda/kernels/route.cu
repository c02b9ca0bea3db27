// Routing: which experts a token goes to, and which tokens an expert gets.
#include "route.cuh"
#include "tiles.cuh"

// As `route_token`; logits: [n_tokens, n_expert], ids, weights: [n_tokens, k]; a warp per token. Grid: tokens / 4.
KERNEL(route, 128, u32 *ids, f32 *weights, const f32 *logits, u32 n_tokens, u32 n_expert, u32 k) {
    const u32 token = block_x() * 4 + thread_x() / 32;
    if (token < n_tokens) route_token(ids, weights, logits, token, n_expert, k);
}

// Sets of 32 slots whose ids a warp of `group_by_expert` asks for at once.
#define AT_ONCE 8
// Numbers that all its warps count with.
#define COUNTS 8192

// Counts the experts of a warp's part of the slots, and puts each slot where the count stands. order: null, or where expert 0's
// go; firsts: where in it the others' begin.
DEVICE void count_slots(u32 *counts, u32 *order, const u32 *firsts, const u32 *ids, u32 first, u32 end) {
    const u32 lane = thread_x() % 32, none = 0xffffffffu;
    for (u32 at = first; at < end; at += 32 * AT_ONCE) {
        u32 id[AT_ONCE];
        UNROLL for (u32 i = 0; i < AT_ONCE; i++) id[i] = at + 32 * i + lane < end ? ids[at + 32 * i + lane] : none;
        UNROLL for (u32 i = 0; i < AT_ONCE; i++) {
            const bool is_slot = id[i] != none;
            const u32 alike = lanes_alike(id[i]), before = alike & ((1u << lane) - 1);
            const u32 count = is_slot ? counts[id[i]] : 0;
            warp_barrier();
            if (is_slot && before == 0) counts[id[i]] = count + count_bits(alike);
            warp_barrier();
            if (is_slot && order) order[firsts[id[i]] + count + count_bits(before)] = at + 32 * i + lane;
        }
    }
}

// Sorts the slots (token · k + slot) by expert and cuts every expert's into tiles of at most `tile`. order: [n_slots];
// tiles: [n_tiles_max]; those past the last have n = 0. Slots of an expert stay in order: every warp has a part of the slots, and puts
// an expert's behind those of the warps before. At most 1024 experts. One block.
KERNEL(group_by_expert, 1024, u32 *order, Tile *tiles, const u32 *ids, u32 n_slots, u32 n_expert, u32 tile, u32 n_tiles_max) {
    SHARED(u32, counts, COUNTS);
    // Sums over the experts before, of slots and of tiles.
    SHARED(u32, firsts, 1025);
    SHARED(u32, tile_firsts, 1025);
    const u32 t = thread_x(), warp = t / 32;
    const u32 n_parts = least(32u, COUNTS / n_expert), per_part = ((n_slots + n_parts - 1) / n_parts + 31) / 32 * 32;
    const u32 first = least(warp * per_part, n_slots), end = warp < n_parts ? least(first + per_part, n_slots) : first;
    u32 *own = counts + warp * n_expert;
    for (u32 i = t; i < n_parts * n_expert; i += 1024) counts[i] = 0;
    barrier();
    count_slots(own, 0, 0, ids, first, end);
    barrier();
    u32 n = 0;
    for (u32 part = 0; part < n_parts && t < n_expert; part++) {
        const u32 here = counts[part * n_expert + t];
        counts[part * n_expert + t] = n;
        n += here;
    }
    firsts[t + 1] = n;
    tile_firsts[t + 1] = (n + tile - 1) / tile;
    if (t == 0) firsts[0] = tile_firsts[0] = 0;
    barrier();
    for (u32 step = 1; step < n_expert; step *= 2) {
        const u32 slots = t >= step ? firsts[t + 1 - step] : 0, those = t >= step ? tile_firsts[t + 1 - step] : 0;
        barrier();
        firsts[t + 1] += slots;
        tile_firsts[t + 1] += those;
        barrier();
    }
    count_slots(own, order, firsts, ids, first, end);
    for (u32 i = t; i < n_tiles_max; i += 1024) {
        // The last expert whose tiles begin at or before this one.
        u32 expert = 0, past = n_expert;
        while (past - expert > 1) {
            const u32 middle = (expert + past) / 2;
            if (tile_firsts[middle] <= i) expert = middle;
            else past = middle;
        }
        const u32 begin = firsts[expert] + (i - tile_firsts[expert]) * tile;
        const bool is_tile = i < tile_firsts[n_expert];
        tiles[i] = is_tile ? Tile{expert, begin, least(tile, firsts[expert + 1] - begin), 0} : Tile{0, 0, 0, 0};
    }
}
#undef AT_ONCE
#undef COUNTS
