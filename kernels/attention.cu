// Attention over the paged KV cache. One kernel is for sequences with one row (decode): it can rotate and
// store the row, distributes the sequence's units of keys over warps, and merges them. Another kernel is
// for sequences with several rows (prefill). See attention.cuh for the code that they share.
#include "arrival.cuh"
#include "attention.cuh"
#include "rope.cuh"

// Decode ---------------------------------------------------------------------------------

// Slots in a warp's ring, each for a granule of keys or values that is in flight or in use: a power of
// two, such that the rings of four warps take at most 72 KiB.
template <int HEAD>
constexpr u32 DECODE_SLOTS = HEAD <= 64 ? 8 : HEAD <= 128 ? 4 : 2;
template <int HEAD>
constexpr u32 DECODE_SLOT_BYTES = GRANULE * PITCH_BYTES<COLUMNS<HEAD>>;

// The copies that a warp of the decode kernel makes of a unit, tile by tile. The parts of a tile are all
// pieces of its first granule of keys, all of its second one, and then one piece of each granule of values.
template <int HEAD>
struct DecodeCopies {
    static constexpr u32 KEY_PARTS = 2 * PIECES<HEAD>, PARTS = KEY_PARTS + 2;
    const T *k_cache;
    // Points to the block's piece of the first value.
    const T *v_cache;
    // Address in shared memory.
    u32 ring;
    // Index of the unit, and the first vectors of its granules from `Pages::locate`.
    u32 unit, rows;
    u32 end_tile;
    Sight sight;

    // Starts to copy a part of a tile. Beyond the last tile there is nothing to copy, but a copy group is
    // committed all the same, so that `next` can count groups.
    INLINE void start(u32 tile, u32 part) const {
        if (tile < end_tile) {
            const bool keys = part < KEY_PARTS;
            const u32 granule = tile * 2 + (keys ? part / PIECES<HEAD> : part - KEY_PARTS);
            const u32 first = __shfl_sync(FULL_WARP, rows, granule);
            const T* cache = keys ? k_cache + part % PIECES<HEAD> * COLUMNS<HEAD> : v_cache;
            copy_rows<HEAD, 32, GRANULE>(
                at(tile, part), cache, first, 0, lane_id(), unit * UNIT + granule * GRANULE, sight
            );
        }
        copy_async_commit();
    }

    INLINE u32 at(u32 tile, u32 part) const {
        return ring + (tile * PARTS + part) % DECODE_SLOTS<HEAD> * DECODE_SLOT_BYTES<HEAD>;
    }

    // Starts as many copies as the ring has slots, except one.
    INLINE void begin(u32 tile) const {
#pragma unroll 1
        for (u32 part = 0; part < DECODE_SLOTS<HEAD> - 1; part++) start(tile + part / PARTS, part % PARTS);
    }

    // Waits until a part of a tile has arrived, and starts the copy that replaces the part before it.
    // Returns the address of the part in shared memory.
    INLINE u32 next(u32 tile, u32 part) const {
        constexpr u32 ahead = DECODE_SLOTS<HEAD> - 1;
        copy_async_wait<int(ahead) - 1>();
        __syncwarp();
        start(tile + (part + ahead) / PARTS, (part + ahead) % PARTS);
        return at(tile, part);
    }
};

// How decode attention normalises, rotates and stores the row of its sequence before it reads the cache.
// The parameters are those of rope_store. `angles` is null if rope_store has already done this.
struct NewRow {
    const float2* angles;
    const float *q_norm, *k_norm;
    float epsilon;
    u32 norm_mode, rotary_dim;
};

// The heads of a row that a block needs: `queries` query heads from head `first_query` on, and the heads
// `key` and `value`, the key and the value of a key-value head. `stores` is 1 if the block stores these
// two, and otherwise 0.
struct NewHeads {
    const T* row;
    u32 first_query, queries, key, value, stores;
};

