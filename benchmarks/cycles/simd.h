// The few vector instructions that the variants need, once for AVX2 and once for AVX-512 with VBMI and VNNI. A register holds
// bytes: 32 tokens with AVX2, all 64 of a block with AVX-512.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace cycles {

#ifdef __AVX512VBMI__

constexpr int kLanes = 64;
constexpr const char* kInstructions = "avx512";
using Bytes = __m512i;
using Floats = __m512;

inline Bytes load(const void* p) { return _mm512_loadu_si512(p); }
inline void store(void* p, Bytes x) { _mm512_storeu_si512(p, x); }
inline Bytes zero() { return _mm512_setzero_si512(); }
inline Bytes all_8(int x) { return _mm512_set1_epi8(char(x)); }
inline Bytes all_32(int32_t x) { return _mm512_set1_epi32(x); }
inline Bytes broadcast_16(const void* p) { return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p)); }
inline Bytes add_8(Bytes a, Bytes b) { return _mm512_add_epi8(a, b); }
inline Bytes sub_8(Bytes a, Bytes b) { return _mm512_sub_epi8(a, b); }
inline Bytes add_16(Bytes a, Bytes b) { return _mm512_add_epi16(a, b); }
inline Bytes sub_16(Bytes a, Bytes b) { return _mm512_sub_epi16(a, b); }
inline Bytes add_32(Bytes a, Bytes b) { return _mm512_add_epi32(a, b); }
inline Bytes both(Bytes a, Bytes b) { return _mm512_and_si512(a, b); }
inline Bytes either(Bytes a, Bytes b) { return _mm512_or_si512(a, b); }
template <int n> inline Bytes right(Bytes x) { return n ? _mm512_srli_epi16(x, n) : x; }  // within 16 bits
template <int n> inline Bytes left(Bytes x) { return n ? _mm512_slli_epi16(x, n) : x; }
// Where the bits of `mask` are set those of x, where the others of `all` are those of y; what else comes out does not matter.
template <int mask, int all> inline Bytes select(Bytes x, Bytes y) { return _mm512_ternarylogic_epi64(all_8(mask), x, y, 0xca); }
// `vpermb` ignores the upper two bits of an index, so 16 entries are there four times.
template <int bits> inline Bytes low(Bytes x) { return x; }
inline Bytes look_up(Bytes table, Bytes index) { return _mm512_permutexvar_epi8(index, table); }
inline Bytes unpack_low_8(Bytes a, Bytes b) { return _mm512_unpacklo_epi8(a, b); }
inline Bytes unpack_high_8(Bytes a, Bytes b) { return _mm512_unpackhi_epi8(a, b); }
inline Bytes unpack_low_16(Bytes a, Bytes b) { return _mm512_unpacklo_epi16(a, b); }
inline Bytes unpack_high_16(Bytes a, Bytes b) { return _mm512_unpackhi_epi16(a, b); }
inline Bytes multiply_bytes(Bytes u8, Bytes s8) { return _mm512_maddubs_epi16(u8, s8); }  // and add neighbors
inline Bytes multiply_rounded(Bytes a, Bytes b) { return _mm512_mulhrs_epi16(a, b); }
inline Bytes add_products_16(Bytes sum, Bytes a, Bytes b) { return _mm512_dpwssd_epi32(sum, a, b); }
inline Floats to_floats(const int8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))); }
inline Floats all_floats(float x) { return _mm512_set1_ps(x); }
inline Floats add_products(Floats a, Floats b, Floats sum) { return _mm512_fmadd_ps(a, b, sum); }
inline Floats load_floats(const float* p) { return _mm512_loadu_ps(p); }
inline void store_floats(float* p, Floats x) { _mm512_storeu_ps(p, x); }

#else

constexpr int kLanes = 32;
constexpr const char* kInstructions = "avx2";
using Bytes = __m256i;
using Floats = __m256;

inline Bytes load(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline void store(void* p, Bytes x) { _mm256_storeu_si256((__m256i*)p, x); }
inline Bytes zero() { return _mm256_setzero_si256(); }
inline Bytes all_8(int x) { return _mm256_set1_epi8(char(x)); }
inline Bytes all_32(int32_t x) { return _mm256_set1_epi32(x); }
inline Bytes broadcast_16(const void* p) { return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p)); }
inline Bytes add_8(Bytes a, Bytes b) { return _mm256_add_epi8(a, b); }
inline Bytes sub_8(Bytes a, Bytes b) { return _mm256_sub_epi8(a, b); }
inline Bytes add_16(Bytes a, Bytes b) { return _mm256_add_epi16(a, b); }
inline Bytes sub_16(Bytes a, Bytes b) { return _mm256_sub_epi16(a, b); }
inline Bytes add_32(Bytes a, Bytes b) { return _mm256_add_epi32(a, b); }
inline Bytes both(Bytes a, Bytes b) { return _mm256_and_si256(a, b); }
inline Bytes either(Bytes a, Bytes b) { return _mm256_or_si256(a, b); }
template <int n> inline Bytes right(Bytes x) { return n ? _mm256_srli_epi16(x, n) : x; }  // within 16 bits
template <int n> inline Bytes left(Bytes x) { return n ? _mm256_slli_epi16(x, n) : x; }
// Where the bits of `mask` are set those of x, where the others of `all` are those of y, else 0.
template <int mask, int all> inline Bytes select(Bytes x, Bytes y) { return either(both(x, all_8(mask)), both(y, all_8(all & ~mask))); }
// `vpshufb` wants the upper bits of an index cleared.
template <int bits> inline Bytes low(Bytes x) { return both(x, all_8((1 << bits) - 1)); }
inline Bytes look_up(Bytes table, Bytes index) { return _mm256_shuffle_epi8(table, index); }
inline Bytes unpack_low_8(Bytes a, Bytes b) { return _mm256_unpacklo_epi8(a, b); }
inline Bytes unpack_high_8(Bytes a, Bytes b) { return _mm256_unpackhi_epi8(a, b); }
inline Bytes unpack_low_16(Bytes a, Bytes b) { return _mm256_unpacklo_epi16(a, b); }
inline Bytes unpack_high_16(Bytes a, Bytes b) { return _mm256_unpackhi_epi16(a, b); }
inline Bytes multiply_bytes(Bytes u8, Bytes s8) { return _mm256_maddubs_epi16(u8, s8); }  // and add neighbors
inline Bytes multiply_rounded(Bytes a, Bytes b) { return _mm256_mulhrs_epi16(a, b); }
inline Bytes add_products_16(Bytes sum, Bytes a, Bytes b) { return add_32(sum, _mm256_madd_epi16(a, b)); }
inline Floats to_floats(const int8_t* p) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))); }
inline Floats all_floats(float x) { return _mm256_set1_ps(x); }
inline Floats add_products(Floats a, Floats b, Floats sum) { return _mm256_fmadd_ps(a, b, sum); }
inline Floats load_floats(const float* p) { return _mm256_loadu_ps(p); }
inline void store_floats(float* p, Floats x) { _mm256_storeu_ps(p, x); }

#endif

constexpr int kParts = 64 / kLanes;  // registers of a byte of all tokens of a block
constexpr int kNumbers = kLanes / 4;  // of 32 bits in a register

}  // namespace cycles
