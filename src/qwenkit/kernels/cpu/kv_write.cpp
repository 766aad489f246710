// New keys and values into the slots of a paged cache: fp32, or rounded to bf16, int8 or four bits.
#include "kv_store.h"
#include "threads.h"

// Rows of k and v, heads · head_dim numbers each, lie `k_stride` and `v_stride` numbers apart; the
// caches hold `capacity` rows and are contiguous, as are their scales, null unless `kind` is 2.
// `kind` is 0 for fp32, 1 for bf16, 2 for int8, 3 for four bits.
struct KvWriteArguments {
    const float *k, *v;
    void *keys, *values;
    float *key_scales, *value_scales;
    const int64_t* slots;
    int64_t tokens, heads, head_dim, k_stride, v_stride, capacity, kind, threads;
};

namespace qk {
namespace {

template <class T>
void write(const KvWriteArguments& a) {
    int64_t width = a.heads * a.head_dim, step = a.heads * row_size<T>(a.head_dim);
    int64_t per_chunk = std::max<int64_t>(1, 16384 / width);
    auto threads = static_cast<int>(a.threads);
    parallel((a.tokens + per_chunk - 1) / per_chunk, threads, [&](int64_t chunk, int) {
        int64_t end = std::min(a.tokens, (chunk + 1) * per_chunk);
        for (int64_t i = chunk * per_chunk; i < end; i++) {
            int64_t slot = a.slots[i], scale = a.key_scales ? slot * a.heads : 0;
            write_row(a.k + i * a.k_stride, static_cast<T*>(a.keys) + slot * step,
                      a.key_scales + scale, a.heads, a.head_dim);
            write_row(a.v + i * a.v_stride, static_cast<T*>(a.values) + slot * step,
                      a.value_scales + scale, a.heads, a.head_dim);
        }
    });
}

}  // namespace
}  // namespace qk

// 0, or 1 when a slot is outside: then nothing is written.
QK_EXPORT int qk_kv_write(const KvWriteArguments* a) {
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
