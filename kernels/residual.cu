// Operations of some models on the residual stream: factors, per-layer inputs, several residual
// streams (AltUp), and sparse gates.
//
// One block sums over a row. Which elements a thread sums, and in which order, depends only on the
// number of columns.
#include "gate.cuh"
#include "vector.cuh"

// out = x, for `count` numbers, a multiple of eight.
KERNEL(256) copy_full(float* out, const float* x, u32 count) {
    wait_for_kernels_before();
    u32 index = (blockIdx.x * blockDim.x + threadIdx.x) * 8;
    if (index >= count) return;
    float v[8];
    load8(v, x + index);
    store8(out + index, v);
}

// x = x · factor, for `count` numbers, a multiple of eight.
KERNEL(256) scale(float* x, float factor, u32 count) {
    wait_for_kernels_before();
    u32 index = (blockIdx.x * blockDim.x + threadIdx.x) * 8;
    if (index >= count) return;
    float v[8];
    load8(v, x + index);
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] *= factor;
    store8(x + index, v);
}

// out = x · weight, element by element of each row, for `count` numbers. Rows have a multiple of
// eight columns.
KERNEL(256) multiply(T* out, const float* x, const float* weight, u32 count, u32 columns) {
    wait_for_kernels_before();
    u32 index = (blockIdx.x * blockDim.x + threadIdx.x) * 8;
    if (index >= count) return;
    float v[8], w[8];
    load8(v, x + index);
    load8(w, weight + index % columns);
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] *= w[i];
    store8(out + index, v);
}

// gate = activation(gate) · inputs, for `count` gates. Rows have `columns` gates, a multiple of eight.
// Rows of `inputs` are `stride` elements apart.
KERNEL(256) gate_columns(T* gate, const float* inputs, u32 count, u32 columns, u32 stride, u32 gelu) {
    wait_for_kernels_before();
    u32 index = (blockIdx.x * blockDim.x + threadIdx.x) * 8;
    if (index >= count) return;
    float x[8], input[8];
    load8(x, gate + index);
    load8(input, inputs + u64(index / columns) * stride + index % columns);
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = gated(x[i], input[i], gelu);
    store8(gate + index, x);
}

INLINE float add_squares(float sum, const float (&x)[8]) {
#pragma unroll
    for (int i = 0; i < 8; i++) sum = fmaf(x[i], x[i], sum);
    return sum;
}

// Scales a row so that its mean square equals that of `like`; its own counts as at least `floor`.
template <class E>
INLINE void match_row(E* x, const float* like, float floor, u32 columns) {
    __shared__ float scratch[32];
    x += u64(blockIdx.x) * columns;
    like += u64(blockIdx.x) * columns;
    float own = 0.0f, other = 0.0f, v[8];
#pragma unroll 1
    for (u32 column = threadIdx.x * 8; column < columns; column += blockDim.x * 8) {
        load8(v, x + column);
        own = add_squares(own, v);
        load8(v, like + column);
        other = add_squares(other, v);
    }
    own = fmaxf(block_sum(own, scratch) / float(columns), floor);
    const float factor = sqrtf(block_sum(other, scratch) / float(columns) / own);
#pragma unroll 1
    for (u32 column = threadIdx.x * 8; column < columns; column += blockDim.x * 8) {
        load8(v, x + column);
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] *= factor;
        store8(x + column, v);
    }
}

// One block per row; see `match_row`.
KERNEL(256) match_magnitude(T* x, const float* like, float floor, u32 columns) {
    wait_for_kernels_before();
    match_row(x, like, floor, columns);
}

// Like `match_magnitude`, for float32 rows.
KERNEL(256) match_magnitude_full(float* x, const float* like, float floor, u32 columns) {
    wait_for_kernels_before();
    match_row(x, like, floor, columns);
}

constexpr u32 MAX_STREAMS = 4;

// Computes `count` factors of a row: `bias` + Σ_k weight[i, k] · routed[k], over `streams` router outputs.
INLINE void make_factors(float* factors, const float* routed, const float* weight, u32 count, u32 streams, float bias) {
    if (threadIdx.x < count) {
        float factor = bias;
#pragma unroll 1
        for (u32 k = 0; k < streams; k++) {
            factor = fmaf(weight[threadIdx.x * streams + k], routed[blockIdx.x * streams + k], factor);
        }
        factors[threadIdx.x] = factor;
    }
    __syncthreads();
}

