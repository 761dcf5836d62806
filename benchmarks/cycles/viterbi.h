// The cheapest path through the trellis of a window of bits, in integers, so that it can be written again elsewhere bit for
// bit.
//
// A state is the window: the last `window` bits of the stream. An element x and the entries of tables are integers of 1/512
// of a step of the tables' grid, in 16 bits. With d = |x - entry|, at most 32768 by saturation, an entry costs
//     ((min(2 d, 65535)^2 >> 16) * weight) >> 16,   that is weight / 2^16 times 16 times the squared distance in steps,
// and a state costs min(65535, that + the least cost of the 2^k states it can come from - the least cost of all). On equal
// cost the lowest predecessor wins, and at the end the lowest state. Costs begin as 0 for state 0 and 65535 for the others.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace cycles {

#define CYCLES_INLINE __attribute__((always_inline))

inline __m256i load_16(const void* p) { return _mm256_load_si256((const __m256i*)p); }
inline void store_16(void* p, __m256i x) { _mm256_store_si256((__m256i*)p, x); }

CYCLES_INLINE inline __m256i cost_of(__m256i x, __m256i entries, __m256i weight) {
    const __m256i distance = _mm256_abs_epi16(_mm256_subs_epi16(x, entries)), twice = _mm256_adds_epu16(distance, distance);
    return _mm256_mulhi_epu16(_mm256_mulhi_epu16(twice, twice), weight);
}

// Each of the 16 >> k elements from `from` on 2^k times.
template <int k>
CYCLES_INLINE inline __m256i spread(const uint16_t* from) {
    if constexpr (k == 1) {
        const __m256i order = _mm256_setr_epi8(0, 1, 0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 6, 7, 6, 7, 8, 9, 8, 9, 10, 11, 10, 11, 12, 13, 12, 13, 14, 15, 14, 15);
        return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)from)), order);
    } else if constexpr (k == 2) {
        int64_t four;
        std::memcpy(&four, from, 8);
        const __m256i order = _mm256_setr_epi8(0, 1, 0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3, 2, 3, 4, 5, 4, 5, 4, 5, 4, 5, 6, 7, 6, 7, 6, 7, 6, 7);
        return _mm256_shuffle_epi8(_mm256_set1_epi64x(four), order);
    } else if constexpr (k == 3) {
        int32_t two;
        std::memcpy(&two, from, 4);
        const __m256i order = _mm256_setr_epi8(0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3);
        return _mm256_shuffle_epi8(_mm256_set1_epi32(two), order);
    } else {
        return _mm256_set1_epi16(int16_t(*from));
    }
}

// For each group of states that share `state >> k` after the step: the least cost of its 2^k predecessors, and which it is.
template <int window, int k>
CYCLES_INLINE inline void survive(const uint16_t* cost, uint16_t* best, uint8_t* chosen) {
    constexpr int groups = (1 << window) >> k, registers = groups < 16 ? (1 << window) / 16 : 1 << k, stride = groups < 16 ? 16 : groups;
    for (int at = 0; at < stride; at += 16) {
        __m256i least = load_16(cost + at), which = _mm256_setzero_si256();
#pragma GCC unroll 64
        for (int i = 1; i < registers; ++i) {
            const __m256i next = load_16(cost + i * stride + at), lower = _mm256_min_epu16(least, next);
            which = _mm256_blendv_epi8(_mm256_set1_epi16(int16_t(i)), which, _mm256_cmpeq_epi16(lower, least)), least = lower;
        }
        if constexpr (groups >= 16) {
            store_16(best + at, least);
            _mm_storeu_si128((__m128i*)(chosen + at), _mm_packus_epi16(_mm256_castsi256_si128(which), _mm256_extracti128_si256(which, 1)));
        } else {  // a register holds several predecessors of a group: the least of cost * 65536 + predecessor
            const auto wide = [&](auto half) CYCLES_INLINE {
                const __m256i high = _mm256_cvtepu16_epi32(_mm256_extracti128_si256(least, half)), i = _mm256_cvtepu16_epi32(_mm256_extracti128_si256(which, half));
                const __m256i lane = _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(8 * half));
                const __m256i from = _mm256_srli_epi32(_mm256_add_epi32(_mm256_slli_epi32(i, 4), lane), window - k);
                return _mm256_or_si256(_mm256_slli_epi32(high, 16), from);
            };
            __m256i both = _mm256_min_epu32(wide(std::integral_constant<int, 0>()), wide(std::integral_constant<int, 1>()));
            if constexpr (groups < 8) both = _mm256_min_epu32(both, _mm256_permute2x128_si256(both, both, 1));
            if constexpr (groups < 4) both = _mm256_min_epu32(both, _mm256_shuffle_epi32(both, 0x4e));
            alignas(32) uint32_t found[8];
            store_16(found, both);
            for (int i = 0; i < groups; ++i) best[i] = uint16_t(found[i] >> 16), chosen[i] = uint8_t(found[i]);
            for (int i = groups; i < 16; ++i) best[i] = 65535;
        }
    }
}

