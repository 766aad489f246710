// Work shared among threads: chunks handed out one after another to whoever is free; and memory.
#pragma once

#include <cstddef>
#include <cstdint>

namespace qk {

using Body = void (*)(void* context, int64_t chunk, int slot);

// Runs body for chunks 0 … chunks - 1 on the caller and at most threads - 1 helpers. `slot` is
// below `threads` and belongs to one thread at a time: it selects scratch memory, never a result.
void run_chunks(int64_t chunks, int threads, Body body, void* context);

template <class Function>
void parallel(int64_t chunks, int threads, Function&& function) {
    run_chunks(
        chunks, threads,
        [](void* context, int64_t chunk, int slot) {
            (*static_cast<Function*>(context))(chunk, slot);
        },
        &function);
}

// At least so many numbers, aligned to a cache line, that the calling thread keeps for its next
// calls; null when there is no memory to be had.
float* scratch(size_t floats);

}  // namespace qk
