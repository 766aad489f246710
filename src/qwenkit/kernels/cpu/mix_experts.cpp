// Each token's experts weighted and added up in the order of its choices, then the shared expert
// behind its gate, then the residual.
#include <algorithm>
#include <cmath>

#include "simd.h"
#include "threads.h"

// outputs are [choices, width]; weights and places [tokens, count]; shared, residual (null: none)
// and y [tokens, width]; gate is [tokens].
struct MixExpertsArguments {
    const float *outputs, *weights;
    const int64_t* places;
    const float *shared, *gate, *residual;
    float* y;
    int64_t choices, tokens, count, width, threads;
};

namespace qk {
namespace {

void mix(const MixExpertsArguments& a, int64_t token) {
    const float* weights = a.weights + token * a.count;
    const int64_t* places = a.places + token * a.count;
    float open = a.shared ? 1.0f / (1.0f + std::exp(-a.gate[token])) : 0.0f;
    int64_t at = token * a.width;
    for (int64_t i = 0; i < a.width; i += lanes) {
        int64_t left = a.width - i;
        vec sum{};
        for (int64_t c = 0; c < a.count; c++) {
            sum = fma(load_some(a.outputs + places[c] * a.width + i, left), splat(weights[c]), sum);
        }
        if (a.shared) sum = fma(load_some(a.shared + at + i, left), splat(open), sum);
        if (a.residual) sum = sum + load_some(a.residual + at + i, left);
        store_some(a.y + at + i, sum, left);
    }
}

}  // namespace
}  // namespace qk

// 0, or 1 when a place is outside: then nothing is written.
QK_EXPORT int qk_mix_experts(const MixExpertsArguments* a) {
    using namespace qk;
    for (int64_t i = 0; i < a->tokens * a->count; i++) {
        if (a->places[i] < 0 || a->places[i] >= a->choices) return 1;
    }
    int64_t per_chunk = std::max<int64_t>(1, 16384 / (a->width * a->count));
    parallel((a->tokens + per_chunk - 1) / per_chunk, static_cast<int>(a->threads),
             [&](int64_t chunk, int) {
                 int64_t end = std::min(a->tokens, (chunk + 1) * per_chunk);
                 for (int64_t t = chunk * per_chunk; t < end; t++) mix(*a, t);
             });
    return 0;
}
