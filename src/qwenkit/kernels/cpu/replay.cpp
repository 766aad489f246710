// Recorded calls of kernels, one after another, without anything between them.
#include "simd.h"

struct RecordedCall {
    int (*kernel)(const void* arguments);
    const void* arguments;
};

struct ReplayArguments {
    const RecordedCall* calls;
    int64_t count;
};

// 0, or the number of the first call that failed, counted from 1; those after it are not made.
QK_EXPORT int qk_replay(const ReplayArguments* a) {
    for (int64_t i = 0; i < a->count; i++) {
        if (a->calls[i].kernel(a->calls[i].arguments)) return static_cast<int>(i + 1);
    }
    return 0;
}