// Writes the queries to shared memory, `head_dim + 8` elements apart, and the key and the value of
// `position` to the cache. One warp per head. Not inlined, because all head dimensions share it.
__device__ __noinline__ void prepare_heads(
    T* shared_queries, T* k_cache, T* v_cache, NewHeads heads, NewRow new_row, Pages pages, u32 position, u32 head_dim
) {
    const float2* const angles = new_row.angles + u64(position) * (new_row.rotary_dim / 2);
#pragma unroll 1
    for (u32 index = warp_id(); index < heads.queries + 2 * heads.stores; index += WARPS) {
        const bool query = index < heads.queries, key = index == heads.queries;
        const u32 head = query ? heads.first_query + index : key ? heads.key : heads.value;
        const T* const row = heads.row + head * head_dim;
        T* const to = query ? shared_queries + index * (head_dim + 8)
                            : (key ? k_cache : v_cache) + u64(pages.vector_of(position)) * VECTOR;
        if (new_row.angles == nullptr || !(query || key)) {
            copy_head(to, row, !query && (new_row.norm_mode & NORM_VALUES) != 0, new_row.epsilon, head_dim);
            continue;
        }
        Norm norm = {nullptr, 1.0f};
        if ((new_row.norm_mode & NORM_HEADS) != 0) {
            norm = norm_of_head(row, query ? new_row.q_norm : new_row.k_norm, new_row.epsilon, head_dim);
        }
        rotate(row, norm, angles, new_row.rotary_dim, head_dim, [&](u32 column, float2 x) {
            *reinterpret_cast<T2*>(to + column) = to_t2(x.x, x.y);
        });
    }
}

// The work of a block of the decode kernel, whose grid is (any, kv_heads · ceil(group / 16) · pieces,
// listed sequences). An entry of the list is {sequence, index of its first unit among the partial
// results}.
struct DecodeBlock {
    // The sequence's row, number of keys, table origin and first partial result.
    u32 first_row, length, origin, first_partial;
    Sight sight;
    // The first and the number of the units that the token sees, and the number of blocks (in x) that
    // have work: one if there are no units, to write zeros.
    u32 first_unit, units, blocks;
    // The key-value head, and the first and the number of its query heads that the block computes.
    u32 kv_head, first_head, heads;
    // The first column of the results that the block computes.
    u32 first_column;

    INLINE DecodeBlock(
        const uint2* decode_list, const uint4* sequences, u32 q_heads, u32 kv_heads, u32 window, u32 chunks, u32 pieces
    ) {
        const uint2 listed = decode_list[blockIdx.z];
        const uint4 sequence = sequences[listed.x];
        first_row = sequence.x, length = sequence.z, origin = sequence.w, first_partial = listed.y;
        sight = length == 0 ? Sight::nothing() : Sight::of(length - 1, window, chunks);
        first_unit = sight.begin / UNIT, units = (sight.end + UNIT - 1) / UNIT - first_unit;
        blocks = max(min((units + WARPS - 1) / WARPS, gridDim.x), 1);
        const u32 group = q_heads / kv_heads, tiles = (group + WARP_ROWS - 1) / WARP_ROWS;
        const u32 tile = blockIdx.y / pieces, first_in_group = tile % tiles * WARP_ROWS;
        first_column = blockIdx.y % pieces * MOST_COLUMNS;
        kv_head = tile / tiles, first_head = kv_head * group + first_in_group;
        heads = min(group - first_in_group, WARP_ROWS);
    }
};

