// Recurrent layers: causal convolutions, gated delta nets (Yang et al., 2024), Mamba-2 (Dao & Gu,
// 2024), and the norms of their results.
//
// States are float32. `states` is the part of the first slot that belongs to the operation, and the
// slots are `slot_elements` numbers apart. The rows of a sequence are computed one after the other,
// with the same instructions in every step, so it does not matter how a sequence is cut into steps.
#include "gate.cuh"
#include "vector.cuh"

// A sequence of the step and its slots, as src/device/cuda/step.rs lays them out.
struct Sequence {
    // Its rows.
    u32 first, rows;
    // Slot of the state before them; NONE: zeros. Slot of the state after them; NONE: nowhere.
    u32 before, after;
    // The state after `kept_rows` rows goes to slot `kept`; after 0 rows: nowhere.
    u32 kept_rows, kept;
};

INLINE Sequence sequence_of(const uint4* sequences, u32 index) {
    const uint4 rows = sequences[2 * index], kept = sequences[2 * index + 1];
    return {rows.x, rows.y, rows.z, rows.w, kept.x, kept.y};
}

// Eight neighbouring channels of a convolution. The state has, for every sixteen channels, their
// inputs of the last `taps` − 1 tokens, the oldest first.
struct Channels {
    const T* input;
    const float* before;
    // Columns from a row to the next, and inputs in the state.
    u32 stride, tokens;
    // Columns from a channel to what it is multiplied by; 0: to nothing.
    int factor;

    // The inputs of a row, which may lie before the first one.
    INLINE void read(float (&x)[8], int row) const {
        if (row < 0 && before == nullptr) {
#pragma unroll
            for (int i = 0; i < 8; i++) x[i] = 0.0f;
        } else if (row < 0) {
            load8(x, before + (row + int(tokens)) * 16);
        } else {
            const T* from = input + u64(row) * stride;
            load8(x, from);
            if (factor == 0) return;
            float b[8];
            load8(b, from + factor);
#pragma unroll
            for (int i = 0; i < 8; i++) x[i] *= b[i];
        }
    }

    // Writes the state after `rows` rows. It may take the place of the one before: in ascending
    // order, nothing is overwritten that is still to be read.
    INLINE void write(float* to, u32 rows) const {
#pragma unroll 1
        for (u32 token = 0; token < tokens; token++) {
            float x[8];
            read(x, int(rows + token) - int(tokens));
            store8(to + token * 16, x);
        }
    }
};

// out = the convolution of the channels, which are columns `column` and the next ones of the input. If
// `gated`, a row of the input is [b | c | x]: the channels are b · x, and the results are multiplied by
// c. Grid (channels / 1024, sequences, parts of the longest sequence), 128 threads.
KERNEL(128) short_conv(
    T* out, const T* input, const float* weight, const float* bias, float* states, const uint4* sequences,
    u32 slot_elements, u32 stride, u32 column, u32 channels, u32 taps, u32 gated, u32 silu
) {
    const u32 channel = (blockIdx.x * blockDim.x + threadIdx.x) * 8;
    const Sequence sequence = sequence_of(sequences, blockIdx.y);
    wait_for_kernels_before();
    // Only the first part reads the state, which it overwrites at its end.
    const u32 each = max((sequence.rows + gridDim.z - 1) / gridDim.z, taps - 1);
    const u32 begin = blockIdx.z * each, end = min(begin + each, sequence.rows);
    if (channel >= channels || begin >= end) return;

    states += channel / 16 * 16 * (taps - 1) + channel % 16;
    input += u64(sequence.first) * stride + channel;
    out += u64(sequence.first) * channels + channel;
    const Channels at = {
        input + (gated ? 2 * channels : column),
        sequence.before == NONE ? nullptr : states + u64(sequence.before) * slot_elements,
        stride,
        taps - 1,
        gated ? -2 * int(channels) : 0,
    };
#pragma unroll 1
    for (u32 row = begin; row < end; row++) {
        float sum[8], x[8], w[8];
#pragma unroll
        for (int i = 0; i < 8; i++) sum[i] = 0.0f;
        if (bias != nullptr) load8(sum, bias + channel);
#pragma unroll 1
        for (u32 tap = 0; tap < taps; tap++) {
            at.read(x, int(row + tap) - int(taps - 1));
            load8(w, weight + tap * channels + channel);
#pragma unroll
            for (int i = 0; i < 8; i++) sum[i] = fmaf(w[i], x[i], sum[i]);
        }
        if (silu) {
#pragma unroll
            for (int i = 0; i < 8; i++) sum[i] = gate(sum[i], sum[i]);
        }
        if (gated) {
            load8(x, input + u64(row) * stride + channels);
#pragma unroll
            for (int i = 0; i < 8; i++) sum[i] *= x[i];
        }
        store8(out + u64(row) * channels, sum);
    }
    if (blockIdx.z != 0) return;
    if (sequence.kept_rows != 0) at.write(states + u64(sequence.kept) * slot_elements, sequence.kept_rows);
    if (sequence.after != NONE) at.write(states + u64(sequence.after) * slot_elements, sequence.rows);
}

