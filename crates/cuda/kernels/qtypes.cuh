// Weights as they lie on the device, and their 8-bit activations.
//
// At upload the blocks of a GGUF tensor are taken apart into planes (all blocks' codes, then all their scales, …), so that threads
// read whole aligned words; nothing is added or lost. A matrix product takes a row apart into units of 64 weights, two
// sub-blocks of 32 whose codes share bytes. Formats: GGUF's specification, ggml's block types.
#pragma once

#include "prims.cuh"

// Planes of a weight tensor.
struct Planes {
    const u8 *p0, *p1, *p2, *p3;
};

#define PLANES_OF(w) const u8 *w##0, const u8 *w##1, const u8 *w##2, const u8 *w##3
#define PLANES PLANES_OF(w)
#define PLANES_OF_ARGS Planes{w0, w1, w2, w3}

// 32 weights: number i is worth `scale[i / 16] · code i − min`.
struct Sub {
    // Signed bytes, in order.
    u32 codes[8];
    f32 scale[2];
    f32 min;
};

DEVICE u32x4 load16(const u8 *p) { return *(const u32x4 *)p; }
DEVICE u16 load2(const u8 *p) { return *(const u16 *)p; }

DEVICE void words_of(u32 *to, const u8 *p) {
    u32x4 v = load16(p);
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}

// Scales and mins of the two sub-blocks of unit `u` of a K-quant with 6-bit scales, whose 16 bytes are `meta`.
DEVICE void k_scales(const u32x4 &meta, u32 u, Sub (&s)[2]) {
    // Twelve bytes of scales: 0..4 and 4..8 hold the low six bits of scales and mins 0..4; the rest of 4..8 is spread over 8..12
    // and the top two bits of the others. A unit's two are neighbours, and taken out together.
    const u32 shift = u % 2 * 16, low_s = meta.y >> shift, low_m = meta.z >> shift, high = meta.w >> shift;
    const u32 scales = u < 2 ? low_s & 0x3f3f : (high & 0x0f0f) | (low_s >> 2 & 0x3030);
    const u32 mins = u < 2 ? low_m & 0x3f3f : (high >> 4 & 0x0f0f) | (low_m >> 2 & 0x3030);
    const f32 d = half_to_float((u16)meta.x), d_min = half_to_float((u16)(meta.x >> 16));
    UNROLL for (u32 h = 0; h < 2; h++) {
        s[h].scale[0] = s[h].scale[1] = d * (f32)(scales >> 8 * h & 255);
        s[h].min = d_min * (f32)(mins >> 8 * h & 255);
    }
}

// Planes: 128 bytes of codes, 16 of scales.
struct Q4K {
    // GGUF's number of the type.
    static const u32 TYPE = 12;
    static const u32 BLOCK = 256;
    // Whether the halves of a sub-block have scales of their own.
    static const bool HALVES = false;
    // Whether a sub-block may have a min.
    static const bool MINS = true;
    static DEVICE_MEMBER u32 column(u32 unit, u32 half) { return 64 * unit + 32 * half; }
    static DEVICE_MEMBER void load(const Planes &w, u64 block, u32 unit, u32, Sub (&s)[2]) {
        block += unit / 4;
        u32 q[8];
        words_of(q, w.p0 + block * 128 + unit % 4 * 32);
        words_of(q + 4, w.p0 + block * 128 + unit % 4 * 32 + 16);
        const u32x4 meta = load16(w.p1 + block * 16);
        UNROLL for (int h = 0; h < 2; h++) {
            UNROLL for (int i = 0; i < 8; i++) s[h].codes[i] = q[i] >> 4 * h & 0x0f0f0f0fu;
        }
        k_scales(meta, unit % 4, s);
    }
};

