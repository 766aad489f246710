// Rows of a KV cache, kept as fp32, bf16 (uint16_t), int8 or groups of four bits (uint8_t), as
// vectors of fp32.
#pragma once

#include <algorithm>
#include <type_traits>

#include "simd.h"

namespace qk {

// A group of four bits a number: scale and minimum in bf16, then the codes (kernels/kv_int4.py).
constexpr int64_t group_numbers = 32, group_bytes = 20, group_head = 4;

// How many T a cache has for a head of `head_dim` numbers.
template <class T>
constexpr int64_t row_size(int64_t head_dim) {
    if constexpr (!std::is_same_v<T, uint8_t>) return head_dim;
    return (head_dim + group_numbers - 1) / group_numbers * group_bytes;
}

using lane_words = int32_t __attribute__((vector_size(sizeof(vec))));
using lane_halves = uint16_t __attribute__((vector_size(sizeof(vec) / 2)));

inline vec widened(const float* p) { return load(p); }

inline vec widened(const uint16_t* p) {
    lane_halves bits;
    std::memcpy(&bits, p, sizeof bits);
    return (vec)(__builtin_convertvector(bits, lane_words) << 16);
}

inline vec widened(const int8_t* p) { return widen_signed(reinterpret_cast<const uint8_t*>(p)); }

// As load_some.
template <class T>
inline vec widened_some(const T* p, int64_t count) {
    if (count >= lanes) return widened(p);
    T padded[lanes] = {};
    if (count > 0) std::memcpy(padded, p, static_cast<size_t>(count) * sizeof(T));
    return widened(padded);
}

inline float widened_one(float v) { return v; }
inline float widened_one(int8_t v) { return v; }
inline float widened_one(uint16_t v) {
    uint32_t bits = uint32_t(v) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// To bf16: to the nearest, ties to even; NaN stays NaN.
inline uint16_t narrowed(float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    bool nan = (bits & 0x7fffffff) > 0x7f800000;
    return static_cast<uint16_t>(nan ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// out[t] = word t of each of `lanes` rows, for the first four words of 32 bits.
inline void transpose(const uint8_t* const* rows, lane_words out[4]) {
#if defined(__AVX2__)
    auto quad = [&](int row) {
        return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[row]));
    };
#if defined(__AVX512F__)
    __m512i v[4];
    QK_UNROLL for (int i = 0; i < 4; i++) {
        v[i] = _mm512_castsi128_si512(quad(i));
        v[i] = _mm512_inserti32x4(v[i], quad(4 + i), 1);
        v[i] = _mm512_inserti32x4(v[i], quad(8 + i), 2);
        v[i] = _mm512_inserti32x4(v[i], quad(12 + i), 3);
    }
    __m512i low01 = _mm512_unpacklo_epi32(v[0], v[1]), high01 = _mm512_unpackhi_epi32(v[0], v[1]);
    __m512i low23 = _mm512_unpacklo_epi32(v[2], v[3]), high23 = _mm512_unpackhi_epi32(v[2], v[3]);
    out[0] = (lane_words)_mm512_unpacklo_epi64(low01, low23);
    out[1] = (lane_words)_mm512_unpackhi_epi64(low01, low23);
    out[2] = (lane_words)_mm512_unpacklo_epi64(high01, high23);
    out[3] = (lane_words)_mm512_unpackhi_epi64(high01, high23);
#else
    __m256i v[4];
    QK_UNROLL for (int i = 0; i < 4; i++) {
        v[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(quad(i)), quad(4 + i), 1);
    }
    __m256i low01 = _mm256_unpacklo_epi32(v[0], v[1]), high01 = _mm256_unpackhi_epi32(v[0], v[1]);
    __m256i low23 = _mm256_unpacklo_epi32(v[2], v[3]), high23 = _mm256_unpackhi_epi32(v[2], v[3]);
    out[0] = (lane_words)_mm256_unpacklo_epi64(low01, low23);
    out[1] = (lane_words)_mm256_unpackhi_epi64(low01, low23);
    out[2] = (lane_words)_mm256_unpacklo_epi64(high01, high23);
    out[3] = (lane_words)_mm256_unpackhi_epi64(high01, high23);
#endif
#else
    int32_t words[4][lanes];
    for (int i = 0; i < lanes; i++) {
        int32_t row[4];
        std::memcpy(row, rows[i], sizeof row);
        for (int t = 0; t < 4; t++) words[t][i] = row[t];
    }
    std::memcpy(out, words, sizeof words);
#endif
}

// The numbers that one word of each row holds, from its lowest byte on, `step` floats apart.
inline void store_words(lane_words w, const float*, float* out, int64_t) { store(out, (vec)w); }

inline void store_words(lane_words w, const uint16_t*, float* out, int64_t step) {
    store(out, (vec)(w << 16));
    store(out + step, (vec)(w >> 16 << 16));
}

inline void store_words(lane_words w, const int8_t*, float* out, int64_t step) {
    using floats = float __attribute__((vector_size(sizeof(vec))));
    QK_UNROLL for (int i = 0; i < 4; i++) {
        lane_words whole = w << (24 - 8 * i) >> 24;
        store(out + i * step, (vec)__builtin_convertvector(whole, floats));
    }
}

// out[d · step + i] = number d of row i, for `lanes` rows of `width` numbers.
template <class T>
inline void transpose_rows(const T* const* rows, int64_t width, float* out, int64_t step) {
    constexpr int64_t at_once = 16 / sizeof(T);
    int64_t d = 0;
    for (; d + at_once <= width; d += at_once) {
        const uint8_t* here[lanes];
        QK_UNROLL for (int i = 0; i < lanes; i++) {
            here[i] = reinterpret_cast<const uint8_t*>(rows[i] + d);
        }
        lane_words words[4];
        transpose(here, words);
        QK_UNROLL for (int t = 0; t < 4; t++) {
            store_words(words[t], rows[0], out + (d + t * at_once / 4) * step, step);
        }
    }
    for (; d < width; d++) {
        for (int i = 0; i < lanes; i++) out[d * step + i] = widened_one(rows[i][d]);
    }
}

// The same for rows of four bits.
inline void transpose_rows(const uint8_t* const* rows, int64_t width, float* out, int64_t step) {
    using floats = float __attribute__((vector_size(sizeof(vec))));
    for (int64_t first = 0; first < width; first += group_numbers) {
        const uint8_t* codes[lanes];
        int32_t heads[lanes];
        for (int i = 0; i < lanes; i++) {
            const uint8_t* group = rows[i] + first / group_numbers * group_bytes;
            std::memcpy(heads + i, group, group_head);
            codes[i] = group + group_head;
        }
        lane_words head, words[4];
        std::memcpy(&head, heads, sizeof head);
        transpose(codes, words);
        vec scale = (vec)(head << 16), minimum = (vec)(head >> 16 << 16);
        auto put = [&](lane_words code, int64_t d) {
            vec whole = (vec)__builtin_convertvector(code & 15, floats);
            if (d < width) store(out + d * step, fma(whole, scale, minimum));
        };
        QK_UNROLL for (int t = 0; t < 4; t++) {
            QK_UNROLL for (int i = 0; i < 4; i++) {
                put(words[t] >> (8 * i), first + 4 * t + i);
                put(words[t] >> (8 * i + 4), first + group_numbers / 2 + 4 * t + i);
            }
        }
    }
}

// `width` numbers of a row, up to whole vectors of them.
template <class T>
inline void widen_row(const T* row, int64_t width, float* out) {
    for (int64_t d = 0; d < width; d += lanes) {
        store(out + d, widened_some(row + d, width - d));
    }
}

inline void widen_row(const uint8_t* row, int64_t width, float* out) {
    for (int64_t d = 0; d < width; row += group_bytes) {
        uint16_t head[2];
        std::memcpy(head, row, sizeof head);
        vec scale = splat(widened_one(head[0])), minimum = splat(widened_one(head[1]));
        Group codes = widen(nibbles(row + group_head));
        for (int i = 0; i < 32 / lanes && d < width; i++, d += lanes) {
            store(out + d, fma(codes.v[i], scale, minimum));
        }
    }
}

}  // namespace qk
