// The vector of one instruction set, chosen by the flags this file is compiled with.
//
// Every op is written once over `vec` and compiled once per variant, each into a library of its
// own, so that no inline function of one variant can be linked into another. Nothing here may
// depend on how many rows or threads a call has: the order of every sum is fixed by `vec` alone.
#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define QK_EXPORT extern "C" __attribute__((visibility("default")))
#define QK_UNROLL _Pragma("GCC unroll 32")

namespace qk {

#if defined(__AVX512F__)

using vec = __m512;
constexpr int lanes = 16;
constexpr int tile_tokens = 6;  // 24 sums, 6 activations, 1 weight: 31 of 32 registers

inline vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, vec v) { _mm512_storeu_ps(p, v); }
inline vec splat(float v) { return _mm512_set1_ps(v); }
inline vec fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
inline vec min(vec a, vec b) { return _mm512_min_ps(a, b); }
inline vec max(vec a, vec b) { return _mm512_max_ps(a, b); }

// The sums over the lanes of four vectors; lane i meets i + 8, then i + 4, i + 2, i + 1.
inline void sum4(const vec v[4], float* out) {
    vec ab = _mm512_add_ps(_mm512_shuffle_f32x4(v[0], v[1], 0x44),
                           _mm512_shuffle_f32x4(v[0], v[1], 0xee));
    vec cd = _mm512_add_ps(_mm512_shuffle_f32x4(v[2], v[3], 0x44),
                           _mm512_shuffle_f32x4(v[2], v[3], 0xee));
    vec quads = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88),
                              _mm512_shuffle_f32x4(ab, cd, 0xdd));
    quads = _mm512_add_ps(quads, _mm512_permute_ps(quads, 0x4e));
    quads = _mm512_add_ps(quads, _mm512_permute_ps(quads, 0xb1));
    __m512i firsts = _mm512_castsi128_si512(_mm_setr_epi32(0, 4, 8, 12));
    _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_permutexvar_ps(firsts, quads)));
}

// 2^n for whole n in [-126, 127].
inline vec power_of_two(vec n) {
    __m512i bits = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 23));
}

inline vec widen_unsigned(const uint8_t* p) {
    __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
}

inline vec widen_signed(const uint8_t* p) {
    __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}

#elif defined(__AVX2__)

using vec = __m256;
constexpr int lanes = 8;
constexpr int tile_tokens = 3;  // 12 sums, 3 activations, 1 weight: all 16 registers

inline vec load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, vec v) { _mm256_storeu_ps(p, v); }
inline vec splat(float v) { return _mm256_set1_ps(v); }
inline vec fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
inline vec min(vec a, vec b) { return _mm256_min_ps(a, b); }
inline vec max(vec a, vec b) { return _mm256_max_ps(a, b); }

// The sums over the lanes of four vectors; lane i meets i + 1, then i + 2, then i + 4.
inline void sum4(const vec v[4], float* out) {
    vec pairs = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
}

inline vec power_of_two(vec n) {
    __m256i bits = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 23));
}

inline vec widen_unsigned(const uint8_t* p) {
    __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
}

inline vec widen_signed(const uint8_t* p) {
    __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
}

#else

// Four lanes by the compiler's vector extension: SSE2, NEON or whatever the machine has.
using vec = float __attribute__((vector_size(16)));
using words = int32_t __attribute__((vector_size(16)));
constexpr int lanes = 4;
constexpr int tile_tokens = 2;

