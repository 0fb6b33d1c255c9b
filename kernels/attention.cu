// Attention over the paged cache: one kernel for sequences with one row (decode), which
// spreads a sequence's units of keys over warps, one that merges those units, and one for
// sequences with more rows (prefill). See attention.cuh for what they share.
#include "attention.cuh"

// Decode ---------------------------------------------------------------------------------

// Granules of keys or values that a warp has on their way or at hand: a power of two, so
// many that four warps fill no more than 72 KiB.
template <int HEAD>
constexpr u32 DECODE_SLOTS = HEAD <= 64 ? 8 : HEAD <= 128 ? 4 : 2;
template <int HEAD>
constexpr u32 DECODE_SLOT = GRANULE * PITCH<HEAD>;

// Where the units of a listed sequence begin among all partial results. Tables follow one
// another in the order of their sequences, and each covers its sequence's length.
INLINE u32 first_partial(const uint4& sequence, u32 listed, u32 block_tokens) {
    return u32(u64(sequence.w) * block_tokens / UNIT) + listed;
}

// What a warp of the decode kernel copies: the granules of a unit, tile by tile, of each
// first two of keys, then two of values.
template <int HEAD>
struct DecodeCopies {
    const T *k_cache, *v_cache;
    T* ring;
    u32 unit, rows, end_tile;
    Sight sight;

    // Copies part `part` (0, 1: keys; 2, 3: values) of the unit's tile `tile`; nothing
    // beyond the last one, but a group in any case.
    INLINE void start(u32 tile, u32 part) const {
        if (tile < end_tile) {
            const u32 granule = tile * 2 + part % 2;
            const u32 first_row = __shfl_sync(FULL_WARP, rows, granule);
            const u32 first_key = unit * UNIT + granule * GRANULE;
            const T* cache = part < 2 ? k_cache : v_cache;
            T* slot = at(tile, part);
#pragma unroll
            for (u32 piece = 0; piece < GRANULE * HEAD / 8; piece += 32) {
                const u32 i = piece + lane_id();
                const u32 row = i / (HEAD / 8), column = i % (HEAD / 8) * 8;
                const bool wanted = sight.sees(first_key + row);
                copy_piece<HEAD>(slot + row * PITCH<HEAD> + column, cache, first_row + row, column, wanted);
            }
        }
        copy_async_commit();
    }

    INLINE T* at(u32 tile, u32 part) const {
        return ring + (tile * 4 + part) % DECODE_SLOTS<HEAD> * DECODE_SLOT<HEAD>;
    }

    // Waits until part `part` of `tile` is there, and starts on the one that takes the
    // place of the part before it.
    INLINE const T* next(u32 tile, u32 part) const {
        constexpr u32 ahead = DECODE_SLOTS<HEAD> - 1;
        copy_async_wait<int(ahead) - 1>();
        __syncwarp();
        start(tile + (part + ahead) / 4, (part + ahead) % 4);
        return at(tile, part);
    }
};

