// The update of all tensors of one combination of types in one launch.
//
// Launch: one block of 256 threads for each chunk, a chunk being some units of one tensor; a warp, or a part of one for short
// units, takes a unit at a time, 8 consecutive elements a thread. A unit is what shares a unit of norms: a row of a table, or
// 1,024 elements. Where moments are encoded it is read twice: the largest gradient decides the unit before anything is
// written, and the second reading finds the gradients in the cache. Called by src/kernel/cuda.
#include "unit.cuh"

// One unit of one tensor that is updated.
template <typename F, typename P, typename G> struct Unit : Stored<F, P> {
    USE_STORED(F, P)

    const G* grads;
    bool is_whole;

    __device__ Unit(const Lanes& lanes, const Tensor& t, const UpdateArgs& update_args, u64 index, u64 place, u64 key)
        : Stored<F, P>(lanes, t, update_args.rounding == 1, place, key),
          grads(reinterpret_cast<const G*>(t.grad) + (t.rows != 0 ? index : place) * t.unit),
          is_whole(Stored<F, P>::is_whole && is_aligned(t.grad)) {}

    // Moments as they are: one reading.
    __device__ __forceinline__ void update_full(const Coefficients<A>& c) const {
        for (u32 at = lanes.begin(); at < len; at += lanes.stride()) {
            u32 n = count(at);
            bool whole = is_whole && n == GROUP;
            A w[GROUP], g[GROUP], m[GROUP], u[GROUP];
            load_wide(grads + at, n, whole, g);
            load(moments + at, n, whole, m);
            load(norms + at, n, whole, u);
            params.read(at, n, whole, w);
#pragma unroll
            for (u32 i = 0; i < GROUP; i++) rule::update(c, w[i], g[i], m[i], u[i]);
            params.write(at, n, whole, w);
            store(moments + at, n, whole, m);
            store(norms + at, n, whole, u);
        }
    }

    // One norm for the row.
    __device__ __forceinline__ void update_row(const Coefficients<A>& c, const Limits& limits) const {
        A before = *norm;
        A after = c.beta2 * before;
        for (u32 at = lanes.begin(); at < len; at += lanes.stride()) {
            u32 n = count(at);
            bool whole = is_whole && n == GROUP;
            A w[GROUP] = {}, g[GROUP];
            load_wide(grads + at, n, whole, g);
            if (c.l2 != A(0)) params.read(at, n, whole, w);
#pragma unroll
            for (u32 i = 0; i < GROUP; i++) {
                if (i < n) after = rule::maximum(after, rule::magnitude(c, rule::gradient(c, w[i], g[i])));
            }
        }
        after = lanes.maximum(after);
        for (u32 at = lanes.begin(); at < len; at += lanes.stride()) {
            u32 n = count(at);
            bool whole = is_whole && n == GROUP;
            A w[GROUP], g[GROUP];
            typename F::Code m[GROUP];
            load_wide(grads + at, n, whole, g);
            load(moments + at, n, whole, m);
            params.read(at, n, whole, w);
#pragma unroll
            for (u32 i = 0; i < GROUP; i++) update_of_row<A, F>(c, limits, key, w[i], g[i], m[i], before, after, at + i);
            params.write(at, n, whole, w);
            store(moments + at, n, whole, m);
        }
        lanes.sync();
        if (lanes.lane == 0) *norm = after;
    }

    // What u is compared with.
    __device__ __forceinline__ Largest largest_seen(const Coefficients<float>& c) const {
        u32 magnitude = 0;
        for (u32 at = lanes.begin(); at < len; at += lanes.stride()) {
            u32 n = count(at);
            float g[GROUP];
            load_wide(grads + at, n, is_whole && n == GROUP, g);
#pragma unroll
            for (u32 i = 0; i < GROUP; i++) {
                u32 bits = to_bits(g[i]) & 0x7fffffff;
                magnitude = bits > magnitude ? bits : magnitude; // what is not there is zero
            }
        }
        Largest largest;
        if (largest_of(c, lanes.max(magnitude), largest)) return largest;
        largest = Largest{0, true};
        for (u32 at = lanes.begin(); at < len; at += lanes.stride()) {
            u32 n = count(at);
            bool whole = is_whole && n == GROUP;
            float w[GROUP], g[GROUP];
            load_wide(grads + at, n, whole, g);
            params.read(at, n, whole, w);
#pragma unroll
            for (u32 i = 0; i < GROUP; i++) {
                if (i < n) look(c, w[i], g[i], largest);
            }
        }
        return Largest{lanes.max(largest.finite), lanes.all(largest.is_all)};
    }

    __device__ __forceinline__ bool has_special() const {
        bool special = false;
        for (u32 at = lanes.begin(); at < len; at += lanes.stride()) {
            u32 n = count(at);
            typename F::Norm v[GROUP];
            load(norms + at, n, is_whole && n == GROUP, v);
#pragma unroll
            for (u32 i = 0; i < GROUP; i++) special = special || F::is_special(v[i]);
        }
        return lanes.any(special);
    }

    // `STEP` is 0 for any case, 1 for a plain one and 2 for a plain one with decay.
    template <u32 STEP> __device__ __forceinline__ void update_block(const Block<F>& block) const {
        for (u32 at = lanes.begin(); at < len; at += lanes.stride()) {
            u32 n = count(at);
            bool whole = is_whole && n == GROUP;
            float w[GROUP], g[GROUP];
            typename F::Code m[GROUP];
            typename F::Norm v[GROUP];
            load_wide(grads + at, n, whole, g);
            load(moments + at, n, whole, m);
            load(norms + at, n, whole, v);
            params.read(at, n, whole, w);
            bool is_new = false;
#pragma unroll
            for (u32 i = 0; i < GROUP; i++) {
                typename F::Norm before = v[i];
                if constexpr (STEP == 0) block.update(w[i], g[i], m[i], v[i], at + i);
                if constexpr (STEP == 1) block.template update_plain<false>(w[i], g[i], m[i], v[i], at + i);
                if constexpr (STEP == 2) block.template update_plain<true>(w[i], g[i], m[i], v[i], at + i);
                is_new = is_new || v[i] != before;
            }
            params.write(at, n, whole, w);
            store(moments + at, n, whole, m);
            // An un-decayed maximum changes only where a new one comes, so most of them need not be written.
            if (is_new) store(norms + at, n, whole, v);
        }
    }

    // Encoded moments with a unit.
    __device__ __forceinline__ void update_coded(const Coefficients<float>& c, const UpdateArgs& update_args) const {
        Largest largest = largest_seen(c);
        u32 before = *log;
        Moved moved = move_unit<F>(before, update_args.shrink, from_bits(largest.finite));
        Block<F> block = Block<F>::of(c, update_args.limits, key, before, moved);
        if (block.is_plain(largest, has_special())) {
            if (c.decay == 0.0f) {
                update_block<1>(block);
            } else {
                update_block<2>(block);
            }
        } else {
            update_block<0>(block);
        }
        lanes.sync();
        if (lanes.lane == 0) *log = moved.log;
    }
};

