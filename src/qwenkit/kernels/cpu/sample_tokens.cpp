// Rows of logits to tokens, as the op's reference has it. A row is changed in place by penalties and
// biases and put back as it was. Only its maxima of 64 are looked at to find what may be chosen, so
// a row is read once, and by nobody else.
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>

#include "simd.h"
#include "threads.h"

// Row r is logits[rows[r]], `stride` numbers apart. Its kind k has the ids and numbers from
// starts[4 r + k] on; settings are 8 a row.
struct SampleTokensArguments {
    float* logits;
    const int64_t *rows, *ids, *starts;
    const float* numbers;
    const double* settings;
    int64_t* tokens;
    int64_t row_count, logit_rows, stride, count, vocab_size, id_count, threads;
};

namespace qk {
namespace {

using Arguments = SampleTokensArguments;

constexpr int64_t chunk_scores = 64;
constexpr int64_t stretch = 512;  // weights that are summed at a time before a draw
constexpr float largest_score = std::numeric_limits<float>::max();

struct Rules {
    float repetition, presence, frequency, temperature;
    int64_t top_k;
    double top_p;
    float min_p;
    double number;
};

// Memory of one thread: what stood where ids were changed, maxima and a copy of them, candidates
// with their weights, and keys to sort them by.
struct Place {
    float *before, *maxima, *copy, *weights;
    int32_t* found;
    uint64_t* keys;
};

Rules rules_of(const double* s) {
    auto narrow = [&](int i) { return static_cast<float>(s[i]); };
    return {narrow(0), narrow(1), narrow(2), std::max(narrow(3), 1e-6f),
            static_cast<int64_t>(std::min(s[4], 9e15)), s[5], narrow(6), s[7]};
}

// Whether every row is there and is named once, and the ids of all kinds are ids, one stretch after
// another.
bool fits(const Arguments& a) {
    bool fine = a.starts[0] == 0 && a.starts[4 * a.row_count] == a.id_count;
    for (int64_t i = 0; i < 4 * a.row_count; i++) fine &= a.starts[i] <= a.starts[i + 1];
    for (int64_t i = 0; i < a.id_count; i++) fine &= a.ids[i] >= 0 && a.ids[i] < a.count;
    for (int64_t r = 0; r < a.row_count; r++) {
        fine &= a.rows[r] >= 0 && a.rows[r] < a.logit_rows;
        fine &= std::find(a.rows, a.rows + r, a.rows[r]) == a.rows + r;
    }
    return fine;
}

// The most ids that one row has.
int64_t most_ids(const Arguments& a) {
    int64_t most = 0;
    for (int64_t r = 0; r < a.row_count; r++) {
        most = std::max(most, a.starts[4 * r + 4] - a.starts[4 * r]);
    }
    return most;
}

bool finite(float x) { return std::fabs(x) <= largest_score; }

// Penalties, biases and bans, in the order of their rules; false where a logit is not finite.
bool adjust(const Arguments& a, int64_t row, const Rules& rules, float* scores, float* before) {
    const int64_t* starts = a.starts + 4 * row;
    bool fine = true;
    auto change = [&](int kind, auto&& make) {
        for (int64_t i = starts[kind]; i < starts[kind + 1]; i++) {
            float& score = scores[a.ids[i]];
            fine &= finite(score);
            *before++ = score;
            score = make(score, a.numbers[i]);
        }
    };
    change(0, [&](float s, float) {
        float changed = s > 0 ? s / rules.repetition : s * rules.repetition;
        return std::min(std::max(changed, -largest_score), largest_score);
    });
    change(1, [&](float s, float n) { return s - rules.presence - rules.frequency * n; });
    change(2, [&](float s, float n) { return s + n; });
    change(3, [&](float, float) { return -largest_score; });
    return fine;
}

void put_back(const Arguments& a, int64_t row, float* scores, const float* before) {
    int64_t first = a.starts[4 * row], end = a.starts[4 * row + 4];
    for (int64_t i = end; i-- > first;) scores[a.ids[i]] = before[i - first];
}

// The maximum of each 64 of the vocabulary's scores; false where a logit is not finite: that times
// 0 is NaN, and stays so.
bool find_maxima(const Arguments& a, const float* scores, float* maxima) {
    vec zero = splat(0.0f), bad = zero;
    int64_t start = 0;
    for (; start + chunk_scores <= a.vocab_size; start += chunk_scores) {
        vec highest = load(scores + start);
        for (int64_t i = 0; i < chunk_scores; i += lanes) {
            vec x = load(scores + start + i);
            highest = max(x, highest);
            bad = fma(x, zero, bad);
        }
        *maxima++ = highest_lane(highest);
    }
    float last = -largest_score;
    for (int64_t i = start; i < a.vocab_size; i++) last = std::max(last, scores[i]);
    if (start < a.vocab_size) *maxima = last;
    for (int64_t i = start; i < a.count; i += lanes) {  // what pads the vocabulary too
        bad = fma(load_some(scores + i, a.count - i), zero, bad);
    }
    float sums[4];
    vec four[4] = {bad, zero, zero, zero};
    sum4(four, sums);
    return sums[0] == 0.0f;
}

int64_t likeliest(const Arguments& a, const float* scores, const float* maxima, int64_t chunks) {
    int64_t chunk = std::max_element(maxima, maxima + chunks) - maxima;
    int64_t start = chunk * chunk_scores, end = std::min(start + chunk_scores, a.vocab_size);
    return std::max_element(scores + start, scores + end) - scores;
}

// Ids of scores that are not below `floor`, ascending; how many.
int64_t at_least(const Arguments& a, const float* scores, const float* maxima, int64_t chunks,
                 float floor, int32_t* found) {
    int64_t n = 0;
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        if (maxima[chunk] < floor) continue;
        int64_t end = std::min((chunk + 1) * chunk_scores, a.vocab_size);
        for (int64_t i = chunk * chunk_scores; i < end; i++) {
            found[n] = static_cast<int32_t>(i);
            n += scores[i] >= floor;
        }
    }
    return n;
}

float kth_largest(float* values, int64_t n, int64_t k) {
    std::nth_element(values, values + k - 1, values + n, std::greater<float>());
    return values[k - 1];
}

// The k-th largest score: no chunk whose maximum is below the k-th largest maximum has it.
float bound_of(const Arguments& a, const float* scores, int64_t chunks, int64_t k,
               const Place& place) {
    float floor = -largest_score;
    if (k <= chunks) {
        std::copy(place.maxima, place.maxima + chunks, place.copy);
        floor = kth_largest(place.copy, chunks, k);
    }
    int64_t n = at_least(a, scores, place.maxima, chunks, floor, place.found);
    for (int64_t i = 0; i < n; i++) place.weights[i] = scores[place.found[i]];
    return kth_largest(place.weights, n, k);
}

// Ids and scores of what top-k leaves, all of them where it is off; how many.
int64_t candidates(const Arguments& a, const float* scores, int64_t chunks, float largest,
                   const Rules& rules, const Place& place) {
    if (rules.top_k <= 0 || rules.top_k >= a.vocab_size) {
        std::iota(place.found, place.found + a.vocab_size, 0);
        std::copy(scores, scores + a.vocab_size, place.weights);
        return a.vocab_size;
    }
    float bound = bound_of(a, scores, chunks, rules.top_k, place);
    // What temperature makes equal to the bound is as large as it, and lies next to it.
    double margin = std::ldexp(std::fabs(double(bound)) + std::fabs(double(largest)), -20);
    auto floor = static_cast<float>(std::max(bound - margin - 1e-36, -double(largest_score)));
    float lowest = (bound - largest) / rules.temperature;
    int64_t n = at_least(a, scores, place.maxima, chunks, floor, place.found), kept = 0;
    for (int64_t i = 0; i < n; i++) {
        float score = scores[place.found[i]];
        place.found[kept] = place.found[i];
        place.weights[kept] = score;
        kept += (score - largest) / rules.temperature >= lowest;
    }
    return kept;
}

// Scores to weights, the largest 1. None becomes 0, but the least are lost in any sum.
void weigh(float* weights, int64_t n, float largest, float temperature) {
    for (int64_t i = 0; i < n; i += lanes) {
        vec scaled = (load_some(weights + i, n - i) - splat(largest)) / splat(temperature);
        store_some(weights + i, exponential(scaled), n - i);
    }
}

// A candidate as one number: the heaviest first, equal ones as they stand. Weights are not
// negative, so their bits have their order.
uint64_t key_of(float weight, int32_t id) {
    uint32_t bits;
    std::memcpy(&bits, &weight, 4);
    return uint64_t(~bits) << 32 | static_cast<uint32_t>(id);
}

float weight_of(uint64_t key) {
    uint32_t bits = ~static_cast<uint32_t>(key >> 32);
    float weight;
    std::memcpy(&weight, &bits, 4);
    return weight;
}

double sum(const float* weights, int64_t n) {
    double sums[8] = {}, total = 0;
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        QK_UNROLL for (int k = 0; k < 8; k++) sums[k] += weights[i + k];
    }
    for (; i < n; i++) total += weights[i];
    for (double some : sums) total += some;
    return total;
}

