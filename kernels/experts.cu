// Mixture-of-experts layers beside their matrix products: which experts a row goes to,
// the rows of each expert together, and the sum of the experts' results.
//
// A pair is a row and one of its experts; pair `row · top_k + i` is the row's i-th
// expert by index.
#include "common.cuh"

constexpr u32 MAX_EXPERTS = 256;
constexpr u32 MAX_TOP_K = 32;

INLINE u32 place_of(const float* numbers, u32 count, u32 index);

// Softmax over a row's logits, the `top_k` largest (ties: the lower index), divided by
// their sum if `normalize`, times `scale`. With several groups of experts, only those of the
// `top_groups` groups with the best experts take part. At most 32 groups. One warp a row; the sums
// run in a fixed order.
KERNEL(32) route(u32* pair_expert, float* pair_weight, const float* router, u32 rows, u32 experts, u32 top_k,
             u32 normalize, float scale, u32 groups, u32 top_groups) {
    wait_for_kernels_before();
    __shared__ float weights[MAX_EXPERTS];
    __shared__ float group_ranks[32];
    __shared__ u32 chosen[MAX_TOP_K];
    __shared__ float chosen_weights[MAX_TOP_K];
    u32 row = blockIdx.x, lane = lane_id();
    if (row >= rows) return;
    router += (u64)row * experts;

    float largest = __int_as_float(0xff800000);
    for (u32 i = lane; i < experts; i += 32) largest = fmaxf(largest, router[i]);
    largest = warp_max(largest);
    float total = 0.0f;
    for (u32 i = lane; i < experts; i += 32) {
        float weight = expf(router[i] - largest);
        weights[i] = weight;
        total += weight;
    }
    total = warp_sum(total);

    if (groups > 1) {
        const u32 size = experts / groups;
        __syncwarp();
        float best = -1.0f;
#pragma unroll 1
        for (u32 i = 0; i < size && lane < groups; i++) best = fmaxf(best, weights[lane * size + i]);
        group_ranks[lane] = best;
        __syncwarp();
        if (lane < groups && place_of(group_ranks, groups, lane) >= top_groups) {
#pragma unroll 1
            for (u32 i = 0; i < size; i++) weights[lane * size + i] = -1.0f;
        }
        __syncwarp();
    }

    // A lane looks after its own experts only; a chosen one becomes negative.
    float kept = 0.0f;
    for (u32 k = 0; k < top_k; k++) {
        float best = -1.0f;
        u32 expert = NONE;
        for (u32 i = lane; i < experts; i += 32) {
            float weight = weights[i];
            // NaN is as good as the least: something is chosen in any case.
            if (!(weight < 0.0f) && (expert == NONE || weight > best)) best = weight, expert = i;
        }
#pragma unroll
        for (int offset = 16; offset > 0; offset >>= 1) {
            float other = __shfl_xor_sync(FULL_WARP, best, offset);
            u32 other_expert = __shfl_xor_sync(FULL_WARP, expert, offset);
            bool better = other > best || (!(other < best) && other_expert < expert);
            if (other_expert != NONE && (expert == NONE || better)) best = other, expert = other_expert;
        }
        best = __shfl_sync(FULL_WARP, best, 0);
        expert = __shfl_sync(FULL_WARP, expert, 0);
        kept += best;
        if (expert % 32 == lane) weights[expert] = -1.0f;
        if (lane == 0) chosen[k] = expert, chosen_weights[k] = best;
    }
    __syncwarp();

    if (lane < top_k) {
        u32 expert = chosen[lane], place = 0;
        for (u32 k = 0; k < top_k; k++) place += chosen[k] < expert;
        pair_expert[row * top_k + place] = expert;
        pair_weight[row * top_k + place] = chosen_weights[lane] / (normalize ? kept : total) * scale;
    }
}

INLINE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// How many of `count` numbers are before number `index` when they are sorted, the largest first;
// ties: the lower index.
INLINE u32 place_of(const float* numbers, u32 count, u32 index) {
    const float own = numbers[index];
    u32 before = 0;
#pragma unroll 1
    for (u32 i = 0; i < count; i++) before += numbers[i] > own || (numbers[i] == own && i < index);
    return before;
}

