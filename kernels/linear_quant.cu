// y = W x + b with block-quantised weights, which are integer codes with a scale per group, and rows of
// such a matrix as embeddings.
//
// The host repacks W (src/device/cuda/pack.rs) into records of 16 outputs and 128 inputs. A record
// has the codes, in the order in which the lanes of a warp need them as operand a, and then the
// scales. The records of the same 16 outputs are consecutive, so a warp streams W from front to
// back.
//
// A weight is `scale · (code − zero) + offset`, with one scale and one offset per group of
// inputs. The tensor cores multiply the codes, which are exact in the activation type, with x.
// The scale is applied to the sum over a group, in float32, and the offset to the sum of the
// group's x. So no weight is ever rounded.
//
// The records of a row are divided into rounds, and a round has four units: its records 0, 4, 8 …
// are the first one, 1, 5, 9 … the second, and so on. Several warps of a block can thus work on the
// same output. If there are few tiles, several blocks (gridDim.z) share the rounds or the units of each
// tile, and the last one to arrive adds up the sums.
//
// The rest is as in linear.cu: x passes through shared memory, and every parameter means the same.
#include "linear.cuh"

// How a group's scale is stored.
enum class Scales {
    Plain,          // half scale
    PlainMinimum,   // half2 {scale, minimum}
    Nested,         // u8: 128 + the multiple of a half scale that the record's 128 inputs share
    NestedMinimum,  // two u8: 128 + multiples of the scale and the minimum of a half2; minimums are subtracted
};

constexpr u32 RECORD_OUTPUTS = 16, RECORD_INPUTS = 128;
// Units per round.
constexpr u32 CHAINS = 4;
// Returns the records per round of a row with `records` records. There are at most four rounds, to limit
// the sums that pass through memory (as in src/device/cuda/units.rs).
INLINE u32 round_of(u32 records) { return max(16, (records + 15) / 16 * 4); }
// Returns the number of rounds of a row with `records` records, without a division.
INLINE u32 rounds_in(u32 records) {
    const u32 round = round_of(records);
    return 1 + (records > round) + (records > 2 * round) + (records > 3 * round);
}

// Returns a · b + c in both halves, rounded once.
INLINE u32 multiply_add_pair(u32 a, u32 b, u32 c) {
    u32 d;
#if QUELL_F16
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
#else
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
#endif
    return d;
}

// Return (a & mask) | b and (~a & mask) | b, in one instruction each.
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

// `negative_pair` returns −x in the activation type, in both halves, for an integer x from 1 to 2¹¹ − 1
// that the type represents exactly. `exponent_of` returns ⌊log₂ x⌋.
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
// 1024 in both halves, whose mantissa has room for a small integer.
constexpr u32 CARRIER = 0x64006400u, CARRIED = 1024;
#else
constexpr u32 ONES = 0x3f803f80u;
constexpr u32 CARRIER = 0x43004300u, CARRIED = 128;
#endif

// 32768 as a float, whose mantissa has room for a byte.
constexpr u32 BYTE_CARRIER = 0x47000000u;
// Returns the same number in a variable. For a constant, the assembler would need an instruction wherever
// it is used beside another constant. A grid has fewer than 2³¹ blocks, so the added bit is 0.
INLINE u32 byte_carrier() {
    u32 carrier = BYTE_CARRIER | gridDim.x >> 31;
    settle(carrier);
    return carrier;
}

// The layout of a record. It has, in this order: the low four bits of the codes (whole codes if BITS is 8),
// the plane of their higher bits, the scales of the groups, output by output, and the scales that the
// groups of an output share. Lane 4 g + t has the codes of the outputs g and g + 8 (`row` 0 and 1). In each
// step of 16 inputs, these are the codes of the inputs 2 t, 2 t + 1 (pair 0), 2 t + 8 and 2 t + 9 (pair 1).
// Two steps are a part of the record, for which a lane's four-bit codes of an output fill a word.
template <int BITS, int GROUP, Scales SCALES, int ZERO_CODE>
struct Format {
    static constexpr int ZERO = ZERO_CODE;
    // Returns whether the code for up to `rows` rows is unrolled. It is then larger, and takes a tenth fewer
    // instructions. This is done for the formats that most models use, if there are enough registers.
    static __device__ constexpr bool unrolled(int rows) {
        if (BITS == 5) return rows == 8 && SCALES == Scales::NestedMinimum;
        return BITS > 4 || GROUP == 32;
    }
    // Groups of 16 outputs that a warp computes for many rows (as in src/device/cuda/pack.rs).
    static constexpr int MANY_EACH = GROUP == 16 && SCALES == Scales::NestedMinimum ? 1 : 2;
    static constexpr bool MINIMUM = SCALES == Scales::PlainMinimum || SCALES == Scales::NestedMinimum;
    static constexpr int PARTS = RECORD_INPUTS / 32, PART_GROUPS = 32 / GROUP, GROUP_STEPS = GROUP / 16;
    // u32 words of codes per lane and row: of a part, and of the record.
    static constexpr int PART_WORDS = BITS == 8 ? 2 : 1, LOW_WORDS = PART_WORDS * PARTS;
    static constexpr int HIGH_WORDS = BITS == 5 ? 1 : BITS == 6 ? 2 : 0;
    // Bytes of the scales of a part, per output.
    static constexpr int SCALE_BYTES = PART_GROUPS * (SCALES == Scales::PlainMinimum ? 4 : SCALES == Scales::Nested ? 1 : 2);
    static constexpr int SCALE_WORDS = PARTS * SCALE_BYTES / 4;             // u32 words per output
    static constexpr int SHARED_BYTES = SCALES == Scales::Nested ? 2 : SCALES == Scales::NestedMinimum ? 4 : 0;
    static constexpr int HIGH = LOW_WORDS * 256, SCALE = HIGH + HIGH_WORDS * 256;
    static constexpr int SHARED = SCALE + RECORD_OUTPUTS * SCALE_WORDS * 4;
    static constexpr int BYTES = SHARED + RECORD_OUTPUTS * SHARED_BYTES;
    static_assert(BYTES % 16 == 0, "records are copied by 16 bytes");

