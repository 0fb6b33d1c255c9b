// y = W x + b with weights in blocks of integer codes that share a scale, and rows of
// such a matrix as embeddings.
//
// The host repacks W (src/device/cuda/pack.rs) into records: a record holds eight
// outputs and 128 inputs, codes first, in the order in which the lanes of a warp want
// them as operand b, then scales. The records of eight outputs follow each other, so a
// warp streams W from front to back. A weight is expanded in registers,
// `scale · code + offset` in float32 by one fused operation, and rounded once to the
// activation type.
//
// Beyond that it is linear.cu: x through shared memory, one accumulator an output, the
// same meaning of every parameter. `weight` of expert e starts `e · records` further.
#include "linear.cuh"

// How a group's scale is stored.
enum class Scales {
    Plain,          // half scale
    PlainMinimum,   // half2 {scale, minimum}
    Nested,         // u8 multiple + 128 of a half that the record's 128 inputs share
    NestedMinimum,  // u8 {multiple of the scale, of the minimum}, each + 128, of a half2; minimums are subtracted
};

// A record is two halves of 64 inputs, four steps of the matrix instruction each: the
// low halves of the codes (whole codes when BITS is 8), half after half, lane after
// lane; the plane of their higher bits; the groups' scales, output after output; the
// scales that the groups of an output share.
template <int BITS, int GROUP, Scales SCALES, int ZERO>
struct Format {
    static constexpr int LOW_WORDS = BITS == 8 ? 8 : 4;                     // u32 words a lane
    static constexpr int HIGH_WORDS = BITS == 5 ? 1 : BITS == 6 ? 2 : 0;    // likewise
    static constexpr int GROUPS = 128 / GROUP;
    static constexpr int GROUP_BYTES = SCALES == Scales::PlainMinimum ? 4 : SCALES == Scales::Nested ? 1 : 2;
    static constexpr int SCALE_WORDS = GROUPS * GROUP_BYTES / 4;            // u32 words an output
    static constexpr int SHARED_BYTES = SCALES == Scales::Nested ? 2 : SCALES == Scales::NestedMinimum ? 4 : 0;
    static constexpr int HIGH = LOW_WORDS * 128, SCALE = HIGH + HIGH_WORDS * 128;
    static constexpr int SHARED = SCALE + 8 * SCALE_WORDS * 4, BYTES = SHARED + 8 * SHARED_BYTES;
    static constexpr int GROUP_STEPS = GROUP / 16;
    static constexpr int STAGES = BITS == 4 ? 12 : BITS == 8 ? 8 : 10;      // of the tile of 16 rows
    static_assert(BYTES % 16 == 0, "records are copied by 16 bytes");

    // A weight is `scale · (expand − 1) + offset`, or `scale · expand + folded`.
    struct Factors {
        float scale, offset;

        // One instruction less a weight. Exact without minimums; with one, rounded to
        // the precision of the scale, far below that of a 16-bit weight.
        INLINE float folded() const { return offset - scale; }
    };

    // A code's number is `1 + code / UNIT`: its bits in the mantissa of 1.
    static constexpr float UNIT = BITS == 8 ? 32768.0f : 128.0f;

    // Where the low words of a lane start, and which of them holds those of a step.
    static INLINE u32 low_at(u32 half, u32 lane) { return (half * 32 + lane) * (LOW_WORDS * 2); }
    static INLINE int low_word(int step) { return BITS == 8 ? step : step / 2; }

    // The word with a lane's higher bits, those of the half's first step lowest.
    static INLINE u32 high_word(const u8* record, u32 half, u32 lane) {
        const u32* words = reinterpret_cast<const u32*>(record + HIGH);
        return HIGH_WORDS == 2 ? words[half * 32 + lane] : words[lane] >> half * 4;
    }

    // The four codes of a lane in one step of a half, one a byte, from their words.
    static INLINE u32 codes(u32 low, u32 high, int step) {
        if constexpr (BITS == 8) {
            return low;
        } else {
            // Bit 7 is the lowest bit of the exponent of 1.
            u32 codes = (step & 1 ? low >> 4 : low) & 0x0f0f0f0fu | 0x80808080u;
            if constexpr (BITS == 5) codes |= high << (4 - step) & 0x10101010u;
            if constexpr (BITS == 6) codes |= (step < 2 ? high << (4 - step * 2) : high >> (step * 2 - 4)) & 0x30303030u;
            return codes;
        }
    }

