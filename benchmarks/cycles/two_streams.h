// The cheapest path through the trellis of two streams. A state is the last four bits of the first, then those of the second;
// so 16 registers, one for each window of the first stream, have 16 states each. Costs are those of `viterbi.h`. On equal cost
// the predecessor that lost the lowest bits of the second stream wins, then that which lost the lowest bits of the first.

#pragma once

#include "viterbi.h"

namespace cycles {

// Each element of the lower lanes as often as there are new bits of the second stream: 1, 2 or 4 times.
template <int second>
CYCLES_INLINE inline __m256i repeat(__m256i x) {
    if constexpr (second == 0) return x;
    const __m256i twice = _mm256_setr_epi8(0, 1, 0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 6, 7, 6, 7, 8, 9, 8, 9, 10, 11, 10, 11, 12, 13, 12, 13, 14, 15, 14, 15);
    const __m256i four_times = _mm256_setr_epi8(0, 1, 0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3, 2, 3, 4, 5, 4, 5, 4, 5, 4, 5, 6, 7, 6, 7, 6, 7, 6, 7);
    return _mm256_shuffle_epi8(x, second == 1 ? twice : four_times);
}

// One element of `first` + `second` bits. chosen: what left the windows, for each pair of windows without their new bits, [16
// >> first] [16]: of the first stream, plus 16 times that of the second.
template <int first, int second>
CYCLES_INLINE inline void split_step(uint16_t* cost, const int16_t* table, int16_t x, uint16_t weight, uint8_t* chosen) {
    constexpr int rows = 16 >> first;
    __m256i best[rows], lowest = _mm256_set1_epi16(-1);
#pragma GCC unroll 16
    for (int row = 0; row < rows; ++row) {
        __m256i least = load_16(cost + 16 * row), which = _mm256_setzero_si256();
        const auto against = [&](__m256i other, __m256i from) CYCLES_INLINE {
            const __m256i lower = _mm256_min_epu16(least, other);
            which = _mm256_blendv_epi8(from, which, _mm256_cmpeq_epi16(lower, least)), least = lower;
        };
#pragma GCC unroll 16
        for (int i = 1; i < 1 << first; ++i) against(load_16(cost + 16 * (i * rows + row)), _mm256_set1_epi16(int16_t(i)));
        if constexpr (second == 2) against(_mm256_shuffle_epi32(least, 0x4e), _mm256_or_si256(_mm256_shuffle_epi32(which, 0x4e), _mm256_set1_epi16(16)));
        if constexpr (second > 0) {
            const __m256i from = _mm256_or_si256(_mm256_permute4x64_epi64(which, 0x4e), _mm256_set1_epi16(16 * second));
            against(_mm256_permute4x64_epi64(least, 0x4e), from);
        }
        best[row] = least, lowest = _mm256_min_epu16(lowest, least);
        _mm_storeu_si128((__m128i*)(chosen + 16 * row), _mm_packus_epi16(_mm256_castsi256_si128(which), _mm256_extracti128_si256(which, 1)));
    }
    const __m128i least = _mm_minpos_epu16(_mm_min_epu16(_mm256_castsi256_si128(lowest), _mm256_extracti128_si256(lowest, 1)));
    const __m256i by = _mm256_set1_epi16(int16_t(weight)), element = _mm256_set1_epi16(x);
#pragma GCC unroll 16
    for (int row = 0; row < rows; ++row) {
        const __m256i before = repeat<second>(_mm256_sub_epi16(best[row], _mm256_broadcastw_epi16(least)));
#pragma GCC unroll 16
        for (int state = 16 * (row << first); state < 16 * ((row + 1) << first); state += 16) {
            store_16(cost + state, _mm256_adds_epu16(before, cost_of(element, load_16(table + state), by)));
        }
    }
}

// Run `part`, which is given as types how many bits an element has of each stream; those of rate 1 take turns.
template <typename Part>
CYCLES_INLINE inline void for_parts(int k, int element, const Part& part) {
    using std::integral_constant;
    const integral_constant<int, 0> none;
    const integral_constant<int, 1> one;
    const integral_constant<int, 2> two;
    const integral_constant<int, 4> four;
    switch (k) {
        case 1: return element % 2 ? part(none, one) : part(one, none);
        case 2: return part(one, one);
        case 3: return part(two, one);
        case 4: return part(two, two);
        case 5: return part(four, one);
        case 6: return part(four, two);
    }
}

// Tables of odd elements of rate 1 have the windows exchanged: tables[0].
inline const int16_t* split_table(const Problem& problem, int element) {
    const int k = problem.rates[element];
    return problem.tables[k == 1 && element % 2 ? 0 : k];
}

template <int together>
__attribute__((noinline)) void encode_split(const Problem& problem, const int16_t (*x)[kElements], uint8_t (*states)[kElements]) {
    alignas(32) uint16_t cost[together][256];
    static thread_local uint8_t chosen[kElements][together][256];  // of those of rate 0 nothing
    for (auto& costs : cost) std::fill(costs, costs + 256, uint16_t(65535)), costs[0] = 0;
    for (int i = 0; i < kElements; ++i) {
        for_parts(problem.rates[i], i, [&](auto first, auto second) CYCLES_INLINE {
            for (int t = 0; t < together; ++t) split_step<first, second>(cost[t], split_table(problem, i), x[t][i], problem.weights[i], chosen[i][t]);
        });
    }
    int state[together];
    for (int t = 0; t < together; ++t) state[t] = int(std::min_element(cost[t], cost[t] + 256) - cost[t]);
    for (int i = kElements - 1; i >= 0; --i) {
        for (int t = 0; t < together; ++t) states[t][i] = uint8_t(state[t]);
        for_parts(problem.rates[i], i, [&](auto first, auto second) CYCLES_INLINE {
            for (int t = 0; t < together; ++t) {
                const int a = state[t] >> (4 + first), b = (state[t] & 15) >> second, lost = chosen[i][t][16 * a + b];
                state[t] = (a | (lost & 15) << (4 - first)) << 4 | b | lost >> 4 << (4 - second);
            }
        });
    }
}

}  // namespace cycles
