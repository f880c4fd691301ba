// Ids of lookups become a gradient of rows: which rows there are, ascending, and for each the sum of what the lookups
// contribute to it, in order of occurrence. What src/kernel/occurrences.rs and src/kernel/rows.rs do in host memory.
//
// A stable radix sort, 8 bits at a time from the lowest, of pairs of a row and a position; the same row then stands at
// neighboring places, its positions ascending. Launches, each for all tables: `sort_keys`; for each 8 bits `sort_count`,
// `sort_scan` (a block for each table) and `sort_scatter`; `sort_heads`, `sort_list`; `sort_sum_*`. How many rows there are
// stays on the device: launches are made for as many as there can be. Called by src/kernel/cuda.
#include "abi.cuh"

// Of a pass; a thread for each.
constexpr u32 DIGITS = THREADS;
// Positions that a block ranks at a time, and how many of them are a thread's.
constexpr u32 TILE = 1024;
constexpr u32 TURNS = TILE / THREADS;
// Counts that are fetched before the first of them is added.
constexpr u32 AHEAD = 8;

enum DType { F64 = 0, F32 = 1, F16_ = 2, BF16_ = 3 };

// One lookup, or another gradient of rows.
struct LookupGrad {
    u64 values;        // rows of the gradient
    const u32* ids;    // to which row of the table each position contributes; beyond the table: to none
    const u32* bags;   // which row of the gradient it is; null: one for each position
    const u32* starts; // null, or of bags: each position contributes its part of a mean
    u64 factors;       // null, or what each position is multiplied with
    u32 begin;         // of its positions, among those of all parts
    u32 dtype;         // of the values
    u32 factors_dtype;
    u32 padding;
};

// The sort of one table.
struct Sorting {
    const LookupGrad* parts;
    u32* keys[2];   // a row, or `all` for none; passes go from one to the other
    u32* places[2]; // positions
    u32* counts;    // of each block and digit, then where the digits begin
    u32* heads;     // of each block: how many rows begin there
    u32* rows;      // ascending, each once
    u32* starts;    // row k has the places from `starts[k]` to `starts[k + 1]`
    u32* count;     // how many rows there are
    u64 sums;       // rows, one after another
    u64 row_len;
    u32 n;      // positions
    u32 all;    // rows of the table
    u32 parts_n;
    u32 passes;
    u32 blocks;
    u32 tiles; // of a block
    u32 chunk; // how many sums a block makes
    u32 padding;
};

struct SortArgs {
    const Sorting* tables;
    const Chunk* chunks; // units are blocks, or rows of sums
    u32 pass;
    u32 padding;
};

// The positions of one block.
struct Span {
    u64 begin, end;

    DEVICE Span of(const Sorting& table, u32 block) {
        u64 positions = u64(table.tiles) * TILE, begin = block * positions;
        return Span{begin, begin + positions < table.n ? begin + positions : table.n};
    }
};

DEVICE u32 digit(u32 key, u32 pass) { return key >> (8 * pass) & (DIGITS - 1); }

// The part that has a position.
DEVICE const LookupGrad& part_of(const Sorting& table, u32 position) {
    u32 first = 0, end = table.parts_n;
    while (end - first > 1) {
        u32 middle = first + (end - first) / 2;
        if (table.parts[middle].begin <= position) {
            first = middle;
        } else {
            end = middle;
        }
    }
    return table.parts[first];
}

// Of what all threads of a block have.
struct BlockSum {
    u32 before; // the sum of the threads before this one
    u32 all;

    DEVICE BlockSum of(u32 x) {
        __shared__ u32 warps[WARPS];
        u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, sum = x;
        for (u32 distance = 1; distance < WARP; distance *= 2) {
            u32 other = __shfl_up_sync(ALL, sum, distance);
            if (lane >= distance) sum += other;
        }
        if (lane == WARP - 1) warps[warp] = sum;
        __syncthreads();
        BlockSum result{sum - x, 0};
        for (u32 i = 0; i < WARPS; i++) {
            if (i < warp) result.before += warps[i];
            result.all += warps[i];
        }
        // The next sum has the same memory.
        __syncthreads();
        return result;
    }
};

KERNEL(sort_keys, SortArgs) {
    Chunk chunk = args.chunks[blockIdx.x];
    const Sorting& table = args.tables[chunk.tensor];
    Span span = Span::of(table, chunk.first);
    for (u64 p = span.begin + threadIdx.x; p < span.end; p += THREADS) {
        const LookupGrad& part = part_of(table, u32(p));
        u32 id = part.ids[p - part.begin];
        table.keys[0][p] = id < table.all ? id : table.all;
        table.places[0][p] = u32(p);
    }
}