// A warp of a recurrence has sixteen columns of a head. A lane has four of them, for eight neighbouring
// keys of every 64. The keys of Mamba-2 are the elements of a column's state.
constexpr u32 COLUMNS = 16, KEYS = 64, PARTS = 2;

INLINE u32 key_of(u32 part) { return part * KEYS + lane_id() / 4 * 8; }
INLINE u32 column_of_lane() { return lane_id() % 4 * 4; }

// The sum over the lanes with the same columns, in each of them.
INLINE float sum_of_keys(float x) {
#pragma unroll
    for (int offset = 4; offset < 32; offset *= 2) x += __shfl_xor_sync(FULL_WARP, x, offset);
    return x;
}

// Four neighbouring columns of a row, from their bits.
INLINE void widen4(float (&x)[4], uint2 raw) {
    const float2 low = to_float2(*reinterpret_cast<T2*>(&raw.x)), high = to_float2(*reinterpret_cast<T2*>(&raw.y));
    x[0] = low.x, x[1] = low.y, x[2] = high.x, x[3] = high.y;
}

INLINE void store4(T* to, const float (&x)[4]) {
    *reinterpret_cast<uint2*>(to) = make_uint2(bits(to_t2(x[0], x[1])), bits(to_t2(x[2], x[3])));
}

// The bits of a query or of a key that the lane has.
struct Elements {
    uint4 raw[PARTS];

    INLINE void read(const T* from, u32 key_dim) {
#pragma unroll
        for (u32 part = 0; part < PARTS; part++) {
            raw[part] = make_uint4(0, 0, 0, 0);
            if (key_of(part) < key_dim) raw[part] = *reinterpret_cast<const uint4*>(from + key_of(part));
        }
    }

    INLINE void widen(float (&x)[PARTS][8]) const {
#pragma unroll
        for (u32 part = 0; part < PARTS; part++) load8(x[part], reinterpret_cast<const T*>(&raw[part]));
    }
};

// 1 / √(Σ x² + ε).
INLINE float inverse_length(const float (&x)[PARTS][8]) {
    float sum = 0.0f;
#pragma unroll
    for (u32 part = 0; part < PARTS; part++) {
#pragma unroll
        for (int i = 0; i < 8; i++) sum = fmaf(x[part][i], x[part][i], sum);
    }
    return 1.0f / sqrtf(sum_of_keys(sum) + 1e-6f);
}

typedef float State[PARTS][8][4];

INLINE void read_state(State& state, const float* from, u32 key_dim) {
#pragma unroll
    for (u32 part = 0; part < PARTS; part++) {
#pragma unroll
        for (u32 i = 0; i < 8; i++) {
            float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (from != nullptr && key_of(part) < key_dim) {
                x = *reinterpret_cast<const float4*>(from + (key_of(part) + i) * COLUMNS + column_of_lane());
            }
            state[part][i][0] = x.x, state[part][i][1] = x.y, state[part][i][2] = x.z, state[part][i][3] = x.w;
        }
    }
}

INLINE void write_state(float* to, const State& state, u32 key_dim) {
#pragma unroll
    for (u32 part = 0; part < PARTS; part++) {
        if (key_of(part) >= key_dim) continue;
#pragma unroll
        for (u32 i = 0; i < 8; i++) {
            const float* x = state[part][i];
            *reinterpret_cast<float4*>(to + (key_of(part) + i) * COLUMNS + column_of_lane()) =
                make_float4(x[0], x[1], x[2], x[3]);
        }
    }
}

