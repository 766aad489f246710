// x [tokens, columns] times the transpose of packed matrices: y [tokens, rows], fp32.
//
// Activations are rounded once per call: to eight bits by groups of columns for int4 and int8
// weights, to bf16 for bf16 weights where the processor multiplies such. The tiles of packed.h
// then go through the panels; for many tokens int4 is first taken apart into bytes, a few panels
// at a time, in memory that stays in the second-level cache.
#include <cmath>
#include <limits>

#include "packed.h"
#include "threads.h"

struct PackedMatmulArguments {
    const float* x;
    const uint8_t* data;
    const uint16_t *scales, *mins;    // mins null: the format has none
    const float *bias, *residual;     // [rows] and [tokens, rows] to be added, or null
    float* y;
    const PackedMatmulArguments* next;  // another matrix that takes the same x, or null
    int64_t tokens, rows, columns, group, kind, zero_point, threads;
};

namespace qk {
namespace {

enum Kind { int4 = 0, int8 = 1, bf16 = 2, fp32 = 3 };

constexpr int64_t many_tokens = 16;  // from which on int4 is taken apart first

int64_t row_bytes(int64_t kind, int64_t columns) {
    return kind == int4 ? columns / 2 : kind == int8 ? columns : kind == bf16 ? columns * 2
                                                                              : columns * 4;
}

// ---- activations --------------------------------------------------------------------------

// One group to whole numbers in [-127, 127], to nearest even. A group with NaN or infinity in it
// gets a scale of NaN, so that what becomes of it is seen. Returns the sum of the whole numbers.
int32_t quantize_group(const float* x, int64_t count, int8_t* quants, float* scale) {
    words most{};
    for (int64_t i = 0; i < count; i += lanes) {
        words magnitude = (words)load(x + i) & 0x7fffffff;
        most = magnitude > most ? magnitude : most;
    }
    int32_t highest = 0;
    for (int i = 0; i < lanes; i++) highest = std::max<int32_t>(highest, most[i]);
    float amax;
    std::memcpy(&amax, &highest, 4);
    bool finite = highest < 0x7f800000;
    float inverse = finite && amax > 1e-30f ? 127.0f / amax : 0.0f;
    *scale = finite ? (inverse > 0 ? amax / 127.0f : 0.0f)
                    : std::numeric_limits<float>::quiet_NaN();
    if (!finite) {
        std::memset(quants, 0, static_cast<size_t>(count));
        return 0;
    }
    const vec magic = splat(12582912.0f);  // 1.5 · 2^23: adding it rounds to a whole number
    words total{};
    for (int64_t i = 0; i < count; i += lanes) {
        words whole = (words)(load(x + i) * splat(inverse) + magic) - (words)magic;
        total += whole;
        using narrow = int8_t __attribute__((vector_size(lanes)));
        narrow stored = __builtin_convertvector(whole, narrow);
        std::memcpy(quants + i, &stored, sizeof stored);
    }
    int32_t sum = 0;
    for (int i = 0; i < lanes; i++) sum += total[i];
    return sum;
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

struct Rounded {
    int8_t* quants;
    float *scales, *sums;
    int32_t* offsets;
    uint16_t* halves;
};

void round_token(const PackedMatmulArguments& a, const Rounded& out, int64_t token) {
    const float* x = a.x + token * a.columns;
    if (a.kind == bf16) return round_to_bf16(x, a.columns, out.halves + token * a.columns);
    int64_t groups = a.columns / a.group;
    for (int64_t g = 0; g < groups; g++) {
        int64_t at = token * groups + g;
        int32_t sum = quantize_group(x + g * a.group, a.group,
                                     out.quants + token * a.columns + g * a.group,
                                     out.scales + at);
        out.offsets[at] = -static_cast<int32_t>(a.zero_point) * sum;
        out.sums[at] = out.scales[at] * static_cast<float>(sum);
    }
}

// ---- tiles --------------------------------------------------------------------------------

// Results of up to `wide` panels for some tokens into y, with what is to be added to them.
template <int Tokens, int Count>
void put(const PackedMatmulArguments& a, int64_t row, int64_t token,
         const vec sums[Tokens][Count * per_panel]) {
    for (int t = 0; t < Tokens; t++) {
        int64_t at = (token + t) * a.rows + row;
        for (int v = 0; v < Count * per_panel; v++) {
            int64_t left = a.rows - row - v * lanes;
            if (left <= 0) break;
            vec result = sums[t][v];
            if (a.bias) result = result + load_some(a.bias + row + v * lanes, left);
            if (a.residual) result = result + load_some(a.residual + at + v * lanes, left);
            store_some(a.y + at + v * lanes, result, left);
        }
    }
}

template <class Multiply, int Tokens>
struct Tiles {
    // Walks down to the tile of exactly so many tokens.
    static void go(const PackedMatmulArguments& a, const Panels& panels, const Activations& x,
                   int64_t row, int64_t token, int64_t tokens, bool both) {
        if (tokens != Tokens) {
            if constexpr (Tokens > 1) {
                Tiles<Multiply, Tokens - 1>::go(a, panels, x, row, token, tokens, both);
            }
            return;
        }
        if (both) {
            vec sums[Tokens][wide * per_panel];
            Multiply::template run<Tokens, wide>(panels, x, token, sums);
            put<Tokens, wide>(a, row, token, sums);
        } else {
            vec sums[Tokens][per_panel];
            Multiply::template run<Tokens, 1>(panels, x, token, sums);
            put<Tokens, 1>(a, row, token, sums);
        }
    }
};

template <class Kind>
struct Ints {
    template <int Tokens, int Count>
    static void run(const Panels& p, const Activations& x, int64_t token,
                    vec y[Tokens][Count * per_panel]) {
        multiply_ints<Kind, Tokens, Count>(p, x, token, y);
    }
};

template <class Kind>
struct Floats {
    template <int Tokens, int Count>
    static void run(const Panels& p, const Activations& x, int64_t token,
                    vec y[Tokens][Count * per_panel]) {
        multiply_floats<Kind, Tokens, Count>(p, x, token, y);
    }
};

// All tokens over `wide` panels, in tiles as equal as can be.
template <class Multiply>
void multiply_all(const PackedMatmulArguments& a, const Panels& panels, const Activations& x,
                  int64_t row, bool both) {
    int64_t tiles = (a.tokens + tile_tokens - 1) / tile_tokens;
    int64_t token = 0;
    for (int64_t i = 0; i < tiles; i++) {
        int64_t end = (i + 1) * a.tokens / tiles;
        Tiles<Multiply, tile_tokens>::go(a, panels, x, row, token, end - token, both);
        token = end;
    }
}

void take_apart(const uint8_t* nibbles, int64_t columns, uint8_t* out) {
    for (int64_t column = 0; column < columns; column += 32) {
        for (int i = 0; i < 256; i += lanes * 4) {
            bytes both = load_bytes(nibbles + i);
            store_bytes(out + i, low_nibbles(both));
            store_bytes(out + 256 + i, high_nibbles(both));
        }
        nibbles += 256;
        out += 512;
    }
}

// One unit of work: `wide` panels of a matrix, or the last one alone.
void multiply_unit(const PackedMatmulArguments& a, const Activations& x, int64_t unit,
                   uint8_t* apart) {
    int64_t first = unit * wide, row = first * panel_rows;
    bool both = row + panel_rows < a.rows;
    int64_t bytes = row_bytes(a.kind, a.columns) * panel_rows;
    Panels panels{a.data + first * bytes, nullptr, nullptr, bytes};
    if (a.kind == bf16) return multiply_all<Floats<Halves>>(a, panels, x, row, both);
    if (a.kind == fp32) return multiply_all<Floats<Singles>>(a, panels, x, row, both);
    panels.scales = a.scales + first * x.groups * panel_rows;
    if (a.mins) panels.mins = a.mins + first * x.groups * panel_rows;
    if (a.kind == int8) return multiply_all<Ints<Bytes<255>>>(a, panels, x, row, both);
    if (!apart) return multiply_all<Ints<Nibbles>>(a, panels, x, row, both);
    for (int i = 0; i < (both ? wide : 1); i++) {
        take_apart(panels.data + i * bytes, a.columns, apart + i * bytes * 2);
    }
    panels.data = apart;
    panels.bytes = bytes * 2;
    multiply_all<Ints<Bytes<15>>>(a, panels, x, row, both);
}

int64_t units(const PackedMatmulArguments& a) {
    int64_t rows = wide * panel_rows;
    return (a.rows + rows - 1) / rows;
}

size_t padded(size_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace
}  // namespace qk

// All matrices of a chain have the same x, tokens, columns, group, kind and zero point. 0, or 2
// when there is no memory.
QK_EXPORT int qk_packed_matmul(const PackedMatmulArguments* first) {
    using namespace qk;
    const PackedMatmulArguments& a = *first;
    int64_t groups = a.kind <= int8 ? a.columns / a.group : 0;
    auto numbers = static_cast<size_t>(a.tokens * a.columns);
    size_t per_group = padded(static_cast<size_t>(a.tokens * groups) * 4);
    size_t rounded = a.kind <= int8 ? padded(numbers) + 3 * per_group
                     : a.kind == bf16 ? padded(numbers * 2) : 0;
    bool apart = a.kind == int4 && a.tokens >= many_tokens;
    size_t per_slot = apart ? static_cast<size_t>(wide * panel_rows * a.columns) : 0;
    auto threads = static_cast<int>(a.threads);
    auto* memory = reinterpret_cast<uint8_t*>(
        scratch((rounded + per_slot * static_cast<size_t>(threads) + 64) / 4));
    if (!memory) return 2;
    uint8_t* at = memory + padded(numbers);
    Rounded out{reinterpret_cast<int8_t*>(memory), reinterpret_cast<float*>(at),
                reinterpret_cast<float*>(at + per_group),
                reinterpret_cast<int32_t*>(at + 2 * per_group),
                reinterpret_cast<uint16_t*>(memory)};
    if (a.kind != fp32) {
        int64_t per_chunk = std::max<int64_t>(1, 16384 / a.columns);
        parallel((a.tokens + per_chunk - 1) / per_chunk, threads, [&](int64_t chunk, int) {
            int64_t end = std::min(a.tokens, (chunk + 1) * per_chunk);
            for (int64_t t = chunk * per_chunk; t < end; t++) round_token(a, out, t);
        });
    }
    Activations x{out.quants, out.scales, out.offsets, out.sums, out.halves,
                  a.x, a.columns, a.group, groups};
    int64_t total = 0, all_bytes = 0;
    for (auto* m = first; m; m = m->next) {
        total += units(*m);
        all_bytes += m->rows * row_bytes(m->kind, m->columns);
    }
    // Few tokens: few chunks, since each starts with nothing prefetched, but none below 16 KB.
    int64_t chunks = a.tokens > 8 ? total : std::min<int64_t>(threads * 4, 1 + all_bytes / 16384);
    int64_t per_chunk = (total + chunks - 1) / chunks;
    parallel((total + per_chunk - 1) / per_chunk, threads, [&](int64_t chunk, int slot) {
        const PackedMatmulArguments* m = first;
        int64_t before = 0, end = std::min(total, (chunk + 1) * per_chunk);
        for (int64_t unit = chunk * per_chunk; unit < end; unit++) {
            while (unit - before >= units(*m)) {
                before += units(*m);
                m = m->next;
            }
            uint8_t* own = apart ? memory + rounded + per_slot * static_cast<size_t>(slot) : nullptr;
            multiply_unit(*m, x, unit - before, own);
        }
    });
    return 0;
}
