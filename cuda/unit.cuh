// Parameters in memory, as updates, payments of rows and averages read and write them; and units of them with their moments.
#pragma once

#include "abi.cuh"

// The parameter's elements in the type of the arithmetic, and back.
template <typename P> struct Params {
    typedef typename Element<P>::Acc A;

    P* values;

    __device__ Params(u64 param, u64, bool, u32, u64 start) : values(reinterpret_cast<P*>(param) + start) {}

    __device__ __forceinline__ void read(u32 at, u32 n, bool whole, A (&w)[GROUP]) const { load_wide(values + at, n, whole, w); }

    __device__ __forceinline__ void write(u32 at, u32 n, bool whole, const A (&w)[GROUP]) const { store(values + at, n, whole, w); }
};

// Of 16 bits: joined with their masters, or rounded in one of two ways.
template <typename H> struct NarrowParams {
    typedef typename Half<H>::Rest Rest;

    H* values;
    Rest* rests;
    bool is_stochastic;
    u32 key;

    __device__ NarrowParams(u64 param, u64 master, bool is_stochastic, u32 key, u64 start)
        : values(reinterpret_cast<H*>(param) + start),
          rests(master == 0 ? nullptr : reinterpret_cast<Rest*>(master) + start),
          is_stochastic(is_stochastic), key(key) {}

    __device__ __forceinline__ void read(u32 at, u32 n, bool whole, float (&w)[GROUP]) const {
        H narrow[GROUP];
        load(values + at, n, whole, narrow);
        if (rests != nullptr) {
            Rest rest[GROUP];
            load(rests + at, n, whole, rest);
#pragma unroll
            for (u32 i = 0; i < GROUP; i++) w[i] = Half<H>::join(narrow[i], rest[i]);
        } else {
#pragma unroll
            for (u32 i = 0; i < GROUP; i++) w[i] = Element<H>::widen(narrow[i]);
        }
    }

    __device__ __forceinline__ void write(u32 at, u32 n, bool whole, const float (&w)[GROUP]) const {
        H narrow[GROUP];
        if (rests != nullptr) {
            Rest rest[GROUP];
#pragma unroll
            for (u32 i = 0; i < GROUP; i++) Half<H>::split(w[i], narrow[i], rest[i]);
            store(rests + at, n, whole, rest);
        } else if (is_stochastic) {
#pragma unroll
            for (u32 i = 0; i < GROUP; i++) narrow[i] = H{u16(Half<H>::stochastic(w[i], random(key, at + i)))};
        } else {
#pragma unroll
            for (u32 i = 0; i < GROUP; i++) narrow[i] = Element<H>::narrow(w[i]);
        }
        store(values + at, n, whole, narrow);
    }
};

template <> struct Params<f16> : NarrowParams<f16> {
    using NarrowParams<f16>::NarrowParams;
};
template <> struct Params<bf16> : NarrowParams<bf16> {
    using NarrowParams<bf16>::NarrowParams;
};

// One unit of one tensor where it is stored, and the way of its lanes over it.
template <typename F, typename P> struct Stored {
    typedef typename Element<P>::Acc A;

    Lanes lanes;
    Params<P> params;
    typename F::Code* moments;
    typename F::Norm* norms; // of each element
    A* norm;                 // of the row
    u32* log;
    u32 len;
    u32 key;
    bool is_whole;

    // The key is that of the random numbers of the moments and, in the upper half, of the parameter.
    __device__ Stored(const Lanes& lanes, const Tensor& t, bool is_stochastic, u64 place, u64 key)
        : lanes(lanes), params(t.param, t.master, is_stochastic, u32(key >> 32), place * t.unit),
          moments(reinterpret_cast<typename F::Code*>(t.exp_avg) + place * t.unit),
          norms(reinterpret_cast<typename F::Norm*>(t.exp_inf) + place * t.unit),
          norm(reinterpret_cast<A*>(t.exp_inf) + place), log(reinterpret_cast<u32*>(t.scales) + place),
          len(u32(t.len - place * t.unit < t.unit ? t.len - place * t.unit : t.unit)), key(u32(key)),
          is_whole(t.unit % GROUP == 0 && is_aligned(t.param | t.exp_avg | t.exp_inf | t.master)) {}

    // How many elements of the group at `at` there are.
    __device__ __forceinline__ u32 count(u32 at) const { return len - at < GROUP ? len - at : GROUP; }
};

// Names of `Stored` in a class that derives from it: the compiler looks for none of its own accord in a base that depends on
// types.
#define USE_STORED(F, P)                                                                                                 \
    using typename Stored<F, P>::A;                                                                                      \
    using Stored<F, P>::count;                                                                                           \
    using Stored<F, P>::key;                                                                                             \
    using Stored<F, P>::lanes;                                                                                           \
    using Stored<F, P>::len;                                                                                             \
    using Stored<F, P>::log;                                                                                             \
    using Stored<F, P>::moments;                                                                                         \
    using Stored<F, P>::norm;                                                                                            \
    using Stored<F, P>::norms;                                                                                           \
    using Stored<F, P>::params;
