// The rows of a matrix product: all tokens with one matrix, or each token's slots with its experts' matrices.
#pragma once

#include "prims.cuh"

// A tile of a grouped product: `n` of the sorted slots from `first` on, all of one expert.
struct Tile {
    u32 expert, first, n, _;
};

// What a block of a product's grid works on: a matrix and some rows of its input.
struct Work {
    u32 expert, first, n;
    const u32 *order;
    // The `i`-th row of the output.
    DEVICE_MEMBER u32 slot(u32 i) const { return order ? order[first + i] : first + i; }
};

// The tile `index`. `tiles` is null where there is one matrix, or where every slot is a tile of its own and `ids` has its expert.
DEVICE Work work_of(const Tile *tiles, const u32 *order, const u32 *ids, u32 index, u32 tile, u32 n_slots) {
    if (tiles) return Work{tiles[index].expert, tiles[index].first, tiles[index].n, order};
    if (ids) return Work{ids[index], index, 1, 0};
    return Work{0, index * tile, least(tile, n_slots - index * tile), 0};
}
