// Code that the matrix products share: which rows and outputs a block computes, how it copies rows of x
// to shared memory, and how it writes results.
//
// All products add in the same order, whatever the tile. The inputs are divided into units, which
// depend only on the number of inputs. Within a unit, an output has one accumulator that takes the
// inputs sixteen at a time in ascending order, and the sums of the units are added in ascending
// order. So a row's results do not depend on the tile, on the other rows of the step, or on how many
// blocks share the units of a tile. See linear.cu and linear_quant.cu for the units.
#pragma once
#include "arrival.cuh"
#include "gate.cuh"

// Like `copy_async` and `load_matrices` of common.cuh, for an address that is already an address in
// shared memory.
INLINE void copy_to_shared(u32 shared, const void* global, bool wanted) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(wanted ? 16 : 0)
                 : "memory");
}
INLINE void load_matrices(u32 (&out)[4], u32 row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(row)
                 : "memory");
}

// Keeps the compiler from recomputing a value wherever it is used.
INLINE void settle(u32& x) { asm volatile("" : "+r"(x)); }

// The part of the result that a block computes.
struct Tile {
    // The first row of the tile, and the end of the rows of its expert (or of all rows). The tile is empty
    // if `row` is not below `row_end`.
    u32 row, row_end;
    // Index of the tile among the tiles of outputs.
    u32 column;
    u32 expert;
};

// Returns tile `index` of `columns × row_tiles` tiles. Up to eight tiles of rows advance together through
// the outputs, so that blocks that run at the same time read the same rows of x and the same rows of
// the weights.
//
// `expert_tiles`, if not null, lists the tiles of rows: {expert, first row, end of the expert's
// rows, unused}; see `group` in experts.cu.
INLINE Tile tile_of(u32 index, u32 columns, u32 row_tiles, const uint4* expert_tiles, u32 rows, u32 tile_rows) {
    constexpr u32 TOGETHER = 8;
    Tile tile;
    tile.column = index;
    u32 row_tile = 0;
    // A division takes as long as an iteration of the loop that follows. A single tile of rows needs none.
    if (row_tiles > 1) {
        const u32 first = index / (TOGETHER * columns) * TOGETHER;
        const u32 together = min(TOGETHER, row_tiles - first);
        index -= first * columns;
        tile.column = index / together;
        row_tile = first + index % together;
    }
    if (expert_tiles) {
        wait_for_kernels_before();
        const uint4 listed = expert_tiles[row_tile];
        tile.expert = listed.x;
        tile.row = listed.y;
        tile.row_end = listed.z;
    } else {
        tile.expert = 0;
        tile.row = row_tile * tile_rows;
        tile.row_end = rows;
    }
    return tile;
}

// The units of a tile that a block computes. gridDim.z blocks share the units of a tile, in ascending order.
struct Units {
    u32 first, end;
    // The end of the units of the first block, and the number of all units.
    u32 first_end, all;

    INLINE explicit Units(u32 count) : first(0), end(count), first_end(count), all(count) {
        // A block that computes all units saves these three divisions.
        if (gridDim.z > 1) {
            first = blockIdx.z * count / gridDim.z;
            end = (blockIdx.z + 1) * count / gridDim.z;
            first_end = count / gridDim.z;
        }
    }

    // Returns whether the block adds up the sums of its units, which requires that it has the first unit.
    // Other blocks store the sum of each of their units.
    INLINE bool adds() const { return blockIdx.z == 0; }
};

// Returns whether several blocks share the units of each tile.
INLINE bool is_shared() { return gridDim.z > 1; }

// Memory for the sums of blocks that share the units of a tile: the total of the first block, and then
// the sum of each unit of the other blocks.
struct SharedSums {
    // Maximum number of tiles whose units are shared (src/device/cuda/units.rs).
    static constexpr u32 COUNTERS = 1024;

    u32* arrived;
    float* at;
    u32 count;

    // `memory` has the counters, which are zero between launches, and then the sums of all tiles, each of
    // `size` floats. `index` is the index of the tile, and `sums` the number of sums per tile.
    INLINE SharedSums(u32* memory, u32 index, u32 size, u32 sums) : arrived(memory + index), count(sums) {
        at = reinterpret_cast<float*>(memory + COUNTERS) + (u64)index * sums * size;
    }

    // Returns element `i` of the `size` elements of the tile's total, adding the sums in order. The block
    // must be the last one to arrive.
    INLINE float total(u32 i, u32 size) const {
        float total = 0.0f;
#pragma unroll 4
        for (u32 place = 0; place < count; place++) total += __ldcg(at + place * size + i);
        return total;
    }
};

