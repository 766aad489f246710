// GGML's block types: how 32 neighbouring weights come out of their bytes.
//
// Layouts follow GGUF's published structures. A type gives its `elements` and `bytes` per block
// and `decode(block, part)`: the part-th 32 numbers, in order. All products of a scale and a
// quant are exact in fp32, so each number is rounded at most once and equals the reference.
// Blocks start at any byte address: a row of Q8_0 is a multiple of 34 bytes.
#pragma once

#include "simd.h"

namespace qk {

// What `decode` needs of a block's scales, made once per block; the simple types need nothing.
struct Nothing {};

struct Simple {
    using Levels = Nothing;
    static Levels levels(const uint8_t*) { return {}; }
};

// scale · q + offset.
inline Group affine(bytes32 q, vec scale, vec offset) {
    Group group = widen(q);
    for (vec& v : group.v) v = fma(v, scale, offset);
    return group;
}

// 16 bytes of two quants each.
inline Group affine_nibbles(const uint8_t* p, vec scale, vec offset) {
#if defined(__AVX512F__)
    // All sixteen possible numbers fit one register: one permutation replaces masking,
    // conversion and the multiply-add.
    vec table = fma(_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), scale,
                    offset);
    __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return {{_mm512_permutexvar_ps(index, table),  // looks at the low four bits only
             _mm512_permutexvar_ps(_mm512_srli_epi32(index, 4), table)}};
#else
    return affine(nibbles(p), scale, offset);
#endif
}

struct Q4_0 : Simple {
    static constexpr int elements = 32, bytes = 18;
    static Group decode(const uint8_t* block, int, Nothing) {
        vec scale = two_halves(block).first;
        return affine_nibbles(block + 2, scale, scale * splat(-8));
    }
};

struct Q4_1 : Simple {
    static constexpr int elements = 32, bytes = 20;
    static Group decode(const uint8_t* block, int, Nothing) {
        TwoHalves halves = two_halves(block);
        return affine_nibbles(block + 4, halves.first, halves.second);
    }
};

struct Q5_0 : Simple {
    static constexpr int elements = 32, bytes = 22;
    static Group decode(const uint8_t* block, int, Nothing) {
        vec scale = two_halves(block).first;
        return affine(nibbles(block + 6) | fifth_bits(block + 2), scale, scale * splat(-16));
    }
};

struct Q5_1 : Simple {
    static constexpr int elements = 32, bytes = 24;
    static Group decode(const uint8_t* block, int, Nothing) {
        TwoHalves halves = two_halves(block);
        return affine(nibbles(block + 8) | fifth_bits(block + 4), halves.first, halves.second);
    }
};

struct Q8_0 : Simple {
    static constexpr int elements = 32, bytes = 34;
    static Group decode(const uint8_t* block, int, Nothing) {
        vec scale = two_halves(block).first;
        Group group;
        for (int i = 0; i < 32 / lanes; i++) {
            group.v[i] = widen_signed(block + 2 + i * lanes) * scale;
        }
        return group;
    }
};

// The sixteen levels of both IQ4 types, from -127 to 113, each plus 127.
static constexpr uint8_t levels_of_iq4[16] = {0,   23,  44,  62,  78,  92,  105, 117,
                                              128, 140, 152, 165, 180, 196, 216, 240};

struct IQ4_NL : Simple {
    static constexpr int elements = 32, bytes = 18;
    static Group decode(const uint8_t* block, int, Nothing) {
        vec scale = two_halves(block).first;
        return affine(look_up(nibbles(block + 2), levels_of_iq4), scale, scale * splat(-127));
    }
};

// Blocks of 256: a scale, and perhaps a minimum, for each sixteen or thirty-two numbers.

struct SixteenLevels {
    float scale[16], offset[16];
};

// The part-th 32 numbers, each half of which has its own scale.
inline Group affine(bytes32 q, const SixteenLevels& levels, int part) {
    Group group = widen(q);
    for (int i = 0; i < 32 / lanes; i++) {
        int place = part * 2 + i * lanes / 16;
        group.v[i] = fma(group.v[i], splat(levels.scale[place]), splat(levels.offset[place]));
    }
    return group;
}

struct Q2_K {
    static constexpr int elements = 256, bytes = 84;
    using Levels = SixteenLevels;
    static Levels levels(const uint8_t* block) {
        float scale = half(block + 80), minimum = half(block + 82);
        Levels levels;
        for (int i = 0; i < 16; i++) {
            levels.scale[i] = scale * float(block[i] & 15);
            levels.offset[i] = -minimum * float(block[i] >> 4);
        }
        return levels;
    }
    static Group decode(const uint8_t* block, int part, const Levels& levels) {
        bytes32 q = (load_bytes32(block + 16 + part / 4 * 32) >> (part % 4 * 2)) & 3;
        return affine(q, levels, part);
    }
};

struct Q3_K {
    static constexpr int elements = 256, bytes = 110;
    using Levels = SixteenLevels;
    static Levels levels(const uint8_t* block) {
        float scale = half(block + 108);
        Levels levels;
        for (int i = 0; i < 16; i++) {  // low halves in eight bytes, then two high bits in four
            int low = block[96 + i % 8] >> (i / 8 * 4) & 15;
            int high = block[104 + i % 4] >> (i / 4 * 2) & 3;
            levels.scale[i] = scale * float((low | high << 4) - 32);
            levels.offset[i] = -4 * levels.scale[i];
        }
        return levels;
    }
    static Group decode(const uint8_t* block, int part, const Levels& levels) {
        bytes32 low = (load_bytes32(block + 32 + part / 4 * 32) >> (part % 4 * 2)) & 3;
        bytes32 high = ((load_bytes32(block) >> part) & 1) << 2;  // a clear bit means minus four
        return affine(low | high, levels, part);
    }
};

