// Rows of tables: gathered for lookups, and the sums of their gradients.
//
// Launch: blocks of 256 threads; a warp, or a part of one for short rows, takes a row at a time, neighboring threads
// neighboring columns. Called by src/kernel/cuda.
#include "abi.cuh"

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

struct GatherArgs {
    const u32* ids; // each one the number of a row
    u64 table;
    u64 out;
    u64 n;
    u64 row_len; // in words
};

template <typename W> DEVICE void gather(const GatherArgs& args) {
    Columns columns = Columns::of(args.row_len);
    for (u64 i = columns.row; i < args.n; i += columns.rows_at_once) {
        const W* from = reinterpret_cast<const W*>(args.table) + u64(args.ids[i]) * args.row_len;
        W* to = reinterpret_cast<W*>(args.out) + i * args.row_len;
        for (u64 j = columns.first; j < args.row_len; j += columns.count) to[j] = from[j];
    }
}

// By the bytes of a word.
KERNEL(rows_gather_2, GatherArgs) { gather<u16>(args); }
KERNEL(rows_gather_4, GatherArgs) { gather<u32>(args); }
KERNEL(rows_gather_8, GatherArgs) { gather<uint2>(args); }
KERNEL(rows_gather_16, GatherArgs) { gather<uint4>(args); }

// `scale` times row `source` of gradient `part`.
struct Contribution {
    u32 part;
    u32 source;
    double scale;
};

enum DType { F64 = 0, F32 = 1, F16_ = 2, BF16_ = 3 };

// A gradient whose rows are summed.
struct Part {
    u64 values;
    u32 dtype;
    u32 padding;
};

struct SumArgs {
    const u32* starts; // the contributions to row k are those from `starts[k]` to `starts[k + 1]`
    const Contribution* contributions;
    const Part* parts;
    u64 out; // rows, one after another
    u64 n;
    u64 row_len;
};

DEVICE float element(const Part& part, u64 i, float) {
    if (part.dtype == F16_) return Element<f16>::widen(reinterpret_cast<const f16*>(part.values)[i]);
    if (part.dtype == BF16_) return Element<bf16>::widen(reinterpret_cast<const bf16*>(part.values)[i]);
    return reinterpret_cast<const float*>(part.values)[i];
}

DEVICE double element(const Part& part, u64 i, double) { return reinterpret_cast<const double*>(part.values)[i]; }

// src/kernel/rows.rs, `RowsView::row`: in order of occurrence, in the type of the arithmetic.
template <typename A> DEVICE void sum_rows(const SumArgs& args) {
    Columns columns = Columns::of(args.row_len);
    for (u64 k = columns.row; k < args.n; k += columns.rows_at_once) {
        u32 begin = args.starts[k], end = args.starts[k + 1];
        for (u64 j = columns.first; j < args.row_len; j += columns.count) {
            A sum = A(0);
            for (u32 nth = begin; nth < end; nth++) {
                const Contribution& c = args.contributions[nth];
                A value = element(args.parts[c.part], c.source * args.row_len + j, A()) * A(c.scale);
                sum = nth == begin ? value : sum + value;
            }
            reinterpret_cast<A*>(args.out)[k * args.row_len + j] = sum;
        }
    }
}

KERNEL(rows_sum_f32, SumArgs) { sum_rows<float>(args); }
KERNEL(rows_sum_f64, SumArgs) { sum_rows<double>(args); }

struct MarkArgs {
    u32* marks;
    const u32* rows; // null for all of them; of others than those of the table, none
    u64 n;
    u64 all;
    u32 kept;  // bits of a mark that stay
    u32 added; // and those that are added
};

// Which rows are up to date: src/table/debts.rs.
KERNEL(rows_mark, MarkArgs) {
    u64 threads = u64(gridDim.x) * THREADS;
    for (u64 i = u64(blockIdx.x) * THREADS + threadIdx.x; i < args.n; i += threads) {
        u64 row = args.rows != nullptr ? args.rows[i] : i;
        // Named several times, a row gets the same mark each time: without `kept`, or alone.
        if (row < args.all) args.marks[row] = (args.marks[row] & args.kept) | args.added;
    }
}
