// One pool for the process. Where torch has loaded an OpenMP runtime its threads are borrowed
// through GOMP_parallel: a second pool would fight with torch's, whose threads keep spinning for
// milliseconds after each of its own parallel loops. Elsewhere a small pool of our own is used.
#include "threads.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

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

void take_part(void* pointer) {
    Job& job = *static_cast<Job*>(pointer);
    int slot = job.joined.fetch_add(1);
    if (slot >= job.threads) return;
    for (;;) {
        int64_t chunk = job.next.fetch_add(1, std::memory_order_relaxed);
        if (chunk >= job.chunks) return;
        job.body(job.context, chunk, slot);
    }
}

void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
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
        take_part(&job);
        job_.store(nullptr);
        while (inside_.load() != 0) pause();  // those who saw the job before it was withdrawn
        return true;
    }

  private:
    void grow(int helpers) {
        try {
            for (; helpers_ < helpers; helpers_++) std::thread([this] { help(); }).detach();
        } catch (const std::system_error&) {
            // No more threads to be had: those that exist, or the caller alone, do the work.
        }
    }

    void help() {
        for (uint64_t seen = 0;;) {
            for (int spins = 0; spins < 2000 && generation_.load() == seen; spins++) pause();
            if (generation_.load() == seen) {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return generation_.load() != seen; });
            }
            seen = generation_.load();
            inside_.fetch_add(1);
            if (Job* job = job_.load()) take_part(job);
            inside_.fetch_sub(1);
        }
    }

    std::mutex turn_, mutex_;
    std::condition_variable wake_;
    std::atomic<uint64_t> generation_{0};
    std::atomic<Job*> job_{nullptr};
    std::atomic<int> inside_{0};
    int helpers_ = 0;
};

using OpenMP = void (*)(void (*)(void*), void*, unsigned, unsigned);

OpenMP find_openmp() {
    return reinterpret_cast<OpenMP>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
}

std::atomic<bool> forked{false};
const int fork_watch = pthread_atfork(nullptr, nullptr, [] { forked = true; });

}  // namespace

void run_chunks(int64_t chunks, int threads, Body body, void* context) {
    Job job{chunks, threads, body, context};
    // A forked child inherits no threads, and OpenMP would wait for them for ever.
    if (threads > 1 && chunks > 1 && !forked.load(std::memory_order_relaxed)) {
        static const OpenMP openmp = find_openmp();
        if (openmp) {
            openmp(take_part, &job, static_cast<unsigned>(threads), 0);
            return;
        }
        static Pool& pool = *new Pool;  // never destroyed: its threads live as long as the process
        if (pool.run(job)) return;
    }
    take_part(&job);
}

}  // namespace qk

// Whose threads are used: 1 torch's, 0 our own.
extern "C" __attribute__((visibility("default"))) int qk_shares_openmp() {
    return qk::find_openmp() != nullptr;
}
