// y = W x + b with weights in blocks of integer codes that share a scale, and rows of
// such a matrix as embeddings.
//
// The host repacks W (src/device/cuda/pack.rs) into records: a record holds sixteen outputs
// and 128 inputs, codes first, in the order in which the lanes of a warp want them as operand
// a, then scales. The records of sixteen outputs follow each other, so a warp streams W from
// front to back.
//
// A weight is `scale · (code − zero) + offset`, with one scale and one offset per group of
// inputs. The tensor cores multiply the codes, which are exact in the activation type, with x;
// the scale is applied to the sum over a group, in float32, and the offset to the sum of the
// group's x. So no weight is ever rounded.
//
// An output has four sums, for the records 0, 4, 8 …, 1, 5, 9 … and so on, which are added in
// that order at the end. Several warps can thus work at one output, and every tile gives the
// same bits.
//
// Beyond that it is linear.cu: x through shared memory, the same meaning of every parameter.
#include "linear.cuh"

// How a group's scale is stored.
enum class Scales {
    Plain,          // half scale
    PlainMinimum,   // half2 {scale, minimum}
    Nested,         // u8 multiple + 128 of a half that the record's 128 inputs share
    NestedMinimum,  // u8 {multiple of the scale, of the minimum}, each + 128, of a half2; minimums are subtracted
};

constexpr u32 RECORD_OUTPUTS = 16, RECORD_INPUTS = 128;
// Sums of an output, each over every fourth record.
constexpr u32 CHAINS = 4;

// a · b + c in both halves, rounded once.
INLINE u32 multiply_add_pair(u32 a, u32 b, u32 c) {
    u32 d;
#if QUELL_F16
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
#else
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
#endif
    return d;
}

// (a & mask) | b and (~a & mask) | b, in one instruction each.
INLINE u32 masked_or(u32 a, u32 mask, u32 b) {
    u32 d;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "r"(mask), "r"(b));
    return d;
}
INLINE u32 inverted_masked_or(u32 a, u32 mask, u32 b) {
    u32 d;
    asm("lop3.b32 %0, %1, %2, %3, 0xae;" : "=r"(d) : "r"(a), "r"(mask), "r"(b));
    return d;
}

// The same number of the activation type in both halves: an integer of at most 2¹⁰, negated,
// whose lowest bits are zeros as far as the type requires it.
__device__ constexpr u32 exponent_of(u32 x) { return x < 2 ? 0 : 1 + exponent_of(x / 2); }
__device__ constexpr u32 negative_pair(u32 x) {
#if QUELL_F16
    return (0x8000u | (15 + exponent_of(x)) << 10 | (x << (10 - exponent_of(x)) & 0x3ffu)) * 0x10001u;
#else
    return (0x8000u | (127 + exponent_of(x)) << 7 | (x << 7 >> exponent_of(x) & 0x7fu)) * 0x10001u;
#endif
}
#if QUELL_F16
constexpr u32 ONES = 0x3c003c00u;
// 1024, in the mantissa of which small integers have their place.
constexpr u32 CARRIER = 0x64006400u, CARRIED = 1024;
#else
constexpr u32 ONES = 0x3f803f80u;
constexpr u32 CARRIER = 0x43004300u, CARRIED = 128;
#endif

// A record's parts, in this order: the low halves of the codes (whole codes if BITS is 8), the
// plane of their higher bits, the groups' scales, output after output, and the scales that the
// groups of an output share. Lane 4 g + t has, of the outputs g and g + 8 (`row` 0 and 1), in
// each step of sixteen inputs those of the numbers 2 t, 2 t + 1 (pair 0), 2 t + 8 and 2 t + 9
// (pair 1). Two steps are a part of the record: what a word of codes of four bits holds.
template <int BITS, int GROUP, Scales SCALES, int ZERO_CODE>
struct Format {
    static constexpr int ZERO = ZERO_CODE;
    // Whether the code for up to so many rows is unrolled: it is larger, and takes a tenth fewer
    // instructions. For the formats that most models have.
    static __device__ constexpr bool unrolled(int rows) { return rows == 8 ? COMMON : COMMON && BITS == 4; }
    static constexpr bool COMMON = (BITS == 4 && GROUP == 32) || BITS == 6 || BITS == 8;
    static constexpr bool MINIMUM = SCALES == Scales::PlainMinimum || SCALES == Scales::NestedMinimum;
    static constexpr int PARTS = RECORD_INPUTS / 32, PART_GROUPS = 32 / GROUP, GROUP_STEPS = GROUP / 16;
    // u32 words of a lane and row, of a part and of the record.
    static constexpr int PART_WORDS = BITS == 8 ? 2 : 1, LOW_WORDS = PART_WORDS * PARTS;
    static constexpr int HIGH_WORDS = BITS == 5 ? 1 : BITS == 6 ? 2 : 0;
    // Bytes of a part's scales.
    static constexpr int SCALE_BYTES = PART_GROUPS * (SCALES == Scales::PlainMinimum ? 4 : SCALES == Scales::Nested ? 1 : 2);
    static constexpr int SCALE_WORDS = PARTS * SCALE_BYTES / 4;             // u32 words of an output
    static constexpr int SHARED_BYTES = SCALES == Scales::Nested ? 2 : SCALES == Scales::NestedMinimum ? 4 : 0;
    static constexpr int HIGH = LOW_WORDS * 256, SCALE = HIGH + HIGH_WORDS * 256;
    static constexpr int SHARED = SCALE + RECORD_OUTPUTS * SCALE_WORDS * 4;
    static constexpr int BYTES = SHARED + RECORD_OUTPUTS * SHARED_BYTES;
    static_assert(BYTES % 16 == 0, "records are copied by 16 bytes");