// grid (any, kv_heads · ceil(group / 16), listed sequences), 128 threads. Warp w of block x
// does the units 4 x + w, 4 (x + gridDim.x) + w, … of those that the sequence's token sees.
template <int HEAD>
INLINE void attend_decode(
    float* partial_out, float2* partial_stats, const T* qkv, const T* k_cache, const T* v_cache, const u32* tables,
    const uint4* sequences, const u32* decode_list, u32 q_heads, u32 kv_heads, u32 block_tokens, float scale,
    float softcap, u32 window
) {
    extern __shared__ __align__(16) u8 shared[];
    const uint4 sequence = sequences[decode_list[blockIdx.z]];
    if (sequence.z == 0) return;
    const Sight sight = Sight::of(sequence.z - 1, window);
    const u32 first_unit = sight.begin / UNIT, units = (sight.end - 1) / UNIT + 1 - first_unit;
    const u32 group = q_heads / kv_heads, tiles = (group + WARP_ROWS - 1) / WARP_ROWS;
    const u32 kv_head = blockIdx.y / tiles, head_in_group = blockIdx.y % tiles * WARP_ROWS;
    u32 index = blockIdx.x * WARPS + warp_id();
    if (index >= units) return;

    const T* rows[2];
    u32 heads[2];
#pragma unroll
    for (u32 r = 0; r < 2; r++) {
        const u32 in_group = head_in_group + lane_id() / 4 + 8 * r;
        heads[r] = in_group < group ? kv_head * group + in_group : NONE;
        const u64 row = u64(sequence.x) * (q_heads + 2 * kv_heads);
        rows[r] = heads[r] == NONE ? nullptr : qkv + (row + heads[r]) * HEAD;
    }
    u32 queries[HEAD / 16][4];
    load_queries<HEAD>(queries, rows);

    const Pages pages = {tables + sequence.w, block_tokens, kv_heads, kv_head};
    const Scoring scoring(scale, softcap);
    const Sight sights[2] = {sight, sight};
    const u32 partials = first_partial(sequence, blockIdx.z, block_tokens);
    T* ring = reinterpret_cast<T*>(shared) + warp_id() * DECODE_SLOTS<HEAD> * DECODE_SLOT<HEAD>;
    Softmax<HEAD> softmax;
    for (; index < units; index += gridDim.x * WARPS) {
        const u32 unit = first_unit + index, unit_key = unit * UNIT;
        const u32 begin = max(sight.begin, unit_key) - unit_key;
        const u32 end = min(sight.end - unit_key, UNIT);
        const u32 end_tile = (end + TILE - 1) / TILE;
        const DecodeCopies<HEAD> copies = {k_cache, v_cache, ring, unit, pages.locate(unit, sight), end_tile, sight};
        softmax.reset();
        u32 tile = begin / TILE;
        __syncwarp();
#pragma unroll
        for (u32 part = 0; part < DECODE_SLOTS<HEAD> - 1; part++) copies.start(tile + part / 4, part % 4);
#pragma unroll 1
        for (; tile < end_tile; tile++) {
            float scores[4][4];
            u32 weights[2][4];
            multiply_keys<HEAD>(scores[0], scores[1], queries, copies.next(tile, 0));
            multiply_keys<HEAD>(scores[2], scores[3], queries, copies.next(tile, 1));
            const bool masked = tile * TILE < begin || (tile + 1) * TILE > end;
            softmax.weigh(scores, weights, scoring, sights, unit_key + tile * TILE, masked);
            softmax.add(weights[0], copies.next(tile, 2));
            softmax.add(weights[1], copies.next(tile, 3));
        }
        copy_async_wait<0>();
        softmax.finish();

        const u64 partial = u64(partials + index) * q_heads;
#pragma unroll
        for (u32 r = 0; r < 2; r++) {
            if (heads[r] == NONE) continue;
            const u32 column = lane_id() % 4 * 2;
            float* out = partial_out + (partial + heads[r]) * HEAD + column;
#pragma unroll
            for (int n = 0; n < HEAD / 8; n++) {
                *reinterpret_cast<float2*>(out + n * 8) = make_float2(softmax.out[n][2 * r], softmax.out[n][2 * r + 1]);
            }
            if (column == 0) partial_stats[partial + heads[r]] = make_float2(softmax.largest[r], softmax.sum[r]);
        }
    }
}

// grid (q_heads, listed sequences), a thread an element of a head, whole warps. Merges a
// sequence's units in ascending order; zeros for a sequence of length 0.
KERNEL attend_combine(
    T* out, const float* partial_out, const float2* partial_stats, const uint4* sequences, const u32* decode_list,
    u32 q_heads, u32 head_dim, u32 block_tokens, u32 window
) {
    const uint4 sequence = sequences[decode_list[blockIdx.y]];
    const u32 head = blockIdx.x, column = threadIdx.x, lane = lane_id();
    u32 units = 0;
    if (sequence.z != 0) {
        const Sight sight = Sight::of(sequence.z - 1, window);
        units = (sight.end - 1) / UNIT + 1 - sight.begin / UNIT;
    }
    const u64 partial = u64(first_partial(sequence, blockIdx.y, block_tokens)) * q_heads + head;
    float largest = UNSEEN, sum = 0.0f, total = 0.0f;
    for (u32 first = 0; first < units; first += 32) {
        const u32 count = min(units - first, 32);
        float values[32];
#pragma unroll
        for (u32 i = 0; i < 32; i++) {
            const u64 at = (partial + u64(first + i) * q_heads) * head_dim + column;
            values[i] = i < count && column < head_dim ? partial_out[at] : 0.0f;
        }
        // Lane i prepares unit i: the largest score of all units before it, then the factors.
        float2 stats = make_float2(UNSEEN, 0.0f);
        if (lane < count) stats = partial_stats[partial + u64(first + lane) * q_heads];
        float upto = fmaxf(stats.x, largest);
#pragma unroll
        for (u32 distance = 1; distance < 32; distance *= 2) {
            const float before = __shfl_up_sync(FULL_WARP, upto, distance);
            if (lane >= distance) upto = fmaxf(upto, before);
        }
        float previous = __shfl_up_sync(FULL_WARP, upto, 1), keep, add;
        if (lane == 0) previous = largest;
        join(previous, stats.x, keep, add);
        largest = __shfl_sync(FULL_WARP, upto, 31);
#pragma unroll
        for (u32 i = 0; i < 32; i++) {
            const float keep_i = __shfl_sync(FULL_WARP, keep, i), add_i = __shfl_sync(FULL_WARP, add, i);
            const float sum_i = __shfl_sync(FULL_WARP, stats.y, i);
            sum = merge(sum, keep_i, sum_i, add_i);
            total = merge(total, keep_i, values[i], add_i);
        }
    }
    if (column >= head_dim) return;
    out[(u64(sequence.x) * q_heads + head) * head_dim + column] = to_t(result(total, inverse(sum)));
}

