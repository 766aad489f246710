// silu(gate) · up = gate · up / (1 + exp(-gate)), number by number, fp32.
#include <algorithm>

#include "silu.h"
#include "threads.h"

struct SiluMulArguments {
    const float *gate, *up;
    float* y;
    int64_t count, threads;
};

QK_EXPORT int qk_silu_mul(const SiluMulArguments* a) {
    using namespace qk;
    const float *gate = a->gate, *up = a->up;
    float* y = a->y;
    int64_t count = a->count;
    constexpr int64_t per_chunk = 16384;  // a multiple of every lane count
    parallel((count + per_chunk - 1) / per_chunk, a->threads, [&](int64_t chunk, int) {
        int64_t end = std::min(count, (chunk + 1) * per_chunk);
        for (int64_t i = chunk * per_chunk; i < end; i += lanes) {
            vec g = load_some(gate + i, end - i);
            store_some(y + i, silu(g) * load_some(up + i, end - i), end - i);
        }
    });
    return 0;
}
