// y = W x + b with weights in the activation type, on tensor cores.
//
// W is `outputs × inputs` (or has twice as many rows, see OutputOf in linear.cuh), x has one row
// per token; `inputs` is a multiple of 8. Tiles of both stream through shared memory in a ring of stages, and every warp multiplies a
// part of the tile. Three tiles: 16 rows for decoding, where reading W is all the work
// and many small blocks keep memory busy; 64 rows for large batches; 128 rows for
// prompts, where the tensor cores are the limit.
//
// With `expert_tiles` it is one product per expert: the weights of the experts follow each other,
// and expert e computes the pairs in the tiles that are listed for it;
// pair p reads row `row_index[p]` of x and writes row p.
#include "linear.cuh"

// `ROWS × OUTPUTS` is the tile, `DEPTH` the inputs of a stage, `WARPS_M × WARPS_N` how
// the warps divide the tile among them.
template <int ROWS, int OUTPUTS, int DEPTH, int WARPS_M, int WARPS_N, int STAGES>
INLINE void linear(void* out, const T* x, const T* weight, const float* bias, const u32* row_index,
                   const uint4* expert_tiles, u32 rows, u32 outputs, u32 inputs, u32 out_stride, u32 out_mode) {
    constexpr int THREADS = WARPS_M * WARPS_N * 32;
    constexpr int CHUNKS = DEPTH / 8, STEPS = DEPTH / 16;
    // Sixteens of rows and eights of outputs that a warp computes.
    constexpr int M = ROWS / WARPS_M / 16, N = OUTPUTS / WARPS_N / 8;
    constexpr int STAGE = (ROWS + OUTPUTS) * DEPTH * sizeof(T);
    static_assert(N == 1 || N % 2 == 0, "weights are read by one eight or by two");
    extern __shared__ __align__(128) u8 stages[];

    Tile tile = tile_of_block(expert_tiles, rows, ROWS);
    if (tile.row >= tile.row_end) return;
    const OutputOf output_of(OUTPUTS, outputs, out_mode);
    const u32 first_output = tile.column * output_of.half, weight_rows = is_gated(out_mode) ? 2 * outputs : outputs;
    weight += ((u64)tile.expert * weight_rows + first_output) * inputs;
    if (bias) bias += (u64)tile.expert * weight_rows;
    const u32 early = threadIdx.x < OUTPUTS ? output_of(threadIdx.x) : NONE;
    if (early < weight_rows - first_output) prefetch(weight + (u64)early * inputs, min(inputs, STAGES * DEPTH) * sizeof(T));
    wait_for_kernels_before();
    RowCopies<ROWS, DEPTH, THREADS> x_copies(x, tile.row_end - tile.row, inputs, RowOf{row_index, tile});
    RowCopies<OUTPUTS, DEPTH, THREADS> weight_copies(weight, weight_rows - first_output, inputs, output_of);

    u32 warp_row = warp_id() / WARPS_N * (M * 16), warp_output = warp_id() % WARPS_N * (N * 8);
    u32 lane = lane_id(), shared = shared_address(stages);
    LaneAddress a_lane = rows_address<CHUNKS>(warp_row);
    // Operand b: eight outputs and the inputs of two steps, or sixteen and those of one.
    LaneAddress b_lane = N == 1 ? lane_address<CHUNKS>(warp_output + (lane & 7), lane >> 3)
                                : lane_address<CHUNKS>(warp_output + (lane & 7) + (lane >> 4) * 8, lane >> 3 & 1);
    float sum[M][N][4] = {};

    const u32 chunks = (inputs + DEPTH - 1) / DEPTH, stages_end = shared + STAGES * STAGE;
    u32 thread_chunk = threadIdx.x % CHUNKS;
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
#pragma unroll 1
    for (u32 chunk = 0; chunk < chunks; chunk++) {
        // The oldest stage is there, of all threads, and none reads the one before.
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
                // The next operands are on their way while these are multiplied.
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

    // The stages are read; their memory takes the results.
    __syncthreads();
    float* results = reinterpret_cast<float*>(stages);
    static_assert(ROWS * (OUTPUTS + 8) * 4 <= STAGES * STAGE, "the results fit where the stages were");
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int n = 0; n < N; n++) {
            keep_matrix(results, OUTPUTS, warp_row + m * 16, warp_output + n * 8, sum[m][n]);
        }
    }
    __syncthreads();
    Output to = {out, bias, outputs, out_stride, out_mode};
    if (is_gated(out_mode)) {
        write_results(to, tile, {results, ROWS, OUTPUTS, 1});
    } else {
        write_tile<ROWS, OUTPUTS>(to, tile, results, first_output);
    }
}

// Shared memory: `STAGES · (ROWS + OUTPUTS) · DEPTH · 2` bytes, which lets `BLOCKS` blocks run on a
// multiprocessor of compute capability 9.0. The compiler need not save registers for more.
#define LINEAR(NAME, ROWS, OUTPUTS, DEPTH, WARPS_M, WARPS_N, STAGES, BLOCKS)                                         \
    extern "C" __global__ void __launch_bounds__(WARPS_M * WARPS_N * 32, BLOCKS)                                     \
        NAME(void* out, const T* x, const T* weight, const float* bias, const u32* row_index,                        \
             const uint4* expert_tiles, u32 rows, u32 outputs, u32 inputs, u32 out_stride, u32 out_mode) {           \
        linear<ROWS, OUTPUTS, DEPTH, WARPS_M, WARPS_N, STAGES>(out, x, weight, bias, row_index, expert_tiles, rows, \
                                                               outputs, inputs, out_stride, out_mode);               \
    }

LINEAR(linear_m16, 16, 32, 128, 1, 4, 5, 3)
LINEAR(linear_m64, 64, 64, 64, 2, 2, 4, 3)
LINEAR(linear_m128, 128, 128, 64, 2, 2, 3, 2)
