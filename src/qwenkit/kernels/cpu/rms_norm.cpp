// x · rsqrt(mean(x²) + eps) · weight for each row of x [rows, width], fp32.
#include <algorithm>
#include <cmath>

#include "simd.h"
#include "threads.h"

namespace qk {
namespace {

void normalise(const float* x, const float* weight, float* y, int64_t width, float eps) {
    vec squares[4] = {};  // four chains hide the latency of an addition; always the same four
    for (int64_t i = 0, turn = 0; i < width; i += lanes, turn++) {
        vec v = load_some(x + i, width - i);
        squares[turn % 4] = fma(v, v, squares[turn % 4]);
    }
    float sums[4];
    sum4(squares, sums);
    float mean = ((sums[0] + sums[1]) + (sums[2] + sums[3])) / static_cast<float>(width);
    vec factor = splat(1.0f / std::sqrt(mean + eps));
    for (int64_t i = 0; i < width; i += lanes) {
        int64_t left = width - i;
        vec scaled = load_some(x + i, left) * factor;
        store_some(y + i, load_some(weight + i, left) * scaled, left);
    }
}

}  // namespace
}  // namespace qk

struct RmsNormArguments {
    const float *x, *weight;
    float* y;
    int64_t rows, width, threads;
    float eps;
};

QK_EXPORT int qk_rms_norm(const RmsNormArguments* a) {
    using namespace qk;
    int64_t rows = a->rows, width = a->width;
    int64_t per_chunk = std::max<int64_t>(1, 16384 / width);
    parallel((rows + per_chunk - 1) / per_chunk, a->threads, [&](int64_t chunk, int) {
        int64_t end = std::min(rows, (chunk + 1) * per_chunk);
        for (int64_t row = chunk * per_chunk; row < end; row++) {
            normalise(a->x + row * width, a->weight, a->y + row * width, width, a->eps);
        }
    });
    return 0;
}
