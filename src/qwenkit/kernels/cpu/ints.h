// Whole numbers beside `vec`: as many 32-bit lanes, and four bytes for each of them.
#pragma once

#include <cstdint>
#include <cstring>

#include "simd.h"

namespace qk {

using words = int32_t __attribute__((vector_size(lanes * 4)));
using bytes = uint8_t __attribute__((vector_size(lanes * 4)));
using floats = float __attribute__((vector_size(lanes * 4)));

inline words splat_word(int32_t v) { return words{} + v; }
inline vec to_float(words w) { return (vec) __builtin_convertvector(w, floats); }

inline int32_t highest_word(words w) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_epi32((__m512i)w);
#else
    int32_t highest = w[0];
    for (int i = 1; i < lanes; i++) highest = w[i] > highest ? w[i] : highest;
    return highest;
#endif
}

inline int32_t sum_of_words(words w) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_epi32((__m512i)w);
#else
    int32_t sum = 0;
    for (int i = 0; i < lanes; i++) sum += w[i];
    return sum;
#endif
}

// The lowest byte of each lane.
inline void store_narrow(int8_t* p, words w) {
#if defined(__AVX512F__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8((__m512i)w));
#else
    using narrow = int8_t __attribute__((vector_size(lanes)));
    narrow stored = __builtin_convertvector(w, narrow);
    std::memcpy(p, &stored, sizeof stored);
#endif
}

inline bytes load_bytes(const uint8_t* p) {
    bytes v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

inline void store_bytes(uint8_t* p, bytes v) { std::memcpy(p, &v, sizeof v); }

// The same four bytes in every lane.
inline words splat_bytes(const int8_t* p) {
    int32_t v;
    std::memcpy(&v, p, 4);
    return splat_word(v);
}

// A table of sixteen bytes in every sixteen bytes of a vector.
inline bytes splat_table(const uint8_t* table) {
    bytes v;
    for (size_t i = 0; i < sizeof v; i += 16) std::memcpy(reinterpret_cast<uint8_t*>(&v) + i, table, 16);
    return v;
}

// table[index] for each byte below 16.
inline bytes look_up(bytes table, bytes index) {
#if defined(__AVX512BW__)
    return (bytes)_mm512_shuffle_epi8((__m512i)table, (__m512i)index);
#elif defined(__AVX2__)
    return (bytes)_mm256_shuffle_epi8((__m256i)table, (__m256i)index);
#elif defined(__ARM_NEON)
    return (bytes)vqtbl1q_u8((uint8x16_t)table, (uint8x16_t)index);
#else
    bytes found;
    for (size_t i = 0; i < sizeof found; i++) found[i] = table[index[i]];
    return found;
#endif
}

inline bytes low_nibbles(bytes v) { return v & 15; }

inline bytes high_nibbles(bytes v) {
#if defined(__AVX512BW__)
    return (bytes)_mm512_and_si512(_mm512_srli_epi16((__m512i)v, 4), _mm512_set1_epi8(15));
#elif defined(__AVX2__)
    return (bytes)_mm256_and_si256(_mm256_srli_epi16((__m256i)v, 4), _mm256_set1_epi8(15));
#else
    return v >> 4;
#endif
}

// sum + the dot product of four bytes in each lane: w in [0, Most] × x in [-127, 127], exact.
template <int Most>
inline words dot4(words sum, bytes w, words x) {
#if defined(__AVX512VNNI__)
    return (words)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)x);
#elif defined(__AVX512BW__)
    if constexpr (Most < 128) {
        __m512i pairs = _mm512_maddubs_epi16((__m512i)w, (__m512i)x);
        return sum + (words)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
    }
    __m512i even = _mm512_and_si512((__m512i)w, _mm512_set1_epi16(255));
    __m512i odd = _mm512_srli_epi16((__m512i)w, 8);
    __m512i x_even = _mm512_srai_epi16(_mm512_slli_epi16((__m512i)x, 8), 8);
    __m512i x_odd = _mm512_srai_epi16((__m512i)x, 8);
    return sum + ((words)_mm512_madd_epi16(even, x_even) + (words)_mm512_madd_epi16(odd, x_odd));
