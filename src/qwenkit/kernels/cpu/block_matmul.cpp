// x [tokens, columns] times the transpose of a matrix of GGML blocks: y [tokens, rows], fp32.
//
// One element of y is always the same sum: lane i of one vector takes the products of columns
// i, i + lanes, i + 2 lanes, … by fused multiply-add, in that order, and sum4 adds the lanes. So a
// token's result does not depend on the other tokens of the call, nor on threads.
//
// One token reads the blocks straight from where they lie, four rows at a time. More tokens
// decode a panel of rows once into scratch that fits the second-level cache, four rows
// interleaved, and multiply it in tiles of 4 rows × tile_tokens tokens held in registers.
#include <algorithm>

#include "blocks.h"
#include "threads.h"

namespace qk {
namespace {

constexpr int tile_rows = 4;
constexpr int64_t panel_rows = 64;
constexpr int64_t panel_floats = 1 << 18;  // at most 1 MB of decoded weights per thread
constexpr int64_t depth = 768;  // columns per pass: x of a tile then stays in the first-level cache

constexpr int prefetch_bytes = 4096;  // how far ahead of the weights in use memory is asked for

struct Product {
    const float* x;
    const uint8_t* blocks;
    float* y;
    int64_t tokens, rows, columns, row_stride;
};

// The results of up to four rows of one token.
inline void finish(const vec sums[tile_rows], int64_t rows, float* y) {
    if (rows >= tile_rows) {
        sum4(sums, y);
    } else {
        float results[tile_rows];
        sum4(sums, results);
        std::copy(results, results + rows, y);
    }
}

template <class Type>
void multiply_one_token(const Product& p, int64_t row, int64_t count) {
    const uint8_t* block[tile_rows];
    for (int r = 0; r < tile_rows; r++) {  // rows that do not exist repeat the last one
        block[r] = p.blocks + std::min(row + r, row + count - 1) * p.row_stride;
    }
    const uint8_t* ahead = block[0] + prefetch_bytes;
    vec sums[tile_rows] = {};
    for (const float *x = p.x, *end = x + p.columns; x != end; x += Type::elements) {
        // Four rows read side by side confuse the hardware's prefetcher; together they are one
        // run of bytes, which this walks through from end to end.
        constexpr int step = tile_rows * Type::bytes;
        for (int i = 0; i < step; i += 64) __builtin_prefetch(ahead + i);
        ahead += step;
        typename Type::Levels levels[tile_rows];
        for (int r = 0; r < tile_rows; r++) levels[r] = Type::levels(block[r]);
        QK_UNROLL for (int part = 0; part < Type::elements / 32; part++) {
            for (int r = 0; r < tile_rows; r++) {
                Group weights = Type::decode(block[r], part, levels[r]);
                for (int i = 0; i < 32 / lanes; i++) {
                    sums[r] = fma(weights.v[i], load(x + part * 32 + i * lanes), sums[r]);
                }
            }
        }
        for (int r = 0; r < tile_rows; r++) block[r] += Type::bytes;
    }
    finish(sums, count, p.y + row);
}

// Four rows into panel[column / lanes][row][lane].
template <class Type>
void decode_tile(const Product& p, int64_t row, float* panel) {
    for (int r = 0; r < tile_rows; r++) {
        const uint8_t* block = p.blocks + std::min(row + r, p.rows - 1) * p.row_stride;
        float* out = panel + r * lanes;
        for (int64_t column = 0; column < p.columns; column += Type::elements) {
            typename Type::Levels levels = Type::levels(block);
            QK_UNROLL for (int part = 0; part < Type::elements / 32; part++) {
                Group group = Type::decode(block, part, levels);
                for (vec& v : group.v) {
                    store(out, v);
                    out += tile_rows * lanes;
                }
            }
            block += Type::bytes;
        }
    }
}

// What one tile of 4 rows × some tokens reads and writes. The sums wait in `carry` between passes
// over the columns; `y`, set in the last pass, takes the results, four neighbours for each token.
struct TilePass {
    const float* panel;
    const float* x;
    int64_t x_stride, columns;
    float* carry;
    bool first;
    float* y;
    int64_t y_stride;
};

// All loops but one are unrolled by order: the sums must be registers, never an array in memory.
template <int Tokens>
void multiply_tile(const TilePass& pass) {
    vec sums[Tokens][tile_rows];
    QK_UNROLL for (int t = 0; t < Tokens; t++) {
        QK_UNROLL for (int r = 0; r < tile_rows; r++) {
            sums[t][r] = pass.first ? vec{} : load(pass.carry + (t * tile_rows + r) * lanes);
        }
    }
    const float* panel = pass.panel;
    const float* x = pass.x;
    int64_t x_stride = pass.x_stride;
    for (int64_t column = 0; column < pass.columns; column += lanes) {
        vec token[Tokens];
        QK_UNROLL for (int t = 0; t < Tokens; t++) token[t] = load(x + t * x_stride + column);
        QK_UNROLL for (int r = 0; r < tile_rows; r++) {
            vec weight = load(panel + column * tile_rows + r * lanes);
            QK_UNROLL for (int t = 0; t < Tokens; t++) {
                sums[t][r] = fma(weight, token[t], sums[t][r]);
            }
        }
    }
    QK_UNROLL for (int t = 0; t < Tokens; t++) {
        if (pass.y) {
            sum4(sums[t], pass.y + t * pass.y_stride);
            continue;
        }
        QK_UNROLL for (int r = 0; r < tile_rows; r++) {
            store(pass.carry + (t * tile_rows + r) * lanes, sums[t][r]);
        }
    }
}

using Tile = void (*)(const TilePass&);

Tile tile_for(int64_t tokens) {
    switch (tokens) {
        case 1: return multiply_tile<1>;
        case 2: return multiply_tile<2>;
#if defined(__AVX2__)
        case 3: return multiply_tile<3>;
#endif
#if defined(__AVX512F__)
        case 4: return multiply_tile<4>;
        case 5: return multiply_tile<5>;
        case 6: return multiply_tile<6>;
#endif
        default: return nullptr;
    }
}

// One tile over one pass; rows that do not exist are computed and dropped.
void multiply_rows(Tile multiply, TilePass& pass, int64_t rows, int64_t tokens) {
    if (!pass.y || rows >= tile_rows) return multiply(pass);
    float results[tile_tokens * tile_rows];
    TilePass aside = pass;
    aside.y = results;
    aside.y_stride = tile_rows;
    multiply(aside);
    for (int64_t t = 0; t < tokens; t++) {
        std::copy_n(results + t * tile_rows, rows, pass.y + t * pass.y_stride);
    }
}

struct Span {
    int64_t first, count;
};

// All products of a decoded panel of rows with all tokens.
void multiply_panel(const Product& p, Span rows, const float* panel, float* carry) {
    constexpr int64_t carried = int64_t(tile_tokens) * tile_rows * lanes;
    for (int64_t token = 0; token < p.tokens; token += tile_tokens) {
        int64_t tokens = std::min<int64_t>(tile_tokens, p.tokens - token);
        Tile multiply = tile_for(tokens);
        for (int64_t column = 0; column < p.columns; column += depth) {
            bool last = column + depth >= p.columns;
            for (int64_t row = 0; row < rows.count; row += tile_rows) {
                TilePass pass{panel + row * p.columns + column * tile_rows,
                              p.x + token * p.columns + column,
                              p.columns,
                              std::min(depth, p.columns - column),
                              carry + row / tile_rows * carried,
                              column == 0,
                              last ? p.y + token * p.rows + rows.first + row : nullptr,
                              p.rows};
                multiply_rows(multiply, pass, rows.count - row, tokens);
            }
        }
    }
}

template <class Type>
void multiply_one(const Product& p, int threads) {
    // Few chunks, since each starts with nothing prefetched, but none below 16 KB.
    int64_t chunks = std::min<int64_t>(threads * 2, 1 + p.rows * p.row_stride / 16384);
    int64_t tiles = (p.rows + tile_rows - 1) / tile_rows;
    int64_t per_chunk = (tiles + chunks - 1) / chunks * tile_rows;
    parallel((p.rows + per_chunk - 1) / per_chunk, threads, [&](int64_t chunk, int) {
        int64_t end = std::min(p.rows, (chunk + 1) * per_chunk);
        for (int64_t row = chunk * per_chunk; row < end; row += tile_rows) {
            multiply_one_token<Type>(p, row, std::min<int64_t>(tile_rows, end - row));
        }
    });
}

template <class Type>
bool multiply_many(const Product& p, int threads) {
    int64_t height = panel_rows;
    while (height > tile_rows && (height * p.columns > panel_floats ||
                                  p.rows < height * 8 * threads)) {
        height /= 2;
    }
    constexpr int64_t alignment = 16;  // floats in a cache line
    int64_t carry_floats = height * tile_tokens * lanes;
    int64_t per_thread = (height * p.columns + carry_floats + alignment - 1) / alignment * alignment;
    float* memory = scratch(per_thread * threads);
    if (!memory) return false;
    parallel((p.rows + height - 1) / height, threads, [&](int64_t chunk, int slot) {
        Span rows{chunk * height, std::min(height, p.rows - chunk * height)};
        float* carry = memory + slot * per_thread;
        float* panel = carry + carry_floats;
        for (int64_t i = 0; i < rows.count; i += tile_rows) {
            decode_tile<Type>(p, rows.first + i, panel + i * p.columns);
        }
        multiply_panel(p, rows, panel, carry);
    });
    return true;
}

}  // namespace
}  // namespace qk

// Rows of `blocks` start every `row_stride` bytes; x and y are contiguous. 0, 1 for an unknown
// type, 2 when there is no memory for scratch.
struct BlockMatmulArguments {
    qk::Product product;
    int64_t type, threads;
};

QK_EXPORT int qk_block_matmul(const BlockMatmulArguments* a) {
    using namespace qk;
    bool enough_memory = true;
    bool known = with_block_type(a->type, [&](auto of_type) {
        using Type = decltype(of_type);
        if (a->product.tokens == 1) {
            multiply_one<Type>(a->product, a->threads);
        } else {
            enough_memory = multiply_many<Type>(a->product, a->threads);
        }
    });
    return !known ? 1 : enough_memory ? 0 : 2;
}