    // Return the offsets of a lane's words of low bits, four at a time, and of its words of higher bits.
    static INLINE u32 low_at(u32 four, u32 row, u32 lane) { return ((four * 2 + row) * 32 + lane) * 16; }
    static INLINE u32 high_at(u32 row, u32 lane) { return HIGH + (row * 32 + lane) * (HIGH_WORDS * 4); }

    // Return which of the latter has the higher bits of a part, and by how many bits they are shifted there.
    static INLINE u32 high_word(u32 part) { return BITS == 6 ? part / 2 : 0; }
    static INLINE u32 high_shift(u32 part) { return BITS == 6 ? part % 2 * 8 : part * 4; }

    // Returns a pair of codes, one in each half, in the lowest bits of `carrier`. `low` is the word of the
    // step, and `high` has the higher bits of the part in its lowest bits.
    static INLINE u32 codes(u32 low, u32 high, int step, int pair, u32 carrier) {
        if constexpr (BITS == 8) return masked_or(low >> pair * 8, 0x00ff00ffu, carrier);
        const u32 codes = masked_or(low >> (step * 8 + pair * 4), 0x000f000fu, carrier);
        if constexpr (BITS == 4) return codes;
        const int from = BITS == 5 ? step * 2 + pair : step * 4 + pair * 2;
        return masked_or(from < 4 ? high << (4 - from) : high >> (from - 4), BITS == 5 ? 0x00100010u : 0x00300030u, codes);
    }

    // Returns the codes of a pair minus ZERO, in the activation type.
    static INLINE u32 operand(u32 low, u32 high, int step, int pair) {
#if !QUELL_F16
        if constexpr (BITS == 8) {
            // The mantissa of 128 has room for seven bits of a code; setting the eighth one makes it 256.
            static_assert(ZERO == 128, "a clear eighth bit stands for −128");
            const u32 word = low >> pair * 8;
            const u32 subtracted = inverted_masked_or(word, 0x00800080u, CARRIER);
            return multiply_add_pair(subtracted, negative_pair(1), masked_or(word, 0x007f007fu, CARRIER));
        }
#endif
        return multiply_add_pair(codes(low, high, step, pair, CARRIER), ONES, negative_pair(CARRIED + ZERO));
    }

    static INLINE float half_of(u32 bits) { return __half2float(__ushort_as_half(static_cast<u16>(bits))); }

    // What the groups of an output share: the factors of nested scales and minimums.
    struct Shared {
        float scale, minimum;

        INLINE static Shared of(u32 bits) { return {half_of(bits), -half_of(bits >> 16)}; }
    };
    // Returns byte `index` of a word minus 128, times a factor. `carrier` is BYTE_CARRIER.
    static INLINE float nested(u32 word, int index, float factor, u32 carrier) {
        // 32768 + byte
        const float byte = __uint_as_float(__byte_perm(word, carrier, 0x7604u | index << 4));
        return fmaf(byte, factor, factor * -(32768.0f + 128.0f));
    }

    // Return the scale and the offset of a group, which is number `index` of those in the word. All
    // products are exact: a scale has 11 significant bits, or 19 if nested.
    static INLINE float scale_of(u32 word, const Shared& shared, int index, u32 carrier) {
        if constexpr (SCALES == Scales::Plain) return half_of(word >> index * 16);
        if constexpr (SCALES == Scales::PlainMinimum) return half_of(word);
        if constexpr (SCALES == Scales::Nested) return nested(word, index, shared.scale, carrier);
        return nested(word, index * 2, shared.scale, carrier);
    }
    static INLINE float offset_of(u32 word, const Shared& shared, int index, u32 carrier) {
        if constexpr (SCALES == Scales::PlainMinimum) return half_of(word >> 16);
        if constexpr (SCALES == Scales::NestedMinimum) return nested(word, index * 2 + 1, shared.minimum, carrier);
        return 0.0f;
    }
};

