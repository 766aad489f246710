// Attention of some queries over one segment of keys: the arithmetic of paged attention.
//
// A segment is `segment_tokens` positions from a multiple of it on. Within one, each score is a
// chain over the numbers of a head, each weighted sum a chain over the keys, and maximum and sum
// of weights go by lanes from the segment's start: what comes out for a query depends on no other.
#pragma once

#include <cmath>
#include <limits>
#include <type_traits>

#include "kv_rows.h"

namespace qk {

constexpr int64_t segment_tokens = 256;  // a multiple of panel_tokens
constexpr int64_t panel_tokens = 4 * lanes;  // keys side by side in four vectors
constexpr int64_t step_tokens = 64;  // keys whose values stay in the nearest cache meanwhile

// Calls f with the constant n, which lies between 1 and Most.
template <int Most, class Function>
inline void with_constant(int64_t n, Function&& f) {
    if constexpr (Most > 1) {
        if (n < Most) return with_constant<Most - 1>(n, f);
    }
    f(std::integral_constant<int, Most>{});
}

// Queries of one key head: row r is head r % group of its token r / group. Of its sequence it sees
// the positions from lowest(r) to limit(r) - 1.
struct Rows {
    const float* q;
    int64_t q_stride, count, group, first_position, window;
    const float* slopes;  // of the group's heads, or null

