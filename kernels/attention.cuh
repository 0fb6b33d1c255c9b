// What decode and prefill attention share, so that a token's result has the same bits
// whichever of them computed it, in whatever chunk of its prompt, beside whatever rows.
//
// Keys are cut into units of 128, counted from the sequence's beginning, and units into
// tiles of 32. A warp takes 16 packed query rows (token by token, and of each token the
// query heads of one key-value head) through a unit's tiles in ascending order with an
// online softmax that starts anew with the unit. Units are then merged one after the
// other, ascending.
//
// A row sees the keys `begin .. end`. A tile or a unit of which a row sees nothing leaves
// the row's state as it is, to the bit: the largest score stays, the factor on what was
// summed up is exactly 1, and exact zeros are added. So it does not matter which tiles
// are visited for the sake of other rows.
#pragma once
#include "common.cuh"

constexpr u32 UNIT = 128;
constexpr u32 TILE = 32;
// Keys that are always in one block of the cache.
constexpr u32 GRANULE = 16;
constexpr u32 UNIT_TILES = UNIT / TILE;
constexpr u32 UNIT_GRANULES = UNIT / GRANULE;
// Packed query rows of a warp.
constexpr u32 WARP_ROWS = 16;
constexpr u32 WARPS = 4;
constexpr float LOG2_E = 1.4426950408889634f;
// Minus infinity: the score of a key that is not seen.
#define UNSEEN __int_as_float(0xff800000)

// Elements from one row of a tile in shared memory to the next: with an odd number of
// 16-byte vectors, the eight rows that an ldmatrix reads lie in different banks.
template <int COLUMNS>
constexpr int PITCH = COLUMNS + 8;

// Heads of more than 256 elements are computed in pieces of 256, for want of registers and of shared
// memory: a tile holds one piece of its keys or values at a time, and a block sums up the values of
// one piece of the results. All blocks of a head compute the same scores, to the bit.
constexpr u32 MOST_COLUMNS = 256;
template <int HEAD>
constexpr int COLUMNS = HEAD < int(MOST_COLUMNS) ? HEAD : int(MOST_COLUMNS);
template <int HEAD>
constexpr u32 PIECES = HEAD / COLUMNS<HEAD>;
// Elements of a vector, the unit in which places in the cache are counted.
constexpr u32 VECTOR = 8;

// 2^x; 0 for -infinity, exactly 1 for 0.
INLINE float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 1 / x, to the last bit but one; 0 for infinity.
INLINE float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// The largest score, as it is subtracted before the exponential: 0 where nothing was seen.
INLINE float finite(float largest) { return largest == UNSEEN ? 0.0f : largest; }

// Joins the largest score of a part to that of all before it; gives the factors on both sums.
INLINE void join(float& largest, float other, float& keep, float& add) {
    const float both = fmaxf(largest, other);
    keep = power_of_two(largest - finite(both));
    add = power_of_two(other - finite(both));
    largest = both;
}

// Adds a part's sum to that of all before it.
INLINE float merge(float total, float keep, float part, float add) {
    return fmaf(total, keep, __fmul_rn(part, add));
}

// One over a softmax's sum; 0 where nothing was seen.
INLINE float inverse(float sum) { return sum == 0.0f ? 0.0f : reciprocal(sum); }

// Two numbers that are in the range of T for sure.
INLINE T2 pair_of(float x, float y) {
#if QUELL_F16
    return __floats2half2_rn(x, y);
#else
    return __floats2bfloat162_rn(x, y);
#endif
}

// A result, which lies among the values; adding zero makes a negative zero a positive one.
INLINE float result(float total, float inverse_sum) { return __fmaf_rn(total, inverse_sum, 0.0f); }

// A softmax's state before the first key, as far as it is no result: that of a key with the score
// `sink` of its head and a value of zeros, if there are sinks.
INLINE void begin_softmax(float& largest, float& sum, const float* sinks, u32 head) {
    largest = sinks != nullptr ? sinks[head] * LOG2_E : UNSEEN;
    sum = sinks != nullptr ? 1.0f : 0.0f;
}

// How scores are made of products: the factor with log2(e) in it, so that the softmax is
// over powers of two, and the soft-cap.
struct Scoring {
    float scale;
    float cap;

    INLINE Scoring(float scale_, float softcap) : scale(scale_ * LOG2_E), cap(softcap * LOG2_E) {
        // cap · tanh(s / cap) = cap - 2 cap / (1 + 2^(s · 2 log2(e) / cap))
        if (softcap != 0.0f) scale = scale_ * (2.0f * LOG2_E / softcap);
    }
    INLINE float capped(float product) const {
        return fmaf(-2.0f * cap, reciprocal(1.0f + power_of_two(product * scale)), cap);
    }
};

// The keys that a row at `position` sees: `begin .. end`. It sees only keys of its own chunk, whose
// beginning is what `chunks`, a mask, leaves of the position: 0 for a single chunk.
struct Sight {
    u32 begin, end;

