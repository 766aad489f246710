// What this processor and its operating system allow; a library of its own, compiled for the
// plainest machine, because it decides which of the others may be loaded.
#include <cstdint>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/auxv.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#if defined(__x86_64__)

struct Registers {
    uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers ask(uint32_t leaf, uint32_t subleaf) {
    Registers r;
    __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);  // zeros when unknown
    return r;
}

// Which registers the operating system saves when it switches threads.
uint32_t saved_state() {
    uint32_t low = 0, high = 0;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

// The tile registers are large, and Linux gives them to those only who ask.
bool may_use_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
    constexpr long request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
    return false;
#endif
}

std::string find_features() {
    Registers basic = ask(1, 0), extended = ask(7, 0), more = ask(7, 1);
    bool asks_allowed = basic.ecx >> 27 & 1;
    uint32_t saved = asks_allowed ? saved_state() : 0;
    std::string found;
    auto add = [&](const char* name, uint32_t word, int bit) {
        if (word >> bit & 1) found += found.empty() ? name : std::string(" ") + name;
    };
    if ((saved & 0x06) == 0x06) {  // the halves of the 256-bit registers
        add("avx2", extended.ebx, 5);
        add("fma", basic.ecx, 12);
        add("f16c", basic.ecx, 29);
        add("avx_vnni", more.eax, 4);
    }
    if ((saved & 0xe6) == 0xe6) {  // and the masks and all of the 512-bit registers
        add("avx512f", extended.ebx, 16);
        add("avx512dq", extended.ebx, 17);
        add("avx512bw", extended.ebx, 30);
        add("avx512vl", extended.ebx, 31);
        add("avx512_vnni", extended.ecx, 11);
        add("avx512_bf16", more.eax, 5);
    }
    if ((saved & 0x60000) == 0x60000 && (extended.edx >> 24 & 1) && may_use_tiles()) {
        add("amx_tile", extended.edx, 24);
        add("amx_int8", extended.edx, 25);
        add("amx_bf16", extended.edx, 22);
    }
    return found;
}

#else

std::string find_features() {
#if defined(__aarch64__) && defined(__linux__)
    std::string found = "neon";
    if (getauxval(AT_HWCAP) >> 20 & 1) found += " asimddp";  // HWCAP_ASIMDDP: dot products
    return found;
#elif defined(__aarch64__) && defined(__APPLE__)
    return "neon asimddp";  // every one of them has both
#elif defined(__ARM_NEON)
    return "neon";
#else
    return "";
#endif
}

#endif

}  // namespace

// Names with spaces between them.
extern "C" __attribute__((visibility("default"))) const char* qk_features() {
    static const std::string features = find_features();
    return features.c_str();
}
