// Norms of gradients by the one fixed tree of src/reduce.rs, and what clipping and skipping make of them, on the device.
//
// Three launches: `summary_leaves_*`, a warp for each leaf of 1,024 elements, for all tensors of one type; `summary_norms`, a
// block for each tensor, which folds its leaves; `summary_join`, one block, which joins the norms of all tensors and scales
// the arguments of the update that follows. Called by src/kernel/cuda.
#include "abi.cuh"

// Elements of a leaf, and of the partial results that one keeps.
constexpr u32 LEAF = 1024;

enum NormType { L1 = 0, L2 = 1, INF = 2 };

DEVICE double statistic(u32 norm, double x) { return norm == L2 ? x * x : abs_of(x); }

DEVICE double join(u32 norm, double a, double b) { return norm == INF ? rule::maximum(a, b) : a + b; }

// A warp folds at most LEAF values: lane j takes j, j + 32, .. in order, then the lanes fold in halves. Lane 0 has the result.
template <typename Value> DEVICE double fold_row(u32 norm, u64 n, Value value) {
    double sum = 0.0;
    for (u64 i = threadIdx.x % WARP; i < n; i += WARP) sum = join(norm, sum, value(i));
    for (u32 distance = WARP / 2; distance > 0; distance /= 2) {
        sum = join(norm, sum, __shfl_down_sync(ALL, sum, distance));
    }
    return sum;
}

// One gradient.
struct Gradient {
    u64 values;
    u64 count; // u32: how many rows there are, known to the device alone; or null
    u64 len;   // elements; of a row if there is a count
    u64 first; // of its leaves, among those of all tensors
    u64 is_f64; // 1 for elements of f64, whose squares can leave the range of f64, else 0
};

DEVICE u64 elements(const Gradient& g) { return g.count != 0 ? *reinterpret_cast<const u32*>(g.count) * g.len : g.len; }

struct LeavesArgs {
    const Gradient* gradients;
    const Chunk* chunks; // units are leaves
    double* leaves;
    u32 norm;
    u32 chunk_units;
};

template <typename E> DEVICE void fold_leaves(const LeavesArgs& args) {
    Chunk chunk = args.chunks[blockIdx.x];
    const Gradient& g = args.gradients[chunk.tensor];
    u64 n = elements(g);
    const E* values = reinterpret_cast<const E*>(g.values);
    u64 end = u64(chunk.first) + args.chunk_units;
    for (u64 leaf = chunk.first + threadIdx.x / WARP; leaf < end && leaf * LEAF < n; leaf += WARPS) {
        u64 start = leaf * LEAF;
        double sum = fold_row(args.norm, n - start < LEAF ? n - start : LEAF, [&](u64 i) {
            return statistic(args.norm, double(Element<E>::widen(values[start + i])));
        });
        if (threadIdx.x % WARP == 0) args.leaves[g.first + leaf] = sum;
    }
}

KERNEL(summary_leaves_f64, LeavesArgs) { fold_leaves<double>(args); }
KERNEL(summary_leaves_f32, LeavesArgs) { fold_leaves<float>(args); }
KERNEL(summary_leaves_f16, LeavesArgs) { fold_leaves<f16>(args); }
KERNEL(summary_leaves_bf16, LeavesArgs) { fold_leaves<bf16>(args); }

// A block folds `n` values in `from` until one is left; `other` has room for a thousandth of them, and both are used up.
DEVICE double fold_tree(u32 norm, double* from, double* other, u64 n) {
    while (n > 1) {
        u64 rows = (n + LEAF - 1) / LEAF;
        for (u64 row = threadIdx.x / WARP; row < rows; row += WARPS) {
            u64 start = row * LEAF;
            double sum = fold_row(norm, n - start < LEAF ? n - start : LEAF, [&](u64 i) { return from[start + i]; });
            if (threadIdx.x % WARP == 0) other[row] = sum;
        }
        __syncthreads();
        double* folded = other;
        other = from;
        from = folded;
        n = rows;
    }
    return n == 0 ? 0.0 : from[0];
}

