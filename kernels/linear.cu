// y = W x + b with weights in the activation type, on tensor cores.
//
// W is `outputs × inputs` (or has twice as many rows, see OutputOf in linear.cuh), x has one row
// per token; `inputs` is a multiple of 8. Tiles of both stream through shared memory in a ring of
// stages, and every warp multiplies a part of the tile. There are three tiles: 16 rows for decode, which
// is limited by reading W, so that many small blocks keep memory busy; 64 rows for large batches; 128
// rows for prefill, which is limited by the tensor cores.
//
// A unit is `unit` inputs, a multiple of 128. If there are few tiles of 16 or 64 rows, several blocks
// (gridDim.z) share the units of each tile, and the last one to arrive adds up the sums. In a tile of
// 128 rows, a thread has no registers for a second set of sums, so it keeps its total in memory. As many
// blocks run as there is memory for, and each computes one tile after the other.
//
// With `expert_tiles`, there is one product per expert. The weights of the experts are consecutive, and
// expert e computes the pairs in the tiles that are listed for it.
// Pair p reads row `row_index[p]` of x (row p if `row_index` is null) and writes row p.
#include "linear.cuh"

// The operands of a product, and where its results are written.
struct Product {
    void* out;
    const T *x, *weight;
    const float* bias;
    const u32* row_index;
    const uint4* expert_tiles;
    u32* sums;
    u32 unit, rows, row_tiles, outputs, inputs, out_stride, out_mode;
};

// Calls `change` with the lane's four sums of each accumulator, and the index of the accumulator.
template <int M, int N, class Change>
INLINE void each_four(float (&sums)[M][N][4], Change change) {
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int n = 0; n < N; n++) change(sums[m][n], m * N + n);
    }
}

