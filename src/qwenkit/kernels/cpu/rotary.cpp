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
QK_EXPORT void qk_rotary(const float* x, const float* cos, const float* sin, float* y,
                         int64_t tokens, int64_t heads, int64_t half, int64_t token_stride,
                         int64_t head_stride, int threads) {
    using namespace qk;
    int64_t per_chunk = std::max<int64_t>(1, 16384 / (heads * half * 2));
    parallel((tokens + per_chunk - 1) / per_chunk, threads, [&](int64_t chunk, int) {
        int64_t end = std::min(tokens, (chunk + 1) * per_chunk);
        for (int64_t token = chunk * per_chunk; token < end; token++) {
            for (int64_t head = 0; head < heads; head++) {
                rotate(x + token * token_stride + head * head_stride, cos + token * half,
                       sin + token * half, y + (token * heads + head) * half * 2, half);
            }
        }
    });
}
