// Rows of a packed matrix as fp32: the numbers are those of the torch reference, bit for bit.
#include "packed.h"

struct PackedRowsArguments {
    const int64_t* ids;
    const uint8_t* data;
    const uint16_t *scales, *mins;  // mins null: the format has none
    float* y;                       // [tokens, columns]
    int64_t tokens, rows, columns, group, kind, zero_point;
};

namespace qk {
namespace {

float single(const uint16_t* halves) { return half(reinterpret_cast<const uint8_t*>(halves)); }

void take_row(const PackedRowsArguments& a, int64_t id, float* y) {
    int64_t panel = id / panel_rows, lane = id % panel_rows;
    constexpr int64_t word = panel_rows * 4;  // bytes from a row's word to its next one
    static constexpr int64_t eighths[4] = {4, 8, 16, 32};  // bytes that eight columns take
    const uint8_t* data = a.data + panel * panel_rows * (a.columns * eighths[a.kind] / 8) + lane * 4;
    if (a.kind >= 2) {
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
        return;
    }
    int64_t groups = a.columns / a.group, first = panel * groups * panel_rows + lane;
    for (int64_t g = 0; g < groups; g++) {
        float scale = single(a.scales + first + g * panel_rows);
        float low = a.mins ? single(a.mins + first + g * panel_rows) : 0.0f;
        for (int64_t i = g * a.group; i < (g + 1) * a.group; i++) {
            int32_t kept;
            if (a.kind == 0) {
                int64_t within = i % 16;
                uint8_t both = data[(i / 32 * 4 + within / 4) * word + within % 4];
                kept = i % 32 < 16 ? both & 15 : both >> 4;
            } else {
                kept = data[i / 4 * word + i % 4];
            }
            float number = static_cast<float>(kept - a.zero_point) * scale;
            y[i] = a.mins ? number + low : number;
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
