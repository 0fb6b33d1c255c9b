// Mixture-of-experts layers except for their matrix products: routes rows to experts, groups the rows
// of each expert, and sums the results of the experts.
//
// A pair is a row and one of its experts. Pair `row · top_k + i` belongs to the i-th of the row's experts
// in ascending order of their indices.
#include "common.cuh"

constexpr u32 MAX_EXPERTS = 512;

// The lowest rank of an expert that can be chosen, and the rank of an expert that cannot.
constexpr float LEAST = -3.402823466e38f;
INLINE float never() { return __int_as_float(0xff800000); }

// Raises NaN and −∞ to LEAST: such an expert can still be chosen, and ranks before excluded experts.
INLINE float rank_of(float x) { return x > LEAST ? x : LEAST; }

INLINE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// Returns how many of `count` numbers precede number `index` in descending order; of equal numbers, the
// one with the lower index comes first.
INLINE u32 place_of(const float* numbers, u32 count, u32 index) {
    const float own = numbers[index];
    u32 before = 0;
#pragma unroll 1
    for (u32 i = 0; i < count; i++) before += numbers[i] > own || (numbers[i] == own && i < index);
    return before;
}

// Excludes all experts except those of the `top_groups` groups with the largest `group_rank`. Lane i
// passes the rank of group i of `groups`, of which there are at most 32.
INLINE void keep_groups(float* ranks, float group_rank, u32 experts, u32 groups, u32 top_groups) {
    __shared__ float group_ranks[32];
    const u32 lane = lane_id(), size = experts / groups;
    group_ranks[lane] = group_rank;
    __syncwarp();
    if (lane < groups && place_of(group_ranks, groups, lane) >= top_groups) {
#pragma unroll 1
        for (u32 i = 0; i < size; i++) ranks[lane * size + i] = never();
    }
    __syncwarp();
}

// Returns to lane k, for k below `top_k` ≤ 32, the expert with the k-th largest rank (ties: the lower index),
// and excludes the chosen experts from `ranks`. Each lane accesses only its own experts, lane + 32 i.
INLINE u32 choose(float* ranks, u32 experts, u32 top_k) {
    const u32 lane = lane_id();
    u32 own = NONE;
#pragma unroll 1
    for (u32 k = 0; k < top_k; k++) {
        float best = never();
        u32 expert = NONE;
        for (u32 i = lane; i < experts; i += 32) {
            if (ranks[i] > best) best = ranks[i], expert = i;
        }
#pragma unroll
        for (int offset = 16; offset > 0; offset >>= 1) {
            const float other = __shfl_xor_sync(FULL_WARP, best, offset);
            const u32 other_expert = __shfl_xor_sync(FULL_WARP, expert, offset);
            if (other > best || (other == best && other_expert < expert)) best = other, expert = other_expert;
        }
        if (k == lane) own = expert;
        if (expert % 32 == lane) ranks[expert] = never();
    }
    return own;
}

// Returns the position of a lane's expert among those chosen for the row, in ascending order of indices.
INLINE u32 place_by_index(u32 expert, u32 top_k) {
    u32 place = 0;
    for (u32 k = 0; k < top_k; k++) place += __shfl_sync(FULL_WARP, expert, k) < expert;
    return place;
}

// Returns the sum of `x` over the first `top_k` lanes, added in the order of the lanes.
INLINE float sum_in_order(float x, u32 top_k) {
    float sum = 0.0f;
    for (u32 k = 0; k < top_k; k++) sum += __shfl_sync(FULL_WARP, x, k);
    return sum;
}

