// Rotary embedding of x [tokens, heads, 2 · half], first half with second half, fp32. Products and
// sums are rounded one by one, as in the reference, so that the results are the same numbers.
#include <algorithm>

#include "simd.h"
#include "threads.h"

namespace qk {
namespace {

void rotate(const float* x, const float* cos, const float* sin, float* y, int64_t half) {
    for (int64_t i = 0; i < half; i += lanes) {
        int64_t left = half - i;
        vec first = load_some(x + i, left), second = load_some(x + half + i, left);
        vec c = load_some(cos + i, left), s = load_some(sin + i, left);
        store_some(y + i, first * c - second * s, left);
        store_some(y + half + i, second * c + first * s, left);
    }
}

}  // namespace
}  // namespace qk

// Tokens and heads of x lie `token_stride` and `head_stride` numbers apart; cos, sin
// [tokens, half] and y are contiguous.
struct RotaryArguments {
    const float *x, *cos, *sin;
    float* y;
    int64_t tokens, heads, half, token_stride, head_stride, threads;
};

QK_EXPORT int qk_rotary(const RotaryArguments* a) {
    using namespace qk;
    int64_t heads = a->heads, half = a->half;
    int64_t per_chunk = std::max<int64_t>(1, 16384 / (heads * half * 2));
    parallel((a->tokens + per_chunk - 1) / per_chunk, a->threads, [&](int64_t chunk, int) {
        int64_t end = std::min(a->tokens, (chunk + 1) * per_chunk);
        for (int64_t token = chunk * per_chunk; token < end; token++) {
            for (int64_t head = 0; head < heads; head++) {
                rotate(a->x + token * a->token_stride + head * a->head_stride,
                       a->cos + token * half, a->sin + token * half,
                       a->y + (token * heads + head) * half * 2, half);
            }
        }
    });
    return 0;
}
