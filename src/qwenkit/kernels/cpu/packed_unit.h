// One unit of the work of a product: a pair of panels times a block of tokens, and what is done with
// the sums.
#pragma once

#include "packed.h"
#include "packed_amx.h"
#include "packed_floats.h"
#include "packed_round.h"
#include "silu.h"

namespace qk {
namespace {

constexpr int64_t many_tokens = 64;        // from which on int4 is taken apart first
constexpr int64_t block_bytes = 1300 << 10;   // of activations that are multiplied at a time
constexpr int64_t block_tokens = 32;       // of which a block has a multiple
constexpr int64_t many_results = 128 << 10;  // that would only displace others
constexpr int64_t spare_tokens = 32;       // that are read beyond the last, and never used

int64_t row_bytes(int64_t kind, int64_t columns) {
    switch (kind) {
        case int4: return columns / 2;
        case bf16: return columns * 2;
        case fp32: return columns * 4;
        default: return columns;
    }
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// Some tokens of one part.
struct Block {
    int64_t part, first, last;
#if defined(QK_TILES)
    RestList rests[2];
#endif
};

// A pair of panels, and where their products go: rows of one matrix from `row` on, or a gate's
// panel and the one that it gates.
struct Unit {
    const PackedMatrix* matrix;
    Panels panels;
    int64_t row;
    int count;  // panels
    bool precise;
};

// Sums of the panels of a unit for some tokens into y, with what is to be done with them.
template <int Tokens>
void put(const PackedMatmulArguments& a, const Unit& u, int64_t token,
         const vec sums[Tokens][pair * per_panel]) {
    const PackedMatrix& m = *u.matrix;
    bool far = a.tokens > 16 && a.tokens * m.rows >= many_results;
    for (int t = 0; t < Tokens; t++) {
        int64_t at = (token + t) * m.rows + u.row;
        int vectors = a.gated ? per_panel : u.count * per_panel;
        for (int v = 0; v < vectors; v++) {
            int64_t left = m.rows - u.row - v * lanes;
            if (left <= 0) break;
            vec result = sums[t][v];
            if (m.bias) result = result + load_some(m.bias + u.row + v * lanes, left);
            if (a.gated) {
                const PackedMatrix& other = u.matrix[1];
                vec factor = sums[t][per_panel + v];
                if (other.bias) {
                    factor = factor + load_some(other.bias + u.row + v * lanes, left);
                }
                result = silu(result) * factor;
            }
            if (m.residual) result = result + load_some(m.residual + at + v * lanes, left);
            if (far && left >= lanes) {
                store_far(m.y + at + v * lanes, result);
            } else {
                store_some(m.y + at + v * lanes, result, left);
            }
        }
    }
}

template <class Multiply, int Tokens>
struct Tiles {
    // Walks down to the tile of exactly so many tokens.
    static void go(const PackedMatmulArguments& a, const Unit& u, const Activations& x,
                   int64_t token, int64_t tokens) {
        if (tokens != Tokens) {
            if constexpr (Tokens > 1) Tiles<Multiply, Tokens - 1>::go(a, u, x, token, tokens);
            return;
        }
        vec sums[Tokens][pair * per_panel];
        if constexpr (wide == pair) {
            if (u.count == pair) {
                Multiply::template run<Tokens, pair>(u.panels, x, token, sums);
                return put<Tokens>(a, u, token, sums);
            }
        }
        for (int p = 0; p < u.count; p++) {
            vec own[Tokens][per_panel];
            Multiply::template run<Tokens, 1>(u.panels.from(p), x, token, own);
            for (int t = 0; t < Tokens; t++) {
                std::copy(own[t], own[t] + per_panel, sums[t] + p * per_panel);
            }
        }
        put<Tokens>(a, u, token, sums);
    }
};

template <class Kind>
struct Ints {
    static constexpr int tile = Kind::tile;

    template <int Tokens, int Count>
    static void run(const Panels& p, const Activations& x, int64_t token,
                    vec y[Tokens][Count * per_panel]) {
        if (count_rests(x, x.groups, token, Tokens) > 0) {
            multiply_ints<Kind, Tokens, Count, true>(p, x, token, y);
        } else {
            multiply_ints<Kind, Tokens, Count, false>(p, x, token, y);
        }
    }
};

template <class Kind>
struct Floats {
    static constexpr int tile = Kind::tile;

    template <int Tokens, int Count>
    static void run(const Panels& p, const Activations& x, int64_t token,
                    vec y[Tokens][Count * per_panel]) {
        multiply_floats<Kind, Tokens, Count>(p, x, token, y);
    }
};

struct FloatsOfEight {
    static constexpr int tile = Eights::tile;

    template <int Tokens, int Count>
    static void run(const Panels& p, const Activations& x, int64_t token,
                    vec y[Tokens][Count * per_panel]) {
        multiply_eights<Tokens, Count>(p, x, token, y);
    }
};

// All tokens of a block, in tiles as equal as can be.
template <class Multiply>
void multiply_all(const PackedMatmulArguments& a, const Unit& u, const Activations& x,
                  const Block& block) {
    int64_t count = block.last - block.first, token = block.first;
    constexpr int most = Multiply::tile;
    int64_t tiles = divide_up(count, most);
    for (int64_t i = 1; i <= tiles; i++) {
        int64_t end = block.first + i * count / tiles;
        Tiles<Multiply, most>::go(a, u, x, token, end - token);
        token = end;
    }
}

// Numbers of four bits to a byte each, `Levels` by the table.
template <bool Levels>
void take_apart(const uint8_t* nibbles, bytes table, int64_t columns, uint8_t* out) {
    auto number = [&](bytes place) { return Levels ? look_up(table, place) : place; };
    for (int64_t column = 0; column < columns; column += 32) {
        for (int i = 0; i < 256; i += lanes * 4) {
            bytes both = load_bytes(nibbles + i);
            store_bytes(out + i, number(low_nibbles(both)));
            store_bytes(out + 256 + i, number(high_nibbles(both)));
        }
        nibbles += 256;
        out += 512;
    }
}

#if defined(QK_TILES)

// Fewer tokens are multiplied faster by vectors, as measured.
bool in_int_tiles(const PackedMatmulArguments& a, int64_t tokens) {
    return a.kind <= int8 && tokens >= (a.group == 32 ? 14 : a.group == 64 ? 11 : 9) &&
           (a.group == 32 || a.group == 64 || a.group == 128) &&
           (a.kind == int4 || a.zero_point == 128);
}

bool in_bf16_tiles(const PackedMatmulArguments& a) {
    return a.kind == bf16 && a.columns % 32 == 0;
}

// Sums [panels, tokens, 16], from one panel's to the next's `per_panel` numbers.
void put_all(const PackedMatmulArguments& a, const Unit& u, int64_t first, int64_t tokens,
             const float* sums, int64_t per_panel) {
    auto some = [&](auto count, int64_t token) {
        vec own[count.value][pair];
        for (int t = 0; t < count.value; t++) {
            for (int p = 0; p < u.count; p++) {
                own[t][p] = load(sums + p * per_panel + (token + t) * panel_rows);
            }
        }
        put<count.value>(a, u, first + token, own);
    };
    constexpr int many = 8;
    int64_t token = 0;
    for (; token + many <= tokens; token += many) some(std::integral_constant<int, many>(), token);
    for (; token < tokens; token++) some(std::integral_constant<int, 1>(), token);
}

// `memory` has room for both panels' bytes of some columns, and then for the sums of a block.
template <int Depth>
void multiply_int_tiles(const PackedMatmulArguments& a, const Unit& u, const Activations& x,
                        const Block& block, int rows, uint8_t* memory) {
    constexpr int64_t room = run_columns * panel_rows;
    constexpr int64_t group = Depth == 0 ? 32 : Depth * 64;
    auto* sums = reinterpret_cast<float*>(memory + pair * room);
    int64_t tokens = block.last - block.first, per_panel_sums = round_up(tokens, 16) * panel_rows;
    const RestList& rests = block.rests[u.precise ? many : outstanding];
    // Of few tokens, weights are used up faster than they come from memory: a little at a time, so
    // that more of them are always on their way.
    int64_t step = tokens <= tile_side ? std::max<int64_t>(group, 128) : run_columns;
    for (int64_t column = 0; column < a.columns; column += run_columns) {
        int64_t end = std::min(a.columns, column + run_columns);
        for (int64_t at = column; at < end; at += step) {
            int64_t stop = std::min(end, at + step), from = row_bytes(a.kind, at) * panel_rows;
            uint8_t* apart = memory + (at - column) * panel_rows;
            for (int p = 0; p < u.count; p++) {
                take_apart_signed(u.panels.data[p] + from, a.kind == int4, a.levels,
                                  static_cast<int>(a.zero_point), stop - at, apart + p * room);
            }
            for (int64_t token = 0; token < tokens; token += tile_side) {
                auto* add = tokens - token <= 8 ? add_groups<Depth, 8> : add_groups<Depth, 16>;
                for (int p = 0; p < u.count; p++) {
                    add(apart + p * room, u.panels.from(p), x, block.first + token, at / group,
                        stop / group, u.panels.data[p] + from + u.panels.ahead(from),
                        token ? 0 : row_bytes(a.kind, group) * panel_rows,
                        sums + p * per_panel_sums + token * panel_rows);
                }
            }
        }
        for (int p = 0; p < u.count; p++) {
            add_rests<Depth>(memory + p * room, u.panels.from(p), rests, column / group,
                             end / group, rows, sums + p * per_panel_sums);
        }
    }
    put_all(a, u, block.first, tokens, sums, per_panel_sums);
}

template <int Blocks, int Count, bool Ahead>
void multiply_bf16_block(const PackedMatmulArguments& a, const Unit& u, const Activations& x,
                         int64_t token, int64_t last) {
    alignas(64) TileResults results[Blocks][Count];
    multiply_bf16_tiles<Blocks, Count, Ahead>(u.panels, x, token, results);
    for (int b = 0; b < Blocks && token < last; b++, token += tile_side) {
        int64_t tokens = std::min<int64_t>(tile_side, last - token);
        put_all(a, u, token, tokens, results[b][0][0], tile_side * panel_rows);
    }
}

template <int Count>
void multiply_bf16_all(const PackedMatmulArguments& a, const Unit& u, const Activations& x,
                       const Block& block) {
    int64_t token = block.first, last = block.last;
    if (last - token <= tile_side) {
        return multiply_bf16_block<1, Count, true>(a, u, x, token, last);
    }
    multiply_bf16_block<2, Count, true>(a, u, x, token, last);
    for (token += 2 * tile_side; last - token > tile_side; token += 2 * tile_side) {
        multiply_bf16_block<2, Count, false>(a, u, x, token, last);
    }
    if (token < last) multiply_bf16_block<1, Count, false>(a, u, x, token, last);
}

#endif

int64_t units_of(const PackedMatmulArguments& a, const PackedMatrix& m) {
    return divide_up(m.rows, a.gated ? panel_rows : pair * panel_rows);
}

Unit find_unit(const PackedMatmulArguments& a, int64_t part, int64_t number) {
    const PackedMatrix* m = a.matrices;
    for (; number >= units_of(a, *m); m++) number -= units_of(a, *m);
    int64_t panels = divide_up(m->rows, panel_rows);
    int64_t first = number * (a.gated ? 1 : pair);
    int count = a.gated ? pair : static_cast<int>(std::min<int64_t>(pair, panels - first));
    Unit u{m, {}, first * panel_rows, count, m->precise != 0};
    u.panels.levels = a.levels;
    u.panels.bytes = row_bytes(a.kind, a.columns) * panel_rows;
    u.panels.next = a.gated ? u.panels.bytes : pair * u.panels.bytes;
    for (int p = 0; p < count; p++) {
        const PackedMatrix& own = a.gated ? m[p] : *m;
        int64_t panel = part * panels + first + (a.gated ? 0 : p);
        u.panels.data[p] = own.data + panel * u.panels.bytes;
        if (!own.scales) continue;
        int64_t groups = panel * a.scale_groups * panel_rows;
        int64_t width = a.scale_bytes, mins_width = a.zeros ? 1 : width;
        u.panels.scales[p] = {own.scales + groups * width,
                              own.mins ? own.mins + groups * mins_width : nullptr,
                              static_cast<int>(a.scale_shift), width == 4, a.zeros != 0};
    }
    return u;
}

// `rows`: tokens that tiles are configured for.
void multiply_unit(const PackedMatmulArguments& a, Unit& u, const Activations& x,
                   const Block& block, [[maybe_unused]] int rows, uint8_t* memory) {
    int64_t tokens = block.last - block.first;
#if defined(QK_TILES)
    if (in_bf16_tiles(a)) {
        return u.count == 2 ? multiply_bf16_all<2>(a, u, x, block)
                            : multiply_bf16_all<1>(a, u, x, block);
    }
    if (in_int_tiles(a, tokens)) {
        auto* go = a.group == 32   ? multiply_int_tiles<0>
                   : a.group == 64 ? multiply_int_tiles<1>
                                   : multiply_int_tiles<2>;
        return go(a, u, x, block, rows, memory);
    }
#endif
    if (a.kind == bf16) return multiply_all<Floats<Halves>>(a, u, x, block);
    if (a.kind == fp32) return multiply_all<Floats<Singles>>(a, u, x, block);
    if (a.kind == fp8) return multiply_all<FloatsOfEight>(a, u, x, block);
    if (a.kind == int8) return multiply_all<Ints<Bytes<255>>>(a, u, x, block);
    if (tokens < many_tokens) {
        return a.levels ? multiply_all<Ints<Nibbles<true>>>(a, u, x, block)
                        : multiply_all<Ints<Nibbles<false>>>(a, u, x, block);
    }
    for (int p = 0; p < u.count; p++) {
        uint8_t* apart = memory + p * u.panels.bytes * 2;
        if (a.levels) {
            take_apart<true>(u.panels.data[p], splat_table(a.levels), a.columns, apart);
        } else {
            take_apart<false>(u.panels.data[p], bytes{}, a.columns, apart);
        }
        u.panels.data[p] = apart;
    }
    u.panels.bytes = u.panels.next = u.panels.bytes * 2;
    if (a.levels) return multiply_all<Ints<Bytes<255>>>(a, u, x, block);
    multiply_all<Ints<Bytes<15>>>(a, u, x, block);
}

}  // namespace
}  // namespace qk
