// The best values of rows: larger ones above, lower indices above among equals, what is not a number or positive infinity on top.
#include "prims.cuh"

// Columns of a row that a block looks through. Eight neighbours in each 256 of them are a group.
const u32 PART = 2048, GROUPS = 32;
// Places that the block has room for, which takes what is left of a row.
const u32 N_FOUND = 1024;

// The order of floats as that of integers, none of which is 0; both zeros are one.
DEVICE u32 rank_of(f32 v) {
    const u32 b = bits(v == 0 ? 0.0f : v);
    return !(v < INFINITY) ? 0xffffffffu : b >> 31 ? ~b : b | 0x80000000u;
}

// A value's place among all of a row; no two are equal. The low half is the index, inverted.
DEVICE u64 place_of(f32 v, u32 index) { return (u64)rank_of(v) << 32 | (~index & 0xffffffffu); }

DEVICE u64 warp_most(u64 v) {
    UNROLL for (int mask = 16; mask > 0; mask /= 2)
        v = most(v, (u64)shuffle_xor((u32)(v >> 32), mask) << 32 | shuffle_xor((u32)v, mask));
    return v;
}

DEVICE u64 block_most(u64 v, u32x2 *scratch) {
    v = warp_most(v);
    barrier();
    if (thread_x() % 32 == 0) scratch[thread_x() / 32] = u32x2{(u32)v, (u32)(v >> 32)};
    barrier();
    for (u32 i = 0; i < 8; i++) v = most(v, (u64)scratch[i].y << 32 | scratch[i].x);
    return v;
}

// to[row]: index and value of the best of n_cols values; parts: room for as many as the grid has blocks, counters: zeros, one per row.
// Grid: parts of a row, rows.
KERNEL(best_one, 256, u32x2 *to, u32x2 *parts, u32 *counters, const f32 *x, u32 n_cols) {
    SHARED(u32x2, scratch, 8);
    x += (u64)block_y() * n_cols;
    parts += block_y() * grid_x();
    u64 best = 0;
    for (u32 i = block_x() * 256 + thread_x(); i < n_cols; i += grid_x() * 256) best = most(best, place_of(x[i], i));
    best = block_most(best, scratch);
    if (thread_x() == 0) parts[block_x()] = u32x2{(u32)best, (u32)(best >> 32)};
    if (!is_last_block(counters + block_y(), grid_x())) return;
    best = 0;
    for (u32 i = thread_x(); i < grid_x(); i += 256) best = most(best, (u64)parts[i].y << 32 | parts[i].x);
    best = block_most(best, scratch);
    if (thread_x() == 0) to[block_y()] = u32x2{~(u32)best, bits(x[~(u32)best])};
}

// The best ranks of groups, as places that have no index yet.
struct Tops {
    const u32 *tops;
    DEVICE_MEMBER u64 at(u32 i) const { return (u64)tops[i] << 32; }
};

// The places of a row's values.
struct Places {
    const f32 *x;
    DEVICE_MEMBER u64 at(u32 i) const { return place_of(x[i], i); }
};

// The largest number, of multiples of `step`, that at least k of n places reach; 0 where there are fewer. `scratch` is shared.
template <class P> DEVICE u64 floor_of(const P &places, u32 n, u32 k, u64 step, u32 *scratch) {
    u64 floor = 0;
    for (u64 bit = 1ull << 63; bit >= step; bit /= 2) {
        u32 count = 0;
        for (u32 i = thread_x(); i < n; i += 256) count += places.at(i) >= (floor | bit);
        UNROLL for (int mask = 16; mask > 0; mask /= 2) count += shuffle_xor(count, mask);
        if (thread_x() % 32 == 0) scratch[thread_x() / 32] = count;
        barrier();
        count = 0;
        for (u32 i = 0; i < 8; i++) count += scratch[i];
        barrier();
        if (count >= k) floor |= bit;
    }
    return floor;
}

// Puts the places from `floor` on in `found`, as far as there is room, in any order, and gives their number. Eight lanes look through
// each group that has any. `found` and `n_found` are shared.
DEVICE u32 find(u64 *found, u32 *n_found, const f32 *x, u32 n_cols, const u32 *tops, u32 n_groups, u64 floor) {
    barrier();
    if (thread_x() == 0) n_found[0] = 0;
    barrier();
    for (u32 g = thread_x() / 8; g < n_groups; g += 32) {
        if (tops[g] < (u32)(floor >> 32)) continue;
        const u32 first = g / GROUPS * PART + g % GROUPS * 8 + thread_x() % 8;
        UNROLL for (u32 i = first; i < first + PART; i += 256) {
            const u64 place = i < n_cols ? place_of(x[i], i) : 0;
            if (i >= n_cols || place < floor) continue;
            const u32 at = add_shared(n_found, 1);
            if (at < N_FOUND) found[at] = place;
        }
    }
    barrier();
    return n_found[0];
}

// to[row]: index and value of the k best of n_cols values, best first, k being at most n_cols and N_FOUND; tops: room for GROUPS as
// often as the grid has blocks, counters: zeros, one per row. Grid: parts of a row, rows.
//
// Of the groups that are left once k of them have a better value, none has one of the k best: what the others have from there on is
// hardly more than k, and is ranked by counting. A row where it is much more, being of many equals or of few groups, is searched for the
// place that k of them reach.
KERNEL(best, 256, u32x2 *to, u32 *tops, u32 *counters, const f32 *x, u32 n_cols, u32 k) {
    SHARED(u32, scratch, 8);
    SHARED(u32, n_found, 1);
    SHARED(u64, found, N_FOUND);
    const u32 n_groups = grid_x() * GROUPS;
    to += block_y() * k;
    tops += block_y() * n_groups;
    x += (u64)block_y() * n_cols;
    u32 top = 0;
    UNROLL for (u32 i = 0; i < PART; i += 256) {
        const u32 column = block_x() * PART + i + thread_x();
        if (column < n_cols) top = most(top, rank_of(x[column]));
    }
    UNROLL for (int mask = 4; mask > 0; mask /= 2) top = most(top, shuffle_xor(top, mask));
    if (thread_x() % 8 == 0) tops[block_x() * GROUPS + thread_x() / 8] = top;
    if (!is_last_block(counters + block_y(), grid_x())) return;
    u64 floor = floor_of(Tops{tops}, n_groups, k, 1ull << 32, scratch);
    u32 n = find(found, n_found, x, n_cols, tops, n_groups, floor);
    if (n > N_FOUND) {
        floor = floor_of(Places{x}, n_cols, k, 1, scratch);
        n = find(found, n_found, x, n_cols, tops, n_groups, floor);
    }
    for (u32 i = thread_x(); i < n; i += 256) {
        const u64 place = found[i];
        u32 n_better = 0;
        for (u32 j = 0; j < n; j++) n_better += found[j] > place;
        if (n_better < k) to[n_better] = u32x2{~(u32)place, bits(x[~(u32)place])};
    }
}
