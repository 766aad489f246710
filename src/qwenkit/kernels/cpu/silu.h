// silu(x) = x / (1 + exp(-x)).
#pragma once

#include "simd.h"

namespace qk {

// 1 / x for normal x, within a unit in the last place.
inline vec reciprocal(vec x) {
#if defined(__AVX512F__)
    vec r = _mm512_rcp14_ps(x);
    return r * (splat(2.0f) - x * r);  // one step of Newton's: faster than a division
#else
    return splat(1.0f) / x;
#endif
}

inline vec silu(vec x) { return x * reciprocal(splat(1.0f) + exponential(x * splat(-1.0f))); }

}  // namespace qk
