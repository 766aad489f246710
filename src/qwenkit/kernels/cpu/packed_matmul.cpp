// x [tokens, columns] times the transpose of packed matrices: y [tokens, rows], fp32.
//
// Activations are rounded once per call: to eight bits by groups of columns for int4 and int8
// weights, to bf16 for bf16 weights where the processor multiplies such. The tiles of packed.h
// then go through the panels; for many tokens int4 is first taken apart into bytes, a few panels
// at a time, in memory that stays in the second-level cache.
#include "packed.h"
#include "packed_amx.h"
#include "packed_round.h"
#include "threads.h"

namespace qk {
namespace {

constexpr int64_t many_tokens = 16;  // from which on int4 is taken apart first

int64_t row_bytes(int64_t kind, int64_t columns) {
    return kind == int4 ? columns / 2 : kind == int8 ? columns : kind == bf16 ? columns * 2
                                                                              : columns * 4;
}

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
        if (has_rest(x, x.groups, token, Tokens)) {
            multiply_ints<Kind, Tokens, Count, true>(p, x, token, y);
        } else {
            multiply_ints<Kind, Tokens, Count, false>(p, x, token, y);
        }
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

// All tokens from `token` on over `wide` panels, in tiles as equal as can be.
template <class Multiply>
void multiply_all(const PackedMatmulArguments& a, const Panels& panels, const Activations& x,
                  int64_t row, bool both, int64_t token = 0) {
    int64_t left = a.tokens - token, start = token;
    int64_t tiles = (left + tile_tokens - 1) / tile_tokens;
    for (int64_t i = 0; i < tiles; i++) {
        int64_t end = start + (i + 1) * left / tiles;
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

#if defined(QK_TILES)

bool in_int_tiles(const PackedMatmulArguments& a) {
    return a.kind <= int8 && a.tokens >= many_tokens && a.group % 64 == 0 &&
           (a.kind == int4 || a.zero_point == 128);
}

bool in_bf16_tiles(const PackedMatmulArguments& a) {
    return a.kind == bf16 && a.columns % 32 == 0;
}

// As many tokens as fill tiles; returns how many those were.
int64_t multiply_int_tiles(const PackedMatmulArguments& a, const Panels& panels,
                           const Activations& x, int64_t row, int count, uint8_t* apart) {
    TileUnit unit;
    int64_t whole = a.tokens / tile_side * tile_side;
    for (int p = 0; p < count; p++) {
        Panels one{panels.data + p * panels.bytes, panels.scales + p * x.groups * panel_rows,
                   panels.mins ? panels.mins + p * x.groups * panel_rows : nullptr, 0};
        take_apart_signed(one.data, a.kind == int4, static_cast<int>(a.zero_point), a.columns,
                          apart);
        for (int64_t token = 0; token < whole; token += tile_side) {
            vec sums[tile_side][1];
            multiply_int_tile(apart, one, x, token, sums[0]);
            put<tile_side, 1>(a, row + p * panel_rows, token, sums);
        }
    }
    return whole;
}

template <int Blocks, int Count>
void multiply_bf16_block(const PackedMatmulArguments& a, const Panels& panels,
                         const Activations& x, int64_t row, int64_t token) {
    alignas(64) TileResults results[Blocks][Count];
    multiply_bf16_tiles<Blocks, Count>(panels, x, token, results);
    int64_t tokens = std::min<int64_t>(Blocks * tile_side, a.tokens - token);
    for (int64_t t = 0; t < tokens; t++) {
        vec sums[1][Count];
        for (int p = 0; p < Count; p++) {
            sums[0][p] = load(results[t / tile_side][p][t % tile_side]);
        }
        put<1, Count>(a, row, token + t, sums);
    }
}

template <int Count>
void multiply_bf16_all(const PackedMatmulArguments& a, const Panels& panels, const Activations& x,
                       int64_t row) {
    TileUnit unit;
    int64_t token = 0;
    for (; a.tokens - token > tile_side; token += 2 * tile_side) {
        multiply_bf16_block<2, Count>(a, panels, x, row, token);
    }
    if (token < a.tokens) multiply_bf16_block<1, Count>(a, panels, x, row, token);
}

#endif

// One unit of work: `wide` panels of a matrix, or the last one alone.
void multiply_unit(const PackedMatmulArguments& a, const Activations& x, int64_t unit,
                   uint8_t* apart) {
    int64_t first = unit * wide, row = first * panel_rows;
    bool both = row + panel_rows < a.rows;
    int64_t bytes = row_bytes(a.kind, a.columns) * panel_rows;
    Panels panels{a.data + first * bytes, nullptr, nullptr, bytes};
#if defined(QK_TILES)
    if (in_bf16_tiles(a)) {
        return both ? multiply_bf16_all<2>(a, panels, x, row)
                    : multiply_bf16_all<1>(a, panels, x, row);
    }
#endif
    if (a.kind == bf16) return multiply_all<Floats<Halves>>(a, panels, x, row, both);
    if (a.kind == fp32) return multiply_all<Floats<Singles>>(a, panels, x, row, both);
    panels.scales = a.scales + first * x.groups * panel_rows;
    if (a.mins) panels.mins = a.mins + first * x.groups * panel_rows;
    int64_t done = 0;
#if defined(QK_TILES)
    if (in_int_tiles(a)) {
        done = multiply_int_tiles(a, panels, x, row, both ? 2 : 1, apart);
        apart = nullptr;
    }
#endif
    if (a.kind == int8) return multiply_all<Ints<Bytes<255>>>(a, panels, x, row, both, done);
    if (!apart) return multiply_all<Ints<Nibbles>>(a, panels, x, row, both, done);
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
    int64_t bytes_of_bits = a.tokens / 8 + 4;  // four are read at once
    size_t per_bits = padded(static_cast<size_t>((groups + 1) * bytes_of_bits));
    // Rows that fill up a tile of bf16 are zeros.
    auto halves = static_cast<size_t>((a.tokens + 31) / 32 * 32 * a.columns) * 2;
    size_t rounded = a.kind <= int8   ? 2 * padded(numbers) + 5 * per_group + per_bits
                     : a.kind == bf16 ? padded(halves)
                                      : 0;
    bool apart = a.kind <= int8 && a.tokens >= many_tokens;
    size_t per_slot = apart ? static_cast<size_t>(wide * panel_rows * a.columns) : 0;
    auto threads = static_cast<int>(a.threads);
    auto* memory = reinterpret_cast<uint8_t*>(
        scratch((rounded + per_slot * static_cast<size_t>(threads) + 64) / 4));
    if (!memory) return 2;
    Rounded out{};
    out.halves = reinterpret_cast<uint16_t*>(memory);
    uint8_t* at = memory;
    for (int part = 0; part < 2; part++, at += 2 * per_group) {
        out.quants[part] = reinterpret_cast<int8_t*>(at);
        at += padded(numbers);
        out.scales[part] = reinterpret_cast<float*>(at);
        out.offsets[part] = reinterpret_cast<int32_t*>(at + per_group);
    }
    out.sums = reinterpret_cast<float*>(at);
    out.with_rest = at + per_group;
    out.bytes_of_bits = bytes_of_bits;
    if (a.kind == bf16) std::memset(out.halves + numbers, 0, halves - numbers * 2);
    if (a.kind != fp32) {
        int64_t per_chunk = std::max<int64_t>(1, 16384 / a.columns);
        parallel((a.tokens + per_chunk - 1) / per_chunk, threads, [&](int64_t chunk, int) {
            int64_t end = std::min(a.tokens, (chunk + 1) * per_chunk);
            for (int64_t t = chunk * per_chunk; t < end; t++) round_token(a, out, t);
        });
    }
    if (a.kind <= int8) find_rests(out, a.tokens, groups);
    Activations x{{out.quants[0], out.scales[0], out.offsets[0]},
                  {out.quants[1], out.scales[1], out.offsets[1]},
                  out.with_rest, out.bytes_of_bits, out.sums, out.halves, a.x, a.columns, a.group, groups};
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
