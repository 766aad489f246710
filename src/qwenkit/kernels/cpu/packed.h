// Packed matrices: how they lie in memory, and the innermost loops over them.
//
// Rows go in panels of 16. A panel holds its columns one after another, those that an instruction
// takes together side by side: four bytes of each row (int8), four low and four high halves of
// bytes (int4: columns 4i … 4i + 3 and 16 + 4i … 16 + 4i + 3 of each 32), two bf16 or one fp32
// number. Whole numbers are stored with their zero point added, so never negative; each `group` of
// a row's columns has a scale, and a minimum where the format has one, sixteen rows side by side.
//
// One element of y is always the same sum. Whole numbers are added exactly within a group, and
// groups are added up in their order by one chain of fused multiply-adds; bf16 and fp32 columns
// likewise. So the result does not depend on the tokens of the call, on threads or on tiles.
#pragma once

#include <algorithm>

#include "ints.h"

namespace qk {

constexpr int panel_rows = 16;
constexpr int per_panel = panel_rows / lanes;  // vectors across a panel
constexpr int wide = lanes == 16 ? 2 : 1;      // panels that a tile takes side by side
constexpr int prefetch_bytes = 4096;           // how far ahead of the weights memory is asked for

// Tokens in eight bits by groups of columns.
struct Quantized {
    const int8_t* quants;    // [tokens, columns]
    const float* scales;     // [tokens, groups]
    const int32_t* offsets;  // [tokens, groups]: minus the zero point times the sum of quants
};

// Tokens rounded to eight bits by groups of columns, or to bf16, or as they are. What rounding
// left of a group with outliers is in `rest`, in eight bits again; elsewhere its scale is 0.
struct Activations {
    Quantized main, rest;
    const uint8_t* with_rest;  // [groups + 1, bytes_of_bits]: bit t for each token that has a rest
                               // in the group; at last, in any
    int64_t bytes_of_bits;
    const float* sums;       // [tokens, groups]: the sum of the rounded numbers
    const uint16_t* halves;  // [tokens, columns], bf16
    const float* numbers;    // [tokens, columns]
    int64_t columns, group, groups;
};

struct Panels {
    const uint8_t* data;
    const uint16_t *scales, *mins;
    int64_t bytes;  // from one panel to the next
};

// Int4 as stored.
struct Nibbles {
    static constexpr int bytes_per_32 = 256;
    static constexpr bool ahead = true;

    template <int Tokens, int Vectors>
    static void add(const uint8_t* const* data, const int8_t* x, int64_t x_stride,
                    words sums[Tokens][Vectors]) {
        QK_UNROLL for (int i = 0; i < 4; i++) {
            bytes low[Vectors], high[Vectors];
            QK_UNROLL for (int v = 0; v < Vectors; v++) {
                bytes both = load_bytes(data[v] + i * 64);
                low[v] = low_nibbles(both);
                high[v] = high_nibbles(both);
            }
            QK_UNROLL for (int t = 0; t < Tokens; t++) {
                words four = splat_bytes(x + t * x_stride + 4 * i);
                QK_UNROLL for (int v = 0; v < Vectors; v++) {
                    sums[t][v] = dot4<15>(sums[t][v], low[v], four);
                }
            }
            QK_UNROLL for (int t = 0; t < Tokens; t++) {
                words four = splat_bytes(x + t * x_stride + 16 + 4 * i);
                QK_UNROLL for (int v = 0; v < Vectors; v++) {
                    sums[t][v] = dot4<15>(sums[t][v], high[v], four);
                }
            }
        }
    }
};

// Numbers of at most `Most` in a byte each: int8 as stored, or int4 taken apart for many tokens.
template <int Most>
struct Bytes {
    static constexpr int bytes_per_32 = 512;
    static constexpr bool ahead = Most > 15;

