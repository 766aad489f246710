// silu(gate) · up = gate · up / (1 + exp(-gate)), number by number, fp32.
#include <algorithm>

#include "simd.h"
#include "threads.h"

namespace qk {
namespace {

// exp by 2^n · exp(r) with |r| at most ln 2 / 2 and seven terms of the series: within two units in
// the last place. Arguments are held where the result is a normal number.
inline vec exponential(vec x) {
    x = min(max(x, splat(-87.0f)), splat(88.0f));
    const vec round = splat(12582912.0f);  // 1.5 · 2^23: adding it leaves no room for a fraction
    vec n = (x * splat(1.44269504f) + round) - round;
    vec r = fma(n, splat(-0.693359375f), x);  // ln 2 in two pieces, the first exact times n
    r = fma(n, splat(2.12194440e-4f), r);
    vec series = splat(1.0f / 5040);
    for (float term : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 1.0f / 2, 1.0f, 1.0f}) {
        series = fma(series, r, splat(term));
    }
    return series * power_of_two(n);
}

}  // namespace
}  // namespace qk

QK_EXPORT void qk_silu_mul(const float* gate, const float* up, float* y, int64_t count,
                           int threads) {
    using namespace qk;
    constexpr int64_t per_chunk = 16384;  // a multiple of every lane count
    parallel((count + per_chunk - 1) / per_chunk, threads, [&](int64_t chunk, int) {
        int64_t end = std::min(count, (chunk + 1) * per_chunk);
        for (int64_t i = chunk * per_chunk; i < end; i += lanes) {
            vec g = load_some(gate + i, end - i);
            vec silu = g / (splat(1.0f) + exponential(g * splat(-1.0f)));
            store_some(y + i, silu * load_some(up + i, end - i), end - i);
        }
    });
}