    // Where a lane's words with low halves are, four at a time; and its high words.
    static INLINE u32 low_at(u32 four, u32 row, u32 lane) { return ((four * 2 + row) * 32 + lane) * 16; }
    static INLINE u32 high_at(u32 row, u32 lane) { return HIGH + (row * 32 + lane) * (HIGH_WORDS * 4); }

    // Which high word has the higher bits of a part, and by how much they are shifted there.
    static INLINE u32 high_word(u32 part) { return BITS == 6 ? part / 2 : 0; }
    static INLINE u32 high_shift(u32 part) { return BITS == 6 ? part % 2 * 8 : part * 4; }

    // A pair of codes, one in each half, as bits of `carrier`. `low` is the step's word, `high`
    // has the part's higher bits lowest.
    static INLINE u32 codes(u32 low, u32 high, int step, int pair, u32 carrier) {
        if constexpr (BITS == 8) return masked_or(low >> pair * 8, 0x00ff00ffu, carrier);
        const u32 codes = masked_or(low >> (step * 8 + pair * 4), 0x000f000fu, carrier);
        if constexpr (BITS == 4) return codes;
        const int from = BITS == 5 ? step * 2 + pair : step * 4 + pair * 2;
        return masked_or(from < 4 ? high << (4 - from) : high >> (from - 4), BITS == 5 ? 0x00100010u : 0x00300030u, codes);
    }

    // The codes of a pair minus ZERO, in the activation type.
    static INLINE u32 operand(u32 low, u32 high, int step, int pair) {
#if !QUELL_F16
        if constexpr (BITS == 8) {
            // The mantissa of 128 has seven bits; with the eighth one it becomes 256.
            static_assert(ZERO == 128, "a clear eighth bit stands for −128");
            const u32 word = low >> pair * 8;
            const u32 subtracted = inverted_masked_or(word, 0x00800080u, CARRIER);
            return multiply_add_pair(subtracted, negative_pair(1), masked_or(word, 0x007f007fu, CARRIER));
        }
#endif
        return multiply_add_pair(codes(low, high, step, pair, CARRIER), ONES, negative_pair(CARRIED + ZERO));
    }

    static INLINE float half_of(u32 bits) { return __half2float(__ushort_as_half(static_cast<u16>(bits))); }

    // What the groups of an output share: factors for the nested scales and minimums.
    struct Shared {
        float scale, minimum;

        INLINE static Shared of(u32 bits) { return {half_of(bits) * 32768.0f, half_of(bits >> 16) * -32768.0f}; }
    };
    // Byte `index` of a word minus 128, times the factor / 32768.
    static INLINE float nested(u32 word, int index, float factor) {
        // 1 + byte / 32768
        const float byte = __uint_as_float(__byte_perm(word, 0x3f800000u, 0x7604u | index << 4));
        return fmaf(byte, factor, factor * -(1.0f + 128.0f / 32768.0f));
    }

    // The scale and the offset of a group: number `index` of those that the word holds. All
    // products are exact: a scale has 11 bits, or 19 if nested.
    static INLINE float scale_of(u32 word, const Shared& shared, int index) {
        if constexpr (SCALES == Scales::Plain) return half_of(word >> index * 16);
        if constexpr (SCALES == Scales::PlainMinimum) return half_of(word);
        if constexpr (SCALES == Scales::Nested) return nested(word, index, shared.scale);
        return nested(word, index * 2, shared.scale);
    }
    static INLINE float offset_of(u32 word, const Shared& shared, int index) {
        if constexpr (SCALES == Scales::PlainMinimum) return half_of(word >> 16);
        if constexpr (SCALES == Scales::NestedMinimum) return nested(word, index * 2 + 1, shared.minimum);
        return 0.0f;
    }
};

