// Trellis-coded codes for processors with AVX-512: thirty-two states at once.

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace narrowkv {
namespace {

constexpr int width = 32;
typedef uint16_t Lanes __attribute__((vector_size(64)));


template <typename T>
inline Lanes load(const T* p) { return Lanes(_mm512_load_si512(p)); }
inline void store(uint16_t* p, Lanes x) { _mm512_store_si512(p, __m512i(x)); }
inline void store_bytes(uint8_t* p, Lanes x) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi16_epi8(__m512i(x))); }
inline Lanes splat(uint16_t x) { return Lanes(_mm512_set1_epi16(int16_t(x))); }
inline Lanes lane_indices() {
    return Lanes{0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};
}
inline Lanes minimum(Lanes a, Lanes b) { return Lanes(_mm512_min_epu16(__m512i(a), __m512i(b))); }
inline Lanes maximum(Lanes a, Lanes b) { return Lanes(_mm512_max_epu16(__m512i(a), __m512i(b))); }
inline Lanes if_equal(Lanes a, Lanes b, Lanes then, Lanes otherwise) {
    return Lanes(_mm512_mask_mov_epi16(__m512i(otherwise), _mm512_cmpeq_epu16_mask(__m512i(a), __m512i(b)), __m512i(then)));
}
inline Lanes saturated_sum(Lanes a, Lanes b) { return Lanes(_mm512_adds_epu16(__m512i(a), __m512i(b))); }
inline Lanes high_product(Lanes a, Lanes b) { return Lanes(_mm512_mulhi_epu16(__m512i(a), __m512i(b))); }

// Lane i of lane i + distance; the parts of twice as many lanes are equal.
template <int distance>
inline Lanes rotate(Lanes x) {
    static_assert(distance == 16 || distance == 8 || distance == 4);
    if constexpr (distance == 16) return Lanes(_mm512_shuffle_i64x2(__m512i(x), __m512i(x), 0x4e));
    if constexpr (distance == 8) return Lanes(_mm512_shuffle_i64x2(__m512i(x), __m512i(x), 0xb1));
    return Lanes(_mm512_shuffle_epi32(__m512i(x), _MM_PERM_ENUM(0x4e)));
}

inline Lanes least_of(Lanes x) {
    const __m256i half = _mm256_min_epu16(_mm512_castsi512_si256(__m512i(x)), _mm512_extracti64x4_epi64(__m512i(x), 1));
    return Lanes(_mm512_broadcastw_epi16(_mm_minpos_epu16(_mm_min_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)))));
}

// Lane i is from[i >> rate].
template <int rate>
inline Lanes spread(const uint16_t* from) {
    if constexpr (rate >= 5) return splat(*from);
    const Lanes order = lane_indices() >> rate;
    if constexpr (rate == 1) return Lanes(_mm512_permutexvar_epi16(__m512i(order), _mm512_castsi256_si512(_mm256_load_si256((const __m256i*)from))));
    if constexpr (rate == 2) return Lanes(_mm512_permutexvar_epi16(__m512i(order), _mm512_castsi128_si512(_mm_load_si128((const __m128i*)from))));
    const __m512i bytes = __m512i(order * 0x0202 + 0x0100);  // twice the number of a lane, and that plus 1
    int64_t few = 0;  // two or four of them
    std::memcpy(&few, from, rate == 3 ? 8 : 4);
    return Lanes(_mm512_shuffle_epi8(rate == 3 ? _mm512_set1_epi64(few) : _mm512_set1_epi32(int32_t(few)), bytes));
}

typedef double Doubles __attribute__((vector_size(64)));
inline Doubles product_and_sum(Doubles a, Doubles b, Doubles sum) { return Doubles(_mm512_fmadd_pd(__m512d(a), __m512d(b), __m512d(sum))); }

}  // namespace
}  // namespace narrowkv

#include "trellis_kernel.h"
#include "stream_encode_kernel.h"

namespace narrowkv {
void encode_trellis_avx512(const Trellis& problem) { encode_problem(problem); }
StreamCounts encode_streams_avx512(const StreamCodec& codec, const TensorView& elements, const uint8_t* skip, const EncodeBuffer& buffer,
                                 const int32_t* stored_outliers, const int64_t* row_starts, bool halves, int threads) {
    return encode_all_streams(codec, elements, skip, buffer, stored_outliers, row_starts, halves, threads);
}
}  // namespace narrowkv

#endif
