// A router's logits to each token's best experts, and all choices sorted by expert.
#include <algorithm>
#include <cmath>

#include "simd.h"
#include "threads.h"

// logits are [tokens, experts]; weights, chosen and places [tokens, count]; order is
// [tokens · count], ends [experts].
struct ChooseExpertsArguments {
    const float* logits;
    float* weights;
    int64_t *chosen, *order, *places, *ends;
    int64_t tokens, experts, count, normalise, threads;
};

namespace qk {
namespace {

// The best of one token, best first, of equal ones the first; all in order where there is NaN.
void choose(const ChooseExpertsArguments& a, int64_t token, float* share) {
    const float* logits = a.logits + token * a.experts;
    float most = *std::max_element(logits, logits + a.experts), total = 0;
    for (int64_t e = 0; e < a.experts; e++) total += share[e] = std::exp(logits[e] - most);
    float* weights = a.weights + token * a.count;
    int64_t* chosen = a.chosen + token * a.count;
    float together = 0;
    for (int64_t i = 0; i < a.count; i++) {
        int64_t best = -1;
        for (int64_t e = 0; e < a.experts; e++) {
            if (share[e] != -1.0f && (best < 0 || share[e] > share[best])) best = e;
        }
        chosen[i] = best;
        weights[i] = share[best] / total;
        together += weights[i];
        share[best] = -1.0f;  // taken
    }
    if (!a.normalise) return;
    for (int64_t i = 0; i < a.count; i++) weights[i] /= together;
}

void sort_by_expert(const ChooseExpertsArguments& a) {
    int64_t choices = a.tokens * a.count;
    std::fill_n(a.ends, a.experts, 0);
    for (int64_t i = 0; i < choices; i++) a.ends[a.chosen[i]]++;
    int64_t start = 0;
    for (int64_t e = 0; e < a.experts; e++) {
        int64_t own = a.ends[e];
        a.ends[e] = start;  // which moves to the end as choices come in
        start += own;
    }
    for (int64_t i = 0; i < choices; i++) {
        int64_t place = a.ends[a.chosen[i]]++;
        a.places[i] = place;
        a.order[place] = i / a.count;
    }
}

}  // namespace
}  // namespace qk

// 0, or 2 when there is no memory.
QK_EXPORT int qk_choose_experts(const ChooseExpertsArguments* a) {
    using namespace qk;
    auto threads = static_cast<int>(a->threads);
    int64_t apart = (a->experts + 15) / 16 * 16;  // a cache line's numbers
    float* shares = scratch(static_cast<size_t>(apart * threads));
    if (!shares) return 2;
    int64_t per_chunk = std::max<int64_t>(1, 1024 / a->experts);
    parallel((a->tokens + per_chunk - 1) / per_chunk, threads, [&](int64_t chunk, int slot) {
        int64_t end = std::min(a->tokens, (chunk + 1) * per_chunk);
        for (int64_t t = chunk * per_chunk; t < end; t++) choose(*a, t, shares + slot * apart);
    });
    sort_by_expert(*a);
    return 0;
}