// Prefill --------------------------------------------------------------------------------

// Packed query rows of a block.
constexpr u32 BLOCK_ROWS = WARPS * WARP_ROWS;
// Tiles of keys or values that are on their way or at hand: a power of two.
template <int HEAD>
constexpr u32 PREFILL_SLOTS = HEAD <= 128 ? 4 : 2;
template <int HEAD>
constexpr u32 PREFILL_SLOT = TILE * PITCH<HEAD>;

// The merged units of a warp's rows: in registers, or for large heads in shared memory,
// where every thread has its own places.
template <int HEAD, bool SHARED = (HEAD > 128)>
struct Total {
    float out[HEAD / 8][4];

    INLINE void reset(float4*) {
#pragma unroll
        for (int n = 0; n < HEAD / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) out[n][i] = 0.0f;
        }
    }
    INLINE void add(const Softmax<HEAD>& unit, const float (&keep)[2], const float (&add)[2]) {
#pragma unroll
        for (int n = 0; n < HEAD / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) out[n][i] = merge(out[n][i], keep[i / 2], unit.out[n][i], add[i / 2]);
        }
    }
    INLINE float4 get(int n) const { return make_float4(out[n][0], out[n][1], out[n][2], out[n][3]); }
};
template <int HEAD>
struct Total<HEAD, true> {
    float4* out;

    INLINE void reset(float4* shared) {
        out = shared + threadIdx.x;
#pragma unroll
        for (int n = 0; n < HEAD / 8; n++) out[n * WARPS * 32] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
    INLINE void add(const Softmax<HEAD>& unit, const float (&keep)[2], const float (&add)[2]) {
#pragma unroll
        for (int n = 0; n < HEAD / 8; n++) {
            float4 x = get(n);
            x.x = merge(x.x, keep[0], unit.out[n][0], add[0]);
            x.y = merge(x.y, keep[0], unit.out[n][1], add[0]);
            x.z = merge(x.z, keep[1], unit.out[n][2], add[1]);
            x.w = merge(x.w, keep[1], unit.out[n][3], add[1]);
            out[n * WARPS * 32] = x;
        }
    }
    INLINE float4 get(int n) const { return out[n * WARPS * 32]; }
};

// What a block of the prefill kernel copies: tile by tile, keys and then values. Copies
// run `PREFILL_SLOTS - 1` ahead.
template <int HEAD>
struct PrefillCopies {
    const T *k_cache, *v_cache;
    T* ring;
    Pages pages;
    u32 end_tile;
    Sight sight;
    // Where granules begin: of the units of the next keys, the next values, and of the
    // unit after that of the next keys.
    u32 key_rows, value_rows, later_rows;

