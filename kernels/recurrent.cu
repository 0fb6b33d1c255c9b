// Recurrent layers: causal convolutions, gated delta nets (Yang et al., 2024), Mamba-2 (Dao & Gu,
// 2024), and the norms of their results.
//
// States are float32. `states` points to the operation's part of the first slot, and the slots are
// `slot_elements` numbers apart. A row takes the same operations wherever it is in a step, so its
// result does not depend on how the sequence is divided into steps.
#include "gate.cuh"
#include "recurrence_prompt.cuh"
#include "recurrence_token.cuh"

// Eight adjacent channels of a convolution. For every 16 channels, the state has their inputs of the
// last `taps` − 1 tokens, the oldest first.
struct Channels {
    const T* input;
    const float* before;
    // Distance between rows in columns, and number of tokens in the state.
    u32 stride, tokens;
    // Columns from a channel to the factor on it; 0: no factor.
    int factor;

    // Reads the inputs of a row. A negative row is before the first one, in the state.
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

    // Writes the state after `rows` rows. `to` may be the slot of the state before: in ascending order,
    // nothing is overwritten that is still to be read.
    INLINE void write(float* to, u32 rows) const {
#pragma unroll 1
        for (u32 token = 0; token < tokens; token++) {
            float x[8];
            read(x, int(rows + token) - int(tokens));
            store8(to + token * 16, x);
        }
    }
};

