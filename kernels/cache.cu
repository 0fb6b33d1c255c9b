// Operations on whole blocks of the KV cache.
//
// The cache consists of arrays, such as the keys or the values of a layer. Each array has `blocks`
// blocks of `vectors` vectors of 16 bytes.
#include "common.cuh"

INLINE uint4* block_of(T* cache, u32 array, u32 blocks, u32 block, u32 vectors) {
    return reinterpret_cast<uint4*>(cache) + (u64(array) * blocks + block) * vectors;
}

// Copies block pairs[i].x to block pairs[i].y in every array. Grid: (pairs, arrays).
// No block may be both read and written.
KERNEL(256) copy_blocks(T* cache, const uint2* pairs, u32 blocks, u32 vectors) {
    wait_for_kernels_before();
    uint2 pair = pairs[blockIdx.x];
    const uint4* from = block_of(cache, blockIdx.y, blocks, pair.x, vectors);
    uint4* to = block_of(cache, blockIdx.y, blocks, pair.y, vectors);
    for (u32 i = threadIdx.x; i < vectors; i += blockDim.x) to[i] = from[i];
}

// Fills the listed blocks with NaN in every array. Grid: (listed blocks, arrays).
KERNEL(256) poison_blocks(T* cache, const u32* list, u32 blocks, u32 vectors) {
    wait_for_kernels_before();
    uint4* to = block_of(cache, blockIdx.y, blocks, list[blockIdx.x], vectors);
    uint4 nan = make_uint4(FULL_WARP, FULL_WARP, FULL_WARP, FULL_WARP);
    for (u32 i = threadIdx.x; i < vectors; i += blockDim.x) to[i] = nan;
}
