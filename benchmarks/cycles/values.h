// Values: sums over the tokens of four blocks of weight times value. Tokens are lanes, so products of neighboring tokens are
// added up by the multiplication itself; lanes are added up once for four blocks.

#pragma once

#include "scores.h"

namespace cycles {

constexpr int kSpan = 4, kSpanParts = kSpan * kParts;  // blocks, registers

struct Weights {
    alignas(64) uint8_t bytes[kMostQueries][kSpanParts][kLanes];  // with AVX2 at most 511 over the tokens of a lane of 16 bits
    alignas(64) float floats[kMostQueries][kSpanParts][kLanes];
};

using Mixed = float[kMostQueries][kDim];

// Weights of 8 bits, unsigned, times values in -64 .. 63.
struct Mix8 {
    static constexpr const char* name = "uint8 weights";
    template <int queries>
    CYCLES_INLINE static void add(const int8_t (*tile)[kSpanParts][kLanes], int unit, const Weights& weights, Mixed& mixed) {
        for (int q = 0; q < queries; ++q) {
            Bytes sums[kUnit];
            each<kUnit>([&](auto e) CYCLES_INLINE { sums[e] = zero(); });
            each<kSpanParts>([&](auto part) CYCLES_INLINE {
                const Bytes weight = load(weights.bytes[q][part]);
                each<kUnit>([&](auto e) CYCLES_INLINE {
#ifdef __AVX512VBMI__
                    sums[e] = _mm512_dpbusd_epi32(sums[e], weight, load(tile[e][part]));
#else
                    sums[e] = add_16(sums[e], multiply_bytes(weight, load(tile[e][part])));
#endif
                });
            });
            add_lanes(sums, &mixed[q][unit * kUnit]);
        }
    }
    static double weight(const Weights& weights, int q, int part, int lane) { return weights.bytes[q][part][lane]; }

  private:
    // The lanes of eight registers, added up.
    CYCLES_INLINE static void add_lanes(const Bytes* sums, float* to) {
#ifdef __AVX512VBMI__
        __m512i pairs[4], fours[2];
        each<4>([&](auto i) CYCLES_INLINE {
            pairs[i] = add_32(_mm512_unpacklo_epi32(sums[2 * i], sums[2 * i + 1]), _mm512_unpackhi_epi32(sums[2 * i], sums[2 * i + 1]));
        });
        each<2>([&](auto i) CYCLES_INLINE {
            fours[i] = add_32(_mm512_unpacklo_epi64(pairs[2 * i], pairs[2 * i + 1]), _mm512_unpackhi_epi64(pairs[2 * i], pairs[2 * i + 1]));
        });
        const auto halves = [](__m512i x) CYCLES_INLINE { return _mm256_add_epi32(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1)); };
        const __m256i first = halves(fours[0]), second = halves(fours[1]);
        const __m256i found = _mm256_add_epi32(_mm256_permute2x128_si256(first, second, 0x20), _mm256_permute2x128_si256(first, second, 0x31));
#else
        __m256i x[kUnit];
        each<kUnit>([&](auto e) CYCLES_INLINE { x[e] = _mm256_madd_epi16(sums[e], _mm256_set1_epi16(1)); });
        const auto fours = [](const __m256i* x) CYCLES_INLINE { return _mm256_hadd_epi32(_mm256_hadd_epi32(x[0], x[1]), _mm256_hadd_epi32(x[2], x[3])); };
        const __m256i first = fours(x), second = fours(x + 4);
        const __m256i found = _mm256_add_epi32(_mm256_permute2x128_si256(first, second, 0x20), _mm256_permute2x128_si256(first, second, 0x31));
#endif
        _mm256_storeu_ps(to, _mm256_add_ps(_mm256_loadu_ps(to), _mm256_cvtepi32_ps(found)));
    }
};

// Weights and values as float32.
struct MixFloat {
    static constexpr const char* name = "float32";
    template <int queries>
    CYCLES_INLINE static void add(const int8_t (*tile)[kSpanParts][kLanes], int unit, const Weights& weights, Mixed& mixed) {
        alignas(64) float lanes[kMostQueries][kUnit][kNumbers];
        for (int e = 0; e < kUnit; ++e) {
            Floats sums[queries];
            for (int q = 0; q < queries; ++q) sums[q] = all_floats(0);
            for (int part = 0; part < kSpanParts; ++part) {
                each<4>([&](auto i) CYCLES_INLINE {
                    const Floats value = to_floats(tile[e][part] + i * kNumbers);
                    for (int q = 0; q < queries; ++q) sums[q] = add_products(value, load_floats(weights.floats[q][part] + i * kNumbers), sums[q]);
                });
            }
            for (int q = 0; q < queries; ++q) store_floats(lanes[q][e], sums[q]);
        }
        for (int q = 0; q < queries; ++q) {
            for (int e = 0; e < kUnit; ++e) {
                for (int lane = 0; lane < kNumbers; ++lane) mixed[q][unit * kUnit + e] += lanes[q][e][lane];
            }
        }
    }
    static double weight(const Weights& weights, int q, int part, int lane) { return weights.floats[q][part][lane]; }
};

// Add four blocks from the one given on to `mixed`.
template <template <int> class Table, typename Products, int queries>
__attribute__((noinline)) void mix(const Streams& streams, int block, const Tables& tables, const Weights& weights, Mixed& mixed) {
    alignas(64) int8_t tile[kUnit][kSpanParts][kLanes];
    int at = 0;
    for (int unit = 0; unit < kUnits; ++unit) {
        by_rate(streams.rates[unit], [&](auto k) CYCLES_INLINE {
            const Table<k> table(tables);
            for (int part = 0; part < kSpanParts; ++part) {
                Bytes values[kUnit];
                decode_unit<k>(streams.block(block + part / kParts) + at + part % kParts * kLanes, table, values);
                each<kUnit>([&](auto e) CYCLES_INLINE { store(tile[e][part], values[e]); });
            }
            Products::template add<queries>(tile, unit, weights, mixed);
            at += k * kTokens;
        });
    }
}

}  // namespace cycles
