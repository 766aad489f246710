// silu(x) = x / (1 + exp(-x)).
#pragma once

#include "simd.h"

namespace qk {

inline vec silu(vec x) { return x / (splat(1.0f) + exponential(x * splat(-1.0f))); }

}  // namespace qk
