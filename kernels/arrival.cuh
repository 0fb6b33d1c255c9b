// Coordination of blocks that compute parts of one result: the last block to finish combines the parts.
#pragma once
#include "common.cuh"

// Returns, in every thread of the block, whether all other of the `blocks` blocks have called this. If so,
// their earlier writes are visible to loads that bypass the L1 cache. `arrived` counts the calls: it is 0
// before the first one and again after the last. `shared` is a word of shared memory that is not in use.
// Not inlined, because most kernels contain it.
__device__ __noinline__ bool is_last_to_arrive(u32* arrived, u32 blocks, u32* shared) {
    __syncthreads();
    if (threadIdx.x == 0) {
        // Orders the writes of the whole block, which the barrier made visible to this thread.
        __threadfence();
        const u32 before = atomicAdd(arrived, 1);
        __threadfence();
        // The next launch counts from zero again.
        if (before == blocks - 1) *arrived = 0;
        *shared = before;
    }
    __syncthreads();
    const u32 before = *shared;
    // Every thread has read `*shared`, so the caller may reuse the memory.
    __syncthreads();
    return before == blocks - 1;
}