    static INLINE float expand(u32 codes, int index) {
        u32 bits = BITS == 8 ? __byte_perm(codes, 0x3f800000u, 0x7604u | index << 4)
                             : __byte_perm(codes, 0x3f000000u, 0x7044u | index << 8);
        return __uint_as_float(bits);
    }

    // Which word of an output's scales of a half holds those of `group` of the half.
    static INLINE int scale_word(int group) { return group * GROUP_BYTES / 4; }

    // All products are exact: a scale has 11 bits, or 19 if nested.
    static INLINE Factors factors(u32 word, u32 shared, int group) {
        if constexpr (SCALES == Scales::Plain) {
            float scale = half_of(word >> group % 2 * 16) * UNIT;
            return {scale, scale * -(ZERO / UNIT)};
        } else if constexpr (SCALES == Scales::PlainMinimum) {
            float scale = half_of(word) * UNIT;
            return {scale, half_of(word >> 16)};
        } else if constexpr (SCALES == Scales::Nested) {
            // 1 + multiple / 32768
            float multiple = __uint_as_float(__byte_perm(word, 0x3f800000u, 0x7604u | group % 4 << 4));
            float unit = half_of(shared) * (32768.0f * UNIT);
            float scale = fmaf(multiple, unit, unit * -(1.0f + 128.0f / 32768.0f));
            return {scale, scale * -(ZERO / UNIT)};
        } else {
            // 1 + multiple / 128
            u32 index = group % 2 * 2;
            float multiple = __uint_as_float(__byte_perm(word, 0x3f000000u, 0x7044u | index << 8));
            float minimum = __uint_as_float(__byte_perm(word, 0x3f000000u, 0x7044u | (index + 1) << 8));
            float unit = half_of(shared) * (128.0f * UNIT), unit_minimum = half_of(shared >> 16) * 128.0f;
            float scale = fmaf(multiple, unit, -unit);
            return {scale, fmaf(-minimum, unit_minimum, unit_minimum)};
        }
    }

    static INLINE float half_of(u32 bits) { return __half2float(__ushort_as_half(static_cast<u16>(bits))); }

    static INLINE u32 shared_scales(const u8* record, u32 output) {
        if constexpr (SCALES == Scales::Nested) return reinterpret_cast<const u16*>(record + SHARED)[output];
        if constexpr (SCALES == Scales::NestedMinimum) return reinterpret_cast<const u32*>(record + SHARED)[output];
        return 0;
    }
};

// `WORDS` neighbouring words at once.
template <int WORDS>
INLINE void load_words(u32 (&words)[WORDS], const u8* from) {
    static_assert(WORDS == 1 || WORDS == 2 || WORDS == 4, "there are loads of 4, 8 and 16 bytes");
    if constexpr (WORDS == 4) {
        uint4 part = *reinterpret_cast<const uint4*>(from);
        words[0] = part.x, words[1] = part.y, words[2] = part.z, words[3] = part.w;
    } else if constexpr (WORDS == 2) {
        uint2 part = *reinterpret_cast<const uint2*>(from);
        words[0] = part.x, words[1] = part.y;
    } else {
        words[0] = *reinterpret_cast<const u32*>(from);
    }
}

// A lane's share of half a record, 64 inputs or four steps, in registers.
template <class F>
struct Weights {
    u32 low[F::LOW_WORDS / 2], high[1], scales[F::SCALE_WORDS / 2], shared;
    float scale, offset;

    INLINE void load(const u8* record, u32 half) {
        u32 lane = lane_id();
        load_words(low, record + F::low_at(half, lane));
        if constexpr (F::HIGH_WORDS > 0) high[0] = F::high_word(record, half, lane);
        load_words(scales, record + F::SCALE + (lane / 4 * 2 + half) * (F::SCALE_WORDS * 2));
        shared = F::shared_scales(record, lane / 4);
    }

    // The operand b of a step, 0 to 3; steps are taken in ascending order.
    INLINE void operand(u32 (&b)[2], int step) {
        if (step % F::GROUP_STEPS == 0) {
            int group = step / F::GROUP_STEPS;
            typename F::Factors factors = F::factors(scales[F::scale_word(group)], shared, group);
            scale = factors.scale;
            offset = factors.folded();
        }
        u32 codes = F::codes(low[F::low_word(step)], F::HIGH_WORDS ? high[0] : 0, step);
        float weights[4];
#pragma unroll
        for (int i = 0; i < 4; i++) weights[i] = fmaf(F::expand(codes, i), scale, offset);
#if QUELL_F16
        b[0] = bits(__floats2half2_rn(weights[0], weights[1]));
        b[1] = bits(__floats2half2_rn(weights[2], weights[3]));
#else
        b[0] = bits(__floats2bfloat162_rn(weights[0], weights[1]));
        b[1] = bits(__floats2bfloat162_rn(weights[2], weights[3]));
#endif
    }
};

