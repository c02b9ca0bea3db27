// A host's stand-in for a GPU: the primitives of `prims.cuh` with the meaning that NVIDIA's PTX manual gives them.
//
// The threads of a block are fibers on one host thread. A fiber runs until it waits for others: at a barrier, a shuffle or a
// matrix product. Which fiber runs next is the launch's choice (ascending, descending, shuffled), so that a kernel that lacks a
// barrier gives different results in different orders. Shared memory starts as garbage, asynchronous copies arrive when they are
// waited for and not before, and a barrier that some threads never reach ends the launch with an error.
#pragma once

#include <cmath>
#include <cstring>

#define DEVICE static inline
#define DEVICE_MEMBER
#define UNROLL
#define SHARED(type, name, n)                                                                                         \
    static char id_of_##name;                                                                                         \
    type *name = (type *)emulation::shared(&id_of_##name, sizeof(type) * (n))
#define KERNEL(name, threads, ...)                                                                                    \
    static void name(__VA_ARGS__);                                                                                    \
    static emulation::Register register_##name(#name, threads, name);                                                 \
    static void name(__VA_ARGS__)
#define KERNEL_BESIDE(name, threads, blocks, ...) KERNEL(name, threads, __VA_ARGS__)

namespace emulation {

struct Place {
    u32 thread, block[3], grid[3];
};

// Where the running thread stands.
extern thread_local Place place;

// The block's shared array of this name.
void *shared(const void *id, size_t bytes);
// Waits for the threads of the block.
void barrier();
// Waits for the lanes of the warp with `n` words of each in hand; returns those of lane 0, the others follow.
const int MAX_WORDS = 12;
const u32 (*exchange(const u32 *words, int n))[MAX_WORDS];
void copy_async(void *to, const void *from, bool there);
void copy_async_commit();
void copy_async_wait(int n);

// Arguments come as 64-bit words, `kinds` has a letter for each: p pointer, u 32-bit integer, f float.
typedef void (*Entry)(const u64 *args);

struct Kernel {
    const char *name;
    u32 threads;
    const char *kinds;
    // `f` is the kernel, which `call` knows the type of.
    void (*f)();
    void (*call)(void (*f)(), const u64 *args);
    const Kernel *next;
};

extern const Kernel *kernels;

template <class T> struct Kind;
template <class T> struct Kind<T *> {
    static constexpr char letter = 'p';
    static T *of(u64 word) { return (T *)word; }
};
template <> struct Kind<u32> {
    static constexpr char letter = 'u';
    static u32 of(u64 word) { return (u32)word; }
};
template <> struct Kind<i32> {
    static constexpr char letter = 'u';
    static i32 of(u64 word) { return (i32)(u32)word; }
};
template <> struct Kind<f32> {
    static constexpr char letter = 'f';
    static f32 of(u64 word) {
        u32 low = (u32)word;
        f32 v;
        memcpy(&v, &low, 4);
        return v;
    }
};

template <int... I> struct Indices {};
template <int n, int... I> struct Count : Count<n - 1, n - 1, I...> {};
template <int... I> struct Count<0, I...> {
    typedef Indices<I...> type;
};

template <class... A> struct Caller {
    static constexpr char kinds[] = {Kind<A>::letter..., 0};
    template <int... I> static void spread(void (*f)(A...), const u64 *args, Indices<I...>) { f(Kind<A>::of(args[I])...); }
    static void call(void (*f)(), const u64 *args) {
        spread((void (*)(A...))f, args, typename Count<sizeof...(A)>::type());
    }
};
template <class... A> constexpr char Caller<A...>::kinds[];

// Puts a kernel in the list.
struct Register {
    Kernel kernel;
    template <class... A> Register(const char *name, u32 threads, void (*f)(A...)) {
        kernel = {name, threads, Caller<A...>::kinds, (void (*)())f, Caller<A...>::call, kernels};
        kernels = &kernel;
    }
};

} // namespace emulation

DEVICE u32 thread_x() { return emulation::place.thread; }
DEVICE u32 block_x() { return emulation::place.block[0]; }
DEVICE u32 block_y() { return emulation::place.block[1]; }
DEVICE u32 block_z() { return emulation::place.block[2]; }
DEVICE u32 grid_x() { return emulation::place.grid[0]; }

DEVICE void barrier() { emulation::barrier(); }
DEVICE void warp_barrier() { emulation::exchange(nullptr, 0); }
DEVICE u32 shuffle(u32 v, u32 lane) { return emulation::exchange(&v, 1)[lane % 32][0]; }
DEVICE u32 shuffle_xor(u32 v, u32 mask) { return emulation::exchange(&v, 1)[(thread_x() ^ mask) % 32][0]; }

DEVICE u32 lanes_alike(u32 v) {
    const u32(*lanes)[emulation::MAX_WORDS] = emulation::exchange(&v, 1);
    u32 alike = 0;
    for (u32 lane = 0; lane < 32; lane++) alike |= (u32)(lanes[lane][0] == v) << lane;
    return alike;
}

DEVICE u32 count_bits(u32 v) { return (u32)__builtin_popcount(v); }

// Blocks run one after the other.
DEVICE u32 arrive(u32 *counter, u32 n) {
    const u32 before = *counter;
    *counter = before >= n - 1 ? 0 : before + 1;
    return before;
}

// Nobody else runs meanwhile.
DEVICE u32 add_shared(u32 *to, u32 v) {
    const u32 before = *to;
    *to += v;
    return before;
}

DEVICE i32 dp4a(u32 a, u32 b, i32 c) {
    u32 sum = (u32)c;
    for (int i = 0; i < 32; i += 8) sum += (u32)((i32)(i8)(a >> i) * (i32)(i8)(b >> i));
    return (i32)sum;
}

DEVICE u32 sub_bytes(u32 a, u32 b) {
    u32 r = 0;
    for (int i = 0; i < 32; i += 8) r |= (u32)(u8)((u8)(a >> i) - (u8)(b >> i)) << i;
    return r;
}

DEVICE u32 bits(f32 v) {
    u32 r;
    memcpy(&r, &v, 4);
    return r;
}
DEVICE f32 from_bits(u32 v) {
    f32 r;
    memcpy(&r, &v, 4);
    return r;
}

// IEEE 754 binary16. As the bits of a float its exponent is 112 too small.
DEVICE f32 half_to_float(u16 v) {
    const u32 magnitude = (u32)(v & 0x7fff) << 13, sign = (u32)(v & 0x8000) << 16;
    if (magnitude >= 0x0f800000) return from_bits(sign | magnitude | 0x70000000);
    return from_bits(sign | bits(from_bits(magnitude) * 0x1p112f));
}

DEVICE u16 float_to_half(f32 v) {
    u16 sign = (u16)(bits(v) >> 16 & 0x8000);
    f32 magnitude = fabsf(v);
    if (magnitude != magnitude) return 0x7fff;
    if (magnitude >= 65520.0f) return sign | 0x7c00;
    // Steps of this binade, of the smallest one below it; nearbyintf rounds ties to even.
    int exponent = magnitude < 6.103515625e-5f ? -14 : ilogbf(magnitude);
    u32 steps = (u32)nearbyintf(ldexpf(magnitude, 10 - exponent));
    return sign | (u16)(((u32)(exponent + 14) << 10) + steps);
}

DEVICE u32 floats_to_halves(f32 low, f32 high) { return (u32)float_to_half(low) | (u32)float_to_half(high) << 16; }

namespace emulation {

// `Σ a[i] b[i]` over `n` signed bytes: as pairs of 16-bit words, which compilers have an instruction for.
template <int n> DEVICE i32 dot(const u32 *a, const u32 *b) {
    i8 left[n], right[n];
    memcpy(left, a, n);
    memcpy(right, b, n);
    i32 sum = 0;
    for (int i = 0; i < n; i++) sum += (i16)left[i] * (i16)right[i];
    return sum;
}

// Adds to a lane's part of a warp's product of 16 rows by 8 columns, whose `words` words each four lanes hold: of rows word w is
// `words / 4 · 2` of them, in pairs of rows g and g + 8; columns come behind.
template <int words, class C, class Dot> DEVICE void add_products(C (&c)[4], const u32 (*lanes)[emulation::MAX_WORDS], Dot dot) {
    const u32 g = thread_x() % 32 / 4, t = thread_x() % 4;
    u32 rows[2][words], columns[2][words];
    for (u32 i = 0; i < 2; i++)
        for (u32 w = 0; w < words; w++) {
            rows[i][w] = lanes[4 * g + w % 4][i + w / 4 * 2];
            columns[i][w] = lanes[4 * (2 * t + i) + w % 4][words / 4 * 2 + w / 4];
        }
    for (u32 i = 0; i < 4; i++) c[i] = dot(c[i], rows[i / 2], columns[i % 2]);
}

} // namespace emulation

DEVICE void mma_s8_k32(i32 (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    const u32 words[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    auto dot = [](i32 c, const u32 *left, const u32 *right) { return c + emulation::dot<32>(left, right); };
    emulation::add_products<8>(c, emulation::exchange(words, 6), dot);
}

DEVICE void mma_s8_k16(i32 (&c)[4], const u32 (&a)[2], u32 b) {
    const u32 words[3] = {a[0], a[1], b};
    auto dot = [](i32 c, const u32 *left, const u32 *right) { return c + emulation::dot<16>(left, right); };
    emulation::add_products<4>(c, emulation::exchange(words, 3), dot);
}

// Products of halves are exact in floats; they are summed in order.
DEVICE void mma_f16(f32 (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    // A lane makes floats of its halves once.
    u32 words[12];
    for (u32 i = 0; i < 12; i++) words[i] = bits(half_to_float((u16)((i < 8 ? a[i / 2] : b[i / 2 - 4]) >> i % 2 * 16)));
    const u32(*lanes)[emulation::MAX_WORDS] = emulation::exchange(words, 12);
    const u32 g = thread_x() % 32 / 4, t = thread_x() % 4;
    for (u32 of = 0; of < 8; of++) {
        const u32 upper = of / 4;
        f32 rows[2][2], columns[2][2];
        for (u32 i = 0; i < 2; i++) {
            memcpy(rows[i], lanes[4 * g + of % 4] + 2 * i + 4 * upper, 8);
            memcpy(columns[i], lanes[4 * (2 * t + i) + of % 4] + 8 + 2 * upper, 8);
        }
        for (u32 i = 0; i < 4; i++)
            for (u32 j = 0; j < 2; j++) c[i] += rows[i / 2][j] * columns[i % 2][j];
    }
}

namespace emulation {

// The halves of rows whose addresses lanes hold: of each matrix that at `row`, `column`, and the next to the right or below.
DEVICE void load_matrices(u32 (&r)[4], const void *own, u32 row, u32 column, u32 right, u32 below) {
    const u32 words[2] = {(u32)(u64)own, (u32)((u64)own >> 32)};
    const u32(*lanes)[emulation::MAX_WORDS] = exchange(words, 2);
    auto half = [&](u32 lane, u32 i) { return (u32)((const u16 *)(lanes[lane][0] | (u64)lanes[lane][1] << 32))[i]; };
    for (u32 m = 0; m < 4; m++) r[m] = half(8 * m + row, column) | half(8 * m + row + below, column + right) << 16;
}

} // namespace emulation

DEVICE void load_matrices(u32 (&r)[4], const void *row) {
    emulation::load_matrices(r, row, thread_x() % 32 / 4, thread_x() % 4 * 2, 1, 0);
}
DEVICE void load_matrices_transposed(u32 (&r)[4], const void *row) {
    emulation::load_matrices(r, row, thread_x() % 4 * 2, thread_x() % 32 / 4, 0, 1);
}

DEVICE void copy_async(void *to, const void *from, bool there = true) { emulation::copy_async(to, from, there); }
DEVICE void copy_async_commit() { emulation::copy_async_commit(); }
template <int n> DEVICE void copy_async_wait() { emulation::copy_async_wait(n); }