DEVICE bool is_finite(double x) { return abs_of(x) <= 1.7976931348623157e308; }

DEVICE double not_a_number() { return __longlong_as_double(0x7ff8000000000000ll); }

DEVICE double infinity() { return __longlong_as_double(0x7ff0000000000000ll); }

// The largest of `n` values that are not negative, or NaN; the same for all threads of a block.
template <typename Value> DEVICE double largest_of(u64 n, Value value) {
    __shared__ double largest_of_warps[WARPS];
    double largest = 0.0;
    for (u64 i = threadIdx.x; i < n; i += THREADS) largest = rule::maximum(largest, value(i));
    for (u32 distance = WARP / 2; distance > 0; distance /= 2) {
        largest = rule::maximum(largest, __shfl_xor_sync(ALL, largest, distance));
    }
    // Nobody reads what the last call has left, nor writes what its caller reads.
    __syncthreads();
    if (threadIdx.x % WARP == 0) largest_of_warps[threadIdx.x / WARP] = largest;
    __syncthreads();
    for (u32 i = 0; i < WARPS; i++) largest = rule::maximum(largest, largest_of_warps[i]);
    return largest;
}

// Norms are stored as `Norm` of src/reduce.rs: those beyond f64 are negative, in units of BEYOND.
constexpr double BEYOND = 1.6069380442589903e60; // 2^200
constexpr double SMALLEST_NORMAL = 2.2250738585072014e-308;

// `Norm::product`.
DEVICE double product(double a, double b) {
    double product = a * b;
    return product == infinity() && is_finite(b) ? -(a / BEYOND * b) : product;
}

// `Norm::times`.
DEVICE double times(double norm, double unscale) {
    if (norm >= 0.0 || !is_finite(norm)) return product(unscale, norm);
    double units = -norm * unscale;
    return units * BEYOND == infinity() ? -units : units * BEYOND;
}

DEVICE double unit_of(double largest) {
    double unit = __longlong_as_double(__double_as_longlong(largest) & 0x7ff0000000000000ll);
    return unit > SMALLEST_NORMAL ? unit : SMALLEST_NORMAL;
}

// `NormType::is_out_of_range`.
DEVICE bool is_out_of_range(u32 norm, double reduced) {
    constexpr double smallest = 1.0261342003245941e-289; // 2^-960
    return (norm == L2 && reduced < smallest) || (norm != INF && reduced == infinity());
}

DEVICE double finish(u32 norm, double reduced, double unit) {
    return product(unit, norm == L2 ? sqrt(reduced) : reduced);
}

struct NormsArgs {
    const Gradient* gradients;
    double* leaves;
    double* folded; // as long as all leaves
    double* norms;  // of each tensor
    double unscale; // what norms are multiplied with
    u32 norm;
    u32 padding;
};

// src/kernel/cpu/measure.rs, `measure_in_units`; for one block. (Hardly any run has such gradients.)
DEVICE double norm_in_units(const NormsArgs& args, const Gradient& g, u64 leaves) {
    const double* values = reinterpret_cast<const double*>(g.values);
    u64 n = elements(g);
    double largest = largest_of(n, [&](u64 i) { return abs_of(values[i]); });
    if (largest == 0.0 || !is_finite(largest)) return largest;
    double unit = unit_of(largest);
    for (u64 leaf = threadIdx.x / WARP; leaf < leaves; leaf += WARPS) {
        u64 start = leaf * LEAF;
        double sum = fold_row(args.norm, n - start < LEAF ? n - start : LEAF, [&](u64 i) {
            return statistic(args.norm, values[start + i] / unit);
        });
        if (threadIdx.x % WARP == 0) args.leaves[g.first + leaf] = sum;
    }
    __syncthreads();
    return finish(args.norm, fold_tree(args.norm, args.leaves + g.first, args.folded + g.first, leaves), unit);
}

