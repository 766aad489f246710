// Rotary embedding of x [tokens, heads, 2 · half], fp32.
#include "rotary.h"

#include <algorithm>

#include "threads.h"

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
