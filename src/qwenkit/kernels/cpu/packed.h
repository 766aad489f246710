// Packed matrices: how they lie in memory, and the innermost loops over them.
//
// Rows go in panels of 16. A panel holds its columns one after another, those that an instruction
// takes together side by side: four bytes of each row (int8, fp8), four low and four high halves of
// bytes (int4: columns 4i … 4i + 3 and 16 + 4i … 16 + 4i + 3 of each 32), two bf16 or one fp32
// number. Whole numbers are stored with their zero point added, so never negative, or as places in
// a table of sixteen such numbers. Columns that belong together have a scale, and a minimum or a
// zero point of their own where the format has one, sixteen rows side by side.
//
// One element of y is always the same sum. Whole numbers are added exactly within a group, and
// groups are added up in their order by one chain of fused multiply-adds, where every 512 columns
// are followed by their rests; bf16 and fp32 columns in their order as well. So the result does not
// depend on the tokens of the call, on threads or on tiles.
#pragma once

#include <algorithm>

#include "ints.h"

namespace qk {

constexpr int panel_rows = 16;
constexpr int per_panel = panel_rows / lanes;  // vectors across a panel
constexpr int pair = 2;                        // panels that are multiplied together
constexpr int wide = lanes == 16 ? 2 : 1;      // panels that a tile takes side by side
constexpr int prefetch_bytes = 4096;           // how far ahead of the weights memory is asked for
constexpr int large_tile = lanes == 16 ? 8 : lanes == 8 ? 6 : tile_tokens;  // tokens: reading is less,
                                                           // though sums of all no longer fit
constexpr int small_tile = lanes == 16 ? tile_tokens : large_tile;  // where nothing is to be read
constexpr int64_t run_columns = 512;           // after which their rests are added

// Tokens in eight bits by groups of columns. A token's quants lie `stride` bytes after those of
// the one before it; what belongs to a group of each token stands side by side for all tokens.
struct Quantized {
    const int8_t* quants;    // [tokens, stride]
    const float* scales;     // [groups, tokens]
    const int32_t* offsets;  // [groups, tokens]: minus the zero point times the sum of quants
};

// Tokens rounded to eight bits by groups of columns, or to bf16, or as they are. What rounding
// left of a group with outliers is in `rest`, in eight bits again; elsewhere its scale is 0.
struct Activations {
    Quantized main, rest;
    const uint8_t* with_rest;  // [groups + 1, tokens]: whether a token has a rest in the group; at
                               // last, in any
    const float* sums;       // [groups, tokens]: the sum of the rounded numbers; null without minimums
    const uint16_t* halves;  // [tokens, stride], bf16
    const float* numbers;    // [tokens, stride]
    int64_t tokens, columns, stride, group, groups;  // tokens: and spare ones without a rest
};

// What belongs to the groups of a panel's columns: scales in fp16 or fp32, and minimums as wide or
// zero points in a byte. Group g of the tokens is in group g >> shift of the weights.
struct Scales {
    const uint8_t *scales, *mins;  // mins null: the format has none
    int shift;
    bool wide, zeros;

    const uint8_t* place(int64_t g) const {
        return scales + (g >> shift) * panel_rows * (wide ? 4 : 2);
    }

    void load_scales(int64_t g, vec out[per_panel]) const { widen(place(g), out); }

    // What is added for each unit of a group's numbers. `of_group` are its scales.
    void load_mins(int64_t g, const vec* of_group, vec out[per_panel]) const {
        int64_t at = (g >> shift) * panel_rows;
        if (!zeros) return widen(mins + at * (wide ? 4 : 2), out);
        for (int v = 0; v < per_panel; v++) {
            out[v] = (vec{} - widen_unsigned(mins + at + v * lanes)) * of_group[v];
        }
    }

  private:
    void widen(const uint8_t* at, vec out[per_panel]) const {
        if (!wide) return widen_halves(reinterpret_cast<const uint16_t*>(at), out);
        for (int v = 0; v < per_panel; v++) {
            out[v] = load(reinterpret_cast<const float*>(at) + v * lanes);
        }
    }
};

// Panels that are multiplied with the same tokens: neighbours, or one of a gate and one of what it
// gates. Each has so many `bytes`, and the panel that takes its place next is `next` bytes further.
struct Panels {
    const uint8_t* data[pair];
    Scales scales[pair];
    const uint8_t* levels;  // [16]: what numbers of four bits stand for, or null
    int64_t bytes, next;

    Panels from(int panel) const {
        return {{data[panel]}, {scales[panel]}, levels, bytes, next};
    }