// Called by each block when its units are complete. The last of the blocks with the same (y, z) merges
// all units of its heads in ascending order, whichever block computed them and when, and writes the
// results, or zeros if there are no units. `arrivals` has a counter per (y, z), 0 before and after.
//
// One warp per head. `shared` is this warp's memory, with room for 32 units of 128 columns, or of all
// columns if there are fewer. Not inlined, because all head dimensions share it. The `DecodeBlock` is
// computed again, which takes fewer registers than passing it.
__device__ __noinline__ void merge_units(
    T* out, const float* partial_out, const float2* partial_stats, u32* arrivals, const uint4* sequences,
    const uint2* decode_list, const float* sinks, u32 q_heads, u32 kv_heads, u32 window, u32 chunks, u32 head_dim,
    u32 shared
) {
    __shared__ u32 arrived;
    const u32 pieces = (head_dim + MOST_COLUMNS - 1) / MOST_COLUMNS;
    const DecodeBlock block(decode_list, sequences, q_heads, kv_heads, window, chunks, pieces);
    const u32 units = block.units, end_column = min(head_dim, block.first_column + MOST_COLUMNS);
    if (block.blocks > 1) {
        if (!is_last_to_arrive(arrivals + blockIdx.z * gridDim.y + blockIdx.y, block.blocks, &arrived)) return;
    } else {
        __syncthreads();
    }

    constexpr u32 AT_ONCE = 32, ACROSS = 128;
    const u32 lane = lane_id(), width = min(head_dim, ACROSS), place = lane * 4;
    out += u64(block.first_row) * q_heads * head_dim;
    partial_out += u64(block.first_partial) * q_heads * head_dim;
    partial_stats += u64(block.first_partial) * q_heads;
#pragma unroll 1
    for (u32 head = block.first_head + warp_id(); head < block.first_head + block.heads; head += WARPS) {
#pragma unroll 1
        for (u32 column = block.first_column + place; column - place < end_column; column += ACROSS) {
            // Each lane has four columns; lanes beyond the width have none.
            const bool any = place < width;
            float largest, sum, total[4] = {0.0f, 0.0f, 0.0f, 0.0f};
            begin_softmax(largest, sum, sinks, head);
#pragma unroll 1
            for (u32 first = 0; first < units; first += AT_ONCE) {
                const u32 count = min(units - first, AT_ONCE);
                const float* from = partial_out + (u64(first) * q_heads + head) * head_dim + column;
                __syncwarp();
#pragma unroll 1
                for (u32 i = 0; i < count && any; i++) {
                    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared + (i * width + place) * 4),
                                 "l"(from + u64(i) * q_heads * head_dim)
                                 : "memory");
                }
                copy_async_commit();
                // Lane i finds the maximum score of all units before unit i, and from it the unit's factors.
                float2 stats = make_float2(UNSEEN, 0.0f);
                if (lane < count) stats = __ldcg(partial_stats + u64(first + lane) * q_heads + head);
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
                copy_async_wait<0>();
#pragma unroll 2
                for (u32 i = 0; i < count; i++) {
                    const float keep_i = __shfl_sync(FULL_WARP, keep, i);
                    const float add_i = __shfl_sync(FULL_WARP, add, i);
                    sum = merge(sum, keep_i, __shfl_sync(FULL_WARP, stats.y, i), add_i);
                    if (!any) continue;
                    float x[4];
                    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                                 : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3])
                                 : "r"(shared + (i * width + place) * 4)
                                 : "memory");
#pragma unroll
                    for (int c = 0; c < 4; c++) total[c] = merge(total[c], keep_i, x[c], add_i);
                }
            }
            if (!any) continue;
            const float inverse_sum = inverse(sum);
#pragma unroll
            for (int c = 0; c < 4; c++) total[c] = result(total[c], inverse_sum);
            *reinterpret_cast<uint2*>(out + head * head_dim + column) =
                make_uint2(bits(to_t2(total[0], total[1])), bits(to_t2(total[2], total[3])));
        }
    }
}

// Bytes of a warp's ring. In a block's shared memory, the rings follow the queries.
template <int HEAD>
constexpr u32 DECODE_RING_BYTES = DECODE_SLOTS<HEAD> * DECODE_SLOT_BYTES<HEAD>;

