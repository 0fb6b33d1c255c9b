// Recurrences over a single row of a sequence.
#pragma once
#include "recurrence.cuh"

// Shared memory of a block that computes a single row.
struct TokenMemory {
    // The keys of the interval's tokens, and the query.
    alignas(16) u8 keys[TILE_BYTES];
    alignas(16) u8 query[ROW_BYTES];
    // For each warp: factors on the u of the tokens in what the row computes from its key, and from its query.
    float factors[WARPS][2][INTERVAL];
    // The inputs u of each warp, token by token.
    float inputs[WARPS][INTERVAL][COLUMNS + 4];
};

// Like `compute_prompt`, for a sequence with a single row, with the same operations in the same order.
template <bool DELTA, class Gates>
INLINE void compute_token(
    TokenMemory& shared, const Columns& columns, const Rows& rows, const Gates& gates, float scale,
    const Sequence& sequence, float* states, u64 slot
) {
    const u32 chunks = columns.chunks(), lane = lane_id(), warp = warp_id(), group = lane / 4;
    const bool has_warp = columns.has_warp(), begins = sequence.before == NONE;
    const Place place(columns);
    const float* before = states + (begins ? 0 : u64(sequence.before) * slot);
    float* after = states + u64(sequence.after) * slot;
    const bool moves = sequence.after != sequence.before;
    const u32 token = begins ? 0 : sequence.start % INTERVAL;

#pragma unroll
    for (u32 i = 0; i < INTERVAL * CHUNKS / (WARPS * 32); i++) {
        const u32 index = i * WARPS * 32 + threadIdx.x, row = index / CHUNKS, chunk = index % CHUNKS;
        if (row > token) continue;
        const void* key = row < token ? (const void*)(before + place.keys + (row * chunks + chunk) * 4)
                                      : (const void*)(rows.keys + chunk * 8);
        copy_async(shared.keys + place_in_tile(row, chunk), key, chunk < chunks);
    }
    if (const u32 chunk = threadIdx.x; chunk < CHUNKS) {
        copy_async(shared.query + chunk * 16, rows.queries + chunk * 8, chunk < chunks);
    }
    copy_async_commit();

    Matrix matrix;
    // Each half of the lanes has the columns of the warp: the first one for u, the second for the result.
    const u32 column = lane % COLUMNS, half = lane / COLUMNS;
    float inputs[INTERVAL - 1], value = 0.0f, product = 1.0f;
    if (token > 0 && lane < INTERVAL) product = before[place.decays + lane];
    if (has_warp) {
        read_matrix(matrix, begins ? nullptr : before + place.matrix, chunks);
        value = to_float(rows.values[warp * COLUMNS + column]);
#pragma unroll
        for (u32 i = 0; i < INTERVAL - 1; i++) {
            inputs[i] = i < token ? before[place.inputs + i * columns.dim + column] : 0.0f;
        }
    }
    const float2 gate = gates.of(gates.read(0));
    // Lane 0 has r(t), and lane i + 1 has r(t, i).
    if (lane <= token) product *= gate.x;
    copy_async_wait<0>();
    __syncthreads();

    if (sequence.after != NONE && token < INTERVAL - 1) {
#pragma unroll 1
        for (u32 index = threadIdx.x; index < (token + 1) * CHUNKS; index += WARPS * 32) {
            const u32 row = index / CHUNKS, chunk = index % CHUNKS;
            if ((row < token && !moves) || chunk >= chunks) continue;
            reinterpret_cast<uint4*>(after + place.keys)[row * chunks + chunk] =
                *reinterpret_cast<const uint4*>(shared.keys + place_in_tile(row, chunk));
        }
        if (warp == 0 && lane < INTERVAL) after[place.decays + lane] = product;
    }
    if (!has_warp) return;

    // The instructions take eight rows: the first is the key of a delta net, and the others are the query.
    const bool is_key = DELTA && lane % 8 == 0;
    const SharedRow row(is_key ? shared.keys : shared.query, is_key ? token : 0, lane / 8);
    const SharedRow keys(shared.keys, min(lane % 16, token), lane / 16);
    float products[4], squares, key_scale = 1.0f, query_scale = 1.0f;
    multiply_rows<DELTA>(products, squares, keys, row, chunks);
    if (DELTA) {
        const float length = inverse_length(squares);
        key_scale = __shfl_sync(FULL_WARP, length, 0);
        query_scale = __shfl_sync(FULL_WARP, length, 4) * scale;
    }
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        const float decay = __shfl_sync(FULL_WARP, product, group + i * 8 + 1);
        if (lane % 4 != 0) continue;
        const float of_key = DELTA ? products[2 * i] * key_scale : 0.0f;
        const float of_query = DELTA ? products[2 * i + 1] * query_scale : products[2 * i + 1];
        shared.factors[warp][0][group + i * 8] = of_key * decay;
        shared.factors[warp][1][group + i * 8] = of_query * decay;
    }
    __syncwarp();
    float sums[1][2][4] = {};
    multiply_matrix(sums, matrix, row, chunks);
    float of_columns[4];
