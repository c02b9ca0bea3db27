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

// sums[r][i] = w[r] · x[row i], each w[r] a row of weights that begins with block `block[r]`; x: codes [.., n_cols] and scales
// [.., n_cols / 32]. `lanes` lanes of a warp, a power of two, have R rows of weights between them, for which they read x once; all 32
// take part, and every lane gets the sums.
template <class Q, u32 T, u32 R>
DEVICE void dot_rows(f32 (&sums)[R][T], const Planes (&w)[R], const u64 (&block)[R], const u32 *codes, const f32x2 *scales,
                     const Inputs<T> &x, u32 n_cols, u32 lanes) {
    // Units of a type in blocks of 256 are whole, and its halves as far apart as those of the first.
    const bool is_whole = Q::BLOCK == 256;
    const u32 apart = is_whole ? Q::column(0, 1) : 32;
    UNROLL for (u32 i = 0; i < R * T; i++) sums[i / T][i % T] = 0;
    for (u32 unit = thread_x() % lanes; unit < (n_cols + 63) / 64; unit += lanes) {
        Sub s[R][2];
        UNROLL for (u32 r = 0; r < R; r++) Q::load(w[r], block[r], unit, n_cols, s[r]);
        UNROLL for (u32 i = 0; i < T; i++) {
            if (T > 1 && i >= x.n) break;
            const u64 group = x.row[i] * (n_cols / 32) + Q::column(unit, 0) / 32;
            const u32x4 *const at = (const u32x4 *)codes + 2 * group;
            UNROLL for (u32 h = 0; h < 2; h++) {
                if (!is_whole && h == 1 && 64 * unit + 32 >= n_cols) break;
                const u32x4 low = at[h * (apart / 16)], high = at[h * (apart / 16) + 1];
                const f32x2 scale = scales[group + h * (apart / 32)];
                UNROLL for (u32 r = 0; r < R; r++) {
                    const Sub &sub = s[r][h];
                    const u32 *c = sub.codes;
                    i32 dot = dp4a(c[0], low.x, dp4a(c[1], low.y, dp4a(c[2], low.z, dp4a(c[3], low.w, 0))));
                    f32 product;
                    if (Q::HALVES) {
                        product = sub.scale[0] * (f32)dot;
                        dot = dp4a(c[4], high.x, dp4a(c[5], high.y, dp4a(c[6], high.z, dp4a(c[7], high.w, 0))));
                        product += sub.scale[1] * (f32)dot;
                    } else {
                        dot = dp4a(c[4], high.x, dp4a(c[5], high.y, dp4a(c[6], high.z, dp4a(c[7], high.w, dot))));
                        product = sub.scale[0] * (f32)dot;
                    }
                    sums[r][i] += scale.x * product - sub.min * scale.y;
                }
            }
        }
    }
    UNROLL for (u32 i = 0; i < T; i++) {
        if (T > 1 && i >= x.n) break;
        UNROLL for (u32 mask = 16; mask > 0; mask /= 2) {
            UNROLL for (u32 r = 0; r < R; r++) {
                // Asked for where it is not used, so that there is no branch.
                const f32 other = shuffle_xor(sums[r][i], mask);
                if (mask < lanes) sums[r][i] += other;
            }
        }
    }
}
