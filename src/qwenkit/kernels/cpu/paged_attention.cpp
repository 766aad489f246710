// Causal attention over a paged cache (arXiv 2309.06180, 2305.13245), fp32.
//
// A query sees the first `limit` keys of its sequence. Its scores, their maximum, their sum and
// the weighted sum of values are each taken in the order of the keys, by lanes, whatever else is
// in the call: a token's result is the same in any batch and any cut of the prompt into chunks.
// The queries of one token that share a key head go through the keys together.
#include <algorithm>
#include <cmath>
#include <limits>
#include <new>
#include <vector>

#include "simd.h"
#include "threads.h"

namespace qk {
namespace {

constexpr int together = lanes == 16 ? 4 : 2;  // queries whose four sums each fit the registers
constexpr int64_t run_tokens = 8;  // queries one after another, for which keys stay in cache

struct Cache {
    const float *keys, *values;
    int64_t blocks, block_tokens, kv_heads, head_dim;
};

// Keys and values of one head: key j lies at row rows[j].
struct Head {
    const float *keys, *values;
    const int64_t* rows;
    int64_t row_stride, head_dim;
};

// scores[i][j] = query i · key j, four keys at a time; four are written beyond the last at most.
template <int Queries>
void find_scores(const Head& head, const float* q, int64_t q_stride, int64_t limit, float* scores,
                 int64_t scores_stride) {
    for (int64_t j = 0; j < limit; j += 4) {
        const float* key[4];
        for (int r = 0; r < 4; r++) {
            key[r] = head.keys + head.rows[std::min(j + r, limit - 1)] * head.row_stride;
        }
        vec sums[Queries][4] = {};
        for (int64_t d = 0; d < head.head_dim; d += lanes) {
            int64_t left = head.head_dim - d;
            vec k[4];
            QK_UNROLL for (int r = 0; r < 4; r++) k[r] = load_some(key[r] + d, left);
            QK_UNROLL for (int i = 0; i < Queries; i++) {
                vec query = load_some(q + i * q_stride + d, left);
                QK_UNROLL for (int r = 0; r < 4; r++) sums[i][r] = fma(query, k[r], sums[i][r]);
            }
        }
        for (int i = 0; i < Queries; i++) sum4(sums[i], scores + i * scores_stride + j);
    }
}

// Scores to exp(scale · (score - maximum)); returns their sum. Room up to a whole vector is used.
float exponentiate(float* scores, int64_t limit, float scale) {
    int64_t padded = (limit + lanes - 1) / lanes * lanes;
    std::fill(scores + limit, scores + padded, -std::numeric_limits<float>::infinity());
    vec highest = load(scores);
    for (int64_t j = lanes; j < padded; j += lanes) highest = max(load(scores + j), highest);
    float by_lane[lanes];
    store(by_lane, highest);
    vec maximum = splat(*std::max_element(by_lane, by_lane + lanes));
    vec sums[4] = {};
    for (int64_t j = 0; j < padded; j += lanes) {
        vec weight = exponential((load(scores + j) - maximum) * splat(scale));
        store(scores + j, weight);
        sums[0] = sums[0] + weight;
    }
    float total[4];
    sum4(sums, total);
    return total[0];
}

// out[i] = Σ_j scores[i][j] · value j / totals[i].
template <int Queries>
void weigh_values(const Head& head, const float* scores, int64_t scores_stride, int64_t limit,
                  const float* totals, float* out) {
    for (int64_t d = 0; d < head.head_dim; d += 4 * lanes) {
        int64_t left = head.head_dim - d;
        vec sums[Queries][4] = {};
        for (int64_t j = 0; j < limit; j++) {
            const float* value = head.values + head.rows[j] * head.row_stride + d;
            vec v[4];
            QK_UNROLL for (int c = 0; c < 4; c++) {
                v[c] = load_some(value + c * lanes, left - c * lanes);
            }
            QK_UNROLL for (int i = 0; i < Queries; i++) {
                vec weight = splat(scores[i * scores_stride + j]);
                QK_UNROLL for (int c = 0; c < 4; c++) sums[i][c] = fma(weight, v[c], sums[i][c]);
            }
        }
        for (int i = 0; i < Queries; i++) {
            for (int c = 0; c < 4; c++) {
                store_some(out + i * head.head_dim + d + c * lanes, sums[i][c] / splat(totals[i]),
                           left - c * lanes);
            }
        }
    }
}

template <int Queries>
void attend(const Head& head, const float* q, int64_t q_stride, int64_t limit, float* scores,
            int64_t scores_stride, float* out) {
    find_scores<Queries>(head, q, q_stride, limit, scores, scores_stride);
    float scale = 1.0f / std::sqrt(static_cast<float>(head.head_dim));
    float totals[Queries];
    for (int i = 0; i < Queries; i++) {
        totals[i] = exponentiate(scores + i * scores_stride, limit, scale);
    }
    weigh_values<Queries>(head, scores, scores_stride, limit, totals, out);
}

struct Queries {
    const float* q;
    float* out;
    int64_t heads, token_stride, head_stride;
};

struct Sequence {
    int64_t first_token, query_length, kv_length;
    int64_t first_row, first_chunk;  // where it begins among all rows and all chunks of work
};

int64_t runs(int64_t query_length) { return (query_length + run_tokens - 1) / run_tokens; }

// All heads of a group for one token, at most `together` at a time.
void attend_group(const Head& head, const Queries& queries, int64_t token, int64_t first,
                  int64_t count, int64_t limit, float* scores, int64_t scores_stride) {
    for (int64_t i = 0, taken; i < count; i += taken) {
        taken = std::min<int64_t>(together, count - i);
        const float* q =
            queries.q + token * queries.token_stride + (first + i) * queries.head_stride;
        float* out = queries.out + (token * queries.heads + first + i) * head.head_dim;
        auto* go = taken == 1   ? attend<1>
                   : taken == 2 ? attend<2>
                   : taken == 3 ? attend<3>
                                : attend<4>;
        go(head, q, queries.head_stride, limit, scores, scores_stride, out);
    }
}

void attend_all(const Queries& queries, const Cache& cache, const std::vector<Sequence>& sequences,
                const std::vector<int64_t>& rows, float* memory, int64_t scores_stride,
                int threads) {
    int64_t group = queries.heads / cache.kv_heads;
    const Sequence& last = sequences.back();
    int64_t chunks = last.first_chunk + runs(last.query_length) * cache.kv_heads;
    parallel(chunks, threads, [&](int64_t chunk, int slot) {
        auto after = std::upper_bound(
            sequences.begin(), sequences.end(), chunk,
            [](int64_t wanted, const Sequence& other) { return wanted < other.first_chunk; });
        const Sequence& s = *(after - 1);
        int64_t kv_head = (chunk - s.first_chunk) % cache.kv_heads;
        int64_t run = (chunk - s.first_chunk) / cache.kv_heads;
        int64_t offset = kv_head * cache.head_dim;
        Head head{cache.keys + offset, cache.values + offset, rows.data() + s.first_row,
                  cache.kv_heads * cache.head_dim, cache.head_dim};
        int64_t end = std::min(s.query_length, (run + 1) * run_tokens);
        for (int64_t t = run * run_tokens; t < end; t++) {
            attend_group(head, queries, s.first_token + t, kv_head * group, group,
                         s.kv_length - s.query_length + t + 1,
                         memory + slot * together * scores_stride, scores_stride);
        }
    });
}

// Appends the cache rows of a sequence's tokens; false when its table leads out of the cache.
bool find_rows(const Cache& cache, const int64_t* table, int64_t kv_length,
               std::vector<int64_t>& rows) {
    for (int64_t j = 0; j < kv_length; j += cache.block_tokens, table++) {
        if (*table < 0 || *table >= cache.blocks) return false;
        int64_t count = std::min(kv_length - j, cache.block_tokens);
        for (int64_t i = 0; i < count; i++) rows.push_back(*table * cache.block_tokens + i);
    }
    return true;
}

}  // namespace
}  // namespace qk