// Computes decode attention. 128 threads; see DecodeBlock for the grid. Warp w of block x computes the
// units 4 x + w, 4 (x + gridDim.x) + w, … of the sequence, and merge_units merges them.
template <int HEAD>
INLINE void attend_decode(
    T* out, float* partial_out, float2* partial_stats, u32* arrivals, const T* qkv, T* k_cache, T* v_cache,
    const u32* tables, const uint4* sequences, const uint2* decode_list, const float* sinks, NewRow new_row,
    u32 q_heads, u32 kv_heads, u32 columns, u32 block_tokens, u32 block_vectors, float scale, float softcap, u32 window,
    u32 chunks
) {
    extern __shared__ __align__(16) u8 shared[];
    // What is read before the wait was written before the previous kernel began: the inputs of the step,
    // and the cache blocks that its tokens see, except for the newest key and value.
    const DecodeBlock block(decode_list, sequences, q_heads, kv_heads, window, chunks, PIECES<HEAD>);
    const u32 units = block.units, heads = block.heads;
    const Sight sight = block.sight;
    const Pages pages = {tables, block.origin, block_tokens, block_vectors, HEAD / VECTOR};
    k_cache += block.kv_head * block_tokens * HEAD;
    v_cache += block.kv_head * block_tokens * HEAD;
    u32 index = blockIdx.x * WARPS + warp_id();
    if (index < units) {
        const u32 granule = pages.locate(block.first_unit + index, sight);
        const T* cache = lane_id() < UNIT_GRANULES ? k_cache : v_cache;
        if (granule != 0 && lane_id() < 2 * UNIT_GRANULES) prefetch(cache + u64(granule) * VECTOR, GRANULE * HEAD * sizeof(T));
    }
    wait_for_kernels_before();
    if (blockIdx.x >= block.blocks) return;

    T* const shared_queries = reinterpret_cast<T*>(shared);
    const u32 ring = shared_address(shared) + WARP_ROWS * PITCH_BYTES<HEAD> + warp_id() * DECODE_RING_BYTES<HEAD>;
    if (units > 0) {
        // The block that reads the newest key stores it. If several tiles of the group or several pieces
        // need it, one block of each stores it, with the same bits.
        const bool stores = new_row.angles != nullptr && (units - 1) / WARPS % gridDim.x == blockIdx.x;
        const T* const row = qkv + u64(block.first_row) * columns;
        const u32 key = q_heads + block.kv_head;
        prepare_heads(shared_queries, k_cache, v_cache, {row, block.first_head, heads, key, key + kv_heads, stores},
                      new_row, pages, block.length - 1, HEAD);
    }
    __syncthreads();

    // The rows of each warp are the block's heads, padded to 16 with copies of the last one.
    const u32 row = lane_id() / 4;
    const Queries<HEAD, 4> queries(shared_queries + min(row, heads - 1) * PITCH<HEAD>,
                                   shared_queries + min(row + 8, heads - 1) * PITCH<HEAD>, index < units);
    const Scoring scoring(scale, softcap);
    const Sight sights[2] = {sight, sight};
    Softmax<COLUMNS<HEAD>> softmax;
    using Copies = DecodeCopies<HEAD>;
#pragma unroll 1
    for (; index < units; index += gridDim.x * WARPS) {
        const u32 unit = block.first_unit + index, unit_key = unit * UNIT;
        const u32 end_tile = (min(sight.end - unit_key, UNIT) + TILE - 1) / TILE;
        const Copies copies = {
            k_cache, v_cache + (PIECES<HEAD> > 1 ? block.first_column : 0), ring, unit, pages.locate(unit, sight), end_tile,
            sight
        };
        u32 tile = (max(sight.begin, unit_key) - unit_key) / TILE;
        __syncwarp();
        copies.begin(tile);
        softmax.reset();
#pragma unroll 1
        for (; tile < end_tile; tile++) {
            float scores[4][4];
            u32 weights[2][4];
#pragma unroll
            for (u32 part = 0; part < Copies::KEY_PARTS; part++) {
                const u32 first = part / PIECES<HEAD> * 2, piece = part % PIECES<HEAD>;
                queries.multiply(scores[first], scores[first + 1], copies.next(tile, part), int(piece));
            }
            const u32 key = unit_key + tile * TILE;
            const bool masked = key < sight.begin || key + TILE > sight.end;
            softmax.weigh(scores, weights, scoring, sights, key, masked);
            softmax.add(weights[0], copies.next(tile, Copies::KEY_PARTS));
            softmax.add(weights[1], copies.next(tile, Copies::KEY_PARTS + 1));
        }
        copy_async_wait<0>();
        softmax.finish();

        const u64 partial = u64(block.first_partial + index) * q_heads + block.first_head + row;
        const u32 column = lane_id() % 4 * 2;
        float* to = partial_out + partial * HEAD + (PIECES<HEAD> > 1 ? block.first_column : 0) + column;
#pragma unroll
        for (u32 r = 0; r < 2; r++) {
            if (row + 8 * r >= heads) break;
#pragma unroll
            for (int n = 0; n < COLUMNS<HEAD> / 8; n++) {
                const float2 x = make_float2(softmax.out[n][2 * r], softmax.out[n][2 * r + 1]);
                *reinterpret_cast<float2*>(to + 8 * r * HEAD + n * 8) = x;
            }
            // All pieces of a head have the same statistics.
            if (column == 0) partial_stats[partial + 8 * r] = make_float2(softmax.largest[r], softmax.sum[r]);
        }
    }

    merge_units(out, partial_out, partial_stats, arrivals, sequences, decode_list, sinks, q_heads, kv_heads, window, chunks,
                HEAD, ring);
}