// Loads `WORDS` adjacent words of shared memory, up to four at a time.
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
// Loads two bytes of shared memory.
INLINE u32 load_short(u32 from) {
    u16 x;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(x) : "r"(from) : "memory");
    return x;
}

// A lane's share of a part of a record: the codes of two outputs, and the words with their scales, in
// which the first scale of the part is number `first_scale`.
template <class F>
struct Part {
    u32 low[2][F::PART_WORDS], high[2], scales[2];
    int first_scale;

    // Computes operand a of one of the two steps.
    INLINE void operand(u32 (&a)[4], int step) const {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            a[i] = F::operand(low[i % 2][F::PART_WORDS == 1 ? 0 : step], high[i % 2], step, i / 2);
        }
    }
};

// Loads what the groups of an output share, which begins at `from`.
template <class F>
INLINE typename F::Shared load_shared(u32 from) {
    if constexpr (F::SHARED_BYTES == 2) return F::Shared::of(load_short(from));
    u32 word[1] = {0};
    if constexpr (F::SHARED_BYTES == 4) load_words(word, from);
    return F::Shared::of(word[0]);
}

// Loads the word with the scales of a part for one output, which begin at `from`.
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

    // `lane_at` is the beginning of the record plus 16 bytes per lane. `lane_scales` is the address of the
    // scales of the lane's first output.
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

// Loads a lane's share of one part of a record, which takes fewer registers than a `Record`.
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

// The sums of lane 4 g + t. For every eight rows, they are those of the outputs g, g, g + 8, g + 8 and
// the rows 2 t, 2 t + 1, 2 t, 2 t + 1.
template <int EIGHTS>
struct Sums {
    float at[EIGHTS][4];

    INLINE void reset() {
#pragma unroll
        for (int n = 0; n < EIGHTS; n++) at[n][0] = at[n][1] = at[n][2] = at[n][3] = 0.0f;
    }

    // Writes the sums in groups of four, which are `apart` groups apart.
    INLINE void store(float4* to, u32 apart) const {
#pragma unroll
        for (int n = 0; n < EIGHTS; n++) to[n * apart] = make_float4(at[n][0], at[n][1], at[n][2], at[n][3]);
    }
    // Adds numbers of the n-th eight rows, times a factor for each of the two outputs.
    INLINE void add(int n, const float (&other)[4], const float (&factors)[2]) {
#pragma unroll
        for (int i = 0; i < 4; i++) at[n][i] = fmaf(other[i], factors[i / 2], at[n][i]);
    }
    INLINE void add(const Sums& other) {
#pragma unroll
        for (int n = 0; n < EIGHTS; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) at[n][i] += other.at[n][i];
        }
    }
};

// The addresses at which a warp reads the x of a record in shared memory, from `EIGHTS` times eight rows
// of `CHUNKS` chunks of 16 bytes. The first chunk of the record is number `first` of a row. The address
// of the first row is a multiple of 256.
template <int EIGHTS, int CHUNKS>
struct Rows {
    u32 at;

    INLINE Rows(u32 shared, u32 first) {
        const u32 lane = lane_id();
        // An ldmatrix reads two steps of 8 rows, or one step of 16 rows.
        const u32 number = EIGHTS == 1 ? lane % 8 : lane / 16 * 8 + lane % 8;
        const u32 chunk = first + (EIGHTS == 1 ? lane / 8 : lane / 8 % 2);
        at = shared + (number * CHUNKS + (chunk ^ (number & 7))) * 16;
    }

    // The operands b of the two steps of a part of the record.
    struct Operands {
        u32 b[2][EIGHTS][2];
    };
    INLINE Operands operands(u32 part) const {
        Operands all;
        u32 four[4];
        // A record begins at a multiple of 16 chunks, and the swizzle changes only the lowest three bits of
        // a chunk's number, so the fourth bit is a constant offset.
        const u32 of_part = (at ^ (part % 2 * 64)) + part / 2 * 128;
        if constexpr (EIGHTS == 1) {
            load_matrices(four, of_part);
#pragma unroll
            for (int i = 0; i < 4; i++) all.b[i / 2][0][i % 2] = four[i];
        } else {
#pragma unroll
            for (int step = 0; step < 2; step++) {
#pragma unroll
                for (int n = 0; n < EIGHTS; n += 2) {
                    load_matrices(four, (of_part ^ (step * 32)) + n * (8 * CHUNKS * 16));
#pragma unroll
                    for (int i = 0; i < 4; i++) all.b[step][n + i / 2][i % 2] = four[i];
                }
            }
        }
        return all;
    }
};

// Computes the sums of x over group `group` of a part for the n-th eight rows, as products with ones, so
// that all outputs get the same sums.
template <class F, class Operands>
INLINE void add_rows(float (&sums)[4], const Operands& rows, int group, int n) {
    const u32 ones[4] = {ONES, ONES, ONES, ONES};
    sums[0] = sums[1] = sums[2] = sums[3] = 0.0f;
#pragma unroll
    for (int step = group * F::GROUP_STEPS; step < (group + 1) * F::GROUP_STEPS; step++) {
        matrix_multiply(sums, ones, rows.b[step][n][0], rows.b[step][n][1]);
    }
}

