// Code that the recurrences share: gated delta nets and Mamba-2, in the chunkwise form (Yang et al., 2024;
// Dao & Gu, 2024).
//
// The matrix S of a head, keys × columns, is advanced only at positions that are multiples of INTERVAL.
// Token t of an interval that begins with S has the key kₜ, the query qₜ, the input uₜ and the decay αₜ.
// With r(t, i) = α of token i + 1 · … · α of token t, and r(t) = α of the first token · … · α of token t,
//
//     its result is r(t) Sᵀqₜ + Σ_{i ≤ t} r(t, i) (kᵢ · qₜ) uᵢ,
//     and the next interval begins with r(L) S + Σᵢ r(L, i) kᵢ ⊗ uᵢ, where L is the last token.
//
// In Mamba-2, the keys are b, the queries are c, and uₜ is the scaled x. In a delta net, uₜ is
// β (vₜ − r(t) Sᵀkₜ − Σ_{i < t} r(t, i) (kᵢ · kₜ) uᵢ), which is computed token by token.
//
// Besides S, a state therefore holds data of the tokens of the current interval: their keys, their inputs
// u, and the products r of their decays. The order of every sum depends only on the position of the token
// in its interval. Sums over the elements of keys are those of the matrix instructions, in ascending order,
// where an element of a result depends only on its row of one operand and its column of the other. Sums
// over tokens are float32 operations, in ascending order. So results do not depend on how many tokens a
// step computes, nor on where it begins.
//
// Products with S use TF32. A 16-bit number is exact in TF32, and S is split into the sum of two TF32
// numbers, which is exact except for the last two bits.
#pragma once
#include "vector.cuh"

constexpr u32 INTERVAL = 16;
// Columns of a head per warp, warps per block, and columns of a head per block.
constexpr u32 COLUMNS = 16, WARPS = 4, WIDTH = WARPS * COLUMNS;
// The elements of a key are read in chunks of eight, which are 16 bytes. A key has at most CHUNKS chunks.
constexpr u32 CHUNKS = 16, ROW_BYTES = CHUNKS * 16, TILE_BYTES = INTERVAL * ROW_BYTES;

// A sequence of the step and its slots, as src/device/cuda/step.rs lays them out.
struct Sequence {
    // The first row, and the number of rows.
    u32 first, rows;
    // Slot of the state before the rows (NONE: zeros), and slot for the state after them (NONE: not stored).
    u32 before, after;
    // The state after `kept_rows` rows is also written to slot `kept`, unless `kept_rows` is 0.
    u32 kept_rows, kept;
    // Position of the first row.
    u32 start;
};

INLINE Sequence sequence_of(const uint4* sequences, u32 index) {
    const uint4 rows = sequences[2 * index], kept = sequences[2 * index + 1];
    return {rows.x, rows.y, rows.z, rows.w, kept.x, kept.y, kept.z};
}

// Returns ln(1 + e^x), which beyond 20 rounds to x.
INLINE float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }

// The columns that a block computes: part number `part` of a head, of up to WIDTH columns.
struct Columns {
    u32 head, part;
    // Columns of a head, and elements of its keys.
    u32 dim, keys;

    // Grid (heads · parts per head, sequences).
    INLINE Columns(u32 dim, u32 keys) : dim(dim), keys(keys) {
        const u32 parts = (dim + WIDTH - 1) / WIDTH;
        head = blockIdx.x / parts, part = blockIdx.x % parts;
    }
    // Return the first column of the block, and of the warp.
    INLINE u32 first() const { return part * WIDTH; }
    INLINE u32 first_of_warp() const { return first() + warp_id() * COLUMNS; }
    INLINE bool has_warp() const { return first_of_warp() < dim; }
    INLINE u32 width() const { return min(dim - first(), WIDTH); }
    INLINE u32 chunks() const { return keys / 8; }
};

// Offsets of the parts of a slot that a block reads and writes. A head has its matrix, for every 16 columns
// in the layout in which the lanes of a warp hold it; then INTERVAL rows of inputs u; and then, for each
// block, INTERVAL rows of keys and INTERVAL products of decays. See src/device/cuda/recurrent.rs.
struct Place {
    u32 matrix, inputs, keys, decays;

