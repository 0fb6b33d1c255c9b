// Resolution of token ids, and lookup of their rows in an unquantised embedding table.
#include "vector.cuh"

// resolved[r] = the token of row r: sample number feedback[r] of the previous step, or tokens[r] if
// feedback[r] is NONE.
KERNEL(256) resolve_tokens(u32* resolved, const u32* tokens, const u32* feedback, const u32* previous, u32 rows) {
    wait_for_kernels_before();
    u32 row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    u32 sample = feedback[row];
    resolved[row] = sample == NONE ? tokens[row] : previous[sample];
}

// resolved[r] = the token of row r without its segment, of which each has `words` tokens.
KERNEL(256) resolve_words(u32* resolved, const u32* tokens, u32 words, u32 rows) {
    wait_for_kernels_before();
    u32 row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row < rows) resolved[row] = tokens[row] % words;
}

// out[r] += added[segment · count + position], where the segment of row r is its token divided by
// `words`. A place that does not exist is that of row 0. One block per row.
KERNEL(256) add_positions(
    float* out, const float* added, const u32* tokens, const u32* positions, u32 words, u32 count, u32 segments,
    u32 columns
) {
    wait_for_kernels_before();
    const u32 segment = tokens[blockIdx.x] / words, position = positions[blockIdx.x];
    const u64 place = segment < segments && position < count ? u64(segment) * count + position : 0;
    const float* from = added + place * columns;
    float* to = out + u64(blockIdx.x) * columns;
    for (u32 column = threadIdx.x * 8; column < columns; column += blockDim.x * 8) {
        float x[8], own[8];
        load8(x, to + column);
        load8(own, from + column);
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] += own[i];
        store8(to + column, x);
    }
}

// out[r] = scale · table[resolved[r]]; a token that is not below `vocabulary` reads row 0.
// One block per row.
KERNEL(256) embed_dense(float* out, const T* table, const u32* resolved, float scale, u32 columns, u32 vocabulary) {
    wait_for_kernels_before();
    u32 token = resolved[blockIdx.x];
    if (token >= vocabulary) token = 0;
    const T* from = table + u64(token) * columns;
    float* to = out + u64(blockIdx.x) * columns;
    for (u32 column = threadIdx.x * 8; column < columns; column += blockDim.x * 8) {
        float x[8];
        load8(x, from + column);
#pragma unroll
        for (int i = 0; i < 8; i++) x[i] *= scale;
        store8(to + column, x);
    }
}
