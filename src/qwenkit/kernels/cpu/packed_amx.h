// The same products on the tile unit of newer x86 processors, up to sixteen tokens × sixteen rows
// at a time.
//
// Whole numbers are added exactly, so the results are those of packed.h, bit for bit; this is for
// so many tokens that taking weights apart and sums out of tiles is worth it. bf16 is rounded
// differently on this unit than elsewhere, so where it is used, it is used for any number of
// tokens.
#pragma once

#if defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__AMX_BF16__)
#define QK_TILES 1

#include "packed.h"

namespace qk {

constexpr int tile_side = 16;

// Configures the tiles for products of `tokens` rows for as long as it lives: 0 to 3 sums, 4 and 5
// tokens and weights of 64 bytes' depth, 6 and 7 of 32 bytes' or, for bf16, as 4 and 5.
class TileUnit {
  public:
    TileUnit(int tokens, bool halves) {
        struct {
            uint8_t palette, start_row, reserved[14];
            uint16_t row_bytes[16];
            uint8_t rows[16];
        } config{};
        config.palette = 1;
        for (int i = 0; i < 8; i++) {
            config.row_bytes[i] = 64;
            config.rows[i] = i == 5 || i == 7 ? tile_side : static_cast<uint8_t>(tokens);
        }
        if (halves) {
            config.row_bytes[6] = 32;
            config.rows[7] = tile_side / 2;
        }
        // GCC's intrinsics do not say that they read memory: what is stored before must be there.
        asm volatile("" : : "r"(&config) : "memory");
        _tile_loadconfig(&config);
    }
    ~TileUnit() { _tile_release(); }
    TileUnit(const TileUnit&) = delete;
    TileUnit& operator=(const TileUnit&) = delete;
};

// Int4, with a table of levels or without, or int8 as stored to signed bytes without the zero
// point, in the order of int8.
inline void take_apart_signed(const uint8_t* data, bool nibbles, const uint8_t* levels,
                              int zero_point, int64_t columns, uint8_t* out) {
    bytes offset = bytes{} + static_cast<uint8_t>(zero_point);
    if (!nibbles) {
        for (int64_t i = 0; i < columns * panel_rows; i += 64) {
            store_bytes(out + i, load_bytes(data + i) - offset);
        }
        return;
    }
    constexpr uint8_t themselves[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    bytes table = splat_table(levels ? levels : themselves) - offset;
    for (int64_t column = 0; column < columns; column += 32, data += 256, out += 512) {
        for (int i = 0; i < 256; i += 64) {
            bytes both = load_bytes(data + i);
            store_bytes(out + i, look_up(table, low_nibbles(both)));
            store_bytes(out + 256 + i, look_up(table, high_nibbles(both)));
        }
    }
}

using TileSums = int32_t[tile_side][tile_side];

// The exact sums of one group of `Depth` · 64 columns, or of 32 for 0, into `out`. `Turn` 0 and 1
// use tiles of their own, so that neighbouring groups are on their way together.
template <int Depth, int Turn>
inline void dot_group(const uint8_t* panel, const int8_t* quants, int64_t stride, TileSums& out) {
#define QK_DOT(tile)                                               \
    _tile_zero(tile);                                              \
    if (Depth == 0) {                                              \
        _tile_loadd(6, quants, stride);                            \
        _tile_loadd(7, panel, 64);                                 \
        _tile_dpbssd(tile, 6, 7);                                  \
    }                                                              \
    for (int i = 0; i < Depth; i++) {                              \
        _tile_loadd(4, quants + i * 64, stride);                   \
        _tile_loadd(5, panel + i * 64 * panel_rows, 64);           \
        _tile_dpbssd(tile, 4, 5);                                  \
    }                                                              \
    _tile_stored(tile, out, 64);
    if constexpr (Turn == 0) {
        QK_DOT(0)
    } else {
        QK_DOT(1)
    }
#undef QK_DOT
}

template <int Rows>
__attribute__((always_inline)) inline void add_sums(const TileSums& sums, vec weight_scale,
                                                    const float* scales, vec (&y)[Rows]) {
    QK_UNROLL for (int t = 0; t < Rows; t++) {
        words exact = (words)_mm512_load_si512(sums[t]);
        y[t] = fma(to_float(exact), weight_scale * splat(scales[t]), y[t]);
    }
}

// Adds groups `first` to `last` of one panel to `out` [Rows, 16], or begins with them where `first`
// is 0. `bytes` is the panel taken apart from group `first` on; `ahead` is memory that will be
// needed next, asked for along the way.
template <int Depth, int Rows>
void add_groups(const uint8_t* bytes, const Panels& panels, const Activations& x, int64_t token,
                int64_t first, int64_t last, const uint8_t* ahead, int64_t ahead_bytes,
                float* out) {
    constexpr int64_t group = Depth == 0 ? 32 : Depth * 64;
    alignas(64) TileSums sums[2];
    vec y[Rows];
    const int64_t stride = x.stride;
    QK_UNROLL for (int t = 0; t < Rows; t++) y[t] = first ? load(out + t * lanes) : vec{};
    const int8_t* quants = x.main.quants + token * stride;
    asm volatile("" : : : "memory");  // as above
    auto finish = [&](int64_t g, const TileSums& exact) __attribute__((always_inline)) {
        int64_t at = g * x.tokens + token;
        vec scale;
        panels.scales[0].load_scales(g, &scale);
        add_sums<Rows>(exact, scale, x.main.scales + at, y);
        if (panels.scales[0].mins) {
            vec low;
            panels.scales[0].load_mins(g, &scale, &low);
            QK_UNROLL for (int t = 0; t < Rows; t++) y[t] = fma(low, splat(x.sums[at + t]), y[t]);
        }
        for (int64_t i = 0; i < ahead_bytes; i += 64) __builtin_prefetch(ahead + i, 0, 2);
        ahead += ahead_bytes;
    };
    dot_group<Depth, 0>(bytes, quants + first * group, stride, sums[0]);
    for (int64_t g = first; g < last; g += 2) {
        const uint8_t* next = bytes + (g - first + 1) * group * panel_rows;
        if (g + 1 < last) {
            dot_group<Depth, 1>(next, quants + (g + 1) * group, stride, sums[1]);
        }
        finish(g, sums[0]);
        if (g + 1 >= last) break;
        if (g + 2 < last) {
            dot_group<Depth, 0>(next + group * panel_rows, quants + (g + 2) * group, stride,
                                sums[0]);
        }
        finish(g + 1, sums[1]);
    }
    QK_UNROLL for (int t = 0; t < Rows; t++) store(out + t * lanes, y[t]);
}

// The rests of some tokens, group by group without those that have none.
struct RestList {
    const int32_t* starts;  // [groups + 1]: the first entry of a group
    const int32_t* tokens;  // [entries]: counted from the first of the tokens
    const float* scales;    // [entries]
    const int8_t* quants;   // [entries, group]
};

// Adds the rests of groups `first` to `last` to `out` [tokens, 16]; `bytes` as in `add_groups`.
// `rows` is what the tiles are configured for.
template <int Depth>
void add_rests(const uint8_t* bytes, const Panels& panels, const RestList& rests, int64_t first,
               int64_t last, int rows, float* out) {
    constexpr int64_t group = Depth == 0 ? 32 : Depth * 64;
    alignas(64) TileSums sums[2];
    struct Piece {
        int64_t g, entry, count;
    } pieces[2] = {};
    auto finish = [&](const Piece& piece, const TileSums& exact) {
        vec scale;
        panels.scales[0].load_scales(piece.g, &scale);
        for (int64_t i = 0; i < piece.count; i++) {
            float* y = out + rests.tokens[piece.entry + i] * panel_rows;
            words sum = (words)_mm512_load_si512(exact[i]);
            store(y, fma(to_float(sum), scale * splat(rests.scales[piece.entry + i]), load(y)));
        }
    };
    int turn = 0;
    asm volatile("" : : : "memory");  // as above
    for (int64_t g = first; g < last; g++) {
        const uint8_t* weights = bytes + (g - first) * group * panel_rows;
        for (int64_t entry = rests.starts[g]; entry < rests.starts[g + 1]; entry += rows) {
            const int8_t* quants = rests.quants + entry * group;
            if (turn) {
                dot_group<Depth, 1>(weights, quants, group, sums[1]);
            } else {
                dot_group<Depth, 0>(weights, quants, group, sums[0]);
            }
            pieces[turn] = {g, entry, std::min<int64_t>(rows, rests.starts[g + 1] - entry)};
            turn ^= 1;
            finish(pieces[turn], sums[turn]);  // the one before; of none at first
        }
    }
    turn ^= 1;
    finish(pieces[turn], sums[turn]);
}

using TileResults = float[tile_side][tile_side];

// Up to two times sixteen tokens × two panels of bf16. Tokens that fill up a tile are zeros.
// `Ahead`: weights come from memory, and are asked for before they are needed.
template <int Blocks, int Count, bool Ahead>
void multiply_bf16_tiles(const Panels& panels, const Activations& x, int64_t token,
                         TileResults (*out)[Count]) {
    const uint16_t* first = x.halves + token * x.stride;
    asm volatile("" : : : "memory");  // as above
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t column = 0; column < x.columns; column += 32) {
        int64_t at = column * 32;
        if constexpr (Ahead) {
            for (int i = 0; i < 1024; i += 64) {
                for (int p = 0; p < Count; p++) {
                    __builtin_prefetch(panels.data[p] + at + panels.ahead(at) + i);
                }
            }
        }
        _tile_loadd(4, first + column, x.stride * 2);
        _tile_loadd(5, panels.data[0] + at, 64);
        _tile_dpbf16ps(0, 4, 5);
        if constexpr (Count == 2) {
            _tile_loadd(7, panels.data[Count - 1] + at, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (Blocks == 2) {
            _tile_loadd(6, first + tile_side * x.stride + column, x.stride * 2);
            _tile_dpbf16ps(2, 6, 5);
            if constexpr (Count == 2) _tile_dpbf16ps(3, 6, 7);
        }
    }
    _tile_stored(0, out[0][0], 64);
    if constexpr (Count == 2) _tile_stored(1, out[0][Count - 1], 64);
    if constexpr (Blocks == 2) _tile_stored(2, out[Blocks - 1][0], 64);
    if constexpr (Blocks == 2 && Count == 2) _tile_stored(3, out[Blocks - 1][Count - 1], 64);
}

}  // namespace qk

#endif