// out = the convolution of the channels, which are the columns of the input from `column` on. If `gated`, a
// row of the input is [b | c | x], the channels are b · x, and the results are multiplied by c. Grid
// (ceil(channels / 1024), sequences, parts of the longest sequence), 128 threads.
KERNEL(128) short_conv(
    T* out, const T* input, const float* weight, const float* bias, float* states, const uint4* sequences,
    u32 slot_elements, u32 stride, u32 column, u32 channels, u32 taps, u32 gated, u32 silu
) {
    const u32 channel = (blockIdx.x * blockDim.x + threadIdx.x) * 8;
    const Sequence sequence = sequence_of(sequences, blockIdx.y);
    wait_for_kernels_before();
    // Only the first part reads the state, so that it can overwrite the state at its end.
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

// α and β of a delta net's tokens: α = exp(decay · softplus(a + bias)), and β = sigmoid(b).
struct DeltaGates {
    const float* at;
    u32 heads;
    float decay, bias;

    INLINE float2 read(u32 row) const {
        const float* of_row = at + u64(row) * 2 * heads;
        return make_float2(of_row[heads], of_row[0]);
    }
    INLINE float2 of(float2 raw) const {
        return make_float2(expf(decay * softplus(raw.x + bias)), 1.0f / (1.0f + expf(-raw.y)));
    }
};

// A row of `qkv` is [queries | keys | values], one of `gates` [b | a]. With q and k divided by their lengths,
// the state S of a head becomes α S + k ⊗ β (v − α Sᵀ k), and the result is Sᵀ q · query_scale. Heads have
// keys of at most 128 elements. Grid (heads · blocks per head, sequences).
template <bool PROMPT, class Memory>
INLINE void compute_delta(
    Memory& shared, T* out, const T* qkv, const float* gates, const float* decay, const float* bias, float* states,
    const uint4* sequences, float query_scale, u32 slot_elements, u32 key_heads, u32 value_heads, u32 key_dim,
    u32 value_dim, u32 tiled
) {
    const Sequence sequence = sequence_of(sequences, blockIdx.y);
    const Columns columns(value_dim, key_dim);
    prefetch_matrix(columns, sequence, states, slot_elements);
    wait_for_kernels_before();
    if (sequence.rows == 0) return;

    const u32 head = columns.head, first = head * value_dim + columns.first();
    const u32 key_head = tiled ? head % key_heads : head / (value_heads / key_heads);
    const u32 key_columns = key_heads * key_dim, all = value_heads * value_dim, stride = 2 * key_columns + all;
    qkv += u64(sequence.first) * stride;
    const T* queries = qkv + key_head * key_dim;
    out += u64(sequence.first) * all + first;
    const Rows rows = {queries + key_columns, queries, qkv + 2 * key_columns + first, out, stride, all};
    const DeltaGates of = {gates + u64(sequence.first) * 2 * value_heads + head, value_heads, decay[head], bias[head]};
    if constexpr (PROMPT) {
        compute_prompt<true>(shared, columns, rows, of, query_scale, sequence, states, slot_elements);
    } else {
        compute_token<true>(shared, columns, rows, of, query_scale, sequence, states, slot_elements);
    }
}

KERNEL(128, 2) gated_delta(
    T* out, const T* qkv, const float* gates, const float* decay, const float* bias, float* states,
    const uint4* sequences, float query_scale, u32 slot_elements, u32 key_heads, u32 value_heads, u32 key_dim,
    u32 value_dim, u32 tiled
) {
    __shared__ PromptMemory shared;
    compute_delta<true>(
        shared, out, qkv, gates, decay, bias, states, sequences, query_scale, slot_elements, key_heads, value_heads,
        key_dim, value_dim, tiled
    );
}

// Like `gated_delta`, for sequences with at most one row each.
KERNEL(128, 4) gated_delta_token(
    T* out, const T* qkv, const float* gates, const float* decay, const float* bias, float* states,
    const uint4* sequences, float query_scale, u32 slot_elements, u32 key_heads, u32 value_heads, u32 key_dim,
    u32 value_dim, u32 tiled
) {
    __shared__ TokenMemory shared;
    compute_delta<false>(
        shared, out, qkv, gates, decay, bias, states, sequences, query_scale, slot_elements, key_heads, value_heads,
        key_dim, value_dim, tiled
    );
}

// The decay of a token of Mamba-2, exp(step · rate), and its step: softplus(dt + bias), at least `least` and at
// most `most`.
struct MambaGates {
    const T* at;
    u32 stride;
    float rate, bias, least, most;

    INLINE float2 read(u32 row) const { return make_float2(to_float(at[u64(row) * stride]), 0.0f); }
    INLINE float2 of(float2 raw) const {
        // These comparisons keep NaN.
        float step = softplus(raw.x + bias);
        step = step < least ? least : step;
        step = step > most ? most : step;
        return make_float2(expf(step * rate), step);
    }
};

// A row of `projected` is [z | x | b | c | dt], one of `convolved` the convolution of its [x | b | c]. The state
// S of a head becomes exp(step · rate) S + step · b ⊗ x, and the result is Sᵀ c + skip · x. There are at
// most 128 elements of the state for each column. The grid is that of `gated_delta`.
template <bool PROMPT, class Memory>
INLINE void compute_mamba(
    Memory& shared, T* out, const T* projected, const T* convolved, const float* rates, const float* skips,
    const float* step_biases, float* states, const uint4* sequences, float least, float most, u32 slot_elements,
    u32 heads, u32 head_dim, u32 state_size, u32 groups
) {
    const Sequence sequence = sequence_of(sequences, blockIdx.y);
    const Columns columns(head_dim, state_size);
    prefetch_matrix(columns, sequence, states, slot_elements);
    wait_for_kernels_before();
    if (sequence.rows == 0) return;

    const u32 head = columns.head, first = head * head_dim + columns.first(), all = heads * head_dim;
    const u32 channels = all + 2 * groups * state_size, projected_columns = all + channels + heads;
    convolved += u64(sequence.first) * channels;
    const T* from_b = convolved + all + head / (heads / groups) * state_size;
    out += u64(sequence.first) * all + first;
    const Rows rows = {from_b, from_b + groups * state_size, convolved + first, out, channels, all};
    const T* steps = projected + u64(sequence.first) * projected_columns + all + channels + head;
    const MambaGates of = {steps, projected_columns, rates[head], step_biases[head], least, most};
    if constexpr (PROMPT) {
        compute_prompt<false>(shared, columns, rows, of, skips[head], sequence, states, slot_elements);
    } else {
        compute_token<false>(shared, columns, rows, of, skips[head], sequence, states, slot_elements);
    }
}

KERNEL(128, 2) mamba2(
    T* out, const T* projected, const T* convolved, const float* rates, const float* skips, const float* step_biases,
    float* states, const uint4* sequences, float least, float most, u32 slot_elements, u32 heads, u32 head_dim,
    u32 state_size, u32 groups
) {
    __shared__ PromptMemory shared;
    compute_mamba<true>(
        shared, out, projected, convolved, rates, skips, step_biases, states, sequences, least, most, slot_elements,
        heads, head_dim, state_size, groups
    );
}

// Like `mamba2`, for sequences with at most one row each.
KERNEL(128, 4) mamba2_token(
    T* out, const T* projected, const T* convolved, const float* rates, const float* skips, const float* step_biases,
    float* states, const uint4* sequences, float least, float most, u32 slot_elements, u32 heads, u32 head_dim,
    u32 state_size, u32 groups
) {
    __shared__ TokenMemory shared;
    compute_mamba<false>(
        shared, out, projected, convolved, rates, skips, step_biases, states, sequences, least, most, slot_elements,
        heads, head_dim, state_size, groups
    );
}

// x = x / rms(x) · weight · silu(gate), in heads of `width` columns, a multiple of eight. The rows of
// gates are `stride` columns apart. Grid (rows, ceil(heads / 8)), 256 threads; one warp per head.
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
// multiple of eight. Rows of gates are `stride` columns apart. Grid (rows, groups), 256 threads.
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
