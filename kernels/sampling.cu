// Chooses a token for each row of logits, as src/sampling/sampler.rs does, and reports
// log-probabilities.
//
// A row of logits is divided into slices of 4096, and grids over (slices, rows) let several blocks
// work on one row. The kernels run in this order, each of them only if a row needs it:
//   sample_sums       the max and the sum of exponentials of each slice of the unmodified logits
//   sample_top        the likeliest tokens and the log of the sum
//   sample_edit       penalties and bias, in place
//   sample_best       the largest logit of each slice
//   sample_histogram  rows with top-k or top-p: a histogram of the scores
//   sample_compact    those rows: a list of the tokens that may be kept
//   sample_filter     those rows: the tokens that are kept, and the draw among them if they are listed
//   sample_draw       other rows with a temperature, and rows that are not listed: the draw within each slice
//   sample_finish     the token; also restores the logits that sample_edit changed
//
// A row whose unmodified logits are not all finite is reported. sample_best marks the slices that
// have a logit that is not finite, edits included. If a slice is marked, sample_finish checks the
// whole row again after it has restored the logits.
//
// A row may have a mask with one bit per token. From sample_best on, tokens whose bit is not set count
// as −∞, but nothing is written. sample_sums, sample_top and the log-probabilities ignore the mask.
//
// A score is (logit − largest logit) / temperature. The mass of a token with the score s is e^s, as
// an integer in units of 2⁻³⁶, because integer sums do not depend on their order. A rank is a number
// that no two tokens of a row share; it orders tokens by score, then by lower id. Rank 0 means that a
// token cannot be chosen.
#include "common.cuh"

#define INFINITE __uint_as_float(0x7f800000u)
// Below every score.
#define NEVER (-INFINITE)

constexpr u32 SLICE = 4096;
constexpr u32 SLICE_THREADS = 256;
constexpr u32 PER_THREAD = SLICE / SLICE_THREADS;
// Bins of a row's histogram, 1/16 wide; the last holds all lower scores.
constexpr u32 BINS = 512;
// Maximum length of the list that sample_compact makes. A row that may keep more tokens is long: only the
// bin in which the first limit falls is listed, if even that fits, and all slices draw.
constexpr u32 LIST = 4096;
constexpr u32 MAX_TOP = 1024;
// Set in the token of a slice's best if a logit of the slice is not finite, and in the token of a result
// if a logit of the row is not finite. No token id has this bit.
constexpr u32 NOT_FINITE = 0x80000000u;

// Sampling parameters of a row: 18 words.
struct Row {
    u32 seed_low, seed_high;
    u32 position;
    u32 top_k;
    float inverse_temperature;  // 0: greedy
    float top_p;
    float floor;  // lowest score that min-p keeps
    float repetition, presence, frequency;
    u32 history_start, history_count;  // entries {token, times generated} and a spare one; or NONE
    u32 bias_start, bias_count;        // entries {token, bias}, those of a token adjacent
    u32 logprobs;                      // number of likeliest tokens to report; NONE: no log-probabilities
    u32 mask;                          // offset of the mask in words from the first row; NONE: no mask
    u32 forced;                        // token to return instead of the chosen one; NONE: none
    u32 unused;                        // padding, because pairs of words follow the rows
};

// State of a row with top-k or top-p: 8 words. sample_best resets `length`; sample_filter sets `lowest`;
// sample_compact sets the rest.
struct Filter {
    u64 mass;     // of all tokens; 0 without top-p
    u64 lowest;   // long rows: the lowest rank that is kept
    u32 tokens;   // number of tokens that can be chosen
    u32 listed;   // number of tokens that may be kept
    u32 length;   // current length of the list, while it is made
    u32 unused;

    INLINE bool is_long() const { return listed > LIST; }
};

// A token, and the value by which it is compared.
struct Candidate {
    float value;
    u32 token;
};

// Keeps the better candidate: the larger value, then the lower id. NaN is never better.
INLINE void take_better(Candidate& best, float value, u32 token) {
    if (value > best.value || (value == best.value && token < best.token)) best = {value, token};
}

INLINE Candidate warp_best(Candidate best) {
#pragma unroll
    for (int offset = 16; offset > 0; offset >>= 1) {
        float value = __shfl_xor_sync(FULL_WARP, best.value, offset);
        u32 token = __shfl_xor_sync(FULL_WARP, best.token, offset);
        take_better(best, value, token);
    }
    return best;
}

// Returns the best candidate of a block of whole warps to the threads of its first warp.
INLINE Candidate block_best(Candidate best) {
    __shared__ float values[32];
    __shared__ u32 tokens[32];
    best = warp_best(best);
    if (lane_id() == 0) {
        values[warp_id()] = best.value;
        tokens[warp_id()] = best.token;
    }
    __syncthreads();
    if (warp_id() == 0) {
        bool used = lane_id() < blockDim.x / 32;
        best.value = used ? values[lane_id()] : NEVER;
        best.token = used ? tokens[lane_id()] : NONE;
        best = warp_best(best);
    }
    return best;
}

// Returns the best of `count` candidates in memory to every thread of the warp.
INLINE Candidate best_of(const uint2* candidates, u32 count) {
    Candidate best = {NEVER, NONE};
    for (u32 i = lane_id(); i < count; i += 32) {
        uint2 candidate = candidates[i];
        take_better(best, __uint_as_float(candidate.x), candidate.y & ~NOT_FINITE);
    }
    return warp_best(best);
}

