// Normalises and rotates queries and keys, and writes keys and values to the KV cache.
#include "rope.cuh"

// Stores two elements of a head in the row and, unless `cached` is null, in the cache.
INLINE void store_two(T* row, T* cached, u32 column, float2 x) {
    const T2 rounded = to_t2(x.x, x.y);
    *reinterpret_cast<T2*>(row + column) = rounded;
    if (cached != nullptr) *reinterpret_cast<T2*>(cached + column) = rounded;
}

// Normalises, rotates and stores the heads of each row. Grid (rows, any), 256 threads; one warp per head.
// A norm over whole rows requires one block per row, because a block that rotates heads would change
// elements that other blocks sum up. The angles of a row begin at angles[position · rotary_dim / 2]; see
// `rotate`. rotary_dim is a multiple of 4, head_dim of 8. A cache block has `block_vectors` · 8 elements.
// If kv_heads is 0, a row holds only queries, and nothing is stored.
KERNEL(256) rope_store(
    T* qkv, T* k_cache, T* v_cache, const u32* positions, const u32* slots, const float2* angles, const float* q_norm,
    const float* k_norm, float epsilon, u32 norm_mode, u32 q_heads, u32 kv_heads, u32 head_dim, u32 rotary_dim,
    u32 block_tokens, u32 block_vectors
) {
    wait_for_kernels_before();
    __shared__ float scratch[32];
    const u32 heads = q_heads + 2 * kv_heads;
    const u32 slot = slots[blockIdx.x];
    qkv += u64(blockIdx.x) * heads * head_dim;
    angles += u64(positions[blockIdx.x]) * (rotary_dim / 2);

    float q_factor = 0.0f, k_factor = 0.0f;
    const bool of_row = (norm_mode & NORM_ROW) != 0;
    if (of_row) {
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
            const u32 in_block = (head - q_heads) % kv_heads * block_tokens + slot % block_tokens;
            T* cache = head < q_heads + kv_heads ? k_cache : v_cache;
            cached = cache + u64(slot / block_tokens) * block_vectors * 8 + in_block * head_dim;
        }
        if (head >= q_heads + kv_heads) {
            if (cached != nullptr) copy_head(cached, row, (norm_mode & NORM_VALUES) != 0, epsilon, head_dim);
            continue;
        }

        const bool query = head < q_heads;
        Norm norm = {nullptr, 1.0f};
        if (of_row) {
            norm.weight = query ? q_norm + head * head_dim : k_norm + (head - q_heads) * head_dim;
            norm.factor = query ? q_factor : k_factor;
        } else if ((norm_mode & NORM_HEADS) != 0) {
            norm = norm_of_head(row, query ? q_norm : k_norm, epsilon, head_dim);
        }
        rotate(row, norm, angles, rotary_dim, head_dim, [&](u32 column, float2 x) { store_two(row, cached, column, x); });
    }
}

// Multiplies the queries of each row by 1 + slope · ln(1 + ⌊(position + offset) / interval⌋). Grid
// (rows), 256 threads.
KERNEL(256) scale_queries(
    T* qkv, const u32* positions, float slope, u32 interval, u32 offset, u32 q_columns, u32 columns
) {
    wait_for_kernels_before();
    const u32 stage = u32((u64(positions[blockIdx.x]) + offset) / interval);
    if (stage == 0) return;
    const float factor = fmaf(slope, __logf(float(stage) + 1.0f), 1.0f);
    qkv += u64(blockIdx.x) * columns;
#pragma unroll 1
    for (u32 column = threadIdx.x; column < q_columns; column += blockDim.x) {
        qkv[column] = to_t(to_float(qkv[column]) * factor);
    }
}