// `WORDS` neighbouring words of shared memory, two or four at a time.
template <int WORDS>
INLINE void load_words(u32 (&words)[WORDS], u32 from) {
    static_assert(WORDS == 1 || WORDS == 2 || WORDS % 4 == 0, "there are loads of 4, 8 and 16 bytes");
    if constexpr (WORDS == 1) {
        asm volatile("ld.shared.u32 %0, [%1];" : "=r"(words[0]) : "r"(from) : "memory");
    } else if constexpr (WORDS == 2) {
        asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "r"(from) : "memory");
    } else {
#pragma unroll
        for (int i = 0; i < WORDS; i += 4) {
            asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(words[i]), "=r"(words[i + 1]), "=r"(words[i + 2]), "=r"(words[i + 3])
                         : "r"(from + i * 4)
                         : "memory");
        }
    }
}
// Two bytes of shared memory.
INLINE u32 load_short(u32 from) {
    u16 x;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(x) : "r"(from) : "memory");
    return x;
}

// A lane's share of a part of a record: of two outputs, the codes and the words with the scales,
// of which the part's first one is number `first_scale`.
template <class F>
struct Part {
    u32 low[2][F::PART_WORDS], high[2], scales[2];
    int first_scale;

    // The operand a of one of the two steps.
    INLINE void operand(u32 (&a)[4], int step) const {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            a[i] = F::operand(low[i % 2][F::PART_WORDS == 1 ? 0 : step], high[i % 2], step, i / 2);
        }
    }
};

// What the groups of an output of the lane share.
template <class F>
INLINE typename F::Shared load_shared(u32 record, u32 row) {
    const u32 from = record + F::SHARED + (lane_id() / 4 + row) * F::SHARED_BYTES;
    if constexpr (F::SHARED_BYTES == 2) return F::Shared::of(load_short(from));
    u32 word[1] = {0};
    if constexpr (F::SHARED_BYTES == 4) load_words(word, from);
    return F::Shared::of(word[0]);
}

// The word with the scales of a part for one output, which begin at `from`.
template <class F>
INLINE u32 load_scales(u32 from) {
    if constexpr (F::SCALE_BYTES == 2) return load_short(from);
    u32 word[1];
    load_words(word, from);
    return word[0];
}

// A lane's share of a record. The codes are in registers, and so are the scales if they are few.
template <class F>
struct Record {
    static constexpr bool KEEPS_SCALES = F::SCALE_WORDS <= 2;
    u32 low[2][F::LOW_WORDS / 4][4], high[2][F::HIGH_WORDS ? F::HIGH_WORDS : 1], scales[2][F::SCALE_WORDS];
    u32 lane_scales;

    // `lane_at`: 16 bytes a lane from the beginning of the record. `lane_scales`: the scales of its
    // first output.
    INLINE Record(u32 lane_at, u32 lane_scales_) : lane_scales(lane_scales_) {
#pragma unroll
        for (u32 row = 0; row < 2; row++) {
#pragma unroll
            for (u32 four = 0; four < F::LOW_WORDS / 4; four++) load_words(low[row][four], lane_at + F::low_at(four, row, 0));
            if constexpr (F::HIGH_WORDS > 0) load_words(high[row], lane_at + F::high_at(row, 0) - lane_id() * (16 - F::HIGH_WORDS * 4));
            if constexpr (KEEPS_SCALES) load_words(scales[row], lane_scales + row * 8 * (F::SCALE_WORDS * 4));
        }
    }

    INLINE Part<F> part(int number) const {
        Part<F> part;
#pragma unroll
        for (int row = 0; row < 2; row++) {
#pragma unroll
            for (int i = 0; i < F::PART_WORDS; i++) {
                const int word = number * F::PART_WORDS + i;
                part.low[row][i] = low[row][word / 4][word % 4];
            }
            part.high[row] = F::HIGH_WORDS ? high[row][F::high_word(number)] >> F::high_shift(number) : 0;
            if constexpr (KEEPS_SCALES) {
                part.scales[row] = scales[row][number * F::SCALE_BYTES / 4];
            } else {
                part.scales[row] = load_scales<F>(lane_scales + row * 8 * (F::SCALE_WORDS * 4) + number * F::SCALE_BYTES);
            }
        }
        part.first_scale = KEEPS_SCALES && F::SCALE_BYTES == 2 ? number % 2 * F::PART_GROUPS : 0;
        return part;
    }
};

