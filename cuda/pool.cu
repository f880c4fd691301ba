// Rows that are pooled by bags, and what goes back to weights and maxima: src/kernel/cpu/rows.rs.
//
// Launch: blocks of 256 threads; a warp, or a part of one for short rows, takes a bag at a time, neighboring threads
// neighboring columns; `pool_dot_*` a warp for each id. Called by src/kernel/cuda.
#include "abi.cuh"

struct BagsArgs {
    const u32* starts; // the ids of bag b are those from `starts[b]` to `starts[b + 1]`
    u32* bags;         // of each id
    u64 n;             // ids
    u64 bags_n;
};

// The bag of each id: the last one that begins at it or before; empty ones begin where the next one does.
KERNEL(pool_bags, BagsArgs) {
    u64 threads = u64(gridDim.x) * THREADS;
    for (u64 i = u64(blockIdx.x) * THREADS + threadIdx.x; i < args.n; i += threads) {
        u64 first = 0, end = args.bags_n;
        while (end - first > 1) {
            u64 middle = first + (end - first) / 2;
            if (args.starts[middle] <= i) {
                first = middle;
            } else {
                end = middle;
            }
        }
        args.bags[i] = u32(first);
    }
}

struct PoolArgs {
    u64 table;
    const u32* ids;    // each the number of a row, or NO_ROW
    const u32* starts; // the ids of bag b are those from `starts[b]` to `starts[b + 1]`
    u64 factors;       // null, or what each row is multiplied with
    u64 out;
    u64 n; // bags
    u64 row_len;
    u32 mean;
    u32 padding;
};

// A column of the row of an id; NaN if there is none.
template <typename E> DEVICE typename Element<E>::Acc column_of(u64 table, u64 row_len, u32 id, u64 column) {
    typedef typename Element<E>::Acc A;
    if (id == NO_ROW) return A(from_bits(0x7fc00000));
    return Element<E>::widen(reinterpret_cast<const E*>(table)[id * row_len + column]);
}

// In the order of the ids, in the type of the arithmetic; a mean is divided once.
template <typename E> DEVICE void pool(const PoolArgs& args) {
    typedef typename Element<E>::Acc A;
    Columns columns = Columns::of(args.row_len);
    const E* factors = reinterpret_cast<const E*>(args.factors);
    for (u64 bag = columns.row; bag < args.n; bag += columns.rows_at_once) {
        u32 first = args.starts[bag], last = args.starts[bag + 1];
        for (u64 j = columns.first; j < args.row_len; j += columns.count) {
            A sum = sum_in_order<8, A>(first, last, [&](u32 i) {
                A value = column_of<E>(args.table, args.row_len, args.ids[i], j);
                return factors != nullptr ? value * Element<E>::widen(factors[i]) : value;
            });
            if (args.mean != 0 && last > first) sum = sum / A(last - first);
            reinterpret_cast<E*>(args.out)[bag * args.row_len + j] = Element<E>::narrow(sum);
        }
    }
}

KERNEL(pool_f64, PoolArgs) { pool<double>(args); }
KERNEL(pool_f32, PoolArgs) { pool<float>(args); }
KERNEL(pool_f16, PoolArgs) { pool<f16>(args); }
KERNEL(pool_bf16, PoolArgs) { pool<bf16>(args); }

struct DotArgs {
    u64 rows; // one for each id, as they were when they were pooled
    u64 grad; // a row for each bag
    const u32* bags; // of each id
    u64 out;
    u64 n; // ids
    u64 row_len;
};

// The product of the row of each id with the gradient of its bag, by the lanes of src/reduce.rs.
template <typename E> DEVICE void dot(const DotArgs& args) {
    typedef typename Element<E>::Acc A;
    u64 warps = u64(gridDim.x) * WARPS;
    for (u64 i = u64(blockIdx.x) * WARPS + threadIdx.x / WARP; i < args.n; i += warps) {
        const E* row = reinterpret_cast<const E*>(args.rows) + i * args.row_len;
        const E* grad = reinterpret_cast<const E*>(args.grad) + args.bags[i] * args.row_len;
        double sum = 0.0;
        for (u64 j = threadIdx.x % WARP; j < args.row_len; j += WARP) {
            sum = sum + double(Element<E>::widen(row[j])) * double(Element<E>::widen(grad[j]));
        }
        for (u32 distance = WARP / 2; distance > 0; distance /= 2) sum = sum + __shfl_down_sync(ALL, sum, distance);
        if (threadIdx.x % WARP == 0) reinterpret_cast<E*>(args.out)[i] = Element<E>::narrow(A(sum));
    }
}

KERNEL(pool_dot_f64, DotArgs) { dot<double>(args); }
KERNEL(pool_dot_f32, DotArgs) { dot<float>(args); }
KERNEL(pool_dot_f16, DotArgs) { dot<f16>(args); }
KERNEL(pool_dot_bf16, DotArgs) { dot<bf16>(args); }

struct LargestArgs {
    u64 values;        // a row for each id; of the gradient of the maxima, for each bag
    const u32* starts; // of bags
    u32* positions;    // from which row each element of the maxima is; NO_ROW in empty bags
    u64 out;
    u64 n; // bags
    u64 row_len;
};

// The largest of each column of each bag: the first of several, and a NaN is the largest.
template <typename E> DEVICE void largest(const LargestArgs& args) {
    typedef typename Element<E>::Acc A;
    Columns columns = Columns::of(args.row_len);
    const E* values = reinterpret_cast<const E*>(args.values);
    for (u64 bag = columns.row; bag < args.n; bag += columns.rows_at_once) {
        for (u64 j = columns.first; j < args.row_len; j += columns.count) {
            u32 best = NO_ROW;
            E largest{};
            A old = A(0);
            for (u32 k = args.starts[bag]; k < args.starts[bag + 1]; k++) {
                E value = values[k * args.row_len + j];
                A x = Element<E>::widen(value);
                if (best == NO_ROW || (old == old && (x > old || x != x))) {
                    best = k;
                    largest = value;
                    old = x;
                }
            }
            args.positions[bag * args.row_len + j] = best;
            reinterpret_cast<E*>(args.out)[bag * args.row_len + j] = largest;
        }
    }
}

KERNEL(pool_largest_f64, LargestArgs) { largest<double>(args); }
KERNEL(pool_largest_f32, LargestArgs) { largest<float>(args); }
KERNEL(pool_largest_f16, LargestArgs) { largest<f16>(args); }
KERNEL(pool_largest_bf16, LargestArgs) { largest<bf16>(args); }

// Each element of the gradient to where its value came from; all others are zero already.
template <typename E> DEVICE void scatter(const LargestArgs& args) {
    Columns columns = Columns::of(args.row_len);
    for (u64 bag = columns.row; bag < args.n; bag += columns.rows_at_once) {
        for (u64 j = columns.first; j < args.row_len; j += columns.count) {
            u32 row = args.positions[bag * args.row_len + j];
            if (row == NO_ROW) continue;
            const E* grad = reinterpret_cast<const E*>(args.values) + bag * args.row_len;
            reinterpret_cast<E*>(args.out)[row * args.row_len + j] = grad[j];
        }
    }
}

KERNEL(pool_scatter_f64, LargestArgs) { scatter<double>(args); }
KERNEL(pool_scatter_f32, LargestArgs) { scatter<float>(args); }
KERNEL(pool_scatter_f16, LargestArgs) { scatter<f16>(args); }
KERNEL(pool_scatter_bf16, LargestArgs) { scatter<bf16>(args); }
