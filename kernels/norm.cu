// Root-mean-square norms, sums, copies and pooling of rows. Zhang & Sennrich, RMSNorm, 2019.
//
// Norms use one block per row, whose threads handle eight adjacent columns at a time. Which elements a
// thread sums, and in which order, depends only on the number of columns and the block size.
#include "vector.cuh"

// Returns 1 / √(mean square + ε) of a row, where `sum` is the thread's sum of squares.
INLINE float inverse_rms(float sum, float epsilon, u32 columns) {
    __shared__ float scratch[32];
    return 1.0f / sqrtf(block_sum(sum, scratch) / float(columns) + epsilon);
}

// Prefetches the weights, which no kernel writes, and then waits for the kernels before this one.
INLINE void begin_norm(const float* weight, u32 columns) {
    if (blockIdx.x == 0 && threadIdx.x == 0) prefetch(weight, columns * sizeof(float));
    wait_for_kernels_before();
}

INLINE float add_squares(float sum, const float (&x)[8]) {
#pragma unroll
    for (int i = 0; i < 8; i++) sum = fmaf(x[i], x[i], sum);
    return sum;
}

// Multiplies eight columns by `factor` and by their weights.
INLINE void scale8(float (&x)[8], float factor, const float* weight) {
    float w[8];
    load8(w, weight);
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = x[i] * factor * w[i];
}

// A thread keeps the columns 8 · (k · threads + thread) and the next seven, for k below KEPT, in registers
// between the two passes over a row, and loads them all at once. With 256 threads, these are all columns
// of a row of up to 8192 columns. Further columns are read again in the second pass.
constexpr u32 KEPT = 4;
INLINE u32 column_of(u32 k) { return (k * blockDim.x + threadIdx.x) * 8; }

template <class E>
INLINE void read_kept(float (&kept)[KEPT][8], const E* row, u32 columns) {
#pragma unroll
    for (u32 k = 0; k < KEPT; k++) {
        if (column_of(k) < columns) load8(kept[k], row + column_of(k));
    }
}

INLINE float add_kept_squares(const float (&kept)[KEPT][8], u32 columns) {
    float sum = 0.0f;
#pragma unroll
    for (u32 k = 0; k < KEPT; k++) {
        if (column_of(k) < columns) sum = add_squares(sum, kept[k]);
    }
    return sum;
}

INLINE void add8(float (&to)[8], const float (&x)[8]) {
#pragma unroll
    for (int i = 0; i < 8; i++) to[i] += x[i];
}

// out = kept · factor · weight.
template <class E>
INLINE void write_kept(E* out, float (&kept)[KEPT][8], float factor, const float* weight, u32 columns) {
#pragma unroll
    for (u32 k = 0; k < KEPT; k++) {
        if (column_of(k) >= columns) continue;
        scale8(kept[k], factor, weight + column_of(k));
        store8(out + column_of(k), kept[k]);
    }
}

// out = x / rms(x) · weight.
template <class Out, class In>
INLINE void norm_row(Out* out, const In* x, const float* weight, float epsilon, u32 columns) {
    begin_norm(weight, columns);
    x += u64(blockIdx.x) * columns;
    out += u64(blockIdx.x) * columns;
    float kept[KEPT][8], v[8];
    read_kept(kept, x, columns);
    float sum = add_kept_squares(kept, columns);
#pragma unroll 1
    for (u32 k = KEPT; column_of(k) < columns; k++) {
        load8(v, x + column_of(k));
        sum = add_squares(sum, v);
    }
    float factor = inverse_rms(sum, epsilon, columns);
    write_kept(out, kept, factor, weight, columns);
#pragma unroll 1
    for (u32 k = KEPT; column_of(k) < columns; k++) {
        load8(v, x + column_of(k));
        scale8(v, factor, weight + column_of(k));
        store8(out + column_of(k), v);
    }
}

KERNEL(256) rms_norm(T* out, const float* x, const float* weight, float epsilon, u32 columns) {
    norm_row(out, x, weight, epsilon, columns);
}

// Like `rms_norm`, for an x in the activation type and a float32 result.
KERNEL(256) rms_norm_full(float* out, const T* x, const float* weight, float epsilon, u32 columns) {
    norm_row(out, x, weight, epsilon, columns);
}