// A block of four warps computes `ROWS × (32 · N)` results, each warp all rows of its
// `8 · N` outputs.
template <class F, int ROWS, int N, int STAGES>
INLINE void linear_quant(void* out, const T* x, const u8* weight, const float* bias, const u32* row_index,
                         const uint4* expert_tiles, u32 rows, u32 outputs, u32 inputs, u32 out_stride, u32 out_full) {
    constexpr int DEPTH = 128, CHUNKS = DEPTH / 8, STEPS = DEPTH / 16, THREADS = 128;
    constexpr int M = ROWS / 16, OUTPUTS = 32 * N;
    constexpr int X_BYTES = ROWS * DEPTH * sizeof(T), STAGE = X_BYTES + 4 * N * F::BYTES;
    extern __shared__ __align__(128) u8 stages[];

    Tile tile = tile_of_block(expert_tiles, rows, ROWS);
    if (tile.row >= tile.row_end) return;
    RowCopies<ROWS, DEPTH, THREADS> x_copies(x, tile.row_end - tile.row, inputs, RowOf{row_index, tile});

    u32 chunks = (inputs + DEPTH - 1) / DEPTH, eights = (outputs + 7) / 8;
    u32 lane = lane_id(), first_eight = (tile.column * 4 + warp_id()) * N;
    // The record of the warp's first eight outputs that is to be copied next.
    const u8* next = weight + ((u64)tile.expert * eights + first_eight) * chunks * F::BYTES + lane * 16;
    if (bias) bias += (u64)tile.expert * outputs;
    u32 shared = shared_address(stages), own = X_BYTES + warp_id() * (N * F::BYTES);
    LaneAddress a_lane = rows_address<CHUNKS>(0);
    float sum[M][N][4] = {};

    u32 reading = 0, writing = 0;
#pragma unroll 1
    for (u32 chunk = 0; chunk < chunks + STAGES - 1; chunk++) {
        if (chunk >= STAGES - 1) {
            // The oldest stage is there, of all threads, and none reads the one before.
            copy_async_wait<STAGES - 2>();
            __syncthreads();
        }
        if (chunk < chunks) {
            u32 to = shared + writing * STAGE;
            x_copies.start(to, chunk * CHUNKS + threadIdx.x % CHUNKS < inputs / 8);
            to += own + lane * 16;
#pragma unroll
            for (int n = 0; n < N; n++) {
                bool wanted = first_eight + n < eights;
                const u8* record = wanted ? next + (u64)n * chunks * F::BYTES : weight;
#pragma unroll
                for (int i = 0; i < F::BYTES; i += 512) {
                    if (i + lane * 16 < F::BYTES) copy_to_shared(to + n * F::BYTES + i, record + (wanted ? i : 0), wanted);
                }
            }
            next += F::BYTES;
        }
        copy_async_commit();
        writing = writing + 1 == STAGES ? 0 : writing + 1;
        if (chunk < STAGES - 1) continue;

        const u8* records = stages + reading * STAGE + own;
        u32 a_stage = shared + reading * STAGE;
        // The whole record at once for few rows, for speed; else half by half, for size.
#pragma unroll(ROWS == 16 ? 2 : 1)
        for (int half = 0; half < 2; half++) {
            Weights<F> weights[N];
#pragma unroll
            for (int n = 0; n < N; n++) weights[n].load(records + n * F::BYTES, half);
#pragma unroll
            for (int step = 0; step < STEPS / 2; step++) {
                u32 a[M][4], a_row = a_stage + a_lane.at(half * (STEPS / 2) + step);
#pragma unroll
                for (int m = 0; m < M; m++) load_matrices(a[m], a_row + m * 16 * DEPTH * 2);
#pragma unroll
                for (int n = 0; n < N; n++) {
                    u32 b[2];
                    weights[n].operand(b, step);
#pragma unroll
                    for (int m = 0; m < M; m++) matrix_multiply(sum[m][n], a[m], b[0], b[1]);
                }
            }
        }
        reading = reading + 1 == STAGES ? 0 : reading + 1;
    }

    // The stages are read; their memory takes the results.
    __syncthreads();
    float* results = reinterpret_cast<float*>(stages);
    static_assert(ROWS * (OUTPUTS + 8) * 4 <= STAGES * STAGE, "the results fit where the stages were");
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int n = 0; n < N; n++) keep_matrix(results, OUTPUTS, m * 16, (warp_id() * N + n) * 8, sum[m][n]);
    }
    __syncthreads();
    Output to = {out, bias, outputs, out_stride, out_full};
    write_tile<ROWS, OUTPUTS>(to, tile, results, tile.column * OUTPUTS);
}

