// Latent attention: all heads of a row attend to the same keys, whose last elements are the values.
#include "attention.cuh"
#include "rope.cuh"

// Multiplies each head's part of a row by the head's weights, [heads][outputs][inputs]. The part of a head
// begins at `x_first` + head · `x_stride` in a row of `x_row` elements; its result is placed likewise.
// `inputs`, `x_first`, `x_stride` and `x_row` are even. Grid (rows, heads, ceil(outputs / 64)), 256 threads.
// A warp computes eight outputs, and each lane adds its own columns in ascending order.
KERNEL(256) multiply_heads(
    T* out, const T* x, const T* weights, u32 inputs, u32 outputs, u32 x_row, u32 x_first, u32 x_stride, u32 out_row,
    u32 out_first, u32 out_stride
) {
    wait_for_kernels_before();
    const u32 head = blockIdx.y, first = blockIdx.z * 64 + warp_id() * 8;
    x += u64(blockIdx.x) * x_row + x_first + head * x_stride;
    out += u64(blockIdx.x) * out_row + out_first + head * out_stride;
    weights += u64(head) * outputs * inputs;
#pragma unroll 1
    for (u32 output = first; output < min(first + 8, outputs); output++) {
        const T* const row = weights + u64(output) * inputs;
        float sum = 0.0f;
#pragma unroll 1
        for (u32 column = lane_id() * 2; column < inputs; column += 64) {
            const float2 a = load_two(x + column), b = load_two(row + column);
            sum = fmaf(a.x, b.x, sum);
            sum = fmaf(a.y, b.y, sum);
        }
        sum = warp_sum(sum);
        if (lane_id() == 0) out[output] = to_t(sum);
    }
}

// Copies the rotated parts of a row's queries, `[heads][rotated | plain]`, and the row's key, `[rotated |
// latent]`, to the row that will be rotated and stored, `[heads + 1][rotated | latent]`. Normalises the
// latent of the key. All sizes are even. Grid (rows), 256 threads.
KERNEL(256) copy_rotated(
    T* qkv, const T* queries, const T* keys, const float* norm, float epsilon, u32 heads, u32 rotated, u32 plain, u32 latent
) {
    wait_for_kernels_before();
    const u32 size = rotated + latent, warps = blockDim.x / 32, lane_column = lane_id() * 2;
    qkv += u64(blockIdx.x) * (heads + 1) * size;
    queries += u64(blockIdx.x) * heads * (rotated + plain);
    keys += u64(blockIdx.x) * size;
#pragma unroll 1
    for (u32 head = warp_id(); head <= heads; head += warps) {
        const T* const from = head < heads ? queries + head * (rotated + plain) : keys;
#pragma unroll 1
        for (u32 column = lane_column; column < rotated; column += 64) {
            *reinterpret_cast<T2*>(qkv + head * size + column) = *reinterpret_cast<const T2*>(from + column);
        }
    }
    if (warp_id() != 0) return;
    float sum = 0.0f;
#pragma unroll 1
    for (u32 column = rotated + lane_column; column < size; column += 64) {
        const float2 x = load_two(keys + column);
        sum = fmaf(x.y, x.y, fmaf(x.x, x.x, sum));
    }
    const Norm of_latent = {norm, rsqrtf(warp_sum(sum) / float(latent) + epsilon)};
#pragma unroll 1
    for (u32 column = lane_column; column < latent; column += 64) {
        const float2 x = of_latent.apply(load_two(keys + rotated + column), column);
        *reinterpret_cast<T2*>(qkv + heads * size + rotated + column) = to_t2(x.x, x.y);
    }
}

// Rotates the queries and the key of a row, `[heads + 1][head_dim]`, and writes the key to the cache,
// `[blocks][block_tokens][head_dim]`. The pair (i, i + rotary_dim / 2) of a head is rotated by the angle
// whose cosine and sine are the row's angles[i]. rotary_dim is a multiple of 4. Grid (rows,
// ceil((heads + 1) / 8)), 256 threads; one warp per head.
KERNEL(256) store_latent(
    T* qkv, T* cache, const u32* positions, const u32* slots, const float2* angles, u32 heads, u32 head_dim, u32 rotary_dim,
    u32 block_tokens
) {
    wait_for_kernels_before();
    const u32 head = blockIdx.y * (blockDim.x / 32) + warp_id();
    if (head > heads) return;
    const u32 half = rotary_dim / 2, slot = slots[blockIdx.x];
    T* const row = qkv + (u64(blockIdx.x) * (heads + 1) + head) * head_dim;
    angles += u64(positions[blockIdx.x]) * half;
#pragma unroll 1
    for (u32 i = lane_id() * 2; i < half; i += 64) {
        const float2 a = load_two(row + i), b = load_two(row + half + i);
        const float4 angle = *reinterpret_cast<const float4*>(angles + i);
        *reinterpret_cast<T2*>(row + i) = to_t2(a.x * angle.x - b.x * angle.y, a.y * angle.z - b.y * angle.w);
        *reinterpret_cast<T2*>(row + half + i) = to_t2(b.x * angle.x + a.x * angle.y, b.y * angle.z + a.y * angle.w);
    }
    if (head < heads || slot == NONE) return;
    __syncwarp();
    T* const cached = cache + u64(slot) * head_dim;
#pragma unroll 1
    for (u32 i = lane_id() * 2; i < head_dim; i += 64) {
        *reinterpret_cast<T2*>(cached + i) = *reinterpret_cast<const T2*>(row + i);
    }
}

