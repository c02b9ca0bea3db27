// Ops on rows of floats: embedding, sums and products element by element, rows kept, and the 8-bit form of activations.
#include "q8.cuh"
#include "qtypes.cuh"

// Takes one plane out of GGUF blocks: `length` bytes at `offset` of each block of `block_bytes`, all even.
KERNEL(take_plane, 256, u16 *to, const u16 *from, u32 block_bytes, u32 offset, u32 length, u32 n_blocks) {
    const u64 i = (u64)block_x() * 256 + thread_x(), per_block = length / 2;
    if (i >= per_block * n_blocks) return;
    to[i] = from[i / per_block * (block_bytes / 2) + offset / 2 + i % per_block];
}

// out: [n_tokens, n_cols], token t is row `tokens[t]` of the table. Grid: tokens.
template <class Q> DEVICE void embed_quantized(f32 *out, const Planes &w, const u32 *tokens, u32 n_cols) {
    const u64 block = (u64)tokens[block_x()] * (n_cols / Q::BLOCK);
    out += (u64)block_x() * n_cols;
    for (u32 unit = thread_x(); unit < (n_cols + 63) / 64; unit += 128) {
        Sub s[2];
        Q::load(w, block, unit, n_cols, s);
        UNROLL for (int h = 0; h < 2; h++) {
            const u32 column = Q::column(unit, h);
            if (column >= n_cols) break;
            UNROLL for (u32 i = 0; i < 32; i++) out[column + i] = weight_of(s[h], i);
        }
    }
}

template <class F> DEVICE void embed_float(f32 *out, const u8 *w, const u32 *tokens, u32 n_cols) {
    const u64 row = (u64)tokens[block_x()] * n_cols;
    for (u32 i = thread_x(); i < n_cols; i += 128) out[(u64)block_x() * n_cols + i] = F::at(w, row + i);
}

#define EMBED(name, Q)                                                                                                \
    KERNEL(embed_##name, 128, f32 *out, PLANES, const u32 *tokens, u32 n_cols) {                                      \
        embed_quantized<Q>(out, PLANES_OF_ARGS, tokens, n_cols);                                                      \
    }
FOR_QUANTIZED(EMBED)
#undef EMBED
#define EMBED(name, F)                                                                                                \
    KERNEL(embed_##name, 128, f32 *out, PLANES, const u32 *tokens, u32 n_cols) {                                      \
        embed_float<F>(out, w0, tokens, n_cols);                                                                      \
    }
FOR_FLOATS(EMBED)
#undef EMBED

// x += y over n values.
KERNEL(add, 256, f32 *x, const f32 *y, u32 n) {
    const u32 i = block_x() * 256 + thread_x();
    if (i < n) x[i] += y[i];
}

// x *= y over n values.
KERNEL(mul, 256, f32 *x, const f32 *y, u32 n) {
    const u32 i = block_x() * 256 + thread_x();
    if (i < n) x[i] *= y[i];
}

// x = x · sigmoid(x) over n values.
KERNEL(silu, 256, f32 *x, u32 n) {
    const u32 i = block_x() * 256 + thread_x();
    if (i < n) x[i] = x[i] / (1 + expf(-x[i]));
}

// gate = silu(gate) · up over n values.
KERNEL(swiglu, 256, f32 *gate, const f32 *up, u32 n) {
    const u32 i = block_x() * 256 + thread_x();
    if (i < n) gate[i] = gate[i] / (1 + expf(-gate[i])) * up[i];
}

// to = from over n values.
KERNEL(copy, 256, f32 *to, const f32 *from, u32 n) {
    const u32 i = block_x() * 256 + thread_x();
    if (i < n) to[i] = from[i];
}

// x[:, at..at + n_bias] += bias; x: [n_tokens, n_cols]. Grid: parts of a row, tokens.
KERNEL(add_bias, 256, f32 *x, const f32 *bias, u32 n_cols, u32 at, u32 n_bias) {
    const u32 i = block_x() * 256 + thread_x();
    if (i < n_bias) x[(u64)block_y() * n_cols + at + i] += bias[i];
}

// out[t] = Σ_s weights[t, s] x[t, s], in order of slots, and where `sum` is not null that is added to it too;
// x: [n_tokens, n_slots, n_cols]. Grid: parts of a row, tokens.
KERNEL(weighted_sum, 256, f32 *out, const f32 *x, const f32 *weights, u32 n_slots, u32 n_cols, f32 *sum) {
    const u32 i = block_x() * 256 + thread_x();
    if (i >= n_cols) return;
    f32 all = 0;
    for (u32 s = 0; s < n_slots; s++) {
        const u64 part = (u64)block_y() * n_slots + s;
        all += weights[part] * x[part * n_cols + i];
    }
    const u64 to = (u64)block_y() * n_cols + i;
    out[to] = all;
    if (sum) sum[to] += all;
}

// to[t] = from[rows[t]]; [n_tokens, n_cols]. Grid: parts of a row, tokens.
KERNEL(gather_rows, 256, f32 *to, const f32 *from, const u32 *rows, u32 n_cols) {
    const u32 i = block_x() * 256 + thread_x();
    if (i < n_cols) to[(u64)block_y() * n_cols + i] = from[(u64)rows[block_y()] * n_cols + i];
}

// The 8-bit form of n values.
KERNEL(quantize, 256, u32 *codes, f32x2 *scales, const f32x4 *x, u32 n) {
    const u32 i = block_x() * 256 + thread_x();
    const bool there = i < n / 4;
    quantize_four(codes, scales, there ? x[i] : f32x4{0, 0, 0, 0}, i, there);
}

// gate = silu(gate) · up over n values, and its 8-bit form.
KERNEL(swiglu_q8, 256, f32x4 *gate, const f32x4 *up, u32 *codes, f32x2 *scales, u32 n) {
    const u32 i = block_x() * 256 + thread_x();
    const bool there = i < n / 4;
    f32x4 v = {0, 0, 0, 0};
    if (there) {
        const f32x4 g = gate[i], u = up[i];
        v = f32x4{g.x / (1 + expf(-g.x)) * u.x, g.y / (1 + expf(-g.y)) * u.y, g.z / (1 + expf(-g.z)) * u.z,
                  g.w / (1 + expf(-g.w)) * u.w};
        gate[i] = v;
    }
    quantize_four(codes, scales, v, i, there);
}