#pragma unroll
    for (u32 i = 0; i < 4; i++) of_columns[i] = __shfl_sync(FULL_WARP, sums[0][0][i] + sums[0][1][i], lane % 8 * 4);
    const bool lower = column < 8;
    const float of_key = lower ? of_columns[0] : of_columns[2], of_query = lower ? of_columns[1] : of_columns[3];
    const float decay = __shfl_sync(FULL_WARP, product, 0);
    // The sum for u in the first half of the lanes, and for the result in the second.
    float sum = of_query * (DELTA ? decay * query_scale : decay);
    if (half == 0) sum = DELTA ? value - of_key * (decay * key_scale) : value * gate.y;
#pragma unroll
    for (u32 i = 0; i < INTERVAL - 1; i++) {
        if (i >= token) break;
        const float factor = shared.factors[warp][half][i];
        if (DELTA || half == 1) sum = fmaf(half == 0 ? -factor : factor, inputs[i], sum);
    }
    float own = __shfl_sync(FULL_WARP, sum, column);
    if (DELTA) own *= gate.y * key_scale;
    float result = fmaf(shared.factors[warp][1][token], own, sum);
    if (!DELTA) result = fmaf(scale, value, result);
    if (half == 1) rows.out[warp * COLUMNS + column] = to_t(result);
    if (sequence.after == NONE) return;

    if (token < INTERVAL - 1) {
        if (half == 0) {
#pragma unroll
            for (u32 i = 0; i < INTERVAL - 1; i++) {
                if (i < token && moves) after[place.inputs + i * columns.dim + column] = inputs[i];
            }
            after[place.inputs + token * columns.dim + column] = own;
        }
        if (!moves) return;
    } else {
        float(&all)[INTERVAL][COLUMNS + 4] = shared.inputs[warp];
        if (half == 0) {
#pragma unroll
            for (u32 i = 0; i < INTERVAL - 1; i++) all[i][column] = inputs[i];
            all[INTERVAL - 1][column] = own;
        }
        __syncwarp();
        float scaled[2][4];
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            const u32 of = i / 2 * 8 + lane % 4 * 2 + i % 2;
            const float decay_of = __shfl_sync(FULL_WARP, product, of + 1);
#pragma unroll
            for (u32 c = 0; c < 2; c++) scaled[i / 2][c * 2 + i % 2] = all[of][group + c * 8] * decay_of;
        }
        advance_matrix(matrix, decay, scaled, SharedRow(shared.keys, lane % 8, lane / 8), chunks);
        if (sequence.kept_rows != 0) write_matrix(states + u64(sequence.kept) * slot + place.matrix, matrix, chunks);
    }
    write_matrix(after + place.matrix, matrix, chunks);
}