// How often each digit is there, by blocks.
KERNEL(sort_count, SortArgs) {
    __shared__ u32 counts[DIGITS];
    Chunk chunk = args.chunks[blockIdx.x];
    const Sorting& table = args.tables[chunk.tensor];
    if (args.pass >= table.passes) return;
    Span span = Span::of(table, chunk.first);
    const u32* keys = table.keys[args.pass % 2];
    counts[threadIdx.x] = 0;
    __syncthreads();
    for (u64 p = span.begin + threadIdx.x; p < span.end; p += THREADS) atomicAdd(&counts[digit(keys[p], args.pass)], 1u);
    __syncthreads();
    table.counts[u64(chunk.first) * DIGITS + threadIdx.x] = counts[threadIdx.x];
}

// How many of each digit are in the blocks before, and of all smaller digits.
KERNEL(sort_scan, SortArgs) {
    const Sorting& table = args.tables[blockIdx.x];
    if (args.pass >= table.passes) return;
    u32 total = 0;
    for (u32 from = 0; from < table.blocks; from += AHEAD) {
        u32 counts[AHEAD];
#pragma unroll
        for (u32 i = 0; i < AHEAD; i++) {
            counts[i] = from + i < table.blocks ? table.counts[u64(from + i) * DIGITS + threadIdx.x] : 0;
        }
#pragma unroll
        for (u32 i = 0; i < AHEAD; i++) {
            if (from + i < table.blocks) table.counts[u64(from + i) * DIGITS + threadIdx.x] = total;
            total += counts[i];
        }
    }
    table.counts[u64(table.blocks) * DIGITS + threadIdx.x] = BlockSum::of(total).before;
}

// Each key to its new place. In a tile a warp has TURNS times 32 neighbors, so that equal digits stay in order: those of
// the warps before come first, then those of the turns before, then those of the lanes before.
KERNEL(sort_scatter, SortArgs) {
    __shared__ u32 offsets[DIGITS];
    __shared__ u32 ranks[WARPS][DIGITS];
    Chunk chunk = args.chunks[blockIdx.x];
    const Sorting& table = args.tables[chunk.tensor];
    if (args.pass >= table.passes) return;
    Span span = Span::of(table, chunk.first);
    const u32 *keys = table.keys[args.pass % 2], *places = table.places[args.pass % 2];
    u32 *to_keys = table.keys[1 - args.pass % 2], *to_places = table.places[1 - args.pass % 2];
    u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    offsets[threadIdx.x] = table.counts[u64(chunk.first) * DIGITS + threadIdx.x] +
                           table.counts[u64(table.blocks) * DIGITS + threadIdx.x];
    for (u64 tile = span.begin; tile < span.end; tile += TILE) {
        for (u32 i = 0; i < WARPS; i++) ranks[i][threadIdx.x] = 0;
        __syncthreads();
        u32 own[TURNS], rank[TURNS];
#pragma unroll
        for (u32 turn = 0; turn < TURNS; turn++) {
            u64 p = tile + warp * (TILE / WARPS) + turn * WARP + lane;
            own[turn] = p < span.end ? keys[p] : 0;
            // No digit: threads beyond the end are alike among themselves.
            u32 mine = p < span.end ? digit(own[turn], args.pass) : DIGITS;
            u32 alike = __match_any_sync(ALL, mine);
            u32 before = mine < DIGITS ? ranks[warp][mine] : 0;
            __syncwarp(ALL);
            u32 first = u32(__ffs(int(alike))) - 1;
            if (lane == first && mine < DIGITS) ranks[warp][mine] = before + u32(__popc(alike));
            __syncwarp(ALL);
            rank[turn] = before + u32(__popc(alike & ((1u << lane) - 1)));
        }
        __syncthreads();
        u32 offset = offsets[threadIdx.x];
        for (u32 i = 0; i < WARPS; i++) {
            u32 count = ranks[i][threadIdx.x];
            ranks[i][threadIdx.x] = offset;
            offset += count;
        }
        offsets[threadIdx.x] = offset;
        __syncthreads();
#pragma unroll
        for (u32 turn = 0; turn < TURNS; turn++) {
            u64 p = tile + warp * (TILE / WARPS) + turn * WARP + lane;
            if (p < span.end) {
                u32 to = ranks[warp][digit(own[turn], args.pass)] + rank[turn];
                to_keys[to] = own[turn];
                to_places[to] = places[p];
            }
        }
        __syncthreads();
    }
}

// Whether a row begins at a place of the sorted keys.
DEVICE bool is_head(const u32* keys, u64 p, u32 all) { return keys[p] < all && (p == 0 || keys[p - 1] != keys[p]); }

// How many rows begin in each block.
KERNEL(sort_heads, SortArgs) {
    Chunk chunk = args.chunks[blockIdx.x];
    const Sorting& table = args.tables[chunk.tensor];
    Span span = Span::of(table, chunk.first);
    const u32* keys = table.keys[table.passes % 2];
    u32 heads = 0;
    for (u64 p = span.begin + threadIdx.x; p < span.end; p += THREADS) heads += is_head(keys, p, table.all);
    heads = BlockSum::of(heads).all;
    if (threadIdx.x == 0) table.heads[chunk.first] = heads;
}