struct EightLevels {
    float scale[8], offset[8];
};

struct IQ4_XS {
    static constexpr int elements = 256, bytes = 136;
    using Levels = EightLevels;
    static Levels levels(const uint8_t* block) {
        float scale = half(block);
        uint16_t high;
        std::memcpy(&high, block + 2, 2);
        Levels levels;
        for (int i = 0; i < 8; i++) {  // low halves in four bytes, two high bits in two
            int low = block[4 + i / 2] >> (i % 2 * 4) & 15;
            levels.scale[i] = scale * float((low | (high >> (2 * i) & 3) << 4) - 32);
            levels.offset[i] = levels.scale[i] * -127;
        }
        return levels;
    }
    static Group decode(const uint8_t* block, int part, const Levels& levels) {
        bytes32 q = look_up(nibbles(block + 8 + part * 16), levels_of_iq4);
        return affine(q, splat(levels.scale[part]), splat(levels.offset[part]));
    }
};

// Q4_K and Q5_K: eight scales and eight minimums of 6 bits in 12 bytes after two fp16 numbers.
inline EightLevels eight_levels(const uint8_t* block) {
    uint32_t packed[3], sixes[4];
    std::memcpy(packed, block + 4, 12);
    sixes[0] = packed[0] & 0x3f3f3f3f;
    sixes[1] = (packed[2] & 0x0f0f0f0f) | ((packed[0] >> 2) & 0x30303030);
    sixes[2] = packed[1] & 0x3f3f3f3f;
    sixes[3] = ((packed[2] >> 4) & 0x0f0f0f0f) | ((packed[1] >> 2) & 0x30303030);
    uint8_t plain[16];
    std::memcpy(plain, sixes, 16);
    TwoHalves halves = two_halves(block);
    EightLevels levels;
    if constexpr (lanes > 8) {
        float both[16];
        store(both, widen_unsigned(plain));
        float scale = half(block), minimum = -half(block + 2);
        for (int i = 0; i < 8; i++) {
            levels.scale[i] = scale * both[i];
            levels.offset[i] = minimum * both[i + 8];
        }
    } else {
        for (int i = 0; i < 8; i += lanes) {
            store(levels.scale + i, widen_unsigned(plain + i) * halves.first);
            store(levels.offset + i, widen_unsigned(plain + 8 + i) * halves.second * splat(-1));
        }
    }
    return levels;
}

struct Q4_K {
    static constexpr int elements = 256, bytes = 144;
    using Levels = EightLevels;
    static Levels levels(const uint8_t* block) { return eight_levels(block); }
    static Group decode(const uint8_t* block, int part, const Levels& levels) {
        bytes32 q = (load_bytes32(block + 16 + part / 2 * 32) >> (part % 2 * 4)) & 15;
        return affine(q, splat(levels.scale[part]), splat(levels.offset[part]));
    }
};

struct Q5_K {
    static constexpr int elements = 256, bytes = 176;
    using Levels = EightLevels;
    static Levels levels(const uint8_t* block) { return eight_levels(block); }
    static Group decode(const uint8_t* block, int part, const Levels& levels) {
        bytes32 q = (load_bytes32(block + 48 + part / 2 * 32) >> (part % 2 * 4)) & 15;
        q |= ((load_bytes32(block + 16) >> part) & 1) << 4;
        return affine(q, splat(levels.scale[part]), splat(levels.offset[part]));
    }
};

struct Q6_K {
    static constexpr int elements = 256, bytes = 210;
    using Levels = SixteenLevels;
    static Levels levels(const uint8_t* block) {
        vec scale = splat(half(block + 208));
        Levels levels;
        for (int i = 0; i < 16; i += lanes) {
            vec scales = widen_signed(block + 192 + i) * scale;
            store(levels.scale + i, scales);
            store(levels.offset + i, scales * splat(-32));
        }
        return levels;
    }
    static Group decode(const uint8_t* block, int part, const Levels& levels) {
        int side = part / 4, place = part % 4;  // halves of 128, quarters of those
        bytes32 q = (load_bytes32(block + side * 64 + place % 2 * 32) >> (place / 2 * 4)) & 15;
        q |= ((load_bytes32(block + 128 + side * 32) >> (place * 2)) & 3) << 4;
        return affine(q, levels, part);
    }
};

// Calls visit(Type{}) for the type of a GGUF type number; false where there is none.
template <class Visit>
bool with_block_type(int number, Visit&& visit) {
    switch (number) {
        case 2: visit(Q4_0{}); return true;
        case 3: visit(Q4_1{}); return true;
        case 6: visit(Q5_0{}); return true;
        case 7: visit(Q5_1{}); return true;
        case 8: visit(Q8_0{}); return true;
        case 10: visit(Q2_K{}); return true;
        case 11: visit(Q3_K{}); return true;
        case 12: visit(Q4_K{}); return true;
        case 13: visit(Q5_K{}); return true;
        case 14: visit(Q6_K{}); return true;
        case 20: visit(IQ4_NL{}); return true;
        case 23: visit(IQ4_XS{}); return true;
        default: return false;
    }
}

}  // namespace qk