    int64_t limit(int64_t r) const { return first_position + r / group + 1; }
    int64_t lowest(int64_t r) const {
        return window > 0 ? std::max<int64_t>(0, limit(r) - window) : 0;
    }
    bool sees(int64_t r, int64_t start) const {
        return start < limit(r) && lowest(r) < start + segment_tokens;
    }
};

// Where the keys and values of one head and one segment are. Positions count from the segment's
// start; only those from `first` to `last` - 1 may be read.
template <class T>
struct Segment {
    const T *keys, *values;
    const float *key_scales, *value_scales;  // at rows[j] / scale_step; null when there are none
    const int64_t* rows;  // offsets of the rows in the caches
    int64_t scale_step, start, first, last, head_dim;
};

// Memory of one thread.
struct Workplace {
    float *keys, *values, *scores, *factors, *value_scales;
    int64_t width;  // head_dim up to whole vectors
};

// What some keys give: weighted sums of values [rows, width], and of each row the maximum of its
// scores and the sum of its weights.
struct Partial {
    float *sums, *maxima, *totals;
};

// scores[i][j] = query i · key j · factors[j] for the keys of `Vectors` vectors.
template <int Count, int Vectors>
inline void score_tile(const float* q, int64_t q_stride, int64_t head_dim, const float* keys,
                       const float* factors, float* scores) {
    vec sums[Count][Vectors] = {};
    for (int64_t d = 0; d < head_dim; d++) {
        vec x[Count];
        QK_UNROLL for (int i = 0; i < Count; i++) x[i] = splat(q[i * q_stride + d]);
        QK_UNROLL for (int c = 0; c < Vectors; c++) {
            vec k = load(keys + d * panel_tokens + c * lanes);
            QK_UNROLL for (int i = 0; i < Count; i++) sums[i][c] = fma(x[i], k, sums[i][c]);
        }
    }
    QK_UNROLL for (int i = 0; i < Count; i++) {
        QK_UNROLL for (int c = 0; c < Vectors; c++) {
            store(scores + i * segment_tokens + c * lanes,
                  sums[i][c] * load(factors + c * lanes));
        }
    }
}

// sums[i] += Σ_j weights[i][j] · value j for `Vectors` vectors of the values' numbers; `left`
// numbers are there to be read.
template <int Count, int Vectors, bool Whole, class T>
inline void weigh_tile(const T* values, const int64_t* rows, int64_t first, int64_t last,
                       int64_t left, const float* weights, float* sums, int64_t width) {
    vec totals[Count][Vectors];
    QK_UNROLL for (int i = 0; i < Count; i++) {
        QK_UNROLL for (int c = 0; c < Vectors; c++) {
            totals[i][c] = load(sums + i * width + c * lanes);
        }
    }
    for (int64_t j = first; j < last; j++) {
        const T* value = values + rows[j];
        vec x[Count];
        QK_UNROLL for (int i = 0; i < Count; i++) x[i] = splat(weights[i * segment_tokens + j]);
        QK_UNROLL for (int c = 0; c < Vectors; c++) {
            vec v = Whole ? widened(value + c * lanes) : widened_some(value + c * lanes, left);
            QK_UNROLL for (int i = 0; i < Count; i++) totals[i][c] = fma(x[i], v, totals[i][c]);
        }
    }
    QK_UNROLL for (int i = 0; i < Count; i++) {
        QK_UNROLL for (int c = 0; c < Vectors; c++) {
            store(sums + i * width + c * lanes, totals[i][c]);
        }
    }
}

// All columns, as many vectors at a time as there are registers for.
template <int Count, class T>
inline void weigh_columns(const T* values, const int64_t* rows, int64_t first, int64_t last,
                          int64_t head_dim, const float* weights, float* sums, int64_t width) {
    int64_t d = 0;
    auto go = [&](auto vectors, auto whole) {
        weigh_tile<Count, vectors.value, whole.value>(values + d, rows, first, last, head_dim - d,
                                                      weights, sums + d, width);
        d += vectors.value * lanes;
    };
    std::integral_constant<int, 4> four;
    std::integral_constant<int, 2> two;
    std::integral_constant<int, 1> one;
    while (head_dim - d >= 4 * lanes) go(four, std::true_type{});
    if (head_dim - d >= 2 * lanes) go(two, std::true_type{});
    if (head_dim - d >= lanes) go(one, std::true_type{});
    if (head_dim > d) go(one, std::false_type{});
}

inline const float* counting() {
    struct Table {
        float numbers[segment_tokens];
        constexpr Table() : numbers() {
            for (int64_t i = 0; i < segment_tokens; i++) numbers[i] = static_cast<float>(i);
        }
    };
    static constexpr Table table;
    return table.numbers;
}

// Scores from `first` to `last` - 1 become exp(score - their maximum), all others from `begin` to
// `end` - 1 zero. Whole vectors around that are written.
inline void weigh_scores(float* scores, int64_t first, int64_t last, int64_t begin, int64_t end,
                         float& maximum, float& total) {
    int64_t from = first / lanes * lanes, to = (last + lanes - 1) / lanes * lanes;
    std::fill(scores + from, scores + first, -std::numeric_limits<float>::infinity());
    std::fill(scores + last, scores + to, -std::numeric_limits<float>::infinity());
    vec highest = load(scores + from);
    for (int64_t j = from + lanes; j < to; j += lanes) highest = max(load(scores + j), highest);
    float by_lane[lanes];
    store(by_lane, highest);
    maximum = *std::max_element(by_lane, by_lane + lanes);
    vec sums[4] = {};
    for (int64_t j = from; j < to; j += lanes) {
        store(scores + j, exponential(load(scores + j) - splat(maximum)));
    }
    std::fill(scores + std::min(from, begin), scores + first, 0.0f);  // exp(-∞) is not quite zero
    std::fill(scores + last, scores + std::max(to, end), 0.0f);
    for (int64_t j = from; j < to; j += lanes) sums[0] = sums[0] + load(scores + j);
    float totals[4];
    sum4(sums, totals);
    total = totals[0];
}

// scores[j] += slope · (position of key j - `position`), counted from the segment's start.
inline void add_distances(float* scores, int64_t first, int64_t last, float slope,
                          int64_t position) {
    vec here = splat(static_cast<float>(position));
    for (int64_t j = first / lanes * lanes; j < last; j += lanes) {
        store(scores + j, load(scores + j) + splat(slope) * (load(counting() + j) - here));
    }
}

// The part of a segment that queries begin … end - 1 of `rows` see, any of them.
struct Range {
    int64_t first, last;
};

template <class T>
Range seen(const Rows& rows, int64_t begin, int64_t end, const Segment<T>& segment) {
    return {std::max(rows.lowest(begin) - segment.start, segment.first),
            std::min(rows.limit(end - 1) - segment.start, segment.last)};
}

// Keys into panels [number][panel_tokens], and factors by which to multiply what they give.
template <class T>
void pack_keys(const Segment<T>& segment, float scale, const Workplace& place) {
    int64_t from = segment.first / lanes * lanes;
    for (int64_t j = from; j < segment.last; j += lanes) {
        const T* here[lanes];
        for (int64_t i = 0; i < lanes; i++) {  // never a key that nobody sees
            int64_t row = std::min(std::max(j + i, segment.first), segment.last - 1);
            int64_t offset = segment.rows[row];
            here[i] = segment.keys + offset;
            place.factors[j + i] = scale;
            if (segment.key_scales) {
                place.factors[j + i] *= segment.key_scales[offset / segment.scale_step];
            }
        }
        float* panel = place.keys + j / panel_tokens * panel_tokens * segment.head_dim;
        transpose_rows(here, segment.head_dim, panel + j % panel_tokens, panel_tokens);
    }
}

template <class T>
void find_scores(const Segment<T>& segment, const Rows& rows, int64_t tiles,
                 const Workplace& place) {
    for (int64_t panel = segment.first / panel_tokens * panel_tokens; panel < segment.last;
         panel += panel_tokens) {
        const float* keys = place.keys + panel * segment.head_dim;
        for (int64_t tile = 0; tile < tiles; tile++) {
            int64_t begin = tile * rows.count / tiles, end = (tile + 1) * rows.count / tiles;
            Range range = seen(rows, begin, end, segment);
            int64_t from = std::max(range.first / lanes * lanes, panel);
            int64_t to = std::min(range.last, panel + panel_tokens);
            with_constant<tile_tokens>(end - begin, [&](auto count) {
                auto go = [&](auto vectors) {
                    score_tile<count.value, vectors.value>(
                        rows.q + begin * rows.q_stride, rows.q_stride, segment.head_dim,
                        keys + from - panel, place.factors + from,
                        place.scores + begin * segment_tokens + from);
                    from += vectors.value * lanes;
                };
                if (to - from > 3 * lanes) go(std::integral_constant<int, 4>{});
                while (from < to) go(std::integral_constant<int, 1>{});
            });
        }
    }
}

// Scores to weights, row by row, each with the zeros that its tile needs.
template <class T>
void find_weights(const Segment<T>& segment, const Rows& rows, int64_t begin, int64_t end,
                  const Workplace& place, const Partial& partial) {
    Range tile = seen(rows, begin, end, segment);
    for (int64_t r = begin; r < end; r++) {
        float* scores = place.scores + r * segment_tokens;
        Range own = seen(rows, r, r + 1, segment);
        if (own.first >= own.last) {
            std::fill(scores + tile.first, scores + std::max(tile.first, tile.last), 0.0f);
            continue;
        }
        if (rows.slopes) {
            add_distances(scores, own.first, own.last, rows.slopes[r % rows.group],
                          rows.limit(r) - 1 - segment.start);
        }
        weigh_scores(scores, own.first, own.last, tile.first, tile.last, partial.maxima[r],
                     partial.totals[r]);
        if (segment.value_scales) {
            for (int64_t j = tile.first / lanes * lanes; j < tile.last; j += lanes) {
                store(scores + j, load(scores + j) * load(place.value_scales + j));
            }
        }
    }
}

// values of `Value` at `offsets`, which are the segment's own or a copy.
template <class T, class Value>
void weigh_values(const Value* values, const int64_t* offsets, const Segment<T>& segment,
                  const Rows& rows, int64_t tiles, const Workplace& place, float* sums) {
    std::fill(sums, sums + rows.count * place.width, 0.0f);
    for (int64_t step = segment.first / step_tokens * step_tokens; step < segment.last;
         step += step_tokens) {
        for (int64_t tile = 0; tile < tiles; tile++) {
            int64_t begin = tile * rows.count / tiles, end = (tile + 1) * rows.count / tiles;
            Range range = seen(rows, begin, end, segment);
            int64_t first = std::max(range.first, step);
            int64_t last = std::min(range.last, step + step_tokens);
            if (first >= last) continue;
            with_constant<tile_tokens>(end - begin, [&](auto count) {
                weigh_columns<count.value>(values, offsets, first, last, segment.head_dim,
                                           place.scores + begin * segment_tokens,
                                           sums + begin * place.width, place.width);
            });
        }
    }
}

// Values as fp32, one after another; offsets[j] is where number j then lies.
template <class T>
void pack_values(const Segment<T>& segment, const Workplace& place, int64_t* offsets) {
    for (int64_t j = segment.first; j < segment.last; j++) {
        const T* value = segment.values + segment.rows[j];
        offsets[j] = j * place.width;
        widen_row(value, segment.head_dim, place.values + offsets[j]);
    }
}

// One segment's part of the result of every row that sees it.
template <class T>
void attend_segment(const Segment<T>& segment, const Rows& rows, float scale,
                    const Workplace& place, const Partial& partial) {
    int64_t tiles = (rows.count + tile_tokens - 1) / tile_tokens;
    pack_keys(segment, scale, place);
    find_scores(segment, rows, tiles, place);
    if (segment.value_scales) {
        std::fill(place.value_scales, place.value_scales + segment_tokens, 0.0f);
        for (int64_t j = segment.first; j < segment.last; j++) {
            place.value_scales[j] = segment.value_scales[segment.rows[j] / segment.scale_step];
        }
    }
    for (int64_t tile = 0; tile < tiles; tile++) {
        int64_t begin = tile * rows.count / tiles, end = (tile + 1) * rows.count / tiles;
        find_weights(segment, rows, begin, end, place, partial);
    }
    if constexpr (!std::is_same_v<T, uint8_t>) {
        if (tiles <= 2) {  // too few queries for a copy to be worth it
            weigh_values(segment.values, segment.rows, segment, rows, tiles, place, partial.sums);
            return;
        }
    }
    int64_t offsets[segment_tokens];
    pack_values(segment, place, offsets);
    weigh_values<T, float>(place.values, offsets, segment, rows, tiles, place, partial.sums);
}

}  // namespace qk
