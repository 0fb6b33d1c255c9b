// Blocks that work on parts of one result, of which the last to be done puts the parts together.
#pragma once
#include "common.cuh"

// Returns whether all other of the `blocks` blocks have called it, in every thread of the block.
// What they wrote before is then visible, to loads that bypass the L1 cache. `arrived` counts them: it
// is 0 before the first call, and again after the last. `shared`: shared memory that nothing else is
// in. Called, not inlined: most kernels have it.
__device__ __noinline__ bool is_last_to_arrive(u32* arrived, u32 blocks, u32* shared) {
    __syncthreads();
    if (threadIdx.x == 0) {
        // Orders what the whole block wrote, since the barrier made it visible to this thread.
        __threadfence();
        const u32 before = atomicAdd(arrived, 1);
        __threadfence();
        // The next launch counts from zero again.
        if (before == blocks - 1) *arrived = 0;
        *shared = before;
    }
    __syncthreads();
    const u32 before = *shared;
    // The memory may take something else.
    __syncthreads();
    return before == blocks - 1;
}