// Prefill --------------------------------------------------------------------------------

// Packed query rows per block.
constexpr u32 BLOCK_ROWS = WARPS * WARP_ROWS;
// Slots in a block's ring, each for a tile of keys or values that is in flight or in use: a power of two.
template <int HEAD>
constexpr u32 PREFILL_SLOTS = HEAD <= 128 ? 4 : 2;
template <int HEAD>
constexpr u32 PREFILL_SLOT_BYTES = TILE * PITCH_BYTES<COLUMNS<HEAD>>;

// The results of a warp's rows, merged over units. They are in registers or, for large heads, in shared
// memory, where every thread has its own elements.
template <int COLUMNS, bool SHARED = (COLUMNS > 128)>
struct Total {
    float out[COLUMNS / 8][4];

    INLINE void reset(u8*) {
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) out[n][i] = 0.0f;
        }
    }
    INLINE void add(const Softmax<COLUMNS>& unit, const float (&keep)[2], const float (&add)[2]) {
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) out[n][i] = merge(out[n][i], keep[i / 2], unit.out[n][i], add[i / 2]);
        }
    }
    // Returns the lane's two elements of its row `r` in the columns 8 n .. 8 n + 8.
    INLINE float2 get(int n, int r) const { return make_float2(out[n][2 * r], out[n][2 * r + 1]); }
};
template <int COLUMNS>
struct Total<COLUMNS, true> {
    float2* out;

    INLINE float2& at(int n, int r) const { return out[(2 * n + r) * WARPS * 32]; }
    INLINE void reset(u8* shared) {
        out = reinterpret_cast<float2*>(shared) + threadIdx.x;
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; n++) at(n, 0) = at(n, 1) = make_float2(0.0f, 0.0f);
    }
    INLINE void add(const Softmax<COLUMNS>& unit, const float (&keep)[2], const float (&add)[2]) {
#pragma unroll
        for (int n = 0; n < COLUMNS / 8; n++) {
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const float2 x = at(n, r);
                at(n, r) = make_float2(
                    merge(x.x, keep[r], unit.out[n][2 * r], add[r]), merge(x.y, keep[r], unit.out[n][2 * r + 1], add[r])
                );
            }
        }
    }
    INLINE float2 get(int n, int r) const { return at(n, r); }
};

