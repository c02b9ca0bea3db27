// Products of rows of quantized weights with a few rows of activations: decode. Bound by reading the weights, each of which is read
// once per tile of rows.
#pragma once

#include "qtypes.cuh"
#include "tiles.cuh"

// The input rows of a tile's slots, `x_div` slots to a row; past the last it is that one.
template <u32 T> struct Inputs {
    u64 row[T];
    u32 n;
    DEVICE_MEMBER Inputs(const Work &work, u32 x_div) : n(work.n) {
        UNROLL for (u32 i = 0; i < T; i++) row[i] = work.slot(least(i, work.n - 1)) / x_div;
    }
};

// sums[i] = w · x[row i], w a row of weights that begins with block `block`; x: codes [.., n_cols] and scales [.., n_cols / 32].
// `lanes` lanes of a warp, a power of two, have a row of w between them; all 32 take part, and every lane gets the sums.
template <class Q, u32 T>
DEVICE void dot_rows(f32 (&sums)[T], const Planes &w, u64 block, const u32 *codes, const f32x2 *scales, const Inputs<T> &x, u32 n_cols,
                     u32 lanes) {
    UNROLL for (u32 i = 0; i < T; i++) sums[i] = 0;
    for (u32 unit = thread_x() % lanes; unit < (n_cols + 63) / 64; unit += lanes) {
        Sub s[2];
        Q::load(w, block, unit, n_cols, s);
        UNROLL for (int h = 0; h < 2; h++) {
            const u32 column = Q::column(unit, h);
            if (column >= n_cols) break;
            UNROLL for (u32 i = 0; i < T; i++) {
                if (i >= x.n) break;
                const u32x4 *at = (const u32x4 *)(codes + (x.row[i] * n_cols + column) / 4);
                const u32x4 low = at[0], high = at[1];
                const f32x2 scale = scales[x.row[i] * (n_cols / 32) + column / 32];
                const u32 *c = s[h].codes;
                i32 dot = dp4a(c[0], low.x, dp4a(c[1], low.y, dp4a(c[2], low.z, dp4a(c[3], low.w, 0))));
                f32 product;
                if (Q::HALVES) {
                    product = s[h].scale[0] * (f32)dot;
                    dot = dp4a(c[4], high.x, dp4a(c[5], high.y, dp4a(c[6], high.z, dp4a(c[7], high.w, 0))));
                    product += s[h].scale[1] * (f32)dot;
                } else {
                    dot = dp4a(c[4], high.x, dp4a(c[5], high.y, dp4a(c[6], high.z, dp4a(c[7], high.w, dot))));
                    product = s[h].scale[0] * (f32)dot;
                }
                sums[i] += scale.x * product - s[h].min * scale.y;
            }
        }
    }
    UNROLL for (u32 i = 0; i < T; i++) {
        if (i >= x.n) break;
        for (u32 mask = lanes / 2; mask > 0; mask /= 2) sums[i] += shuffle_xor(sums[i], mask);
    }
}
