// What the kernels share: the activation type, warp and block reductions, and the
// few instructions that C++ has no name for.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// The activation type. Each file is compiled once for each.
#if QUELL_F16
typedef __half T;
typedef __half2 T2;
#else
typedef __nv_bfloat16 T;
typedef __nv_bfloat162 T2;
#endif

constexpr u32 NONE = 0xffffffffu;
constexpr u32 FULL_WARP = 0xffffffffu;

// A kernel that is launched with at most so many threads per block. Without the bound, a kernel
// could come to use more registers than that many threads can have, and its launch would fail.
// A second number says how many such blocks should have room on a multiprocessor.
#define KERNEL(...) extern "C" __global__ void __launch_bounds__(__VA_ARGS__)
#define INLINE __device__ __forceinline__

// GPUs of compute capability 9.0 or more can begin a kernel while the one before it still runs. The
// instructions for that stand in an image as comments that begin with "// sm_90: "; the loader makes
// instructions of them if the GPU has them (src/device/cuda/overlap.rs).
//
// Waits until all kernels before this one have completed and what they wrote can be seen. Then the
// next kernel may begin, which waits in the same way. Every thread of every kernel calls this:
// before it ends, before it reads anything that a kernel may have written, and before it writes.
INLINE void wait_for_kernels_before() {
    asm volatile("// sm_90: griddepcontrol.wait; griddepcontrol.launch_dependents;" ::: "memory");
}

// Starts to read `bytes` bytes into the L2 cache; both are multiples of 16. Kernels do so for what
// they will read first, before they wait. It does not matter whether other kernels write there, since
// they do so in the same cache.
INLINE void prefetch(const void* from, u32 bytes) {
    asm volatile("// sm_90: cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes));
}

#if QUELL_F16
INLINE float to_float(T x) { return __half2float(x); }
INLINE float2 to_float2(T2 x) { return __half22float2(x); }
// Saturates: a value beyond the largest float16 stays finite; NaN stays NaN.
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

// A pair of activations as the 32 bits that the matrix instructions take.
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

// The sum over a block of whole warps, in every thread; `scratch` holds 32 floats.
// The order of addition depends on the block's size only.
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

// Copies 16 bytes to shared memory without a register; zeros when not `wanted`.
INLINE void copy_async(void* shared, const void* global, bool wanted) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(wanted ? 16 : 0)
                 : "memory");
}
INLINE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `PENDING` groups of this thread are still on their way.
template <int PENDING>
INLINE void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four 8 × 8 matrices at an address of shared memory; see `load_matrices`.
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

// Four 8 × 8 matrices from shared memory; lane i gives the address of a row of matrix i / 8.
INLINE void load_matrices(u32 (&out)[4], const void* row) { load_matrices_at(out, shared_address(row)); }
INLINE void load_matrices_transposed(u32 (&out)[4], const void* row) {
    load_matrices_transposed_at(out, shared_address(row));
}

// d += a · b for a of 16 × 16, b of 16 × 8.
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
