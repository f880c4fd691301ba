// Rows catch up on the updates that they have missed, before they are read or written.
//
// Launch: blocks of 256 threads; a warp, or a part of one for short rows, takes a row at a time, 8 consecutive elements a
// thread. A row may be named several times: the lanes that set its mark first are those that catch up. Called by
// src/kernel/cuda/exact.rs.
#include "unit.cuh"

// A mark (src/mark.rs): the moments of the row are zero; it is a padding row; the update after which it was up to date.
constexpr u32 EMPTY = 1u << 31;
constexpr u32 PADDING = 1u << 30;
constexpr u32 SINCE = (1u << 17) - 1;
constexpr u32 NOTHING = 0xffffffff;

struct CatchUpArgs {
    Tensor tensor; // its `rows` are those that catch up; null for all of them
    u32* marks;    // after which update each row was up to date
    const Entry* entries;
    Terms terms;
    u64 n;   // rows that catch up
    u64 all; // rows of the table
    u64 key;
    Limits limits;
    u32 rounding;
    u32 now;     // the last update
    u32 mark;    // of rows that have caught up
};

// The mark of the row at `place`, if these lanes are to bring it up to date.
DEVICE u32 claim(const CatchUpArgs& args, u64 place) {
    u32 old = args.marks[place], since = old & SINCE, mark = args.mark | (old & (EMPTY | PADDING));
    bool decays = args.entries[since].log_decay != args.entries[args.now].log_decay;
    bool is_spared = (old & EMPTY) != 0 && ((old & PADDING) != 0 || !decays);
    return since < args.now && !is_spared && atomicCAS(&args.marks[place], old, mark) == old ? old : NOTHING;
}

// One row that catches up.
template <typename F, typename P> struct Row : Stored<F, P> {
    USE_STORED(F, P)
    using Stored<F, P>::Stored;
    using Stored<F, P>::is_whole;

    // Moments as they are. A padding row stays as it is where its moments are zero.
    __device__ __forceinline__ void catch_up_full(const Missed<A>& missed, bool padding) const {
        bool series = true, blank = true;
        for (u32 at = lanes.begin(); at < len; at += lanes.stride()) {
            u32 n = count(at);
            bool whole = is_whole && n == GROUP;
            A m[GROUP], u[GROUP];
            load(moments + at, n, whole, m);
            load(norms + at, n, whole, u);
#pragma unroll
            for (u32 i = 0; i < GROUP; i++) { // what is not there is zero
                series = series && missed.is_series(m[i], u[i]);
                blank = blank && m[i] == A(0) && u[i] == A(0);
            }
        }
        series = lanes.all(series);
        if (lanes.all(blank) && padding) return;
        for (u32 at = lanes.begin(); at < len; at += lanes.stride()) {
            u32 n = count(at);
            bool whole = is_whole && n == GROUP;
            A w[GROUP], m[GROUP], u[GROUP];
            load(moments + at, n, whole, m);
            load(norms + at, n, whole, u);
            params.read(at, n, whole, w);
#pragma unroll
            for (u32 i = 0; i < GROUP; i++) {
                w[i] = missed.weight(series, w[i], m[i], u[i]);
                m[i] = missed.first_moment(m[i]);
                u[i] = missed.norm(u[i]);
            }
            params.write(at, n, whole, w);
            store(moments + at, n, whole, m);
            store(norms + at, n, whole, u);
        }
    }

    // One norm for the row.
    __device__ __forceinline__ void catch_up_row(const Missed<A>& missed, const Limits& limits, bool padding) const {
        A before = *norm, after = missed.norm(before);
        if (padding && before == A(0)) return; // it tells whether there has been a gradient
        bool series = missed.is_series(after, before);
        for (u32 at = lanes.begin(); at < len; at += lanes.stride()) {
            u32 n = count(at);
            bool whole = is_whole && n == GROUP;
            A w[GROUP];
            typename F::Code m[GROUP];
            load(moments + at, n, whole, m);
            params.read(at, n, whole, w);
#pragma unroll
            for (u32 i = 0; i < GROUP; i++) catch_up_of_row<A, F>(missed, limits, key, series, w[i], m[i], before, after, at + i);
            params.write(at, n, whole, w);
            store(moments + at, n, whole, m);
        }
        lanes.sync();
        if (lanes.lane == 0) *norm = after;
    }

    // Encoded moments with a unit.
    __device__ __forceinline__ void catch_up_coded(const Missed<float>& missed, const Limits& limits, bool padding) const {
        u32 before = *log;
        Moved moved = move_unit<F>(before, missed.shrunk, 0.0f);
        PayBlock<F> block = PayBlock<F>::of(missed, limits, key, before, moved);
        // Where no gradient has been there is no unit yet, and none begins.
        bool zero = true, series = true;
        for (u32 at = lanes.begin(); at < len; at += lanes.stride()) {
            u32 n = count(at);
            bool whole = is_whole && n == GROUP;
            typename F::Code m[GROUP];
            typename F::Norm v[GROUP];
            load(moments + at, n, whole, m);
            load(norms + at, n, whole, v);
#pragma unroll
            for (u32 i = 0; i < GROUP; i++) {
                if (i < n) {
                    zero = zero && F::load_plain(m[i]) == 0.0f && v[i] == 0;
                    series = series && block.is_series(m[i], v[i]);
                }
            }
        }
        zero = lanes.all(zero);
        series = lanes.all(series);
        // The unit of a row may come from a block with other rows.
        if (zero && padding) return;
        for (u32 at = lanes.begin(); at < len; at += lanes.stride()) {
            u32 n = count(at);
            bool whole = is_whole && n == GROUP;
            float w[GROUP];
            typename F::Code m[GROUP];
            typename F::Norm v[GROUP];
            load(moments + at, n, whole, m);
            load(norms + at, n, whole, v);
            params.read(at, n, whole, w);
#pragma unroll
            for (u32 i = 0; i < GROUP; i++) block.catch_up(series, w[i], m[i], v[i], at + i);
            params.write(at, n, whole, w);
            store(moments + at, n, whole, m);
            store(norms + at, n, whole, v);
        }
        lanes.sync();
        if (lanes.lane == 0 && !(zero && before == 0)) *log = moved.log;
    }
};