INLINE uint2 packed(Candidate candidate) { return make_uint2(__float_as_uint(candidate.value), candidate.token); }

// A row's logits with its mask applied.
struct Logits {
    const float* values;
    const u32* mask;  // null: no mask

    // Logits without a mask.
    INLINE explicit Logits(const float* logits) : values(logits), mask(nullptr) {}
    // The logits and the mask of row `row` of `rows`.
    INLINE Logits(const float* logits, const Row* rows, u32 row, u32 columns)
        : values(logits + u64(row) * columns),
          mask(rows[row].mask == NONE ? nullptr : reinterpret_cast<const u32*>(rows) + rows[row].mask) {}

    INLINE bool allows(u32 token) const { return mask == nullptr || (mask[token / 32] >> (token % 32) & 1) != 0; }

    INLINE float operator[](u32 token) const { return allows(token) ? values[token] : NEVER; }
};

INLINE bool is_filtered(const Row& row) {
    return row.inverse_temperature != 0.0f && (row.top_k != 0 || row.top_p < 1.0f);
}

// Returns whether a logit is finite. If the largest one of a row is not, there is nothing to draw.
INLINE bool is_finite(float largest) { return fabsf(largest) < INFINITE; }

// Counts, in shared memory, the warps that have found a logit that is not finite.
INLINE void count_broken(u32& broken, bool finite) {
    u32 ballot = __ballot_sync(FULL_WARP, !finite);
    if (ballot != 0 && lane_id() == 0) atomicAdd(&broken, 1);
}

INLINE float score_of(float logit, float largest, float inverse) { return __fmul_rn(__fsub_rn(logit, largest), inverse); }

// A score in the last bin that stands for all lower ones. Their masses round to zero.
constexpr float LOWEST_SCORE = -float(BINS - 1) / 16.0f;

// Returns e^score · 2³⁶ for a score of at most zero.
INLINE float scaled_weight(float score) {
    constexpr float LOG2_E = 1.44269502f, REST = 1.92596303e-8f;
    // 1.5 · 2²³, whose addition rounds the result's exponent into the lowest bits, plus the 36.
    constexpr float CARRIER = 12582912.0f + 36.0f;
    score = fmaxf(score, LOWEST_SCORE);
    const float carried = __fmaf_rn(score, LOG2_E, CARRIER);
    const float exponent = __fsub_rn(carried, CARRIER);
    const float fraction = __fmaf_rn(score, REST, __fmaf_rn(score, LOG2_E, -exponent));
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(fraction));
    return __uint_as_float(__float_as_uint(power) + (__float_as_uint(carried) << 23));
}
INLINE u64 mass_of(float score) { return __float2ull_rn(scaled_weight(score)); }

// Returns the rank of a token: 32 bits that order by score, then 24 bits that order by lower id.
INLINE u64 rank_of(float score, u32 token) {
    u32 bits = __float_as_uint(score);
    bits = bits >> 31 ? ~bits : bits | 0x80000000u;
    return u64(bits) << 24 | (0xffffffu - token);
}
INLINE u32 token_of(u64 rank) { return 0xffffffu - (u32(rank) & 0xffffffu); }
INLINE float score_at(u64 rank) {
    u32 bits = u32(rank >> 24);
    return __uint_as_float(bits >> 31 ? bits & 0x7fffffffu : ~bits);
}

// Returns the first word of Philox 4×32-10. Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, 2011.
INLINE u32 philox(const Row& row, u32 token) {
    u32 a = token, b = row.position, c = 0, d = 0;
    u32 key = row.seed_low, other_key = row.seed_high;
#pragma unroll
    for (int round = 0; round < 10; round++) {
        u64 first = u64(a) * 0xD2511F53u;
        u64 second = u64(c) * 0xCD9E8D57u;
        a = u32(second >> 32) ^ b ^ key;
        b = u32(second);
        c = u32(first >> 32) ^ d ^ other_key;
        d = u32(first);
        key += 0x9E3779B9u;
        other_key += 0xBB67AE85u;
    }
    return a;
}

// Replaces `best` if a token's score plus Gumbel noise −ln(−ln u), with u uniform in (0, 1), is better.
//
// Most tokens are rejected early. The noise is below 17.4. To reach the value t of the best so far,
// −ln(−ln u) ≥ t − score requires u ≥ e^−e^(score − t), so 1 − u ≤ e^(score − t).
// The margin is far larger than the rounding errors of either side.
INLINE void draw(Candidate& best, const Row& row, float score, u32 token) {
    if (!(score >= row.floor) || score + 17.4f < best.value) return;
    u32 random = philox(row, token) >> 8;
    float rest = (float(0xffffffu - random) + 0.5f) * 0x1p-24f;
    if (rest > __expf(score - best.value) * 1.001f) return;
    double uniform = (double(random) + 0.5) * 0x1p-24;
    float noise = float(-log(-log(uniform)));
    take_better(best, __fadd_rn(score, noise), token);
}
// Initial candidate. A token with score 0 is always better: its noise is at least −ln(−ln 2⁻²⁵) = −2.852.
constexpr Candidate NOTHING_DRAWN = {-2.86f, NONE};