    // From a place in a panel to what is read `prefetch_bytes` later.
    int64_t ahead(int64_t place) const {
        return prefetch_bytes + (place + prefetch_bytes < bytes ? 0 : next - bytes);
    }
};

// Int4 as stored, or, where they are `Levels`, places in a table.
template <bool Levels>
struct Nibbles {
    static constexpr int bytes_per_32 = 256;
    static constexpr int most = Levels ? 255 : 15;
    static constexpr bool ahead = true;
    static constexpr int tile = large_tile / Dots<most>::registers;

    using Numbers = typename Dots<most>::Numbers;

    static Numbers numbers(bytes nibbles, bytes table) {
        return Levels ? Dots<most>::look_up(table, nibbles) : Dots<most>::numbers(nibbles);
    }

    template <int Tokens, int Vectors>
    static void add(const uint8_t* const* data, bytes table, const int8_t* x, int64_t x_stride,
                    Dots<most> dots[Tokens][Vectors]) {
        QK_UNROLL for (int i = 0; i < 4; i++) {
            Numbers low[Vectors], high[Vectors];
            QK_UNROLL for (int v = 0; v < Vectors; v++) {
                bytes both = load_bytes(data[v] + i * 64);
                low[v] = numbers(low_nibbles(both), table);
                high[v] = numbers(high_nibbles(both), table);
            }
            QK_UNROLL for (int t = 0; t < Tokens; t++) {
                words four = splat_bytes(x + t * x_stride + 4 * i);
                QK_UNROLL for (int v = 0; v < Vectors; v++) {
                    dots[t][v].add(low[v], four);
                }
            }
            QK_UNROLL for (int t = 0; t < Tokens; t++) {
                words four = splat_bytes(x + t * x_stride + 16 + 4 * i);
                QK_UNROLL for (int v = 0; v < Vectors; v++) {
                    dots[t][v].add(high[v], four);
                }
            }
        }
    }
};

// Numbers of at most `Most` in a byte each: int8 as stored, or int4 taken apart for many tokens.
template <int Most>
struct Bytes {
    static constexpr int bytes_per_32 = 512;
    static constexpr int most = Most;
    static constexpr bool ahead = Most > 15;
    static constexpr int tile = Most > 15 ? large_tile / Dots<Most>::registers : small_tile;

