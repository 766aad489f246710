// Where everything of one product is in memory, and its tokens before they are multiplied: cut into
// blocks, rounded, and what rounding left of them listed.
#pragma once

#include "packed_unit.h"
#include "threads.h"

namespace qk {
namespace {

// Work of one call.
struct Plan {
    const Block* blocks;
    int64_t block_count, most_tokens, units;  // units: of each block

    int64_t total() const { return block_count * units; }
};

// Memory of a call, cut into pieces that begin at a cache line each.
class Memory {
  public:
    explicit Memory(uint8_t* start) : start_(start) {}

    template <class T>
    T* take(int64_t count) {
        auto* taken = start_ ? reinterpret_cast<T*>(start_ + size_) : nullptr;
        size_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
        return taken;
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
        for (int64_t i = 0; i < a.count; i++) {
            r.wanted[a.matrices[i].precise ? many : outstanding] = true;
            r.summed |= a.matrices[i].mins != nullptr;
        }
        for (auto& quants : r.quants) quants = memory.take<int8_t>(tokens * r.stride);
        r.scales = memory.take<float>(tokens * groups);
        r.offsets = memory.take<int32_t>(tokens * groups);
        for (int rests = 0; rests < 2; rests++) {
            if (!r.wanted[rests]) continue;
            r.rest_scales[rests] = memory.take<float>(tokens * groups);
            r.rest_offsets[rests] = memory.take<int32_t>(tokens * groups);
            if (r.summed) r.sums[rests] = memory.take<float>(tokens * groups);
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
    static_assert(together * sizeof(float) <= pair * panel_rows, "no room to normalise rows in");
    int64_t apart = a.columns * pair * panel_rows;
    int64_t tiles = (run_columns + (out.per_block + spare_tokens) * 4) * pair * panel_rows;
    out.slot_bytes = std::max(a.columns * 4, a.kind <= int8 ? std::max(apart, tiles) : 0);
    out.slot_bytes = round_up(out.slot_bytes, 64);
    out.slots = memory.take<uint8_t>(out.slot_bytes * a.threads);
    return out;
}

// Marks and scales of tokens that there are not: read with the last ones, and what they hold must not
// slow down. And no token has a rest yet.
void clear(const PackedMatmulArguments& a, const Rounded& r, int64_t groups) {
    for (int64_t g = 0; g < groups; g++) {
        int64_t spare = g * r.tokens + a.tokens;
        std::fill_n(r.scales + spare, spare_tokens, 0.0f);
        for (int rests = 0; rests < 2; rests++) {
            if (!r.wanted[rests]) continue;
            std::fill_n(r.with_rest[rests] + spare, spare_tokens, uint8_t{0});
            std::fill_n(r.rest_scales[rests] + spare, spare_tokens, 0.0f);
            if (r.summed) std::fill_n(r.sums[rests] + spare, spare_tokens, 0.0f);
        }
    }
    for (int rests = 0; groups > 0 && rests < 2; rests++) {
        if (r.wanted[rests]) std::fill_n(r.with_rest[rests] + groups * r.tokens, r.tokens, uint8_t{0});
    }
    if (r.halves) {
        std::fill_n(r.halves + a.tokens * r.stride, spare_tokens * r.stride, uint16_t{0});
    }
}

// Shared so that no two threads write to one cache line: many tokens by sixteen, few by groups.
void round_all(const PackedMatmulArguments& a, const Layout& at) {
    const Rounded& r = at.rounded;
    int64_t groups = a.kind <= int8 ? a.columns / a.group : 0;
    clear(a, r, groups);
    if (rounded_to(a.kind) == fp32 && !r.numbers) return;
    auto threads = static_cast<int>(a.threads);
    bool by_groups = groups > 0 && a.tokens < 16 * threads;
    int64_t step = by_groups || groups == 0 ? 1 : 16;
    int64_t steps = by_groups ? groups : divide_up(a.tokens, step);
    int64_t chunks = round_up(divide_up(a.tokens * a.columns, 16384), threads);
    chunks = by_groups ? threads : std::min(steps, chunks);
    if (a.tokens * a.columns <= 8192) chunks = 1;
    parallel(chunks, threads, [&](int64_t chunk, int slot) {
        auto* own = reinterpret_cast<float*>(at.slots + slot * at.slot_bytes);
        int64_t first = chunk * steps / chunks * step, last = (chunk + 1) * steps / chunks * step;
        if (by_groups) return round_groups(a, r, 0, a.tokens, first, last, own);
        last = std::min(last, a.tokens);
        if (groups > 0) return round_groups(a, r, first, last, 0, groups, own);
        for (int64_t t = first; t < last; t++) copy_token(a, r, t, own);
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

}  // namespace
}  // namespace qk