// Computes tile `index`. Its size is `ROWS × OUTPUTS`, a stage has `DEPTH` inputs, and
// `WARPS_M × WARPS_N` warps divide the tile among them. If `IN_MEMORY`, threads keep the totals of the
// units in memory.
template <int ROWS, int OUTPUTS, int DEPTH, int WARPS_M, int WARPS_N, int STAGES, bool IN_MEMORY>
INLINE void linear_tile(const Product& product, u32 index) {
    constexpr int THREADS = WARPS_M * WARPS_N * 32;
    constexpr int CHUNKS = DEPTH / 8, STEPS = DEPTH / 16;
    // Groups of 16 rows and of 8 outputs that a warp computes.
    constexpr int M = ROWS / WARPS_M / 16, N = OUTPUTS / WARPS_N / 8;
    constexpr int STAGE = (ROWS + OUTPUTS) * DEPTH * sizeof(T);
    static_assert(N == 1 || N % 2 == 0, "weights are read by one eight or by two");
    extern __shared__ __align__(128) u8 stages[];

    const u32 outputs = product.outputs, inputs = product.inputs;
    const u32 weight_rows = is_gated(product.out_mode) ? 2 * outputs : outputs;
    const u32 columns = (weight_rows + OUTPUTS - 1) / OUTPUTS;
    const Tile tile = tile_of(index, columns, product.row_tiles, product.expert_tiles, product.rows, ROWS);
    if (tile.row >= tile.row_end) return;
    const OutputOf output_of(OUTPUTS, outputs, product.out_mode);
    const u32 first_output = tile.column * output_of.half;
    const T* weight = product.weight + ((u64)tile.expert * weight_rows + first_output) * inputs;
    const float* bias = product.bias ? product.bias + (u64)tile.expert * weight_rows : nullptr;
    const u32 unit_chunks = product.unit / DEPTH, all_chunks = (inputs + DEPTH - 1) / DEPTH;
    const Units units((all_chunks + unit_chunks - 1) / unit_chunks);
    const u32 first_chunk = units.first * unit_chunks, first_input = first_chunk * DEPTH;
    const u32 early = threadIdx.x < OUTPUTS ? output_of(threadIdx.x) : NONE;
    if (early < weight_rows - first_output) {
        prefetch(weight + (u64)early * inputs + first_input, min(inputs - first_input, STAGES * DEPTH) * sizeof(T));
    }
    wait_for_kernels_before();
    RowCopies<ROWS, DEPTH, THREADS> x_copies(product.x, tile.row_end - tile.row, inputs, RowOf{product.row_index, tile});
    RowCopies<OUTPUTS, DEPTH, THREADS> weight_copies(weight, weight_rows - first_output, inputs, output_of);

    u32 warp_row = warp_id() / WARPS_N * (M * 16), warp_output = warp_id() % WARPS_N * (N * 8);
    u32 lane = lane_id(), shared = shared_address(stages);
    LaneAddress a_lane = rows_address<CHUNKS>(warp_row);
    // Operand b: 8 outputs and the inputs of two steps, or 16 outputs and the inputs of one step.
    LaneAddress b_lane = N == 1 ? lane_address<CHUNKS>(warp_output + (lane & 7), lane >> 3)
                                : lane_address<CHUNKS>(warp_output + (lane & 7) + (lane >> 4) * 8, lane >> 3 & 1);
    // The sums of the current unit, and of the units before it.
    float sum[M][N][4] = {}, total[IN_MEMORY ? 1 : M * N][4] = {};

    const u32 chunks = min(units.end * unit_chunks, all_chunks) - first_chunk, stages_end = shared + STAGES * STAGE;
    x_copies.from += first_chunk * (DEPTH * 2);
    weight_copies.from += first_chunk * (DEPTH * 2);
    u32 thread_chunk = first_chunk * CHUNKS + threadIdx.x % CHUNKS;
    // The sums of a tile, in groups of four, in the layout in which the threads hold them.
    constexpr u32 FOURS = M * N;
    const SharedSums kept(product.sums, IN_MEMORY ? blockIdx.x : index, FOURS * THREADS * 4, 1 + units.all - units.first_end);
    auto kept_at = [&](u32 place) { return reinterpret_cast<float4*>(kept.at) + place * (FOURS * THREADS) + threadIdx.x; };
    auto start = [&](u32 stage, bool any) {
        if (any) {
            const bool inside = thread_chunk < inputs / 8;
            x_copies.start(stage, inside);
            weight_copies.start(stage + ROWS * DEPTH * 2, inside);
            thread_chunk += CHUNKS;
        }
        copy_async_commit();
    };
#pragma unroll 1
    for (u32 stage = 0; stage < STAGES - 1; stage++) start(shared + stage * STAGE, stage < chunks);
    // The stage that is free, and the one that is read next.
    u32 empty = shared + (STAGES - 1) * STAGE, reading = shared;
    u32 unit = units.first;
#pragma unroll 1
    for (u32 chunk = 0; chunk < chunks; unit++) {
        const u32 unit_end = min(chunk + unit_chunks, chunks);
#pragma unroll 1
        for (; chunk < unit_end; chunk++) {
            // The oldest stage has arrived for all threads, and no thread reads the one before it any more.
            copy_async_wait<STAGES - 2>();
            __syncthreads();
            start(empty, chunk + STAGES - 1 < chunks);

            u32 a_stage = reading, b_stage = a_stage + ROWS * DEPTH * 2;
            if constexpr (N == 1) {
#pragma unroll
                for (int step = 0; step < STEPS; step += 2) {
                    u32 b[4];
                    load_matrices(b, b_stage + b_lane.at(step));
#pragma unroll
                    for (int half = 0; half < 2; half++) {
#pragma unroll
                        for (int m = 0; m < M; m++) {
                            u32 a[4];
                            load_matrices(a, a_stage + a_lane.at(step + half) + m * 16 * DEPTH * 2);
                            matrix_multiply(sum[m][0], a, b[half * 2], b[half * 2 + 1]);
                        }
                    }
                }
            } else {
                u32 a[2][M][4], b[2][N / 2][4];
                auto load = [&](int step) {
                    u32 a_row = a_stage + a_lane.at(step), b_row = b_stage + b_lane.at(step);
#pragma unroll
                    for (int m = 0; m < M; m++) load_matrices(a[step & 1][m], a_row + m * 16 * DEPTH * 2);
#pragma unroll
                    for (int n = 0; n < N / 2; n++) load_matrices(b[step & 1][n], b_row + n * 16 * DEPTH * 2);
                };
                load(0);
#pragma unroll
                for (int step = 0; step < STEPS; step++) {
                    // The next operands are loaded while these are multiplied.
                    if (step + 1 < STEPS) load(step + 1);
#pragma unroll
                    for (int m = 0; m < M; m++) {
#pragma unroll
                        for (int n = 0; n < N; n++) {
                            const u32(&pair)[4] = b[step & 1][n / 2];
                            matrix_multiply(sum[m][n], a[step & 1][m], pair[n % 2 * 2], pair[n % 2 * 2 + 1]);
                        }
                    }
                }
            }
            empty = reading;
            reading = reading + STAGE == stages_end ? shared : reading + STAGE;
        }
        // The sums of a unit are complete.
        if constexpr (IN_MEMORY) {
            float4* const to = kept_at(0);
            if (unit > 0) {
                each_four(sum, [&](float (&four)[4], u32 i) {
                    const float4 before = to[i * THREADS];
                    four[0] += before.x, four[1] += before.y, four[2] += before.z, four[3] += before.w;
                });
            }
            if (chunk == chunks) break;
            each_four(sum, [&](float (&four)[4], u32 i) {
                to[i * THREADS] = make_float4(four[0], four[1], four[2], four[3]);
                four[0] = four[1] = four[2] = four[3] = 0.0f;
            });
        } else {
            float4* const to = kept_at(1 + unit - units.first_end);
            each_four(sum, [&](float (&four)[4], u32 i) {
                // Unless this block adds up its units, its `total` is not used.
                if (!units.adds()) to[i * THREADS] = make_float4(four[0], four[1], four[2], four[3]);
#pragma unroll
                for (int j = 0; j < 4; j++) total[i][j] += four[j], four[j] = 0.0f;
            });
        }
    }

    // All stages have been read, so their memory can hold the results.
    __syncthreads();
    float* results = reinterpret_cast<float*>(stages);
    static_assert(ROWS * (OUTPUTS + 8) * 4 <= STAGES * STAGE, "the results fit where the stages were");
    const auto keep = [&](u32 i, const float (&four)[4]) {
        keep_matrix(results, OUTPUTS, warp_row + i / N * 16, warp_output + i % N * 8, four);
    };
    if constexpr (IN_MEMORY) {
        each_four(sum, [&](float (&four)[4], u32 i) { keep(i, four); });
    } else if (!is_shared()) {
#pragma unroll
        for (u32 i = 0; i < FOURS; i++) keep(i, total[i]);
    } else {
        if (units.adds()) {
#pragma unroll
            for (u32 i = 0; i < FOURS; i++) {
                kept_at(0)[i * THREADS] = make_float4(total[i][0], total[i][1], total[i][2], total[i][3]);
            }
        }
        if (!is_last_to_arrive(kept.arrived, gridDim.z, reinterpret_cast<u32*>(stages))) return;
#pragma unroll 1
        for (u32 i = 0; i < FOURS; i++) {
            float four[4] = {};
#pragma unroll 4
            for (u32 place = 0; place < kept.count; place++) {
                const float4 sums = __ldcg(kept_at(place) + i * THREADS);
                four[0] += sums.x, four[1] += sums.y, four[2] += sums.z, four[3] += sums.w;
            }
            keep(i, four);
        }
    }
    __syncthreads();
    const Output to = {product.out, bias, outputs, product.out_stride, product.out_mode};
    if (is_gated(to.mode)) {
        write_gated(to, tile, results, ROWS, OUTPUTS);
    } else {
        write_tile<ROWS, OUTPUTS>(to, tile, results, first_output);
    }
}