// Pairs of elements of a key per lane. A key has at most 64 · PAIRS elements.
constexpr u32 PAIRS = 9;

// Computes the attention of one row and one head over all keys up to the row's own. Grid (rows, heads), 128
// threads. Each warp takes units of 128 keys, counted from the start of the sequence. The units are merged
// in ascending order, so the order of additions depends only on the row's position. Whole keys are
// summed as if they were values; the elements before the last `value_dim` are dropped at the end.
KERNEL(128) attend_latent(
    T* out, const T* qkv, const T* cache, const u32* tables, const uint4* sequences, u32 count, u32 heads, u32 head_dim,
    u32 value_dim, u32 block_tokens, float scale
) {
    wait_for_kernels_before();
    __shared__ __align__(8) float query[PAIRS * 64], total[PAIRS * 64], parts[WARPS][PAIRS * 64];
    __shared__ float2 stats[WARPS];
    const u32 row = blockIdx.x, head = blockIdx.y, lane_column = lane_id() * 2;
    // Finds the sequence of the row. Sequences are in the order of their rows.
    u32 low = 0, high = count;
    while (high - low > 1) {
        const u32 middle = (low + high) / 2;
        if (sequences[middle].x <= row) low = middle;
        else high = middle;
    }
    const uint4 sequence = sequences[low];
    // Number of keys that the row sees. A padding sequence has length 0, and its row sees none.
    const u32 end = sequence.z == 0 ? 0 : sequence.z - (sequence.x + sequence.y - 1 - row);
    const u32 units = (end + UNIT - 1) / UNIT;
    const u32 key_vectors = head_dim / VECTOR;
    const Pages pages = {tables, sequence.w, block_tokens, block_tokens * key_vectors, key_vectors};
    const float factor = scale * LOG2_E;

    const T* const from = qkv + (u64(row) * (heads + 1) + head) * head_dim;
    // Each thread reads and writes only its own columns of `total`.
#pragma unroll 1
    for (u32 column = threadIdx.x; column < PAIRS * 64; column += blockDim.x) {
        query[column] = column < head_dim ? to_float(from[column]) : 0.0f;
        total[column] = 0.0f;
    }
    __syncthreads();
    float all_largest = UNSEEN, all_sum = 0.0f;
#pragma unroll 1
    for (u32 first = 0; first < units; first += WARPS) {
        const u32 unit = first + warp_id();
        if (unit < units) {
            float largest = UNSEEN, sum = 0.0f;
            float2 weighed[PAIRS];
#pragma unroll
            for (u32 i = 0; i < PAIRS; i++) weighed[i] = make_float2(0.0f, 0.0f);
            const u32 unit_end = min((unit + 1) * UNIT, end);
#pragma unroll 1
            for (u32 key = unit * UNIT; key < unit_end; key++) {
                const T* const from_cache = cache + u64(pages.vector_of(key)) * VECTOR;
                float2 x[PAIRS];
                float score = 0.0f;
#pragma unroll
                for (u32 i = 0; i < PAIRS; i++) {
                    const u32 column = lane_column + 64 * i;
                    x[i] = column < head_dim ? load_two(from_cache + column) : make_float2(0.0f, 0.0f);
                    const float2 q = *reinterpret_cast<const float2*>(query + column);
                    score = fmaf(q.y, x[i].y, fmaf(q.x, x[i].x, score));
                }
                score = warp_sum(score) * factor;
                const float best = fmaxf(largest, score);
                const float keep = power_of_two(largest - finite(best)), weight = power_of_two(score - finite(best));
                largest = best;
                sum = fmaf(sum, keep, weight);
#pragma unroll
                for (u32 i = 0; i < PAIRS; i++) {
                    weighed[i].x = fmaf(weight, x[i].x, weighed[i].x * keep);
                    weighed[i].y = fmaf(weight, x[i].y, weighed[i].y * keep);
                }
            }
#pragma unroll
            for (u32 i = 0; i < PAIRS; i++) {
                *reinterpret_cast<float2*>(&parts[warp_id()][lane_column + 64 * i]) = weighed[i];
            }
            if (lane_id() == 0) stats[warp_id()] = make_float2(largest, sum);
        }
        __syncthreads();
#pragma unroll 1
        for (u32 part = 0; part < min(units - first, WARPS); part++) {
            float keep, add;
            join(all_largest, stats[part].x, keep, add);
            all_sum = merge(all_sum, keep, stats[part].y, add);
#pragma unroll 1
            for (u32 column = threadIdx.x; column < head_dim; column += blockDim.x) {
                total[column] = merge(total[column], keep, parts[part][column], add);
            }
        }
        __syncthreads();
    }

    const float inverse_sum = inverse(all_sum);
    const u32 before = head_dim - value_dim;
    out += (u64(row) * heads + head) * value_dim;
#pragma unroll 1
    for (u32 column = threadIdx.x; column < head_dim; column += blockDim.x) {
        if (column >= before) out[column - before] = to_t(result(total[column], inverse_sum));
    }
}