// A lane's share of any part of a record, which takes fewer registers.
template <class F>
INLINE Part<F> load_part(u32 lane_at, u32 lane_scales, u32 number) {
    const u32 word = number * F::PART_WORDS;
    Part<F> part;
#pragma unroll
    for (u32 row = 0; row < 2; row++) {
        load_words(part.low[row], lane_at + F::low_at(word / 4, row, 0) + word % 4 * 4);
        part.high[row] = 0;
        if constexpr (F::HIGH_WORDS > 0) {
            u32 high[1];
            load_words(high, lane_at + F::high_at(row, 0) - lane_id() * (16 - F::HIGH_WORDS * 4) + F::high_word(number) * 4);
            part.high[row] = high[0] >> F::high_shift(number);
        }
        part.scales[row] = load_scales<F>(lane_scales + row * 8 * (F::SCALE_WORDS * 4) + number * F::SCALE_BYTES);
    }
    part.first_scale = 0;
    return part;
}

// Sums of a lane: of each eight rows, those of the outputs g, g, g + 8, g + 8 and the rows 2 t,
// 2 t + 1, 2 t, 2 t + 1.
template <int EIGHTS>
struct Sums {
    float at[EIGHTS][4];

    INLINE void reset() {
#pragma unroll
        for (int n = 0; n < EIGHTS; n++) at[n][0] = at[n][1] = at[n][2] = at[n][3] = 0.0f;
    }

    // Adds the products of operand a with those of the rows.
    INLINE void multiply(const u32 (&a)[4], const u32 (&b)[EIGHTS][2]) {
#pragma unroll
        for (int n = 0; n < EIGHTS; n++) matrix_multiply(at[n], a, b[n][0], b[n][1]);
    }

    // Adds `other` times a factor for each of the two outputs.
    INLINE void add(const Sums& other, float first, float second) {
#pragma unroll
        for (int n = 0; n < EIGHTS; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) at[n][i] = fmaf(other.at[n][i], i < 2 ? first : second, at[n][i]);
        }
    }
};

// Where a warp finds the x of a record in shared memory: `EIGHTS` times eight rows of `CHUNKS`
// pieces of sixteen bytes, of which the record's first one is number `first`. The address of the
// first row is a multiple of 256.
template <int EIGHTS, int CHUNKS>
struct Rows {
    u32 at;

    INLINE Rows(u32 shared, u32 first) {
        const u32 lane = lane_id();
        // Two steps of eight rows at once, or one of sixteen.
        const u32 number = EIGHTS == 1 ? lane % 8 : lane / 16 * 8 + lane % 8;
        const u32 chunk = first + (EIGHTS == 1 ? lane / 8 : lane / 8 % 2);
        at = shared + (number * CHUNKS + (chunk ^ (number & 7))) * 16;
    }

    // The operands b of the two steps of a part.
    struct Operands {
        u32 b[2][EIGHTS][2];
    };
    INLINE Operands operands(u32 part) const {
        Operands all;
        u32 four[4];
        if constexpr (EIGHTS == 1) {
            load_matrices(four, at ^ (part * 64));
#pragma unroll
            for (int i = 0; i < 4; i++) all.b[i / 2][0][i % 2] = four[i];
        } else {
#pragma unroll
            for (int step = 0; step < 2; step++) {
#pragma unroll
                for (int n = 0; n < EIGHTS; n += 2) {
                    load_matrices(four, (at ^ (part * 64 + step * 32)) + n * (8 * CHUNKS * 16));
#pragma unroll
                    for (int i = 0; i < 4; i++) all.b[step][n + i / 2][i % 2] = four[i];
                }
            }
        }
        return all;
    }
};

// The sums of x over group `group` of a part, as products with ones: all outputs have the same.
template <class F, int EIGHTS, class Operands>
INLINE void add_rows(Sums<EIGHTS>& sums, const Operands& rows, int group) {
    const u32 ones[4] = {ONES, ONES, ONES, ONES};
    sums.reset();
#pragma unroll
    for (int step = group * F::GROUP_STEPS; step < (group + 1) * F::GROUP_STEPS; step++) sums.multiply(ones, rows.b[step]);
}

// Adds the products of a part of a record to `sums`; `row_sums(sums, rows, group)` gives the sums
// of x over a group of the part.
template <class F, int EIGHTS, class Operands, class RowSums>
INLINE void multiply_part(Sums<EIGHTS>& sums, const Part<F>& part, const typename F::Shared (&shared)[2],
                          const Operands& rows, RowSums row_sums) {
#pragma unroll
    for (int group = 0; group < F::PART_GROUPS; group++) {
        Sums<EIGHTS> products;
        products.reset();
#pragma unroll
        for (int step = group * F::GROUP_STEPS; step < (group + 1) * F::GROUP_STEPS; step++) {
            u32 a[4];
            part.operand(a, step);
            products.multiply(a, rows.b[step]);
        }
        const int index = part.first_scale + group;
        sums.add(products, F::scale_of(part.scales[0], shared[0], index), F::scale_of(part.scales[1], shared[1], index));
        if constexpr (F::MINIMUM) {
            row_sums(products, rows, group);
            sums.add(products, F::offset_of(part.scales[0], shared[0], index), F::offset_of(part.scales[1], shared[1], index));
        }
    }
}

