// x · rsqrt(mean(x²) + eps) · weight for each row of x [rows, width], fp32.
#include <algorithm>

#include "row_norm.h"
#include "threads.h"

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
