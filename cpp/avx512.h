// Sixteen numbers at once, on processors with AVX-512 F and BW.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace narrowkv {
namespace {
namespace simd {

constexpr int width = 16;
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint64_t Bytes __attribute__((vector_size(16)));

inline Floats load(const float* p) { return Floats(_mm512_loadu_ps(p)); }
inline void store(float* p, Floats x) { _mm512_storeu_ps(p, __m512(x)); }
inline Floats load_halves(const uint16_t* p) { return Floats(_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))); }

inline Ints widen(const uint8_t* codes) { return Ints(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)codes))); }
inline Floats gather(const float* points, Ints codes) { return Floats(_mm512_i32gather_ps(__m512i(codes), points, 4)); }

#include "gathered.h"

// A codebook of up to 16 levels is one register and a look-up is one permute; of 32, two registers; of 64, four.
template <int levels>
struct Registers {
    __m512 points[levels < 16 ? 1 : levels / 16];

    explicit Registers(const float* table) {
        for (auto& part : points) part = _mm512_loadu_ps(table), table += 16;
    }
    Found operator()(Bytes codes) const {
        const __m512i index = _mm512_cvtepu8_epi32(__m128i(codes));
        if constexpr (levels <= 16) return {{Floats(_mm512_permutexvar_ps(index, points[0]))}};
        if constexpr (levels == 32) return {{Floats(_mm512_permutex2var_ps(points[0], index, points[1]))}};
        if constexpr (levels == 64) {
            const __m512 low = _mm512_permutex2var_ps(points[0], index, points[1]);
            const __m512 high = _mm512_permutex2var_ps(points[2], index, points[3]);
            return {{Floats(_mm512_mask_blend_ps(_mm512_test_epi32_mask(index, _mm512_set1_epi32(32)), low, high))}};
        }
    }
};

template <int levels>
using Table = std::conditional_t<levels == 256, Gathered, Registers<levels>>;

constexpr bool lays_out = false;
inline void lay_out(const float*, float*) {}

}  // namespace simd
}  // namespace
}  // namespace narrowkv