// The fewest heaviest that have `top_p` of the sum, heaviest first, as keys; how many. What weighs
// less than (1 - top_p) · sum / n cannot be among them.
int64_t nucleus(int64_t n, double top_p, const Place& place) {
    double total = sum(place.weights, n), before = 0;
    auto floor = static_cast<float>(0.99 * (1 - top_p) * total / static_cast<double>(n));
    int64_t heavy = 0, kept = 0;
    for (int64_t i = 0; i < n; i++) {
        if (place.weights[i] < floor) continue;
        place.keys[heavy++] = key_of(place.weights[i], place.found[i]);
    }
    std::sort(place.keys, place.keys + heavy);
    for (; kept < heavy && (kept == 0 || before < top_p * total); kept++) {
        before += weight_of(place.keys[kept]);
    }
    return kept;
}

// The first id at which the running sum of n keys' weights passes the random number's share of that
// of all that are not below `floor`.
int64_t draw_heaviest(int64_t n, float floor, double number, const Place& place) {
    while (n > 1 && weight_of(place.keys[n - 1]) < floor) n--;
    double total = 0, running = 0;
    for (int64_t i = 0; i < n; i++) total += weight_of(place.keys[i]);
    int64_t at = 0;
    for (; at < n - 1; at++) {
        running += weight_of(place.keys[at]);
        if (running > number * total) break;
    }
    return static_cast<int32_t>(place.keys[at]);
}

