// Rows of a packed matrix as fp32: the numbers are those of the torch reference, bit for bit.
#include "packed.h"

struct PackedRowsArguments {
    const int64_t* ids;
    const uint8_t *data, *scales, *mins;  // mins null: the format has none
    const float* levels;            // [16]: what numbers of four bits stand for; null: themselves
    float* y;                       // [tokens, columns]
    int64_t tokens, rows, columns, group, kind, zero_point, scale_bytes, zeros;
    float unit;
};

namespace qk {
namespace {

float single(const uint8_t* values, int64_t place, int64_t width) {
    if (width == 2) return half(values + place * 2);
    float number;
    std::memcpy(&number, values + place * 4, 4);
    return number;
}

float of_eight_bits(uint8_t kept) {  // e4m3
    int size = kept & 127, exponent = size >> 3;
    float number = exponent ? static_cast<float>(8 + (size & 7)) : static_cast<float>(size);
    for (int i = 1; i < exponent; i++) number *= 2;
    number *= 0x1p-9f;
    return kept & 128 ? -number : number;
}

void take_plain_row(const PackedRowsArguments& a, const uint8_t* data, float* y) {
    constexpr int64_t word = panel_rows * 4;
    for (int64_t i = 0; i < a.columns; i++) {
        uint32_t bits = 0;
        if (a.kind == 2) {
            uint16_t upper;
            std::memcpy(&upper, data + i / 2 * word + i % 2 * 2, 2);
            bits = static_cast<uint32_t>(upper) << 16;
        } else {
            std::memcpy(&bits, data + i * word, 4);
        }
        std::memcpy(y + i, &bits, 4);
    }
}

// A column of a row whose first word is at `data`.
int32_t kept_number(const PackedRowsArguments& a, const uint8_t* data, int64_t column) {
    constexpr int64_t word = panel_rows * 4;  // bytes from a row's word to its next one
    if (a.kind != 0) return data[column / 4 * word + column % 4];
    int64_t within = column % 16;
    uint8_t both = data[(column / 32 * 4 + within / 4) * word + within % 4];
    return column % 32 < 16 ? both & 15 : both >> 4;
}

void take_row(const PackedRowsArguments& a, int64_t id, float* y) {
    int64_t panel = id / panel_rows, lane = id % panel_rows;
    static constexpr int64_t eighths[5] = {4, 8, 16, 32, 8};  // bytes that eight columns take
    int64_t panel_bytes = panel_rows * (a.columns * eighths[a.kind] / 8);
    const uint8_t* data = a.data + panel * panel_bytes + lane * 4;
    if (a.kind == 2 || a.kind == 3) return take_plain_row(a, data, y);
    int64_t groups = a.columns / a.group, first = panel * groups * panel_rows + lane;
    for (int64_t g = 0; g < groups; g++) {
        int64_t place = first + g * panel_rows;
        float scale = single(a.scales, place, a.scale_bytes), low = 0;
        int64_t zero = a.zero_point;
        if (a.mins && a.zeros) zero = a.mins[place];
        if (a.mins && !a.zeros) low = single(a.mins, place, a.scale_bytes);
        for (int64_t i = g * a.group; i < (g + 1) * a.group; i++) {
            int32_t kept = kept_number(a, data, i);
            float number = a.levels   ? a.levels[kept]
                           : a.kind == 4 ? of_eight_bits(static_cast<uint8_t>(kept))
                                         : static_cast<float>(kept - zero);
            y[i] = number * scale * a.unit;
            if (a.mins && !a.zeros) y[i] = y[i] + low;
        }
    }
}

}  // namespace
}  // namespace qk

// 0, or 1 when an id is outside: then nothing is written.
QK_EXPORT int qk_packed_rows(const PackedRowsArguments* a) {
    for (int64_t t = 0; t < a->tokens; t++) {
        if (a->ids[t] < 0 || a->ids[t] >= a->rows) return 1;
    }
    for (int64_t t = 0; t < a->tokens; t++) {
        qk::take_row(*a, a->ids[t], a->y + t * a->columns);
    }
    return 0;
}