// ln(1 + e^x); beyond 20, the two are the same number.
INLINE float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }

// A row of `qkv` is [queries | keys | values], one of `gates` [b | a]. With β = sigmoid(b), α =
// exp(decay · softplus(a + bias)), and q and k divided by their lengths, the state S of a head becomes
// α S + k ⊗ β (v − α Sᵀ k), and the result is Sᵀ q · query_scale. The state has, for every sixteen
// columns of the values, a row of sixteen numbers per key. Heads have at most PARTS · KEYS keys. Grid
// (columns / 64, sequences), 128 threads.
KERNEL(128, 3) gated_delta(
    T* out, const T* qkv, const float* gates, const float* decay, const float* bias, float* states,
    const uint4* sequences, float query_scale, u32 slot_elements, u32 key_heads, u32 value_heads, u32 key_dim,
    u32 value_dim, u32 tiled
) {
    const Sequence sequence = sequence_of(sequences, blockIdx.y);
    const u32 columns = value_heads * value_dim, key_columns = key_heads * key_dim;
    const u32 first = (blockIdx.x * (blockDim.x / 32) + warp_id()) * COLUMNS;
    const bool begins = sequence.before == NONE;
    states += first * key_dim;
    if (!begins && first < columns && lane_id() == 0) {
        prefetch(states + u64(sequence.before) * slot_elements, key_dim * COLUMNS * sizeof(float));
    }
    wait_for_kernels_before();
    if (first >= columns || sequence.rows == 0) return;

    const u32 head = first / value_dim;
    const u32 key_head = tiled ? head % key_heads : head / (value_heads / key_heads);
    const u32 row_columns = 2 * key_columns + columns;
    qkv += u64(sequence.first) * row_columns;
    const T* queries = qkv + key_head * key_dim;
    const T* values = qkv + 2 * key_columns + first + column_of_lane();
    gates += u64(sequence.first) * 2 * value_heads + head;
    out += u64(sequence.first) * columns + first + column_of_lane();
    const float decay_of_head = decay[head], bias_of_head = bias[head];

    State state;
    read_state(state, begins ? nullptr : states + u64(sequence.before) * slot_elements, key_dim);
    // The row after the current one is read while that is computed.
    Elements next_q, next_k;
    uint2 next_v = *reinterpret_cast<const uint2*>(values);
    next_q.read(queries, key_dim);
    next_k.read(queries + key_columns, key_dim);
    float betas = 0.0f, alphas = 0.0f;
#pragma unroll 1
    for (u32 row = 0; row < sequence.rows; row++) {
        // Each lane computes the gates of one of 32 rows.
        if (row % 32 == 0 && row + lane_id() < sequence.rows) {
            const float* of_row = gates + u64(row + lane_id()) * 2 * value_heads;
            betas = 1.0f / (1.0f + expf(-of_row[0]));
            alphas = expf(decay_of_head * softplus(of_row[value_heads] + bias_of_head));
        }
        __syncwarp();
        const float beta = __shfl_sync(FULL_WARP, betas, row % 32), alpha = __shfl_sync(FULL_WARP, alphas, row % 32);
        float q[PARTS][8], k[PARTS][8];
        next_q.widen(q);
        next_k.widen(k);
        float v[4];
        widen4(v, next_v);
        if (row + 1 < sequence.rows) {
            const u64 ahead = u64(row + 1) * row_columns;
            next_v = *reinterpret_cast<const uint2*>(values + ahead);
            next_q.read(queries + ahead, key_dim);
            next_k.read(queries + ahead + key_columns, key_dim);
        }
        __syncwarp();
        const float query_factor = inverse_length(q) * query_scale, key_factor = inverse_length(k);

        float added[4] = {}, result[4] = {};
#pragma unroll
        for (u32 part = 0; part < PARTS; part++) {
#pragma unroll
            for (u32 i = 0; i < 8; i++) {
#pragma unroll
                for (u32 c = 0; c < 4; c++) added[c] = fmaf(k[part][i], state[part][i][c], added[c]);
            }
        }
#pragma unroll
        for (u32 c = 0; c < 4; c++) {
            const float known = sum_of_keys(added[c]) * (alpha * key_factor);
            added[c] = (v[c] - known) * (beta * key_factor);
        }
#pragma unroll
        for (u32 part = 0; part < PARTS; part++) {
#pragma unroll
            for (u32 i = 0; i < 8; i++) {
#pragma unroll
                for (u32 c = 0; c < 4; c++) {
                    state[part][i][c] = fmaf(k[part][i], added[c], alpha * state[part][i][c]);
                    result[c] = fmaf(q[part][i], state[part][i][c], result[c]);
                }
            }
        }
#pragma unroll
        for (u32 c = 0; c < 4; c++) result[c] = sum_of_keys(result[c]) * query_factor;
        if (lane_id() < 4) store4(out + u64(row) * columns, result);
        if (row + 1 == sequence.kept_rows) {
            write_state(states + u64(sequence.kept) * slot_elements, state, key_dim);
        }
        __syncwarp();
    }
    if (sequence.after != NONE) write_state(states + u64(sequence.after) * slot_elements, state, key_dim);
}