// `out[row] = scale · table[resolved[row]]`, not rounded; one block a row. An id beyond
// the vocabulary reads row 0.
template <class F>
INLINE void embed_quant(float* out, const u8* table, const u32* resolved, float scale, u32 columns, u32 vocabulary) {
    u32 token = resolved[blockIdx.x];
    if (token >= vocabulary) token = 0;
    out += (u64)blockIdx.x * columns;
    u32 chunks = (columns + 127) / 128, output = token % 8;
    table += (u64)(token / 8) * chunks * F::BYTES;
    // A lane's four weights of a step.
    for (u32 i = threadIdx.x; i < chunks * 32; i += blockDim.x) {
        const u8* record = table + (u64)(i / 32) * F::BYTES;
        u32 half = i / 16 % 2, step = i / 4 % 4, quarter = i % 4, lane = output * 4 + quarter;
        u32 low = reinterpret_cast<const u32*>(record + F::low_at(half, lane))[F::low_word(step)];
        u32 high = F::HIGH_WORDS ? F::high_word(record, half, lane) : 0;
        u32 group = step / F::GROUP_STEPS;
        const u8* scales = record + F::SCALE + (output * 2 + half) * (F::SCALE_WORDS * 2);
        u32 word = reinterpret_cast<const u32*>(scales)[F::scale_word(group)];
        auto factors = F::factors(word, F::shared_scales(record, output), group);
        u32 codes = F::codes(low, high, step), column = i / 16 * 64 + step * 16 + quarter * 2;
#pragma unroll
        for (int pair = 0; pair < 4; pair += 2, column += 8) {
            if (column >= columns) continue;
            float first = fmaf(F::expand(codes, pair) - 1.0f, factors.scale, factors.offset);
            float second = fmaf(F::expand(codes, pair + 1) - 1.0f, factors.scale, factors.offset);
            *reinterpret_cast<float2*>(out + column) = make_float2(first * scale, second * scale);
        }
    }
}

// Shared memory: `STAGES · (ROWS · 256 + 4 · N · BYTES)` bytes; see linear.cu for the two blocks.
#define LINEAR_QUANT(NAME, FORMAT, ROWS, N, STAGES)                                                                 \
    extern "C" __global__ void __launch_bounds__(128, 2)                                                            \
        NAME(void* out, const T* x, const u8* weight, const float* bias, const u32* row_index,                      \
             const uint4* expert_tiles, u32 rows, u32 outputs, u32 inputs, u32 out_stride, u32 out_full) {          \
        linear_quant<FORMAT, ROWS, N, STAGES>(out, x, weight, bias, row_index, expert_tiles, rows, outputs, inputs, \
                                              out_stride, out_full);                                                \
    }
#define QUANT(NAME, ...)                                                                                            \
    using Format_##NAME = Format<__VA_ARGS__>;                                                                      \
    LINEAR_QUANT(linear_##NAME##_m16, Format_##NAME, 16, 1, Format_##NAME::STAGES)                                  \
    LINEAR_QUANT(linear_##NAME##_m64, Format_##NAME, 64, 2, 4)                                                      \
    KERNEL(128) embed_##NAME(float* out, const u8* table, const u32* resolved, float scale, u32 columns,            \
                             u32 vocabulary) {                                                                      \
        embed_quant<Format_##NAME>(out, table, resolved, scale, columns, vocabulary);                               \
    }

QUANT(q4, 4, 32, Scales::Plain, 8)             // Q4_0
QUANT(q4m, 4, 32, Scales::PlainMinimum, 0)     // Q4_1
QUANT(q4k, 4, 32, Scales::NestedMinimum, 0)    // Q4_K
QUANT(q2k, 4, 16, Scales::NestedMinimum, 0)    // Q2_K
QUANT(q5, 5, 32, Scales::Plain, 16)            // Q5_0
QUANT(q5m, 5, 32, Scales::PlainMinimum, 0)     // Q5_1
QUANT(q5k, 5, 32, Scales::NestedMinimum, 0)    // Q5_K
QUANT(q6k, 6, 16, Scales::Nested, 32)          // Q6_K, Q3_K
QUANT(q8, 8, 32, Scales::Plain, 128)           // Q8_0, IQ4_NL
