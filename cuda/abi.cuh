// What the host hands to kernels: src/kernel/cuda/abi.rs has the same structures, and a test compares their layouts.
// Every kernel takes one structure by value. Pointers and sizes have 64 bits.
#pragma once

#include "codec.cuh"

#ifndef KERNEL
// The entry point of a kernel; the tests define it so that kernels run on the host.
#define KERNEL(NAME, ARGS) extern "C" __global__ void __launch_bounds__(256, 2) NAME(const ARGS args)
#endif

constexpr u32 WARP = 32;
// Threads of a block, in every kernel.
constexpr u32 THREADS = 256;
constexpr u32 WARPS = THREADS / WARP;
// Consecutive elements that a thread works on at a time: 16 bytes of the 16-bit types, 32 of f32.
constexpr u32 GROUP = 8;

// One parameter of a launch.
struct Tensor {
    u64 param;
    u64 grad;
    u64 exp_avg; // m, or its codes
    u64 exp_inf; // u, or its codes, or one for each row
    u64 scales;  // u32: the logarithm of each unit's scale
    u64 master;  // what masters keep beside the parameter, or null
    u64 rows;    // u32: which units, ascending; null for all of them
    u64 count;   // u32: how many `rows` there are
    u64 len;     // elements of the parameter
    u64 unit;    // elements of a unit
    u32 update_args;  // index of this one's arguments
    u32 chunk;   // how many units a chunk has
};

// What one update of one parameter is made with.
struct UpdateArgs {
    Coefficients<double> wide;
    Coefficients<float> narrow;
    Limits limits;
    u32 rounding; // 0: nearest, 1: stochastic; masters have a pointer
    u64 shrink;
    u64 key;
};

// The work of one block: units of one tensor, from `first` on.
struct Chunk {
    u32 tensor;
    u32 first;
};

// Results of an update that the device knows before the host.
struct Control {
    double total_norm;
    u32 skip; // whether the update is skipped
    u32 padding;
};

struct UpdateLaunchArgs {
    const Tensor* tensors;
    const UpdateArgs* update_args;
    const Chunk* chunks;
    const Control* control; // null if nothing is skipped
};

DEVICE bool is_skipped(const Control* control) { return control != nullptr && control->skip != 0; }

DEVICE const Coefficients<float>& coefficients(const UpdateArgs& update_args, float) { return update_args.narrow; }
DEVICE const Coefficients<double>& coefficients(const UpdateArgs& update_args, double) { return update_args.wide; }

// === Lanes ===

constexpr u32 ALL = 0xffffffff;

// The lanes of a warp that work on one unit: as many as it has groups, all of them if it has more. They run on their own:
// whatever waits for others names these lanes only.
struct Lanes {
    u32 count; // a power of two
    u32 lane;  // this thread's place among them
    u32 mask;

    DEVICE Lanes of(u64 unit) {
        u32 count = 1;
        while (count < WARP && u64(count) * GROUP < unit) count *= 2;
        u32 thread = threadIdx.x % WARP;
        u32 mask = count == WARP ? ALL : ((1u << count) - 1) << (thread / count * count);
        return Lanes{count, thread % count, mask};
    }

    // Where this thread begins in its unit, and how far it goes each time.
    __device__ __forceinline__ u32 begin() const { return lane * GROUP; }
    __device__ __forceinline__ u32 stride() const { return count * GROUP; }

    __device__ __forceinline__ u32 max(u32 x) const {
        for (u32 distance = count / 2; distance > 0; distance /= 2) {
            u32 other = __shfl_xor_sync(mask, x, distance);
            x = other > x ? other : x;
        }
        return x;
    }

    // The largest one, or NaN if one is NaN.
    template <typename A> __device__ __forceinline__ A maximum(A x) const {
        for (u32 distance = count / 2; distance > 0; distance /= 2) {
            x = rule::maximum(x, __shfl_xor_sync(mask, x, distance));
        }
        return x;
    }