KERNEL(summary_norms, NormsArgs) {
    const Gradient& g = args.gradients[blockIdx.x];
    u64 leaves = (elements(g) + LEAF - 1) / LEAF;
    double sum = fold_tree(args.norm, args.leaves + g.first, args.folded + g.first, leaves);
    bool again = g.is_f64 != 0 && is_out_of_range(args.norm, sum);
    double norm = again ? norm_in_units(args, g, leaves) : finish(args.norm, sum, 1.0);
    if (threadIdx.x == 0) args.norms[blockIdx.x] = times(norm, args.unscale);
}

enum Clip { CLIP_NONE = 0, CLIP_NORM = 1, CLIP_GLOBAL_NORM = 2, CLIP_GRAD_NORM = 3 };

struct JoinArgs {
    const double* norms;
    double* squares; // two rows, each as long as the norms
    UpdateArgs* update_args;  // of each tensor
    Control* control;
    double limit; // of clipping
    u32 n;
    u32 norm;
    u32 clip;
    u32 skips; // whether a call that is not finite is skipped
};

DEVICE double keras_factor(double norm, double limit) { return norm <= limit ? 1.0 : limit / norm; }

// src/clip.rs, `Clip::scale`.
DEVICE double clipped(u32 clip, double limit, double scale, double own, double total) {
    if (clip == CLIP_NONE) return scale;
    double norm = clip == CLIP_NORM ? own : total;
    if (norm < 0.0) return scale * (limit / BEYOND) / -norm;
    if (clip == CLIP_NORM) return scale * keras_factor(norm, limit);
    if (clip == CLIP_GLOBAL_NORM) return scale * (is_finite(norm) ? keras_factor(norm, limit) : not_a_number());
    double factor = limit / (norm + 1e-6);
    return scale * (factor > 1.0 ? 1.0 : factor);
}

// src/reduce.rs, `NormType::join_in`; for one block.
DEVICE double join_in(const JoinArgs& args, double unit) {
    auto in_units = [&](u64 i) {
        double norm = args.norms[i];
        return norm < 0.0 ? -norm * (BEYOND / unit) : norm / unit;
    };
    double largest = largest_of(args.n, in_units);
    if (args.norm == INF) return largest;
    if (args.norm == L2 && (largest == 0.0 || !is_finite(largest))) return largest;
    double scale = unit_of(largest);
    for (u32 i = threadIdx.x; i < args.n; i += THREADS) {
        double norm = in_units(i);
        args.squares[i] = args.norm == L2 ? (norm / scale) * (norm / scale) : norm;
    }
    __syncthreads();
    double sum = fold_tree(args.norm, args.squares, args.squares + args.n, args.n);
    return args.norm == L2 ? scale * sqrt(sum) : sum;
}

// `NormType::join`.
DEVICE double join_norms(const JoinArgs& args) {
    bool has_beyond = largest_of(args.n, [&](u64 i) { return args.norms[i] < 0.0 ? 1.0 : 0.0; }) > 0.0;
    double unit = has_beyond ? BEYOND : 1.0;
    double joined = join_in(args, unit);
    if (joined == infinity() && largest_of(args.n, [&](u64 i) { return is_finite(args.norms[i]) ? 0.0 : 1.0; }) == 0.0) {
        unit = BEYOND;
        joined = join_in(args, unit);
    }
    return product(unit, joined);
}

KERNEL(summary_join, JoinArgs) {
    double total = join_norms(args);
    for (u32 i = threadIdx.x; i < args.n; i += THREADS) {
        Coefficients<double>& wide = args.update_args[i].wide;
        wide.grad_scale = clipped(args.clip, args.limit, wide.grad_scale, args.norms[i], total);
        args.update_args[i].narrow.grad_scale = float(wide.grad_scale);
    }
    if (threadIdx.x == 0) {
        args.control->total_norm = total;
        args.control->skip = args.skips != 0 && !is_finite(total) ? 1 : 0;
    }
}