// Adds the products of a part of a record to `sums`. `row_sums(sums, rows, group, n)` must compute the
// sums of x over a group of the part for the n-th eight rows.
template <class F, int EIGHTS, class Operands, class RowSums>
INLINE void multiply_part(Sums<EIGHTS>& sums, const Part<F>& part, const typename F::Shared (&shared)[2],
                          const Operands& rows, u32 carrier, RowSums row_sums) {
#pragma unroll
    for (int group = 0; group < F::PART_GROUPS; group++) {
        u32 a[F::GROUP_STEPS][4];
#pragma unroll
        for (int step = 0; step < F::GROUP_STEPS; step++) part.operand(a[step], group * F::GROUP_STEPS + step);
        const int index = part.first_scale + group;
        const float scales[2] = {F::scale_of(part.scales[0], shared[0], index, carrier),
                                 F::scale_of(part.scales[1], shared[1], index, carrier)};
        const float offsets[2] = {F::offset_of(part.scales[0], shared[0], index, carrier),
                                  F::offset_of(part.scales[1], shared[1], index, carrier)};
#pragma unroll
        for (int n = 0; n < EIGHTS; n++) {
            float products[4] = {};
#pragma unroll
            for (int step = 0; step < F::GROUP_STEPS; step++) {
                const u32(&b)[2] = rows.b[group * F::GROUP_STEPS + step][n];
                matrix_multiply(products, a[step], b[0], b[1]);
            }
            sums.add(n, products, scales);
            if constexpr (F::MINIMUM) {
                row_sums(products, rows, group, n);
                sums.add(n, products, offsets);
            }
        }
    }
}

// Starts to copy a record to shared memory, if it is `wanted`. Both addresses are the beginning of the
// record plus 16 bytes per lane.
template <class F>
INLINE void copy_record(u32 lane_at, const u8* lane_from, bool wanted) {
#pragma unroll
    for (u32 i = 0; i < F::BYTES; i += 512) {
        const bool inside = i + 512 <= F::BYTES || lane_id() * 16 < F::BYTES - i;
        asm volatile("{.reg .pred wanted; setp.ne.u32 wanted, %2, 0; @wanted cp.async.cg.shared.global [%0], [%1], 16;}" ::"r"(lane_at + i),
                     "l"(lane_from + i), "r"(u32(wanted & inside))
                     : "memory");
    }
}

// Returns the number of stages: as many as fit into 99 KiB of shared memory, but at most four.
__device__ constexpr int stages_of(int bytes) { return 101376 / bytes < 4 ? 101376 / bytes : 4; }
__device__ constexpr int stage_bytes(int x_bytes, int record_bytes) { return (x_bytes + record_bytes + 255) / 256 * 256; }

// The operands of a product, and where its results are written.
struct Product {
    void* out;
    const T* x;
    const u8* weight;
    const float* bias;
    const u32* row_index;
    const uint4* expert_tiles;
    u32* sums;
    u32 rows, outputs, inputs, out_stride, out_mode;

    // Returns the index of the tile that the block computes.
    static INLINE u32 index() { return blockIdx.y * gridDim.x + blockIdx.x; }
    INLINE Tile tile(u32 tile_rows) const { return tile_of(index(), gridDim.x, gridDim.y, expert_tiles, rows, tile_rows); }
    // Return the rows of the weights, the groups of 16 of them and the records per row, rounded up.
    INLINE u32 weight_rows() const { return is_gated(out_mode) ? 2 * outputs : outputs; }
    INLINE u32 sixteens() const { return (weight_rows() + 15) / 16; }
    INLINE u32 records() const { return (inputs + RECORD_INPUTS - 1) / RECORD_INPUTS; }
    INLINE Output output(const Tile& tile) const {
        return {out, bias ? bias + (u64)tile.expert * weight_rows() : nullptr, outputs, out_stride, out_mode};
    }
};

constexpr int FEW_OUTPUTS = 32, FEW_THREADS = 256;
constexpr int MANY_ROWS = 64, MANY_THREADS = 128;

// The index of a result among those of a tile: row by row if `each` is 0, and otherwise in the layout in
// which the threads of `linear_quant_many` hold them, where each warp has `each` groups of 16 outputs.
struct ResultPlace {
    u32 columns, each;

    INLINE u32 operator()(u32 row, u32 column) const {
        if (each == 0) return row * columns + column;
        // Index of the group of four in the thread, and the lane; see Sums.
        const u32 four = column / 16 % each * (MANY_ROWS / 8) + row / 8, lane = column % 8 * 4 + row % 8 / 2;
        return (four * MANY_THREADS + column / (each * 16) * 32 + lane) * 4 + column / 8 % 2 * 2 + row % 2;
    }
};

