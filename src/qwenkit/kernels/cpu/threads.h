// Work shared among threads: chunks handed out one after another to whoever is free.
#pragma once

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

}  // namespace qk