// Returns the offset of the 16-byte chunk `chunk` of row `row` in a tile in shared memory. The chunks with
// the same number in eight consecutive rows lie in eight different sets of banks. `CHUNKS`, the number
// of chunks per row, is a multiple of eight.
template <int CHUNKS>
INLINE u32 swizzled(u32 row, u32 chunk) {
    return (row * CHUNKS + (chunk ^ (row & 7))) * 16;
}

// How the `THREADS` threads of a block copy `ROWS` rows of `inputs` elements to shared memory, `DEPTH`
// elements of each row at a time. A thread always copies the same rows, so their addresses are found
// once, and an iteration costs little more than the copies.
template <int ROWS, int DEPTH, int THREADS>
struct RowCopies {
    static constexpr u32 CHUNKS = DEPTH / 8, AT_ONCE = THREADS / CHUNKS, EACH = ROWS / AT_ONCE;
    static_assert(THREADS % CHUNKS == 0 && ROWS % AT_ONCE == 0, "each thread copies equally much");
    // Then a thread's rows all have the same swizzle, or alternate between two.
    static_assert(AT_ONCE % 4 == 0, "the rows of a thread are a multiple of four apart");

    // Number of the thread's rows that exist, which are the first ones.
    u32 existing;
    // Offset of the thread's chunk of its first row in a tile.
    u32 place;
    // For each of the thread's rows, the next chunk to copy, counted in chunks from `from`.
    const u8* from;
    u32 chunks[EACH];

    // Row i of the tile is row `row_of(i)` of x for i below `rows`; for other i, it may be any number.
    template <class RowOf>
    INLINE RowCopies(const T* x, u32 rows, u32 inputs, RowOf row_of) : from(reinterpret_cast<const u8*>(x)) {
        const u32 row = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
        existing = row < rows ? (rows - row + AT_ONCE - 1) / AT_ONCE : 0;
        place = swizzled<CHUNKS>(row, chunk);
        settle(existing), settle(place);
#pragma unroll
        for (u32 i = 0; i < EACH; i++) {
            chunks[i] = row_of(row + i * AT_ONCE) * (inputs / 8) + chunk;
            settle(chunks[i]);
        }
    }

    // Starts to copy the next `DEPTH` elements of all rows. Rows that do not exist get zeros, and so does
    // the thread's chunk unless it is `inside` the rows.
    INLINE void start(u32 shared, bool inside) {
        // A copy that is not wanted reads nothing, so its address need not be valid.
        const u32 wanted = inside ? existing : 0;
#pragma unroll
        for (u32 i = 0; i < EACH; i++) {
            const u32 to = (place ^ (i * AT_ONCE % 8 * 16)) + i * AT_ONCE * DEPTH * 2;
            copy_to_shared(shared + to, from + (u64)chunks[i] * 16, i < wanted);
        }
        from += DEPTH * 2;
    }
};

// Maps a row of the tile to a row of x.
struct RowOf {
    const u32* index;
    const Tile& tile;

    INLINE u32 operator()(u32 row) const {
        row += tile.row;
        return index && row < tile.row_end ? index[row] : row;
    }
};

// The address of a lane's row of a 16 × 16 operand. For a step, the offset in the tile is
// `row + (chunk ^ step · 32)`.
struct LaneAddress {
    u32 row, chunk;
    // The swizzle changes only the lowest three bits of a chunk's number. Four steps are eight chunks, a
    // constant offset.
    INLINE u32 at(int step) const { return row + (chunk ^ (step % 4 * 32)) + step / 4 * 128; }
};

template <int CHUNKS>
INLINE LaneAddress lane_address(u32 row, u32 chunk) {
    return {row * CHUNKS * 16, (chunk ^ (row & 7)) * 16};
}

// Returns the address of operand a: the 16 rows of x from `row` on.
template <int CHUNKS>
INLINE LaneAddress rows_address(u32 row) {
    u32 lane = lane_id();
    return lane_address<CHUNKS>(row + (lane & 15), lane >> 4);
}

// How results are written: in the activation type, or as float32.
constexpr u32 AS_ACTIVATIONS = 0, AS_FLOATS = 1;
// The first half of the rows of W gives gates, the second half what they are multiplied with. The
// activation of each gate times its counterpart is written, in the activation type.
constexpr u32 SILU_GATED = 2, GELU_GATED = 3;
INLINE bool is_gated(u32 mode) { return mode >= SILU_GATED; }

// Where and how results are written.
struct Output {
    void* out;
    const float* bias;
    u32 outputs, stride, mode;
};

// Maps output `i` of a tile to a row of W, counted from the tile's first row. The first half of the
// outputs of a gated tile are gates, the second half what they are multiplied with.
struct OutputOf {
    u32 half, apart;

