// Tokens as the products of packed matrices take them: normalised where that is asked for, then
// rounded to eight bits by groups of columns, twice where a group has outliers, or to bf16.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "packed.h"
#include "row_norm.h"

// One matrix, and what becomes of its product.
struct PackedMatrix {
    const uint8_t *data, *scales, *mins;  // mins null: the format has none
    const float *bias, *residual;     // [rows] and [tokens, rows] to be added, or null
    float* y;                         // [tokens, rows]
    int64_t rows;                     // of each of its parts, where tokens are sorted by part
    int64_t precise;                  // not 0: more of the activations in nearly sixteen bits
};

constexpr int most_matrices = 4;

// Matrices that are multiplied with the same tokens: `count` of them, all of the same columns,
// group, kind and zero point. Tokens are rounded by `group` columns, of fp8 those of a scale.
struct PackedMatmulArguments {
    const float* x;              // [tokens, columns]
    const float* norm;           // [columns]: x is normalised with these weights first, or null
    const int64_t* order;        // [tokens]: the row of x that each token is; null: its own
    const int64_t* ends;         // [parts]: where the tokens of each part of the matrices end; null:
                                 // there is one part
    PackedMatrix matrices[most_matrices];
    const uint8_t* levels;       // [16]: what numbers of four bits stand for, the zero point added;
                                 // null: for themselves
    int64_t count, tokens, x_rows, columns, group, kind, zero_point, parts;
    int64_t scale_groups;        // of each row
    int64_t scale_shift;         // group g of the tokens has the scale g >> scale_shift
    int64_t scale_bytes, zeros;  // 2 or 4: fp16 or fp32; not 0: `mins` are zero points, a byte each
    int64_t gated;  // not 0: of two matrices; y of the first becomes silu(first) · second
    int64_t threads;
    float epsilon, unit;         // by `unit` numbers are larger than whole numbers and scales say
};

