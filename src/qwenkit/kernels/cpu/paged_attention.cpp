// Causal attention over a paged cache (arXiv 2309.06180, 2305.13245) of keys and values kept as
// fp32, bf16, int8 or four bits; blocked, with a running maximum (arXiv 2205.14135). In fp32; over bf16 the
// queries are rounded to bf16 too, and where there is a tile unit, products are its own.
//
// The keys of a sequence are cut into segments at fixed positions. A query's result of each is
// computed by itself and merged with those before it, in their order: the same bits in any batch,
// any cut of the prompt into chunks and on any number of threads. An item of work is one key head
// and some neighbouring queries of a sequence; where there are too few for all threads, their
// segments are computed apart and merged at the end.
#include "attention_amx.h"
#include "attention_tile.h"
#include "threads.h"

// Caches, scales and out are contiguous; rows of q and its heads lie `token_stride` and
// `head_stride` numbers apart. Scales and slopes may be null; `kind` is 0 for fp32, 1 for bf16, 2
// for int8, 3 for four bits. `table_width` is the number of blocks that a table has room for.
struct PagedAttentionArguments {
    const float* q;
    const void *keys, *values;
    const float *key_scales, *value_scales, *slopes;
    const int64_t *tables, *query_lengths, *kv_lengths;
    float* out;
    int64_t sequences, tokens, table_width, heads, token_stride, head_stride, blocks, block_tokens,
        kv_heads, head_dim, window, kind, threads;
    float scale;
};

namespace qk {
namespace {

using Arguments = PagedAttentionArguments;

#ifdef QK_TILES
constexpr bool has_tiles = true;
#else
constexpr bool has_tiles = false;
#endif

enum Status { fine, table_leads_outside, no_memory, lengths_do_not_fit };

constexpr int64_t most_rows = 16 * tile_tokens;  // queries of an item, unless a group has more
constexpr int64_t most_rows_in_tiles = 256;
constexpr int64_t most_apart = 1 << 22;          // numbers kept for segments computed apart
constexpr int64_t items_per_thread = 8;          // enough for an even share of uneven ones
constexpr int64_t worth_a_thread = 100000;       // products; less is done before a helper comes

struct Sequence {
    const int64_t* table;
    int64_t first_token, query_length, kv_length, first_item;
};

// Numbers of scratch memory for one thread, beside the results of a segment and so far.
struct Sizes {
    int64_t keys, values, scores, factors, value_scales, queries;
};

// How a call is cut up. `rows` and `segments` are the most that an item has; `apart`: each of them
// is work of its own.
struct Plan {
    Sequence* sequences;
    int64_t items, products, group, run_tokens, rows, width, depth, segments;
    Sizes sizes;
    bool apart, in_tiles;

