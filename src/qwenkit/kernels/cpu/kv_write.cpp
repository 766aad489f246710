// New keys and values into the slots of a paged cache, fp32.
#include <cstring>

#include "simd.h"

// Rows of k and v, `width` numbers each, lie `k_stride` and `v_stride` numbers apart; the caches
// hold `capacity` rows. 0, or 1 when a slot is outside: then nothing is written.
QK_EXPORT int qk_kv_write(const float* k, const float* v, float* keys, float* values,
                          const int64_t* slots, int64_t tokens, int64_t width, int64_t k_stride,
                          int64_t v_stride, int64_t capacity) {
    for (int64_t i = 0; i < tokens; i++) {
        if (slots[i] < 0 || slots[i] >= capacity) return 1;
    }
    size_t bytes = static_cast<size_t>(width) * sizeof(float);
    for (int64_t i = 0; i < tokens; i++) {
        std::memcpy(keys + slots[i] * width, k + i * k_stride, bytes);
        std::memcpy(values + slots[i] * width, v + i * v_stride, bytes);
    }
    return 0;
}
