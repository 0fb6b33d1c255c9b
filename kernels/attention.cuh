// Code that decode and prefill attention share, so that a token's result has the same bits whichever
// of them computes it, in whichever chunk of its prompt, and whatever other rows are in the step.
//
// Keys are divided into units of 128, counted from the start of the sequence, and units into tiles of
// 32. A warp processes the tiles of a unit in ascending order for 16 packed query rows: token by token,
// and for each token the query heads of one key-value head. The online softmax starts anew with each
// unit. The units are then merged one after the other, in ascending order, so that the order of all
// additions depends only on the positions.
//
// A row sees the keys `begin .. end`. A tile or unit in which a row sees no key leaves the row's state
// unchanged, bit for bit: the maximum score stays, the factor on the sums is exactly 1, and exact zeros
// are added. So a warp may visit tiles that only some of its rows see, and the other rows' results do
// not change.
#pragma once
#include "common.cuh"

constexpr u32 UNIT = 128;
constexpr u32 TILE = 32;
// Keys per granule, which always lie in the same cache block: block sizes are multiples of it.
constexpr u32 GRANULE = 16;
constexpr u32 UNIT_TILES = UNIT / TILE;
constexpr u32 UNIT_GRANULES = UNIT / GRANULE;
// Packed query rows per warp.
constexpr u32 WARP_ROWS = 16;
constexpr u32 WARPS = 4;
constexpr float LOG2_E = 1.4426950408889634f;
// Minus infinity: the score of a key that the row does not see.
#define UNSEEN __int_as_float(0xff800000)

// Distance between rows of a tile in shared memory, in elements. It is an odd number of 16-byte vectors,
// so that the eight rows that an ldmatrix reads lie in different banks.
template <int COLUMNS>
constexpr int PITCH = COLUMNS + 8;

// Heads of more than 256 elements are computed in pieces of 256, to save registers and shared memory:
// a tile holds one piece of its keys or values at a time, and a block computes one piece of the results.
// All blocks of a head compute the same scores, bit for bit.
constexpr u32 MOST_COLUMNS = 256;
template <int HEAD>
constexpr int COLUMNS = HEAD < int(MOST_COLUMNS) ? HEAD : int(MOST_COLUMNS);
template <int HEAD>
constexpr u32 PIECES = HEAD / COLUMNS<HEAD>;
// Elements per 16-byte vector, the unit of offsets in the cache.
constexpr u32 VECTOR = 8;

// Returns 2^x: 0 for −∞, and exactly 1 for 0.
INLINE float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Returns 1 / x to within one unit in the last place; 0 for infinity.
INLINE float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Returns the maximum score as it is subtracted before the exponential: 0 if no key was seen.
INLINE float finite(float largest) { return largest == UNSEEN ? 0.0f : largest; }

// Merges a part's maximum score into `largest`. Sets the factors on the sum so far and on the part's sum.
INLINE void join(float& largest, float other, float& keep, float& add) {
    const float both = fmaxf(largest, other);
    keep = power_of_two(largest - finite(both));
    add = power_of_two(other - finite(both));
    largest = both;
}

// Returns the sum so far plus a part's sum, each times its factor from `join`.
INLINE float merge(float total, float keep, float part, float add) {
    return fmaf(total, keep, __fmul_rn(part, add));
}

// Returns 1 / `sum` for the sum of a softmax, or 0 if no key was seen.
INLINE float inverse(float sum) { return sum == 0.0f ? 0.0f : reciprocal(sum); }

// Converts two numbers that are known to be in the range of T.
INLINE T2 pair_of(float x, float y) {
#if QUELL_F16
    return __floats2half2_rn(x, y);
#else
    return __floats2bfloat162_rn(x, y);
#endif
}

// Returns a weighted mean of values, which is in the range of T. The addition turns −0 into +0.
INLINE float result(float total, float inverse_sum) { return __fmaf_rn(total, inverse_sum, 0.0f); }

// Sets the maximum and the sum of a softmax before the first key. With sinks, they are those after a key
// whose score is the head's sink and whose value is zeros.
INLINE void begin_softmax(float& largest, float& sum, const float* sinks, u32 head) {
    largest = sinks != nullptr ? sinks[head] * LOG2_E : UNSEEN;
    sum = sinks != nullptr ? 1.0f : 0.0f;
}

// How products become scores: the scale, multiplied by log2(e) so that the softmax uses powers of two,
// and the soft-cap.
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

