// Eight elements at once, on processors with AVX2 and FMA.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace narrowkv {
namespace {
namespace simd {

constexpr int width = 8;
typedef float Floats __attribute__((vector_size(32)));
typedef int32_t Ints __attribute__((vector_size(32)));
typedef uint64_t Bytes __attribute__((vector_size(32)));

inline Floats load(const float* p) { return Floats(_mm256_loadu_ps(p)); }
inline void store(float* p, Floats x) { _mm256_storeu_ps(p, __m256(x)); }
inline Floats load_halves(const uint16_t* p) { return Floats(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))); }
inline Ints widen(const uint8_t* codes) { return Ints(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)codes))); }
inline Floats gather(const float* points, Ints codes) { return Floats(_mm256_i32gather_ps(points, __m256i(codes), 4)); }

// A byte of each of some tokens, and two of them taken together.
typedef uint8_t Lanes __attribute__((vector_size(32)));
typedef uint16_t Words __attribute__((vector_size(32)));

inline Lanes repeated(const int8_t* table) { return Lanes(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)table))); }
inline Lanes pick(Lanes table, Lanes index) { return Lanes(_mm256_shuffle_epi8(__m256i(table), __m256i(index))); }
inline Floats to_floats(const int8_t* p) {
    return Floats(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))));
}

#include "gathered.h"

// A codebook of 16 levels as four registers, each with one byte of all levels: a look-up takes the four bytes of 32 elements
// at once and weaves them together.
struct Woven {
    __m256i bytes[4];

    explicit Woven(const float* table) {
        for (auto& part : bytes) part = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)table)), table += 4;
    }
    Found operator()(Bytes codes) const {
        // so that the halves of registers, which are woven each for itself, come out in order
        const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7), index = _mm256_permutevar8x32_epi32(__m256i(codes), order);
        __m256i found[4];
        for (int i = 0; i < 4; ++i) found[i] = _mm256_shuffle_epi8(bytes[i], index);
        const __m256i low[] = {_mm256_unpacklo_epi8(found[0], found[1]), _mm256_unpackhi_epi8(found[0], found[1])};
        const __m256i high[] = {_mm256_unpacklo_epi8(found[2], found[3]), _mm256_unpackhi_epi8(found[2], found[3])};
        return {{Floats(_mm256_unpacklo_epi16(low[0], high[0])), Floats(_mm256_unpackhi_epi16(low[0], high[0])),
                 Floats(_mm256_unpacklo_epi16(low[1], high[1])), Floats(_mm256_unpackhi_epi16(low[1], high[1]))}};
    }
};

template <int levels>
using Table = std::conditional_t<(levels > 16), Gathered, Woven>;

// 16 levels as Woven reads them: the first bytes of all, then the second ones, and so on.
constexpr bool lays_out = true;
inline void lay_out(const float* table, float* laid_out) {
    // of each four levels the first bytes, the second ones, ...; then those of eight levels side by side, then of all
    const __m256i bytes = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const auto eight = [&](const float* levels) {
        return _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(__m256i(load(levels)), bytes), order);
    };
    const __m256i low = eight(table), high = eight(table + 8);
    const __m256i even = _mm256_unpacklo_epi64(low, high), odd = _mm256_unpackhi_epi64(low, high);
    store(laid_out, Floats(_mm256_permute2x128_si256(even, odd, 0x20)));
    store(laid_out + 8, Floats(_mm256_permute2x128_si256(even, odd, 0x31)));
}

}  // namespace simd
}  // namespace
}  // namespace narrowkv