    INLINE static Sight of(u32 position, u32 window, u32 chunks) {
        const u32 end = position + 1;
        return {max(window != 0 && end > window ? end - window : 0, position & chunks), end};
    }
    INLINE static Sight nothing() { return {0, 0}; }
    INLINE bool sees(u32 key) const { return key - begin < end - begin; }
    INLINE bool sees_any(u32 first, u32 count) const { return first < end && first + count > begin; }
};

// The blocks of one sequence, as one key-value head sees them: its cache begins with its first key in
// the first block.
struct Pages {
    // The block of position 0 is tables[origin]. If the table begins later in the sequence,
    // `origin` is a place before it, modulo 2^32.
    const u32* tables;
    u32 origin, block_tokens;
    // Vectors from one block to the next, which may have room for larger layers than this one, and
    // from one key to the next.
    u32 block_vectors, key_vectors;

    // Lane i (modulo 8) gets where the unit's granule i begins, counted in vectors;
    // 0 for a granule of which `sight` sees nothing: its block may be gone.
    INLINE u32 locate(u32 unit, Sight sight) const {
        const u32 granule = unit * UNIT_GRANULES + lane_id() % UNIT_GRANULES;
        if (!sight.sees_any(granule * GRANULE, GRANULE)) return 0;
        return vector_of(granule * GRANULE);
    }

    // The first vector of a position whose block is in the table.
    INLINE u32 vector_of(u32 position) const {
        return tables[origin + position / block_tokens] * block_vectors + position % block_tokens * key_vectors;
    }
};

// Bytes from one row of a tile in shared memory to the next.
template <int COLUMNS>
constexpr u32 PITCH_BYTES = PITCH<COLUMNS> * sizeof(T);

// Copies a piece of `ROWS` keys or values, 16 from vector `first` of the cache on and then, if there
// are more, 16 from vector `second` on, to shared memory: the work of `THREADS` threads, of which
// this is number `thread`. Keys that are not seen become zeros, and are not read.
template <int HEAD, u32 THREADS, u32 ROWS>
INLINE void copy_rows(
    u32 shared, const T* cache, u32 first, u32 second, u32 thread, u32 first_key, const Sight& sight
) {
    // As many vectors side by side in one access as is a power of two.
    constexpr u32 VECTORS = COLUMNS<HEAD> / VECTOR, ACROSS = VECTORS & (0 - VECTORS), STEP = THREADS / ACROSS;
    const u32 thread_row = thread / ACROSS;
    if (STEP > ROWS && thread_row >= ROWS) return;
    const u32 to = shared + thread_row * PITCH_BYTES<COLUMNS<HEAD>> + thread % ACROSS * 16;
#pragma unroll
    for (u32 granule_row = 0; granule_row < ROWS; granule_row += STEP < GRANULE ? GRANULE : STEP) {
        const bool in_first = STEP <= GRANULE ? granule_row == 0 : thread_row < GRANULE;
        const u32 own = thread_row % GRANULE * (HEAD / VECTOR) + thread % ACROSS;
        const T* from = cache + u64((in_first ? first : second) + own) * VECTOR;
#pragma unroll
        for (u32 row = 0; row < GRANULE; row += STEP) {
            const u32 bytes = sight.sees(first_key + thread_row + granule_row + row) ? 16 : 0;
#pragma unroll
            for (u32 vector = 0; vector < VECTORS; vector += ACROSS) {
                asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                                 to + (granule_row + row) * PITCH_BYTES<COLUMNS<HEAD>> + vector * 16
                             ),
                             "l"(from + row * HEAD + vector * VECTOR), "r"(bytes)
                             : "memory");
            }
        }
    }
}

// The queries of a lane's rows, lane / 4 and lane / 4 + 8 of the warp's, as left operands
// of products, 16 columns each. Registers hold all of heads of up to 128 columns, and the first
// `MOST` of larger ones; the others are read anew, from shared memory or the cache of the
// multiprocessor.
template <int HEAD, int MOST = 7>
struct Queries {
    static constexpr int STEPS = HEAD / 16;
    static constexpr int KEPT = HEAD <= 128 ? STEPS : MOST;
    u32 kept[KEPT][4];
    const T* rows[2];

    INLINE Queries(const T* first, const T* second, bool wanted = true)
        : rows{first + lane_id() % 4 * 2, second + lane_id() % 4 * 2} {
        if (!wanted) return;
#pragma unroll
        for (int step = 0; step < KEPT; step++) load(kept[step], step);
    }
    INLINE void load(u32 (&out)[4], int step) const {
#pragma unroll
        for (int i = 0; i < 4; i++) out[i] = *reinterpret_cast<const u32*>(rows[i % 2] + step * 16 + i / 2 * 8);
    }

