// What comes before attention, in one pass: queries and keys rotated, keys and values into the cache.
#include "kv_store.h"
#include "rotary.h"
#include "threads.h"

// Rows of q, k and v lie `q_stride`, `k_stride` and `v_stride` numbers apart, a token's heads one
// after another; cos and sin [tokens, head_dim / 2] and out [tokens, heads, head_dim] are
// contiguous, and head_dim is at most 512. factors [tokens] multiply the queries; null: none.
// guard [kv_heads, head_dim / 2] divides the keys and multiplies the queries; null: none. The rest
// is as for kv_write.
struct RotaryKvWriteArguments {
    const float *q, *k, *v, *cos, *sin, *factors, *guard;
    void *keys, *values;
    float *key_scales, *value_scales;
    const int64_t* slots;
    float* out;
    int64_t tokens, heads, kv_heads, head_dim, q_stride, k_stride, v_stride, capacity, kind, threads;
};

namespace qk {
namespace {

using Arguments = RotaryKvWriteArguments;

constexpr int64_t most_numbers = 512;  // of a head

void rotate_query(const Arguments& a, int64_t token) {
    int64_t half = a.head_dim / 2, width = a.heads * a.head_dim;
    float* out = a.out + token * width;
    for (int64_t d = 0; d < width; d += a.head_dim) {
        rotate(a.q + token * a.q_stride + d, a.cos + token * half, a.sin + token * half, out + d,
               half);
    }
    if (a.factors) {
        for (int64_t i = 0; i < width; i++) out[i] *= a.factors[token];
    }
    if (!a.guard) return;
    int64_t group = a.heads / a.kv_heads;
    for (int64_t head = 0; head < a.heads; head++, out += a.head_dim) {
        const float* guard = a.guard + head / group * half;
        for (int64_t i = 0; i < half; i++) {
            out[i] *= guard[i];
            out[half + i] *= guard[i];
        }
    }
}

template <class T>
void write_token(const Arguments& a, int64_t token) {
    int64_t half = a.head_dim / 2, row = a.slots[token] * a.kv_heads;
    int64_t size = row_size<T>(a.head_dim);
    for (int64_t head = 0; head < a.kv_heads; head++) {
        float rotated[most_numbers];
        int64_t from = head * a.head_dim, to = (row + head) * size;
        int64_t scale = a.key_scales ? row + head : 0;
        rotate(a.k + token * a.k_stride + from, a.cos + token * half, a.sin + token * half,
               rotated, half);
        if (a.guard) {
            for (int64_t i = 0; i < half; i++) {
                rotated[i] /= a.guard[head * half + i];
                rotated[half + i] /= a.guard[head * half + i];
            }
        }
        write_row(rotated, static_cast<T*>(a.keys) + to, a.key_scales + scale, 1, a.head_dim);
        write_row(a.v + token * a.v_stride + from, static_cast<T*>(a.values) + to,
                  a.value_scales + scale, 1, a.head_dim);
    }
}

template <class T>
void write(const Arguments& a) {
    int64_t numbers = (a.heads + 2 * a.kv_heads) * a.head_dim;
    int64_t per_chunk = std::max<int64_t>(1, 16384 / numbers);
    int64_t chunks = (a.tokens + per_chunk - 1) / per_chunk;
    parallel(chunks, static_cast<int>(a.threads), [&](int64_t chunk, int) {
        int64_t end = std::min(a.tokens, (chunk + 1) * per_chunk);
        for (int64_t token = chunk * per_chunk; token < end; token++) {
            rotate_query(a, token);
            write_token<T>(a, token);
        }
    });
}

}  // namespace
}  // namespace qk

// 0; 1 when a slot is outside, 2 when a head is too long: then nothing is written.
QK_EXPORT int qk_rotary_kv_write(const RotaryKvWriteArguments* a) {
    if (a->head_dim > qk::most_numbers) return 2;
    for (int64_t i = 0; i < a->tokens; i++) {
        if (a->slots[i] < 0 || a->slots[i] >= a->capacity) return 1;
    }
    auto* go = a->kind == 0   ? qk::write<float>
               : a->kind == 1 ? qk::write<uint16_t>
               : a->kind == 2 ? qk::write<int8_t>
                              : qk::write<uint8_t>;
    go(*a);
    return 0;
}