// A row of `projected` is [z | x | b | c | dt], one of `convolved` the convolution of its [x | b | c]. With
// step = softplus(dt + step_bias), at least `least` and at most `most`, the state S of a head becomes
// exp(step · rate) S + step · b ⊗ x, and the result is Sᵀ c + skip · x. The state is arranged as that of
// `gated_delta`, with at most PARTS · KEYS elements per column. Grid (columns / 64, sequences), 128
// threads.
KERNEL(128, 3) mamba2(
    T* out, const T* projected, const T* convolved, const float* rates, const float* skips, const float* step_biases,
    float* states, const uint4* sequences, float least, float most, u32 slot_elements, u32 heads, u32 head_dim,
    u32 state_size, u32 groups
) {
    const Sequence sequence = sequence_of(sequences, blockIdx.y);
    const u32 columns = heads * head_dim, channels = columns + 2 * groups * state_size;
    const u32 first = (blockIdx.x * (blockDim.x / 32) + warp_id()) * COLUMNS;
    const bool begins = sequence.before == NONE;
    states += first * state_size;
    if (!begins && first < columns && lane_id() == 0) {
        prefetch(states + u64(sequence.before) * slot_elements, state_size * COLUMNS * sizeof(float));
    }
    wait_for_kernels_before();
    if (first >= columns || sequence.rows == 0) return;

    const u32 head = first / head_dim, projected_columns = columns + channels + heads;
    const T* steps = projected + u64(sequence.first) * projected_columns + columns + channels + head;
    convolved += u64(sequence.first) * channels;
    const T* inputs = convolved + first + column_of_lane();
    const T* from_b = convolved + columns + head / (heads / groups) * state_size;
    const T* from_c = from_b + groups * state_size;
    out += u64(sequence.first) * columns + first + column_of_lane();
    const float rate = rates[head], skip = skips[head], step_bias = step_biases[head];

    State state;
    read_state(state, begins ? nullptr : states + u64(sequence.before) * slot_elements, state_size);
    // The row after the current one is read while that is computed.
    Elements next_b, next_c;
    uint2 next_x = *reinterpret_cast<const uint2*>(inputs);
    next_b.read(from_b, state_size);
    next_c.read(from_c, state_size);
    float lengths = 0.0f, decays = 0.0f;
#pragma unroll 1
    for (u32 row = 0; row < sequence.rows; row++) {
        // Each lane computes the step of one of 32 rows. Comparisons in this direction leave NaN as it is.
        if (row % 32 == 0 && row + lane_id() < sequence.rows) {
            lengths = softplus(to_float(steps[u64(row + lane_id()) * projected_columns]) + step_bias);
            lengths = lengths < least ? least : lengths;
            lengths = lengths > most ? most : lengths;
            decays = expf(lengths * rate);
        }
        __syncwarp();
        const float step = __shfl_sync(FULL_WARP, lengths, row % 32), decay = __shfl_sync(FULL_WARP, decays, row % 32);
        float b[PARTS][8], c[PARTS][8], x[4];
        next_b.widen(b);
        next_c.widen(c);
        widen4(x, next_x);
        if (row + 1 < sequence.rows) {
            const u64 ahead = u64(row + 1) * channels;
            next_x = *reinterpret_cast<const uint2*>(inputs + ahead);
            next_b.read(from_b + ahead, state_size);
            next_c.read(from_c + ahead, state_size);
        }
        __syncwarp();
        float scaled[4], result[4] = {};
#pragma unroll
        for (u32 i = 0; i < 4; i++) scaled[i] = x[i] * step;
#pragma unroll
        for (u32 part = 0; part < PARTS; part++) {
#pragma unroll
            for (u32 i = 0; i < 8; i++) {
#pragma unroll
                for (u32 column = 0; column < 4; column++) {
                    float& element = state[part][i][column];
                    element = fmaf(element, decay, scaled[column] * b[part][i]);
                    result[column] = fmaf(element, c[part][i], result[column]);
                }
            }
        }
#pragma unroll
        for (u32 i = 0; i < 4; i++) result[i] = fmaf(skip, x[i], sum_of_keys(result[i]));
        if (lane_id() < 4) store4(out + u64(row) * columns, result);
        if (row + 1 == sequence.kept_rows) {
            write_state(states + u64(sequence.kept) * slot_elements, state, state_size);
        }
        __syncwarp();
    }
    if (sequence.after != NONE) write_state(states + u64(sequence.after) * slot_elements, state, state_size);
}

