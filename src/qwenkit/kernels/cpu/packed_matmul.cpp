// x [tokens, columns] times the transposes of packed matrices: for each y [tokens, rows], fp32.
//
// Activations are normalised and rounded once per call: to eight bits by groups of columns for int4
// and int8 weights, to bf16 for bf16 weights where the processor multiplies such. A unit of work is
// a pair of panels and a block of tokens that stays in the second-level cache. Where tokens are
// sorted by the part of a matrix that they go through (the experts of a mixture), a block is of
// one part.
#include "packed.h"
#include "packed_amx.h"
#include "packed_round.h"
#include "silu.h"
#include "threads.h"

namespace qk {
namespace {

constexpr int64_t many_tokens = 16;        // from which on int4 is taken apart first
constexpr int64_t block_bytes = 1 << 20;   // of activations that are multiplied at a time
constexpr int64_t block_tokens = 32;       // of which a block has a multiple
constexpr int64_t spare_tokens = 32;       // that are read beyond the last, and never used

int64_t row_bytes(int64_t kind, int64_t columns) {
    return kind == int4 ? columns / 2 : kind == int8 ? columns : kind == bf16 ? columns * 2
                                                                              : columns * 4;
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
            store_some(m.y + at + v * lanes, result, left);
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
        if (wide == pair && u.count == pair) {
            Multiply::template run<Tokens, pair>(u.panels, x, token, sums);
        } else {
            for (int p = 0; p < u.count; p++) {
                vec own[Tokens][per_panel];
                Multiply::template run<Tokens, 1>(u.panels.from(p), x, token, own);
                for (int t = 0; t < Tokens; t++) {
                    std::copy(own[t], own[t] + per_panel, sums[t] + p * per_panel);
                }
            }
        }
        put<Tokens>(a, u, token, sums);
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

// All tokens of a block, in tiles as equal as can be.
template <class Multiply>
void multiply_all(const PackedMatmulArguments& a, const Unit& u, const Activations& x,
                  const Block& block) {
    int64_t count = block.last - block.first, token = block.first;
    int64_t tiles = divide_up(count, tile_tokens);
    for (int64_t i = 1; i <= tiles; i++) {
        int64_t end = block.first + i * count / tiles;
        Tiles<Multiply, tile_tokens>::go(a, u, x, token, end - token);
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

bool in_int_tiles(const PackedMatmulArguments& a, int64_t tokens) {
    return a.kind <= int8 && tokens >= (a.group == 32 ? 6 : 4) &&
           (a.group == 32 || a.group == 64 || a.group == 128) &&
           (a.kind == int4 || a.zero_point == 128);
}

bool in_bf16_tiles(const PackedMatmulArguments& a) {
    return a.kind == bf16 && a.columns % 32 == 0;
}

// `memory` has room for both panels' bytes of some columns, and then for the sums of a block.
template <int Depth>
void multiply_int_tiles(const PackedMatmulArguments& a, const Unit& u, const Activations& x,
                        const Block& block, int rows, uint8_t* memory) {
    constexpr int64_t room = run_columns * panel_rows;
    constexpr int64_t group = Depth == 0 ? 32 : Depth * 64;
    auto* sums = reinterpret_cast<float*>(memory + pair * room);
    int64_t tokens = block.last - block.first, per_panel_sums = round_up(tokens, 16) * panel_rows;
    const RestList& rests = block.rests[u.precise ? every : outstanding];
    // Of few tokens, weights are used up faster than they come from memory.
    int64_t ahead_bytes = tokens <= tile_side ? row_bytes(a.kind, group) * panel_rows : 0;
    for (int64_t column = 0; column < a.columns; column += run_columns) {
        int64_t end = std::min(a.columns, column + run_columns);
        int64_t from = row_bytes(a.kind, column) * panel_rows;
        int64_t to = row_bytes(a.kind, end) * panel_rows;
        for (int p = 0; p < u.count; p++) {
            take_apart_signed(u.panels.data[p] + from, a.kind == int4,
                              static_cast<int>(a.zero_point), end - column, memory + p * room);
        }
        for (int64_t token = 0; token < tokens; token += tile_side) {
            auto* add = tokens - token <= 8 ? add_groups<Depth, 8> : add_groups<Depth, 16>;
            for (int p = 0; p < u.count; p++) {
                const uint8_t* ahead = u.panels.data[p] + to;
                if (end == a.columns) ahead += u.panels.next - u.panels.bytes;
                add(memory + p * room, u.panels.from(p), x, block.first + token, column / group,
                    end / group, ahead, ahead_bytes,
                    sums + p * per_panel_sums + token * panel_rows);
            }
        }
        for (int p = 0; p < u.count; p++) {
            add_rests<Depth>(memory + p * room, u.panels.from(p), rests, column / group,
                             end / group, rows, sums + p * per_panel_sums);
        }
    }
    for (int64_t token = 0; token < tokens; token++) {
        vec both[1][pair];
        for (int p = 0; p < u.count; p++) {
            both[0][p] = load(sums + p * per_panel_sums + token * panel_rows);
        }
        put<1>(a, u, block.first + token, both);
    }
}

template <int Blocks, int Count, bool Ahead>
void multiply_bf16_block(const PackedMatmulArguments& a, const Unit& u, const Activations& x,
                         int64_t token, int64_t last) {
    alignas(64) TileResults results[Blocks][Count];
    multiply_bf16_tiles<Blocks, Count, Ahead>(u.panels, x, token, results);
    int64_t tokens = std::min<int64_t>(Blocks * tile_side, last - token);
    for (int64_t t = 0; t < tokens; t++) {
        vec sums[1][pair];
        for (int p = 0; p < Count; p++) {
            sums[0][p] = load(results[t / tile_side][p][t % tile_side]);
        }
        put<1>(a, u, token + t, sums);
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

// Work of one call.
struct Plan {
    const Block* blocks;
    int64_t block_count, most_tokens, units;  // units: of each block

    int64_t total() const { return block_count * units; }
};

int64_t units_of(const PackedMatmulArguments& a, const PackedMatrix& m) {
    return divide_up(m.rows, a.gated ? panel_rows : pair * panel_rows);
}

Unit find_unit(const PackedMatmulArguments& a, int64_t part, int64_t number) {
    const PackedMatrix* m = a.matrices;
    for (; number >= units_of(a, *m); m++) number -= units_of(a, *m);
    int64_t panels = divide_up(m->rows, panel_rows), groups = a.kind <= int8 ? a.columns / a.group : 0;
    int64_t first = number * (a.gated ? 1 : pair);
    int count = a.gated ? pair : static_cast<int>(std::min<int64_t>(pair, panels - first));
    Unit u{m, {}, first * panel_rows, count, m->precise != 0};
    u.panels.bytes = row_bytes(a.kind, a.columns) * panel_rows;
    u.panels.next = a.gated ? u.panels.bytes : pair * u.panels.bytes;
    for (int p = 0; p < count; p++) {
        const PackedMatrix& own = a.gated ? m[p] : *m;
        int64_t panel = part * panels + first + (a.gated ? 0 : p);
        u.panels.data[p] = own.data + panel * u.panels.bytes;
        u.panels.scales[p] = own.scales ? own.scales + panel * groups * panel_rows : nullptr;
        u.panels.mins[p] = own.mins ? own.mins + panel * groups * panel_rows : nullptr;
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
    if (a.kind == int8) return multiply_all<Ints<Bytes<255>>>(a, u, x, block);
    if (tokens < many_tokens) return multiply_all<Ints<Nibbles>>(a, u, x, block);
    for (int p = 0; p < u.count; p++) {
        take_apart(u.panels.data[p], a.columns, memory + p * u.panels.bytes * 2);
        u.panels.data[p] = memory + p * u.panels.bytes * 2;
    }
    u.panels.bytes = u.panels.next = u.panels.bytes * 2;
    multiply_all<Ints<Bytes<15>>>(a, u, x, block);
}

// Memory of a call, cut into pieces that begin at a cache line each.
class Memory {
  public:
    explicit Memory(uint8_t* start) : start_(start) {}

    template <class T>
    T* take(int64_t count) {
        auto* taken = reinterpret_cast<T*>(start_ + size_);
        size_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
        return start_ ? taken : nullptr;
    }

    int64_t size() const { return size_; }

  private:
    uint8_t* start_;
    int64_t size_ = 0;
};

// Where everything of a call is. Laid out twice: first without memory, for the size of it.
struct Layout {
    Rounded rounded{};
    struct {
        int32_t *starts, *tokens;  // [blocks, groups + 1], [groups, tokens]
        float* scales;             // [groups, tokens]
        int8_t* quants;            // [groups, tokens, group]
    } lists[2];
    Block* blocks;
    uint8_t* slots;  // of each thread
    int64_t slot_bytes, per_block;
};

Layout lay_out(const PackedMatmulArguments& a, Memory& memory) {
    Layout out;
    Rounded& r = out.rounded;
    int64_t tokens = a.tokens + spare_tokens, groups = a.kind <= int8 ? a.columns / a.group : 0;
    // An odd number of cache lines from token to token, so that they do not displace each other.
    Kind kind = rounded_to(a.kind);
    int64_t number_bytes = kind == int8 ? 1 : kind == bf16 ? 2 : 4;
    int64_t lines = divide_up(a.columns * number_bytes, 64) | 1;
    bool copied = kind != fp32 || a.norm || a.order;
    r.stride = copied ? lines * 64 / number_bytes : a.columns;
    r.tokens = tokens;
    if (kind == int8) {
        for (int64_t i = 0; i < a.count; i++) r.wanted[a.matrices[i].precise ? every : outstanding] = true;
        for (auto& quants : r.quants) quants = memory.take<int8_t>(tokens * r.stride);
        r.scales = memory.take<float>(tokens * groups);
        r.offsets = memory.take<int32_t>(tokens * groups);
        for (int rests = 0; rests < 2; rests++) {
            if (!r.wanted[rests]) continue;
            r.rest_scales[rests] = memory.take<float>(tokens * groups);
            r.rest_offsets[rests] = memory.take<int32_t>(tokens * groups);
            r.sums[rests] = memory.take<float>(tokens * groups);
            r.with_rest[rests] = memory.take<uint8_t>((groups + 1) * tokens);
        }
    } else if (kind == bf16) {
        r.halves = memory.take<uint16_t>(tokens * r.stride);
    } else if (copied) {
        r.numbers = memory.take<float>(tokens * r.stride);
    }
    int64_t fitting = std::max<int64_t>(1, block_bytes / (r.stride * number_bytes));
    out.per_block = round_up(divide_up(a.tokens, divide_up(a.tokens, fitting)), block_tokens);
    int64_t most_blocks = a.parts + a.tokens / out.per_block + 1;
    out.blocks = memory.take<Block>(most_blocks);
#if defined(QK_TILES)
    for (int rests = 0; rests < 2; rests++) {
        if (!r.wanted[rests]) continue;
        out.lists[rests] = {memory.take<int32_t>(most_blocks * (groups + 1)),
                            memory.take<int32_t>(tokens * groups),
                            memory.take<float>(tokens * groups),
                            memory.take<int8_t>(tokens * a.columns)};
    }
#endif
    int64_t apart = a.columns * pair * panel_rows;
    int64_t tiles = (run_columns + (out.per_block + spare_tokens) * 4) * pair * panel_rows;
    out.slot_bytes = std::max(a.columns * 4, a.kind <= int8 ? std::max(apart, tiles) : 0);
    out.slot_bytes = round_up(out.slot_bytes, 64);
    out.slots = memory.take<uint8_t>(out.slot_bytes * a.threads);
    return out;
}

void round_all(const PackedMatmulArguments& a, const Layout& at) {
    const Rounded& r = at.rounded;
    int64_t groups = a.kind <= int8 ? a.columns / a.group : 0;
    // Of tokens that there are not: read with the last ones, and what they hold must not slow down.
    for (int64_t g = 0; g <= groups && groups > 0; g++) {
        int64_t at = g * r.tokens + a.tokens;
        if (g < groups) std::fill_n(r.scales + at, spare_tokens, 0.0f);
        for (int rests = 0; rests < 2; rests++) {
            if (!r.wanted[rests]) continue;
            std::fill_n(r.with_rest[rests] + at, spare_tokens, uint8_t{0});
            if (g == groups) continue;
            std::fill_n(r.rest_scales[rests] + at, spare_tokens, 0.0f);
            std::fill_n(r.sums[rests] + at, spare_tokens, 0.0f);
        }
    }
    if (r.halves) {
        std::memset(r.halves + a.tokens * r.stride, 0, static_cast<size_t>(spare_tokens * r.stride) * 2);
    }
    if (rounded_to(a.kind) == fp32 && !r.numbers) return;
    int64_t per_chunk = std::max<int64_t>(1, 16384 / a.columns);
    parallel(divide_up(a.tokens, per_chunk), static_cast<int>(a.threads), [&](int64_t chunk, int slot) {
        auto* own = reinterpret_cast<float*>(at.slots + slot * at.slot_bytes);
        int64_t end = std::min(a.tokens, (chunk + 1) * per_chunk);
        for (int64_t t = chunk * per_chunk; t < end; t++) round_token(a, r, t, own);
    });
}

Plan plan_blocks(const PackedMatmulArguments& a, const Layout& at) {
    Plan plan{at.blocks, 0, 0, 0};
    int64_t start = 0;
    for (int64_t part = 0; part < a.parts; part++) {
        int64_t end = a.ends ? a.ends[part] : a.tokens;
        for (; start < end; start = std::min(end, start + at.per_block)) {
            int64_t last = std::min(end, start + at.per_block);
            at.blocks[plan.block_count++] = Block{part, start, last};
            plan.most_tokens = std::max(plan.most_tokens, last - start);
        }
    }
    for (int64_t i = 0; i < (a.gated ? 1 : a.count); i++) plan.units += units_of(a, a.matrices[i]);
    return plan;
}

#if defined(QK_TILES)

// For each block, the rests of its tokens one after another.
void list_rests(const PackedMatmulArguments& a, const Layout& at, const Plan& plan, Rests which) {
    const Rounded& r = at.rounded;
    const auto& lists = at.lists[which];
    int64_t groups = a.columns / a.group;
    for (int64_t b = 0; b < plan.block_count; b++) {
        Block& block = at.blocks[b];
        int32_t* starts = lists.starts + b * (groups + 1);
        int64_t first = block.first * groups;  // of entries: there is room for all that may be
        int32_t count = 0;
        for (int64_t g = 0; g < groups; g++) {
            starts[g] = count;
            const uint8_t* marks = r.with_rest[which] + g * r.tokens;
            for (int64_t t = block.first; t < block.last; t++) {
                lists.tokens[first + count] = static_cast<int32_t>(t - block.first);
                count += marks[t];
            }
        }
        starts[groups] = count;
        block.rests[which] = {starts, lists.tokens + first, lists.scales + first,
                              lists.quants + first * a.group};
    }
    parallel(plan.block_count * groups, static_cast<int>(a.threads), [&](int64_t chunk, int) {
        const Block& block = at.blocks[chunk / groups];
        const RestList& list = block.rests[which];
        int64_t g = chunk % groups, first = block.first * groups;
        for (int64_t i = list.starts[g]; i < list.starts[g + 1]; i++) {
            int64_t token = block.first + list.tokens[i];
            lists.scales[first + i] = r.rest_scales[which][g * r.tokens + token];
            std::memcpy(lists.quants + (first + i) * a.group,
                        r.quants[1] + token * r.stride + g * a.group, static_cast<size_t>(a.group));
        }
    });
}

#endif

void multiply(const PackedMatmulArguments& a, const Layout& at, const Plan& plan) {
    const Rounded& r = at.rounded;
    int64_t groups = a.kind <= int8 ? a.columns / a.group : 0;
    Activations by_rests[2];
    for (int rests = 0; rests < 2; rests++) {
        by_rests[rests] = {{r.quants[0], r.scales, r.offsets},
                           {r.quants[1], r.rest_scales[rests], r.rest_offsets[rests]},
                           r.with_rest[rests], r.sums[rests], r.halves,
                           r.numbers ? r.numbers : a.x, r.tokens, a.columns, r.stride, a.group, groups};
    }
    auto threads = static_cast<int>(a.threads);
    // Few tokens: few chunks, since each starts with nothing prefetched, but none below 16 KB.
    int64_t chunks = plan.total();
    if (plan.most_tokens <= 16) {
        int64_t bytes = plan.total() * row_bytes(a.kind, a.columns) * pair * panel_rows;
        chunks = std::min({chunks, threads * int64_t{4}, 1 + bytes / 16384});
    }
    int64_t per_chunk = divide_up(plan.total(), chunks);
    parallel(divide_up(plan.total(), per_chunk), threads, [&](int64_t chunk, int slot) {
        auto rows = static_cast<int>(std::min<int64_t>(16, plan.most_tokens));
#if defined(QK_TILES)
        TileUnit unit(rows, a.kind <= int8);
#endif
        int64_t end = std::min(plan.total(), (chunk + 1) * per_chunk);
        for (int64_t i = chunk * per_chunk; i < end; i++) {
            const Block& block = plan.blocks[i / plan.units];
            Unit u = find_unit(a, block.part, i % plan.units);
            multiply_unit(a, u, by_rests[u.precise ? every : outstanding], block, rows,
                          at.slots + slot * at.slot_bytes);
        }
    });
}

}  // namespace
}  // namespace qk

// 0, or 2 when there is no memory.
QK_EXPORT int qk_packed_matmul(const PackedMatmulArguments* a) {
    using namespace qk;
    Memory measured(nullptr);
    lay_out(*a, measured);
    auto* start = reinterpret_cast<uint8_t*>(scratch(static_cast<size_t>(measured.size()) / 4));
    if (!start) return 2;
    Memory memory(start);
    Layout at = lay_out(*a, memory);
    Plan plan = plan_blocks(*a, at);
    if (plan.block_count == 0) return 0;
    round_all(*a, at);
#if defined(QK_TILES)
    for (Rests which : {outstanding, every}) {
        if (at.rounded.wanted[which] && in_int_tiles(*a, plan.most_tokens)) {
            list_rests(*a, at, plan, which);
        }
    }
#endif
    multiply(*a, at, plan);
    return 0;
}