// residual += x; out = residual / rms(residual) · weight.
KERNEL(256, 2) add_rms_norm(T* out, float* residual, const T* x, const float* weight, float epsilon, u32 columns) {
    begin_norm(weight, columns);
    x += u64(blockIdx.x) * columns;
    residual += u64(blockIdx.x) * columns;
    out += u64(blockIdx.x) * columns;
    float kept[KEPT][8], added[KEPT][8], v[8], r[8];
    read_kept(kept, residual, columns);
    read_kept(added, x, columns);
#pragma unroll
    for (u32 k = 0; k < KEPT; k++) {
        if (column_of(k) >= columns) continue;
        add8(kept[k], added[k]);
        store8(residual + column_of(k), kept[k]);
    }
    float sum = add_kept_squares(kept, columns);
#pragma unroll 1
    for (u32 k = KEPT; column_of(k) < columns; k++) {
        load8(v, x + column_of(k));
        load8(r, residual + column_of(k));
        add8(r, v);
        store8(residual + column_of(k), r);
        sum = add_squares(sum, r);
    }
    float factor = inverse_rms(sum, epsilon, columns);
    write_kept(out, kept, factor, weight, columns);
    // Each thread rereads only what it has written itself.
#pragma unroll 1
    for (u32 k = KEPT; column_of(k) < columns; k++) {
        load8(r, residual + column_of(k));
        scale8(r, factor, weight + column_of(k));
        store8(out + column_of(k), r);
    }
}

// Subtracts the mean of eight columns' row, and returns the sum with their squares.
INLINE float add_centred_squares(float sum, float (&x)[8], float mean) {
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] -= mean;
    return add_squares(sum, x);
}

INLINE float add_all(float sum, const float (&x)[8]) {
#pragma unroll
    for (int i = 0; i < 8; i++) sum += x[i];
    return sum;
}

// Writes eight centred columns, multiplied by `factor` and their weights, plus their biases.
INLINE void write_shifted(T* out, float* residual, float (&x)[8], float factor, const float* weight, const float* bias) {
    float w[8], b[8];
    load8(w, weight);
    load8(b, bias);
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = fmaf(x[i] * factor, w[i], b[i]);
    store8(residual, x);
    store8(out, x);
}

// residual = layer norm of (residual + x), without x if it is null; out = residual. Ba et al., Layer
// Normalization, 2016.
KERNEL(256, 2) add_layer_norm(
    T* out, float* residual, const T* x, const float* weight, const float* bias, float epsilon, u32 columns
) {
    begin_norm(weight, columns);
    __shared__ float scratch[32];
    const u64 row = u64(blockIdx.x) * columns;
    residual += row;
    out += row;
    float kept[KEPT][8], added[8], v[8], sum = 0.0f;
    read_kept(kept, residual, columns);
#pragma unroll
    for (u32 k = 0; k < KEPT; k++) {
        if (column_of(k) >= columns) continue;
        if (x != nullptr) {
            load8(added, x + row + column_of(k));
            add8(kept[k], added);
        }
        sum = add_all(sum, kept[k]);
    }
#pragma unroll 1
    for (u32 k = KEPT; column_of(k) < columns; k++) {
        load8(v, residual + column_of(k));
        if (x != nullptr) {
            load8(added, x + row + column_of(k));
            add8(v, added);
            store8(residual + column_of(k), v);
        }
        sum = add_all(sum, v);
    }
    const float mean = block_sum(sum, scratch) / float(columns);
    sum = 0.0f;
#pragma unroll
    for (u32 k = 0; k < KEPT; k++) {
        if (column_of(k) < columns) sum = add_centred_squares(sum, kept[k], mean);
    }
    // Each thread rereads only what it has written itself.
#pragma unroll 1
    for (u32 k = KEPT; column_of(k) < columns; k++) {
        load8(v, residual + column_of(k));
        sum = add_centred_squares(sum, v, mean);
    }
    const float factor = inverse_rms(sum, epsilon, columns);
#pragma unroll
    for (u32 k = 0; k < KEPT; k++) {
        const u32 column = column_of(k);
        if (column < columns) write_shifted(out + column, residual + column, kept[k], factor, weight + column, bias + column);
    }
#pragma unroll 1
    for (u32 k = KEPT; column_of(k) < columns; k++) {
        const u32 column = column_of(k);
        load8(v, residual + column);
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] -= mean;
        write_shifted(out + column, residual + column, v, factor, weight + column, bias + column);
    }
}