template <typename F, typename P, bool ROWWISE> DEVICE void catch_up_rows(const CatchUpArgs& args) {
    typedef typename Element<P>::Acc A;
    const Tensor& t = args.tensor;
    const Lanes lanes = Lanes::of(t.unit);
    u64 at_once = u64(gridDim.x) * THREADS / lanes.count;
    for (u64 i = (u64(blockIdx.x) * THREADS + threadIdx.x) / lanes.count; i < args.n; i += at_once) {
        u64 place = t.rows != 0 ? reinterpret_cast<const u32*>(t.rows)[i] : i;
        if (place >= args.all) continue; // the id of nothing
        u32 mark = lanes.first(lanes.lane == 0 ? claim(args, place) : 0);
        if (mark == NOTHING) continue;
        bool padding = (mark & PADDING) != 0;
        const Missed<A> missed = Missed<A>::of(args.entries, args.terms, mark & SINCE, args.now);
        Row<F, P> row(lanes, t, args.rounding == 1, place, derive(args.key, place));
        if constexpr (ROWWISE) {
            row.catch_up_row(missed, args.limits, padding);
        } else if constexpr (F::IS_CODED) {
            row.catch_up_coded(missed, args.limits, padding);
        } else {
            row.catch_up_full(missed, padding);
        }
    }
}

#define PAY(NAME, P, F)                                                                                                  \
    KERNEL(catch_up_##NAME, CatchUpArgs) { catch_up_rows<F, P, false>(args); }                                                         \
    KERNEL(catch_up_##NAME##_rowwise, CatchUpArgs) { catch_up_rows<F, P, true>(args); }

#define PAYS(NAME, P)                                                                                                    \
    PAY(NAME##_full, P, Plain<float>)                                                                                    \
    PAY(NAME##_bf16, P, Bf16)                                                                                            \
    PAY(NAME##_f16, P, F16)                                                                                              \
    PAY(NAME##_q8, P, Q8)

// Each type of parameters is a module of its own; tests compile all at once.
#if defined(ONLY_f64)
PAY(f64_full, double, Plain<double>)
#elif defined(ONLY_f32)
PAYS(f32, float)
#elif defined(ONLY_f16)
PAYS(f16, f16)
#elif defined(ONLY_bf16)
PAYS(bf16, bf16)
#else
PAY(f64_full, double, Plain<double>)
PAYS(f32, float)
PAYS(f16, f16)
PAYS(bf16, bf16)
#endif