// Writes the `size` results of a tile, which are in shared memory, or in `kept` if several blocks share
// the tile. If it is gated, `to.outputs` is a multiple of half the columns. Not inlined, because every
// kernel contains it.
__device__ __noinline__ void finish(Output to, Tile tile, SharedSums kept, u32 size, u32 each) {
    extern __shared__ __align__(256) u8 stages[];
    float* const results = reinterpret_cast<float*>(stages);
    if (is_shared()) {
        if (!is_last_to_arrive(kept.arrived, gridDim.z, reinterpret_cast<u32*>(stages))) return;
#pragma unroll 1
        for (u32 i = threadIdx.x; i < size; i += blockDim.x) results[i] = kept.total(i, size);
    }
    __syncthreads();
    const u32 columns = each ? each * (16 * MANY_THREADS / 32) : FEW_OUTPUTS;
    const ResultPlace place = {columns, each};
    const bool is_product = is_gated(to.mode);
    // A power of two, since `each` is one.
    const u32 width = is_product ? columns / 2 : columns, shift = __ffs(width) - 1;
#pragma unroll 1
    for (u32 i = threadIdx.x; i < (is_product ? size / 2 : size); i += blockDim.x) {
        const u32 column = i & (width - 1), row = i >> shift;
        write_result(to, tile, row, tile.column * width + column, results[place(row, column)],
                     is_product ? results[place(row, width + column)] : 0.0f);
    }
}