// Chooses the `top_k` experts with the largest softmax of a row's logits (ties: the lower index). Their
// weights are the softmax, divided by their sum if `normalize`, times `scale`. With several groups of
// experts, at most 32, only experts of the `top_groups` groups with the best single experts take part.
// One warp per row. The order of all sums is fixed.
KERNEL(32) route(u32* pair_expert, float* pair_weight, const float* router, u32 rows, u32 experts, u32 top_k,
             u32 normalize, float scale, u32 groups, u32 top_groups) {
    wait_for_kernels_before();
    __shared__ float ranks[MAX_EXPERTS];
    u32 row = blockIdx.x, lane = lane_id();
    if (row >= rows) return;
    router += (u64)row * experts;

    float largest = never();
    for (u32 i = lane; i < experts; i += 32) largest = fmaxf(largest, router[i]);
    largest = warp_max(largest);
    float total = 0.0f;
    for (u32 i = lane; i < experts; i += 32) {
        float weight = expf(router[i] - largest);
        ranks[i] = rank_of(weight);
        total += weight;
    }
    total = warp_sum(total);

    if (groups > 1) {
        const u32 size = experts / groups;
        __syncwarp();
        float best = LEAST;
#pragma unroll 1
        for (u32 i = 0; i < size && lane < groups; i++) best = fmaxf(best, ranks[lane * size + i]);
        keep_groups(ranks, best, experts, groups, top_groups);
    }

    const u32 expert = choose(ranks, experts, top_k);
    const float weight = lane < top_k ? expf(router[expert] - largest) : 0.0f;
    // With a logit that is NaN or infinite, the total is NaN, and so are all weights: a faulty row must show.
    const float divisor = normalize && total == total ? sum_in_order(weight, top_k) : total;
    const u32 place = place_by_index(expert, top_k);
    if (lane < top_k) {
        pair_expert[row * top_k + place] = expert;
        pair_weight[row * top_k + place] = weight / divisor * scale;
    }
}

// Chooses the `top_k` experts of a row with the largest logits or, with a `bias`, with the largest sum of
// the logit's sigmoid and the bias. Their weights are the sigmoids, divided by their sum if `normalize`,
// times `scale`. If `pair_input` is not null, it gets these weights, and `pair_weight` is 1.
//
// With several groups of experts, at most 32, only experts of the `top_groups` groups with the largest sum
// of their two best ranks take part. One warp per row.
KERNEL(32) route_sigmoid(u32* pair_expert, float* pair_weight, float* pair_input, const float* router, const float* bias,
                         u32 experts, u32 top_k, u32 normalize, float scale, u32 groups, u32 top_groups) {
    wait_for_kernels_before();
    __shared__ float ranks[MAX_EXPERTS];
    const u32 row = blockIdx.x, lane = lane_id();
    router += u64(row) * experts;
#pragma unroll 1
    for (u32 i = lane; i < experts; i += 32) {
        ranks[i] = rank_of(bias != nullptr ? sigmoid(router[i]) + bias[i] : router[i]);
    }
    if (groups > 1) {
        const u32 size = experts / groups;
        __syncwarp();
        float first = LEAST, second = LEAST;
#pragma unroll 1
        for (u32 i = 0; i < size && lane < groups; i++) {
            const float rank = ranks[lane * size + i];
            second = fmaxf(second, fminf(first, rank));
            first = fmaxf(first, rank);
        }
        keep_groups(ranks, first + second, experts, groups, top_groups);
    }

    const u32 expert = choose(ranks, experts, top_k);
    float weight = lane < top_k ? sigmoid(router[expert]) : 0.0f;
    if (normalize) weight /= sum_in_order(weight, top_k) + 1e-20f;
    weight *= scale;
    const u32 place = place_by_index(expert, top_k);
    if (lane < top_k) {
        pair_expert[row * top_k + place] = expert;
        pair_weight[row * top_k + place] = pair_input != nullptr ? 1.0f : weight;
        if (pair_input != nullptr) pair_input[row * top_k + place] = weight;
    }
}

// Returns the rows per tile of each of the tile sizes of the matrix products (linear.cu, linear_quant.cu).
constexpr u32 TILE_SIZES = 4;
INLINE u32 tile_rows(u32 size) { return size == 0 ? 8 : size == 1 ? 16 : size == 2 ? 64 : 128; }

// For at most `MOST` experts: the first slot of each, and its first tile in the list of each tile size.
template <u32 MOST>
struct Starts {
    u32 slots[MOST + 1];
    u32 tiles[TILE_SIZES][MOST + 1];

    // Computes the prefix sums of the experts' slots (warp 0) and of their tiles of each size (a warp each).
    INLINE void add_up(const u32* counts, u32 experts) {
        constexpr u32 LANE_EXPERTS = MOST / 32;
        if (warp_id() > TILE_SIZES) return;
        const u32 rows = warp_id() == 0 ? 1 : tile_rows(warp_id() - 1), lane = lane_id();
        u32* const starts = warp_id() == 0 ? slots : tiles[warp_id() - 1];
        u32 before[LANE_EXPERTS], own = 0;
#pragma unroll
        for (u32 i = 0; i < LANE_EXPERTS; i++) {
            const u32 expert = lane * LANE_EXPERTS + i;
            before[i] = own;
            own += expert < experts ? (counts[expert] + rows - 1) / rows : 0;
        }
        u32 upto = own;
#pragma unroll
        for (u32 distance = 1; distance < 32; distance *= 2) {
            const u32 other = __shfl_up_sync(FULL_WARP, upto, distance);
            if (lane >= distance) upto += other;
        }
#pragma unroll
        for (u32 i = 0; i < LANE_EXPERTS; i++) starts[lane * LANE_EXPERTS + i] = upto - own + before[i];
        // With fewer than MOST experts, the entries of those that do not exist hold the total as well.
        if (lane == 31) starts[MOST] = upto;
    }

