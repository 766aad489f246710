// Attention of some queries over one segment of a bf16 cache, on the tile unit.
//
// Queries are rounded to bf16 as the keys were; scores, maxima, exponentials and sums are fp32, the
// weights of the values are rounded to bf16 and it is these rounded ones that are summed up, so
// that a row's weights add up to one. Products are added up by tile instructions alone, 32 at a
// time from the segment's start, for one query as for many: a result is the same bits either way.
#pragma once

#include "attention_tile.h"
#include "packed_amx.h"

namespace qk {

constexpr int64_t product_length = 32;  // numbers that one tile instruction adds up
constexpr int64_t tile_queries = 16, tile_rows = 2 * tile_queries;  // of one tile, and at a time
constexpr float log2_e = 1.44269504f, ln_2 = 0.693147181f;

#ifdef QK_TILES

constexpr int64_t keys_ahead = 32;  // asked for before they are needed
constexpr int64_t panel_words = tile_side / 2;  // a panel's words for each number of its length

// Memory of one thread. Panels are [length / 2][16] words, each a pair of bf16 numbers: sixteen keys
// side by side over `depth` numbers, or sixteen numbers side by side over the segment's values.
struct TilePlace {
    uint32_t *keys, *values;
    float* scores;      // [tile_rows, segment_tokens]
    uint16_t* weights;  // the same
    int64_t depth, width;  // head_dim up to whole products and up to whole tiles
};

// out[16 · Blocks][16 · Panels] = a · b for rows of a and panels of b, `length` numbers long.
template <int Blocks, int Panels>
inline void multiply_tiles(const uint16_t* a, int64_t a_stride, const uint32_t* b,
                           int64_t panel_size, int64_t length, float* out, int64_t out_stride) {
    asm volatile("" ::: "memory");  // what a tile loads has been stored: GCC does not see the loads
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t i = 0; i < length; i += product_length) {
        _tile_loadd(4, a + i, a_stride * 2);
        _tile_loadd(6, b + i * panel_words, 64);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (Panels == 2) {
            _tile_loadd(7, b + panel_size + i * panel_words, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (Blocks == 2) {
            _tile_loadd(5, a + tile_side * a_stride + i, a_stride * 2);
            _tile_dpbf16ps(2, 5, 6);
            if constexpr (Panels == 2) _tile_dpbf16ps(3, 5, 7);
        }
    }
    float* below = out + tile_side * out_stride;
    _tile_stored(0, out, out_stride * 4);
    if constexpr (Panels == 2) _tile_stored(1, out + tile_side, out_stride * 4);
    if constexpr (Blocks == 2) _tile_stored(2, below, out_stride * 4);
    if constexpr (Blocks == 2 && Panels == 2) _tile_stored(3, below + tile_side, out_stride * 4);
}

// A row of a head on its way from memory: rows lie too far apart for the processor to foresee.
inline void ask_for(const uint16_t* row, int64_t head_dim) {
    for (int64_t d = 0; d < head_dim; d += 32) __builtin_prefetch(row + d, 0, 2);
}

// Keys `first` … `last` - 1, both multiples of 16, into panels; values are needed next.
inline void pack_key_panels(const Segment<uint16_t>& segment, Range range, const TilePlace& place) {
    for (int64_t j = range.first; j < range.last; j += tile_side) {
        const uint16_t* keys[tile_side];
        for (int64_t i = 0; i < tile_side; i++) {  // never a key that nobody sees
            int64_t row = std::min(std::max(j + i, segment.first), segment.last - 1);
            int64_t later = std::min(row + keys_ahead, segment.last - 1);
            keys[i] = segment.keys + segment.rows[row];
            ask_for(segment.keys + segment.rows[later], segment.head_dim);
            ask_for(segment.values + segment.rows[row], segment.head_dim);
        }
        uint32_t* panel = place.keys + j * place.depth / 2;
        for (int64_t d = 0; d < place.depth; d += 8) {
            uint16_t padded[tile_side][8] = {};
            const uint8_t* here[tile_side];
            int64_t left = std::max<int64_t>(0, std::min<int64_t>(8, segment.head_dim - d));
            for (int i = 0; i < tile_side; i++) {
                if (left < 8) std::copy(keys[i] + d, keys[i] + d + left, padded[i]);
                here[i] = reinterpret_cast<const uint8_t*>(left < 8 ? padded[i] : keys[i] + d);
            }
            lane_words words[4];
            transpose(here, words);
            std::memcpy(panel + d * panel_words, words, sizeof words);
        }
    }
}

// Sixteen numbers, or those that are left, as words; a row that nobody sees is zeros.
inline lane_words value_words(const Segment<uint16_t>& segment, int64_t j, int64_t d) {
    lane_halves numbers{};
    if (j >= segment.first && j < segment.last) {
        int64_t left = std::min<int64_t>(lanes, segment.head_dim - d);
        const uint16_t* value = segment.values + segment.rows[j] + d;
        if (left == lanes) {
            std::memcpy(&numbers, value, sizeof numbers);
        } else {
            std::memcpy(&numbers, value, static_cast<size_t>(left) * 2);
        }
    }
    return __builtin_convertvector(numbers, lane_words);
}

inline void pack_value_panels(const Segment<uint16_t>& segment, Range range,
                              const TilePlace& place) {
    for (int64_t j = range.first; j < range.last; j += 2) {
        for (int64_t d = 0; d < place.width; d += tile_side) {
            lane_words pairs =
                value_words(segment, j, d) | value_words(segment, j + 1, d) << 16;
            std::memcpy(place.values + d * segment_tokens / 2 + j * panel_words, &pairs,
                        sizeof pairs);
        }
    }
}

// 2^x for x up to about 0, 0 for -∞: a polynomial in the fraction, within 8·10^-5, which is little
// beside the rounding to bf16 that follows.
inline vec power(vec x) {
    vec fraction = _mm512_reduce_ps(x, 0x09);  // x - floor(x)
    vec series = splat(0.0780245200f);
    for (float term : {0.226067159f, 0.695833539f, 0.999925219f}) {
        series = fma(series, fraction, splat(term));
    }
    return _mm512_scalef_ps(series, x);
}

// Scores of one row to weights in bf16: 2^(factor · score - maximum), zeros for the keys of the
// tile that are not its own.
inline void weigh_row(float* scores, Range own, Range tile, float factor, uint16_t* weights,
                      float& maximum, float& total) {
    constexpr float hidden = -std::numeric_limits<float>::infinity();
    std::fill(scores + tile.first, scores + own.first, hidden);
    std::fill(scores + own.last, scores + tile.last, hidden);
    vec highest[2] = {load(scores + tile.first), load(scores + tile.first + lanes)};
    for (int64_t j = tile.first + product_length; j < tile.last; j += product_length) {
        highest[0] = max(load(scores + j), highest[0]);
        highest[1] = max(load(scores + j + lanes), highest[1]);
    }
    maximum = _mm512_reduce_max_ps(max(highest[0], highest[1])) * factor;
    vec shift = splat(-maximum), scale = splat(factor), sums[4] = {};
    const auto ones = (__m512bh)_mm512_set1_epi16(0x3f80);
    for (int64_t j = tile.first; j < tile.last; j += product_length) {
        vec low = power(fma(load(scores + j), scale, shift));
        vec high = power(fma(load(scores + j + lanes), scale, shift));
        __m512bh rounded = _mm512_cvtne2ps_pbh(high, low);
        std::memcpy(weights + j, &rounded, sizeof rounded);
        sums[0] = _mm512_dpbf16_ps(sums[0], rounded, ones);
    }
    float totals[4];
    sum4(sums, totals);
    total = totals[0];
}

// The weights of rows `begin` … `end` - 1, whose scores are in place.
inline void weigh_rows(const Segment<uint16_t>& segment, const Rows& rows, int64_t begin,
                       int64_t end, Range tile, float scale, const TilePlace& place,
                       const Partial& partial) {
    for (int64_t r = begin; r < end; r++) {
        float* scores = place.scores + (r - begin) * segment_tokens;
        uint16_t* weights = place.weights + (r - begin) * segment_tokens;
        Range own = seen(rows, r, r + 1, segment);
        if (own.first >= own.last) {
            std::fill(weights + tile.first, weights + tile.last, uint16_t{0});
            continue;
        }
        float factor = scale * log2_e;
        if (rows.slopes) {
            for (int64_t j = tile.first; j < tile.last; j += lanes) {
                store(scores + j, load(scores + j) * splat(scale));
            }
            add_distances(scores, own.first, own.last, rows.slopes[r % rows.group],
                          rows.limit(r) - 1 - segment.start);
            factor = log2_e;
        }
        weigh_row(scores, own, tile, factor, weights, partial.maxima[r], partial.totals[r]);
    }
}

// Sixteen or 32 queries, the last of them perhaps zeros.
template <int Blocks>
void attend_rows(const Segment<uint16_t>& segment, const Rows& rows, const uint16_t* queries,
                 int64_t begin, Range tile, float scale, const TilePlace& place,
                 const Partial& partial) {
    int64_t key_panel = place.depth * panel_words, value_panel = segment_tokens * panel_words;
    for (int64_t j = tile.first; j < tile.last; j += product_length) {
        multiply_tiles<Blocks, 2>(queries + begin * place.depth, place.depth,
                                  place.keys + j * place.depth / 2, key_panel, place.depth,
                                  place.scores + j, segment_tokens);
    }
    int64_t end = std::min(rows.count, begin + Blocks * tile_side);
    weigh_rows(segment, rows, begin, end, tile, scale, place, partial);
    float* sums = partial.sums + begin * place.width;
    auto weigh = [&](auto panels, int64_t d) {
        multiply_tiles<Blocks, panels.value>(
            place.weights + tile.first, segment_tokens,
            place.values + d * segment_tokens / 2 + tile.first * panel_words, value_panel,
            tile.last - tile.first, sums + d, place.width);
    };
    int64_t d = 0;
    for (; d + tile_side < place.width; d += 2 * tile_side) {
        weigh(std::integral_constant<int, 2>{}, d);
    }
    if (d < place.width) weigh(std::integral_constant<int, 1>{}, d);
}

// One segment's part of the result of every row that sees it. `queries` are [rows, depth], up to
// whole tiles; the maxima are logarithms to base 2.
inline void attend_segment_in_tiles(const Segment<uint16_t>& segment, const Rows& rows,
                                    const uint16_t* queries, float scale, const TilePlace& place,
                                    const Partial& partial) {
    auto whole = [](Range range) {
        return Range{range.first / product_length * product_length,
                     (range.last + product_length - 1) / product_length * product_length};
    };
    Range all = whole({segment.first, segment.last});
    pack_key_panels(segment, all, place);
    pack_value_panels(segment, all, place);
    TileUnit unit(tile_side, false);
    for (int64_t begin = 0; begin < rows.count; begin += tile_rows) {
        int64_t end = std::min(rows.count, begin + tile_rows);
        Range tile = seen(rows, begin, end, segment);
        if (tile.first >= tile.last) continue;
        auto* attend = end - begin > tile_side ? attend_rows<2> : attend_rows<1>;
        attend(segment, rows, queries, begin, whole(tile), scale, place, partial);
    }
}

#endif

}  // namespace qk
