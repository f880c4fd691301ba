// Rows of tables: ids that are checked, rows that are gathered for lookups, and which are up to date.
//
// Launch: blocks of 256 threads; a warp, or a part of one for short rows, takes a row at a time, neighboring threads
// neighboring columns. Called by src/kernel/cuda.
#include "abi.cuh"

struct IdsArgs {
    u64 from;
    u32* to;      // NO_ROW where it is none
    u32* trained; // null, or the same with NO_ROW for the padding, too
    u32* bad;     // in host memory: becomes 1 if an id is no row
    u64 n;
    u32 rows;
    u32 padding;
};

// Compared before they are narrowed, so that nothing wraps around into the table.
template <typename T> DEVICE void read_ids(const IdsArgs& args) {
    u64 threads = u64(gridDim.x) * THREADS;
    for (u64 i = u64(blockIdx.x) * THREADS + threadIdx.x; i < args.n; i += threads) {
        long long id = reinterpret_cast<const T*>(args.from)[i];
        bool is_row = id >= 0 && id < (long long)args.rows;
        u32 row = is_row ? u32(id) : NO_ROW;
        args.to[i] = row;
        if (args.trained != nullptr) args.trained[i] = row == args.padding ? NO_ROW : row;
        // Every thread that writes it writes the same.
        if (!is_row) *args.bad = 1;
    }
}

KERNEL(rows_ids_u8, IdsArgs) { read_ids<unsigned char>(args); }
KERNEL(rows_ids_i16, IdsArgs) { read_ids<short>(args); }
KERNEL(rows_ids_i32, IdsArgs) { read_ids<int>(args); }
KERNEL(rows_ids_u32, IdsArgs) { read_ids<u32>(args); }
KERNEL(rows_ids_i64, IdsArgs) { read_ids<long long>(args); }

struct GatherArgs {
    const u32* ids; // each one the number of a row, or NO_ROW
    u64 table;
    u64 out;
    u64 n;
    u64 row_len; // in words
};

DEVICE u16 ones(u16) { return 0xffff; }
DEVICE u32 ones(u32) { return 0xffffffff; }
DEVICE uint2 ones(uint2) { return {0xffffffff, 0xffffffff}; }
DEVICE uint4 ones(uint4) { return {0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}; }

// A row that the table does not have is NaN, which is all ones in every type.
template <typename W> DEVICE void gather(const GatherArgs& args) {
    Columns columns = Columns::of(args.row_len);
    for (u64 i = columns.row; i < args.n; i += columns.rows_at_once) {
        u32 id = args.ids[i];
        const W* from = reinterpret_cast<const W*>(args.table) + id * args.row_len;
        W* to = reinterpret_cast<W*>(args.out) + i * args.row_len;
        for (u64 j = columns.first; j < args.row_len; j += columns.count) to[j] = id == NO_ROW ? ones(W()) : from[j];
    }
}

// By the bytes of a word.
KERNEL(rows_gather_2, GatherArgs) { gather<u16>(args); }
KERNEL(rows_gather_4, GatherArgs) { gather<u32>(args); }
KERNEL(rows_gather_8, GatherArgs) { gather<uint2>(args); }
KERNEL(rows_gather_16, GatherArgs) { gather<uint4>(args); }

struct MarkArgs {
    u32* marks;
    const u32* rows; // null for all of them; of others than those of the table, none
    u64 n;
    u64 all;
    u32 kept;  // bits of a mark that stay
    u32 added; // and those that are added
};

// Which rows are up to date: src/table/exact.rs, src/mark.rs.
KERNEL(rows_mark, MarkArgs) {
    u64 threads = u64(gridDim.x) * THREADS;
    for (u64 i = u64(blockIdx.x) * THREADS + threadIdx.x; i < args.n; i += threads) {
        u64 row = args.rows != nullptr ? args.rows[i] : i;
        // Named several times, a row gets the same mark each time: what was added the first time is added again.
        if (row < args.all) args.marks[row] = (args.marks[row] & args.kept) | args.added;
    }
}