    int64_t partial_size() const { return rows * (width + 2); }
};

struct Item {
    Rows rows;
    const int64_t* table;
    int64_t kv_head, first_token;  // the token of its first query among all
};

int64_t whole_lines(int64_t numbers) { return (numbers + 15) / 16 * 16; }

int64_t place_size(const Plan& plan) {
    const Sizes& s = plan.sizes;
    return whole_lines(s.keys) + whole_lines(s.values) + whole_lines(s.scores) +
           whole_lines(s.factors) + whole_lines(s.value_scales) + whole_lines(s.queries) +
           2 * whole_lines(plan.partial_size());
}

Partial partial_at(const Plan& plan, float* memory) {
    float* maxima = memory + plan.rows * plan.width;
    return {memory, maxima, maxima + plan.rows};
}

Item find_item(const Arguments& a, const Plan& plan, int64_t index) {
    const Sequence* after = std::upper_bound(
        plan.sequences, plan.sequences + a.sequences, index,
        [](int64_t wanted, const Sequence& other) { return wanted < other.first_item; });
    const Sequence& s = after[-1];
    int64_t kv_head = (index - s.first_item) % a.kv_heads;
    int64_t token = (index - s.first_item) / a.kv_heads * plan.run_tokens;
    int64_t count = std::min(plan.run_tokens, s.query_length - token);
    const float* q = a.q + (s.first_token + token) * a.token_stride +
                     kv_head * plan.group * a.head_stride;
    const float* slopes = a.slopes ? a.slopes + kv_head * plan.group : nullptr;
    return {{q, a.head_stride, count * plan.group, plan.group,
             s.kv_length - s.query_length + token, a.window, slopes},
            s.table,
            kv_head,
            s.first_token + token};
}

// The queries one after another, each rounded as a bf16 cache's keys were: as numbers of fp32, or
// for tiles as bf16 with zeros after them.
void gather(const Arguments& a, const Plan& plan, Rows& rows, float* memory) {
    bool rounded = a.kind == 1;
    if (rows.count == rows.group && !rounded) return;
    auto* halves = reinterpret_cast<uint16_t*>(memory);
    for (int64_t r = 0; r < rows.count; r++) {
        const float* q = rows.q + r / rows.group * a.token_stride + r % rows.group * a.head_stride;
        if (plan.in_tiles) {
            uint16_t* to = halves + r * plan.depth;
            std::transform(q, q + a.head_dim, to, narrowed);
            std::fill(to + a.head_dim, to + plan.depth, uint16_t{0});
        } else {
            float* to = memory + r * a.head_dim;
            std::transform(q, q + a.head_dim, to,
                           [=](float x) { return rounded ? widened_one(narrowed(x)) : x; });
        }
    }
    rows.q = memory;
    rows.q_stride = a.head_dim;
}

struct Memory {
    Workplace place;
    float* queries;
    Partial next, sum;
};

// Where an item's keys and values of the segment from `start` on lie.
template <class T>
Segment<T> find_segment(const Arguments& a, const Item& item, int64_t start, int64_t* offsets) {
    int64_t first = std::max(item.rows.lowest(0) - start, int64_t{0});
    int64_t last = std::min(item.rows.limit(item.rows.count - 1) - start, segment_tokens);
    int64_t size = row_size<T>(a.head_dim), step = a.kv_heads * size;
    for (int64_t j = first; j < last;) {  // a block at a time
        int64_t block = item.table[(start + j) / a.block_tokens];
        int64_t within = (start + j) % a.block_tokens;
        int64_t row = (block * a.block_tokens + within) * step + item.kv_head * size;
        int64_t end = std::min(last, j + a.block_tokens - within);
        for (; j < end; j++, row += step) offsets[j] = row;
    }
    return {static_cast<const T*>(a.keys), static_cast<const T*>(a.values),
            a.key_scales, a.value_scales, offsets, size, start, first, last, a.head_dim};
}

template <class T>
void attend_segment_of(const Arguments& a, const Item& item, int64_t start, const Memory& memory,
                       const Partial& partial) {
    int64_t offsets[segment_tokens];
    auto segment = find_segment<T>(a, item, start, offsets);
    attend_segment(segment, item.rows, a.scale, memory.place, partial);
}

void attend_tiles(const Arguments& a, const Plan& plan, const Item& item, int64_t start,
                  const Memory& memory, const Partial& partial) {
#ifdef QK_TILES
    int64_t offsets[segment_tokens];
    auto segment = find_segment<uint16_t>(a, item, start, offsets);
    const Workplace& place = memory.place;
    TilePlace tiles{reinterpret_cast<uint32_t*>(place.keys),
                    reinterpret_cast<uint32_t*>(place.values),
                    place.scores,
                    reinterpret_cast<uint16_t*>(place.factors),
                    plan.depth,
                    plan.width};
    auto* queries = reinterpret_cast<const uint16_t*>(memory.queries);
    attend_segment_in_tiles(segment, item.rows, queries, a.scale, tiles, partial);
#endif
}

void attend_segment_as(const Arguments& a, const Plan& plan, const Item& item, int64_t start,
                       const Memory& memory, const Partial& partial) {
    if (plan.in_tiles) return attend_tiles(a, plan, item, start, memory, partial);
    auto* go = a.kind == 0   ? attend_segment_of<float>
               : a.kind == 1 ? attend_segment_of<uint16_t>
               : a.kind == 2 ? attend_segment_of<int8_t>
                             : attend_segment_of<uint8_t>;
    go(a, item, start, memory, partial);
}

// The result so far and that of the next segment, each scaled to the maximum of both.
void merge(const Rows& rows, int64_t start, const Plan& plan, const Partial& sum,
           const Partial& next) {
    const vec unit = splat(plan.in_tiles ? ln_2 : 1.0f);
    for (int64_t begin = 0; begin < rows.count; begin += lanes) {
        vec mark = load(sum.maxima + begin), other = load(next.maxima + begin);
        vec highest = max(mark, other);
        float maxima[lanes], mine[lanes], theirs[lanes];
        store(maxima, highest);
        store(mine, exponential((mark - highest) * unit));
        store(theirs, exponential((other - highest) * unit));
        for (int64_t r = begin; r < std::min(rows.count, begin + lanes); r++) {
            if (!rows.sees(r, start)) continue;
            float *sums = sum.sums + r * plan.width, *others = next.sums + r * plan.width;
            if (rows.lowest(r) >= start) {  // the first that this query sees
                std::copy(others, others + plan.width, sums);
                sum.maxima[r] = next.maxima[r];
                sum.totals[r] = next.totals[r];
                continue;
            }
            vec scale = splat(mine[r - begin]), other_scale = splat(theirs[r - begin]);
            for (int64_t d = 0; d < plan.width; d += lanes) {
                store(sums + d, fma(load(others + d), other_scale, load(sums + d) * scale));
            }
            sum.maxima[r] = maxima[r - begin];
            sum.totals[r] = sum.totals[r] * mine[r - begin] + next.totals[r] * theirs[r - begin];
        }
    }
}

void finish(const Arguments& a, const Item& item, int64_t width, const Partial& sum) {
    for (int64_t r = 0; r < item.rows.count; r++) {
        int64_t group = item.rows.group, head = item.kv_head * group + r % group;
        float* out = a.out + ((item.first_token + r / group) * a.heads + head) * a.head_dim;
        vec total = splat(sum.totals[r]);
        for (int64_t d = 0; d < a.head_dim; d += lanes) {
            store_some(out + d, load(sum.sums + r * width + d) / total, a.head_dim - d);
        }
    }
}

int64_t first_segment(const Rows& rows) { return rows.lowest(0) / segment_tokens; }
int64_t last_segment(const Rows& rows) {
    return (rows.limit(rows.count - 1) - 1) / segment_tokens;
}

Memory place_at(const Plan& plan, float* memory) {
    auto take = [&](int64_t count) {
        float* taken = memory;
        memory += whole_lines(count);
        return taken;
    };
    const Sizes& s = plan.sizes;
    Workplace place{take(s.keys),    take(s.values),       take(s.scores),
                    take(s.factors), take(s.value_scales), plan.width};
    float* queries = take(s.queries);
    Partial next = partial_at(plan, take(plan.partial_size()));
    return {place, queries, next, partial_at(plan, take(plan.partial_size()))};
}

void attend_whole(const Arguments& a, const Plan& plan, int64_t index, const Memory& memory) {
    Item item = find_item(a, plan, index);
    gather(a, plan, item.rows, memory.queries);
    int64_t first = first_segment(item.rows);
    bool all_see_it = item.rows.sees(item.rows.count - 1, first * segment_tokens);
    if (all_see_it) attend_segment_as(a, plan, item, first * segment_tokens, memory, memory.sum);
    for (int64_t s = first + all_see_it; s <= last_segment(item.rows); s++) {
        attend_segment_as(a, plan, item, s * segment_tokens, memory, memory.next);
        merge(item.rows, s * segment_tokens, plan, memory.sum, memory.next);
    }
    finish(a, item, plan.width, memory.sum);
}

void attend_apart(const Arguments& a, const Plan& plan, int64_t index, int64_t segment,
                  const Memory& memory, float* partials) {
    Item item = find_item(a, plan, index);
    if (segment < first_segment(item.rows) || segment > last_segment(item.rows)) return;
    gather(a, plan, item.rows, memory.queries);
    float* result = partials + (index * plan.segments + segment) * plan.partial_size();
    attend_segment_as(a, plan, item, segment * segment_tokens, memory, partial_at(plan, result));
}

void merge_item(const Arguments& a, const Plan& plan, int64_t index, const Partial& sum,
                float* partials) {
    Item item = find_item(a, plan, index);
    for (int64_t s = first_segment(item.rows); s <= last_segment(item.rows); s++) {
        float* result = partials + (index * plan.segments + s) * plan.partial_size();
        merge(item.rows, s * segment_tokens, plan, sum, partial_at(plan, result));
    }
    finish(a, item, plan.width, sum);
}

// What tiles need: halves instead of numbers, scores of some rows at a time.
void measure_tiles(const Arguments& a, Plan& plan) {
    plan.depth = (a.head_dim + product_length - 1) / product_length * product_length;
    plan.sizes = {segment_tokens * plan.depth / 2, segment_tokens * plan.width / 2,
                  segment_tokens * tile_rows,      segment_tokens * tile_rows / 2,
                  0,                               plan.rows * plan.depth / 2};
}

// The sizes of a call; false when a length does not fit its table or the queries.
bool measure(const Arguments& a, Plan& plan) {
    int64_t tokens = 0, most_queries = 1, longest = 1;
    for (int64_t s = 0; s < a.sequences; s++) {
        int64_t query_length = a.query_lengths[s], kv_length = a.kv_lengths[s];
        if (query_length < 1 || kv_length < query_length || query_length > a.tokens - tokens ||
            kv_length > a.table_width * a.block_tokens) {
            return false;
        }
        tokens += query_length;
        most_queries = std::max(most_queries, query_length);
        longest = std::max(longest, kv_length);
    }
    plan.group = a.heads / a.kv_heads;
    plan.in_tiles = has_tiles && a.kind == 1 && a.scale > 0;
    int64_t most = plan.in_tiles ? most_rows_in_tiles : most_rows;
    plan.run_tokens = std::min(std::max<int64_t>(1, most / plan.group), most_queries);
    plan.rows = (plan.run_tokens * plan.group + lanes - 1) / lanes * lanes;
    plan.width = (a.head_dim + lanes - 1) / lanes * lanes;
    plan.sizes = {segment_tokens * a.head_dim, segment_tokens * plan.width,
                  segment_tokens * plan.rows,  segment_tokens,
                  segment_tokens,              plan.rows * a.head_dim};
    if (plan.in_tiles) measure_tiles(a, plan);
    plan.segments = (longest + segment_tokens - 1) / segment_tokens;
    plan.items = plan.products = 0;
    for (int64_t s = 0; s < a.sequences; s++) {
        int64_t count = (a.query_lengths[s] + plan.run_tokens - 1) / plan.run_tokens;
        plan.items += count * a.kv_heads;
        int64_t keys = a.kv_lengths[s];
        if (a.window > 0) keys = std::min(keys, a.window + a.query_lengths[s]);
        plan.products += a.query_lengths[s] * keys * a.heads * a.head_dim;
    }
    return tokens == a.tokens;
}

// False when a table leads out of the cache where a query still needs it.
bool list_sequences(const Arguments& a, const Plan& plan) {
    int64_t token = 0, item = 0;
    for (int64_t i = 0; i < a.sequences; i++) {
        const int64_t* table = a.tables + i * a.table_width;
        int64_t query_length = a.query_lengths[i], kv_length = a.kv_lengths[i];
        int64_t hidden = a.window > 0 ? kv_length - query_length + 1 - a.window : 0;
        int64_t block = std::max<int64_t>(0, hidden) / a.block_tokens;
        for (; block * a.block_tokens < kv_length; block++) {
            if (table[block] < 0 || table[block] >= a.blocks) return false;
        }
        plan.sequences[i] = {table, token, query_length, kv_length, item};
        token += query_length;
        item += (query_length + plan.run_tokens - 1) / plan.run_tokens * a.kv_heads;
    }
    return true;
}

// Long runs of a prompt come last, so the last items are begun first.
void attend_all(const Arguments& a, const Plan& plan, int threads, float* memory,
                float* partials) {
    int64_t size = place_size(plan);
    if (!plan.apart) {
        return parallel(plan.items, threads, [&](int64_t chunk, int slot) {
            attend_whole(a, plan, plan.items - 1 - chunk, place_at(plan, memory + slot * size));
        });
    }
    parallel(plan.items * plan.segments, threads, [&](int64_t chunk, int slot) {
        // The heads of one segment one after another: their keys are neighbours in memory.
        int64_t head = chunk % a.kv_heads, segment = chunk / a.kv_heads % plan.segments;
        int64_t run = chunk / a.kv_heads / plan.segments;
        attend_apart(a, plan, run * a.kv_heads + head, segment,
                     place_at(plan, memory + slot * size), partials);
    });
    for (int64_t item = 0; item < plan.items; item++) {
        merge_item(a, plan, item, place_at(plan, memory).sum, partials);
    }
}

Status attend(const Arguments& a) {
    Plan plan{};
    if (!measure(a, plan)) return lengths_do_not_fit;
    int threads = plan.products < worth_a_thread ? 1 : static_cast<int>(a.threads);
    int64_t partials = plan.items * plan.segments * plan.partial_size();
    plan.apart = threads > 1 && plan.segments > 1 && partials <= most_apart &&
                 plan.items < items_per_thread * threads;
    auto listed = static_cast<int64_t>(sizeof(Sequence) / sizeof(float)) * a.sequences;
    listed = (listed + 15) / 16 * 16;
    int64_t places = threads * place_size(plan);
    float* memory = scratch(static_cast<size_t>(listed + places + (plan.apart ? partials : 0)));
    if (!memory) return no_memory;
    plan.sequences = reinterpret_cast<Sequence*>(memory);
    if (!list_sequences(a, plan)) return table_leads_outside;
    attend_all(a, plan, threads, memory + listed, memory + listed + places);
    return fine;
}

}  // namespace
}  // namespace qk

QK_EXPORT int qk_paged_attention(const PagedAttentionArguments* a) { return qk::attend(*a); }
