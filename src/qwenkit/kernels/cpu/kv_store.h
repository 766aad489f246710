// Heads of one token into a row of a cache: fp32 as they are, or rounded to bf16, int8 or four bits.
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

// The largest bf16 number that is not above v, which is none of a NaN's.
inline float rounded_down(float v) {
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    bits = (bits + (bits >> 31 ? 0xffff : 0)) & 0xffff0000;
    std::memcpy(&v, &bits, 4);
    return v;
}

// One group of `count` numbers as kernels/kv_int4.py lays it out.
inline void write_group(const float* row, int64_t count, uint8_t* to) {
    float low = row[0], high = row[0], sum = 0;
    for (int64_t i = 0; i < count; i++) {
        low = std::min(low, row[i]);
        high = std::max(high, row[i]);
        sum += row[i] * 0.0f;  // NaN as soon as one number is not finite
    }
    low = rounded_down(low + 0.0f);  // -0 would have other bytes
    float span = high - low + sum;
    uint16_t head[2] = {0x7fc0, 0x7fc0};  // NaN
    uint8_t codes[group_numbers] = {};
    if (span - span == 0.0f) {
        head[0] = narrowed(span / 15.0f);
        head[1] = narrowed(low);
        float scale = widened_one(head[0]);
        for (int64_t i = 0; i < count; i++) {
            float quotient = (row[i] - low) / scale;  // 0 / 0 in a row of equal numbers
            if (quotient != quotient) quotient = 0.0f;
            codes[i] = static_cast<uint8_t>(std::nearbyint(std::min(15.0f, quotient)));
        }
    }
    std::memcpy(to, head, sizeof head);
    for (int64_t i = 0; i < group_numbers / 2; i++) {
        to[group_head + i] = static_cast<uint8_t>(codes[i] | codes[i + group_numbers / 2] << 4);
    }
}

inline void write_row(const float* row, uint8_t* to, float*, int64_t heads, int64_t head_dim) {
    for (int64_t head = 0; head < heads; head++, row += head_dim) {
        for (int64_t d = 0; d < head_dim; d += group_numbers, to += group_bytes) {
            write_group(row + d, std::min(head_dim - d, group_numbers), to);
        }
    }
}

}  // namespace qk
