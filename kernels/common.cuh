// Code that all kernels share: the activation type, warp and block reductions, and wrappers of
// instructions for which CUDA C++ has no function.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// The activation type. Each file is compiled once for float16 and once for bfloat16.
#if QUELL_F16
typedef __half T;
typedef __half2 T2;
#else
typedef __nv_bfloat16 T;
typedef __nv_bfloat162 T2;
#endif

constexpr u32 NONE = 0xffffffffu;
constexpr u32 FULL_WARP = 0xffffffffu;

// `KERNEL(threads[, blocks])` declares a kernel that is launched with at most `threads` threads per block.
// Without this bound, the compiler could use more registers per thread than such a block can have, and the
// launch would fail. `blocks` is the number of blocks that should fit on a multiprocessor.
#define KERNEL(...) extern "C" __global__ void __launch_bounds__(__VA_ARGS__)
#define INLINE __device__ __forceinline__

// GPUs of compute capability 9.0 or higher can start a kernel while the previous one still runs. The
// instructions for this are in an image as comments that begin with "// sm_90: ". The loader turns them
// into instructions if the GPU supports them (src/device/cuda/overlap.rs).
//
// Waits until all earlier kernels have completed and their writes are visible. Then lets the next
// kernel start, which waits in the same way. Every thread of every kernel must call this before it
// exits, before it reads anything that a kernel may have written, and before it writes.
INLINE void wait_for_kernels_before() {
    asm volatile("// sm_90: griddepcontrol.wait; griddepcontrol.launch_dependents;" ::: "memory");
}

// Prefetches `bytes` bytes into the L2 cache. The address and the size are multiples of 16. Kernels
// prefetch what they will read first, before they wait. Other kernels may still write there, because
// their writes go through the same cache.
INLINE void prefetch(const void* from, u32 bytes) {
    asm volatile("// sm_90: cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes));
}

#if QUELL_F16
INLINE float to_float(T x) { return __half2float(x); }
INLINE float2 to_float2(T2 x) { return __half22float2(x); }
// Clamps to the finite range of float16; NaN stays NaN.
INLINE float saturate_t(float x) {
    return x > 65504.0f ? 65504.0f : (x < -65504.0f ? -65504.0f : x);
}
INLINE T to_t(float x) { return __float2half_rn(saturate_t(x)); }
INLINE T2 to_t2(float x, float y) { return __floats2half2_rn(saturate_t(x), saturate_t(y)); }
#else
INLINE float to_float(T x) { return __bfloat162float(x); }
INLINE float2 to_float2(T2 x) { return __bfloat1622float2(x); }
INLINE T to_t(float x) { return __float2bfloat16_rn(x); }
INLINE T2 to_t2(float x, float y) { return __floats2bfloat162_rn(x, y); }
#endif

// Returns a pair of activations as the 32-bit operand of the matrix instructions.
INLINE u32 bits(T2 x) { return *reinterpret_cast<u32*>(&x); }

INLINE u32 lane_id() { return threadIdx.x & 31; }
INLINE u32 warp_id() { return threadIdx.x >> 5; }

INLINE float warp_sum(float x) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) x += __shfl_xor_sync(FULL_WARP, x, offset);
    return x;
}

INLINE float warp_max(float x) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, offset));
    return x;
}

// Returns the sum over a block of whole warps to every thread; `scratch` holds 32 floats.
// The order of addition depends only on the block size.
INLINE float block_sum(float x, float* scratch) {
    x = warp_sum(x);
    __syncthreads();
    if (lane_id() == 0) scratch[warp_id()] = x;
    __syncthreads();
    x = lane_id() < blockDim.x / 32 ? scratch[lane_id()] : 0.0f;
    return warp_sum(x);
}

INLINE u32 shared_address(const void* pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

// Starts to copy 16 bytes to shared memory without using registers; writes zeros unless `wanted`.
INLINE void copy_async(void* shared, const void* global, bool wanted) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(wanted ? 16 : 0)
                 : "memory");
}
INLINE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `PENDING` copy groups of this thread are in flight.
template <int PENDING>
INLINE void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Like `load_matrices`, for an address in shared memory.
INLINE void load_matrices_at(u32 (&out)[4], u32 row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(row)
                 : "memory");
}
INLINE void load_matrices_transposed_at(u32 (&out)[4], u32 row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(row)
                 : "memory");
}

// Loads four 8 × 8 matrices from shared memory; lane i passes the address of row i % 8 of matrix i / 8.
INLINE void load_matrices(u32 (&out)[4], const void* row) { load_matrices_at(out, shared_address(row)); }
INLINE void load_matrices_transposed(u32 (&out)[4], const void* row) {
    load_matrices_transposed_at(out, shared_address(row));
}

// Computes d += a · b, where a is 16 × 16 and b is 16 × 8.
INLINE void matrix_multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if QUELL_F16
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#endif
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