// Computes a tile of up to `ROWS` rows, 8 or 16, and 32 outputs. A pair of warps, with 16 outputs each,
// processes every fourth record, and four such pairs share a stage of four records. So each pair computes
// one unit of a round. Its sums pass through shared memory at the end of the round.
template <class F, int ROWS>
INLINE void linear_quant_few(const Product product) {
    constexpr int DEPTH = CHAINS * RECORD_INPUTS, CHUNKS = DEPTH / 8, RECORD_CHUNKS = RECORD_INPUTS / 8, EIGHTS = ROWS / 8;
    constexpr int X_BYTES = ROWS * DEPTH * sizeof(T), STAGE = stage_bytes(X_BYTES, FEW_THREADS / 32 * F::BYTES);
    constexpr int STAGES = stages_of(STAGE);
    extern __shared__ __align__(256) u8 stages[];

    const Tile tile = product.tile(ROWS);
    if (tile.row >= tile.row_end) return;
    const u32 inputs = product.inputs, records = product.records(), sixteens = product.sixteens();
    const u32 round = round_of(records);
    const Units rounds(rounds_in(records));
    const u32 begin = rounds.first * round, end = min(rounds.end * round, records);
    RowCopies<ROWS, DEPTH, FEW_THREADS> x_copies(product.x, tile.row_end - tile.row, inputs, RowOf{product.row_index, tile});
    x_copies.from += begin * (RECORD_INPUTS * 2);
    const OutputOf output_of(FEW_OUTPUTS, product.outputs, product.out_mode);
    const u32 chain = warp_id() / 2, sixteen = (tile.column * output_of.half + output_of(warp_id() % 2 * 16)) / 16;
    const u8* next = product.weight + (((u64)tile.expert * sixteens + sixteen) * records + begin + chain) * F::BYTES + lane_id() * 16;
    if (chain == 0 && lane_id() == 0 && sixteen < sixteens) prefetch(next, min(end - begin, STAGES * CHAINS) * F::BYTES);
    wait_for_kernels_before();
    // A stage that begins with record `first` has x for the thread if `first` is below `x_end`, and a
    // record for the warp if it is below `record_end`.
    const u32 thread_chunk = threadIdx.x % CHUNKS;
    u32 x_end = max(inputs / 8 + RECORD_CHUNKS - 1, thread_chunk) - thread_chunk;
    x_end = min(x_end / RECORD_CHUNKS, end);
    u32 record_end = sixteen < sixteens ? max(end, chain) - chain : 0;

    const u32 shared = shared_address(stages);
    const u32 own = X_BYTES + warp_id() * F::BYTES;
    u32 lane_codes = own + lane_id() * 16, lane_scales = own + F::SCALE + lane_id() / 4 * (F::SCALE_WORDS * 4);
    u32 lane_shared = own + F::SHARED + lane_id() / 4 * F::SHARED_BYTES;
    settle(x_end), settle(record_end), settle(lane_codes), settle(lane_scales), settle(lane_shared);
    const u32 stages_end = shared + STAGES * STAGE;
    auto start = [&](u32 stage, u32 first) {
        x_copies.start(stage, first < x_end);
        copy_record<F>(stage + lane_codes, next, first < record_end);
        next += CHAINS * F::BYTES;
        copy_async_commit();
    };
#pragma unroll 1
    for (u32 stage = 0; stage < STAGES - 1; stage++) start(shared + stage * STAGE, begin + stage * CHAINS);
    u32 empty = shared + (STAGES - 1) * STAGE, reading = shared;
    using Operands = typename Rows<EIGHTS, CHUNKS>::Operands;
    Rows<EIGHTS, CHUNKS> x_rows(0, chain * RECORD_CHUNKS);
    const u32 carrier = byte_carrier();
    settle(x_rows.at);
    Sums<EIGHTS> sums;
    sums.reset();

    // Each thread adds up EACH of the tile's results.
    constexpr u32 RESULTS = ROWS * FEW_OUTPUTS, EACH = RESULTS / FEW_THREADS;
    constexpr u32 PITCH = FEW_OUTPUTS + 8, CHAIN = ROWS * PITCH;
    static_assert(CHAINS * CHAIN * 4 <= STAGE, "the sums of a round fit in a stage");
    float total[EACH] = {};
    // Recomputed where they are needed, which takes fewer registers.
    const auto records_again = [&] {
        u32 records = product.records();
        settle(records);
        return records;
    };
    const auto rounds_again = [&] { return Units(rounds_in(records_again())); };
    const auto kept = [&](const Units& rounds) {
        return SharedSums(product.sums, Product::index(), RESULTS, 1 + (rounds.all - rounds.first_end) * CHAINS);
    };
    u32 number = rounds.first;
#pragma unroll 1
    for (u32 first = begin; first < end; number++) {
        const u32 round_end = min(first + round_of(records_again()), end);
#pragma unroll 1
        for (; first < round_end; first += CHAINS) {
            // The oldest stage has arrived for all threads, and no thread reads the one before it any more.
            copy_async_wait<STAGES - 2>();
            __syncthreads();
            start(empty, first + (STAGES - 1) * CHAINS);
            if (first < record_end) {
                const u32 shared_at = reading + lane_shared;
                const typename F::Shared shared_scales[2] = {load_shared<F>(shared_at), load_shared<F>(shared_at + 8 * F::SHARED_BYTES)};
                Rows<EIGHTS, CHUNKS> rows_at = x_rows;
                rows_at.at += reading;
                const auto row_sums = [&](float(&to)[4], const Operands& operands, int group, int n) { add_rows<F>(to, operands, group, n); };
                if constexpr (F::unrolled(ROWS)) {
                    const Record<F> record(reading + lane_codes, reading + lane_scales);
#pragma unroll
                    for (int part = 0; part < F::PARTS; part++) {
                        multiply_part(sums, record.part(part), shared_scales, rows_at.operands(part), carrier, row_sums);
                    }
                } else {
#pragma unroll 1
                    for (u32 part = 0; part < F::PARTS; part++) {
                        multiply_part(sums, load_part<F>(reading + lane_codes, reading + lane_scales, part), shared_scales,
                                      rows_at.operands(part), carrier, row_sums);
                    }
                }
            }
            empty = reading;
            reading = reading + STAGE == stages_end ? shared : reading + STAGE;
        }
        // The memory of the stage that was read last holds the sums, unit by unit.
        float* const results = reinterpret_cast<float*>(stages) + (empty - shared) / 4;
        __syncthreads();
        float* const own_results = results + chain * CHAIN + lane_id() % 4 * (2 * PITCH) + warp_id() % 2 * 16 + lane_id() / 4;
#pragma unroll
        for (int n = 0; n < EIGHTS; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) own_results[(n * 8 + i % 2) * PITCH + i / 2 * 8] = sums.at[n][i];
        }
        sums.reset();
        __syncthreads();
        float* const of_round = results + warp_id() * PITCH + lane_id();
        // Where blocks other than the first, which adds up, store the sums.
        float* to = nullptr;
        if (blockIdx.z > 0) {
            const Units units = rounds_again();
            const u32 place = 1 + (number - units.first_end) * CHAINS;
            to = kept(units).at + (int)(place * RESULTS) + threadIdx.x;
        }
#pragma unroll
        for (u32 i = 0; i < EACH; i++) {
#pragma unroll
            for (u32 unit = 0; unit < CHAINS; unit++) {
                const float sum = of_round[unit * CHAIN + i * (FEW_THREADS / 32) * PITCH];
                // Unless this block adds up its units, its `total` is not used.
                total[i] += sum;
                if (blockIdx.z > 0) to[unit * RESULTS + i * FEW_THREADS] = sum;
            }
        }
    }
    copy_async_wait<0>();
    // All stages have been read, so their memory can hold the results, unless several blocks share the tile.
    __syncthreads();
    const SharedSums sums_of_blocks = is_shared() ? kept(rounds_again()) : SharedSums(product.sums, 0, 0, 0);
    float* const results = (is_shared() ? sums_of_blocks.at : reinterpret_cast<float*>(stages)) + threadIdx.x;
    if (rounds.adds()) {
#pragma unroll
        for (u32 i = 0; i < EACH; i++) results[i * FEW_THREADS] = total[i];
    }
    finish(product.output(tile), tile, sums_of_blocks, RESULTS, 0);
}

// The records of a range of units, in the order in which a block of `linear_quant_many` processes them.
struct RecordOrder {
    u32 records, round, unit, record, end;

