// Activation functions and gates.
#include "gate.cuh"
#include "vector.cuh"

// out = activation(gate) · up, where a row of `gate_up` is [gate | up] and `columns` is a
// multiple of eight.
KERNEL(256) gated_activation(T* out, const T* gate_up, u32 rows, u32 columns, u32 gelu) {
    wait_for_kernels_before();
    u32 vectors = columns / 8;
    u32 index = blockIdx.x * blockDim.x + threadIdx.x;
    u32 row = index / vectors;
    if (row >= rows) return;
    const T* from = gate_up + u64(row) * 2 * columns + (index - row * vectors) * 8;
    float x[8], up[8];
    load8(x, from);
    load8(up, from + columns);
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = gated(x[i], up[i], gelu);
    store8(out + u64(index) * 8, x);
}

// out = activate(up), for `count` numbers, a multiple of eight.
template <class Activate>
INLINE void ungated(T* out, const T* up, u32 count, Activate activate) {
    wait_for_kernels_before();
    u32 index = (blockIdx.x * blockDim.x + threadIdx.x) * 8;
    if (index >= count) return;
    float x[8];
    load8(x, up + index);
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = activate(x[i]);
    store8(out + index, x);
}

// out = max(up, 0)². NaN stays NaN.
KERNEL(256) squared_relu(T* out, const T* up, u32 count) {
    ungated(out, up, count, [](float x) { return x < 0.0f ? 0.0f : x * x; });
}

// out = up/2 · (1 + erf(up / √2)).
KERNEL(256) gelu(T* out, const T* up, u32 count) { ungated(out, up, count, exact_gelu); }

// x → cap · tanh(x / cap), for `count` numbers.
KERNEL(256) softcap(float* x, float cap, u32 count) {
    wait_for_kernels_before();
    u32 index = blockIdx.x * blockDim.x + threadIdx.x;
    if (index < count) x[index] = cap * tanhf(x[index] / cap);
}

// x = x · sigmoid(gate), for `count` numbers, a multiple of eight.
KERNEL(256) sigmoid_gate(T* x, const T* gates, u32 count) {
    wait_for_kernels_before();
    u32 index = (blockIdx.x * blockDim.x + threadIdx.x) * 8;
    if (index >= count) return;
    float v[8], z[8];
    load8(v, x + index);
    load8(z, gates + index);
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = gate(v[i], z[i]);
    store8(x + index, v);
}

// The same, where each gate applies to `width` adjacent numbers, a multiple of eight.
KERNEL(256) sigmoid_gates(T* x, const float* gates, u32 count, u32 width) {
    wait_for_kernels_before();
    u32 index = (blockIdx.x * blockDim.x + threadIdx.x) * 8;
    if (index >= count) return;
    float v[8], z = gates[index / width];
    load8(v, x + index);
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = gate(v[i], z);
    store8(x + index, v);
}