// The keys that a row sees: `begin .. end`. A row sees only keys within its window (0: no window) and
// of its own chunk, which begins at `position & chunks`; a mask of 0 means a single chunk.
struct Sight {
    u32 begin, end;

    INLINE static Sight of(u32 position, u32 window, u32 chunks) {
        const u32 end = position + 1;
        return {max(window != 0 && end > window ? end - window : 0, position & chunks), end};
    }
    // In an encoder, a row also sees at most `after` of the keys after its own, of a sequence of `length`.
    INLINE static Sight around(u32 position, u32 window, u32 after, u32 length) {
        return {of(position, window, 0).begin, min(position + 1 + after, length)};
    }
    INLINE static Sight nothing() { return {0, 0}; }
    INLINE bool sees(u32 key) const { return key - begin < end - begin; }
    INLINE bool sees_any(u32 first, u32 count) const { return first < end && first + count > begin; }
};

// The cache blocks of one sequence. Offsets are counted from where the first key of the key-value head
// lies in block 0 of the cache.
struct Pages {
    // tables[origin] is the block of position 0. If the table of the sequence begins at a later position,
    // `origin` lies before the table, modulo 2^32.
    const u32* tables;
    u32 origin, block_tokens;
    // Distances in vectors: from one block to the next, which may have room for larger layers than this
    // one, and from one key to the next.
    u32 block_vectors, key_vectors;

    // Returns to lane i (modulo 8) the first vector of the unit's granule i, or 0 if `sight` sees none of
    // the granule's keys, because its block may have been freed.
    INLINE u32 locate(u32 unit, Sight sight) const {
        const u32 granule = unit * UNIT_GRANULES + lane_id() % UNIT_GRANULES;
        if (!sight.sees_any(granule * GRANULE, GRANULE)) return 0;
        return vector_of(granule * GRANULE);
    }

    // Returns the first vector of a position, whose block must be in the table.
    INLINE u32 vector_of(u32 position) const {
        return tables[origin + position / block_tokens] * block_vectors + position % block_tokens * key_vectors;
    }
};

// Distance between rows of a tile in shared memory, in bytes.
template <int COLUMNS>
constexpr u32 PITCH_BYTES = PITCH<COLUMNS> * sizeof(T);

// Starts to copy one piece of `ROWS` keys or values to shared memory: 16 from vector `first` of the cache
// on and, if `ROWS` is 32, another 16 from vector `second` on. `THREADS` threads share the work; this is
// number `thread`. Keys outside `sight` are not read and become zeros.
template <int HEAD, u32 THREADS, u32 ROWS>
INLINE void copy_rows(
    u32 shared, const T* cache, u32 first, u32 second, u32 thread, u32 first_key, const Sight& sight
) {
    // Adjacent threads copy ACROSS adjacent vectors: the largest power of two that divides VECTORS.
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

// The queries of a lane's two rows, lane / 4 and lane / 4 + 8 of the warp's, as left operands of matrix
// products of 16 columns each. Registers hold all operands of heads of up to 128 columns, and the first
// `MOST` operands of larger heads. The others are read again for each product, from shared memory or
// the L1 cache.
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

    // Adds the products with one piece of 16 keys, which lies at `keys`, to the scores of these keys.
    // The first piece starts the scores at 0.
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
// results. A lane holds rows lane / 4 and lane / 4 + 8 and, of every eight columns, 2 (lane % 4) and the
// next one. Until `finish`, its `sum` covers only the lane's own keys.
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

    // Turns the products with a tile's keys, which begin at `first_key`, into weights: two left operands,
    // each for 16 values. `masked` must be set unless every row sees every key.
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
        // Most tiles do not raise a row's maximum score. Then all factors are 1.
        if (__any_sync(FULL_WARP, decay[0] != 1.0f || decay[1] != 1.0f)) {
#pragma unroll
            for (int n = 0; n < COLUMNS / 8; n++) {
#pragma unroll
                for (int i = 0; i < 4; i++) out[n][i] *= decay[i / 2];
            }
        }
    }

    // Adds the 16 values at `values`, times their weights, to the results.
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

    // Extends `sum` to all keys of the unit, in every lane of a row.
    INLINE void finish() {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            sum[r] += __shfl_xor_sync(FULL_WARP, sum[r], 1);
            sum[r] += __shfl_xor_sync(FULL_WARP, sum[r], 2);
        }
    }
};
