// The largest of the numbers at j, j + columns, j + 2 · columns and so on, for each j; fp32. NaN
// where one of them is no finite number: that times 0 is NaN, and a maximum whose second operand is
// NaN stays so.
#include <algorithm>

#include "simd.h"
#include "threads.h"

struct ColumnMaximaArguments {
    const float* scores;
    float* maxima;
    int64_t rows, count, row_stride, columns, threads;
};

QK_EXPORT int qk_column_maxima(const ColumnMaximaArguments* a) {
    using namespace qk;
    int64_t count = a->count, columns = a->columns;
    parallel(a->rows, a->threads, [&](int64_t row, int) {
        const float* scores = a->scores + row * a->row_stride;
        float* maxima = a->maxima + row * columns;
        std::fill(maxima, maxima + columns, -__builtin_inff());
        vec zero = splat(0.0f);
        for (int64_t start = 0; start < count; start += columns) {
            int64_t width = std::min(columns, count - start);
            int64_t j = 0;
            for (; j + lanes <= width; j += lanes) {
                vec x = load(scores + start + j);
                store(maxima + j, fma(x, zero, max(x, load(maxima + j))));
            }
            vec x = load_some(scores + start + j, width - j);
            vec m = load_some(maxima + j, width - j);
            store_some(maxima + j, fma(x, zero, max(x, m)), width - j);
        }
        for (int64_t j = 0; j < columns; j++)  // infinity times 0 has another sign on each machine
            if (maxima[j] != maxima[j]) maxima[j] = __builtin_nanf("");
    });
    return 0;
}
