// Runs the kernels of `cuda/` on the host: one block at a time, each of its threads a fiber of its own, which gives way
// where a thread would wait for others. What such a run shows are the kernels' own statements, barriers and indices; what
// it cannot show are races between blocks, and speed.
//
// A barrier that not all threads reach ends the run with a message, and the order in which threads run can be reversed:
// a kernel whose result depends on it lacks a barrier.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ucontext.h>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
// One block runs at a time, so that what its threads share may be static.
#define __shared__ static

struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct Index {
    unsigned x;
};

static Index threadIdx, blockIdx, blockDim, gridDim;

namespace host {

constexpr unsigned WARP = 32;
constexpr size_t STACK = 256 * 1024;

// Threads that wait for each other.
struct Barrier {
    unsigned members = 0, arrived = 0, generation = 0;

    void release_if_all() {
        if (members > 0 && arrived == members) {
            arrived = 0;
            generation++;
        }
    }
};

struct Fiber {
    ucontext_t context;
    char* stack;
    bool is_done;
};

static std::vector<Fiber> fibers;
// Of a warp, for each first lane and number of lanes that wait together.
struct WarpBarriers {
    Barrier barriers[WARP][WARP + 1];
};
static std::vector<WarpBarriers> warps;
static Barrier block;
static std::vector<uint64_t> slots;
static ucontext_t scheduler;
static unsigned current;
static bool has_progress;

static void wait(Barrier& barrier) {
    unsigned generation = barrier.generation;
    barrier.arrived++;
    has_progress = true;
    barrier.release_if_all();
    while (barrier.generation == generation) swapcontext(&fibers[current].context, &scheduler);
}

static Barrier& warp(unsigned mask) {
    unsigned first = __builtin_ctz(mask), members = __builtin_popcount(mask);
    Barrier& barrier = warps[current / WARP].barriers[first][members];
    barrier.members = members;
    return barrier;
}

// What a thread of the warp has given, found by the index of its lane.
template <typename T, typename Lane> static T exchange(unsigned mask, T value, Lane lane) {
    static_assert(sizeof(T) <= 8, "registers have at most 64 bits here");
    unsigned mine = current;
    memcpy(&slots[mine], &value, sizeof(T));
    wait(warp(mask));
    T result;
    memcpy(&result, &slots[mine / WARP * WARP + lane(mine % WARP)], sizeof(T));
    wait(warp(mask));
    return result;
}

static const void* arguments;
static void (*kernel)(const void*);

static void run_fiber() {
    kernel(arguments);
    fibers[current].is_done = true;
    block.members--;
    block.release_if_all();
    has_progress = true;
    swapcontext(&fibers[current].context, &scheduler);
}

// 0, or 1 if threads wait for ever.
static int run_block(unsigned threads, bool reversed) {
    block = Barrier{threads, 0, 0};
    warps.assign((threads + WARP - 1) / WARP, WarpBarriers{});
    slots.assign(threads, 0);
    while (fibers.size() < threads) fibers.push_back(Fiber{{}, static_cast<char*>(malloc(STACK)), false});
    for (unsigned i = 0; i < threads; i++) {
        getcontext(&fibers[i].context);
        fibers[i].context.uc_stack.ss_sp = fibers[i].stack;
        fibers[i].context.uc_stack.ss_size = STACK;
        fibers[i].context.uc_link = nullptr;
        fibers[i].is_done = false;
        makecontext(&fibers[i].context, run_fiber, 0);
    }
    for (unsigned left = threads; left > 0;) {
        has_progress = false;
        left = 0;
        for (unsigned n = 0; n < threads; n++) {
            unsigned i = reversed ? threads - 1 - n : n;
            if (fibers[i].is_done) continue;
            current = i;
            threadIdx.x = i;
            swapcontext(&scheduler, &fibers[i].context);
            left += fibers[i].is_done ? 0 : 1;
        }
        if (left > 0 && !has_progress) return 1;
    }
    return 0;
}

} // namespace host

static inline void __syncthreads() { host::wait(host::block); }
static inline void __syncwarp(unsigned mask = 0xffffffff) { host::wait(host::warp(mask)); }

template <typename T> static T __shfl_sync(unsigned mask, T value, unsigned lane) {
    return host::exchange(mask, value, [=](unsigned) { return lane % host::WARP; });
}
template <typename T> static T __shfl_xor_sync(unsigned mask, T value, unsigned bits) {
    return host::exchange(mask, value, [=](unsigned own) { return own ^ bits; });
}
template <typename T> static T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
    return host::exchange(mask, value, [=](unsigned own) { return own + delta < host::WARP ? own + delta : own; });
}
template <typename T> static T __shfl_up_sync(unsigned mask, T value, unsigned delta) {
    return host::exchange(mask, value, [=](unsigned own) { return own >= delta ? own - delta : own; });
}

// The lanes of the mask whose values pass a test.
template <typename Test> static unsigned vote(unsigned mask, unsigned value, Test test) {
    unsigned mine = host::current, begin = mine / host::WARP * host::WARP, lanes = 0;
    host::slots[mine] = value;
    host::wait(host::warp(mask));
    for (unsigned lane = 0; lane < host::WARP; lane++) {
        if ((mask >> lane & 1) != 0 && test(unsigned(host::slots[begin + lane]))) lanes |= 1u << lane;
    }
    host::wait(host::warp(mask));
    return lanes;
}
static inline unsigned __ballot_sync(unsigned mask, int predicate) {
    return vote(mask, predicate != 0, [](unsigned value) { return value != 0; });
}
static inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
static inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }
static inline unsigned __match_any_sync(unsigned mask, unsigned value) {
    return vote(mask, value, [=](unsigned other) { return other == value; });
}

template <typename T> static T atomicAdd(T* address, T value) {
    T old = *address;
    *address = T(old + value);
    return old;
}
template <typename T> static T atomicCAS(T* address, T expected, T value) {
    T old = *address;
    if (old == expected) *address = value;
    return old;
}
static inline void __threadfence() {}

static inline unsigned __float_as_uint(float x) {
    unsigned bits;
    memcpy(&bits, &x, 4);
    return bits;
}
static inline float __uint_as_float(unsigned bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
static inline long long __double_as_longlong(double x) {
    long long bits;
    memcpy(&bits, &x, 8);
    return bits;
}
static inline double __longlong_as_double(long long bits) {
    double x;
    memcpy(&x, &bits, 8);
    return x;
}
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }

// A kernel is a function of the address of its arguments here.
#define KERNEL(NAME, ARGS)                                                                                               \
    static void NAME##_body(const ARGS args);                                                                            \
    extern "C" __attribute__((visibility("default"))) void NAME(const void* args) { NAME##_body(*static_cast<const ARGS*>(args)); }                              \
    static void NAME##_body(const ARGS args)

// Runs all blocks of a launch, one after another; 0, or 1 if threads wait for ever.
extern "C" __attribute__((visibility("default"))) int host_launch(void (*kernel)(const void*), unsigned blocks, unsigned threads, const void* args, int reversed) {
    host::kernel = kernel;
    host::arguments = args;
    blockDim.x = threads;
    gridDim.x = blocks;
    for (unsigned n = 0; n < blocks; n++) {
        blockIdx.x = reversed ? blocks - 1 - n : n;
        if (host::run_block(threads, reversed != 0)) return 1;
    }
    return 0;
}
