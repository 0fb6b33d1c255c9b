// Normalisation and rotation of a head by one warp. Prefill (rope.cu) and decode (attention.cu) share
// this code, so that both give the same bits.
#pragma once
#include "common.cuh"

// Flags of `norm_mode`: queries and keys are normalised per head, or over the whole row. NORM_VALUES is
// added to one of the two if values are normalised as well, per head and without weights.
constexpr u32 NORM_HEADS = 1, NORM_ROW = 2, NORM_VALUES = 4;

// RMSNorm on queries or keys.
struct Norm {
    // One weight per column; null for no norm.
    const float* weight;
    float factor;

    INLINE float2 apply(float2 x, u32 column) const {
        if (weight == nullptr) return x;
        const float2 w = *reinterpret_cast<const float2*>(weight + column);
        return make_float2(x.x * factor * w.x, x.y * factor * w.y);
    }
};

INLINE float2 load_two(const T* from) { return to_float2(*reinterpret_cast<const T2*>(from)); }

// Returns a thread's share of the sum of squares of `columns` elements, which `step` / 2 threads divide
// among them: the pairs of elements at `first`, `first` + `step`, and so on.
INLINE float squares(const T* x, u32 first, u32 columns, u32 step) {
    float sum = 0.0f;
    for (u32 column = first; column < columns; column += step) {
        const float2 two = load_two(x + column);
        sum = fmaf(two.x, two.x, sum);
        sum = fmaf(two.y, two.y, sum);
    }
    return sum;
}

// Returns the norm of the head at `row`.
INLINE Norm norm_of_head(const T* row, const float* weight, float epsilon, u32 head_dim) {
    const float sum = warp_sum(squares(row, lane_id() * 2, head_dim, 64));
    return {weight, rsqrtf(sum / float(head_dim) + epsilon)};
}

// Copies the head at `row`, normalised without weights if `normalized`.
INLINE void copy_head(T* to, const T* row, bool normalized, float epsilon, u32 head_dim) {
    const float factor = normalized ? norm_of_head(row, nullptr, epsilon, head_dim).factor : 1.0f;
#pragma unroll 1
    for (u32 column = lane_id() * 2; column < head_dim; column += 64) {
        const float2 x = load_two(row + column);
        *reinterpret_cast<T2*>(to + column) = to_t2(x.x * factor, x.y * factor);
    }
}

// Normalises and rotates a head: the pair (i, i + rotary_dim / 2) by the angle whose cosine and sine are
// angles[i]. Elements from rotary_dim on are not rotated. `store(column, x)` receives two elements at a
// time, those at `column` and `column` + 1.
template <class Store>
INLINE void rotate(const T* row, const Norm& norm, const float2* angles, u32 rotary_dim, u32 head_dim, Store store) {
    const u32 half = rotary_dim / 2, lane_column = lane_id() * 2;
    for (u32 i = lane_column; i < half; i += 64) {
        const float2 a = norm.apply(load_two(row + i), i);
        const float2 b = norm.apply(load_two(row + half + i), half + i);
        const float4 angle = *reinterpret_cast<const float4*>(angles + i);
        store(i, make_float2(a.x * angle.x - b.x * angle.y, a.y * angle.z - b.y * angle.w));
        store(half + i, make_float2(b.x * angle.x + a.x * angle.y, b.y * angle.z + a.y * angle.w));
    }
    for (u32 i = rotary_dim + lane_column; i < head_dim; i += 64) store(i, norm.apply(load_two(row + i), i));
}