// Starts to copy a record to the warp's place in shared memory, if it is `wanted`.
template <class F>
INLINE void copy_record(u32 shared, const u8* record, bool wanted) {
    const u32 at = lane_id() * 16;
#pragma unroll
    for (u32 i = 0; i < F::BYTES; i += 512) {
        const bool inside = i + 512 <= F::BYTES || at < F::BYTES - i;
        asm volatile("{.reg .pred wanted; setp.ne.u32 wanted, %2, 0; @wanted cp.async.cg.shared.global [%0], [%1], 16;}" ::"r"(
                         shared + i + at
                     ),
                     "l"(record + i + at), "r"(u32(wanted & inside))
                     : "memory");
    }
}

// Stages of shared memory: as many as fit where there are 99 KiB, four at most.
__device__ constexpr int stages_of(int bytes) { return 101376 / bytes < 4 ? 101376 / bytes : 4; }
__device__ constexpr int stage_bytes(int x_bytes, int record_bytes) { return (x_bytes + record_bytes + 255) / 256 * 256; }

// For up to `ROWS` rows, 8 or 16, and 32 outputs. Two warps, of sixteen outputs each, do every
// fourth record, and four such pairs share a stage of four records.
constexpr int FEW_OUTPUTS = 32, FEW_THREADS = 256;
template <class F, int ROWS>
INLINE void linear_quant_few(void* out, const T* x, const u8* weight, const float* bias, const u32* row_index,
                             const uint4* expert_tiles, u32 rows, u32 outputs, u32 inputs, u32 out_stride, u32 out_mode) {
    constexpr int DEPTH = CHAINS * RECORD_INPUTS, CHUNKS = DEPTH / 8, RECORD_CHUNKS = RECORD_INPUTS / 8, EIGHTS = ROWS / 8;
    constexpr int X_BYTES = ROWS * DEPTH * sizeof(T), STAGE = stage_bytes(X_BYTES, FEW_THREADS / 32 * F::BYTES);
    constexpr int STAGES = stages_of(STAGE);
    extern __shared__ __align__(256) u8 stages[];

    const Tile tile = tile_of_block(expert_tiles, rows, ROWS);
    if (tile.row >= tile.row_end) return;
    RowCopies<ROWS, DEPTH, FEW_THREADS> x_copies(x, tile.row_end - tile.row, inputs, RowOf{row_index, tile});
    const OutputOf output_of(FEW_OUTPUTS, outputs, out_mode);
    const u32 weight_rows = is_gated(out_mode) ? 2 * outputs : outputs;
    if (bias) bias += (u64)tile.expert * weight_rows;
    const u32 records = (inputs + RECORD_INPUTS - 1) / RECORD_INPUTS, sixteens = (weight_rows + 15) / 16;
    const u32 chain = warp_id() / 2, sixteen = (tile.column * output_of.half + output_of(warp_id() % 2 * 16)) / 16;
    const u8* next = weight + (((u64)tile.expert * sixteens + sixteen) * records + chain) * F::BYTES;
    if (chain == 0 && lane_id() == 0 && sixteen < sixteens) prefetch(next, min(records, STAGES * CHAINS) * F::BYTES);
    wait_for_kernels_before();
    // A stage begins with record `first`: it holds x for the thread, and a record for the warp, if
    // `first` is below these.
    const u32 thread_chunk = threadIdx.x % CHUNKS;
    u32 x_end = max(inputs / 8 + RECORD_CHUNKS - 1, thread_chunk) - thread_chunk;
    x_end /= RECORD_CHUNKS;
    u32 record_end = sixteen < sixteens ? max(records, chain) - chain : 0;

    u32 shared = shared_address(stages), own = X_BYTES + warp_id() * F::BYTES;
    settle(x_end), settle(record_end), settle(shared), settle(own);
    const u32 stages_end = shared + STAGES * STAGE;
    auto start = [&](u32 stage, u32 first) {
        x_copies.start(stage, first < x_end);
        copy_record<F>(stage + own, next, first < record_end);
        next += CHAINS * F::BYTES;
        copy_async_commit();
    };
#pragma unroll 1
    for (u32 stage = 0; stage < STAGES - 1; stage++) start(shared + stage * STAGE, stage * CHAINS);
    u32 empty = shared + (STAGES - 1) * STAGE, reading = shared;
    using Operands = typename Rows<EIGHTS, CHUNKS>::Operands;
    Rows<EIGHTS, CHUNKS> x_rows(0, chain * RECORD_CHUNKS);
    u32 lane_codes = own + lane_id() * 16, lane_scales = own + F::SCALE + lane_id() / 4 * (F::SCALE_WORDS * 4);
    settle(x_rows.at), settle(lane_codes), settle(lane_scales);
    Sums<EIGHTS> sums;
    sums.reset();
#pragma unroll 1
    for (u32 first = 0; first < records; first += CHAINS) {
        // The oldest stage is there, of all threads, and none reads the one before.
        copy_async_wait<STAGES - 2>();
        __syncthreads();
        start(empty, first + (STAGES - 1) * CHAINS);
        if (first < record_end) {
            const typename F::Shared shared_scales[2] = {load_shared<F>(reading + own, 0), load_shared<F>(reading + own, 8)};
            Rows<EIGHTS, CHUNKS> rows_at = x_rows;
            rows_at.at += reading;
            const auto row_sums = [&](Sums<EIGHTS>& to, const Operands& operands, int group) { add_rows<F>(to, operands, group); };
            if constexpr (F::unrolled(ROWS)) {
                const Record<F> record(reading + lane_codes, reading + lane_scales);
#pragma unroll
                for (int part = 0; part < F::PARTS; part++) {
                    multiply_part(sums, record.part(part), shared_scales, rows_at.operands(part), row_sums);
                }
            } else {
#pragma unroll 1
                for (u32 part = 0; part < F::PARTS; part++) {
                    multiply_part(sums, load_part<F>(reading + lane_codes, reading + lane_scales, part), shared_scales,
                                  rows_at.operands(part), row_sums);
                }
            }
        }
        empty = reading;
        reading = reading + STAGE == stages_end ? shared : reading + STAGE;
    }
    copy_async_wait<0>();

    // The stages are read; their memory takes the sums, chain by chain.
    __syncthreads();
    float* results = reinterpret_cast<float*>(stages);
    constexpr u32 PITCH = FEW_OUTPUTS + 8, CHAIN = ROWS * PITCH;
    static_assert(CHAINS * CHAIN * 4 <= STAGES * STAGE, "the results fit where the stages were");
    const u32 lane = lane_id(), output = warp_id() % 2 * 16 + lane / 4;
#pragma unroll
    for (int n = 0; n < EIGHTS; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            results[chain * CHAIN + (n * 8 + lane % 4 * 2 + i % 2) * PITCH + output + i / 2 * 8] = sums.at[n][i];
        }
    }
    __syncthreads();
    const Output to = {out, bias, outputs, out_stride, out_mode};
    write_results(to, tile, {results, ROWS, FEW_OUTPUTS, CHAINS});
}