// The `top_k` experts of a row with the largest logits, or with the largest sum of the logit's
// sigmoid and a bias. Their weights are the sigmoids, divided by their sum if `normalize`, times
// `scale`; if there are `pair_input`, these are the weights, and the others are 1.
//
// With several groups of experts, only those of the `top_groups` groups whose two best experts are
// best together take part. At most 32 groups. One warp a row.
KERNEL(32) route_sigmoid(u32* pair_expert, float* pair_weight, float* pair_input, const float* router, const float* bias,
                         u32 experts, u32 top_k, u32 normalize, float scale, u32 groups, u32 top_groups) {
    wait_for_kernels_before();
    constexpr float LEAST = -3.402823466e38f;
    __shared__ float ranks[MAX_EXPERTS];
    __shared__ float group_ranks[32];
    const u32 row = blockIdx.x, lane = lane_id();
    router += u64(row) * experts;
#pragma unroll 1
    for (u32 i = lane; i < experts; i += 32) {
        float rank = router[i];
        if (bias != nullptr) rank = sigmoid(rank) + bias[i];
        // Something is chosen even of what is no number, and before what takes no part.
        ranks[i] = rank > LEAST ? rank : LEAST;
    }
    __syncwarp();
    if (groups > 1) {
        const u32 size = experts / groups;
        float first = LEAST, second = LEAST;
#pragma unroll 1
        for (u32 i = 0; i < size && lane < groups; i++) {
            const float rank = ranks[lane * size + i];
            second = fmaxf(second, fminf(first, rank));
            first = fmaxf(first, rank);
        }
        group_ranks[lane] = first + second;
        __syncwarp();
        if (lane < groups && place_of(group_ranks, groups, lane) >= top_groups) {
#pragma unroll 1
            for (u32 i = 0; i < size; i++) ranks[lane * size + i] = __int_as_float(0xff800000);
        }
        __syncwarp();
    }
    // In two passes over the experts: the sum of the weights, then the pairs.
    float sum = 0.0f;
#pragma unroll 1
    for (u32 pass = 0; pass < 2; pass++) {
        u32 pair = row * top_k;
#pragma unroll 1
        for (u32 first = 0; first < experts; first += 32) {
            const u32 expert = first + lane;
            const bool chosen = expert < experts && place_of(ranks, experts, expert) < top_k;
            float weight = chosen ? sigmoid(router[expert]) : 0.0f;
            const u32 all = __ballot_sync(FULL_WARP, chosen);
            if (pass == 0) {
                sum += weight;
            } else if (chosen) {
                const u32 own = pair + __popc(all & ((1u << lane) - 1));
                weight = normalize ? weight / (sum + 1e-20f) * scale : weight * scale;
                pair_expert[own] = expert;
                pair_weight[own] = pair_input != nullptr ? 1.0f : weight;
                if (pair_input != nullptr) pair_input[own] = weight;
            }
            pair += __popc(all);
        }
        if (pass == 0) sum = warp_sum(sum);
    }
}

// Rows of the tiles that the matrix products have (linear.cu and linear_quant.cu).
constexpr u32 TILE_SIZES = 4;
INLINE u32 tile_rows(u32 size) { return size == 0 ? 8 : size == 1 ? 16 : size == 2 ? 64 : 128; }

// Where the experts' slots begin, and their tiles in the list of each size.
struct Starts {
    u32 slots[MAX_EXPERTS + 1];
    u32 tiles[TILE_SIZES][MAX_EXPERTS + 1];

    // Adds up the slots, or the tiles of a size, that each expert takes; one warp for each.
    INLINE void add_up(const u32* counts, u32 experts) {
        constexpr u32 LANE_EXPERTS = MAX_EXPERTS / 32;
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
        // With fewer experts, the places of those that do not exist hold it as well.
        if (lane == 31) starts[MAX_EXPERTS] = upto;
    }