template <int window, int k>
CYCLES_INLINE inline void renormalize(uint16_t* best) {
    constexpr int groups = (1 << window) >> k;
    __m256i least = load_16(best);
    for (int i = 16; i < groups; i += 16) least = _mm256_min_epu16(least, load_16(best + i));
    const __m128i lowest = _mm_minpos_epu16(_mm_min_epu16(_mm256_castsi256_si128(least), _mm256_extracti128_si256(least, 1)));
    const __m256i by = _mm256_broadcastw_epi16(lowest);
    for (int i = 0; i < groups; i += 16) store_16(best + i, _mm256_sub_epi16(load_16(best + i), by));
}

// One element: costs of states, and for each group of them the predecessor.
template <int window, int k>
CYCLES_INLINE inline void step(uint16_t* cost, const int16_t* table, int16_t x, uint16_t weight, uint8_t* chosen) {
    alignas(32) uint16_t best[(1 << window) / 2 < 16 ? 16 : (1 << window) / 2];
    survive<window, k>(cost, best, chosen);
    renormalize<window, k>(best);
    const __m256i element = _mm256_set1_epi16(x), by = _mm256_set1_epi16(int16_t(weight));
#pragma GCC unroll 16
    for (int state = 0; state < 1 << window; state += 16) {
        store_16(cost + state, _mm256_adds_epu16(spread<k>(best + (state >> k)), cost_of(element, load_16(table + state), by)));
    }
}

constexpr int kElements = 128;

struct Problem {
    alignas(32) int16_t tables[7][256];
    int rates[kElements];
    uint16_t weights[kElements];
};

template <int window, typename Part>
CYCLES_INLINE inline void for_rate(int k, const Part& part) {
    switch (k) {
        case 1: return part(std::integral_constant<int, 1>());
        case 2: return part(std::integral_constant<int, 2>());
        case 3: return part(std::integral_constant<int, 3>());
        case 4: if constexpr (window > 4) return part(std::integral_constant<int, 4>()); else return;
        case 5: if constexpr (window > 6) return part(std::integral_constant<int, 5>()); else return;
        case 6: if constexpr (window > 6) return part(std::integral_constant<int, 6>()); else return;
    }
}

// The states of the elements of some tokens of a head, [together][128]; elements of rate 0 have none. Tokens take turns, since
// a step waits for the one before.
template <int window, int together>
__attribute__((noinline)) void encode(const Problem& problem, const int16_t (*x)[kElements], uint8_t (*states)[kElements]) {
    constexpr int count = 1 << window;
    alignas(32) uint16_t cost[together][count];
    static thread_local uint8_t chosen[kElements][together][count / 2 < 16 ? 16 : count / 2];
    for (auto& costs : cost) std::fill(costs, costs + count, uint16_t(65535)), costs[0] = 0;
    for (int i = 0; i < kElements; ++i) {
        for_rate<window>(problem.rates[i], [&](auto k) CYCLES_INLINE {
            for (int t = 0; t < together; ++t) step<window, k>(cost[t], problem.tables[k], x[t][i], problem.weights[i], chosen[i][t]);
        });
    }
    int state[together];
    for (int t = 0; t < together; ++t) state[t] = int(std::min_element(cost[t], cost[t] + count) - cost[t]);
    for (int i = kElements - 1; i >= 0; --i) {
        const int k = problem.rates[i];
        for (int t = 0; t < together; ++t) {
            states[t][i] = uint8_t(state[t]);
            if (k) state[t] = state[t] >> k | chosen[i][t][state[t] >> k] << (window - k);
        }
    }
}

}  // namespace cycles
