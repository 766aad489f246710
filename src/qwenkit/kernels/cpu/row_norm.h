// One row divided by the root of its mean square: alone, and as part of other ops.
#pragma once

#include <cmath>

#include "simd.h"

namespace qk {

inline float mean_square(const float* x, int64_t width) {
    vec squares[4] = {};  // four chains hide the latency of an addition; always the same four
    for (int64_t i = 0, turn = 0; i < width; i += lanes, turn++) {
        vec v = load_some(x + i, width - i);
        squares[turn % 4] = fma(v, v, squares[turn % 4]);
    }
    float sums[4];
    sum4(squares, sums);
    return ((sums[0] + sums[1]) + (sums[2] + sums[3])) / static_cast<float>(width);
}

// y = x · rsqrt(mean(x²) + epsilon) · weight.
inline void normalise(const float* x, const float* weight, float* y, int64_t width,
                      float epsilon) {
    vec factor = splat(1.0f / std::sqrt(mean_square(x, width) + epsilon));
    for (int64_t i = 0; i < width; i += lanes) {
        int64_t left = width - i;
        vec scaled = load_some(x + i, left) * factor;
        store_some(y + i, load_some(weight + i, left) * scaled, left);
    }
}

}  // namespace qk