// The rows, and where each begins.
KERNEL(sort_list, SortArgs) {
    Chunk chunk = args.chunks[blockIdx.x];
    const Sorting& table = args.tables[chunk.tensor];
    Span span = Span::of(table, chunk.first);
    const u32* keys = table.keys[table.passes % 2];
    u32 before = 0, count = 0;
    for (u32 block = threadIdx.x; block < table.blocks; block += THREADS) {
        u32 heads = table.heads[block];
        count += heads;
        if (block < chunk.first) before += heads;
    }
    before = BlockSum::of(before).all;
    count = BlockSum::of(count).all;
    if (chunk.first == 0 && threadIdx.x == 0) *table.count = count;
    for (u64 start = span.begin; start < span.end; start += THREADS) {
        u64 p = start + threadIdx.x;
        bool is_inside = p < span.end, begins = is_inside && is_head(keys, p, table.all);
        BlockSum heads = BlockSum::of(begins);
        if (begins) {
            table.rows[before + heads.before] = keys[p];
            table.starts[before + heads.before] = u32(p);
        }
        before += heads.all;
        // Where the last row ends: at the first place of no row, or at the end.
        if (is_inside && keys[p] == table.all && (p == 0 || keys[p - 1] < table.all)) table.starts[count] = u32(p);
        if (is_inside && p + 1 == table.n && keys[p] < table.all) table.starts[count] = table.n;
    }
}

DEVICE float element(u64 values, u32 dtype, u64 i, float) {
    if (dtype == F16_) return Element<f16>::widen(reinterpret_cast<const f16*>(values)[i]);
    if (dtype == BF16_) return Element<bf16>::widen(reinterpret_cast<const bf16*>(values)[i]);
    return reinterpret_cast<const float*>(values)[i];
}

DEVICE double element(u64 values, u32, u64 i, double) { return reinterpret_cast<const double*>(values)[i]; }

// What a position contributes to a column of its row.
template <typename A> DEVICE A contribution(const Sorting& table, u32 position, u64 column) {
    const LookupGrad& part = part_of(table, position);
    u32 i = position - part.begin, source = part.bags != nullptr ? part.bags[i] : i;
    A value = element(part.values, part.dtype, source * table.row_len + column, A());
    if (part.starts != nullptr) value = value * A(1.0 / double(part.starts[source + 1] - part.starts[source]));
    if (part.factors != 0) value = value * element(part.factors, part.factors_dtype, i, A());
    return value;
}

// The rows of a single lookup, where they are of the type of the arithmetic and are added as they are; or null. A row that
// occurs thousands of times is added up by few threads, so there as much as possible has to be fetched ahead.
template <typename A> DEVICE const A* values_of(const Sorting& table) {
    const LookupGrad& part = table.parts[0];
    bool is_own = part.dtype == (sizeof(A) == 8 ? F64 : F32);
    bool is_plain = table.parts_n == 1 && part.bags == nullptr && part.starts == nullptr && part.factors == 0;
    return is_plain && is_own ? reinterpret_cast<const A*>(part.values) : nullptr;
}

// src/kernel/rows.rs, `RowsView::row`: in order of occurrence, in the type of the arithmetic. As many threads as a row has
// columns, up to a block, have a row; each adds up a column.
template <typename A> DEVICE void sum_rows(const SortArgs& args) {
    Chunk chunk = args.chunks[blockIdx.x];
    const Sorting& table = args.tables[chunk.tensor];
    u32 width = 1, count = *table.count;
    while (width < THREADS && width < table.row_len) width *= 2;
    u64 end = u64(chunk.first) + table.chunk;
    if (end > count) end = count;
    const u32* places = table.places[table.passes % 2];
    const A* values = values_of<A>(table);
    for (u64 k = chunk.first + threadIdx.x / width; k < end; k += THREADS / width) {
        u32 first = table.starts[k], last = table.starts[k + 1];
        for (u64 j = threadIdx.x % width; j < table.row_len; j += width) {
            A sum;
            if (values != nullptr) {
                sum = sum_in_order<32, A>(first, last, [&](u32 i) { return values[places[i] * table.row_len + j]; });
            } else {
                sum = sum_in_order<8, A>(first, last, [&](u32 i) { return contribution<A>(table, places[i], j); });
            }
            reinterpret_cast<A*>(table.sums)[k * table.row_len + j] = sum;
        }
    }
}

KERNEL(sort_sum_f32, SortArgs) { sum_rows<float>(args); }
KERNEL(sort_sum_f64, SortArgs) { sum_rows<double>(args); }