// Planes: 128 bytes of low bits, 16 of scales, 32 of fifth bits.
struct Q5K {
    static const u32 TYPE = 13;
    static const u32 BLOCK = 256;
    static const bool HALVES = false;
    static const bool MINS = true;
    static DEVICE_MEMBER u32 column(u32 unit, u32 half) { return 64 * unit + 32 * half; }
    static DEVICE_MEMBER void load(const Planes &w, u64 block, u32 unit, u32, Sub (&s)[2]) {
        block += unit / 4;
        u32 q[8], fifth[8];
        words_of(q, w.p0 + block * 128 + unit % 4 * 32);
        words_of(q + 4, w.p0 + block * 128 + unit % 4 * 32 + 16);
        words_of(fifth, w.p2 + block * 32);
        words_of(fifth + 4, w.p2 + block * 32 + 16);
        const u32x4 meta = load16(w.p1 + block * 16);
        UNROLL for (int h = 0; h < 2; h++) {
            const u32 bit = unit % 4 * 2 + h;
            UNROLL for (int i = 0; i < 8; i++)
                s[h].codes[i] = (q[i] >> 4 * h & 0x0f0f0f0fu) | (fifth[i] >> bit & 0x01010101u) << 4;
        }
        k_scales(meta, unit % 4, s);
    }
};

// Planes: 128 bytes of low bits, 16 of scales, 64 of high bits, 2 of the block's scale.
struct Q6K {
    static const u32 TYPE = 14;
    static const u32 BLOCK = 256;
    static const bool HALVES = true;
    static const bool MINS = false;
    // Sub-blocks that share bytes are 64 columns apart.
    static DEVICE_MEMBER u32 column(u32 unit, u32 half) { return unit / 2 * 128 + unit % 2 * 32 + 64 * half; }
    static DEVICE_MEMBER void load(const Planes &w, u64 block, u32 unit, u32, Sub (&s)[2]) {
        block += unit / 4;
        const u32 at = unit % 4 / 2, v = unit % 2;
        u32 low[8], high[8];
        words_of(low, w.p0 + block * 128 + at * 64 + v * 32);
        words_of(low + 4, w.p0 + block * 128 + at * 64 + v * 32 + 16);
        words_of(high, w.p2 + block * 64 + at * 32);
        words_of(high + 4, w.p2 + block * 64 + at * 32 + 16);
        const f32 d = half_to_float(load2(w.p3 + block * 2));
        // Those of both sub-blocks in one word each, of which `v` has a half.
        const u32x2 scales = *(const u32x2 *)(w.p1 + block * 16 + 8 * at);
        UNROLL for (int h = 0; h < 2; h++) {
            const u32 shift = 2 * v + 4 * h;
            UNROLL for (int i = 0; i < 8; i++) {
                const u32 code = (low[i] >> 4 * h & 0x0f0f0f0fu) | (high[i] >> shift & 0x03030303u) << 4;
                s[h].codes[i] = sub_bytes(code, 0x20202020u);
            }
            const u32 two = (h ? scales.y : scales.x) >> 16 * v;
            s[h].scale[0] = d * (f32)(i8)two;
            s[h].scale[1] = d * (f32)(i8)(two >> 8);
            s[h].min = 0;
        }
    }
};

// Sub-blocks of a type whose blocks are 32 weights; a row may end with half a unit.
template <class Q> struct Of32 {
    static const u32 BLOCK = 32;
    static const bool HALVES = false;
    static DEVICE_MEMBER u32 column(u32 unit, u32 half) { return 64 * unit + 32 * half; }
    static DEVICE_MEMBER void load(const Planes &w, u64 block, u32 unit, u32 n_cols, Sub (&s)[2]) {
        Q::sub(w, block + 2 * unit, s[0]);
        if (64 * unit + 32 < n_cols) {
            Q::sub(w, block + 2 * unit + 1, s[1]);
        } else {
            UNROLL for (int i = 0; i < 8; i++) s[1].codes[i] = 0;
            s[1].scale[0] = s[1].scale[1] = s[1].min = 0;
        }
    }
};

// Codes of 4 bits: the low halves of 16 bytes are the first 16 weights.
DEVICE void nibbles(u32 *codes, const u8 *p) {
    u32 q[4];
    words_of(q, p);
    UNROLL for (int i = 0; i < 4; i++) {
        codes[i] = q[i] & 0x0f0f0f0fu;
        codes[i + 4] = q[i] >> 4 & 0x0f0f0f0fu;
    }
}

