// Recurrences over all rows of a sequence, interval by interval.
#pragma once
#include "recurrence.cuh"

// Shared memory of a block that computes prompts.
struct PromptMemory {
    // The keys and queries of an interval and of the next one, and the values of both.
    alignas(16) u8 rows[2][2][TILE_BYTES];
    alignas(16) u8 values[2][INTERVAL][WIDTH * 2 + 16];
    // Factors on the u of token i in what token t computes from its key, and from its query: [i][t].
    alignas(8) float factors[2][INTERVAL][24];
    // For each warp and token t: r(t), and then r(t, i) of each token i.
    float decays[WARPS][INTERVAL][INTERVAL + 2];
    // Factors on keys, and on queries.
    float scales[2][INTERVAL];
    // Results of each warp.
    alignas(16) u8 out[WARPS][INTERVAL][COLUMNS * 2 + 16];
};

// Computes all rows of a sequence, interval by interval. With `DELTA`, for a delta net, where `scale` is a
// factor on queries; otherwise for Mamba-2, where it is the factor on the values that bypass the state.
// `states` points to the first slot.
template <bool DELTA, class Gates>
INLINE void compute_prompt(
    PromptMemory& shared, const Columns& columns, const Rows& rows, const Gates& gates, float scale,
    const Sequence& sequence, float* states, u64 slot
) {
    const u32 chunks = columns.chunks(), lane = lane_id(), warp = warp_id();
    const u32 group = lane / 4, first_token = lane % 4 * 2;
    const bool has_warp = columns.has_warp(), begins = sequence.before == NONE;
    const Place place(columns);
    const float* before = states + (begins ? 0 : u64(sequence.before) * slot);
    float* after = states + u64(sequence.after) * slot;
    const bool moves = sequence.after != sequence.before;
    // Tokens are counted from the start of the interval in which the first row is.
    const u32 begin = begins ? 0 : sequence.start % INTERVAL, all = begin + sequence.rows;

    auto start_copies = [&](u32 interval) {
        u8(&to)[2][TILE_BYTES] = shared.rows[interval % 2];
        const u32 first = interval == 0 ? begin : 0, end = min(all - interval * INTERVAL, INTERVAL);
        const u64 row_before = u64(interval * INTERVAL) - begin;
#pragma unroll
        for (u32 i = 0; i < INTERVAL * CHUNKS / (WARPS * 32); i++) {
            const u32 index = i * WARPS * 32 + threadIdx.x, row = index / CHUNKS, chunk = index % CHUNKS;
            const bool exists = chunk < chunks && row < end;
            const u64 at = (row_before + row) * rows.stride + chunk * 8;
            const void* key = rows.keys + at;
            if (row < first) key = before + place.keys + (row * chunks + chunk) * 4;
            copy_async(to[0] + place_in_tile(row, chunk), key, exists);
            copy_async(to[1] + place_in_tile(row, chunk), rows.queries + at, exists && row >= first);
        }
        const u32 row = threadIdx.x / (WIDTH / 8), chunk = threadIdx.x % (WIDTH / 8);
        const bool exists = row >= first && row < end && chunk * 8 < columns.width();
        const T* value = rows.values + (row_before + row) * rows.stride + chunk * 8;
        copy_async(shared.values[interval % 2][row] + chunk * 16, value, exists);
        copy_async_commit();
    };
    // Lane i has the gates of token i.
    auto read_gates = [&](u32 interval) {
        const u32 token = interval * INTERVAL + lane;
        return lane < INTERVAL && token >= begin && token < all ? gates.read(token - begin) : make_float2(0.0f, 0.0f);
    };

    start_copies(0);
    float2 next_gates = read_gates(0);
    Matrix matrix;
    // Lane 0 has r(t), and lane i + 1 has r(t, i), where t is the last token so far.
    float product = 1.0f;
    if (begin > 0 && lane < INTERVAL) product = before[place.decays + lane];
    if (has_warp) read_matrix(matrix, begins ? nullptr : before + place.matrix, chunks);

#pragma unroll 1
    for (u32 interval = 0; interval * INTERVAL < all; interval++) {
        const u32 first = interval == 0 ? begin : 0, end = min(all - interval * INTERVAL, INTERVAL);
        const u8(&tiles)[2][TILE_BYTES] = shared.rows[interval % 2];
        copy_async_wait<0>();
        __syncthreads();
        if ((interval + 1) * INTERVAL < all) start_copies(interval + 1);

        // The decay of the lane's token, and the factor on its value.
        float2 gate = gates.of(next_gates);
        if (lane < first || lane >= end) gate = make_float2(1.0f, 0.0f);
        next_gates = read_gates(interval + 1);
        float(&decays)[INTERVAL][INTERVAL + 2] = shared.decays[warp];
        if (interval > 0) product = 1.0f;
#pragma unroll 4
        for (u32 token = 0; token < INTERVAL; token++) {
            const float decay = __shfl_sync(FULL_WARP, gate.x, token);
            if (lane <= token) product *= decay;
            if (lane <= INTERVAL) decays[token][lane] = product;
        }
        __syncwarp();

        // Each warp multiplies the keys with one half of the keys or of the queries.
        const u32 kind = DELTA ? warp / 2 : 1, half_of_warp = warp % 2;
        if (DELTA || warp < 2) {
            float sums[4], squares;
            const SharedRow keys(tiles[0], lane % 16, lane / 16);
            const SharedRow row(tiles[kind], half_of_warp * 8 + lane % 8, lane / 8);
            multiply_rows<DELTA>(sums, squares, keys, row, chunks);
            const u32 token = half_of_warp * 8 + first_token;
            if (DELTA) {
                float length = inverse_length(squares);
                if (kind == 1) length *= scale;
                if (lane % 4 == 0) shared.scales[kind][half_of_warp * 8 + group] = length;
                const float even = __shfl_sync(FULL_WARP, length, lane % 4 * 8);
                const float odd = __shfl_sync(FULL_WARP, length, lane % 4 * 8 + 4);
                sums[0] *= even, sums[1] *= odd, sums[2] *= even, sums[3] *= odd;
            }
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                const u32 of = group + i * 8;
                float* to = &shared.factors[kind][of][token];
                const float even = sums[2 * i] * decays[token][of + 1];
                *reinterpret_cast<float2*>(to) = make_float2(even, sums[2 * i + 1] * decays[token + 1][of + 1]);
            }
        }
        constexpr u32 TILES = DELTA ? 4 : 2;
        float sums[TILES][2][4] = {};
        if (has_warp) multiply_matrix(sums, matrix, SharedRow(tiles[DELTA ? 0 : 1], lane % 8, lane / 8), chunks);
        __syncthreads();
        // A step that ends within the interval stores this for the next one, except for rows that are stored.
        const bool leaves = end < INTERVAL && sequence.after != NONE;
        const u32 first_left = interval > 0 || moves ? 0 : first;
        if (leaves) {
#pragma unroll 1
            for (u32 index = threadIdx.x; index < INTERVAL * CHUNKS; index += WARPS * 32) {
                const u32 row = index / CHUNKS, chunk = index % CHUNKS;
                if (row < first_left || row >= end || chunk >= chunks) continue;
                reinterpret_cast<uint4*>(after + place.keys)[row * chunks + chunk] =
                    *reinterpret_cast<const uint4*>(tiles[0] + place_in_tile(row, chunk));
            }
            if (warp == 0 && lane < INTERVAL) after[place.decays + lane] = product;
        }
        if (!has_warp) continue;

        // A lane has columns `group` and `group` + 8 of four tokens: `first_token`, the next one, and those
        // eight tokens later. The inputs u of a delta net have yet to be multiplied by `beta`.
        float u[2][4], result[2][4], beta[4];
        auto token_of = [&](u32 i) { return i / 2 * 8 + first_token + i % 2; };
        const T* values = reinterpret_cast<const T*>(shared.values[interval % 2]);
        constexpr u32 VALUE_STRIDE = sizeof(shared.values[0][0]) / sizeof(T);
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            const u32 token = token_of(i);
            const float decay = decays[token][0], factor = __shfl_sync(FULL_WARP, gate.y, token);
            beta[i] = DELTA ? factor * shared.scales[0][token] : 1.0f;
#pragma unroll
            for (u32 c = 0; c < 2; c++) {
                const u32 at = c * 2 + i % 2, query = DELTA ? 2 + i / 2 : i / 2;
                const float value = to_float(values[token * VALUE_STRIDE + warp * COLUMNS + group + c * 8]);
                const float of_query = sums[query][0][at] + sums[query][1][at];
                if (DELTA) {
                    const float of_key = sums[i / 2][0][at] + sums[i / 2][1][at];
                    u[c][i] = value - of_key * (decay * shared.scales[0][token]);
                    result[c][i] = of_query * (decay * shared.scales[1][token]);
                } else {
                    u[c][i] = value * factor;
                    result[c][i] = of_query * decay;
                }
            }
            if (token < first) {
                beta[i] = 1.0f;
#pragma unroll
                for (u32 c = 0; c < 2; c++) u[c][i] = before[place.inputs + token * columns.dim + group + c * 8];
            }
        }
        // Token by token: its u is now known, and is added to the u of later tokens and to the results.
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            if (half == 1 && end <= 8) break;
#pragma unroll 2
            for (u32 i = 0; i < 8; i++) {
                const u32 token = half * 8 + i, own = half * 2 + i % 2, source = (lane & ~3u) | i / 2;
                // Whether both tokens of the lane in this half are later, and whether one may be.
                const bool both = lane % 4 > i / 2, any = lane % 4 >= i / 2;
                float known[2];
#pragma unroll
                for (u32 c = 0; c < 2; c++) known[c] = __shfl_sync(FULL_WARP, u[c][own] * beta[own], source);
#pragma unroll
                for (u32 to = half * 2; to < 4; to++) {
                    const u32 other = token_of(to);
                    const bool later = to / 2 > half || (to % 2 > i % 2 ? any : both);
                    const bool takes = to / 2 > half || (to % 2 >= i % 2 ? any : both);
                    const float of_key = shared.factors[0][token][other], of_query = shared.factors[1][token][other];
#pragma unroll
                    for (u32 c = 0; c < 2; c++) {
                        if (DELTA) u[c][to] = later && other >= first ? fmaf(-of_key, known[c], u[c][to]) : u[c][to];
                        result[c][to] = takes ? fmaf(of_query, known[c], result[c][to]) : result[c][to];
                    }
                }
            }
        }
        T* out = reinterpret_cast<T*>(shared.out[warp]);
        constexpr u32 OUT_STRIDE = sizeof(shared.out[0][0]) / sizeof(T);
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            const u32 token = token_of(i);
#pragma unroll
            for (u32 c = 0; c < 2; c++) {
                const u32 column = group + c * 8;
                if (!DELTA) {
                    const float value = to_float(values[token * VALUE_STRIDE + warp * COLUMNS + column]);
                    result[c][i] = fmaf(scale, value, result[c][i]);
                }
                out[token * OUT_STRIDE + column] = to_t(result[c][i]);
                u[c][i] *= beta[i];
                if (leaves && token >= first_left && token < end) {
                    after[place.inputs + token * columns.dim + column] = u[c][i];
                }
            }
        }
        __syncwarp();
        if (const u32 token = lane / 2; token >= first && token < end) {
            T* to = rows.out + u64(interval * INTERVAL + token - begin) * rows.out_stride;
            *reinterpret_cast<uint4*>(to + warp * COLUMNS + lane % 2 * 8) =
                *reinterpret_cast<const uint4*>(out + token * OUT_STRIDE + lane % 2 * 8);
        }
        if (end < INTERVAL) break;
        float scaled[2][4];
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            const float decay = decays[INTERVAL - 1][token_of(i) + 1];
#pragma unroll
            for (u32 c = 0; c < 2; c++) scaled[i / 2][c * 2 + i % 2] = u[c][i] * decay;
        }
        advance_matrix(matrix, decays[INTERVAL - 1][0], scaled, SharedRow(tiles[0], lane % 8, lane / 8), chunks);
        if ((interval + 1) * INTERVAL == begin + sequence.kept_rows && sequence.kept_rows != 0) {
            write_matrix(states + u64(sequence.kept) * slot + place.matrix, matrix, chunks);
        }
    }
    if (has_warp && sequence.after != NONE && (all >= INTERVAL || moves)) {
        write_matrix(after + place.matrix, matrix, chunks);
    }
}