// Caches are contiguous; rows of q and its heads lie `token_stride` and `head_stride` numbers
// apart; out is contiguous. The caller has made sure that tables are as wide as lengths need.
// 0, 1 when a table leads out of the cache, 2 when there is no memory.
QK_EXPORT int qk_paged_attention(const float* q, const float* keys, const float* values,
                                 const int64_t* tables, const int64_t* query_lengths,
                                 const int64_t* kv_lengths, float* out, int64_t sequence_count,
                                 int64_t table_stride, int64_t heads, int64_t token_stride,
                                 int64_t head_stride, int64_t blocks, int64_t block_tokens,
                                 int64_t kv_heads, int64_t head_dim, int threads) try {
    using namespace qk;
    Cache cache{keys, values, blocks, block_tokens, kv_heads, head_dim};
    std::vector<Sequence> sequences;
    std::vector<int64_t> rows;
    int64_t token = 0, chunk = 0, longest = 0, products = 0;
    for (int64_t s = 0; s < sequence_count; s++) {
        int64_t query_length = query_lengths[s], kv_length = kv_lengths[s];
        auto first_row = static_cast<int64_t>(rows.size());
        sequences.push_back({token, query_length, kv_length, first_row, chunk});
        if (!find_rows(cache, tables + s * table_stride, kv_length, rows)) return 1;
        token += query_length;
        chunk += runs(query_length) * kv_heads;
        longest = std::max(longest, kv_length);
        products += query_length * kv_length * heads * head_dim;
    }
    if (products < 50000) threads = 1;  // done before a helper could come
    int64_t scores_stride = (longest + 15) / 16 * 16;
    float* memory = scratch(scores_stride * together * threads);
    if (!memory) return 2;
    attend_all({q, out, heads, token_stride, head_stride}, cache, sequences, rows, memory,
               scores_stride, threads);
    return 0;
} catch (const std::bad_alloc&) {
    return 2;
}