// The order in which a block of `linear_quant_many` takes the records: every fourth one from the
// first on, then every fourth one from the second on, and so on.
struct RecordOrder {
    u32 record = 0, chain = 0;

    // Steps to the next record; returns whether another chain begins.
    INLINE bool advance(u32 records) {
        record += CHAINS;
        if (record < records) return false;
        record = ++chain;
        return true;
    }
};

// For many rows: 64 × 64 results, each warp all rows of sixteen outputs.
constexpr int MANY_ROWS = 64, MANY_OUTPUTS = 64, MANY_THREADS = 128;
template <class F>
INLINE void linear_quant_many(void* out, const T* x, const u8* weight, const float* bias, const u32* row_index,
                              const uint4* expert_tiles, u32 rows, u32 outputs, u32 inputs, u32 out_stride, u32 out_mode) {
    constexpr int CHUNKS = RECORD_INPUTS / 8, EIGHTS = MANY_ROWS / 8, X_BYTES = MANY_ROWS * RECORD_INPUTS * sizeof(T);
    constexpr int STAGE = stage_bytes(X_BYTES, MANY_THREADS / 32 * F::BYTES), STAGES = stages_of(STAGE);
    constexpr int GROUPS = F::PARTS * F::PART_GROUPS;
    extern __shared__ __align__(256) u8 stages[];
    __shared__ float row_sums[F::MINIMUM ? GROUPS : 1][MANY_ROWS];

    const Tile tile = tile_of_block(expert_tiles, rows, MANY_ROWS);
    if (tile.row >= tile.row_end) return;
    RowCopies<MANY_ROWS, RECORD_INPUTS, MANY_THREADS> x_copies(x, tile.row_end - tile.row, inputs, RowOf{row_index, tile});
    const OutputOf output_of(MANY_OUTPUTS, outputs, out_mode);
    const u32 weight_rows = is_gated(out_mode) ? 2 * outputs : outputs;
    if (bias) bias += (u64)tile.expert * weight_rows;
    const u32 records = (inputs + RECORD_INPUTS - 1) / RECORD_INPUTS, sixteens = (weight_rows + 15) / 16;
    const u32 sixteen = (tile.column * output_of.half + output_of(warp_id() * 16)) / 16;
    const bool exists = sixteen < sixteens;
    weight += ((u64)tile.expert * sixteens + (exists ? sixteen : 0)) * records * F::BYTES;
    if (lane_id() == 0) prefetch(weight, min(records, STAGES * CHAINS) * F::BYTES);
    wait_for_kernels_before();

    const u32 shared = shared_address(stages), own = X_BYTES + warp_id() * F::BYTES, stages_end = shared + STAGES * STAGE;
    const auto after = [&](u32 stage) { return stage + STAGE == stages_end ? shared : stage + STAGE; };
    const uint4* const x_begin = x_copies.from;
    RecordOrder copying;
    auto start = [&](u32 stage, bool any) {
        if (any) {
            x_copies.from = x_begin + copying.record * CHUNKS;
            x_copies.start(stage, copying.record * CHUNKS + threadIdx.x % CHUNKS < inputs / 8);
            copy_record<F>(stage + own, weight + (u64)copying.record * F::BYTES, exists);
            copying.advance(records);
        }
        copy_async_commit();
    };
#pragma unroll 1
    for (u32 stage = 0; stage < STAGES - 1; stage++) start(shared + stage * STAGE, stage < records);
    u32 empty = shared + (STAGES - 1) * STAGE, reading = shared;
    Sums<EIGHTS> sums, total;
    sums.reset();
    total.reset();
    RecordOrder order;
    using Operands = typename Rows<EIGHTS, CHUNKS>::Operands;
#pragma unroll 1
    for (u32 index = 0; index < records; index++) {
        // The oldest stage is there, of all threads, and none reads the one before.
        copy_async_wait<STAGES - 2>();
        __syncthreads();
        start(empty, index + STAGES - 1 < records);
        const Rows<EIGHTS, CHUNKS> x_rows(reading, 0);
        if constexpr (F::MINIMUM) {
            // The sums of x over the record's groups, for all warps: each finds those of a part.
            static_assert(F::PARTS == MANY_THREADS / 32, "each warp has one part");
            const auto operands = x_rows.operands(warp_id());
#pragma unroll
            for (int i = 0; i < F::PART_GROUPS; i++) {
                Sums<EIGHTS> of_rows;
                add_rows<F>(of_rows, operands, i);
                float* to = row_sums[warp_id() * F::PART_GROUPS + i] + lane_id() * 2;
                if (lane_id() >= 4) continue;
#pragma unroll
                for (int n = 0; n < EIGHTS; n++) {
                    *reinterpret_cast<float2*>(to + n * 8) = make_float2(of_rows.at[n][0], of_rows.at[n][1]);
                }
            }
            __syncthreads();
        }
        if (exists) {
            const u32 at = reading + own, lane_at = at + lane_id() * 16;
            const u32 lane_scales = at + F::SCALE + lane_id() / 4 * (F::SCALE_WORDS * 4);
            const typename F::Shared shared_scales[2] = {load_shared<F>(at, 0), load_shared<F>(at, 8)};
#pragma unroll 1
            for (u32 part = 0; part < F::PARTS; part++) {
                multiply_part(sums, load_part<F>(lane_at, lane_scales, part), shared_scales, x_rows.operands(part),
                              [&](Sums<EIGHTS>& to, const Operands&, int group) {
                    const float* of = row_sums[part * F::PART_GROUPS + group] + lane_id() % 4 * 2;
#pragma unroll
                    for (int n = 0; n < EIGHTS; n++) {
                        const float2 two = *reinterpret_cast<const float2*>(of + n * 8);
                        to.at[n][0] = to.at[n][2] = two.x;
                        to.at[n][1] = to.at[n][3] = two.y;
                    }
                });
            }
        }
        empty = reading;
        reading = after(reading);
        if (order.advance(records)) {
            total.add(sums, 1.0f, 1.0f);
            sums.reset();
        }
    }
    copy_async_wait<0>();

    // The stages are read; their memory takes the results.
    __syncthreads();
    float* results = reinterpret_cast<float*>(stages);
    constexpr u32 PITCH = MANY_OUTPUTS + 8;
    static_assert(MANY_ROWS * PITCH * 4 <= STAGES * STAGE, "the results fit where the stages were");
    const u32 lane = lane_id(), output = warp_id() * 16 + lane / 4;
#pragma unroll
    for (int n = 0; n < EIGHTS; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) results[(n * 8 + lane % 4 * 2 + i % 2) * PITCH + output + i / 2 * 8] = total.at[n][i];
    }
    __syncthreads();
    const Output to = {out, bias, outputs, out_stride, out_mode};
    write_results(to, tile, {results, MANY_ROWS, MANY_OUTPUTS, 1});
}