// Computes {max, sum of e^(logit − max)} of each slice. Grid (slices, rows), 256 threads.
KERNEL(256) sample_sums(float2* sums, const float* logits, const Row* rows, u32 columns) {
    wait_for_kernels_before();
    __shared__ float scratch[32];
    if (rows[blockIdx.y].logprobs == NONE) return;
    logits += u64(blockIdx.y) * columns;
    u32 first = blockIdx.x * SLICE + threadIdx.x;
    float x[PER_THREAD];
    float max = NEVER;
#pragma unroll
    for (u32 i = 0; i < PER_THREAD; i++) {
        u32 token = first + i * SLICE_THREADS;
        x[i] = token < columns ? logits[token] : NEVER;
        max = fmaxf(max, x[i]);
    }
    max = warp_max(max);
    if (lane_id() == 0) scratch[warp_id()] = max;
    __syncthreads();
    max = warp_max(lane_id() < SLICE_THREADS / 32 ? scratch[lane_id()] : NEVER);
    float sum = 0.0f;
#pragma unroll
    for (u32 i = 0; i < PER_THREAD; i++) {
        float weight = expf(x[i] - max);
        if (weight == weight) sum += weight;
    }
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) sums[u64(blockIdx.y) * gridDim.x + blockIdx.x] = make_float2(max, sum);
}

// The scores above `below` that are at most `up_to`.
struct Range {
    float below, up_to;

    INLINE bool holds(float score) const { return score > below && score <= up_to; }
};

// The source of a row's ranks: a list of them, or its logits.
struct Ranks {
    const u64* list;  // null: ranks of the logits
    Logits logits;
    float largest, inverse;
    const Range* range;  // which scores count; null: all, −∞ included
    u32 count;

    INLINE u64 at(u32 i) const {
        if (list) return list[i];
        float score = score_of(logits[i], largest, inverse);
        bool counts = range == nullptr ? score == score : range->holds(score);
        return counts ? rank_of(score, i) : 0;
    }
};

// Number and mass of a row's tokens.
struct Amount {
    u32 count;
    u64 mass;
};

// Returns the sum over the lanes up to the caller's. Without WITH_MASS, only counts are added up.
template <bool WITH_MASS>
INLINE Amount sum_up_to_lane(Amount sum) {
#pragma unroll
    for (u32 offset = 1; offset < 32; offset <<= 1) {
        u32 count = __shfl_up_sync(FULL_WARP, sum.count, offset);
        if (lane_id() >= offset) sum.count += count;
        if (WITH_MASS) {
            u64 mass = __shfl_up_sync(FULL_WARP, sum.mass, offset);
            if (lane_id() >= offset) sum.mass += mass;
        }
    }
    return sum;
}

// A 64-bit addition to shared memory is a retry loop, so masses, of at most 2³⁶, are added in parts of
// DIGIT_PART_BITS. A part's sum over fewer than 2²⁰ tokens fits into 32 bits.
constexpr u32 DIGIT_PARTS = 3, DIGIT_PART_BITS = 12;

struct SelectScratch {
    u32 masses[DIGIT_PARTS][256];
    u32 counts[256];
    Amount above;  // of what is above the ranks that are searched
    u64 mass;
    u32 digit;
    u32 done;

    INLINE u64 mass_at(u32 digit) const {
        u64 mass = 0;
#pragma unroll
        for (u32 part = 0; part < DIGIT_PARTS; part++) mass += u64(masses[part][digit]) << (DIGIT_PART_BITS * part);
        return mass;
    }
};

// Returns the lower bound of the highest ranks that, with `scratch.above`, number `need` or, with BY_MASS, of
// the fewest highest ranks that, with `scratch.above`, have a mass of at least `target`; `lowest` if all
// ranks from `lowest` on are not enough. Finds the bound digit by digit, the highest first. For a
// block of at least 256 threads, after thread 0 has written `scratch.above`.
template <bool BY_MASS>
INLINE u64 select(const Ranks& ranks, u64 lowest, u32 need, double target, SelectScratch& scratch) {
    u64 prefix = 0;
#pragma unroll 1
    for (int shift = 48; shift >= 0; shift -= 8) {
        if (threadIdx.x < 256) {
            scratch.counts[threadIdx.x] = 0;
            if (BY_MASS) {
#pragma unroll
                for (u32 part = 0; part < DIGIT_PARTS; part++) scratch.masses[part][threadIdx.x] = 0;
            }
        }
        if (threadIdx.x == 0) scratch.done = 2;
        __syncthreads();
        for (u32 i = threadIdx.x; i < ranks.count; i += blockDim.x) {
            u64 rank = ranks.at(i);
            if (rank >= lowest && (rank ^ prefix) >> (shift + 8) == 0) {
                u32 digit = u32(rank >> shift) & 255;
                atomicAdd(&scratch.counts[digit], 1);
                if (BY_MASS) {
                    u64 mass = mass_of(score_at(rank));
#pragma unroll
                    for (u32 part = 0; part < DIGIT_PARTS; part++) {
                        u32 own = u32(mass >> (DIGIT_PART_BITS * part));
                        if (part + 1 < DIGIT_PARTS) own &= (1u << DIGIT_PART_BITS) - 1;
                        if (own != 0) atomicAdd(&scratch.masses[part][digit], own);
                    }
                }
            }
        }
        __syncthreads();
        // Lane i of the first warp handles the digits 255 − 8i … 248 − 8i.
        if (warp_id() == 0) {
            u32 top = 255 - 8 * lane_id();
            Amount own = {0, 0};
#pragma unroll
            for (u32 i = 0; i < 8; i++) {
                own.count += scratch.counts[top - i];
                if (BY_MASS) own.mass += scratch.mass_at(top - i);
            }
            const Amount up_to = sum_up_to_lane<BY_MASS>(own);
            Amount above = {scratch.above.count + up_to.count - own.count, scratch.above.mass + up_to.mass - own.mass};
            bool before = BY_MASS ? double(above.mass) >= target : above.count >= need;
            // One lane writes what all have read.
            __syncwarp();
#pragma unroll
            for (u32 i = 0; i < 8; i++) {
                u32 here = scratch.counts[top - i];
                u64 here_mass = BY_MASS ? scratch.mass_at(top - i) : 0;
                bool reached = BY_MASS ? double(above.mass + here_mass) >= target : above.count + here >= need;
                // True for at most one digit of one lane.
                if (reached && !before) {
                    scratch.digit = top - i;
                    scratch.above = above;
                    scratch.done = BY_MASS ? here == 1 : above.count + here == need;
                }
                before = reached;
                above.count += here;
                above.mass += here_mass;
            }
        }
        __syncthreads();
        u32 done = scratch.done;
        if (done == 2) return lowest;
        prefix |= u64(scratch.digit) << shift;
        if (done) break;
        __syncthreads();
    }
    // The digits that were not examined are zeros.
    return prefix > lowest ? prefix : lowest;
}

