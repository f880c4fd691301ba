// What a step does beside the update: sums of gradients that wait for it, and moving averages of the weights.
//
// Launch: one block of 256 threads for each chunk of units of 1,024 elements, 8 consecutive elements a thread. Called by
// src/kernel/cuda.
#include "unit.cuh"

constexpr u32 UNIT = 1024;

// Elements of one tensor.
struct Pair {
    u64 to;     // what is written: a sum, or an average
    u64 other;  // a gradient, or a parameter
    u64 master; // what a master keeps beside the parameter, if there is one
    u64 key;    // of the random numbers
    u64 len;
};

struct PairArgs {
    const Pair* pairs;
    const Chunk* chunks;
    const Control* control; // if there is one and it says so, nothing is done
    double factor;          // what gradients are multiplied with, or the share that an average keeps
    double other_factor;    // 1 less that share
    u32 chunk_units;
    u32 overwrites; // 0 if parameters stay, 1 if they become their averages, 2 if those are rounded at random
};

// Calls `pass(pair, start, n, whole)` for each group of elements of this thread.
template <typename Pass> DEVICE void for_groups(const PairArgs& args, Pass pass) {
    if (args.control != nullptr && args.control->skip != 0) return;
    Chunk chunk = args.chunks[blockIdx.x];
    const Pair& pair = args.pairs[chunk.tensor];
    bool is_whole = is_aligned(pair.to | pair.other | pair.master);
    u64 end = (u64(chunk.first) + args.chunk_units) * UNIT;
    end = end < pair.len ? end : pair.len;
    for (u64 at = u64(chunk.first) * UNIT + threadIdx.x * GROUP; at < end; at += THREADS * GROUP) {
        u32 n = u32(end - at < GROUP ? end - at : GROUP);
        pass(pair, at, n, is_whole && n == GROUP);
    }
}

template <typename G> DEVICE void accumulate(const PairArgs& args) {
    typedef typename Element<G>::Acc A;
    A unscale = A(args.factor);
    for_groups(args, [&](const Pair& pair, u64 at, u32 n, bool whole) {
        A sum[GROUP], g[GROUP];
        load(reinterpret_cast<const A*>(pair.to) + at, n, whole, sum);
        load_wide(reinterpret_cast<const G*>(pair.other) + at, n, whole, g);
#pragma unroll
        for (u32 i = 0; i < GROUP; i++) sum[i] = rule::accumulate(unscale, sum[i], g[i]);
        store(reinterpret_cast<A*>(pair.to) + at, n, whole, sum);
    });
}

KERNEL(accumulate_f64, PairArgs) { accumulate<double>(args); }
KERNEL(accumulate_f32, PairArgs) { accumulate<float>(args); }
KERNEL(accumulate_f16, PairArgs) { accumulate<f16>(args); }
KERNEL(accumulate_bf16, PairArgs) { accumulate<bf16>(args); }

template <typename P> DEVICE void average(const PairArgs& args) {
    typedef typename Element<P>::Acc A;
    A momentum = A(args.factor), one_minus_momentum = A(args.other_factor);
    for_groups(args, [&](const Pair& pair, u64 at, u32 n, bool whole) {
        A mean[GROUP], w[GROUP];
        // Each unit has a key of its own, and the number of an element is its place there.
        u64 unit = at / UNIT;
        Params<P> params(pair.other, pair.master, args.overwrites == 2, u32(derive(pair.key, unit) >> 32), unit * UNIT);
        load(reinterpret_cast<const A*>(pair.to) + at, n, whole, mean);
        params.read(u32(at % UNIT), n, whole, w);
#pragma unroll
        for (u32 i = 0; i < GROUP; i++) mean[i] = rule::average(momentum, one_minus_momentum, mean[i], w[i]);
        store(reinterpret_cast<A*>(pair.to) + at, n, whole, mean);
        if (args.overwrites != 0) params.write(u32(at % UNIT), n, whole, mean);
    });
}

KERNEL(average_f64, PairArgs) { average<double>(args); }
KERNEL(average_f32, PairArgs) { average<float>(args); }
KERNEL(average_f16, PairArgs) { average<f16>(args); }
KERNEL(average_bf16, PairArgs) { average<bf16>(args); }
