// The innermost loops over packed matrices of floating-point numbers: bf16, fp32 and fp8.
#pragma once

#include <type_traits>

#include "packed.h"

namespace qk {

struct Halves {  // bf16, two columns side by side
    static constexpr int columns = 2, tile = large_tile;

#if defined(__AVX512BF16__)
    static constexpr int steps = 1;

    template <int Step>
    static __m512i weights(const uint8_t* w) {
        return _mm512_loadu_si512(w);
    }

    template <int Step>
    static __m512i activation(const Activations& x, int64_t at) {
        int32_t pair;
        std::memcpy(&pair, x.halves + at, 4);
        return _mm512_set1_epi32(pair);
    }

    static vec add(__m512i weights, __m512i x, vec sum) {
        return _mm512_dpbf16_ps(sum, (__m512bh)weights, (__m512bh)x);
    }
#else
    static constexpr int steps = 2;

    template <int Step>
    static vec weights(const uint8_t* w) {
        words both;
        std::memcpy(&both, w, sizeof both);
        return (vec)(Step == 0 ? both << 16 : both & static_cast<int32_t>(0xffff0000));
    }

    template <int Step>
    static vec activation(const Activations& x, int64_t at) {
        return splat(x.numbers[at + Step]);
    }

    static vec add(vec weights, vec x, vec sum) { return fma(weights, x, sum); }
#endif
};

struct Eights {  // fp8, e4m3: four columns side by side
    static constexpr int columns = 4, tile = tile_tokens;

    // The number in the byte of each lane that `place` counts from the lowest, exactly.
    template <int Place>
    static vec number(words four) {
        words size = (four >> (8 * Place)) & 127;
        words normal = (size << 20) + (120 << 23);    // the exponent's bias is 7, that of fp32 127
        words small = (words)(to_float(size) * splat(0x1p-9f));  // without an exponent
        words sign = (four << (24 - 8 * Place)) & INT32_MIN;
        return (vec)((size < 8 ? small : normal) | sign);
    }
};

struct Singles {  // fp32
    static constexpr int columns = 1, steps = 1, tile = large_tile;

    template <int Step>
    static vec weights(const uint8_t* w) {
        return load(reinterpret_cast<const float*>(w));
    }

    template <int Step>
    static vec activation(const Activations& x, int64_t at) {
        return splat(x.numbers[at]);
    }

    static vec add(vec weights, vec x, vec sum) { return fma(weights, x, sum); }
};

// y of some tokens × some panels of floating-point numbers.
template <class Kind, int Tokens, int Count>
void multiply_floats(const Panels& panels, const Activations& given, int64_t token,
                     vec y[Tokens][Count * per_panel]) {
    constexpr int vectors = Count * per_panel;
    const Activations x = given;  // a copy, which no store can be thought to change
    vec sums[Tokens][vectors];
    QK_UNROLL for (int t = 0; t < Tokens; t++) {
        QK_UNROLL for (int v = 0; v < vectors; v++) sums[t][v] = vec{};
    }
    int64_t at = 0, place = token * x.stride;
    // One activation at a time is in a register, with all weights that it is multiplied by.
    auto step = [&](auto number) __attribute__((always_inline)) {
        constexpr int i = decltype(number)::value;
        decltype(Kind::template weights<i>(nullptr)) weights[vectors];
        QK_UNROLL for (int v = 0; v < vectors; v++) {
            weights[v] = Kind::template weights<i>(panels.data[v / per_panel] + at +
                                                   v % per_panel * lanes * 4);
        }
        QK_UNROLL for (int t = 0; t < Tokens; t++) {
            auto one = Kind::template activation<i>(x, place + t * x.stride);
            QK_UNROLL for (int v = 0; v < vectors; v++) {
                sums[t][v] = Kind::add(weights[v], one, sums[t][v]);
            }
        }
    };
    for (int64_t column = 0; column < x.columns; column += Kind::columns) {
        int64_t ahead = panels.ahead(at);
        QK_UNROLL for (int p = 0; p < Count; p++) {
            __builtin_prefetch(panels.data[p] + at + ahead);
        }
        step(std::integral_constant<int, 0>{});
        if constexpr (Kind::steps == 2) step(std::integral_constant<int, 1>{});
        at += panel_rows * 4;
        place += Kind::columns;
    }
    QK_UNROLL for (int t = 0; t < Tokens; t++) {
        QK_UNROLL for (int v = 0; v < vectors; v++) y[t][v] = sums[t][v];
    }
}

// y of some tokens × some panels of fp8: every number is made of its byte once for all tokens.
template <int Tokens, int Count>
void multiply_eights(const Panels& panels, const Activations& x, int64_t token,
                     vec y[Tokens][Count * per_panel]) {
    constexpr int vectors = Count * per_panel;
    QK_UNROLL for (int t = 0; t < Tokens; t++) {
        QK_UNROLL for (int v = 0; v < vectors; v++) y[t][v] = vec{};
    }
    for (int64_t g = 0, at = 0; g * x.group < x.columns; g++) {
        vec scales[vectors];
        QK_UNROLL for (int p = 0; p < Count; p++) {
            panels.scales[p].load_scales(g, scales + p * per_panel);
        }
        for (int64_t column = g * x.group; column < (g + 1) * x.group; column += Eights::columns) {
            words four[vectors];
            QK_UNROLL for (int v = 0; v < vectors; v++) {
                const uint8_t* w = panels.data[v / per_panel] + at + v % per_panel * lanes * 4;
                __builtin_prefetch(w + panels.ahead(at));
                std::memcpy(&four[v], w, sizeof(words));
            }
            auto add = [&](int64_t place, auto number) __attribute__((always_inline)) {
                QK_UNROLL for (int v = 0; v < vectors; v++) {
                    vec weights = number(four[v]) * scales[v];
                    QK_UNROLL for (int t = 0; t < Tokens; t++) {
                        vec one = splat(x.numbers[(token + t) * x.stride + column + place]);
                        y[t][v] = fma(weights, one, y[t][v]);
                    }
                }
            };
            add(0, Eights::number<0>);
            add(1, Eights::number<1>);
            add(2, Eights::number<2>);
            add(3, Eights::number<3>);
            at += panel_rows * 4;
        }
    }
}

}  // namespace qk
