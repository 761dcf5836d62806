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

// 64 codes of a row.
template <int bits>
inline void read_codes(const uint8_t* const* rows, __m512i* codes) {
    codes[0] = join_planes<bits>([&](auto width, auto plane, auto to) { return RowPlane<width, 0, to>::read(rows[plane]); });
    codes[1] = join_planes<bits>([&](auto width, auto plane, auto to) { return RowPlane<width, 1, to>::read(rows[plane]); });
}

template <int bits, bool pairs_of_codes>
void read_keys(const Side& side, const Block& block, int64_t row, int count, Pairs pairs, Ahead& ahead, int16_t* tile) {
    constexpr int levels = kept_levels(bits), step = pairs_of_codes ? 4 * levels : 2 * levels;
    const uint8_t* tables = side.words + (side.fixed ? row * step : 0);
    const auto read = [&](int code, __m512i* codes) {
        const uint8_t* planes[3];
        for (int plane = 0; plane < 3; ++plane) planes[plane] = block.planes[plane] + (row + code) * (kBlock * kPlanes[bits][plane] / 8);
        read_codes<bits>(planes, codes);
        return tables + (side.fixed ? code * step : 0);
    };
    const auto put = [](const __m512i* codes, const uint8_t* table, int16_t* to) {
        store_words(to, look_up_words<levels>(codes[0], table)), store_words(to + 32, look_up_words<levels>(codes[1], table));
    };
    for (int pair = 0; pair < count; ++pair, tile += 2 * kBlock) {
        ahead.step();
        __m512i codes[2];
        const uint8_t* table = read(pairs_of_codes ? pair : pairs.first(pair), codes);
        put(codes, table, tile);
        if constexpr (!pairs_of_codes) table = read(pairs.second(pair), codes);
        put(codes, table + (pairs_of_codes ? 2 * levels : 0), tile + kBlock);
    }
}

inline void read_keys(const Side& side, const Block& block, int64_t row, int count, Pairs pairs, Ahead& ahead, int16_t* tile) {
    const auto run = [&](auto read) { read(side, block, row, count, pairs, ahead, tile); };
    if (side.numbers == 1) {
        return side.bits == 2 ? run(read_keys<2, false>) : side.bits == 3 ? run(read_keys<3, false>) : run(read_keys<4, false>);
    }
    switch (side.bits) {
        case 3: return run(read_keys<3, true>);
        case 4: return run(read_keys<4, true>);
        case 5: return run(read_keys<5, true>);
        case 6: return run(read_keys<6, true>);
        case 7: return run(read_keys<7, true>);
        default: return run(read_keys<8, true>);
    }
}

// A pair of keys of 32 tokens as two registers of lanes, turned by angles, [2][64] cosines and sines, where there are such.
template <bool turned>
inline void read_lanes(const int16_t* tile, const int16_t* angles, __m512i* lanes) {
    __m512i x = load_words(tile), y = load_words(tile + kBlock);
    if constexpr (turned) {
        const __m512i cos = load_words(angles), sin = load_words(angles + kBlock);
        const __m512i first = _mm512_sub_epi16(_mm512_mulhrs_epi16(x, cos), _mm512_mulhrs_epi16(y, sin));
        y = _mm512_add_epi16(_mm512_mulhrs_epi16(x, sin), _mm512_mulhrs_epi16(y, cos)), x = first;
    }
    lanes[0] = _mm512_unpacklo_epi16(x, y), lanes[1] = _mm512_unpackhi_epi16(x, y);
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
                        __m512i sums[][2 * halves]) {
    for (int pair = from; pair < to; ++pair) {
        ahead.step();
        __m512i keys[2 * halves];
        for (int half = 0; half < halves; ++half) {
            const int at = 2 * kBlock * pair + 32 * half;
            read_lanes<turned>(tile + at, turned ? angles + at : nullptr, keys + 2 * half);
        }
        for (int q = 0; q < queries; ++q) {
            const __m512i both = _mm512_set1_epi32(query[q * all + pair]);
            for (int i = 0; i < 2 * halves; ++i) sums[q][i] = _mm512_dpwssd_epi32(sums[q][i], keys[i], both);
        }
    }
}

}  // namespace
}  // namespace narrowkv
