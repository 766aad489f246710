// Heads of one token into a row of a cache: fp32 as they are, or rounded to bf16 or int8.
#pragma once

#include <algorithm>
#include <cmath>

#include "kv_rows.h"

namespace qk {

inline void write_row(const float* row, float* to, float*, int64_t heads, int64_t head_dim) {
    std::memcpy(to, row, static_cast<size_t>(heads * head_dim) * sizeof(float));
}

inline void write_row(const float* row, uint16_t* to, float*, int64_t heads, int64_t head_dim) {
    for (int64_t i = 0; i < heads * head_dim; i++) to[i] = narrowed(row[i]);
}

// The largest magnitude; as bits, NaN is the largest of all.
inline float largest_of(const float* row, int64_t count) {
    int32_t highest = 0;
    for (int64_t i = 0; i < count; i++) {
        int32_t bits;
        std::memcpy(&bits, row + i, 4);
        highest = std::max(highest, bits & 0x7fffffff);
    }
    float value;
    std::memcpy(&value, &highest, 4);
    return value;
}

inline void write_row(const float* row, int8_t* to, float* scales, int64_t heads, int64_t head_dim) {
    for (int64_t head = 0; head < heads; head++, row += head_dim, to += head_dim) {
        float scale = largest_of(row, head_dim) / 127.0f;
        scales[head] = scale;
        for (int64_t i = 0; i < head_dim; i++) {
            float quotient = row[i] / scale;  // 0 / 0 in a row of zeros
            if (quotient != quotient) quotient = 0.0f;
            quotient = std::min(127.0f, std::max(-127.0f, quotient));
            to[i] = static_cast<int8_t>(std::nearbyint(quotient));
        }
    }
}

}  // namespace qk
