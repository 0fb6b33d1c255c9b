// Loads and stores of eight adjacent numbers, in accesses of 16 bytes. The addresses must be
// multiples of 16 bytes.
#pragma once
#include "common.cuh"

INLINE void load8(float (&x)[8], const float* from) {
    float4 low = *reinterpret_cast<const float4*>(from);
    float4 high = *reinterpret_cast<const float4*>(from + 4);
    x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
    x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
}

INLINE void load8(float (&x)[8], const T* from) {
    uint4 raw = *reinterpret_cast<const uint4*>(from);
    u32 pairs[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float2 pair = to_float2(*reinterpret_cast<T2*>(&pairs[i]));
        x[2 * i] = pair.x;
        x[2 * i + 1] = pair.y;
    }
}

INLINE void store8(float* to, const float (&x)[8]) {
    *reinterpret_cast<float4*>(to) = make_float4(x[0], x[1], x[2], x[3]);
    *reinterpret_cast<float4*>(to + 4) = make_float4(x[4], x[5], x[6], x[7]);
}

INLINE void store8(T* to, const float (&x)[8]) {
    *reinterpret_cast<uint4*>(to) =
        make_uint4(bits(to_t2(x[0], x[1])), bits(to_t2(x[2], x[3])), bits(to_t2(x[4], x[5])), bits(to_t2(x[6], x[7])));
}
