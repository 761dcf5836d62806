// Kernels for processors with AVX2 and FMA: eight numbers at once.

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstdint>
#include <type_traits>

namespace narrowkv {
namespace {
namespace simd {

constexpr int width = 8;
typedef float Floats __attribute__((vector_size(32)));
typedef int32_t Ints __attribute__((vector_size(32)));
typedef uint64_t Bytes __attribute__((vector_size(16)));

inline Floats load(const float* p) { return Floats(_mm256_loadu_ps(p)); }
inline void store(float* p, Floats x) { _mm256_storeu_ps(p, __m256(x)); }
inline Floats load_halves(const uint16_t* p) { return Floats(_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))); }

// Sixteen codes, a byte each, as whole numbers.
struct Codes {
    __m128i bytes;

    explicit Codes(Bytes bytes) : bytes(__m128i(bytes)) {}
    Ints part(int i) const { return Ints(_mm256_cvtepu8_epi32(i ? _mm_srli_si128(bytes, 8) : bytes)); }
};

// A codebook of up to 8 levels is one register and a look-up is one permute; of 16, two and a choice by the code's fourth bit.
template <int levels>
struct Registers {
    __m256 points[levels / 8];

    explicit Registers(const float* table) {
        for (auto& part : points) part = _mm256_loadu_ps(table), table += 8;
    }
    Floats operator()(Ints codes) const {
        const __m256i index = __m256i(codes);
        const __m256 low = _mm256_permutevar8x32_ps(points[0], index);
        if constexpr (levels == 8) return Floats(low);
        const __m256 high = _mm256_permutevar8x32_ps(points[levels / 8 - 1], index);
        return Floats(_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28))));
    }
    Registers stretched(float scale, float zero) const {
        Registers result = *this;
        for (auto& part : result.points) part = _mm256_fmadd_ps(part, _mm256_set1_ps(scale), _mm256_set1_ps(zero));
        return result;
    }
};

inline Floats gather(const float* points, Ints codes) { return Floats(_mm256_i32gather_ps(points, __m256i(codes), 4)); }

#include "gathered.h"

template <int levels>
using Table = std::conditional_t<(levels > 16), Gathered, Registers<levels>>;

}  // namespace simd
}  // namespace
}  // namespace narrowkv

#include "kernel.h"

namespace narrowkv {
void attend_avx2(const Problem& problem) { attend<Worker>(problem); }
}  // namespace narrowkv

#endif