    template <int Tokens, int Vectors>
    static void add(const uint8_t* const* data, const int8_t* x, int64_t x_stride,
                    words sums[Tokens][Vectors]) {
        QK_UNROLL for (int i = 0; i < 8; i++) {
            bytes w[Vectors];
            QK_UNROLL for (int v = 0; v < Vectors; v++) w[v] = load_bytes(data[v] + i * 64);
            QK_UNROLL for (int t = 0; t < Tokens; t++) {
                words four = splat_bytes(x + t * x_stride + 4 * i);
                QK_UNROLL for (int v = 0; v < Vectors; v++) {
                    sums[t][v] = dot4<Most>(sums[t][v], w[v], four);
                }
            }
        }
    }
};

// Whether any of a few tokens has a rest in a group.
inline bool has_rest(const Activations& x, int64_t g, int64_t token, int tokens) {
    uint32_t bits;
    std::memcpy(&bits, x.with_rest + g * x.bytes_of_bits + token / 8, 4);
    return bits >> token % 8 & ((1u << tokens) - 1);
}

// Adds the products of one group: exact sums, times both scales, to y.
template <class Kind, int Tokens, int Vectors>
__attribute__((always_inline)) inline void add_group(const uint8_t* const* group_data,
                                                     const Activations& x, const Quantized& q,
                                                     int64_t token, int64_t g, const vec* scales,
                                                     vec (*y)[Vectors]) {
    const uint8_t* data[Vectors];
    QK_UNROLL for (int v = 0; v < Vectors; v++) data[v] = group_data[v];
    int64_t at = token * x.groups + g;
    words sums[Tokens][Vectors];
    QK_UNROLL for (int t = 0; t < Tokens; t++) {
        words offset = splat_word(q.offsets[at + t * x.groups]);
        QK_UNROLL for (int v = 0; v < Vectors; v++) sums[t][v] = offset;
    }
    const int8_t* quants = q.quants + token * x.columns + g * x.group;
    for (int64_t column = 0; column < x.group; column += 32) {
        if constexpr (Kind::ahead) {
            QK_UNROLL for (int v = 0; v < Vectors; v += per_panel) {
                QK_UNROLL for (int i = 0; i < Kind::bytes_per_32; i += 64) {
                    __builtin_prefetch(data[v] + prefetch_bytes + i);
                }
            }
        }
        Kind::template add<Tokens, Vectors>(data, quants, x.columns, sums);
        QK_UNROLL for (int v = 0; v < Vectors; v++) data[v] += Kind::bytes_per_32;
        quants += 32;
    }
    QK_UNROLL for (int t = 0; t < Tokens; t++) {
        vec scale = splat(q.scales[at + t * x.groups]);
        QK_UNROLL for (int v = 0; v < Vectors; v++) {
            y[t][v] = fma(to_float(sums[t][v]), scales[v] * scale, y[t][v]);
        }
    }
}

// y of some tokens × some panels of whole numbers. Without `Rest` none of the tokens has one.
template <class Kind, int Tokens, int Count, bool Rest>
void multiply_ints(const Panels& panels, const Activations& x, int64_t token,
                   vec y[Tokens][Count * per_panel]) {
    constexpr int vectors = Count * per_panel;
    const uint8_t* data[vectors];
    QK_UNROLL for (int v = 0; v < vectors; v++) {
        data[v] = panels.data + v / per_panel * panels.bytes + v % per_panel * lanes * 4;
    }
    QK_UNROLL for (int t = 0; t < Tokens; t++) {
        QK_UNROLL for (int v = 0; v < vectors; v++) y[t][v] = vec{};
    }
    int64_t group_bytes = x.group / 32 * Kind::bytes_per_32;
    for (int64_t g = 0; g < x.groups; g++) {
        int64_t at = token * x.groups + g;
        vec scales[vectors];
        QK_UNROLL for (int p = 0; p < Count; p++) {
            widen_halves(panels.scales + (p * x.groups + g) * panel_rows, scales + p * per_panel);
        }
        add_group<Kind, Tokens, vectors>(data, x, x.main, token, g, scales, y);
        if constexpr (Rest) {
            if (has_rest(x, g, token, Tokens)) {
                add_group<Kind, Tokens, vectors>(data, x, x.rest, token, g, scales, y);
            }
        }
        QK_UNROLL for (int v = 0; v < vectors; v++) data[v] += group_bytes;
        if (panels.mins) {
            QK_UNROLL for (int p = 0; p < Count; p++) {
                widen_halves(panels.mins + (p * x.groups + g) * panel_rows, scales + p * per_panel);
            }
            QK_UNROLL for (int t = 0; t < Tokens; t++) {
                vec sum = splat(x.sums[at + t * x.groups]);
                QK_UNROLL for (int v = 0; v < vectors; v++) y[t][v] = fma(scales[v], sum, y[t][v]);
            }
        }
    }
}

struct Halves {  // bf16, two columns side by side
    static constexpr int columns = 2;

#if defined(__AVX512BF16__)
    static vec add(vec sum, const uint8_t* w, const Activations& x, int64_t at) {
        int32_t pair;
        std::memcpy(&pair, x.halves + at, 4);
        return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(w),
                                (__m512bh)_mm512_set1_epi32(pair));
    }
#else
    static vec add(vec sum, const uint8_t* w, const Activations& x, int64_t at) {
        words both;
        std::memcpy(&both, w, sizeof both);
        sum = fma((vec)(both << 16), splat(x.numbers[at]), sum);
        return fma((vec)(both & static_cast<int32_t>(0xffff0000)), splat(x.numbers[at + 1]), sum);
    }
#endif
};

struct Singles {  // fp32
    static constexpr int columns = 1;

    static vec add(vec sum, const uint8_t* w, const Activations& x, int64_t at) {
        vec weights;
        std::memcpy(&weights, w, sizeof weights);
        return fma(weights, splat(x.numbers[at]), sum);
    }
};

// y of some tokens × some panels of floating-point numbers.
template <class Kind, int Tokens, int Count>
void multiply_floats(const Panels& panels, const Activations& x, int64_t token,
                     vec y[Tokens][Count * per_panel]) {
    constexpr int vectors = Count * per_panel;
    QK_UNROLL for (int t = 0; t < Tokens; t++) {
        QK_UNROLL for (int v = 0; v < vectors; v++) y[t][v] = vec{};
    }
    const uint8_t* data = panels.data;
    for (int64_t column = 0; column < x.columns; column += Kind::columns) {
        QK_UNROLL for (int v = 0; v < vectors; v++) {
            const uint8_t* w = data + v / per_panel * panels.bytes + v % per_panel * lanes * 4;
            __builtin_prefetch(w + prefetch_bytes);
            QK_UNROLL for (int t = 0; t < Tokens; t++) {
                y[t][v] = Kind::add(y[t][v], w, x, (token + t) * x.columns + column);
            }
        }
        data += panel_rows * 4;
    }
}

}  // namespace qk