    INLINE RecordOrder(u32 first_unit, u32 records_) : records(records_), round(round_of(records_)) { begin(first_unit); }
    // Moves to the first record of a unit.
    INLINE void begin(u32 number) {
        unit = number;
        const u32 first = unit / CHAINS * round;
        record = first + unit % CHAINS;
        end = min(first + round, records);
    }
    // Steps to the next record; returns whether another unit begins.
    INLINE bool advance() {
        record += CHAINS;
        if (record < end) return false;
        begin(unit + 1);
        return true;
    }
};

// Computes a tile of 64 rows. Each warp computes all rows of 32 outputs, or of 16 if the format takes too
// many registers.
template <class F>
INLINE void linear_quant_many(const Product product) {
    constexpr int EACH = F::MANY_EACH, OUTPUTS = EACH * 16 * (MANY_THREADS / 32);
    constexpr int CHUNKS = RECORD_INPUTS / 8, EIGHTS = MANY_ROWS / 8, X_BYTES = MANY_ROWS * RECORD_INPUTS * sizeof(T);
    constexpr int STAGE = stage_bytes(X_BYTES, OUTPUTS / 16 * F::BYTES), STAGES = stages_of(STAGE);
    constexpr int GROUPS = F::PARTS * F::PART_GROUPS;
    extern __shared__ __align__(256) u8 stages[];
    __shared__ float row_sums[F::MINIMUM ? GROUPS : 1][MANY_ROWS];

    const Tile tile = product.tile(MANY_ROWS);
    if (tile.row >= tile.row_end) return;
    const u32 inputs = product.inputs, records = product.records(), sixteens = product.sixteens();
    RowCopies<MANY_ROWS, RECORD_INPUTS, MANY_THREADS> x_copies(product.x, tile.row_end - tile.row, inputs, RowOf{product.row_index, tile});
    const OutputOf output_of(OUTPUTS, product.outputs, product.out_mode);
    const u32 sixteen = (tile.column * output_of.half + output_of(warp_id() * (EACH * 16))) / 16;
    // Number of groups of 16 outputs that exist from the warp's first one on.
    const u32 existing = sixteen < sixteens ? sixteens - sixteen : 0;
    const u8* const lane_weight = product.weight + ((u64)tile.expert * sixteens + (existing ? sixteen : 0)) * records * F::BYTES + lane_id() * 16;
    // If the last round is incomplete, some of its units may have no records. They are not counted.
    const u32 round = round_of(records);
    const Units units(records / round * CHAINS + min(records % round, CHAINS));
    RecordOrder copying(units.first, records);
    if (lane_id() == 0 && copying.record < records) {
        prefetch(lane_weight + (u64)copying.record * F::BYTES, min(records - copying.record, STAGES * CHAINS) * F::BYTES);
    }
    wait_for_kernels_before();

    const u32 shared = shared_address(stages), own = X_BYTES + warp_id() * (EACH * F::BYTES), stages_end = shared + STAGES * STAGE;
    const auto after = [&](u32 stage) { return stage + STAGE == stages_end ? shared : stage + STAGE; };
    const u8* const x_begin = x_copies.from;
    auto start = [&](u32 stage) {
        if (copying.unit < units.end) {
            x_copies.from = x_begin + copying.record * (RECORD_INPUTS * 2);
            x_copies.start(stage, copying.record * CHUNKS + threadIdx.x % CHUNKS < inputs / 8);
#pragma unroll
            for (u32 i = 0; i < EACH; i++) {
                const u8* record = lane_weight + (u64)(i * records + copying.record) * F::BYTES;
                copy_record<F>(stage + own + i * F::BYTES + lane_id() * 16, record, i < existing);
            }
            copying.advance();
        }
        copy_async_commit();
    };
#pragma unroll 1
    for (u32 stage = 0; stage < STAGES - 1; stage++) start(shared + stage * STAGE);
    u32 empty = shared + (STAGES - 1) * STAGE, reading = shared;
    Sums<EIGHTS> sums[EACH], total[EACH];
#pragma unroll
    for (u32 i = 0; i < EACH; i++) sums[i].reset(), total[i].reset();
    // The sums of a tile, in groups of four, in the layout in which the threads hold them.
    constexpr u32 FOURS = EACH * EIGHTS;
    const SharedSums kept(product.sums, Product::index(), FOURS * MANY_THREADS * 4, 1 + units.all - units.first_end);
    const auto kept_at = [&](u32 place) { return reinterpret_cast<float4*>(kept.at) + place * (FOURS * MANY_THREADS) + threadIdx.x; };
    const u32 carrier = byte_carrier();
    using Operands = typename Rows<EIGHTS, CHUNKS>::Operands;
#pragma unroll 1
    for (RecordOrder order(units.first, records); order.unit < units.end;) {
        // The oldest stage has arrived for all threads, and no thread reads the one before it any more.
        copy_async_wait<STAGES - 2>();
        __syncthreads();
        start(empty);
        const Rows<EIGHTS, CHUNKS> x_rows(reading, 0);
        if constexpr (F::MINIMUM) {
            // The sums of x over the groups of the record, for all warps. Each warp computes those of one part.
            static_assert(F::PARTS == MANY_THREADS / 32, "each warp has one part");
            const auto operands = x_rows.operands(warp_id());
#pragma unroll
            for (int i = 0; i < F::PART_GROUPS; i++) {
                float* to = row_sums[warp_id() * F::PART_GROUPS + i] + lane_id() * 2;
#pragma unroll
                for (int n = 0; n < EIGHTS; n++) {
                    float of_rows[4];
                    add_rows<F>(of_rows, operands, i, n);
                    if (lane_id() < 4) *reinterpret_cast<float2*>(to + n * 8) = make_float2(of_rows[0], of_rows[1]);
                }
            }
            __syncthreads();
        }
        const u32 record = reading + own, lane_shared = record + F::SHARED + lane_id() / 4 * F::SHARED_BYTES;
        const u32 lane_codes = record + lane_id() * 16, lane_scales = record + F::SCALE + lane_id() / 4 * (F::SCALE_WORDS * 4);
#pragma unroll 1
        for (u32 part = 0; part < F::PARTS; part++) {
            const Operands operands = x_rows.operands(part);
#pragma unroll
            for (u32 i = 0; i < EACH; i++) {
                if (i >= existing) break;
                const u32 shared_at = lane_shared + i * F::BYTES;
                const typename F::Shared shared_scales[2] = {load_shared<F>(shared_at), load_shared<F>(shared_at + 8 * F::SHARED_BYTES)};
                const Part<F> codes = load_part<F>(lane_codes + i * F::BYTES, lane_scales + i * F::BYTES, part);
                multiply_part(sums[i], codes, shared_scales, operands, carrier, [&](float(&to)[4], const Operands&, int group, int n) {
                    const float* of = row_sums[part * F::PART_GROUPS + group] + n * 8 + lane_id() % 4 * 2;
                    const float2 two = *reinterpret_cast<const float2*>(of);
                    to[0] = to[2] = two.x;
                    to[1] = to[3] = two.y;
                });
            }
        }
        empty = reading;
        reading = after(reading);
        const u32 unit = order.unit;
        if (!order.advance()) continue;
        // The sums of a unit are complete.
        float4* const to = kept_at(1 + unit - units.first_end);
#pragma unroll
        for (u32 i = 0; i < EACH; i++) {
            if (!units.adds()) sums[i].store(to + i * (EIGHTS * MANY_THREADS), MANY_THREADS);
            // Unless this block adds up its units, its `total` is not used.
            total[i].add(sums[i]);
            sums[i].reset();
        }
    }
    copy_async_wait<0>();
    // All stages have been read, so their memory can hold the results, unless several blocks share the tile.
    __syncthreads();
    float4* const results = is_shared() ? kept_at(0) : reinterpret_cast<float4*>(stages) + threadIdx.x;
    static_assert(FOURS * MANY_THREADS * 16 <= STAGES * STAGE, "the results fit where the stages were");
    if (units.adds()) {
#pragma unroll
        for (u32 i = 0; i < EACH; i++) total[i].store(results + i * (EIGHTS * MANY_THREADS), MANY_THREADS);
    }
    finish(product.output(tile), tile, kept, MANY_ROWS * OUTPUTS, EACH);
}