    // Scores with the 16 keys of which a piece is at `keys`, as sums of products: those of the pieces
    // before it, and of this one.
    INLINE void multiply(float (&first)[4], float (&second)[4], u32 keys, int piece) const {
        constexpr int PIECE_STEPS = STEPS / int(PIECES<HEAD>);
        if (piece == 0) {
#pragma unroll
            for (int i = 0; i < 4; i++) first[i] = second[i] = 0.0f;
        }
        const u32 lane = lane_id();
        const u32 row = keys + (lane / 16 * 8 + lane % 8) * PITCH_BYTES<COLUMNS<HEAD>> + lane / 8 % 2 * 16;
#pragma unroll
        for (int step = piece * PIECE_STEPS; step < (piece + 1) * PIECE_STEPS; step++) {
            u32 b[4];
            load_matrices_at(b, row + step % PIECE_STEPS * 32);
            if (step < KEPT) {
                matrix_multiply(first, kept[step], b[0], b[1]);
                matrix_multiply(second, kept[step], b[2], b[3]);
            } else {
                u32 a[4];
                load(a, step);
                matrix_multiply(first, a, b[0], b[1]);
                matrix_multiply(second, a, b[2], b[3]);
            }
        }
    }
};

// The online softmax of a warp's 16 rows over the keys of one unit, and `COLUMNS` columns of its
// results. A lane holds, of rows lane / 4 and lane / 4 + 8, the columns 2 (lane % 4) and the next of
// every eight; its `sum` is over its own keys until `finish`.
template <int COLUMNS>
struct Softmax {
    float largest[2];
    float sum[2];
    float out[COLUMNS / 8][4];

    INLINE void reset() {
        largest[0] = largest[1] = UNSEEN;
        sum[0] = sum[1] = 0.0f;
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) out[n][i] = 0.0f;
        }
    }

    // Turns the products of a tile's keys, which begin at `first_key`, into weights, ready
    // to be multiplied with 16 values each. `masked`: some row may not see some key.
    INLINE void weigh(
        float (&scores)[4][4], u32 (&weights)[2][4], const Scoring& scoring, const Sight (&sights)[2], u32 first_key,
        bool masked
    ) {
        if (scoring.cap == 0.0f) {
#pragma unroll
            for (int i = 0; i < 16; i++) scores[i / 4][i % 4] *= scoring.scale;
        } else {
#pragma unroll
            for (int i = 0; i < 16; i++) scores[i / 4][i % 4] = scoring.capped(scores[i / 4][i % 4]);
        }
        if (masked) {
            const u32 key = first_key + lane_id() % 4 * 2;
#pragma unroll
            for (int i = 0; i < 16; i++) {
                if (!sights[i / 2 % 2].sees(key + i / 4 * 8 + i % 2)) scores[i / 4][i % 4] = UNSEEN;
            }
        }
        float decay[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float most = fmaxf(scores[0][2 * r], scores[0][2 * r + 1]);
#pragma unroll
            for (int n = 1; n < 4; n++) most = fmaxf(most, fmaxf(scores[n][2 * r], scores[n][2 * r + 1]));
            most = fmaxf(most, __shfl_xor_sync(FULL_WARP, most, 1));
            most = fmaxf(most, __shfl_xor_sync(FULL_WARP, most, 2));
            most = fmaxf(most, largest[r]);
            const float reference = finite(most);
            decay[r] = power_of_two(largest[r] - reference);
            largest[r] = most;
            float tile_sum = 0.0f;
#pragma unroll
            for (int n = 0; n < 4; n++) {
                const float a = power_of_two(scores[n][2 * r] - reference);
                const float b = power_of_two(scores[n][2 * r + 1] - reference);
                tile_sum += a;
                tile_sum += b;
                weights[n / 2][n % 2 * 2 + r] = bits(pair_of(a, b));
            }
            sum[r] = fmaf(sum[r], decay[r], tile_sum);
        }
        // Most tiles do not raise the largest score: then all factors are 1.
        if (__any_sync(FULL_WARP, decay[0] != 1.0f || decay[1] != 1.0f)) {
#pragma unroll
            for (int n = 0; n < COLUMNS / 8; n++) {
#pragma unroll
                for (int i = 0; i < 4; i++) out[n][i] *= decay[i / 2];
            }
        }
    }

    // Adds 16 values, at `values`, times their weights.
    INLINE void add(const u32 (&weights)[4], u32 values) {
        const u32 lane = lane_id();
        const u32 row = values + lane % 16 * PITCH_BYTES<COLUMNS> + lane / 16 * 16;
#pragma unroll
        for (int pair = 0; pair < COLUMNS / 16; pair++) {
            u32 b[4];
            load_matrices_transposed_at(b, row + pair * 32);
            matrix_multiply(out[2 * pair], weights, b[0], b[1]);
            matrix_multiply(out[2 * pair + 1], weights, b[2], b[3]);
        }
    }

    // Makes `sum` that of all keys, in every lane of a row.
    INLINE void finish() {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            sum[r] += __shfl_xor_sync(FULL_WARP, sum[r], 1);
            sum[r] += __shfl_xor_sync(FULL_WARP, sum[r], 2);
        }
    }
};