// Computes the tiles of a product. gridDim.x is the number of tiles, or smaller with `IN_MEMORY`.
template <int ROWS, int OUTPUTS, int DEPTH, int WARPS_M, int WARPS_N, int STAGES, bool IN_MEMORY>
INLINE void linear(const Product& product) {
    if constexpr (IN_MEMORY) {
        const u32 weight_rows = is_gated(product.out_mode) ? 2 * product.outputs : product.outputs;
        const u32 tiles = (weight_rows + OUTPUTS - 1) / OUTPUTS * product.row_tiles;
#pragma unroll 1
        for (u32 index = blockIdx.x; index < tiles; index += gridDim.x) {
            linear_tile<ROWS, OUTPUTS, DEPTH, WARPS_M, WARPS_N, STAGES, IN_MEMORY>(product, index);
            // The next tile reuses the memory of the results.
            __syncthreads();
        }
    } else {
        linear_tile<ROWS, OUTPUTS, DEPTH, WARPS_M, WARPS_N, STAGES, IN_MEMORY>(product, blockIdx.x);
    }
}

// Shared memory: `STAGES · (ROWS + OUTPUTS) · DEPTH · 2` bytes, which lets `BLOCKS` blocks run on a
// multiprocessor of compute capability 9.0. The compiler need not limit registers for more blocks.
#define LINEAR(NAME, ROWS, OUTPUTS, DEPTH, WARPS_M, WARPS_N, STAGES, BLOCKS, IN_MEMORY)                              \
    extern "C" __global__ void __launch_bounds__(WARPS_M * WARPS_N * 32, BLOCKS)                                     \
        NAME(void* out, const T* x, const T* weight, const float* bias, const u32* row_index,                        \
             const uint4* expert_tiles, u32* sums, u32 unit, u32 rows, u32 row_tiles, u32 outputs, u32 inputs,       \
             u32 out_stride, u32 out_mode) {                                                                         \
        const Product product = {out,  x,    weight,    bias,    row_index, expert_tiles, sums,                      \
                                 unit, rows, row_tiles, outputs, inputs,    out_stride,   out_mode};                 \
        linear<ROWS, OUTPUTS, DEPTH, WARPS_M, WARPS_N, STAGES, IN_MEMORY>(product);                                  \
    }

LINEAR(linear_m16, 16, 32, 128, 1, 4, 5, 3, false)
LINEAR(linear_m64, 64, 64, 64, 2, 2, 4, 3, false)
LINEAR(linear_m128, 128, 128, 64, 2, 2, 3, 2, true)
