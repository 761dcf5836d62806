// A block of packed keys as a tile of words, [pairs][2][64 tokens], these by the order of `place_of`, and its products with queries.

#pragma once

#include "words.h"
#include "words_outliers.h"

namespace narrowkv {
namespace {

// Which channels of keys make a pair: those that turn together; halves where they have scales of their own, so that these lie
// in a row; else neighbours, so that groups of channels stay together.
struct Pairs {
    int turned;
    bool interleaved;

    explicit Pairs(const Problem& problem) : turned(problem.rotation.pairs), interleaved(problem.rotation.interleaved) {
        const Side& side = problem.keys;
        if (!turned && (side.numbers == 2 || by_channel(side))) turned = problem.head_dim / 2;
    }
    int first(int pair) const { return pair < turned && !interleaved ? pair : 2 * pair; }
    int second(int pair) const { return pair < turned && !interleaved ? pair + turned : 2 * pair + 1; }

    // Where in a tile the first token of each channel lies.
    __m512i place(__m512i channel) const {
        const __m512i half = _mm512_set1_epi32(turned), one = _mm512_set1_epi32(1);
        const __mmask16 apart = interleaved ? 0 : _mm512_cmplt_epi32_mask(channel, _mm512_slli_epi32(half, 1));
        const __mmask16 second = _mm512_mask_cmpge_epi32_mask(apart, channel, half);
        const __m512i pair = _mm512_mask_sub_epi32(_mm512_mask_srli_epi32(channel, ~apart, channel, 1), second, channel, half);
        const __m512i other = _mm512_mask_mov_epi32(_mm512_maskz_and_epi32(~apart, channel, one), second, one);
        return _mm512_add_epi32(_mm512_slli_epi32(pair, 7), _mm512_slli_epi32(other, 6));
    }
};

// Rows of 64 codes with a codebook each, or one for all.
template <int bits, int numbers>
struct KeyRows {
    static constexpr int levels = kept_levels(bits), step = 2 * levels * numbers;
    const uint8_t *first, *second, *third, *tables;  // the planes
    int table_step;

    KeyRows(const Side& side, const Block& block, int64_t row)
        : first(block.planes[0] + row * bytes(0)), second(block.planes[1] + row * bytes(1)), third(block.planes[2] + row * bytes(2)),
          tables(side.words + (side.fixed ? row * step : 0)), table_step(side.fixed ? step : 0) {}

    static constexpr int bytes(int plane) { return kBlock * kPlanes[bits][plane] / 8; }