// Reports the likeliest tokens by the unmodified logits, likeliest first, and the log of the sum of the
// exponentials of all logits. A row of `result` has 4 + 2 · top_stride words: the token, its
// log-probability, the number of tokens that follow, and the log of the sum; then ids with
// log-probabilities. Grid (rows), 1024 threads.
KERNEL(1024) sample_top(u32* result, const float* logits, const float2* sums, const Row* rows, u32 columns, u32 slices,
                        u32 top_stride) {
    wait_for_kernels_before();
    __shared__ SelectScratch scratch;
    __shared__ u64 sorted[MAX_TOP];
    __shared__ u32 length;
    __shared__ float shared_log_sum;
    u32 wanted = min(rows[blockIdx.x].logprobs, columns);
    if (rows[blockIdx.x].logprobs == NONE) return;
    logits += u64(blockIdx.x) * columns;
    result += u64(blockIdx.x) * (4 + 2 * top_stride);
    if (warp_id() == 0) {
        sums += u64(blockIdx.x) * slices;
        float max = NEVER;
        for (u32 i = lane_id(); i < slices; i += 32) max = fmaxf(max, sums[i].x);
        max = warp_max(max);
        float sum = 0.0f;
        for (u32 i = lane_id(); i < slices; i += 32) {
            float2 slice = sums[i];
            // Avoids 0 · NaN for a slice, or a row, without a finite logit.
            if (slice.y > 0.0f) sum += slice.y * expf(slice.x - max);
        }
        sum = warp_sum(sum);
        if (lane_id() == 0) {
            shared_log_sum = max + logf(sum);
            result[3] = __float_as_uint(shared_log_sum);
            if (wanted == 0) result[2] = 0;
        }
    }
    if (wanted == 0) return;
    sorted[threadIdx.x] = 0;
    if (threadIdx.x == 0) length = 0;
    Ranks ranks = {nullptr, Logits(logits), 0.0f, 1.0f, nullptr, columns};
    if (threadIdx.x == 0) scratch.above = {0, 0};
    u64 lowest = select<false>(ranks, 1, wanted, 0.0, scratch);
    __syncthreads();
    for (u32 i = threadIdx.x; i < columns; i += blockDim.x) {
        u64 rank = ranks.at(i);
        if (rank >= lowest) {
            u32 place = atomicAdd(&length, 1);
            if (place < MAX_TOP) sorted[place] = rank;
        }
    }
    __syncthreads();
    u32 found = length;
    // Bitonic sort, descending.
    for (u32 size = 2; size < 2 * found; size <<= 1) {
        for (u32 stride = size >> 1; stride > 0; stride >>= 1) {
            u32 other = threadIdx.x ^ stride;
            if (other > threadIdx.x) {
                u64 mine = sorted[threadIdx.x], theirs = sorted[other];
                bool descending = (threadIdx.x & size) == 0;
                if (descending ? mine < theirs : mine > theirs) {
                    sorted[threadIdx.x] = theirs;
                    sorted[other] = mine;
                }
            }
            __syncthreads();
        }
    }
    if (threadIdx.x < found) {
        u32 token = token_of(sorted[threadIdx.x]);
        result[4 + 2 * threadIdx.x] = token;
        result[5 + 2 * threadIdx.x] = __float_as_uint(logits[token] - shared_log_sum);
    }
    if (threadIdx.x == 0) result[2] = found;
}

INLINE float penalised(float logit, const Row& row, u32 generated) {
    logit = logit > 0.0f ? __fdiv_rn(logit, row.repetition) : __fmul_rn(logit, row.repetition);
    if (generated > 0) logit = __fsub_rn(logit, __fadd_rn(row.presence, __fmul_rn(row.frequency, float(generated))));
    return logit;
}

