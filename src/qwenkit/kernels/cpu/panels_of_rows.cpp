// Rows of blocks to panels: words of four bytes of sixteen rows side by side.
#include <algorithm>

#include "simd.h"
#include "threads.h"

struct PanelsOfRowsArguments {
    const uint8_t* rows;  // [rows, blocks * (head + body)], `stride` bytes apart
    uint8_t* panels;      // [panels, blocks * body * 16]
    int64_t row_count, stride, blocks, head, body, flip, threads;
};

QK_EXPORT int qk_panels_of_rows(const PanelsOfRowsArguments* a) {
    constexpr int64_t side = 16;
    int64_t panels = (a->row_count + side - 1) / side, words = a->body / 4;
    uint32_t flip = static_cast<uint32_t>(a->flip) * 0x01010101u;
    qk::parallel(panels, static_cast<int>(a->threads), [&](int64_t panel, int) {
        uint8_t* out = a->panels + panel * a->blocks * a->body * side;
        int64_t here = std::min(side, a->row_count - panel * side);
        if (here < side) std::memset(out, 0, static_cast<size_t>(a->blocks * a->body * side));
        const uint8_t* rows = a->rows + panel * side * a->stride + a->head;
        for (int64_t block = 0; block < a->blocks; block++) {
            for (int64_t word = 0; word < words; word++, out += 4 * side) {
                for (int64_t row = 0; row < here; row++) {
                    uint32_t four;
                    std::memcpy(&four, rows + row * a->stride + 4 * word, 4);
                    four ^= flip;
                    std::memcpy(out + 4 * row, &four, 4);
                }
            }
            rows += a->head + a->body;
        }
    });
    return 0;
}