namespace qk {
namespace {

enum Kind { int4 = 0, int8 = 1, bf16 = 2, fp32 = 3, fp8 = 4 };

// What tokens become for weights of a kind: eight bits, bf16 where the processor multiplies such,
// or what they are.
Kind rounded_to(int64_t kind) {
    if (kind <= int8) return int8;
#if defined(__AVX512BF16__)
    if (kind == bf16) return bf16;
#endif
    return fp32;
}

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
#if defined(__AVX512BF16__)
    // Only what the instruction rounds otherwise, numbers below the normal ones, differs: they
    // count as zero, as they do in the products.
    for (; count >= 32; count -= 32, x += 32, out += 32) {
        _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(load(x + 16), load(x)));
    }
#endif
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits;
        std::memcpy(&bits, x + i, 4);
        bool nan = (bits & 0x7fffffff) > 0x7f800000;
        out[i] = static_cast<uint16_t>(nan ? bits >> 16 | 64
                                           : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
}

// Rests that are kept: of groups that stand out of their token, or, for precise results, of those that
// only stand a little out of it.
enum Rests { outstanding = 0, many = 1 };
constexpr float outliers[] = {5.0f, 3.0f};  // root mean squares of a token, by `Rests`

// Where a call keeps its rounded tokens: what `Activations` reads.
struct Rounded {
    int8_t* quants[2];     // the numbers, and what rounding left of them
    float* scales;
    int32_t* offsets;
    float* rest_scales[2];  // by `Rests`; 0 where there is no rest
    int32_t* rest_offsets[2];  // set where there is a rest
    float* sums[2];
    bool summed;            // whether a matrix has minimums, for which alone there are sums
    uint8_t* with_rest[2];
    int64_t tokens, stride;
    bool wanted[2];        // which rests any matrix asks for
    uint16_t* halves;
    float* numbers;
};

constexpr float smallest = 1e-30f;  // what is less counts as nothing

// A group whose largest number stands out of its token by so much that rounding the rest beside it
// would cost precision is rounded twice. `size` is the root mean square of the token.
void round_group(const PackedMatmulArguments& a, const Rounded& out, const float* row,
                 int64_t token, int64_t g, float size) {
    const float* x = row + g * a.group;
    int64_t groups = a.columns / a.group, at = g * out.tokens + token;
    int64_t column = token * out.stride + g * a.group;
    out.scales[at] = 0;  // whatever is in `quants` then counts nothing
    out.offsets[at] = 0;
    for (int rests = 0; rests < 2; rests++) {
        if (!out.wanted[rests]) continue;
        out.with_rest[rests][at] = 0;
        out.rest_scales[rests][at] = 0;
        if (out.summed) out.sums[rests][at] = 0;
    }
    float amax = largest(x, a.group);
    if (amax < smallest) return;
    if (__builtin_expect(std::isinf(amax), false)) {  // so that what becomes of it is seen
        out.scales[at] = std::numeric_limits<float>::quiet_NaN();
        for (int rests = 0; rests < 2; rests++) {
            if (out.wanted[rests] && out.summed) out.sums[rests][at] = out.scales[at];
        }
        return;
    }
    bool kept[2];
    for (int rests = 0; rests < 2; rests++) {
        kept[rests] = out.wanted[rests] && amax > outliers[rests] * size;
    }
    bool twice = kept[outstanding] || kept[many];
    float left[128], scale = amax / 127.0f;
    int32_t sum = quantize_group(x, a.group, scale, out.quants[0] + column, twice ? left : nullptr);
    out.scales[at] = scale * a.unit;
    out.offsets[at] = -static_cast<int32_t>(a.zero_point) * sum;
    for (int rests = 0; rests < 2; rests++) {
        if (!out.wanted[rests] || !out.summed) continue;
        out.sums[rests][at] = scale * a.unit * static_cast<float>(sum);
    }
    if (!twice || (amax = largest(left, a.group)) < smallest) return;
    scale = amax / 127.0f;
    sum = quantize_group(left, a.group, scale, out.quants[1] + column, nullptr);
    for (int rests = 0; rests < 2; rests++) {
        if (!kept[rests]) continue;
        out.rest_scales[rests][at] = scale * a.unit;
        out.rest_offsets[rests][at] = -static_cast<int32_t>(a.zero_point) * sum;
        if (out.summed) out.sums[rests][at] += scale * a.unit * static_cast<float>(sum);
        out.with_rest[rests][at] = 1;
        // Other threads may round other groups of this token.
        __atomic_store_n(&out.with_rest[rests][groups * out.tokens + token], 1, __ATOMIC_RELAXED);
    }
}

// The row of x that a token is, normalised into `own` where that is asked for.
const float* row_of(const PackedMatmulArguments& a, int64_t token, float* own) {
    const float* x = a.x + (a.order ? a.order[token] : token) * a.columns;
    if (!a.norm) return x;
    normalise(x, a.norm, own, a.columns, a.epsilon);
    return own;
}

constexpr int64_t together = 8;  // tokens: what belongs to a group lies side by side for them

// Some groups of some tokens. `own` is room for eight rows.
void round_groups(const PackedMatmulArguments& a, const Rounded& out, int64_t token, int64_t last,
                  int64_t first_group, int64_t last_group, float* own) {
    for (; token < last; token += together) {
        int64_t count = std::min(together, last - token);
        const float* rows[together];
        float sizes[together];
        for (int64_t i = 0; i < count; i++) {
            rows[i] = row_of(a, token + i, own + i * a.columns);
            sizes[i] = std::sqrt(mean_square(rows[i], a.columns));
        }
        for (int64_t g = first_group; g < last_group; g++) {
            for (int64_t i = 0; i < count; i++) {
                round_group(a, out, rows[i], token + i, g, sizes[i]);
            }
        }
    }
}

// A token that is not rounded to eight bits. `own` is room for one row.
void copy_token(const PackedMatmulArguments& a, const Rounded& out, int64_t token, float* own) {
    const float* x = row_of(a, token, own);
    if (out.halves) return round_to_bf16(x, a.columns, out.halves + token * out.stride);
    std::copy(x, x + a.columns, out.numbers + token * out.stride);
}

}  // namespace
}  // namespace qk