// x = x / rms(x) · weight · silu(gate), in heads of `width` columns, a multiple of eight. The rows of
// gates are `stride` columns apart. Grid (rows, heads / 8), 256 threads; one warp per head.
KERNEL(256) gated_rms_norm(
    T* x, const T* gates, const float* weight, float epsilon, u32 columns, u32 width, u32 stride
) {
    wait_for_kernels_before();
    const u32 first = (blockIdx.y * (blockDim.x / 32) + warp_id()) * width;
    if (first >= columns) return;
    x += u64(blockIdx.x) * columns + first;
    gates += u64(blockIdx.x) * stride + first;
    float sum = 0.0f, v[8], w[8], g[8];
#pragma unroll 1
    for (u32 column = lane_id() * 8; column < width; column += 32 * 8) {
        load8(v, x + column);
#pragma unroll
        for (int i = 0; i < 8; i++) sum = fmaf(v[i], v[i], sum);
    }
    __syncwarp();
    const float factor = 1.0f / sqrtf(warp_sum(sum) / float(width) + epsilon);
#pragma unroll 1
    for (u32 column = lane_id() * 8; column < width; column += 32 * 8) {
        load8(v, x + column);
        load8(w, weight + column);
        load8(g, gates + column);
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = v[i] * factor * w[i] * gate(g[i], g[i]);
        store8(x + column, v);
    }
}

INLINE void gated8(float (&x)[8], const T* from, const T* gates) {
    float g[8];
    load8(x, from);
    load8(g, gates);
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] *= gate(g[i], g[i]);
}

// x = norm(x · silu(gate)) · weight, where the norm is an RMSNorm of each group of `width` columns, a
// multiple of eight. The rows of gates are `stride` columns apart. Grid (rows, groups), 256 threads.
KERNEL(256) gated_norm(T* x, const T* gates, const float* weight, float epsilon, u32 width, u32 stride) {
    wait_for_kernels_before();
    __shared__ float scratch[32];
    const u32 first = blockIdx.y * width;
    x += u64(blockIdx.x) * gridDim.y * width + first;
    gates += u64(blockIdx.x) * stride + first;
    weight += first;
    float sum = 0.0f, v[8], w[8];
#pragma unroll 1
    for (u32 column = threadIdx.x * 8; column < width; column += blockDim.x * 8) {
        gated8(v, x + column, gates + column);
#pragma unroll
        for (int i = 0; i < 8; i++) sum = fmaf(v[i], v[i], sum);
    }
    const float factor = 1.0f / sqrtf(block_sum(sum, scratch) / float(width) + epsilon);
#pragma unroll 1
    for (u32 column = threadIdx.x * 8; column < width; column += blockDim.x * 8) {
        gated8(v, x + column, gates + column);
        load8(w, weight + column);
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = v[i] * factor * w[i];
        store8(x + column, v);
    }
}