INLINE void add_product(float (&sum)[8], float factor, const float (&x)[8]) {
#pragma unroll
    for (int i = 0; i < 8; i++) sum[i] = fmaf(factor, x[i], sum[i]);
}

// out[i] = x[i] + Σ_j factor[i, j] · x[j] for at most four streams, where factor[i, j] is the dot product
// of the row's `routed` and row i · streams + j of `weight`. One block per row.
KERNEL(256) mix_streams(
    float* out_0, float* out_1, float* out_2, float* out_3, const float* x_0, const float* x_1, const float* x_2,
    const float* x_3, const float* routed, const float* weight, u32 streams, u32 columns
) {
    wait_for_kernels_before();
    __shared__ float factors[MAX_STREAMS * MAX_STREAMS];
    make_factors(factors, routed, weight, streams * streams, streams, 0.0f);
    float* const out[MAX_STREAMS] = {out_0, out_1, out_2, out_3};
    const float* const from[MAX_STREAMS] = {x_0, x_1, x_2, x_3};
#pragma unroll 1
    for (u32 column = threadIdx.x * 8; column < columns; column += blockDim.x * 8) {
        const u64 at = u64(blockIdx.x) * columns + column;
        float x[MAX_STREAMS][8];
#pragma unroll
        for (u32 i = 0; i < MAX_STREAMS; i++) {
            if (i < streams) load8(x[i], from[i] + at);
        }
#pragma unroll
        for (u32 i = 0; i < MAX_STREAMS; i++) {
            if (i >= streams) break;
            float sum[8];
#pragma unroll
            for (int c = 0; c < 8; c++) sum[c] = x[i][c];
#pragma unroll
            for (u32 j = 0; j < MAX_STREAMS; j++) {
                if (j < streams) add_product(sum, factors[i * streams + j], x[j]);
            }
            store8(out[i] + at, sum);
        }
    }
}

// x[i] += (1 + factor[i]) · (updated − x[active]) for at most four streams, where factor[i] is the dot
// product of the row's `routed` and row i of `weight`. One block per row.
KERNEL(256) correct_streams(
    float* x_0, float* x_1, float* x_2, float* x_3, const float* active, const float* updated, const float* routed,
    const float* weight, u32 streams, u32 columns
) {
    wait_for_kernels_before();
    __shared__ float factors[MAX_STREAMS];
    make_factors(factors, routed, weight, streams, streams, 1.0f);
    float* const x[MAX_STREAMS] = {x_0, x_1, x_2, x_3};
#pragma unroll 1
    for (u32 column = threadIdx.x * 8; column < columns; column += blockDim.x * 8) {
        const u64 at = u64(blockIdx.x) * columns + column;
        float change[8], own[8];
        load8(change, updated + at);
        // `active` is one of the streams, so it is read before any of them changes.
        load8(own, active + at);
#pragma unroll
        for (int i = 0; i < 8; i++) change[i] -= own[i];
#pragma unroll
        for (u32 i = 0; i < MAX_STREAMS; i++) {
            if (i >= streams) break;
            load8(own, x[i] + at);
            add_product(own, factors[i], change);
            store8(x[i] + at, own);
        }
    }
}

// gate = max(0, gate − mean(gate) − deviations · σ(gate)), where a row is [gate | up]. One block per row.
KERNEL(256) cut_gate(T* gate_up, float deviations, u32 columns) {
    wait_for_kernels_before();
    __shared__ float scratch[32];
    T* const gate = gate_up + u64(blockIdx.x) * 2 * columns;
    float sum = 0.0f, v[8];
#pragma unroll 1
    for (u32 column = threadIdx.x * 8; column < columns; column += blockDim.x * 8) {
        load8(v, gate + column);
#pragma unroll
        for (int i = 0; i < 8; i++) sum += v[i];
    }
    const float mean = block_sum(sum, scratch) / float(columns);
    sum = 0.0f;
#pragma unroll 1
    for (u32 column = threadIdx.x * 8; column < columns; column += blockDim.x * 8) {
        load8(v, gate + column);
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] -= mean;
        sum = add_squares(sum, v);
    }
    const float cut = fmaf(deviations, sqrtf(block_sum(sum, scratch) / float(columns)), mean);
#pragma unroll 1
    for (u32 column = threadIdx.x * 8; column < columns; column += blockDim.x * 8) {
        load8(v, gate + column);
        // NaN stays NaN, so that it is noticed.
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = v[i] - cut < 0.0f ? 0.0f : v[i] - cut;
        store8(gate + column, v);
    }
}