    INLINE OutputOf(u32 tile_outputs, u32 outputs, u32 mode)
        : half(is_gated(mode) ? tile_outputs / 2 : tile_outputs), apart(outputs - half) {}
    INLINE u32 operator()(u32 i) const { return i < half ? i : i + apart; }
};

// Writes `x` or, in a gated mode, the activation of `x` times `up`. `row` is counted from the tile's first row.
INLINE void write_result(const Output& to, const Tile& tile, u32 row, u32 output, float x, float up) {
    if (tile.row + row >= tile.row_end || output >= to.outputs) return;
    if (to.bias) x += to.bias[output];
    if (is_gated(to.mode)) {
        if (to.bias) up += to.bias[to.outputs + output];
        // Both are rounded as if they had been written.
        x = gated(to_float(to_t(x)), to_float(to_t(up)), to.mode == GELU_GATED);
    }
    const u64 index = (u64)(tile.row + row) * to.stride + output;
    if (to.mode == AS_FLOATS) {
        static_cast<float*>(to.out)[index] = x;
    } else {
        static_cast<T*>(to.out)[index] = to_t(x);
    }
}

// Writes the 16 × 8 results of an accumulator to a tile in shared memory. Rows of the tile are
// `columns + 8` floats apart, so that the lanes use all banks.
INLINE void keep_matrix(float* shared, u32 columns, u32 row, u32 column, const float (&sum)[4]) {
    u32 lane = lane_id();
    float* to = shared + (row + lane / 4) * (columns + 8) + column + lane % 4 * 2;
    *reinterpret_cast<float2*>(to) = make_float2(sum[0], sum[1]);
    *reinterpret_cast<float2*>(to + 8 * (columns + 8)) = make_float2(sum[2], sum[3]);
}

// Writes the results of a gated tile, which lie in shared memory in the layout of `keep_matrix`.
// `to.outputs` is a multiple of half the columns.
__device__ __noinline__ void write_gated(Output to, Tile tile, const float* shared, u32 rows, u32 columns) {
    const u32 width = columns / 2;
#pragma unroll 1
    for (u32 i = threadIdx.x; i < rows * width; i += blockDim.x) {
        const u32 column = i % width, row = i / width;
        const float* from = shared + row * (columns + 8) + column;
        write_result(to, tile, row, tile.column * width + column, from[0], from[width]);
    }
}

// Adds the bias to the `ROWS × COLUMNS` results of a tile and writes them. They lie in shared memory in
// the layout of `keep_matrix`; the first column is output `first`.
template <int ROWS, int COLUMNS>
INLINE void write_tile(const Output& to, const Tile& tile, const float* shared, u32 first) {
    constexpr u32 WIDTH = 4;
    u64 start = reinterpret_cast<u64>(to.out);
    u32 size = to.mode == AS_FLOATS ? 4 : 2;
    // Whether every group of four results is aligned, so that it can be written at once.
    bool aligned = (start + first * size) % (WIDTH * size) == 0 && to.stride % WIDTH == 0;
#pragma unroll 1
    for (u32 i = threadIdx.x; i < ROWS * COLUMNS / WIDTH; i += blockDim.x) {
        u32 row = i / (COLUMNS / WIDTH), column = i % (COLUMNS / WIDTH) * WIDTH;
        u32 output = first + column;
        if (tile.row + row >= tile.row_end || output >= to.outputs) continue;
        const float* from = shared + row * (COLUMNS + 8) + column;
        u64 index = (u64)(tile.row + row) * to.stride + output;
        float* out_full = static_cast<float*>(to.out) + index;
        T* out = static_cast<T*>(to.out) + index;
        if (aligned && output + WIDTH <= to.outputs) {
            float4 value = *reinterpret_cast<const float4*>(from);
            if (to.bias) {
                value.x += to.bias[output];
                value.y += to.bias[output + 1];
                value.z += to.bias[output + 2];
                value.w += to.bias[output + 3];
            }
            if (to.mode == AS_FLOATS) {
                *reinterpret_cast<float4*>(out_full) = value;
            } else {
                u32 low = bits(to_t2(value.x, value.y)), high = bits(to_t2(value.z, value.w));
                *reinterpret_cast<uint2*>(out) = make_uint2(low, high);
            }
            continue;
        }
#pragma unroll 1
        for (u32 c = 0; c < WIDTH && output + c < to.outputs; c++) {
            float value = from[c];
            if (to.bias) value += to.bias[output + c];
            if (to.mode == AS_FLOATS) {
                out_full[c] = value;
            } else {
                out[c] = to_t(value);
            }
        }
    }
}
