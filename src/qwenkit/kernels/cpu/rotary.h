// One head's rotation by its position, first half with second half. Products and sums are rounded
// one by one, as in the reference, so that the results are the same numbers.
#pragma once

#include "simd.h"

namespace qk {

inline void rotate(const float* x, const float* cos, const float* sin, float* y, int64_t half) {
    for (int64_t i = 0; i < half; i += lanes) {
        int64_t left = half - i;
        vec first = load_some(x + i, left), second = load_some(x + half + i, left);
        vec c = load_some(cos + i, left), s = load_some(sin + i, left);
        store_some(y + i, first * c - second * s, left);
        store_some(y + half + i, second * c + first * s, left);
    }
}

}  // namespace qk