// The copies that a block of the prefill kernel makes, tile by tile. The parts of a tile are all pieces of
// its keys, and then one piece of its values.
template <int HEAD>
struct PrefillCopies {
    static constexpr u32 KEY_PARTS = PIECES<HEAD>, PARTS = KEY_PARTS + 1;
    const T *k_cache;
    // Points to the block's piece of the first value.
    const T *v_cache;
    // Address in shared memory.
    u32 ring;
    u32 first_tile, end_tile;
    Sight sight;
    Pages pages;
    // First vectors of granules, from `Pages::locate`: in the unit of the next keys, in the unit of the
    // next values, and in the unit after that of the next keys.
    u32 key_rows, value_rows, later_rows;

    // Starts as many copies as the ring has slots, except one.
    INLINE void begin() {
        key_rows = pages.locate(first_tile / UNIT_TILES, sight);
        value_rows = key_rows;
        later_rows = pages.locate(first_tile / UNIT_TILES + 1, sight);
#pragma unroll 1
        for (u32 part = 0; part < PREFILL_SLOTS<HEAD> - 1; part++) start(first_tile + part / PARTS, part % PARTS);
    }

    // Starts to copy a part of a tile. Beyond the last tile, it only commits an empty copy group.
    INLINE void start(u32 tile, u32 part) {
        if (tile % UNIT_TILES == 0 && tile != first_tile) {
            if (part == 0) {
                key_rows = later_rows;
                later_rows = pages.locate(tile / UNIT_TILES + 1, sight);
            } else if (part == KEY_PARTS) {
                value_rows = key_rows;
            }
        }
        if (tile < end_tile) {
            const bool keys = part < KEY_PARTS;
            const u32 rows = keys || PREFILL_SLOTS<HEAD> == 2 ? key_rows : value_rows, granule = tile % UNIT_TILES * 2;
            const u32 first = __shfl_sync(FULL_WARP, rows, granule);
            const u32 second = __shfl_sync(FULL_WARP, rows, granule + 1);
            const T* cache = keys ? k_cache + part * COLUMNS<HEAD> : v_cache;
            copy_rows<HEAD, WARPS * 32, TILE>(
                at(tile, part), cache, first, second, threadIdx.x, tile * TILE, sight
            );
        }
        copy_async_commit();
    }

    INLINE u32 at(u32 tile, u32 part) const {
        return ring + (tile * PARTS + part) % PREFILL_SLOTS<HEAD> * PREFILL_SLOT_BYTES<HEAD>;
    }

    // Waits until a part of a tile has arrived for all threads, and starts the copy that replaces the part
    // before it. Returns the address of the part in shared memory.
    INLINE u32 next(u32 tile, u32 part) {
        constexpr u32 ahead = PREFILL_SLOTS<HEAD> - 1;
        copy_async_wait<int(ahead) - 1>();
        __syncthreads();
        start(tile + (part + ahead) / PARTS, (part + ahead) % PARTS);
        return at(tile, part);
    }
};

