// Trellis-coded codes for processors with AVX2: sixteen states at once.

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace narrowkv {
namespace {

constexpr int width = 16;
typedef uint16_t Lanes __attribute__((vector_size(32)));

template <typename T>
inline Lanes load(const T* p) { return Lanes(_mm256_load_si256((const __m256i*)p)); }
inline void store(uint16_t* p, Lanes x) { _mm256_store_si256((__m256i*)p, __m256i(x)); }
inline void store_bytes(uint8_t* p, Lanes x) {
    _mm_storeu_si128((__m128i*)p, _mm_packus_epi16(_mm256_castsi256_si128(__m256i(x)), _mm256_extracti128_si256(__m256i(x), 1)));
}
inline Lanes splat(uint16_t x) { return Lanes(_mm256_set1_epi16(int16_t(x))); }
inline Lanes lane_indices() { return Lanes{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }
inline Lanes minimum(Lanes a, Lanes b) { return Lanes(_mm256_min_epu16(__m256i(a), __m256i(b))); }
inline Lanes maximum(Lanes a, Lanes b) { return Lanes(_mm256_max_epu16(__m256i(a), __m256i(b))); }
inline Lanes if_equal(Lanes a, Lanes b, Lanes then, Lanes otherwise) {
    return Lanes(_mm256_blendv_epi8(__m256i(otherwise), __m256i(then), _mm256_cmpeq_epi16(__m256i(a), __m256i(b))));
}
inline Lanes saturated_sum(Lanes a, Lanes b) { return Lanes(_mm256_adds_epu16(__m256i(a), __m256i(b))); }
inline Lanes high_product(Lanes a, Lanes b) { return Lanes(_mm256_mulhi_epu16(__m256i(a), __m256i(b))); }

// Lane i of lane i + distance; the halves of 8 lanes are equal where it is 4.
template <int distance>
inline Lanes rotate(Lanes x) {
    static_assert(distance == 8 || distance == 4);
    if constexpr (distance == 8) return Lanes(_mm256_permute2x128_si256(__m256i(x), __m256i(x), 1));
    return Lanes(_mm256_shuffle_epi32(__m256i(x), 0x4e));
}

inline Lanes least_of(Lanes x) {
    const __m256i all = __m256i(x);
    return Lanes(_mm256_broadcastw_epi16(_mm_minpos_epu16(_mm_min_epu16(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1)))));
}

// Lane i is from[i >> rate].
template <int rate>
inline Lanes spread(const uint16_t* from) {
    if constexpr (rate >= 4) return splat(*from);
    const Lanes bytes = lane_indices() >> rate;  // twice the number of a lane, and that plus 1
    const __m256i order = __m256i(bytes * 0x0202 + 0x0100);
    if constexpr (rate == 1) return Lanes(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)from)), order));
    int64_t few;  // two or four of them
    std::memcpy(&few, from, rate == 2 ? 8 : 4);
    return Lanes(_mm256_shuffle_epi8(rate == 2 ? _mm256_set1_epi64x(few) : _mm256_set1_epi32(int32_t(few)), order));
}

typedef double Doubles __attribute__((vector_size(32)));
inline Doubles product_and_sum(Doubles a, Doubles b, Doubles sum) { return Doubles(_mm256_fmadd_pd(__m256d(a), __m256d(b), __m256d(sum))); }

}  // namespace
}  // namespace narrowkv

#include "trellis_kernel.h"
#include "stream_encode_kernel.h"

namespace narrowkv {
void encode_trellis_avx2(const Trellis& problem) { encode_problem(problem); }
StreamCounts encode_streams_avx2(const StreamCodec& codec, const TensorView& elements, const uint8_t* skip, const EncodeBuffer& buffer,
                                 const int32_t* stored_outliers, const int64_t* row_starts, bool halves, int threads) {
    return encode_all_streams(codec, elements, skip, buffer, stored_outliers, row_starts, halves, threads);
}
}  // namespace narrowkv

#endif
