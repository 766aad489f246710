// x [tokens, columns] times the transposes of packed matrices: for each y [tokens, rows], fp32.
//
// Activations are normalised and rounded once per call: to eight bits by groups of columns for int4
// and int8 weights, to bf16 for bf16 weights where the processor multiplies such. A unit of work is
// a pair of panels and a block of tokens that stays in the second-level cache. Where tokens are
// sorted by the part of a matrix that they go through (the experts of a mixture), a block is of
// one part.
#include "packed_memory.h"

namespace qk {
namespace {

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
    chunks = std::min(plan.total(), round_up(chunks, threads));
    parallel(chunks, threads, [&](int64_t chunk, int slot) {
        auto rows = static_cast<int>(std::min<int64_t>(16, plan.most_tokens));
#if defined(QK_TILES)
        TileUnit unit(rows, a.kind <= int8);
#endif
        int64_t end = (chunk + 1) * plan.total() / chunks;  // as equal as can be
        for (int64_t i = chunk * plan.total() / chunks; i < end; i++) {
            const Block& block = plan.blocks[i / plan.units];
            Unit u = find_unit(a, block.part, i % plan.units);
            multiply_unit(a, u, by_rests[u.precise ? many : outstanding], block, rows,
                          at.slots + slot * at.slot_bytes);
        }
        settle();
    });
}

// Whether the tokens of the parts are all of them, one part after another, and rows of x.
bool in_order(const PackedMatmulArguments& a) {
    int64_t end = 0;
    for (int64_t part = 0; a.ends && part < a.parts; part++) {
        if (a.ends[part] < end) return false;
        end = a.ends[part];
    }
    if (a.ends && end != a.tokens) return false;
    for (int64_t t = 0; a.order && t < a.tokens; t++) {
        if (a.order[t] < 0 || a.order[t] >= a.x_rows) return false;
    }
    return true;
}

}  // namespace
}  // namespace qk

// 0, 2 when there is no memory, or 3 when order or ends name rows that there are not.
QK_EXPORT int qk_packed_matmul(const PackedMatmulArguments* a) {
    using namespace qk;
    if (!in_order(*a)) return 3;
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
    for (Rests which : {outstanding, many}) {
        if (at.rounded.wanted[which] && in_int_tiles(*a, plan.most_tokens)) {
            list_rests(*a, at, plan, which);
        }
    }
#endif
    multiply(*a, at, plan);
    return 0;
}