// Computes prefill attention. Grid (work items, kv_heads · pieces), 128 threads. A work item is {sequence,
// first packed row} and covers 64 packed rows; packed row token · group + head is a head of a token. The
// last items, which see the most keys, start first. If `BOTH`, rows also see `after` keys after their own.
template <int HEAD, bool BOTH = false>
INLINE void attend_prefill(
    T* out, const T* qkv, const T* k_cache, const T* v_cache, const u32* tables, const uint4* sequences,
    const uint2* prefill_work, const float* sinks, u32 q_heads, u32 kv_heads, u32 columns, u32 block_tokens,
    u32 block_vectors, float scale, float softcap, u32 window, u32 chunks, u32 after = 0
) {
    wait_for_kernels_before();
    extern __shared__ __align__(16) u8 shared[];
    const uint2 work = prefill_work[gridDim.x - 1 - blockIdx.x];
    const uint4 sequence = sequences[work.x];
    const u32 group = q_heads / kv_heads, kv_head = blockIdx.y / PIECES<HEAD>, last = sequence.y * group - 1;
    const u32 first_column = blockIdx.y % PIECES<HEAD> * COLUMNS<HEAD>;
    const u32 first_position = sequence.z - sequence.y;
    const auto sight_of = [&](u32 packed) {
        const u32 position = first_position + packed / group;
        return BOTH ? Sight::around(position, window, after, sequence.z) : Sight::of(position, window, chunks);
    };

    // The keys that the block, the warp and each of the lane's two rows see. Rows beyond the last one are
    // copies of it, which are not written.
    const u32 block_row = work.y, warp_row = block_row + warp_id() * WARP_ROWS;
    const Sight block = {sight_of(block_row).begin, sight_of(min(block_row + BLOCK_ROWS - 1, last)).end};
    const Sight warp_first = sight_of(min(warp_row, last)), warp_last = sight_of(min(warp_row + WARP_ROWS - 1, last));
    const Sight warp = {warp_first.begin, warp_last.end};
    const u32 lane_row = warp_row + lane_id() / 4;
    const Sight sights[2] = {sight_of(min(lane_row, last)), sight_of(min(lane_row + 8, last))};
    const auto queries_of = [&](u32 packed) {
        return qkv + u64(sequence.x + packed / group) * columns + (kv_head * group + packed % group) * HEAD;
    };
    const Queries<HEAD> queries(queries_of(min(lane_row, last)), queries_of(min(lane_row + 8, last)));

    const u32 in_block = kv_head * block_tokens * HEAD;
    PrefillCopies<HEAD> copies = {
        k_cache + in_block, v_cache + in_block + first_column, shared_address(shared), block.begin / TILE,
        (block.end + TILE - 1) / TILE, block, {tables, sequence.w, block_tokens, block_vectors, HEAD / VECTOR}, 0, 0, 0
    };
    copies.begin();
    const Scoring scoring(scale, softcap);
    Softmax<COLUMNS<HEAD>> unit;
    Total<COLUMNS<HEAD>> total;
    total.reset(shared + PREFILL_SLOTS<HEAD> * PREFILL_SLOT_BYTES<HEAD>);
    float largest[2], sum[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        begin_softmax(largest[r], sum[r], sinks, kv_head * group + min(lane_row + 8 * r, last) % group);
    }
    unit.reset();
#pragma unroll 1
    for (u32 tile = copies.first_tile; tile < copies.end_tile; tile++) {
        const u32 key = tile * TILE;
        const bool visible = warp.sees_any(key, TILE);
        float scores[4][4];
#pragma unroll
        for (u32 piece = 0; piece < PIECES<HEAD>; piece++) {
            const u32 keys = copies.next(tile, piece);
            if (visible) {
                queries.multiply(scores[0], scores[1], keys, int(piece));
                queries.multiply(scores[2], scores[3], keys + GRANULE * PITCH_BYTES<COLUMNS<HEAD>>, int(piece));
            }
        }
        const u32 values = copies.next(tile, PIECES<HEAD>);
        if (visible) {
            u32 weights[2][4];
            const bool masked = key < warp_last.begin || key + TILE > warp_first.end;
            unit.weigh(scores, weights, scoring, sights, key, masked);
            unit.add(weights[0], values);
            unit.add(weights[1], values + GRANULE * PITCH_BYTES<COLUMNS<HEAD>>);
        }
        const bool ends = tile % UNIT_TILES == UNIT_TILES - 1 || tile + 1 == copies.end_tile;
        if (ends && warp.sees_any(key - tile % UNIT_TILES * TILE, UNIT)) {
            unit.finish();
            float keep[2], add[2];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                join(largest[r], unit.largest[r], keep[r], add[r]);
                sum[r] = merge(sum[r], keep[r], unit.sum[r], add[r]);
            }
            total.add(unit, keep, add);
            unit.reset();
        }
    }
    copy_async_wait<0>();

