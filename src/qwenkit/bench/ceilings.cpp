// What the processor gives at most: reads of memory, and products of each kind on registers only.
// A rate is of all threads together, in units per second; zero where the processor lacks the
// instruction. Compiled for the machine it runs on.
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

using Clock = std::chrono::steady_clock;

constexpr int kRead = 0, kFp32 = 1, kInt8 = 2, kBf16 = 3;
constexpr int kChains = 12;        // independent sums: more than latency times ports
constexpr int kRounds = 1 << 12;   // between two looks at the clock

// Keeps a value alive without storing it.
template <typename T>
void use(T& value) {
    asm volatile("" : "+m"(value));
}

typedef uint64_t Line __attribute__((vector_size(64), may_alias));  // one line of the cache

double read_units(const uint64_t* data, size_t words) {
    const Line* lines = reinterpret_cast<const Line*>(data);
    Line a = {}, b = {}, c = {}, d = {};
    for (size_t i = 0; i + 4 <= words / 8; i += 4) {
        a += lines[i];
        b += lines[i + 1];
        c += lines[i + 2];
        d += lines[i + 3];
    }
    a += b + c + d;
    use(a);
    return 8.0 * double(words);
}

#if defined(__AVX512F__)
double fp32_units() {
    __m512 sums[kChains], a = _mm512_set1_ps(1e-3f), b = _mm512_set1_ps(1e-4f);
    for (auto& sum : sums) sum = a;
    for (int r = 0; r < kRounds; ++r)
        for (auto& sum : sums) sum = _mm512_fmadd_ps(sum, a, b);
    for (auto& sum : sums) use(sum);
    return 2.0 * 16 * kChains * kRounds;
}
#elif defined(__AVX2__) && defined(__FMA__)
double fp32_units() {
    __m256 sums[kChains], a = _mm256_set1_ps(1e-3f), b = _mm256_set1_ps(1e-4f);
    for (auto& sum : sums) sum = a;
    for (int r = 0; r < kRounds; ++r)
        for (auto& sum : sums) sum = _mm256_fmadd_ps(sum, a, b);
    for (auto& sum : sums) use(sum);
    return 2.0 * 8 * kChains * kRounds;
}
#else
double fp32_units() {
    float sums[kChains * 4] = {};
    for (int r = 0; r < kRounds; ++r)
        for (float& sum : sums) sum = sum * 1e-3f + 1e-4f;
    for (float& sum : sums) use(sum);
    return 2.0 * 4 * kChains * kRounds;
}
#endif

#if defined(__AVX512VNNI__)
double int8_units() {
    __m512i sums[kChains], a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(5);
    for (auto& sum : sums) sum = _mm512_setzero_si512();
    for (int r = 0; r < kRounds; ++r)
        for (auto& sum : sums) sum = _mm512_dpbusd_epi32(sum, a, b);
    for (auto& sum : sums) use(sum);
    return 2.0 * 64 * kChains * kRounds;
}
#else
double int8_units() { return 0.0; }
#endif

#if defined(__AVX512BF16__)
double bf16_units() {
    __m512 sums[kChains];
    __m512bh a = (__m512bh)_mm512_set1_epi16(0x3c00), b = (__m512bh)_mm512_set1_epi16(0x3c00);
    for (auto& sum : sums) sum = _mm512_setzero_ps();
    for (int r = 0; r < kRounds; ++r)
        for (auto& sum : sums) sum = _mm512_dpbf16_ps(sum, a, b);
    for (auto& sum : sums) use(sum);
    return 2.0 * 32 * kChains * kRounds;
}
#else
double bf16_units() { return 0.0; }
#endif

double one_thread(int kind, const uint64_t* data, size_t words, double seconds) {
    auto start = Clock::now();
    double units = 0, spent = 0;
    do {
        double more = kind == kRead   ? read_units(data, words)
                      : kind == kFp32 ? fp32_units()
                      : kind == kInt8 ? int8_units()
                                      : bf16_units();
        if (more == 0) return 0;
        units += more;
        spent = std::chrono::duration<double>(Clock::now() - start).count();
    } while (spent < seconds);
    return units / spent;
}

}  // namespace

// kind: 0 bytes read, 1 fp32, 2 int8, 3 bf16 operations. `data` are words_each words a thread.
extern "C" __attribute__((visibility("default"))) double qk_ceiling(
    int kind, int threads, const uint64_t* data, size_t words_each, double seconds) {
    std::vector<double> rates(size_t(threads), 0.0);
    std::vector<std::thread> team;
    for (int t = 0; t < threads; ++t)
        team.emplace_back([=, &rates] {
            rates[size_t(t)] = one_thread(kind, data + size_t(t) * words_each, words_each, seconds);
        });
    double total = 0;
    for (auto& member : team) member.join();
    for (double rate : rates) total += rate;
    return total;
}
