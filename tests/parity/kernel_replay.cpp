// Repeats recorded kernel calls and compares what they leave in memory: `replay CASES FACTOR`.
//
// Linked with the kernels, without Python or torch, so that they can be run where neither is: on
// another processor under an emulator, or under a sanitizer, which then sees nothing else. Every
// buffer is an allocation of its own, without a byte to spare. FACTOR times each case's tolerance
// is allowed, relative to the largest number of the buffer; 0 wants the same bits. A third
// argument "short" cuts the end off every buffer, for a sanitizer to notice.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <string>
#include <vector>

namespace {

enum Kind : uint8_t { exact_bytes, float32, bfloat16, float16, int8 };

struct Reader {
    FILE* file;
    void bytes(void* to, size_t count) {
        if (count && fread(to, 1, count, file) != count) {
            fprintf(stderr, "the file of cases ends too early\n");
            exit(2);
        }
    }
    template <class T>
    T number() {
        T value;
        bytes(&value, sizeof value);
        return value;
    }
    std::string text() {
        std::string value(number<uint32_t>(), ' ');
        bytes(value.data(), value.size());
        return value;
    }
};

struct Buffer {
    size_t size;
    Kind kind;
    bool checked;
    uint8_t* memory;
    std::vector<uint8_t> want;
};

double half(uint16_t bits) {
    int exponent = bits >> 10 & 31, fraction = bits & 1023;
    double value = exponent == 0    ? std::ldexp(fraction, -24)
                   : exponent == 31 ? (fraction ? NAN : INFINITY)
                                    : std::ldexp(1024 + fraction, exponent - 25);
    return bits >> 15 ? -value : value;
}

size_t width(Kind kind) { return kind == float32 ? 4 : kind == bfloat16 || kind == float16 ? 2 : 1; }

double at(const uint8_t* p, Kind kind) {
    uint16_t narrow;
    uint32_t wide;
    float value;
    if (kind == int8) return static_cast<int8_t>(*p);
    if (kind == exact_bytes) return *p;
    if (kind == float32) {
        memcpy(&value, p, 4);
        return value;
    }
    memcpy(&narrow, p, 2);
    if (kind == float16) return half(narrow);
    wide = static_cast<uint32_t>(narrow) << 16;
    memcpy(&value, &wide, 4);
    return value;
}

// The largest difference in numbers, relative to what is allowed; above 1 is wrong.
double compare(const Buffer& buffer, size_t size, double tolerance) {
    if (size == 0 || memcmp(buffer.memory, buffer.want.data(), size) == 0) return 0;
    if (tolerance == 0 || buffer.kind == exact_bytes) return INFINITY;
    double largest = 0, worst = 0;
    size_t step = width(buffer.kind);
    for (size_t i = 0; i + step <= size; i += step) {
        double want = std::fabs(at(&buffer.want[i], buffer.kind));
        if (std::isfinite(want) && want > largest) largest = want;
    }
    double allowed = buffer.kind == int8 ? 1 : tolerance * largest;
    for (size_t i = 0; i + step <= size; i += step) {
        double want = at(&buffer.want[i], buffer.kind), got = at(buffer.memory + i, buffer.kind);
        if (want == got || (std::isnan(want) && std::isnan(got))) continue;
        double difference = std::fabs(want - got) / allowed;
        worst = difference <= worst ? worst : std::isnan(difference) ? INFINITY : difference;
    }
    return worst;
}

int call(Reader& in, std::vector<Buffer>& buffers, const std::string& label) {
    std::string name = in.text(), arguments = in.text();
    int wanted_status = in.number<int32_t>();
    auto pointers = in.number<uint32_t>();
    for (uint32_t i = 0; i < pointers; i++) {
        auto field = in.number<uint32_t>();
        auto index = in.number<int32_t>();
        auto offset = in.number<uint64_t>();
        uint8_t* address = index < 0 ? nullptr : buffers.at(index).memory + offset;
        memcpy(&arguments.at(field), &address, sizeof address);
    }
    auto kernel = reinterpret_cast<int (*)(const void*)>(dlsym(RTLD_DEFAULT, name.c_str()));
    if (!kernel) {
        fprintf(stderr, "%s: there is no kernel %s\n", label.c_str(), name.c_str());
        return 1;
    }
    // Aligned as a struct is, and no longer than it.
    auto* given = static_cast<char*>(malloc(arguments.size()));
    memcpy(given, arguments.data(), arguments.size());
    int status = kernel(given);
    free(given);
    if (status == wanted_status) return 0;
    fprintf(stderr, "%s: %s returned %d, not %d\n", label.c_str(), name.c_str(), status,
            wanted_status);
    return 1;
}

}  // namespace

int main(int count, char** words) {
    Reader in{count < 3 ? nullptr : fopen(words[1], "rb")};
    if (!in.file) return fprintf(stderr, "replay CASES FACTOR [short]\n"), 2;
    double factor = atof(words[2]);
    size_t cut = count > 3 && std::string(words[3]) == "short" ? 4 : 0;
    if (auto features = reinterpret_cast<const char* (*)()>(dlsym(RTLD_DEFAULT, "qk_features"))) {
        printf("features: %s\n", features());
    }
    long cases = in.number<uint32_t>(), calls = 0, compared = 0, wrong = 0;
    for (long n = 0; n < cases; n++) {
        std::string label = in.text();
        double tolerance = in.number<double>();
        std::vector<Buffer> buffers(in.number<uint32_t>());
        for (Buffer& b : buffers) {
            b.size = in.number<uint64_t>();
            b.kind = in.number<Kind>();
            b.memory = static_cast<uint8_t*>(malloc(b.size > cut ? b.size - cut : b.size));
            std::vector<uint8_t> first(b.size);
            in.bytes(first.data(), b.size);
            if (b.size) memcpy(b.memory, first.data(), b.size > cut ? b.size - cut : b.size);
            b.checked = in.number<uint8_t>();
            b.want.resize(b.checked ? b.size : 0);
            in.bytes(b.want.data(), b.want.size());
        }
        auto of_case = in.number<uint32_t>();
        for (uint32_t i = 0; i < of_case; i++, calls++) wrong += call(in, buffers, label);
        for (size_t i = 0; i < buffers.size(); i++) {
            Buffer& b = buffers[i];
            if (b.checked) {
                double worst = compare(b, b.size, factor * tolerance);
                compared++;
                if (worst > 1 && ++wrong < 20) {
                    fprintf(stderr, "%s: buffer %zu differs, %.3g times what is allowed\n",
                            label.c_str(), i, worst);
                }
            }
            free(b.memory);
        }
    }
    fclose(in.file);
    printf("%ld cases, %ld calls, %ld buffers compared, %ld wrong\n", cases, calls, compared, wrong);
    return wrong != 0;
}