// `out[row] = scale · table[resolved[row]]`, not rounded; one block a row. An id beyond
// the vocabulary reads row 0.
template <class F>
INLINE void embed_quant(float* out, const u8* table, const u32* resolved, float scale, u32 columns, u32 vocabulary) {
    wait_for_kernels_before();
    u32 token = resolved[blockIdx.x];
    if (token >= vocabulary) token = 0;
    out += (u64)blockIdx.x * columns;
    const u32 records = (columns + RECORD_INPUTS - 1) / RECORD_INPUTS, output = token % RECORD_OUTPUTS, row = output / 8;
    table += (u64)(token / RECORD_OUTPUTS) * records * F::BYTES;
    // A lane's four weights of a step.
    for (u32 i = threadIdx.x; i < records * 32; i += blockDim.x) {
        const u8* record = table + (u64)(i / 32) * F::BYTES;
        const u32 part = i / 8 % 4, step = i / 4 % 2, quarter = i % 4, lane = output % 8 * 4 + quarter;
        const u32 word = part * F::PART_WORDS + (F::PART_WORDS == 1 ? 0 : step);
        const u32 low = reinterpret_cast<const u32*>(record + F::low_at(word / 4, row, lane))[word % 4];
        u32 high = 0;
        if constexpr (F::HIGH_WORDS > 0) {
            const u32* words = reinterpret_cast<const u32*>(record + F::high_at(row, lane));
            high = words[F::high_word(part)] >> F::high_shift(part);
        }
        const u32 group = part * F::PART_GROUPS + step / F::GROUP_STEPS;
        const u8* scales = record + F::SCALE + output * (F::SCALE_WORDS * 4) + group * (F::SCALE_BYTES / F::PART_GROUPS);
        u32 scale_word = *scales;
        if constexpr (F::SCALE_BYTES / F::PART_GROUPS > 1) scale_word |= scales[1] << 8;
        if constexpr (F::SCALE_BYTES / F::PART_GROUPS > 2) scale_word |= scales[2] << 16 | scales[3] << 24;
        u32 shared_bits = 0;
        if constexpr (F::SHARED_BYTES == 2) shared_bits = reinterpret_cast<const u16*>(record + F::SHARED)[output];
        if constexpr (F::SHARED_BYTES == 4) shared_bits = reinterpret_cast<const u32*>(record + F::SHARED)[output];
        const auto shared = F::Shared::of(shared_bits);
        const float factor = F::scale_of(scale_word, shared, 0), offset = F::offset_of(scale_word, shared, 0);
        u32 column = i / 4 * 16 + quarter * 2;
#pragma unroll
        for (int pair = 0; pair < 2; pair++, column += 8) {
            if (column >= columns) continue;
            const u32 codes = F::codes(low, high, step, pair, 0);
            const float first = fmaf(float(int(codes & 0xffff) - F::ZERO), factor, offset);
            const float second = fmaf(float(int(codes >> 16) - F::ZERO), factor, offset);
            *reinterpret_cast<float2*>(out + column) = make_float2(first * scale, second * scale);
        }
    }
}

// Shared memory: as many stages as `stages_of` says, which lets two blocks run on a multiprocessor
// of compute capability 9.0.
#define LINEAR_QUANT(NAME, THREADS, ...)                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS, 2)                                                        \
        NAME(void* out, const T* x, const u8* weight, const float* bias, const u32* row_index,                      \
             const uint4* expert_tiles, u32 rows, u32 outputs, u32 inputs, u32 out_stride, u32 out_mode) {          \
        __VA_ARGS__(out, x, weight, bias, row_index, expert_tiles, rows, outputs, inputs, out_stride, out_mode);    \
    }
#define QUANT(NAME, ...)                                                                                            \
    using Format_##NAME = Format<__VA_ARGS__>;                                                                      \
    LINEAR_QUANT(linear_##NAME##_m8, FEW_THREADS, linear_quant_few<Format_##NAME, 8>)                               \
    LINEAR_QUANT(linear_##NAME##_m16, FEW_THREADS, linear_quant_few<Format_##NAME, 16>)                             \
    LINEAR_QUANT(linear_##NAME##_m64, MANY_THREADS, linear_quant_many<Format_##NAME>)                               \
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