    INLINE void begin(u32 tile) {
        key_rows = value_rows = pages.locate(tile / UNIT_TILES, sight);
        later_rows = pages.locate(tile / UNIT_TILES + 1, sight);
    }
    INLINE void start_keys(u32 tile, bool first) {
        if (tile % UNIT_TILES == 0 && !first) {
            key_rows = later_rows;
            later_rows = pages.locate(tile / UNIT_TILES + 1, sight);
        }
        start(tile, 0, k_cache, key_rows);
    }
    INLINE void start_values(u32 tile) {
        if (tile % UNIT_TILES == 0) value_rows = key_rows;
        start(tile, 1, v_cache, value_rows);
    }
    INLINE void start(u32 tile, u32 part, const T* cache, u32 rows) const {
        if (tile < end_tile) {
            const u32 granule = tile % UNIT_TILES * 2;
            const u32 first = __shfl_sync(FULL_WARP, rows, granule);
            const u32 second = __shfl_sync(FULL_WARP, rows, granule + 1);
            T* slot = at(tile, part);
#pragma unroll
            for (u32 piece = 0; piece < TILE * HEAD / 8; piece += WARPS * 32) {
                const u32 i = piece + threadIdx.x;
                if (TILE * HEAD / 8 % (WARPS * 32) != 0 && i >= TILE * HEAD / 8) break;
                const u32 row = i / (HEAD / 8), column = i % (HEAD / 8) * 8;
                const bool wanted = sight.sees(tile * TILE + row);
                const u32 from = (row < GRANULE ? first : second) + row % GRANULE;
                copy_piece<HEAD>(slot + row * PITCH<HEAD> + column, cache, from, column, wanted);
            }
        }
        copy_async_commit();
    }
    INLINE T* at(u32 tile, u32 part) const {
        return ring + (tile * 2 + part) % PREFILL_SLOTS<HEAD> * PREFILL_SLOT<HEAD>;
    }

    // Wait until the keys, or the values, of `tile` are there for all threads; start on
    // what takes the place of the part before it.
    INLINE const T* next_keys(u32 tile) {
        copy_async_wait<PREFILL_SLOTS<HEAD> - 2>();
        __syncthreads();
        start_values(tile + PREFILL_SLOTS<HEAD> / 2 - 1);
        return at(tile, 0);
    }
    INLINE const T* next_values(u32 tile) {
        copy_async_wait<PREFILL_SLOTS<HEAD> - 2>();
        __syncthreads();
        start_keys(tile + PREFILL_SLOTS<HEAD> / 2, false);
        return at(tile, 1);
    }
};

// grid (work items, kv_heads), 128 threads. A work item is {sequence, first packed row},
// and stands for 64 packed rows: token · group + head.
template <int HEAD>
INLINE void attend_prefill(
    T* out, const T* qkv, const T* k_cache, const T* v_cache, const u32* tables, const uint4* sequences,
    const uint2* prefill_work, u32 q_heads, u32 kv_heads, u32 block_tokens, float scale, float softcap, u32 window
) {
    extern __shared__ __align__(16) u8 shared[];
    const uint2 work = prefill_work[blockIdx.x];
    const uint4 sequence = sequences[work.x];
    const u32 group = q_heads / kv_heads, kv_head = blockIdx.y, packed = sequence.y * group;
    const u32 first_position = sequence.z - sequence.y;

    // What the block, the warp and each of the lane's two rows see.
    const u32 last_of_block = min(work.y + BLOCK_ROWS, packed) - 1;
    const Sight block_first = Sight::of(first_position + work.y / group, window);
    const Sight block = {block_first.begin, first_position + last_of_block / group + 1};
    const u32 first_of_warp = work.y + warp_id() * WARP_ROWS;
    Sight warp_first = Sight::nothing(), warp_last = Sight::nothing();
    if (first_of_warp < packed) {
        warp_first = Sight::of(first_position + first_of_warp / group, window);
        warp_last = Sight::of(first_position + min(first_of_warp + WARP_ROWS - 1, packed - 1) / group, window);
    }
    const Sight warp = {warp_first.begin, warp_last.end};
    Sight sights[2];
    const T* rows[2];
    u64 out_rows[2];
#pragma unroll
    for (u32 r = 0; r < 2; r++) {
        const u32 row = first_of_warp + lane_id() / 4 + 8 * r;
        const u32 token = row / group, head = kv_head * group + row % group;
        const bool any = row < packed;
        sights[r] = any ? Sight::of(first_position + token, window) : Sight::nothing();
        rows[r] = any ? qkv + (u64(sequence.x + token) * (q_heads + 2 * kv_heads) + head) * HEAD : nullptr;
        out_rows[r] = any ? (u64(sequence.x + token) * q_heads + head) * HEAD : ~u64(0);
    }
    u32 queries[HEAD / 16][4];
    load_queries<HEAD>(queries, rows);

    const u32 first_tile = block.begin / TILE, end_tile = (block.end + TILE - 1) / TILE;
    T* ring = reinterpret_cast<T*>(shared);
    PrefillCopies<HEAD> copies = {k_cache, v_cache, ring, {tables + sequence.w, block_tokens, kv_heads, kv_head},
                                  end_tile, block, 0, 0, 0};
    copies.begin(first_tile);
    copies.start_keys(first_tile, true);
    if constexpr (PREFILL_SLOTS<HEAD> == 4) {
        copies.start_values(first_tile);
        copies.start_keys(first_tile + 1, false);
    }

    const Scoring scoring(scale, softcap);
    Softmax<HEAD> unit;
    Total<HEAD> total;
    total.reset(reinterpret_cast<float4*>(ring + PREFILL_SLOTS<HEAD> * PREFILL_SLOT<HEAD>));
    float largest[2] = {UNSEEN, UNSEEN}, sum[2] = {0.0f, 0.0f};
    unit.reset();
    bool touched = false;
#pragma unroll 1
    for (u32 tile = first_tile; tile < end_tile; tile++) {
        const u32 key = tile * TILE;
        const bool visible = warp.sees_any(key, TILE);
        const T* keys = copies.next_keys(tile);
        float scores[4][4];
        if (visible) {
            multiply_keys<HEAD>(scores[0], scores[1], queries, keys);
            multiply_keys<HEAD>(scores[2], scores[3], queries, keys + GRANULE * PITCH<HEAD>);
        }
        const T* values = copies.next_values(tile);
        if (visible) {
            u32 weights[2][4];
            const bool masked = key < warp_last.begin || key + TILE > warp_first.end;
            unit.weigh(scores, weights, scoring, sights, key, masked);
            unit.add(weights[0], values);
            unit.add(weights[1], values + GRANULE * PITCH<HEAD>);
            touched = true;
        }
        if (touched && (tile % UNIT_TILES == UNIT_TILES - 1 || tile + 1 == end_tile)) {
            unit.finish();
            float keep[2], add[2];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                join(largest[r], unit.largest[r], keep[r], add[r]);
                sum[r] = merge(sum[r], keep[r], unit.sum[r], add[r]);
            }
            total.add(unit, keep, add);
            unit.reset();
            touched = false;
        }
    }
    copy_async_wait<0>();

