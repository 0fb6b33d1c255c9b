// The gate of a feed-forward layer, as gated_activation and the matrix products compute it.
#pragma once
#include "common.cuh"

// Returns x · sigmoid(z), or 0 where e^(−z) overflows.
INLINE float gate(float x, float z) { return __fdividef(x, 1.0f + __expf(-z)); }

// Returns activation(x) · up, for SiLU or the tanh form of GELU: x/2 · (1 + tanh u) = x · sigmoid(2u).
INLINE float gated(float x, float up, bool gelu) {
    float cubic = fmaf(x * x * x, 0.044715f, x);
    return gate(x, gelu ? cubic * 1.595769f : x) * up;
}
