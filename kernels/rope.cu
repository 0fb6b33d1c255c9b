// Queries and keys are normalised and rotated, keys and values written to the cache.
#include "common.cuh"

constexpr u32 NORM_HEADS = 1, NORM_ROW = 2;

// RMSNorm on queries or keys.
struct Norm {
    // One weight a column; null: no norm.
    const float* weight;
    float factor;

    INLINE float2 apply(float2 x, u32 column) const {
        if (weight == nullptr) return x;
        const float2 w = *reinterpret_cast<const float2*>(weight + column);
        return make_float2(x.x * factor * w.x, x.y * factor * w.y);
    }
};

INLINE float2 load_two(const T* from) { return to_float2(*reinterpret_cast<const T2*>(from)); }

// The sum of the squares of those of `columns` elements that this thread, one of `step` / 2,
// comes to.
INLINE float squares(const T* x, u32 first, u32 columns, u32 step) {
    float sum = 0.0f;
    for (u32 column = first; column < columns; column += step) {
        const float2 two = load_two(x + column);
        sum = fmaf(two.x, two.x, sum);
        sum = fmaf(two.y, two.y, sum);
    }
    return sum;
}

// Where a head's elements are put, beside in the row itself; null: nowhere.
INLINE void store_two(T* row, T* cached, u32 column, float2 x) {
    const T2 rounded = to_t2(x.x, x.y);
    *reinterpret_cast<T2*>(row + column) = rounded;
    if (cached != nullptr) *reinterpret_cast<T2*>(cached + column) = rounded;
}

// grid (rows, any), 256 threads; one warp per head. With a norm over whole rows there is one block
// per row, since blocks that rotate heads would change what others add up. The pair
// (i, i + rotary_dim / 2) of a head is rotated by the angle whose cosine and sine are
// angles[position][i]; the elements from rotary_dim on are not. rotary_dim is a multiple of 4,
// head_dim of 2.
KERNEL(256) rope_store(
    T* qkv, T* k_cache, T* v_cache, const u32* positions, const u32* slots, const float2* angles, const float* q_norm,
    const float* k_norm, float epsilon, u32 norm_mode, u32 q_heads, u32 kv_heads, u32 head_dim, u32 rotary_dim,
    u32 block_tokens
) {
    __shared__ float scratch[32];
    const u32 half = rotary_dim / 2, heads = q_heads + 2 * kv_heads, lane_column = lane_id() * 2;
    const u32 slot = slots[blockIdx.x];
    qkv += u64(blockIdx.x) * heads * head_dim;
    angles += u64(positions[blockIdx.x]) * half;

    float q_factor = 0.0f, k_factor = 0.0f;
    if (norm_mode == NORM_ROW) {
        const u32 q_columns = q_heads * head_dim, k_columns = kv_heads * head_dim, step = blockDim.x * 2;
        const float q = block_sum(squares(qkv, threadIdx.x * 2, q_columns, step), scratch);
        const float k = block_sum(squares(qkv + q_columns, threadIdx.x * 2, k_columns, step), scratch);
        q_factor = rsqrtf(q / float(q_columns) + epsilon);
        k_factor = rsqrtf(k / float(k_columns) + epsilon);
    }

    const u32 warps = blockDim.x / 32;
    for (u32 head = blockIdx.y * warps + warp_id(); head < heads; head += gridDim.y * warps) {
        T* row = qkv + head * head_dim;
        T* cached = nullptr;
        if (head >= q_heads && slot != NONE) {
            const u64 in_block = u64(slot / block_tokens) * kv_heads + (head - q_heads) % kv_heads;
            T* cache = head < q_heads + kv_heads ? k_cache : v_cache;
            cached = cache + (in_block * block_tokens + slot % block_tokens) * head_dim;
        }
        if (head >= q_heads + kv_heads) {
            if (cached == nullptr) continue;
            for (u32 column = lane_column; column < head_dim; column += 64) {
                *reinterpret_cast<T2*>(cached + column) = *reinterpret_cast<const T2*>(row + column);
            }
            continue;
        }

        const bool query = head < q_heads;
        Norm norm = {nullptr, 1.0f};
        if (norm_mode == NORM_ROW) {
            norm.weight = query ? q_norm + head * head_dim : k_norm + (head - q_heads) * head_dim;
            norm.factor = query ? q_factor : k_factor;
        } else if (norm_mode == NORM_HEADS) {
            const float sum = warp_sum(squares(row, lane_column, head_dim, 64));
            norm.weight = query ? q_norm : k_norm;
            norm.factor = rsqrtf(sum / float(head_dim) + epsilon);
        }
        for (u32 i = lane_column; i < half; i += 64) {
            const float2 a = norm.apply(load_two(row + i), i);
            const float2 b = norm.apply(load_two(row + half + i), half + i);
            const float4 angle = *reinterpret_cast<const float4*>(angles + i);
            store_two(row, cached, i, make_float2(a.x * angle.x - b.x * angle.y, a.y * angle.z - b.y * angle.w));
            store_two(row, cached, half + i, make_float2(b.x * angle.x + a.x * angle.y, b.y * angle.z + a.y * angle.w));
        }
        for (u32 i = rotary_dim + lane_column; i < head_dim; i += 64) {
            store_two(row, cached, i, norm.apply(load_two(row + i), i));
        }
    }
}

// The queries of a row times 1 + slope · ln(1 + ⌊(position + offset) / interval⌋). Grid (rows), 256
// threads.
KERNEL(256) scale_queries(
    T* qkv, const u32* positions, float slope, u32 interval, u32 offset, u32 q_columns, u32 columns
) {
    const u32 stage = u32((u64(positions[blockIdx.x]) + offset) / interval);
    if (stage == 0) return;
    const float factor = fmaf(slope, __logf(float(stage) + 1.0f), 1.0f);
    qkv += u64(blockIdx.x) * columns;
#pragma unroll 1
    for (u32 column = threadIdx.x; column < q_columns; column += blockDim.x) {
        qkv[column] = to_t(to_float(qkv[column]) * factor);
    }
}
