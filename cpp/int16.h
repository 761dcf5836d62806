// Int16, 32 to a register of AVX-512 (BW, VBMI, VBMI2, VNNI), from codes: two elements whose products are to be
// added up lie in one lane of 32 bits. These are the two channels of a pair of keys, or two tokens of values.

#pragma once

#include <immintrin.h>

#include <array>
#include <cstring>

#include "each.h"
#include "int16_worker.h"

namespace narrowkv {
namespace {

inline __m512i load_int16(const int16_t* p) { return _mm512_loadu_si512(p); }
inline void store_int16(int16_t* p, __m512i x) { _mm512_storeu_si512(p, x); }

// The order of 32 tokens, or channels, in a register: even ones, then odd ones, since codes of neighbors share a word of
// packed bytes.
inline constexpr int element_at(int lane) { return 2 * (lane % 16) + lane / 16; }
inline constexpr int lane_index(int element) { return (element & ~31) + element % 32 / 2 + element % 2 * 16; }

using Shifts = std::array<int16_t, 32>;

// Words rotated right, each by this many bits, or left, where that is negative; which bits come from the other end does not
// matter.
template <const Shifts& shifts>
inline __m512i shift_lanes(__m512i int16) {
    constexpr auto all = [](auto holds) {
        for (int shift : shifts) {
            if (!holds(shift)) return false;
        }
        return true;
    };
    constexpr bool alike = all([](int shift) { return shift == shifts[0]; }), right = all([](int shift) { return shift >= 0; });
    if constexpr (alike && right) return shifts[0] ? _mm512_srli_epi16(int16, shifts[0]) : int16;
    const __m512i amounts = _mm512_loadu_si512(shifts.data());
    return right ? _mm512_srlv_epi16(int16, amounts) : _mm512_shrdv_epi16(int16, int16, amounts);  // of amounts four bits count
}

// Of a row of 64 codes, the bits of one plane of 32 of them, moved to bit `to` of a word each; other bits are whatever.
template <int width, int half, int to>
struct RowPlane {
    static constexpr int bytes = 8 * width;
    static constexpr Shifts shifts = [] {
        Shifts found{};
        for (int i = 0; i < 32; ++i) {
            const int code = 32 * half + element_at(i);
            found[i] = int16_t(width * (code / bytes) + code % 2 * 8 - to);
        }
        return found;
    }();
    static __m512i read(const uint8_t* row) {
        const auto int16 = [&] {
            if constexpr (bytes == 8) {
                int64_t word;
                std::memcpy(&word, row, 8);
                return _mm512_set1_epi64(word);
            } else if constexpr (bytes == 16) {
                return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)row));
            } else {
                return _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)(row + (bytes == 64 ? 32 * half : 0))));
            }
        };
        return shift_lanes<shifts>(int16());
    }
};

// Of two rows of this many codes, the bits of one plane of 16 of them, every other one from `from` on, in lanes of two words.
template <int width, int codes, int from, int to>
struct LanePlane {
    static constexpr int bytes = codes * width / 8, loaded = bytes < 32 ? bytes : 32;
    static constexpr Shifts shifts = [] {
        Shifts found{};
        for (int i = 0; i < 32; ++i) {
            const int code = from + i / 2 * 2;
            found[i] = int16_t(width * (code / bytes) + code % 2 * 8 - to);
        }
        return found;
    }();
    static constexpr std::array<int16_t, 32> order = [] {  // words of the first row, then of the second
        std::array<int16_t, 32> found{};
        for (int i = 0; i < 32; ++i) found[i] = int16_t((from + i / 2 * 2) % loaded / 2 + i % 2 * loaded / 2);
        return found;
    }();
    static __m512i read(const uint8_t* a, const uint8_t* b) {
        constexpr int at = from % bytes / loaded * loaded;
        const auto both = [&] {
            if constexpr (loaded == 8) {
                return _mm512_castsi128_si512(_mm_unpacklo_epi64(_mm_loadl_epi64((const __m128i*)a), _mm_loadl_epi64((const __m128i*)b)));
            } else if constexpr (loaded == 16) {
                const __m256i first = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)a));
                return _mm512_castsi256_si512(_mm256_inserti128_si256(first, _mm_loadu_si128((const __m128i*)b), 1));
            } else {
                const __m512i first = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)(a + at)));
                return _mm512_inserti64x4(first, _mm256_loadu_si256((const __m256i*)(b + at)), 1);
            }
        };
        return shift_lanes<shifts>(_mm512_permutexvar_epi16(_mm512_loadu_si512(order.data()), both()));
    }
};

// Codes from the bits of their planes; plane: a template of the plane's width, number and first bit. Bits above are whatever.
template <int bits, typename Plane>
inline __m512i join_planes(const Plane& plane) {
    constexpr int first = kPlanes[bits][0], second = kPlanes[bits][1];
    using std::integral_constant;
    __m512i found = plane(integral_constant<int, first>(), integral_constant<int, 0>(), integral_constant<int, 0>());
    if constexpr (second > 0) {
        const __m512i more = plane(integral_constant<int, second>(), integral_constant<int, 1>(), integral_constant<int, first>());
        found = _mm512_ternarylogic_epi64(_mm512_set1_epi16((1 << first) - 1), found, more, 0xca);
    }
    return found;
}

constexpr int kLevels = 16;  // of a codebook of words, whose levels are repeated to make as many

// Words of codes; bits above those of a code do not matter.
inline __m512i look_up_int16(__m512i codes, const uint8_t* table) {
    return _mm512_permutexvar_epi16(codes, _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)table)));
}

constexpr int kSteps = 8;  // of the prefetcher, taken together where registers would have to be put by

// Elements, rounded, as the two words of a lane.
inline __m512i to_lanes(__m512 first, __m512 second) {
    const __m512i x = _mm512_cvtps_epi32(first), y = _mm512_slli_epi32(_mm512_cvtps_epi32(second), 16);
    return _mm512_mask_blend_epi16(0xaaaaaaaa, x, y);
}

// Four registers of four parts each: parts and registers are transposed.
inline void swap_parts(__m512i* x) {
    const __m512i a = _mm512_shuffle_i32x4(x[0], x[1], 0x44), b = _mm512_shuffle_i32x4(x[2], x[3], 0x44);
    const __m512i c = _mm512_shuffle_i32x4(x[0], x[1], 0xee), d = _mm512_shuffle_i32x4(x[2], x[3], 0xee);
    x[0] = _mm512_shuffle_i32x4(a, b, 0x88), x[1] = _mm512_shuffle_i32x4(a, b, 0xdd);
    x[2] = _mm512_shuffle_i32x4(c, d, 0x88), x[3] = _mm512_shuffle_i32x4(c, d, 0xdd);
}

// The same for the four lanes of each part.
inline void swap_lanes(__m512i* x) {
    const __m512i a = _mm512_unpacklo_epi32(x[0], x[1]), b = _mm512_unpackhi_epi32(x[0], x[1]);
    const __m512i c = _mm512_unpacklo_epi32(x[2], x[3]), d = _mm512_unpackhi_epi32(x[2], x[3]);
    x[0] = _mm512_unpacklo_epi64(a, c), x[1] = _mm512_unpackhi_epi64(a, c);
    x[2] = _mm512_unpacklo_epi64(b, d), x[3] = _mm512_unpackhi_epi64(b, d);
}

}  // namespace
}  // namespace narrowkv
