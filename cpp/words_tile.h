// A block of packed keys as a tile of lanes, one for each pair of channels of a token, and its products with queries.

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
        const __m512i number = _mm512_mask_mov_epi32(_mm512_maskz_and_epi32(~apart, channel, one), second, one);
        return _mm512_add_epi32(_mm512_slli_epi32(pair, 7), number);
    }
};

template <int bits, bool pairs_of_codes>
void read_keys(const Side& side, const Block& block, int64_t row, int count, Pairs pairs, const Ahead& ahead, int16_t* tile) {
    constexpr int levels = kept_levels(bits), step = pairs_of_codes ? 4 * levels : 32;
    const uint8_t* tables = side.words + (side.fixed ? row * step : 0);
    const __m512i low = _mm512_set1_epi16((1 << bits) - 1), second = _mm512_set1_epi32(16 << 16);
    const auto rows = [&](int i, const uint8_t** planes) {
        for (int plane = 0; plane < 3; ++plane) planes[plane] = block.planes[plane] + (row + i) * (kBlock * kPlanes[bits][plane] / 8);
    };
    for (int pair = 0; pair < count; ++pair, tile += 2 * kBlock) {
        ahead.ask(pair);
        const int x = pairs_of_codes ? pair : pairs.first(pair), y = pairs_of_codes ? pair : pairs.second(pair);
        const uint8_t *a[3], *b[3];
        rows(x, a), rows(y, b);
        __m512i codes[4];
        read_codes<bits, kBlock>(a, b, codes);
        const uint8_t* table = tables + (side.fixed ? x * step : 0);
        if constexpr (pairs_of_codes) {
            for (int i = 0; i < 4; ++i) store_words(tile + 32 * i, look_up_pairs<levels>(codes[i], table));
        } else {
            const __m512i both = two_tables(table, tables + (side.fixed ? y * step : 0));
            for (int i = 0; i < 4; ++i) {
                const __m512i index = _mm512_ternarylogic_epi64(codes[i], low, second, 0xea);
                store_words(tile + 32 * i, _mm512_permutexvar_epi16(index, both));
            }
        }
    }
}

inline void read_keys(const Side& side, const Block& block, int64_t row, int count, Pairs pairs, const Ahead& ahead, int16_t* tile) {
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

// Products of queries, [queries][all] lanes, with 16 * parts tokens of a tile over pairs [from, to). angles: [pairs][2][32] lanes,
// (cos, cos) and (-sin, sin), by which keys turn; or null.
template <int queries, int parts, bool turned>
inline void score_lanes(const int32_t* query, int all, const int16_t* tile, int from, int to, const int16_t* angles, __m512 out[][parts]) {
    __m512i sums[queries][parts] = {};
    for (int pair = from; pair < to; ++pair) {
        __m512i keys[parts];
        for (int i = 0; i < parts; ++i) {
            keys[i] = load_words(tile + 2 * kBlock * pair + 32 * i);
            if constexpr (turned) {
                const int16_t* angle = angles + 4 * kTurned * pair + 32 * i;
                const __m512i swapped = _mm512_rol_epi32(keys[i], 16), along = _mm512_mulhrs_epi16(keys[i], load_words(angle));
                keys[i] = _mm512_add_epi16(along, _mm512_mulhrs_epi16(swapped, load_words(angle + 2 * kTurned)));
            }
        }
        for (int q = 0; q < queries; ++q) {
            const __m512i both = _mm512_set1_epi32(query[q * all + pair]);
            for (int i = 0; i < parts; ++i) sums[q][i] = _mm512_dpwssd_epi32(sums[q][i], keys[i], both);
        }
    }
    for (int q = 0; q < queries; ++q) {
        for (int i = 0; i < parts; ++i) out[q][i] = _mm512_cvtepi32_ps(sums[q][i]);
    }
}

}  // namespace
}  // namespace narrowkv