    // What the first one has.
    __device__ __forceinline__ u32 first(u32 x) const { return __shfl_sync(mask, x, threadIdx.x % WARP / count * count); }

    __device__ __forceinline__ bool all(bool x) const { return __all_sync(mask, x) != 0; }
    __device__ __forceinline__ bool any(bool x) const { return __any_sync(mask, x) != 0; }

    // What one lane writes, others have read before.
    __device__ __forceinline__ void sync() const { __syncwarp(mask); }
};

// === Rows ===

// An id that is no row of the table.
constexpr u32 NO_ROW = 0xffffffff;

// The threads that work on one row, one column each at a time; unlike `Lanes` they never wait for each other.
struct Columns {
    u32 count, first;
    u64 row, rows_at_once;

    DEVICE Columns of(u64 row_len) {
        u32 count = 1;
        while (count < WARP && count < row_len) count *= 2;
        u64 thread = u64(blockIdx.x) * THREADS + threadIdx.x;
        return Columns{count, u32(thread % count), thread / count, u64(gridDim.x) * THREADS / count};
    }
};

// The sum of `value(i)` over the numbers from `first` to `last`, in order. Several are fetched before the first of them is added:
// a sum has to wait for the one before it, what is added need not.
template <u32 AHEAD, typename A, typename Value> DEVICE A sum_in_order(u32 first, u32 last, Value value) {
    A sum = A(0);
    for (u32 from = first; from < last; from += AHEAD) {
        A values[AHEAD];
        u32 n = last - from < AHEAD ? last - from : AHEAD;
#pragma unroll
        for (u32 i = 0; i < AHEAD; i++) {
            if (i < n) values[i] = value(from + i);
        }
#pragma unroll
        for (u32 i = 0; i < AHEAD; i++) {
            if (i < n) sum = from + i == first ? values[i] : sum + values[i];
        }
    }
    return sum;
}

// === Groups of elements ===

// Whether groups of a tensor can be read and written as whole words.
DEVICE bool is_aligned(u64 address) { return (address & 15) == 0; }

template <typename T> union Words {
    uint2 two;
    uint4 four[(sizeof(T) * GROUP + 15) / 16];
    T values[GROUP];
};

// `n` elements of a group, in words of 16 bytes (8 for types of one byte) if it is `whole`.
template <typename T> DEVICE void load(const T* from, u32 n, bool whole, T (&to)[GROUP]) {
    Words<T> words;
    if (whole) {
        if constexpr (sizeof(T) == 1) {
            words.two = *reinterpret_cast<const uint2*>(from);
        } else {
#pragma unroll
            for (u32 i = 0; i < sizeof(T) * GROUP / 16; i++) words.four[i] = reinterpret_cast<const uint4*>(from)[i];
        }
#pragma unroll
        for (u32 i = 0; i < GROUP; i++) to[i] = words.values[i];
    } else {
#pragma unroll
        for (u32 i = 0; i < GROUP; i++) to[i] = i < n ? from[i] : T{};
    }
}

template <typename T> DEVICE void store(T* to, u32 n, bool whole, const T (&from)[GROUP]) {
    if (whole) {
        Words<T> words;
#pragma unroll
        for (u32 i = 0; i < GROUP; i++) words.values[i] = from[i];
        if constexpr (sizeof(T) == 1) {
            *reinterpret_cast<uint2*>(to) = words.two;
        } else {
#pragma unroll
            for (u32 i = 0; i < sizeof(T) * GROUP / 16; i++) reinterpret_cast<uint4*>(to)[i] = words.four[i];
        }
    } else {
#pragma unroll
        for (u32 i = 0; i < GROUP; i++) {
            if (i < n) to[i] = from[i];
        }
    }
}

// The same of elements that are computed with in another type.
template <typename T, typename A> DEVICE void load_wide(const T* from, u32 n, bool whole, A (&to)[GROUP]) {
    T values[GROUP];
    load(from, n, whole, values);
#pragma unroll
    for (u32 i = 0; i < GROUP; i++) to[i] = Element<T>::widen(values[i]);
}