// x −= mean(x).
KERNEL(256) centre(float* x, u32 columns) {
    wait_for_kernels_before();
    __shared__ float scratch[32];
    x += u64(blockIdx.x) * columns;
    float sum = 0.0f;
#pragma unroll 1
    for (u32 column = threadIdx.x; column < columns; column += blockDim.x) sum += x[column];
    const float mean = block_sum(sum, scratch) / float(columns);
#pragma unroll 1
    for (u32 column = threadIdx.x; column < columns; column += blockDim.x) x[column] -= mean;
}

// residual += x / rms(x) · weight.
KERNEL(256, 2) rms_norm_add(float* residual, const T* x, const float* weight, float epsilon, u32 columns) {
    begin_norm(weight, columns);
    x += u64(blockIdx.x) * columns;
    residual += u64(blockIdx.x) * columns;
    float kept[KEPT][8], v[8], r[8];
    read_kept(kept, x, columns);
    float sum = add_kept_squares(kept, columns);
#pragma unroll 1
    for (u32 k = KEPT; column_of(k) < columns; k++) {
        load8(v, x + column_of(k));
        sum = add_squares(sum, v);
    }
    float factor = inverse_rms(sum, epsilon, columns);
    float before[KEPT][8];
    read_kept(before, residual, columns);
#pragma unroll
    for (u32 k = 0; k < KEPT; k++) {
        if (column_of(k) >= columns) continue;
        scale8(kept[k], factor, weight + column_of(k));
        add8(before[k], kept[k]);
        store8(residual + column_of(k), before[k]);
    }
#pragma unroll 1
    for (u32 k = KEPT; column_of(k) < columns; k++) {
        load8(v, x + column_of(k));
        load8(r, residual + column_of(k));
        scale8(v, factor, weight + column_of(k));
        add8(r, v);
        store8(residual + column_of(k), r);
    }
}

// residual += x, for `count` numbers, a multiple of eight.
KERNEL(256) add(float* residual, const T* x, u32 count) {
    wait_for_kernels_before();
    u32 index = (blockIdx.x * blockDim.x + threadIdx.x) * 8;
    if (index >= count) return;
    float v[8], r[8];
    load8(v, x + index);
    load8(r, residual + index);
    add8(r, v);
    store8(residual + index, r);
}

// out = x, for `count` numbers, a multiple of eight.
KERNEL(256) convert(T* out, const float* x, u32 count) {
    wait_for_kernels_before();
    u32 index = (blockIdx.x * blockDim.x + threadIdx.x) * 8;
    if (index >= count) return;
    float v[8];
    load8(v, x + index);
    store8(out + index, v);
}

// out[r] = x[indices[r]].
KERNEL(256) gather_rows(float* out, const float* x, const u32* indices, u32 columns) {
    wait_for_kernels_before();
    x += u64(indices[blockIdx.x]) * columns;
    out += u64(blockIdx.x) * columns;
    float v[8];
    for (u32 column = threadIdx.x * 8; column < columns; column += blockDim.x * 8) {
        load8(v, x + column);
        store8(out + column, v);
    }
}

// out[i] = the sum of the rows ranges[i] = {first, count} of x, as integers in units of 2⁻²⁸, because
// integer sums do not depend on their order. A column with NaN or a magnitude above 2¹⁵ gets the lowest
// 64-bit integer instead. Grid (ceil(columns / 256), ranges), 256 threads.
KERNEL(256) pool_rows(long long* out, const T* x, const uint2* ranges, u32 columns) {
    wait_for_kernels_before();
    u32 column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= columns) return;
    uint2 range = ranges[blockIdx.y];
    x += u64(range.x) * columns + column;
    long long sum = 0;
    bool sound = true;
#pragma unroll 4
    for (u32 row = 0; row < range.y; row++) {
        float value = to_float(x[u64(row) * columns]);
        sound &= fabsf(value) <= 0x1p15f;
        sum += __float2ll_rn(value * 0x1p28f);
    }
    out[u64(blockIdx.y) * columns + column] = sound ? sum : -0x7fffffffffffffffll - 1;
}