// Applies penalties and biases to the logits, and saves their previous values in `saved`, entry by entry.
// The token that was fed back in this step counts as generated once more; if the history lacks it,
// it becomes the spare entry. Grid (rows), 256 threads.
KERNEL(256) sample_edit(float* logits, float* saved, uint2* entries, const Row* rows, const u32* feedback,
                   const u32* resolved, const u32* sample_rows, u32 columns) {
    wait_for_kernels_before();
    __shared__ u32 known;
    const Row& row = rows[blockIdx.x];
    u32 count = row.history_count;
    logits += u64(blockIdx.x) * columns;
    uint2* history = entries + row.history_start;
    float* saved_history = saved + row.history_start;
    u32 fed = NONE;
    if (row.history_start != NONE) {
        u32 input = sample_rows[blockIdx.x];
        if (feedback[input] != NONE) fed = resolved[input];
    }
    if (threadIdx.x == 0) known = 0;
    __syncthreads();
    for (u32 i = threadIdx.x; i < count; i += blockDim.x) {
        uint2 entry = history[i];
        if (entry.x >= columns) continue;
        float logit = logits[entry.x];
        saved_history[i] = logit;
        if (entry.x == fed) known = 1;
        logits[entry.x] = penalised(logit, row, entry.y + (entry.x == fed ? 1 : 0));
    }
    __syncthreads();
    if (threadIdx.x == 0 && fed < columns && !known) {
        float logit = logits[fed];
        saved_history[count] = logit;
        history[count] = make_uint2(fed, 1);
        logits[fed] = penalised(logit, row, 1);
    }
    __syncthreads();
    const uint2* biases = entries + row.bias_start;
    for (u32 i = threadIdx.x; i < row.bias_count; i += blockDim.x) {
        u32 token = biases[i].x;
        if (token >= columns || (i > 0 && biases[i - 1].x == token)) continue;
        float logit = logits[token];
        saved[row.bias_start + i] = logit;
        for (u32 j = i; j < row.bias_count && biases[j].x == token; j++)
            logit = __fadd_rn(logit, __uint_as_float(biases[j].y));
        logits[token] = logit;
    }
}

// Finds the largest logit of each slice, and resets the counters of rows with top-k or top-p.
// Grid (slices, rows), 256 threads.
KERNEL(256) sample_best(uint2* best, u32* counts, u64* masses, Filter* filters, const float* logits, const Row* rows,
                   u32 columns) {
    wait_for_kernels_before();
    if (blockIdx.x == 0 && is_filtered(rows[blockIdx.y])) {
        for (u32 i = threadIdx.x; i < BINS; i += SLICE_THREADS) {
            counts[blockIdx.y * BINS + i] = 0;
            masses[blockIdx.y * BINS + i] = 0;
        }
        if (threadIdx.x == 0) filters[blockIdx.y].length = 0;
    }
    __shared__ u32 broken;
    if (threadIdx.x == 0) broken = 0;
    __syncthreads();
    Logits own(logits, rows, blockIdx.y, columns);
    u32 first = blockIdx.x * SLICE + threadIdx.x;
    Candidate largest = {NEVER, NONE};
    bool finite = true;
#pragma unroll
    for (u32 i = 0; i < PER_THREAD; i++) {
        u32 token = first + i * SLICE_THREADS;
        if (token >= columns) break;
        float logit = own.values[token];
        finite = finite && is_finite(logit);
        if (own.allows(token) && logit > largest.value) largest = {logit, token};
    }
    count_broken(broken, finite);
    largest = block_best(largest);
    if (threadIdx.x == 0) {
        uint2 result = packed(largest);
        result.y = (result.y & ~NOT_FINITE) | (broken != 0 ? NOT_FINITE : 0);
        best[u64(blockIdx.y) * gridDim.x + blockIdx.x] = result;
    }
}

// A score's bin is ⌊−16 · score⌋, at most the last one. `carried_bin_of` returns it in the lowest bits of
// the float 2²³, whose bits BIN_CARRIER the caller must subtract.
constexpr u32 BIN_CARRIER = 0x4b000000u;
INLINE u32 carried_bin_of(float score) {
    return __float_as_uint(__fmaf_rz(fmaxf(score, LOWEST_SCORE), -16.0f, __uint_as_float(BIN_CARRIER)));
}