    const float inverses[2] = {inverse(sum[0]), inverse(sum[1])};
    const u32 column = lane_id() % 4 * 2;
#pragma unroll
    for (int n = 0; n < HEAD / 8; n++) {
        const float4 x = total.get(n);
        if (rows[0] != nullptr) {
            const T2 y = to_t2(result(x.x, inverses[0]), result(x.y, inverses[0]));
            *reinterpret_cast<T2*>(out + out_rows[0] + n * 8 + column) = y;
        }
        if (rows[1] != nullptr) {
            const T2 y = to_t2(result(x.z, inverses[1]), result(x.w, inverses[1]));
            *reinterpret_cast<T2*>(out + out_rows[1] + n * 8 + column) = y;
        }
    }
}

// The kernels of each head dimension.

#define ATTEND(HEAD)                                                                                                   \
    KERNEL __launch_bounds__(128) attend_decode_hd##HEAD(                                                              \
        float* partial_out, float2* partial_stats, const T* qkv, const T* k_cache, const T* v_cache,                  \
        const u32* tables, const uint4* sequences, const u32* decode_list, u32 q_heads, u32 kv_heads,                 \
        u32 block_tokens, float scale, float softcap, u32 window                                                       \
    ) {                                                                                                                \
        attend_decode<HEAD>(partial_out, partial_stats, qkv, k_cache, v_cache, tables, sequences, decode_list,        \
                            q_heads, kv_heads, block_tokens, scale, softcap, window);                                  \
    }                                                                                                                  \
    KERNEL __launch_bounds__(128) attend_prefill_hd##HEAD(                                                             \
        T* out, const T* qkv, const T* k_cache, const T* v_cache, const u32* tables, const uint4* sequences,          \
        const uint2* prefill_work, u32 q_heads, u32 kv_heads, u32 block_tokens, float scale, float softcap,           \
        u32 window                                                                                                     \
    ) {                                                                                                                \
        attend_prefill<HEAD>(out, qkv, k_cache, v_cache, tables, sequences, prefill_work, q_heads, kv_heads,          \
                             block_tokens, scale, softcap, window);                                                    \
    }

ATTEND(16)
ATTEND(32)
ATTEND(64)
ATTEND(80)
ATTEND(96)
ATTEND(128)
ATTEND(256)