    // Writes the list of one tile size, which has room for `places` tiles.
    INLINE void list(uint4* to, u32 size, u32 experts, u32 places) const {
        const u32 rows = tile_rows(size), warps = blockDim.x / 32;
        for (u32 expert = warp_id(); expert < experts; expert += warps) {
            const u32 first = tiles[size][expert], count = tiles[size][expert + 1] - first;
            for (u32 i = lane_id(); i < count; i += 32) {
                to[first + i] = make_uint4(expert, slots[expert] + i * rows, slots[expert + 1], 0);
            }
        }
        for (u32 i = tiles[size][experts] + threadIdx.x; i < places; i += blockDim.x) to[i] = make_uint4(0, 0, 0, 0);
    }
};

// Sorts the pairs by expert, and within an expert by row: the pairs of expert e get the slots after those
// of expert e − 1. `row_index` becomes the row of each slot, and `pair_slot` the slot of each pair. One
// block of `WARPS` warps.
//
// For each tile size, `tiles` gets a list of the tiles that the experts' slots fall into, expert by expert:
// {expert, first slot, end of the expert's slots, 0}. The list of size i has room for places[i] entries,
// first that of the tiles of 8 rows. The caller chooses `places` such that any choice of experts fits;
// unused entries become zeros.
//
// Each warp counts its share of the pairs by expert. Prefix sums turn the counts into the first slot of
// each warp and expert. Then each warp assigns its slots.
template <u32 MOST, u32 WARPS>
INLINE void group(uint4* tiles, u32* row_index, u32* pair_slot, const u32* pair_expert, u32 rows, u32 experts,
                  u32 top_k, const u32 (&places)[TILE_SIZES]) {
    __shared__ u32 next[MOST][WARPS + 1];
    __shared__ u32 totals[MOST];
    __shared__ Starts<MOST> starts;
    u32 lane = lane_id(), warp = warp_id(), pairs = rows * top_k;
    u32 share = (pairs + WARPS * 32 - 1) / (WARPS * 32) * 32;
    u32 begin = min(warp * share, pairs), end = min(begin + share, pairs);

    for (u32 e = lane; e < experts; e += 32) next[e][warp] = 0;
    __syncwarp();
    // The first pass counts, the second one assigns slots.
    for (u32 pass = 0; pass < 2; pass++) {
        for (u32 first = begin; first < end; first += 32) {
            u32 pair = first + lane;
            u32 expert = pair < end ? pair_expert[pair] : NONE;
            // Numbers of pairs of the same expert in lower and in higher lanes.
            u32 same = __match_any_sync(FULL_WARP, expert);
            u32 before = __popc(same & ((1u << lane) - 1)), after = __popc(same >> lane) - 1;
            u32 slot = expert != NONE ? next[expert][warp] + before : 0;
            __syncwarp();
            if (expert != NONE) {
                if (after == 0) next[expert][warp] = slot + 1;
                if (pass == 1) {
                    pair_slot[pair] = slot;
                    row_index[slot] = pair / top_k;
                }
            }
            __syncwarp();
        }
        if (pass == 1) break;
        __syncthreads();
        // One warp per expert: the first slot of each warp, counted from the first slot of the expert.
        for (u32 e = warp; e < experts; e += WARPS) {
            const u32 count = lane < WARPS ? next[e][lane] : 0;
            u32 upto = count;
#pragma unroll
            for (u32 distance = 1; distance < 32; distance *= 2) {
                const u32 other = __shfl_up_sync(FULL_WARP, upto, distance);
                if (lane >= distance) upto += other;
            }
            if (lane < WARPS) next[e][lane] = upto - count;
            if (lane == 31) totals[e] = upto;
        }
        __syncthreads();
        starts.add_up(totals, experts);
        __syncthreads();
        for (u32 e = warp; e < experts && lane < WARPS; e += WARPS) next[e][lane] += starts.slots[e];
#pragma unroll
        for (u32 size = 0; size < TILE_SIZES; size++) {
            starts.list(tiles, size, experts, places[size]);
            tiles += places[size];
        }
        __syncthreads();
    }
}

