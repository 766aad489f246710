// One small pool for the process, made so that a caller never depends on it.
//
// Helpers join a job while there is work left and the caller waits only for those that did. On a
// busy machine, where a helper may not run for milliseconds, the caller does its work itself
// meanwhile; a team that must be complete (OpenMP) was measured 40 times slower there. Between
// jobs helpers stay awake for as long as a model may pause between two large ops, then sleep.
#include "threads.h"

#include <pthread.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace qk {
namespace {

struct Job {
    int64_t chunks;
    int threads;
    Body body;
    void* context;
    std::atomic<int64_t> next{0};
    std::atomic<int> joined{0};
};

void take_part(Job& job) {
    int slot = job.joined.fetch_add(1);
    if (slot >= job.threads) return;
    for (;;) {
        int64_t chunk = job.next.fetch_add(1, std::memory_order_relaxed);
        if (chunk >= job.chunks) return;
        job.body(job.context, chunk, slot);
    }
}

constexpr std::chrono::microseconds awake{200};

void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Bind a thread to one processor, or with less than 0 to any of `all`. False when that cannot be.
bool bind([[maybe_unused]] pthread_t thread, [[maybe_unused]] int64_t processor,
          [[maybe_unused]] const std::vector<int64_t>& all) {
#if defined(__linux__)
    cpu_set_t set;
    CPU_ZERO(&set);
    auto add = [&](int64_t number) {
        if (number >= 0 && number < CPU_SETSIZE) CPU_SET(number, &set);
    };
    add(processor);
    if (processor < 0) std::for_each(all.begin(), all.end(), add);
    return pthread_setaffinity_np(thread, sizeof set, &set) == 0;
#else
    return false;
#endif
}

class Pool {
  public:
    // False when another thread is using the pool: the caller then works alone, so that there
    // are never more threads at work than the pool has.
    bool run(Job& job) {
        std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
        if (!turn.owns_lock()) return false;
        grow(job.threads - 1);
        job_.store(&job);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            generation_.fetch_add(1);
        }
        wake_.notify_all();
        take_part(job);
        job_.store(nullptr);
        // Those who saw the job before it was withdrawn finish the chunk that they are at.
        for (int spins = 0; inside_.load() != 0; spins++) {
            if (spins < 1000) {
                pause();
            } else {
                std::this_thread::yield();  // a helper may be waiting for this very core
            }
        }
        return true;
    }

    // Helper i works on processor i of these from now on, each on any of them unless `one_each`.
    bool place(std::vector<int64_t> processors, bool one_each) {
        std::lock_guard<std::mutex> turn(turn_);
        processors_ = std::move(processors);
        one_each_ = one_each;
        bool placed = true;
        for (size_t i = 0; i < helpers_.size(); i++) placed &= place_helper(i);
        return placed;
    }

  private:
    void grow(int helpers) {
        try {
            while (static_cast<int>(helpers_.size()) < helpers) {
                helpers_.reserve(helpers_.size() + 1);  // what may fail goes first
                std::thread helper([this] { help(); });
                helpers_.push_back(helper.native_handle());
                helper.detach();
                if (!processors_.empty()) place_helper(helpers_.size() - 1);
            }
        } catch (const std::exception&) {
            // No more threads to be had: those that exist, or the caller alone, do the work.
        }
    }

    bool place_helper(size_t i) {
        return bind(helpers_[i], one_each_ ? processors_[i % processors_.size()] : -1, processors_);
    }

    void help() {
        for (uint64_t seen = 0;;) {
            if (!called_while_awake(seen)) {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return generation_.load() != seen; });
            }
            seen = generation_.load();
            inside_.fetch_add(1);
            if (Job* job = job_.load()) take_part(*job);
            inside_.fetch_sub(1);
        }
    }

    bool called_while_awake(uint64_t seen) const {
        auto bedtime = std::chrono::steady_clock::now() + awake;
        do {  // how long a pause takes differs tenfold among processors: the clock decides
            for (int i = 0; i < 64; i++) {
                if (generation_.load() != seen) return true;
                pause();
            }
        } while (std::chrono::steady_clock::now() < bedtime);
        return false;
    }

    std::mutex turn_, mutex_;
    std::condition_variable wake_;
    std::atomic<uint64_t> generation_{0};
    std::atomic<Job*> job_{nullptr};
    std::atomic<int> inside_{0};
    std::vector<pthread_t> helpers_;  // they live as long as the process
    std::vector<int64_t> processors_;
    bool one_each_ = false;
};

Pool& the_pool() {
    static Pool& pool = *new Pool;  // never destroyed: its threads live as long as the process
    return pool;
}

std::atomic<bool> forked{false};
[[maybe_unused]] const int fork_watch = pthread_atfork(nullptr, nullptr, [] { forked = true; });

}  // namespace

void run_chunks(int64_t chunks, int threads, Body body, void* context) {
    Job job{chunks, threads, body, context};
    // A forked child inherits the pool's state but none of its threads.
    if (threads > 1 && chunks > 1 && !forked.load(std::memory_order_relaxed)) {
        if (the_pool().run(job)) return;
    }
    take_part(job);
}

float* scratch(size_t floats) {
    struct Free {
        void operator()(float* memory) const { std::free(memory); }
    };
    thread_local std::unique_ptr<float, Free> kept;
    thread_local size_t size = 0;
    if (size < floats) {
        // Rows of many tokens, far apart: in small pages, looking these up takes a third of the time.
        constexpr size_t huge_page = 2 << 20;
        bool large = floats * sizeof(float) > huge_page;
        size_t bytes = (floats * sizeof(float) + 63) / 64 * 64;
        if (large) bytes = (bytes + huge_page - 1) / huge_page * huge_page;
        void* memory = nullptr;
        kept.reset();
        size = posix_memalign(&memory, large ? huge_page : 64, bytes) == 0 ? bytes / sizeof(float) : 0;
        kept.reset(size ? static_cast<float*>(memory) : nullptr);
#if defined(__linux__)
        if (size && large) madvise(memory, bytes, MADV_HUGEPAGE);  // where refused, they stay small
#endif
    }
    return kept.get();
}

}  // namespace qk

struct PlaceThreads {
    const int64_t* processors;
    int64_t count, one_each;
};

// 0, or 1 when the system does not let them be placed so.
extern "C" __attribute__((visibility("default"))) int qk_place_threads(const PlaceThreads* a) {
    if (qk::forked.load()) return 1;
    std::vector<int64_t> processors(a->processors, a->processors + a->count);
    return qk::the_pool().place(std::move(processors), a->one_each != 0) ? 0 : 1;
}