// Adds to a word of shared memory.
INLINE void add_shared(u32 address, u32 value) {
    asm volatile("red.shared.add.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

// Calls `visit(logit, token)` for each token of the block's slice, in all threads of a warp together. The
// logit is −∞ beyond the end of the row, and for tokens that the mask forbids.
template <class Visit>
INLINE void visit_slice(const Logits& logits, u32 columns, Visit visit) {
    constexpr u32 AT_ONCE = 4;
    const u32 first = blockIdx.x * SLICE + threadIdx.x;
    if (logits.mask == nullptr && (blockIdx.x + 1) * SLICE <= columns) {
        const float* values = logits.values + first;
#pragma unroll 1
        for (u32 i = 0; i < SLICE; i += AT_ONCE * SLICE_THREADS) {
            float some[AT_ONCE];
#pragma unroll
            for (u32 j = 0; j < AT_ONCE; j++) some[j] = values[i + j * SLICE_THREADS];
#pragma unroll
            for (u32 j = 0; j < AT_ONCE; j++) visit(some[j], first + i + j * SLICE_THREADS);
        }
        return;
    }
#pragma unroll 1
    for (u32 i = 0; i < SLICE; i += SLICE_THREADS) {
        const u32 token = first + i;
        visit(token < columns ? logits[token] : NEVER, token);
    }
}

// Counts the tokens of each bin and, for top-p, adds up their masses. Grid (slices, rows), 256 threads.
//
// A 64-bit addition to shared memory is a retry loop, so masses are added in two parts, of 20 and of
// up to 17 bits. The sum of a slice's 4096 parts fits into 32 bits. Most tokens are so unlikely that
// their upper part is zero.
KERNEL(256) sample_histogram(u32* counts, u64* masses, const float* logits, const uint2* best, const Row* rows, u32 columns) {
    wait_for_kernels_before();
    constexpr u32 PART_BITS = 20, PART = (1u << PART_BITS) - 1;
    // Counts, and the lower and upper parts of the masses.
    __shared__ u32 own[3][BINS];
    const Row& row = rows[blockIdx.y];
    if (!is_filtered(row)) return;
    float largest = best_of(best + u64(blockIdx.y) * gridDim.x, gridDim.x).value;
    if (!is_finite(largest)) return;
    for (u32 i = threadIdx.x; i < BINS; i += SLICE_THREADS) {
#pragma unroll
        for (u32 part = 0; part < 3; part++) own[part][i] = 0;
    }
    __syncthreads();
    float inverse = row.inverse_temperature;
    bool weigh = row.top_p < 1.0f;
    Logits row_logits(logits, rows, blockIdx.y, columns);
    // Address of the first count minus the contribution of BIN_CARRIER; kept in a register.
    u32 first_place = shared_address(own) - BIN_CARRIER * 4;
    asm volatile("" : "+r"(first_place));
    // Tokens that cannot be chosen are first counted in the last bin, which takes no branch.
    u32 impossible = 0;
    auto count = [&](float logit, bool weighs) {
        float score = score_of(logit, largest, inverse);
        u32 place = first_place + carried_bin_of(score) * 4;
        add_shared(place, 1);
        if (!(score > NEVER)) impossible++;
        if (!weighs) return;
        float scaled = scaled_weight(score);
        u32 low = __float2uint_rn(scaled);
        if (scaled >= float(PART / 2)) {
            u64 mass = __float2ull_rn(scaled);
            low = u32(mass) & PART;
            add_shared(place + 8 * BINS, u32(mass >> PART_BITS));
        }
        add_shared(place + 4 * BINS, low);
    };
    if (weigh) {
        visit_slice(row_logits, columns, [&](float logit, u32) { count(logit, true); });
    } else {
        visit_slice(row_logits, columns, [&](float logit, u32) { count(logit, false); });
    }
    if (impossible != 0) atomicSub(&own[0][BINS - 1], impossible);
    __syncthreads();
    for (u32 i = threadIdx.x; i < BINS; i += SLICE_THREADS) {
        if (own[0][i] == 0) continue;
        atomicAdd(&counts[blockIdx.y * BINS + i], own[0][i]);
        u64 mass = own[1][i] + (u64(own[2][i]) << PART_BITS);
        if (weigh) atomicAdd(&masses[blockIdx.y * BINS + i], mass);
    }
}

INLINE bool limits_count(const Row& row, u32 tokens) { return row.top_k != 0 && row.top_k < tokens; }

// The scores in the bins up to `bin` are those above this. NONE stands for all bins.
INLINE float below_bin(u32 bin) { return bin < BINS - 1 ? float(bin + 1) * (-1.0f / 16.0f) : NEVER; }
// The scores in the bins from `bin` on are at most this.
INLINE float top_of_bin(u32 bin) { return bin > 0 ? below_bin(bin - 1) : INFINITE; }

// Where a limit falls in a row's histogram.
struct Cut {
    u32 bin;       // the first bin with which there is enough; NONE if there never is
    u32 tokens;    // number of tokens in that bin
    Amount above;  // of the bins before it
};

// A row's histogram, divided among the lanes of a warp.
struct Histogram {
    static constexpr u32 LANE_BINS = BINS / 32;
    // Of the lane's bins.
    const u32* counts;
    const u64* masses;
    // Of the bins before the lane's, and of all bins.
    Amount before, all;

    INLINE Histogram(const u32* row_counts, const u64* row_masses)
        : counts(row_counts + lane_id() * LANE_BINS), masses(row_masses + lane_id() * LANE_BINS) {
        Amount own = {0, 0};
        for (u32 i = 0; i < LANE_BINS; i++) {
            own.count += counts[i];
            own.mass += masses[i];
        }
        const Amount up_to = sum_up_to_lane<true>(own);
        before = {up_to.count - own.count, up_to.mass - own.mass};
        all = {__shfl_sync(FULL_WARP, up_to.count, 31), __shfl_sync(FULL_WARP, up_to.mass, 31)};
    }

    // Finds where the highest scores number `need` or, with `by_mass`, have a mass of at least `target`.
    // Every lane gets the same.
    INLINE Cut cut(bool by_mass, u32 need, double target) const {
        Cut found = {NONE, 0, all};
        Amount up_to = before;
        for (u32 i = 0; i < LANE_BINS && found.bin == NONE; i++) {
            Amount above = up_to;
            up_to.count += counts[i];
            up_to.mass += masses[i];
            bool enough = by_mass ? double(up_to.mass) >= target : up_to.count >= need;
            if (enough) found = {lane_id() * LANE_BINS + i, counts[i], above};
        }
        u32 lanes = __ballot_sync(FULL_WARP, found.bin != NONE);
        int first = lanes != 0 ? __ffs(lanes) - 1 : 0;
        return {__shfl_sync(FULL_WARP, found.bin, first),
                __shfl_sync(FULL_WARP, found.tokens, first),
                {__shfl_sync(FULL_WARP, found.above.count, first), __shfl_sync(FULL_WARP, found.above.mass, first)}};
    }
};

// Lists the ranks of the tokens that may be kept, in any order: those in the bins up to the one in which
// top-k or, without it, top-p falls. Of a long row, lists only those in that bin, unless it alone has more
// than LIST. Grid (slices, rows), 256 threads.
KERNEL(256, 2) sample_compact(u64* lists, Filter* filters, const u32* counts, const u64* masses, const float* logits,
                      const uint2* best, const Row* rows, u32 columns) {
    wait_for_kernels_before();
    __shared__ Range wanted_range;
    const Row& row = rows[blockIdx.y];
    if (!is_filtered(row)) return;
    float largest = best_of(best + u64(blockIdx.y) * gridDim.x, gridDim.x).value;
    if (!is_finite(largest)) return;
    Filter& filter = filters[blockIdx.y];
    if (warp_id() == 0) {
        const Histogram histogram(counts + blockIdx.y * BINS, masses + blockIdx.y * BINS);
        const Amount all = histogram.all;
        bool by_count = limits_count(row, all.count);
        Cut cut = {NONE, 0, all};
        if (by_count || row.top_p < 1.0f)
            cut = histogram.cut(!by_count, row.top_k, double(row.top_p) * double(all.mass));
        u32 listed = cut.above.count + cut.tokens;
        if (lane_id() == 0) {
            wanted_range = {below_bin(cut.bin), INFINITE};
            if (listed > LIST) wanted_range.up_to = cut.tokens <= LIST ? top_of_bin(cut.bin) : NEVER;
            if (blockIdx.x == 0) {
                filter.mass = all.mass;
                filter.tokens = all.count;
                filter.listed = listed;
            }
        }
    }
    __syncthreads();
    const Range range = wanted_range;
    if (!(range.below < range.up_to)) return;
    float inverse = row.inverse_temperature;
    Logits own(logits, rows, blockIdx.y, columns);
    lists += u64(blockIdx.y) * LIST;
    visit_slice(own, columns, [&](float logit, u32 token) {
        float score = score_of(logit, largest, inverse);
        bool wanted = range.holds(score);
        u32 ballot = __ballot_sync(FULL_WARP, wanted);
        if (ballot == 0) return;
        u32 start = 0;
        if (lane_id() == 0) start = atomicAdd(&filter.length, __popc(ballot));
        start = __shfl_sync(FULL_WARP, start, 0);
        if (wanted) lists[start + __popc(ballot & ((1u << lane_id()) - 1))] = rank_of(score, token);
    });
}

// Applies top-k and top-p exactly. Then applies min-p and draws a token, except for long rows. Grid (rows),
// 512 threads, since more would have too few registers.
KERNEL(512, 1) sample_filter(uint2* winners, const u64* lists, Filter* filters, const u32* counts, const u64* masses,
                             const float* logits, const uint2* best, const Row* rows, u32 columns, u32 slices) {
    wait_for_kernels_before();
    __shared__ SelectScratch scratch;
    __shared__ Cut cut;
    __shared__ Range range;
    __shared__ u32 first_bin;
    const Row& row = rows[blockIdx.x];
    if (!is_filtered(row)) return;
    float largest = best_of(best + u64(blockIdx.x) * slices, slices).value;
    if (!is_finite(largest)) return;
    Filter& filter = filters[blockIdx.x];
    const u64* list = lists + u64(blockIdx.x) * LIST;
    const bool is_long = filter.is_long(), by_count = limits_count(row, filter.tokens);
    Ranks ranks = {list, Logits(logits, rows, blockIdx.x, columns), largest, row.inverse_temperature, &range, filter.listed};
    if (threadIdx.x == 0) first_bin = NONE;
    // Begins a search. In a long row, restricts the ranks to the bin in which the limit falls, since all
    // before it are kept.
    auto begin = [&](bool by_mass, double target) {
        __syncthreads();
        if (warp_id() == 0) {
            Cut found = {NONE, 0, {0, 0}};
            if (is_long)
                found = Histogram(counts + blockIdx.x * BINS, masses + blockIdx.x * BINS).cut(by_mass, row.top_k, target);
            if (lane_id() == 0) {
                cut = found;
                range = {below_bin(found.bin), top_of_bin(found.bin)};
                if (first_bin == NONE) first_bin = found.bin;
                scratch.above = found.above;
            }
        }
        __syncthreads();
        if (!is_long) return;
        const bool is_listed = cut.bin == first_bin && cut.tokens <= LIST;
        ranks.list = is_listed ? list : nullptr;
        ranks.count = is_listed ? cut.tokens : columns;
    };
    u64 lowest = 1;
    if (by_count) {
        begin(false, 0.0);
        lowest = select<false>(ranks, lowest, row.top_k, 0.0, scratch);
        __syncthreads();
        if (row.top_p < 1.0f) {
            if (threadIdx.x == 0) scratch.mass = cut.above.mass;
            __syncthreads();
            u64 own = 0;
            for (u32 i = threadIdx.x; i < ranks.count; i += blockDim.x) {
                u64 rank = ranks.at(i);
                if (rank >= lowest) own += mass_of(score_at(rank));
            }
            if (own) atomicAdd(&scratch.mass, own);
            __syncthreads();
        }
    }
    if (row.top_p < 1.0f) {
        const double target = double(row.top_p) * double(by_count ? scratch.mass : filter.mass);
        begin(true, target);
        lowest = select<true>(ranks, lowest, 0, target, scratch);
    }
    if (is_long) {
        if (threadIdx.x == 0) filter.lowest = lowest;
        return;
    }
    Candidate winner = NOTHING_DRAWN;
#pragma unroll 1
    for (u32 i = threadIdx.x; i < ranks.count; i += blockDim.x) {
        u64 rank = list[i];
        if (rank >= lowest) draw(winner, row, score_at(rank), token_of(rank));
    }
    winner = block_best(winner);
    if (threadIdx.x == 0) winners[u64(blockIdx.x) * slices] = packed(winner);
}

// Draws among all tokens of each slice or, in long rows, among those that are kept. Grid (slices, rows), 256 threads.
KERNEL(256) sample_draw(uint2* winners, const Filter* filters, const float* logits, const uint2* best, const Row* rows,
                        u32 columns) {
    wait_for_kernels_before();
    Row row = rows[blockIdx.y];
    if (row.inverse_temperature == 0.0f) return;
    float largest = best_of(best + u64(blockIdx.y) * gridDim.x, gridDim.x).value;
    if (!is_finite(largest)) return;
    // Ranks from this on are kept; 0 for all.
    u64 lowest = 0;
    if (is_filtered(row)) {
        if (!filters[blockIdx.y].is_long()) return;
        lowest = filters[blockIdx.y].lowest;
    }
    Logits own(logits, rows, blockIdx.y, columns);
    u32 token = blockIdx.x * SLICE + threadIdx.x;
    u32 end = min(columns, (blockIdx.x + 1) * SLICE);
    Candidate winner = NOTHING_DRAWN;
    float logit = token < end ? own[token] : NEVER;
#pragma unroll 1
    for (; token < end; token += SLICE_THREADS) {
        // The next logit is loaded in the meantime.
        u32 next = token + SLICE_THREADS;
        float next_logit = next < end ? own[next] : NEVER;
        float score = score_of(logit, largest, row.inverse_temperature);
        if (lowest == 0 || rank_of(score, token) >= lowest) draw(winner, row, score, token);
        logit = next_logit;
    }
    winner = block_best(winner);
    if (threadIdx.x == 0) winners[u64(blockIdx.y) * gridDim.x + blockIdx.x] = packed(winner);
}

// Writes the tokens, for the next step and for the host (rows of `result` as in sample_top), and
// restores the logits that sample_edit changed. Grid (rows), 256 threads.
KERNEL(256) sample_finish(u32* sampled, u32* result, float* logits, const float* saved, const uint2* entries,
                     const uint2* best, const uint2* winners, const Filter* filters, const Row* rows, u32 columns,
                     u32 slices, u32 top_stride) {
    wait_for_kernels_before();
    __shared__ u32 broken;
    const Row& row = rows[blockIdx.x];
    logits += u64(blockIdx.x) * columns;
    best += u64(blockIdx.x) * slices;
    result += u64(blockIdx.x) * (4 + 2 * top_stride);
    if (threadIdx.x == 0) broken = 0;
    for (u32 i = threadIdx.x; i < row.bias_count; i += blockDim.x) {
        u32 token = entries[row.bias_start + i].x;
        bool again = i > 0 && entries[row.bias_start + i - 1].x == token;
        if (token < columns && !again) logits[token] = saved[row.bias_start + i];
    }
    __syncthreads();
    u32 history = row.history_start == NONE ? 0 : row.history_count + 1;
    for (u32 i = threadIdx.x; i < history; i += blockDim.x) {
        u32 token = entries[row.history_start + i].x;
        if (token < columns) logits[token] = saved[row.history_start + i];
    }
    __syncthreads();
    // Every warp checks all slices and comes to the same answer.
    u32 marks = 0;
    for (u32 i = lane_id(); i < slices; i += 32) marks |= best[i].y & NOT_FINITE;
    if (__ballot_sync(FULL_WARP, marks != 0) != 0) {
        bool finite = true;
        for (u32 i = threadIdx.x; i < columns; i += blockDim.x) finite = finite && is_finite(logits[i]);
        count_broken(broken, finite);
        __syncthreads();
    }
    if (warp_id() != 0) return;
    Candidate chosen = best_of(best, slices);
    if (row.inverse_temperature != 0.0f && is_finite(chosen.value))
        chosen = best_of(winners + u64(blockIdx.x) * slices,
                         is_filtered(row) && !filters[blockIdx.x].is_long() ? 1 : slices);
    if (lane_id() != 0) return;
    // If no token can be chosen, the token is 0.
    u32 token = chosen.token < columns ? chosen.token : 0;
    if (row.forced < columns) token = row.forced;
    sampled[blockIdx.x] = token;
    result[0] = token | (broken != 0 ? NOT_FINITE : 0);
    if (row.logprobs != NONE) result[1] = __float_as_uint(logits[token] - __uint_as_float(result[3]));
}