// `out[row] = scale · table[resolved[row]]`, not rounded to the activation type. One block per row. An id
// beyond the vocabulary reads row 0.
template <class F>
INLINE void embed_quant(float* out, const u8* table, const u32* resolved, float scale, u32 columns, u32 vocabulary) {
    wait_for_kernels_before();
    u32 token = resolved[blockIdx.x];
    if (token >= vocabulary) token = 0;
    out += (u64)blockIdx.x * columns;
    const u32 records = (columns + RECORD_INPUTS - 1) / RECORD_INPUTS, output = token % RECORD_OUTPUTS, row = output / 8;
    table += (u64)(token / RECORD_OUTPUTS) * records * F::BYTES;
    // Each iteration computes the four weights that a lane has of a step.
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
        const float factor = F::scale_of(scale_word, shared, 0, BYTE_CARRIER), offset = F::offset_of(scale_word, shared, 0, BYTE_CARRIER);
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

// Shared memory: the number of stages that `stages_of` returns, which lets two blocks run on a
// multiprocessor of compute capability 9.0.
#define LINEAR_QUANT(NAME, THREADS, ...)                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS, 2)                                                        \
        NAME(void* out, const T* x, const u8* weight, const float* bias, const u32* row_index,                      \
             const uint4* expert_tiles, u32* sums, u32 rows, u32 outputs, u32 inputs, u32 out_stride,               \
             u32 out_mode) {                                                                                        \
        __VA_ARGS__({out, x, weight, bias, row_index, expert_tiles, sums, rows, outputs, inputs, out_stride, out_mode}); \
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