// A bit for each of 32 weights, as bytes of 16 or 0.
DEVICE void fifth_bits(u32 *codes, const u8 *p) {
    const u32 all = *(const u32 *)p;
    // A product with bits 0, 7, 14 and 21 puts bit i of four in place 8 i; no two meet.
    UNROLL for (int i = 0; i < 8; i++) codes[i] |= ((all >> 4 * i & 15) * 0x00204081u & 0x01010101u) << 4;
}

// Planes: 32 bytes of codes, 2 of scale.
struct Q80 : Of32<Q80> {
    static const u32 TYPE = 8;
    static const bool MINS = false;
    static DEVICE_MEMBER void sub(const Planes &w, u64 block, Sub &s) {
        words_of(s.codes, w.p0 + block * 32);
        words_of(s.codes + 4, w.p0 + block * 32 + 16);
        s.scale[0] = s.scale[1] = half_to_float(load2(w.p1 + block * 2));
        s.min = 0;
    }
};

// Planes: 16 bytes of codes or their low bits; 2 of scale, with `mins` 2 more of what is added; with `fifths` 4 of fifth bits. Without
// `mins` the middle code is zero.
template <bool fifths, bool mins> struct Small : Of32<Small<fifths, mins>> {
    static const u32 TYPE = (fifths ? 6 : 2) + mins;
    static const bool MINS = mins;
    static DEVICE_MEMBER void sub(const Planes &w, u64 block, Sub &s) {
        nibbles(s.codes, w.p0 + block * 16);
        if (fifths) fifth_bits(s.codes, w.p2 + block * 4);
        const u32 middle = fifths ? 0x10101010u : 0x08080808u;
        if (!mins) UNROLL for (int i = 0; i < 8; i++) s.codes[i] = sub_bytes(s.codes[i], middle);
        const u8 *scale = w.p1 + block * (mins ? 4 : 2);
        s.scale[0] = s.scale[1] = half_to_float(load2(scale));
        s.min = mins ? -half_to_float(load2(scale + 2)) : 0;
    }
};
typedef Small<false, false> Q40;
typedef Small<false, true> Q41;
typedef Small<true, false> Q50;
typedef Small<true, true> Q51;

// Weights of a float type: one, and the four from number 4 i on.
struct F32 {
    static DEVICE_MEMBER f32 at(const u8 *p, u64 i) { return ((const f32 *)p)[i]; }
    static DEVICE_MEMBER f32x4 four(const u8 *p, u64 i) { return ((const f32x4 *)p)[i]; }
};
struct F16 {
    static DEVICE_MEMBER f32 at(const u8 *p, u64 i) { return half_to_float(((const u16 *)p)[i]); }
    static DEVICE_MEMBER f32x4 four(const u8 *p, u64 i) {
        const u32x2 v = ((const u32x2 *)p)[i];
        return f32x4{half_to_float((u16)v.x), half_to_float((u16)(v.x >> 16)), half_to_float((u16)v.y),
                     half_to_float((u16)(v.y >> 16))};
    }
};
struct BF16 {
    static DEVICE_MEMBER f32 at(const u8 *p, u64 i) { return from_bits((u32)((const u16 *)p)[i] << 16); }
    static DEVICE_MEMBER f32x4 four(const u8 *p, u64 i) {
        const u32x2 v = ((const u32x2 *)p)[i];
        return f32x4{from_bits(v.x << 16), from_bits(v.x & 0xffff0000u), from_bits(v.y << 16), from_bits(v.y & 0xffff0000u)};
    }
};

// Every quantized type: its name in kernels, its struct.
#define FOR_QUANTIZED_256(DO) DO(q4_k, Q4K) DO(q5_k, Q5K) DO(q6_k, Q6K)
#define FOR_QUANTIZED_32(DO) DO(q8_0, Q80) DO(q4_0, Q40) DO(q4_1, Q41) DO(q5_0, Q50) DO(q5_1, Q51)
#define FOR_QUANTIZED(DO) FOR_QUANTIZED_256(DO) FOR_QUANTIZED_32(DO)
#define FOR_FLOATS(DO) DO(f32, F32) DO(f16, F16) DO(bf16, BF16)

// Code `i` of a sub-block as a float.
DEVICE f32 weight_of(const Sub &s, u32 i) {
    return s.scale[i / 16] * (f32)(i8)(s.codes[i / 4] >> i % 4 * 8) - s.min;
}