    template <int half>
    __m512i codes(int row) const {
        return join_planes<bits>([&](auto width, auto plane, auto to) {
            const uint8_t* from = plane == 0 ? first : plane == 1 ? second : third;
            return RowPlane<width, half, to>::read(from + row * bytes(plane));
        });
    }
    // The words of a row's codes; of pairs of numbers, the first ones or the second.
    void look_up(int row, int number, __m512i low, __m512i high, int16_t* to) const {
        const uint8_t* table = tables + row * table_step + number * 2 * levels;
        store_words(to, look_up_words<levels>(low, table)), store_words(to + 32, look_up_words<levels>(high, table));
    }
};

template <int bits, int numbers>
void read_keys(const Side& side, const Block& block, int64_t row, int count, Pairs pairs, Ahead& ahead, int16_t* tile) {
    const KeyRows<bits, numbers> rows(side, block, row);
    const auto read = [&](int pair, int x, int y) {
        int16_t* to = tile + 2 * kBlock * pair;
        const __m512i low = rows.template codes<0>(x), high = rows.template codes<1>(x);
        rows.look_up(x, 0, low, high, to);
        if constexpr (numbers == 2) return rows.look_up(x, 1, low, high, to + kBlock);
        rows.look_up(y, 0, rows.template codes<0>(y), rows.template codes<1>(y), to + kBlock);
    };
    const int apart = numbers == 2 || pairs.interleaved ? 0 : pairs.turned;
    for (int first = 0; first < count; first += kSteps) {
        ahead.step(kSteps);
        const int last = std::min(first + kSteps, count);
        for (int pair = first; pair < last; ++pair) {
            numbers == 2 ? read(pair, pair, 0) : pair < apart ? read(pair, pair, pair + apart) : read(pair, 2 * pair, 2 * pair + 1);
        }
    }
}

inline void read_keys(const Side& side, const Block& block, int64_t row, int count, Pairs pairs, Ahead& ahead, int16_t* tile) {
    const auto run = [&](auto read) { read(side, block, row, count, pairs, ahead, tile); };
    if (side.numbers == 1) {
        return side.bits == 2 ? run(read_keys<2, 1>) : side.bits == 3 ? run(read_keys<3, 1>) : run(read_keys<4, 1>);
    }
    switch (side.bits) {
        case 3: return run(read_keys<3, 2>);
        case 4: return run(read_keys<4, 2>);
        case 5: return run(read_keys<5, 2>);
        case 6: return run(read_keys<6, 2>);
        case 7: return run(read_keys<7, 2>);
        default: return run(read_keys<8, 2>);
    }
}

// A pair of keys of 32 tokens as two registers of lanes, turned by angles, [2][64] cosines and sines, where there are such.
template <bool turned>
NARROWKV_INLINE inline void read_lanes(const int16_t* tile, const int16_t* angles, __m512i& low, __m512i& high) {
    __m512i x = load_words(tile), y = load_words(tile + kBlock);
    if constexpr (turned) {
        const __m512i cos = load_words(angles), sin = load_words(angles + kBlock);
        const __m512i first = _mm512_sub_epi16(_mm512_mulhrs_epi16(x, cos), _mm512_mulhrs_epi16(y, sin));
        y = _mm512_add_epi16(_mm512_mulhrs_epi16(x, sin), _mm512_mulhrs_epi16(y, cos)), x = first;
    }
    low = _mm512_unpacklo_epi16(x, y), high = _mm512_unpackhi_epi16(x, y);
}

// Sums of lanes, as `read_lanes` orders them, as those of 32 tokens in a row.
inline void order_sums(__m512 low, __m512 high, float* to) {
    alignas(64) static constexpr auto order = [] {
        std::array<int32_t, 32> found{};
        for (int token = 0; token < 32; ++token) {
            const int place = place_of(token);
            found[token] = place / 8 * 4 + place % 4 + (place % 8 >= 4 ? 16 : 0);
        }
        return found;
    }();
    for (int i = 0; i < 32; i += 16) _mm512_storeu_ps(to + i, _mm512_permutex2var_ps(low, _mm512_load_si512(&order[i]), high));
}

// Products of queries, [queries][all] lanes, with 32 * halves tokens of a tile over pairs [from, to). angles: [pairs][2][64], or null.
template <int queries, int halves, bool turned>
inline void score_lanes(const int32_t* query, int all, const int16_t* tile, int from, int to, const int16_t* angles, Ahead& ahead,
                        __m512i total[][2 * halves]) {
    __m512i sums[queries][2 * halves] = {};
    for (int first = from; first < to; first += kSteps) {
        ahead.step(kSteps);
        for (int pair = first; pair < first + kSteps && pair < to; ++pair) {
            __m512i keys[2 * halves];
            each<halves>([&](auto half) NARROWKV_INLINE {
                const int at = 2 * kBlock * pair + 32 * half;
                read_lanes<turned>(tile + at, turned ? angles + at : nullptr, keys[2 * half], keys[2 * half + 1]);
            });
            each<queries>([&](auto q) NARROWKV_INLINE {
                const __m512i both = _mm512_set1_epi32(query[q * all + pair]);
                each<2 * halves>([&](auto i) NARROWKV_INLINE { sums[q][i] = _mm512_dpwssd_epi32(sums[q][i], keys[i], both); });
            });
        }
    }
    each<queries>([&](auto q) NARROWKV_INLINE {
        each<2 * halves>([&](auto i) NARROWKV_INLINE { total[q][i] = _mm512_add_epi32(total[q][i], sums[q][i]); });
    });
}

}  // namespace
}  // namespace narrowkv