// The same in the order of the ids: first over stretches of them, then within one.
int64_t draw(int64_t n, double number, const Place& place) {
    double left = number * sum(place.weights, n);
    int64_t start = 0;
    for (; start + stretch < n; start += stretch) {
        double here = sum(place.weights + start, stretch);
        if (here > left) break;
        left -= here;
    }
    int64_t at = start;
    for (double running = place.weights[at]; running <= left && at + 1 < n;) {
        running += place.weights[++at];
    }
    while (at > 0 && place.weights[at] == 0) at--;  // of what a filter left nothing of
    return place.found[at];
}

int64_t choose(const Arguments& a, int64_t row, const Rules& rules, bool greedy, float* scores,
               const Place& place) {
    if (!find_maxima(a, scores, place.maxima)) return -1;
    int64_t chunks = (a.vocab_size + chunk_scores - 1) / chunk_scores;
    if (greedy) return likeliest(a, scores, place.maxima, chunks);
    float largest = *std::max_element(place.maxima, place.maxima + chunks), floor = rules.min_p;
    int64_t n = candidates(a, scores, chunks, largest, rules, place);
    weigh(place.weights, n, largest, rules.temperature);
    if (rules.top_p < 1) {
        return draw_heaviest(nucleus(n, rules.top_p, place), floor, rules.number, place);
    }
    for (int64_t i = 0; floor > 0 && i < n; i++) {
        if (place.weights[i] < floor) place.weights[i] = 0;
    }
    return draw(n, rules.number, place);
}

int64_t whole_lines(int64_t numbers) { return (numbers + 15) / 16 * 16; }

}  // namespace
}  // namespace qk

// 0, or 1 when rows or ids are not such as there are, or 2 when there is no memory.
QK_EXPORT int qk_sample_tokens(const SampleTokensArguments* a) {
    using namespace qk;
    if (!fits(*a)) return 1;
    auto threads = static_cast<int>(a->threads);
    int64_t chunks = whole_lines(a->vocab_size / chunk_scores + 1);
    int64_t scores = whole_lines(a->vocab_size), ids = whole_lines(most_ids(*a));
    int64_t size = ids + 2 * chunks + 4 * scores;
    float* memory = scratch(static_cast<size_t>(size * threads));
    if (!memory) return 2;
    parallel(a->row_count, threads, [&](int64_t row, int slot) {
        float* own = memory + slot * size;
        float* rest = own + ids + 2 * chunks;
        Place place{own,
                    own + ids,
                    own + ids + chunks,
                    rest,
                    reinterpret_cast<int32_t*>(rest + scores),
                    reinterpret_cast<uint64_t*>(rest + 2 * scores)};
        const double* settings = a->settings + 8 * row;
        Rules rules = rules_of(settings);
        bool greedy = settings[3] == 0 || rules.top_k == 1;
        float* logits = a->logits + a->rows[row] * a->stride;
        bool fine = adjust(*a, row, rules, logits, place.before);
        a->tokens[row] = fine ? choose(*a, row, rules, greedy, logits, place) : -1;
        put_back(*a, row, logits, place.before);
    });
    return 0;
}
