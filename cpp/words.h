// Whole numbers of 16 bits, 32 to a register of AVX-512 (BW, VBMI, VNNI), from codes: two numbers whose products are to be added
// up lie in one lane of 32 bits. These are the two channels of a pair of keys, or two tokens of values.

#pragma once

#include <immintrin.h>

#include <array>
#include <cstring>
#include <utility>

#include "decode.h"

namespace narrowkv {
namespace {

inline __m512i load_words(const int16_t* p) { return _mm512_loadu_si512(p); }
inline void store_words(int16_t* p, __m512i x) { _mm512_storeu_si512(p, x); }

// Bytes of two rows: lane l has the l-th of each in the low byte of a word. Of rows of 8 bytes, these come twice, as high bytes.
inline __m512i lanes_of(const uint8_t* a, const uint8_t* b) {
    alignas(64) static constexpr auto order = [] {
        std::array<int8_t, 64> found{};
        for (int i = 0; i < 64; ++i) found[i] = int8_t(i / 4 + (i % 4 >= 2 ? 16 : 0));
        return found;
    }();
    const __m256i both = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)a)), _mm_loadu_si128((const __m128i*)b), 1);
    return _mm512_permutexvar_epi8(_mm512_load_si512(order.data()), _mm512_castsi256_si512(both));
}

inline __m512i lanes_of_eight(const uint8_t* a, const uint8_t* b) {
    alignas(64) static constexpr auto order = [] {
        std::array<int8_t, 64> found{};
        for (int i = 0; i < 64; ++i) found[i] = int8_t(i / 4 % 8 + (i % 4 >= 2 ? 8 : 0));
        return found;
    }();
    const __m128i both = _mm_unpacklo_epi64(_mm_loadl_epi64((const __m128i*)a), _mm_loadl_epi64((const __m128i*)b));
    return _mm512_permutexvar_epi8(_mm512_load_si512(order.data()), _mm512_castsi128_si512(both));
}

// Of codes 16 * at to 16 * at + 15 of two rows, the bits of one plane, moved to bit `to` of a word each; others are whatever.
template <int width, int codes, int at, int to>
inline __m512i plane_at(const uint8_t* a, const uint8_t* b) {
    constexpr int bytes = codes * width / 8, from = 16 * at, shift = width * (from / bytes) - to;
    if constexpr (bytes >= 16) {
        const __m512i lanes = lanes_of(a + from % bytes, b + from % bytes);
        return shift > 0 ? _mm512_srli_epi16(lanes, shift) : shift < 0 ? _mm512_slli_epi16(lanes, -shift) : lanes;
    } else {
        const __m512i more = _mm512_inserti64x4(_mm512_set1_epi16(8 + shift), _mm256_set1_epi16(8 + shift + width), 1);
        return _mm512_srlv_epi16(lanes_of_eight(a, b), more);
    }
}

template <int bits, int codes, int at>
inline __m512i codes_at(const uint8_t* const* a, const uint8_t* const* b) {
    constexpr int first = kPlanes[bits][0], second = kPlanes[bits][1], third = kPlanes[bits][2];
    __m512i found = plane_at<first, codes, at, 0>(a[0], b[0]);
    if constexpr (second > 0) {
        const __m512i low = _mm512_set1_epi16((1 << first) - 1);
        found = _mm512_ternarylogic_epi64(low, found, plane_at<second, codes, at, first>(a[1], b[1]), 0xca);
    }
    if constexpr (third > 0) {
        const __m512i low = _mm512_set1_epi16((1 << (first + second)) - 1);
        found = _mm512_ternarylogic_epi64(low, found, plane_at<third, codes, at, first + second>(a[2], b[2]), 0xca);
    }
    return found;
}

// All codes of two rows, 16 of each to a register.
template <int bits, int codes, int... at>
inline void read_codes(const uint8_t* const* a, const uint8_t* const* b, __m512i* found, std::integer_sequence<int, at...>) {
    ((found[at] = codes_at<bits, codes, at>(a, b)), ...);
}

template <int bits, int codes>
inline void read_codes(const uint8_t* const* a, const uint8_t* const* b, __m512i* found) {
    read_codes<bits, codes>(a, b, found, std::make_integer_sequence<int, codes / 16>());
}

// Two codebooks of up to 16 levels, for the first and for the second word of a lane.
inline __m512i two_tables(const uint8_t* first, const uint8_t* second) {
    const __m512i low = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)first));
    return _mm512_inserti64x4(low, _mm256_loadu_si256((const __m256i*)second), 1);
}

// A codebook of pairs, a lane for each point; 16 levels at least.
template <int levels>
inline __m512i look_up_pairs(__m512i codes, const uint8_t* table) {
    const auto part = [&](int i) { return _mm512_loadu_si512(table + 64 * i); };
    if constexpr (levels == 16) {
        return _mm512_permutexvar_epi32(codes, part(0));
    } else if constexpr (levels == 32) {
        return _mm512_permutex2var_epi32(part(0), codes, part(1));
    } else {
        constexpr int half = levels / 2, shift = levels == 64 ? 26 : levels == 128 ? 25 : 24;  // its highest bit becomes the sign
        const __m512i low = look_up_pairs<half>(codes, table), high = look_up_pairs<half>(codes, table + 4 * half);
        return _mm512_mask_blend_epi32(_mm512_movepi32_mask(_mm512_slli_epi32(codes, shift)), low, high);
    }
}

// Memory that will be read next, asked for little by little: a burst would wait for the few lines that can be on their way.
class Ahead {
  public:
    void add(const Side& side, const Block& block, int head, int steps) {
        const int numbers = side.codes * kBlock;
        for (int plane = 0; plane < 3 && kPlanes[side.bits][plane]; ++plane) {
            const int bytes = numbers * kPlanes[side.bits][plane] / 8;
            parts[count++] = {block.planes[plane] + int64_t(head) * bytes, ((bytes + 63) / 64 << 16) / steps};
        }
    }
    void ask(int step) const {
        for (int i = 0; i < count; ++i) {
            const int last = parts[i].rate * (step + 1) >> 16;
            for (int line = parts[i].rate * step >> 16; line < last; ++line) __builtin_prefetch(parts[i].from + 64 * line, 0, 2);
        }
    }

  private:
    struct Part {
        const uint8_t* from;
        int rate;  // lines a step, times 65536
    };
    Part parts[6];
    int count = 0;
};

constexpr int kept_levels(int bits) { return bits <= 4 ? 16 : 1 << bits; }

// Numbers, rounded, as the two words of a lane.
inline __m512i to_lanes(__m512 first, __m512 second) {
    const __m512i x = _mm512_cvtps_epi32(first), y = _mm512_slli_epi32(_mm512_cvtps_epi32(second), 16);
    return _mm512_mask_blend_epi16(0xaaaaaaaa, x, y);
}

}  // namespace
}  // namespace narrowkv
