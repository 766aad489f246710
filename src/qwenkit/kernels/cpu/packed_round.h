// Tokens as the products of packed matrices take them: rounded to eight bits by groups of columns,
// twice where a group has outliers, or to bf16.
#pragma once

#include <cmath>
#include <limits>

#include "packed.h"

struct PackedMatmulArguments {
    const float* x;
    const uint8_t* data;
    const uint16_t *scales, *mins;    // mins null: the format has none
    const float *bias, *residual;     // [rows] and [tokens, rows] to be added, or null
    float* y;
    const PackedMatmulArguments* next;  // another matrix that takes the same x, or null
    int64_t tokens, rows, columns, group, kind, zero_point;
    int64_t precise;  // not 0: activations in nearly sixteen bits
    int64_t threads;
};

namespace qk {
namespace {

enum Kind { int4 = 0, int8 = 1, bf16 = 2, fp32 = 3 };

// Of one group of numbers: the largest magnitude; infinite when one is NaN or infinite.
float largest(const float* x, int64_t count) {
    words most{};
    for (int64_t i = 0; i < count; i += lanes) {
        words magnitude = (words)load(x + i) & 0x7fffffff;
        most = magnitude > most ? magnitude : most;
    }
    int32_t highest = highest_word(most);
    if (highest >= 0x7f800000) return std::numeric_limits<float>::infinity();
    float result;
    std::memcpy(&result, &highest, 4);
    return result;
}

// One group to whole numbers in [-127, 127], to nearest even, times `scale`; what is left of each
// number goes to `left` where it is not null. Returns the sum of the whole numbers.
int32_t quantize_group(const float* x, int64_t count, float scale, int8_t* quants, float* left) {
    const vec magic = splat(12582912.0f);  // 1.5 · 2^23: adding it rounds to a whole number
    vec inverse = splat(1.0f / scale);
    words total{};
    for (int64_t i = 0; i < count; i += lanes) {
        vec number = load(x + i), rounded = number * inverse + magic;
        words whole = (words)rounded - (words)magic;
        total += whole;
        store_narrow(quants + i, whole);
        if (left) store(left + i, number - (rounded - magic) * splat(scale));
    }
    return sum_of_words(total);
}

void round_to_bf16(const float* x, int64_t count, uint16_t* out) {
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits;
        std::memcpy(&bits, x + i, 4);
        bool nan = (bits & 0x7fffffff) > 0x7f800000;
        out[i] = static_cast<uint16_t>(nan ? bits >> 16 | 64
                                           : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
}

// Where a call keeps its rounded tokens.
struct Rounded {
    int8_t* quants[2];  // the numbers, and what rounding left of them
    float* scales[2];
    int32_t* offsets[2];
    float* sums;
    uint8_t* with_rest;
    int64_t bytes_of_bits;
    uint16_t* halves;
};

constexpr float smallest = 1e-30f;  // what is less counts as nothing
constexpr float outlier = 5.0f;     // root mean squares of its token

// A group whose largest number stands out of its token by so much that rounding the rest beside it
// would cost precision is rounded twice; so is every group when the result must be precise.
void round_group(const PackedMatmulArguments& a, const Rounded& out, int64_t token, int64_t g,
                 float limit) {
    const float* x = a.x + token * a.columns + g * a.group;
    int64_t at = token * (a.columns / a.group) + g, column = token * a.columns + g * a.group;
    for (int part = 0; part < 2; part++) {
        out.scales[part][at] = 0;  // whatever is in `quants` then counts nothing
        out.offsets[part][at] = 0;
    }
    out.sums[at] = 0;
    float amax = largest(x, a.group);
    if (__builtin_expect(std::isinf(amax), false)) {  // so that what becomes of it is seen
        out.scales[0][at] = out.sums[at] = std::numeric_limits<float>::quiet_NaN();
        return;
    }
    float left[128];
    bool twice = amax > limit;
    for (int part = 0; part < (twice ? 2 : 1); part++) {
        if (part) amax = largest(left, a.group);
        if (amax < smallest) return;
        float scale = amax / 127.0f;
        int32_t sum = quantize_group(part ? left : x, a.group, scale, out.quants[part] + column,
                                     twice && !part ? left : nullptr);
        out.scales[part][at] = scale;
        out.offsets[part][at] = -static_cast<int32_t>(a.zero_point) * sum;
        out.sums[at] += scale * static_cast<float>(sum);
    }
}

// Which tokens have a rest, as bits, so that a tile sees it at one glance.
void find_rests(const Rounded& out, int64_t tokens, int64_t groups) {
    std::memset(out.with_rest, 0, static_cast<size_t>((groups + 1) * out.bytes_of_bits));
    for (int64_t t = 0; t < tokens; t++) {
        auto bit = static_cast<uint8_t>(1 << t % 8);
        for (int64_t g = 0; g < groups; g++) {
            if (out.scales[1][t * groups + g] == 0) continue;
            out.with_rest[g * out.bytes_of_bits + t / 8] |= bit;
            out.with_rest[groups * out.bytes_of_bits + t / 8] |= bit;
        }
    }
}

void round_token(const PackedMatmulArguments& a, const Rounded& out, int64_t token) {
    const float* x = a.x + token * a.columns;
    if (a.kind == bf16) return round_to_bf16(x, a.columns, out.halves + token * a.columns);
    vec squares[4] = {};
    for (int64_t i = 0, turn = 0; i < a.columns; i += lanes, turn++) {
        vec v = load(x + i);
        squares[turn % 4] = fma(v, v, squares[turn % 4]);
    }
    float sums[4];
    sum4(squares, sums);
    float mean = ((sums[0] + sums[1]) + (sums[2] + sums[3])) / static_cast<float>(a.columns);
    float limit = a.precise ? 0.0f : outlier * std::sqrt(mean);
    for (int64_t g = 0; g < a.columns / a.group; g++) round_group(a, out, token, g, limit);
}

}  // namespace
}  // namespace qk