template <typename F, typename P, typename G, bool ROWWISE> DEVICE void update_chunk(const UpdateLaunchArgs& args) {
    typedef typename Element<P>::Acc A;
    if (is_skipped(args.control)) return;
    Chunk chunk = args.chunks[blockIdx.x];
    const Tensor& t = args.tensors[chunk.tensor];
    const UpdateArgs& update_args = args.update_args[t.update_args];
    const Coefficients<A> c = coefficients(update_args, A());
    u64 units = t.count != 0 ? *reinterpret_cast<const u32*>(t.count) : (t.len + t.unit - 1) / t.unit;
    u64 end = u64(chunk.first) + t.chunk;
    end = end < units ? end : units;
    const Lanes lanes = Lanes::of(t.unit);
    u32 at_once = THREADS / lanes.count;
    for (u64 index = chunk.first + threadIdx.x / lanes.count; index < end; index += at_once) {
        u64 place = t.rows != 0 ? reinterpret_cast<const u32*>(t.rows)[index] : index;
        // The random numbers of the moments and, in the upper half, of the parameter.
        u64 key = derive(update_args.key, place);
        Unit<F, P, G> unit(lanes, t, update_args, index, place, key);
        if constexpr (ROWWISE) {
            unit.update_row(c, update_args.limits);
        } else if constexpr (F::IS_CODED) {
            unit.update_coded(c, update_args);
        } else {
            unit.update_full(c);
        }
    }
}

// Parameter, gradient, moments.
#define UPDATE(NAME, P, G, F)                                                                                            \
    KERNEL(update_##NAME, UpdateLaunchArgs) { update_chunk<F, P, G, false>(args); }                                            \
    KERNEL(update_##NAME##_rowwise, UpdateLaunchArgs) { update_chunk<F, P, G, true>(args); }

#define UPDATES(NAME, P, G)                                                                                              \
    UPDATE(NAME##_full, P, G, Plain<float>)                                                                              \
    UPDATE(NAME##_bf16, P, G, Bf16)                                                                                      \
    UPDATE(NAME##_f16, P, G, F16)                                                                                        \
    UPDATE(NAME##_q8, P, G, Q8)

// Each pair of types is a module of its own, so that a model waits only for what it uses; tests compile all at once.
#if defined(ONLY_f64_f64)
UPDATE(f64_f64_full, double, double, Plain<double>)
#elif defined(ONLY_f32_f32)
UPDATES(f32_f32, float, float)
#elif defined(ONLY_f16_f16)
UPDATES(f16_f16, f16, f16)
#elif defined(ONLY_f16_f32)
UPDATES(f16_f32, f16, float)
#elif defined(ONLY_bf16_bf16)
UPDATES(bf16_bf16, bf16, bf16)
#elif defined(ONLY_bf16_f32)
UPDATES(bf16_f32, bf16, float)
#else
UPDATE(f64_f64_full, double, double, Plain<double>)
UPDATES(f32_f32, float, float)
UPDATES(f16_f16, f16, f16)
UPDATES(f16_f32, f16, float)
UPDATES(bf16_bf16, bf16, bf16)
UPDATES(bf16_f32, bf16, float)
#endif