    template <int Tokens, int Vectors>
    static void add(const uint8_t* const* data, bytes, const int8_t* x, int64_t x_stride,
                    Dots<Most> dots[Tokens][Vectors]) {
        QK_UNROLL for (int i = 0; i < 8; i++) {
            typename Dots<Most>::Numbers w[Vectors];
            QK_UNROLL for (int v = 0; v < Vectors; v++) {
                w[v] = Dots<Most>::numbers(load_bytes(data[v] + i * 64));
            }
            QK_UNROLL for (int t = 0; t < Tokens; t++) {
                words four = splat_bytes(x + t * x_stride + 4 * i);
                QK_UNROLL for (int v = 0; v < Vectors; v++) {
                    dots[t][v].add(w[v], four);
                }
            }
        }
    }
};

// How many of at most 16 tokens have a rest in a group, or with the number of groups, in any.
inline int count_rests(const Activations& x, int64_t g, int64_t token, int tokens) {
    uint64_t marks[2];
    std::memcpy(marks, x.with_rest + g * x.tokens + token, 16);
    if (tokens <= 8) return __builtin_popcountll(marks[0] & ~uint64_t{0} >> (64 - 8 * tokens));
    marks[1] &= ~uint64_t{0} >> (128 - 8 * tokens);
    return __builtin_popcountll(marks[0]) + __builtin_popcountll(marks[1]);
}

// Adds groups `first` to `last` of some panels to y: exact sums, times both scales. `Steps` · 32 columns
// are a group.
template <class Kind, int Tokens, int Count, int Steps, bool Rest>
__attribute__((noinline)) void add_groups(const Panels& panels, const Activations& x, int64_t token,
                                          int64_t first, int64_t last,
                                          vec (*y)[Count * per_panel]) {
    constexpr int vectors = Count * per_panel;
    constexpr int64_t group = Steps * 32, group_bytes = Steps * Kind::bytes_per_32;
    const Quantized& q = Rest ? x.rest : x.main;
    const int64_t tokens = x.tokens, stride = x.stride;
    const uint8_t* data[vectors];
    QK_UNROLL for (int v = 0; v < vectors; v++) {
        data[v] = panels.data[v / per_panel] + v % per_panel * lanes * 4 + first * group_bytes;
    }
    bytes table = panels.levels ? splat_table(panels.levels) : bytes{};
    const int8_t* quants = q.quants + token * stride + first * group;
    const int32_t* offsets = q.offsets + first * tokens + token;
    const float* factors = q.scales + first * tokens + token;
    for (int64_t g = first; g < last; g++) {
        int64_t ahead = panels.ahead(g * group_bytes);
        words sums[Tokens][vectors];
        QK_UNROLL for (int t = 0; t < Tokens; t++) {
            words offset = splat_word(offsets[t]);
            QK_UNROLL for (int v = 0; v < vectors; v++) sums[t][v] = offset;
        }
#pragma GCC unroll 1
        for (int step = 0; step < Steps; step++) {
            if constexpr (Kind::ahead && !Rest) {
                QK_UNROLL for (int v = 0; v < vectors; v += per_panel) {
                    QK_UNROLL for (int i = 0; i < Kind::bytes_per_32; i += 64) {
                        __builtin_prefetch(data[v] + ahead + i);
                    }
                }
            }
            Dots<Kind::most> dots[Tokens][vectors];
            QK_UNROLL for (int t = 0; t < Tokens; t++) {
                QK_UNROLL for (int v = 0; v < vectors; v++) {
                    dots[t][v] = Dots<Kind::most>(sums[t][v]);
                }
            }
            Kind::template add<Tokens, vectors>(data, table, quants, stride, dots);
            QK_UNROLL for (int t = 0; t < Tokens; t++) {
                QK_UNROLL for (int v = 0; v < vectors; v++) sums[t][v] = dots[t][v].total();
            }
            QK_UNROLL for (int v = 0; v < vectors; v++) data[v] += Kind::bytes_per_32;
            quants += 32;
        }
        vec scales[vectors], mins[vectors];
        QK_UNROLL for (int p = 0; p < Count; p++) {
            panels.scales[p].load_scales(g, scales + p * per_panel);
        }
        QK_UNROLL for (int t = 0; t < Tokens; t++) {
            vec scale = splat(factors[t]);
            QK_UNROLL for (int v = 0; v < vectors; v++) {
                y[t][v] = fma(to_float(sums[t][v]), scales[v] * scale, y[t][v]);
            }
        }
        offsets += tokens;
        factors += tokens;
        if (Rest || !panels.scales[0].mins) continue;
        QK_UNROLL for (int p = 0; p < Count; p++) {
            int v = p * per_panel;
            panels.scales[p].load_mins(g, scales + v, mins + v);
        }
        QK_UNROLL for (int t = 0; t < Tokens; t++) {
            vec sum = splat(x.sums[g * tokens + token + t]);
            QK_UNROLL for (int v = 0; v < vectors; v++) y[t][v] = fma(mins[v], sum, y[t][v]);
        }
    }
}

// As `add_groups` for any group.
template <class Kind, int Tokens, int Count, bool Rest>
void add_any_groups(const Panels& panels, const Activations& x, int64_t token, int64_t first,
                    int64_t last, vec (*y)[Count * per_panel]) {
    auto* add = x.group == 32   ? add_groups<Kind, Tokens, Count, 1, Rest>
                : x.group == 64 ? add_groups<Kind, Tokens, Count, 2, Rest>
                                : add_groups<Kind, Tokens, Count, 4, Rest>;
    add(panels, x, token, first, last, y);
}

// Adds the rests of groups `first` to `last` to y: where few of the tokens have any, one by one.
template <class Kind, int Tokens, int Count>
void add_rests(const Panels& panels, const Activations& x, int64_t token, int64_t first,
               int64_t last, vec (*y)[Count * per_panel]) {
    constexpr int few = Tokens / 4;
    while (first < last) {
        int64_t g = first++;
        int count = count_rests(x, g, token, Tokens);
        if (count > few) {
            while (first < last && count_rests(x, first, token, Tokens) > few) first++;
            add_any_groups<Kind, Tokens, Count, true>(panels, x, token, g, first, y);
            continue;
        }
        const uint8_t* marks = x.with_rest + g * x.tokens + token;
        for (int t = 0; count > 0; t++) {
            if (!marks[t]) continue;
            add_any_groups<Kind, 1, Count, true>(panels, x, token + t, g, g + 1, y + t);
            count--;
        }
    }
}

// y of some tokens × some panels of whole numbers. Without `Rest` none of the tokens has one.
template <class Kind, int Tokens, int Count, bool Rest>
void multiply_ints(const Panels& panels, const Activations& x, int64_t token,
                   vec y[Tokens][Count * per_panel]) {
    QK_UNROLL for (int t = 0; t < Tokens; t++) {
        QK_UNROLL for (int v = 0; v < Count * per_panel; v++) y[t][v] = vec{};
    }
    int64_t run = run_columns / x.group;
    for (int64_t first = 0, last; first < x.groups; first = last) {
        last = std::min(x.groups, first + run);
        add_any_groups<Kind, Tokens, Count, false>(panels, x, token, first, last, y);
        if constexpr (Rest) add_rests<Kind, Tokens, Count>(panels, x, token, first, last, y);
    }
}

}  // namespace qk