#pragma unroll
    for (int r = 0; r < 2; r++) {
        const u32 row = lane_row + 8 * r;
        if (row > last) break;
        const u64 out_row = u64(sequence.x + row / group) * q_heads + kv_head * group + row % group;
        T* to = out + out_row * HEAD + first_column + lane_id() % 4 * 2;
        const float inverse_sum = inverse(sum[r]);
#pragma unroll
        for (int n = 0; n < COLUMNS<HEAD> / 8; n++) {
            const float2 x = total.get(n, r);
            *reinterpret_cast<T2*>(to + n * 8) = pair_of(result(x.x, inverse_sum), result(x.y, inverse_sum));
        }
    }
}

// The kernels of each head dimension.

#define ATTEND(HEAD)                                                                                                   \
    KERNEL(128) attend_decode_hd##HEAD(                                                                                \
        T* out, float* partial_out, float2* partial_stats, u32* arrivals, const T* qkv, T* k_cache, T* v_cache,        \
        const u32* tables, const uint4* sequences, const uint2* decode_list, const float* sinks,                       \
        const float2* angles, const float* q_norm, const float* k_norm, float epsilon, u32 norm_mode,                  \
        u32 rotary_dim, u32 q_heads, u32 kv_heads, u32 columns, u32 block_tokens, u32 block_vectors, float scale,      \
        float softcap, u32 window, u32 chunks                                                                          \
    ) {                                                                                                                \
        attend_decode<HEAD>(out, partial_out, partial_stats, arrivals, qkv, k_cache, v_cache, tables, sequences,       \
                            decode_list, sinks, {angles, q_norm, k_norm, epsilon, norm_mode, rotary_dim},              \
                            q_heads, kv_heads, columns, block_tokens, block_vectors, scale, softcap, window, chunks);  \
    }                                                                                                                  \
    KERNEL(128) attend_prefill_hd##HEAD(                                                                               \
        T* out, const T* qkv, const T* k_cache, const T* v_cache, const u32* tables, const uint4* sequences,           \
        const uint2* prefill_work, const float* sinks, u32 q_heads, u32 kv_heads, u32 columns, u32 block_tokens,       \
        u32 block_vectors, float scale, float softcap, u32 window, u32 chunks                                          \
    ) {                                                                                                                \
        attend_prefill<HEAD>(out, qkv, k_cache, v_cache, tables, sequences, prefill_work, sinks, q_heads, kv_heads,    \
                             columns, block_tokens, block_vectors, scale, softcap, window, chunks);                    \
    }

ATTEND(16)
ATTEND(32)
ATTEND(64)
ATTEND(80)
ATTEND(96)
ATTEND(128)
ATTEND(256)
ATTEND(512)

// Prefill of encoders, whose tokens also see tokens after them.
#define ATTEND_BOTH(HEAD)                                                                                              \
    KERNEL(128) attend_both_hd##HEAD(                                                                                  \
        T* out, const T* qkv, const T* k_cache, const T* v_cache, const u32* tables, const uint4* sequences,           \
        const uint2* prefill_work, const float* sinks, u32 q_heads, u32 kv_heads, u32 columns, u32 block_tokens,       \
        u32 block_vectors, float scale, float softcap, u32 window, u32 after                                           \
    ) {                                                                                                                \
        attend_prefill<HEAD, true>(out, qkv, k_cache, v_cache, tables, sequences, prefill_work, sinks, q_heads,        \
                                   kv_heads, columns, block_tokens, block_vectors, scale, softcap, window, 0, after);  \
    }

ATTEND_BOTH(32)
ATTEND_BOTH(64)
ATTEND_BOTH(256)
