// The same products on the tile unit of newer x86 processors, sixteen tokens × sixteen rows at a
// time.
//
// Whole numbers are added exactly, so the results are those of packed.h, bit for bit; this is for
// many tokens and groups of 64 columns or more, where a tile's sums are worth taking out. bf16 is
// rounded differently on this unit than elsewhere, so where it is used, it is used for any number
// of tokens.
#pragma once

#if defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__AMX_BF16__)
#define QK_TILES 1

#include "packed.h"

namespace qk {

constexpr int tile_side = 16;

// Configures all eight tiles as 16 rows of 64 bytes for as long as it lives.
class TileUnit {
  public:
    TileUnit() {
        struct {
            uint8_t palette, start_row, reserved[14];
            uint16_t row_bytes[16];
            uint8_t rows[16];
        } config{};
        config.palette = 1;
        for (int i = 0; i < 8; i++) {
            config.row_bytes[i] = 64;
            config.rows[i] = tile_side;
        }
        _tile_loadconfig(&config);
    }
    ~TileUnit() { _tile_release(); }
    TileUnit(const TileUnit&) = delete;
    TileUnit& operator=(const TileUnit&) = delete;
};

// Int4 or int8 as stored to signed bytes without the zero point, in the order of int8.
inline void take_apart_signed(const uint8_t* data, bool nibbles, int zero_point, int64_t columns,
                              uint8_t* out) {
    bytes offset = bytes{} + static_cast<uint8_t>(zero_point);
    if (!nibbles) {
        for (int64_t i = 0; i < columns * panel_rows; i += 64) {
            store_bytes(out + i, load_bytes(data + i) - offset);
        }
        return;
    }
    for (int64_t column = 0; column < columns; column += 32, data += 256, out += 512) {
        for (int i = 0; i < 256; i += 64) {
            bytes both = load_bytes(data + i);
            store_bytes(out + i, low_nibbles(both) - offset);
            store_bytes(out + 256 + i, high_nibbles(both) - offset);
        }
    }
}

using TileSums = int32_t[tile_side][tile_side];

// The exact sums of one group, a multiple of 64 columns, for sixteen tokens.
inline void dot_group(const uint8_t* panel, const Activations& x, const int8_t* quants, int64_t g,
                      TileSums& out) {
    _tile_zero(0);
    for (int64_t column = g * x.group; column < (g + 1) * x.group; column += 64) {
        _tile_loadd(1, quants + column, x.columns);
        _tile_loadd(2, panel + column * panel_rows, 64);
        _tile_dpbssd(0, 1, 2);
    }
    _tile_stored(0, out, 64);
}

inline void add_tile(const TileSums& sums, vec weight_scale, const float* scales, int64_t stride,
                     vec y[tile_side]) {
    QK_UNROLL for (int t = 0; t < tile_side; t++) {
        words exact;
        std::memcpy(&exact, sums[t], sizeof exact);
        y[t] = fma(to_float(exact), weight_scale * splat(scales[t * stride]), y[t]);
    }
}

// y of sixteen tokens × one panel taken apart. The next group's sums are on their way while those
// of a group are scaled.
inline void multiply_int_tile(const uint8_t* panel, const Panels& panels, const Activations& x,
                              int64_t token, vec y[tile_side]) {
    alignas(64) TileSums sums[2], left;
    const int8_t* quants = x.main.quants + token * x.columns;
    QK_UNROLL for (int t = 0; t < tile_side; t++) y[t] = vec{};
    dot_group(panel, x, quants, 0, sums[0]);
    for (int64_t g = 0; g < x.groups; g++) {
        int64_t at = token * x.groups + g;
        if (g + 1 < x.groups) dot_group(panel, x, quants, g + 1, sums[(g + 1) % 2]);
        vec scale;
        widen_halves(panels.scales + g * panel_rows, &scale);
        add_tile(sums[g % 2], scale, x.main.scales + at, x.groups, y);
        if (has_rest(x, g, token, tile_side)) {
            dot_group(panel, x, x.rest.quants + token * x.columns, g, left);
            add_tile(left, scale, x.rest.scales + at, x.groups, y);
        }
        if (panels.mins) {
            vec low;
            widen_halves(panels.mins + g * panel_rows, &low);
            QK_UNROLL for (int t = 0; t < tile_side; t++) {
                y[t] = fma(low, splat(x.sums[at + t * x.groups]), y[t]);
            }
        }
    }
}

using TileResults = float[tile_side][tile_side];

// Up to two times sixteen tokens × two panels of bf16. Tokens that fill up a tile are zeros.
template <int Blocks, int Count>
void multiply_bf16_tiles(const Panels& panels, const Activations& x, int64_t token,
                         TileResults (*out)[Count]) {
    const uint16_t* first = x.halves + token * x.columns;
    const uint8_t* weights = panels.data;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t column = 0; column < x.columns; column += 32, weights += 1024) {
        for (int i = 0; i < 1024; i += 64) {
            for (int p = 0; p < Count; p++) {
                __builtin_prefetch(weights + p * panels.bytes + prefetch_bytes + i);
            }
        }
        _tile_loadd(4, first + column, x.columns * 2);
        _tile_loadd(6, weights, 64);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (Count == 2) {
            _tile_loadd(7, weights + panels.bytes, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (Blocks == 2) {
            _tile_loadd(5, first + tile_side * x.columns + column, x.columns * 2);
            _tile_dpbf16ps(2, 5, 6);
            if constexpr (Count == 2) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, out[0][0], 64);
    if constexpr (Count == 2) _tile_stored(1, out[0][Count - 1], 64);
    if constexpr (Blocks == 2) _tile_stored(2, out[Blocks - 1][0], 64);
    if constexpr (Blocks == 2 && Count == 2) _tile_stored(3, out[Blocks - 1][Count - 1], 64);
}

}  // namespace qk

#endif