    // Writes the list of one size, which has room for `places` tiles.
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

// Sorts the pairs by expert, rows ascending within an expert: the pairs of expert e get
// the slots after those of expert e − 1; `row_index` is the row of each slot, `pair_slot`
// the slot of each pair. One block of 1024 threads.
//
// For each size of tile, `tiles` lists the tiles that the experts' slots fall into, expert by
// expert: {expert, first slot, end of the expert's slots, 0}. The list of the tiles of 8 rows has
// room for `places_8` entries, and so on, which suffices for any choice of experts; those that
// are left over are zeros.
//
// Each warp counts the experts of its share of the pairs, the counts become the first
// slot of each warp and expert, and each warp hands its slots out.
KERNEL(1024) group_pairs(uint4* tiles, u32* row_index, u32* pair_slot, const u32* pair_expert, u32 rows, u32 experts,
                         u32 top_k, u32 places_8, u32 places_16, u32 places_64, u32 places_128) {
    wait_for_kernels_before();
    constexpr u32 WARPS = 32;
    __shared__ u32 next[MAX_EXPERTS][WARPS + 1];
    __shared__ u32 totals[MAX_EXPERTS];
    __shared__ Starts starts;
    u32 lane = lane_id(), warp = warp_id(), pairs = rows * top_k;
    u32 share = (pairs + WARPS * 32 - 1) / (WARPS * 32) * 32;
    u32 begin = min(warp * share, pairs), end = min(begin + share, pairs);

    for (u32 e = lane; e < experts; e += 32) next[e][warp] = 0;
    __syncwarp();
    // First to count, then to hand out.
    for (u32 pass = 0; pass < 2; pass++) {
        for (u32 first = begin; first < end; first += 32) {
            u32 pair = first + lane;
            u32 expert = pair < end ? pair_expert[pair] : NONE;
            // Pairs of the same expert in lower and in higher lanes.
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
        // An expert a warp: where each warp's slots start, from the expert's first one.
        for (u32 e = warp; e < experts; e += WARPS) {
            const u32 count = next[e][lane];
            u32 upto = count;
#pragma unroll
            for (u32 distance = 1; distance < 32; distance *= 2) {
                const u32 other = __shfl_up_sync(FULL_WARP, upto, distance);
                if (lane >= distance) upto += other;
            }
            next[e][lane] = upto - count;
            if (lane == 31) totals[e] = upto;
        }
        __syncthreads();
        starts.add_up(totals, experts);
        __syncthreads();
        for (u32 e = warp; e < experts; e += WARPS) next[e][lane] += starts.slots[e];
        const u32 places[TILE_SIZES] = {places_8, places_16, places_64, places_128};
#pragma unroll
        for (u32 size = 0; size < TILE_SIZES; size++) {
            starts.list(tiles, size, experts, places[size]);
            tiles += places[size];
        }
        __syncthreads();
    }
}

// `out[row] = Σ weight · pair_out[slot]` over the row's experts by index. If there are `scales`, each
// expert has a factor on its results. Grid (rows, ceil(columns / 256)).
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

// out = activation(gate) · up for each pair, whose gates and ups are at its slot of `gate_up`, plus
// the bias of its expert if there is one, and times what its input is to be multiplied by. Without
// slots, each row is a pair. With a limit, the activation is gate · sigmoid(slope · gate) and is
// multiplied with up + 1; gates are at most the limit, and ups within it on both sides. Without one,
// it is SiLU. Grid (pairs, ceil(columns / 256)).
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

// Adds to each pair's result the bias of its expert. Grid (pairs, ceil(columns / 256)).
KERNEL(256) add_pair_bias(T* pair_out, const u32* pair_slot, const u32* pair_expert, const float* bias, u32 columns) {
    wait_for_kernels_before();
    const u32 pair = blockIdx.x, column = blockIdx.y * blockDim.x + threadIdx.x;
    if (column >= columns) return;
    T& to = pair_out[u64(pair_slot[pair]) * columns + column];
    to = to_t(to_float(to) + bias[u64(pair_expert[pair]) * columns + column]);
}