    INLINE explicit Place(const Columns& of) {
        const u32 parts = (of.dim + WIDTH - 1) / WIDTH, of_part = INTERVAL / 2 * of.keys + INTERVAL;
        const u32 head = of.head * (of.dim * (of.keys + INTERVAL) + parts * of_part);
        matrix = head + of.first_of_warp() * of.keys;
        inputs = head + of.dim * of.keys + of.first_of_warp();
        keys = head + of.dim * (of.keys + INTERVAL) + of.part * of_part;
        decays = keys + INTERVAL / 2 * of.keys;
    }
};

// Pointers to the rows of a sequence: to the keys and queries of the block's head, and to its first column.
struct Rows {
    const T *keys, *queries, *values;
    T* out;
    // Distances between rows, in elements.
    u32 stride, out_stride;
};

// Sᵀ of a warp: columns × keys. Of each chunk of keys, lane 4 g + t has {column g, keys 2 t and 2 t + 1} and
// {column g + 8, the same keys}, which is the layout of an accumulator of the matrix instructions.
typedef float Matrix[CHUNKS][4];

INLINE void read_matrix(Matrix& matrix, const float* from, u32 chunks) {
#pragma unroll
    for (u32 chunk = 0; chunk < CHUNKS; chunk++) {
        float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (from != nullptr && chunk < chunks) x = reinterpret_cast<const float4*>(from)[chunk * 32 + lane_id()];
        matrix[chunk][0] = x.x, matrix[chunk][1] = x.y, matrix[chunk][2] = x.z, matrix[chunk][3] = x.w;
    }
}

INLINE void write_matrix(float* to, const Matrix& matrix, u32 chunks) {
#pragma unroll
    for (u32 chunk = 0; chunk < CHUNKS; chunk++) {
        const float* x = matrix[chunk];
        if (chunk < chunks) reinterpret_cast<float4*>(to)[chunk * 32 + lane_id()] = make_float4(x[0], x[1], x[2], x[3]);
    }
}

// Prefetches the part of the matrix that a warp reads.
INLINE void prefetch_matrix(const Columns& columns, const Sequence& sequence, const float* states, u64 slot) {
    if (sequence.before == NONE || !columns.has_warp() || lane_id() != 0) return;
    const float* from = states + u64(sequence.before) * slot + Place(columns).matrix;
    prefetch(from, columns.keys * COLUMNS * sizeof(float));
}

// Computes d += a · b in TF32, where a is 16 × 8 and b is 8 × 8.
INLINE void multiply_tf32(float (&d)[4], const u32 (&a)[4], float b0, float b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}

// An accumulator as operand a, split into two summands. The instruction's inner index t is the accumulator's
// column 2 t, and t + 4 is column 2 t + 1. The second summand has 13 bits, of which TF32 keeps 11.
struct Split {
    u32 high[4], low[4];

    INLINE explicit Split(const float (&x)[4]) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float value = x[i % 2 * 2 + i / 2];
            high[i] = __float_as_uint(value) & 0xffffe000u;
            low[i] = __float_as_uint(value - __uint_as_float(high[i]));
        }
    }
};

INLINE float2 widened(u32 pair) { return to_float2(*reinterpret_cast<T2*>(&pair)); }

// Returns the offset of a chunk of keys or queries in a tile in shared memory. It is swizzled by the row, so
// that the same chunk of eight consecutive rows lies in different banks.
INLINE u32 place_in_tile(u32 row, u32 chunk) { return row * ROW_BYTES + (chunk ^ (row & 7)) * 16; }

// A row of a tile, for which a lane passes the addresses of chunks to ldmatrix: that of chunk `chunk` of
// each group of four chunks (`quad`) or of two chunks (`pair`).
struct SharedRow {
    u32 at, turned;

    INLINE SharedRow(const u8* tile, u32 row, u32 chunk)
        : at(shared_address(tile) + row * ROW_BYTES), turned((chunk ^ (row & 7)) * 16) {
        // Keeps the compiler from recomputing the addresses wherever they are used.
        asm volatile("" : "+r"(at), "+r"(turned));
    }
    // The swizzle changes only the lowest three bits of a chunk's number.
    INLINE u32 quad(u32 quad) const { return at + (turned ^ quad % 2 * 64) + quad / 2 * 128; }
    INLINE u32 pair(u32 pair) const { return at + (turned ^ pair % 4 * 32) + pair / 4 * 128; }
};

