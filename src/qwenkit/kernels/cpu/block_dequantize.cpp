// Rows of GGML blocks as fp32: the numbers are those of the torch reference, bit for bit.
#include <algorithm>

#include "blocks.h"
#include "threads.h"

namespace qk {
namespace {

template <class Type>
void dequantize_row(const uint8_t* blocks, int64_t columns, float* out) {
    for (int64_t column = 0; column < columns; column += Type::elements) {
        typename Type::Levels levels = Type::levels(blocks);
        QK_UNROLL for (int part = 0; part < Type::elements / 32; part++) {
            Group group = Type::decode(blocks, part, levels);
            for (vec& v : group.v) {
                store(out, v);
                out += lanes;
            }
        }
        blocks += Type::bytes;
    }
}

}  // namespace
}  // namespace qk

// out [rows, columns] from rows that start every `row_stride` bytes. 0, or 1 for an unknown type.
struct BlockDequantizeArguments {
    const uint8_t* blocks;
    float* out;
    int64_t rows, columns, row_stride, type, threads;
};

QK_EXPORT int qk_block_dequantize(const BlockDequantizeArguments* a) {
    using namespace qk;
    bool known = with_block_type(a->type, [&](auto of_type) {
        using Type = decltype(of_type);
        int64_t rows = a->rows, columns = a->columns;
        int64_t per_chunk = std::max<int64_t>(1, 32768 / columns);  // about 128 KB of results
        parallel((rows + per_chunk - 1) / per_chunk, a->threads, [&](int64_t chunk, int) {
            int64_t end = std::min(rows, (chunk + 1) * per_chunk);
            for (int64_t row = chunk * per_chunk; row < end; row++) {
                dequantize_row<Type>(a->blocks + row * a->row_stride, columns,
                                     a->out + row * columns);
            }
        });
    });
    return known ? 0 : 1;
}
