// x [tokens, columns] with its columns in another order.
#include "simd.h"
#include "threads.h"

struct TakeColumnsArguments {
    const float* x;
    const int32_t* order;  // [columns]: the place in x of each column of y
    float* y;
    int64_t tokens, columns, threads;
};

// 0, or 1 when a column is outside: then nothing is written.
QK_EXPORT int qk_take_columns(const TakeColumnsArguments* a) {
    for (int64_t i = 0; i < a->columns; i++) {
        if (a->order[i] < 0 || a->order[i] >= a->columns) return 1;
    }
    int64_t per_chunk = 1 + 16384 / (a->columns + 1);
    int64_t chunks = (a->tokens + per_chunk - 1) / per_chunk;
    qk::parallel(chunks, static_cast<int>(a->threads), [&](int64_t chunk, int) {
        int64_t end = (chunk + 1) * per_chunk;
        for (int64_t t = chunk * per_chunk; t < a->tokens && t < end; t++) {
            const float* x = a->x + t * a->columns;
            float* y = a->y + t * a->columns;
            for (int64_t i = 0; i < a->columns; i++) y[i] = x[a->order[i]];
        }
    });
    return 0;
}