// Adds the products of Sᵀ and the rows of `TILES` tiles of eight rows each to `sums`, which are columns × rows.
// `row` is the lane's row of the first tile. The second sum of a tile is that of the second summands of S.
template <u32 TILES>
INLINE void multiply_matrix(float (&sums)[TILES][2][4], const Matrix& matrix, const SharedRow& row, u32 chunks) {
#pragma unroll
    for (u32 quad = 0; quad < CHUNKS / 4; quad++) {
        if (quad * 4 >= chunks) continue;
        u32 b[TILES][4];
#pragma unroll
        for (u32 tile = 0; tile < TILES; tile++) {
            load_matrices_at(b[tile], row.quad(quad) + tile * 8 * ROW_BYTES);
        }
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            const Split a(matrix[quad * 4 + i]);
#pragma unroll
            for (u32 tile = 0; tile < TILES; tile++) {
                const float2 x = widened(b[tile][i]);
                multiply_tf32(sums[tile][0], a.high, x.x, x.y);
                multiply_tf32(sums[tile][1], a.low, x.x, x.y);
            }
        }
    }
}

// S = decay · S + Σ key of a token ⊗ its u, over the tokens of a whole interval. `u` has an accumulator of
// columns × tokens for each half of the tokens. `row` is the lane's row of the first half of the keys.
INLINE void advance_matrix(
    Matrix& matrix, float decay, const float (&u)[2][4], const SharedRow& row, u32 chunks
) {
    const Split a[2] = {Split(u[0]), Split(u[1])};
#pragma unroll
    for (u32 quad = 0; quad < CHUNKS / 4; quad++) {
        if (quad * 4 >= chunks) continue;
        u32 b[2][4];
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            load_matrices_transposed_at(b[half], row.quad(quad) + half * 8 * ROW_BYTES);
        }
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            float (&sums)[4] = matrix[quad * 4 + i];
#pragma unroll
            for (int x = 0; x < 4; x++) sums[x] *= decay;
#pragma unroll
            for (u32 half = 0; half < 2; half++) {
                const float2 x = widened(b[half][i]);
                multiply_tf32(sums, a[half].high, x.x, x.y);
                multiply_tf32(sums, a[half].low, x.x, x.y);
            }
        }
    }
}

// Multiplies the keys of an interval's tokens with eight rows: lane 4 g + t gets the products of tokens g and
// g + 8 with rows 2 t and 2 t + 1. With `SQUARES`, `squares` becomes the sum of the squares of row g.
// `keys` is the lane's row lane % 16 of the keys, and `row` its row lane % 8 of the others.
template <bool SQUARES>
INLINE void multiply_rows(float (&sums)[4], float& squares, const SharedRow& keys, const SharedRow& row, u32 chunks) {
#pragma unroll
    for (int i = 0; i < 4; i++) sums[i] = 0.0f;
    squares = 0.0f;
#pragma unroll
    for (u32 quad = 0; quad < CHUNKS / 4; quad++) {
        if (quad * 4 >= chunks) continue;
        u32 b[4], a[4];
        load_matrices_at(b, row.quad(quad));
#pragma unroll
        for (u32 pair = 0; pair < 2; pair++) {
            load_matrices_at(a, keys.pair(quad * 2 + pair));
            matrix_multiply(sums, a, b[2 * pair], b[2 * pair + 1]);
        }
        if constexpr (SQUARES) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float2 x = widened(b[i]);
                squares = fmaf(x.y, x.y, fmaf(x.x, x.x, squares));
            }
        }
    }
    if constexpr (SQUARES) {
        squares += __shfl_xor_sync(FULL_WARP, squares, 1);
        squares += __shfl_xor_sync(FULL_WARP, squares, 2);
    }
}

// Returns 1 / √(Σ x² + ε).
INLINE float inverse_length(float squares) { return 1.0f / sqrtf(squares + 1e-6f); }
