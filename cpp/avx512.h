// Sixteen elements at once, on processors with AVX-512 F and BW.

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

// A byte of each of some tokens, and two of them taken together.
typedef uint8_t Lanes __attribute__((vector_size(64)));
typedef uint16_t Words __attribute__((vector_size(64)));

inline Lanes repeated(const int8_t* table) { return Lanes(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)table))); }
inline Lanes pick(Lanes table, Lanes index) { return Lanes(_mm512_shuffle_epi8(__m512i(table), __m512i(index))); }
inline Floats to_floats(const int8_t* p) { return Floats(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))); }

#include "gathered.h"

// A codebook of 16 levels is one register and a look-up is one permute.
struct Register {
    __m512 points;

    explicit Register(const float* table) : points(_mm512_loadu_ps(table)) {}
    Found operator()(Bytes codes) const { return {{Floats(_mm512_permutexvar_ps(_mm512_cvtepu8_epi32(__m128i(codes)), points))}}; }
};

template <int levels>
using Table = std::conditional_t<(levels > 16), Gathered, Register>;

constexpr bool lays_out = false;
inline void lay_out(const float*, float*) {}

}  // namespace simd
}  // namespace
}  // namespace narrowkv