#elif defined(__AVXVNNI__)
    return (words)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)w, (__m256i)x);
#else
#if defined(__ARM_FEATURE_DOTPROD)
    if constexpr (Most < 128) {
        return (words)vdotq_s32((int32x4_t)sum, (int8x16_t)w, (int8x16_t)x);
    }
    // w = (w - 128) + 128: the second part is 128 · Σx.
    int32x4_t shifted = vdotq_s32((int32x4_t)sum, (int8x16_t)(w ^ 128), (int8x16_t)x);
    int32x4_t total = vdotq_s32(vdupq_n_s32(0), vdupq_n_s8(64), (int8x16_t)x);
    return (words)vaddq_s32(shifted, vshlq_n_s32(total, 1));
#else
    for (int c = 0; c < 4; c++) {
        sum += ((words)w >> (8 * c) & 255) * ((words)x << (24 - 8 * c) >> 24);
    }
    return sum;
#endif
#endif
}

// Dot products of four bytes in each lane, added up from `start` on; at most eight of them. Weights
// come as `Numbers`: as they are, or those of a table at some places.
#if defined(__AVX2__) && !defined(__AVX512BW__) && !defined(__AVXVNNI__)
// Pairs of products are added up as they come, in sixteen bits: eight of numbers of four bits fit,
// and numbers of eight are two of these. Only their sums are widened.
template <int Most>
class Dots {
  public:
    static constexpr int registers = Most > 15 ? 2 : 1;

    Dots() = default;
    explicit Dots(words start) : start_(start) {}

    struct Numbers {
        bytes low, high;
    };

    static Numbers numbers(bytes w) {
        if constexpr (registers == 1) return {w, w};
        return {low_nibbles(w), high_nibbles(w)};
    }

    static Numbers look_up(bytes table, bytes index) {
        return {qk::look_up(low_nibbles(table), index), qk::look_up(high_nibbles(table), index)};
    }

    void add(const Numbers& w, words x) {
        low_ = low_ + pairs(w.low, x);
        asm("" : "+x"(low_));  // else compilers form all products first, and run out of registers
        if constexpr (registers == 1) return;
        high_ = high_ + pairs(w.high, x);
        asm("" : "+x"(high_));
    }

    words total() const {
        words sum = start_ + (words)_mm256_madd_epi16((__m256i)low_, _mm256_set1_epi16(1));
        if constexpr (registers == 1) return sum;
        return sum + (words)_mm256_madd_epi16((__m256i)high_, _mm256_set1_epi16(16));
    }

  private:
    using shorts = int16_t __attribute__((vector_size(32)));

    static shorts pairs(bytes w, words x) {
        return (shorts)_mm256_maddubs_epi16((__m256i)w, (__m256i)x);
    }

    words start_;
    shorts low_{}, high_{};
};
#else
template <int Most>
class Dots {
  public:
    static constexpr int registers = 1;
    using Numbers = bytes;

    static Numbers numbers(bytes w) { return w; }
    static Numbers look_up(bytes table, bytes index) { return qk::look_up(table, index); }

    Dots() = default;
    explicit Dots(words start) : sum_(start) {}

    void add(bytes w, words x) { sum_ = dot4<Most>(sum_, w, x); }

    words total() const { return sum_; }

  private:
    words sum_;
};
#endif

// Sixteen neighbouring half-precision numbers as fp32 vectors.
inline void widen_halves(const uint16_t* p, vec out[16 / lanes]) {
#if defined(__AVX512F__)
    out[0] = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
    out[0] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    out[1] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)));
#else
    using shorts = uint16_t __attribute__((vector_size(lanes * 2)));
    for (int i = 0; i < 16 / lanes; i++) {
        shorts narrow;
        std::memcpy(&narrow, p + i * lanes, sizeof narrow);
        words all = __builtin_convertvector(narrow, words);
        vec size = (vec)((all & 0x7fff) << 13) * splat(0x1p112f);  // the exponents' biases differ
        words endless = ((all & 0x7c00) == 0x7c00) & 0x7f800000;   // infinite, or NaN
        out[i] = (vec)((words)size | endless | (all & 0x8000) << 16);
    }
#endif
}

}  // namespace qk
