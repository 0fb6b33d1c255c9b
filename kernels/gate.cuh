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

// Returns x/2 · (1 + erf(x / √2)) as max(x, 0) − |x| · h, where h is half the complementary error function
// of |x| / √2, as Press et al., Numerical Recipes, 1992, approximate it.
INLINE float exact_gelu(float x) {
    const float z = fabsf(x) * 0.70710678f, t = __fdividef(1.0f, fmaf(z, 0.5f, 1.0f));
    float p = 0.17087277f;
    p = fmaf(p, t, -0.82215223f);
    p = fmaf(p, t, 1.48851587f);
    p = fmaf(p, t, -1.13520398f);
    p = fmaf(p, t, 0.27886807f);
    p = fmaf(p, t, -0.18628806f);
    p = fmaf(p, t, 0.09678418f);
    p = fmaf(p, t, 0.37409196f);
    p = fmaf(p, t, 1.00002368f);
    p = fmaf(p, t, -1.26551223f);
    const float h = 0.5f * t * __expf(fmaf(-z, z, p));
    // NaN stays NaN.
    return fmaf(-fabsf(x), h, x < 0.0f ? 0.0f : x);
}