KERNEL(1024) group_pairs_of256(uint4* tiles, u32* row_index, u32* pair_slot, const u32* pair_expert, u32 rows,
                               u32 experts, u32 top_k, u32 places_8, u32 places_16, u32 places_64, u32 places_128) {
    wait_for_kernels_before();
    group<256, 32>(tiles, row_index, pair_slot, pair_expert, rows, experts, top_k,
                   {places_8, places_16, places_64, places_128});
}

// Uses 16 warps, because the counts of 32 would not fit into shared memory.
KERNEL(512) group_pairs_of512(uint4* tiles, u32* row_index, u32* pair_slot, const u32* pair_expert, u32 rows,
                              u32 experts, u32 top_k, u32 places_8, u32 places_16, u32 places_64, u32 places_128) {
    wait_for_kernels_before();
    group<512, 16>(tiles, row_index, pair_slot, pair_expert, rows, experts, top_k,
                   {places_8, places_16, places_64, places_128});
}

// `out[row] = Σ weight · pair_out[slot]` over the row's experts in ascending order of indices. `scales`,
// if not null, has a factor for the results of each expert. Grid (rows, ceil(columns / 256)).
KERNEL(256) combine_experts(T* out, const T* pair_out, const u32* pair_slot, const float* pair_weight,
                       const u32* pair_expert, const float* scales, u32 rows, u32 columns, u32 top_k) {
    wait_for_kernels_before();
    u32 row = blockIdx.x, column = blockIdx.y * blockDim.x + threadIdx.x;
    if (row >= rows || column >= columns) return;
    float sum = 0.0f;
    for (u32 k = 0; k < top_k; k++) {
        u32 pair = row * top_k + k;
        const float weight = scales != nullptr ? pair_weight[pair] * scales[pair_expert[pair]] : pair_weight[pair];
        sum = fmaf(weight, to_float(pair_out[(u64)pair_slot[pair] * columns + column]), sum);
    }
    out[(u64)row * columns + column] = to_t(sum);
}

// out = activation(gate) · up for each pair. Its gates and ups are those at its slot of `gate_up`, times its
// `pair_input` if that is not null, plus the `bias` of its expert if that is not null. If `pair_slot` is
// null, each row is a pair. With a limit, gates are at most the limit, ups are clamped to ± the limit, and
// the result is gate · sigmoid(slope · gate) · (up + 1). Without one (0), it is gate · sigmoid(slope · gate)
// · up, which is SiLU for a slope of 1. Grid (pairs, ceil(columns / 256)).
KERNEL(256) gate_pairs(T* out, const T* gate_up, const u32* pair_slot, const u32* pair_expert, const float* pair_input,
                       const float* bias, u32 columns, float slope, float limit) {
    wait_for_kernels_before();
    const u32 pair = blockIdx.x, column = blockIdx.y * blockDim.x + threadIdx.x;
    if (column >= columns) return;
    const u64 slot = pair_slot != nullptr ? pair_slot[pair] : pair;
    float x = to_float(gate_up[slot * 2 * columns + column]), up = to_float(gate_up[slot * 2 * columns + columns + column]);
    if (pair_input != nullptr) x *= pair_input[pair], up *= pair_input[pair];
    if (bias != nullptr) {
        bias += u64(pair_expert[pair]) * 2 * columns + column;
        x += bias[0], up += bias[columns];
    }
    if (limit != 0.0f) {
        // NaN stays NaN, unlike with fminf.
        x = x > limit ? limit : x;
        up = (up > limit ? limit : (up < -limit ? -limit : up)) + 1.0f;
    }
    out[slot * columns + column] = to_t(__fdividef(x, 1.0f + __expf(-slope * x)) * up);
}

// Adds the bias of its expert to the result of each pair. Grid (pairs, ceil(columns / 256)).
KERNEL(256) add_pair_bias(T* pair_out, const u32* pair_slot, const u32* pair_expert, const float* bias, u32 columns) {
    wait_for_kernels_before();
    const u32 pair = blockIdx.x, column = blockIdx.y * blockDim.x + threadIdx.x;
    if (column >= columns) return;
    T& to = pair_out[u64(pair_slot[pair]) * columns + column];
    to = to_t(to_float(to) + bias[u64(pair_expert[pair]) * columns + column]);
}
