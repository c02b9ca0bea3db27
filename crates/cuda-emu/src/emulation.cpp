// Runs kernels on the host: fibers for the threads of a block, blocks one after the other.

#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <deque>
#include <string>
#include <vector>

#include "prims.cuh"

namespace emulation {

thread_local Place place;
const Kernel *kernels = nullptr;

namespace {

// What a device of every supported generation gives a block without asking.
const size_t SHARED_MAX = 48 << 10;
// Blocks along y and z that a GPU takes.
const u32 GRID_MAX = 65535;
const size_t STACK_BYTES = 64 << 10;
const u8 GARBAGE = 0xa5;

enum class State { Ready, AtBarrier, AtExchange, Done };

struct Copy {
    u8 *to;
    const u8 *from;
    int group;
};

struct Fiber {
    void *sp;
    State state;
    // Two sets of words: a lane that is one exchange ahead does not overwrite what another still reads.
    int n_exchanges;
    int group;
    std::deque<Copy> copies;
};

struct SharedArray {
    const void *id;
    size_t at, bytes;
};

// A block in execution.
struct Block {
    const Kernel *kernel;
    const u64 *args;
    std::vector<Fiber> fibers;
    // `[n_warps][2][32][MAX_WORDS]`
    std::vector<u32> words;
    // Of each warp, how many lanes wait at an exchange.
    std::vector<u32> n_met;
    std::vector<SharedArray> arrays;
    size_t shared_used;
    alignas(64) u8 shared[SHARED_MAX];
    u8 *stacks;
    size_t n_stacks;
    void *scheduler_sp;
    std::string error;
};

thread_local Block *block = nullptr;

extern "C" void apr_emulation_switch(void **save, void *load);

#if defined(__x86_64__)
asm(R"(
.text
.globl apr_emulation_switch
.type apr_emulation_switch, @function
apr_emulation_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size apr_emulation_switch, .-apr_emulation_switch
.section .note.GNU-stack,"",@progbits
.text
)");
const size_t N_SAVED = 6;
#elif defined(__aarch64__)
asm(R"(
.text
.globl apr_emulation_switch
.type apr_emulation_switch, %function
apr_emulation_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
.size apr_emulation_switch, .-apr_emulation_switch
)");
#else
#error "the emulation switches fibers on x86-64 and 64-bit Arm"
#endif

void wait(State state) {
    Fiber &fiber = block->fibers[place.thread];
    fiber.state = state;
    apr_emulation_switch(&fiber.sp, block->scheduler_sp);
}

// Where a fiber begins. It never returns: the scheduler does not come back to one that is done.
void fiber_main() {
    block->kernel->call(block->kernel->f, block->args);
    wait(State::Done);
    abort();
}

void *new_stack(u8 *stack) {
    void **top = (void **)(stack + STACK_BYTES);
#if defined(__x86_64__)
    // A function begins with its stack off by 8 from a boundary of 16, as after a call.
    *--top = nullptr;
    *--top = (void *)fiber_main;
    for (size_t i = 0; i < N_SAVED; i++) *--top = nullptr;
#else
    top -= 20;
    for (int i = 0; i < 20; i++) top[i] = nullptr;
    top[11] = (void *)fiber_main;
#endif
    return top;
}

u32 next_random(u64 &state) {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return (u32)(state >> 33);
}

// The order in which warps or their lanes run: 0 ascending, 1 descending, else shuffled.
void order_threads(std::vector<u32> &order, u32 kind, u64 &random) {
    u32 n = (u32)order.size();
    for (u32 i = 0; i < n; i++) order[i] = kind == 1 ? n - 1 - i : i;
    if (kind < 2) return;
    for (u32 i = n - 1; i > 0; i--) std::swap(order[i], order[next_random(random) % (i + 1)]);
}

// Lets threads go on that have all come to the barrier.
void release(Block &b) {
    for (const Fiber &fiber : b.fibers)
        if (fiber.state != State::AtBarrier) return;
    for (Fiber &fiber : b.fibers) fiber.state = State::Ready;
}

void run_block(Block &b, u32 kind, u64 &random, std::vector<u32> &order) {
    u32 n = b.kernel->threads;
    b.arrays.clear();
    b.shared_used = 0;
    memset(b.shared, GARBAGE, sizeof b.shared);
    b.fibers.resize(n);
    b.n_met.assign(n / 32, 0);
    for (u32 i = 0; i < n; i++) {
        Fiber &fiber = b.fibers[i];
        fiber.sp = new_stack(b.stacks + i * STACK_BYTES);
        fiber.state = State::Ready;
        fiber.n_exchanges = fiber.group = 0;
        fiber.copies.clear();
    }
    std::vector<u32> lanes(32);
    for (u32 n_done = 0; n_done < n;) {
        order_threads(order, kind, random);
        bool ran = false;
        // A warp goes as far as it can before the next begins: what keeps warps apart is a barrier or nothing.
        for (u32 warp : order) {
            for (bool more = true; more;) {
                more = false;
                order_threads(lanes, kind, random);
                for (u32 lane : lanes) {
                    const u32 i = 32 * warp + lane;
                    if (b.fibers[i].state != State::Ready) continue;
                    ran = more = true;
                    place.thread = i;
                    apr_emulation_switch(&b.scheduler_sp, b.fibers[i].sp);
                    n_done += b.fibers[i].state == State::Done;
                    if (!b.error.empty()) return;
                }
            }
        }
        release(b);
        if (!ran) {
            b.error = "some threads wait for others that do not come: a barrier, shuffle or matrix product in a branch";
            return;
        }
    }
}

} // namespace

void *shared(const void *id, size_t bytes) {
    for (const SharedArray &a : block->arrays)
        if (a.id == id) return block->shared + a.at;
    size_t at = (block->shared_used + 15) / 16 * 16;
    if (at + bytes > SHARED_MAX) {
        block->error = "more than 48 KiB of shared memory";
        wait(State::Done);
    }
    block->arrays.push_back({id, at, bytes});
    block->shared_used = at + bytes;
    return block->shared + at;
}

void barrier() { wait(State::AtBarrier); }

const u32 (*exchange(const u32 *words, int n))[MAX_WORDS] {
    const u32 first = place.thread / 32 * 32;
    Fiber *lanes = block->fibers.data() + first, &fiber = lanes[place.thread % 32];
    u32(*sets)[32][MAX_WORDS] = (u32(*)[32][MAX_WORDS])(block->words.data() + first * 2 * MAX_WORDS);
    u32(*set)[MAX_WORDS] = sets[fiber.n_exchanges++ % 2];
    for (int i = 0; i < n; i++) set[place.thread % 32][i] = words[i];
    // The last to come finds the others waiting, and goes on at once.
    if (++block->n_met[first / 32] == 32) {
        block->n_met[first / 32] = 0;
        for (u32 i = 0; i < 32; i++) lanes[i].state = State::Ready;
    } else {
        wait(State::AtExchange);
    }
    return set;
}

void copy_async(void *to, const void *from, bool there) {
    if ((u64)to % 16 || (u64)from % 16) {
        block->error = "an asynchronous copy that is not on a boundary of 16 bytes";
        wait(State::Done);
    }
    Fiber &fiber = block->fibers[place.thread];
    memset(to, GARBAGE, 16);
    fiber.copies.push_back({(u8 *)to, there ? (const u8 *)from : nullptr, fiber.group});
}

void copy_async_commit() { block->fibers[place.thread].group++; }

void copy_async_wait(int n) {
    Fiber &fiber = block->fibers[place.thread];
    while (!fiber.copies.empty() && fiber.copies.front().group < fiber.group - n) {
        const auto &copy = fiber.copies.front();
        copy.from ? memcpy(copy.to, copy.from, 16) : memset(copy.to, 0, 16);
        fiber.copies.pop_front();
    }
}

namespace {

const Kernel *find(const char *name) {
    for (const Kernel *k = kernels; k; k = k->next)
        if (!strcmp(k->name, name)) return k;
    return nullptr;
}

} // namespace

// Runs a kernel over a grid. Returns 0, or 1 with what is wrong in `error`.
extern "C" int apr_emulation_launch(const char *name, const u32 *grid, u32 threads, const u64 *args,
                                    const char *kinds, u32 kind_of_order, u64 seed, char *error, size_t error_bytes) {
    const Kernel *kernel = find(name);
    std::string wrong;
    if (!kernel) wrong = "there is no such kernel";
    else if (!grid[0] || !grid[1] || !grid[2] || grid[1] > GRID_MAX || grid[2] > GRID_MAX) wrong = "a grid that no GPU takes";
    else if (kernel->threads != threads) wrong = "it is written for " + std::to_string(kernel->threads) + " threads";
    else if (strcmp(kernel->kinds, kinds)) wrong = "its arguments are '" + std::string(kernel->kinds) + "'";
    if (wrong.empty()) {
        static thread_local Block *own = new Block();
        static thread_local std::vector<u32> order;
        block = own;
        own->kernel = kernel;
        own->args = args;
        own->error.clear();
        own->words.resize(threads / 32 * 2 * 32 * MAX_WORDS);
        order.resize(threads / 32);
        if (own->n_stacks < threads) {
            own->stacks = (u8 *)mmap(nullptr, threads * STACK_BYTES, PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            own->n_stacks = threads;
        }
        memcpy(place.grid, grid, sizeof place.grid);
        for (place.block[2] = 0; place.block[2] < grid[2]; place.block[2]++)
            for (place.block[1] = 0; place.block[1] < grid[1]; place.block[1]++)
                for (place.block[0] = 0; place.block[0] < grid[0] && own->error.empty(); place.block[0]++)
                    run_block(*own, kind_of_order, seed, order);
        wrong = own->error;
    }
    snprintf(error, error_bytes, "%s", wrong.c_str());
    return !wrong.empty();
}

// Letters of a kernel's arguments, or null where there is no such kernel.
extern "C" const char *apr_emulation_kinds(const char *name) {
    const Kernel *kernel = find(name);
    return kernel ? kernel->kinds : nullptr;
}

// The `i`-th kernel's name, or null.
extern "C" const char *apr_emulation_kernel(u32 i) {
    const Kernel *k = kernels;
    for (; k && i > 0; i--) k = k->next;
    return k ? k->name : nullptr;
}

} // namespace emulation

// Memory that ends at a page nobody may touch and is all ones: a kernel that reads or writes past it does not go unnoticed, and
// what nobody wrote is not a number.
extern "C" void *apr_emulation_alloc(size_t bytes) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE), room = (bytes + 15) / 16 * 16, whole = (room + page - 1) / page * page;
    u8 *base = (u8 *)mmap(nullptr, whole + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) return nullptr;
    mprotect(base + whole, page, PROT_NONE);
    memset(base, 0xff, whole);
    return base + whole - room;
}

extern "C" void apr_emulation_free(void *at, size_t bytes) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE), room = (bytes + 15) / 16 * 16, whole = (room + page - 1) / page * page;
    munmap((u8 *)at + room - whole, whole + page);
}