inline vec load(const float* p) {
    vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
inline void store(float* p, vec v) { std::memcpy(p, &v, sizeof v); }
inline vec splat(float v) { return vec{v, v, v, v}; }
#if defined(__ARM_NEON)
inline vec fma(vec a, vec b, vec c) {
    return (vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
#else
inline vec fma(vec a, vec b, vec c) { return a * b + c; }
#endif
inline vec min(vec a, vec b) { return a < b ? a : b; }
inline vec max(vec a, vec b) { return a > b ? a : b; }

// The sums over the lanes of four vectors; lane i meets i + 2, then i + 1.
inline void sum4(const vec v[4], float* out) {
    for (int i = 0; i < 4; i++) out[i] = (v[i][0] + v[i][2]) + (v[i][1] + v[i][3]);
}

inline vec power_of_two(vec n) { return (vec)((__builtin_convertvector(n, words) + 127) << 23); }

inline vec widen_unsigned(const uint8_t* p) {
    return __builtin_convertvector((words{p[0], p[1], p[2], p[3]}), vec);
}

inline vec widen_signed(const uint8_t* p) {
    const int8_t* q = reinterpret_cast<const int8_t*>(p);
    return __builtin_convertvector((words{q[0], q[1], q[2], q[3]}), vec);
}

#endif

// The largest lane.
inline float highest_lane(vec v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps(v);
#elif defined(__AVX2__)
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
#else
    float left = v[0] > v[1] ? v[0] : v[1], right = v[2] > v[3] ? v[2] : v[3];
    return left > right ? left : right;
#endif
}

// The first `count` lanes from memory (none when it is negative) and zeros after them; nothing
// beyond is read or written.
inline vec load_some(const float* p, int64_t count) {
    if (count >= lanes) return load(p);
    float padded[lanes] = {};
    if (count > 0) std::memcpy(padded, p, static_cast<size_t>(count) * sizeof(float));
    return load(padded);
}

inline void store_some(float* p, vec v, int64_t count) {
    if (count >= lanes) return store(p, v);
    float padded[lanes];
    store(padded, v);
    if (count > 0) std::memcpy(p, padded, static_cast<size_t>(count) * sizeof(float));
}

// To memory that is not read again soon: past the caches, where the address allows it. What was
// stored so is seen by other threads after `settle`.
inline void store_far(float* p, vec v) {
#if defined(__AVX512F__)
    if (reinterpret_cast<uintptr_t>(p) % sizeof v == 0) return _mm512_stream_ps(p, v);
#endif
    store(p, v);
}

inline void settle() {
#if defined(__AVX512F__)
    _mm_sfence();
#endif
}

// exp by 2^n · exp(r) with |r| at most ln 2 / 2 and seven terms of the series: within two units in
// the last place. Arguments are held where the result is a normal number; NaN stays NaN.
inline vec exponential(vec x) {
    x = min(splat(88.0f), max(splat(-87.0f), x));  // in this order NaN passes on every machine
    const vec round = splat(12582912.0f);  // 1.5 · 2^23: adding it leaves no room for a fraction
    vec n = (x * splat(1.44269504f) + round) - round;
    vec r = fma(n, splat(-0.693359375f), x);  // ln 2 in two pieces, the first exact times n
    r = fma(n, splat(2.12194440e-4f), r);
    vec series = splat(1.0f / 5040);
    for (float term : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 1.0f / 2, 1.0f, 1.0f}) {
        series = fma(series, r, splat(term));
    }
    return series * power_of_two(n);
}

// An fp16 number at any address.
inline float half(const uint8_t* p) {
    uint16_t bits;
    std::memcpy(&bits, p, 2);
#if defined(__F16C__)
    return _cvtsh_ss(bits);
#else
    uint32_t sign = uint32_t(bits & 0x8000) << 16;
    uint32_t rest = uint32_t(bits & 0x7fff) << 13;
    float value;
    if ((bits & 0x7c00) == 0) {  // zero or subnormal: a whole number of 2^-24
        value = float(bits & 0x3ff) * 0x1p-24f;
        return sign ? -value : value;
    }
    bool finite = (bits & 0x7c00) != 0x7c00;
    uint32_t word = sign | (finite ? rest + (uint32_t(127 - 15) << 23) : rest | 0x7f800000);
    std::memcpy(&value, &word, 4);
    return value;
#endif
}

struct TwoHalves {
    vec first, second;
};

// Two neighbouring fp16 numbers, each in all lanes. At least eight bytes must be readable.
inline TwoHalves two_halves(const uint8_t* p) {
#if defined(__AVX512F__)
    __m128 pair = _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    return {_mm512_broadcastss_ps(pair),
            _mm512_permutexvar_ps(_mm512_set1_epi32(1), _mm512_castps128_ps512(pair))};
#elif defined(__AVX2__)
    __m128 pair = _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    return {_mm256_broadcastss_ps(pair), _mm256_broadcastss_ps(_mm_movehdup_ps(pair))};
#else
    return {splat(half(p)), splat(half(p + 2))};
#endif
}

// Quants as bytes, in the order of the numbers they stand for.
using bytes32 = uint8_t __attribute__((vector_size(32)));

inline bytes32 load_bytes32(const uint8_t* p) {
    bytes32 v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

// 16 bytes as 32 quants: the low halves of all bytes, then the high halves.
inline bytes32 nibbles(const uint8_t* p) {
#if defined(__AVX2__)
    __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(packed),
                                           _mm_srli_epi16(packed, 4), 1);
    return (bytes32)_mm256_and_si256(both, _mm256_set1_epi8(15));
#else
    uint8_t both[32];
    for (int i = 0; i < 16; i++) {
        both[i] = p[i] & 15;
        both[i + 16] = p[i] >> 4;
    }
    return load_bytes32(both);
#endif
}

// 32 bits, bit i as 16 or 0 in byte i: the fifth bits of quants.
inline bytes32 fifth_bits(const uint8_t* p) {
#if defined(__AVX2__)
    int32_t word;
    std::memcpy(&word, p, 4);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
    return (bytes32)_mm256_maskz_set1_epi8(static_cast<__mmask32>(word), 16);
#else
    __m256i source = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202,
                                        0x0303030303030303);
    __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi32(word), source);
    __m256i bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
    __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit);
    return (bytes32)_mm256_and_si256(set, _mm256_set1_epi8(16));
#endif
#else
    uint8_t bits[32];
    for (int i = 0; i < 32; i++) bits[i] = (p[i / 8] >> (i % 8) & 1) << 4;
    return load_bytes32(bits);
#endif
}

// table[index] for 32 indices below 16.
inline bytes32 look_up(bytes32 index, const uint8_t table[16]) {
#if defined(__AVX2__)
    __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
    return (bytes32)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(half), (__m256i)index);
#else
    uint8_t found[32];
    for (int i = 0; i < 32; i++) found[i] = table[index[i]];
    return load_bytes32(found);
#endif
}

// Thirty-two neighbouring numbers of a row: the smallest piece that every block type has whole.
struct Group {
    vec v[32 / lanes];
};

inline Group widen(bytes32 bytes) {
    Group group;
#if defined(__AVX512F__)
    __m128i low = _mm256_castsi256_si128((__m256i)bytes);
    __m128i high = _mm256_extracti128_si256((__m256i)bytes, 1);
    group.v[0] = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(low));
    group.v[1] = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(high));
#else
    uint8_t stored[32];
    std::memcpy(stored, &bytes, 32);
    for (int i = 0; i < 32 / lanes; i++) group.v[i] = widen_unsigned(stored + i * lanes);
#endif
    return group;
}

}  // namespace qk
