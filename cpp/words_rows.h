// Rows of 64 codes, those of the tokens of one channel or pair of channels: looked up and multiplied in registers.

#pragma once

#include "words.h"

namespace narrowkv {
namespace {

// Which channels of keys make a pair: those that turn together; halves where they have scales of their own, so that these lie
// in a row; else neighbours, so that groups of channels stay together.
struct Pairs {
    int turned;
    bool interleaved;

    explicit Pairs(const Problem& problem) : turned(problem.rotation.pairs), interleaved(problem.rotation.interleaved) {
        const Side& side = problem.keys;
        if (!turned && (side.numbers == 2 || side.fixed || side.range_tokens < kBlock)) turned = problem.head_dim / 2;
    }
    int first(int pair) const { return pair < turned && !interleaved ? pair : 2 * pair; }
    int second(int pair) const { return pair < turned && !interleaved ? pair + turned : 2 * pair + 1; }

    // The pairs of channels, and which are the second of theirs.
    __m512i of(__m512i channel, __mmask16& second) const {
        const __m512i half = _mm512_set1_epi32(turned), neighbours = _mm512_srli_epi32(channel, 1);
        const __mmask16 apart = interleaved ? 0 : _mm512_cmplt_epi32_mask(channel, _mm512_slli_epi32(half, 1));
        const __mmask16 later = _mm512_mask_cmpge_epi32_mask(apart, channel, half);
        second = later | (~apart & _mm512_test_epi32_mask(channel, _mm512_set1_epi32(1)));
        return _mm512_mask_sub_epi32(_mm512_mask_mov_epi32(neighbours, apart, channel), later, channel, half);
    }
};

// The rows of a head in a block, with a codebook each, or one for all.
template <int bits, int numbers>
struct Rows {
    static constexpr int levels = kept_levels(bits), step = 2 * levels * numbers;
    const uint8_t *first, *second, *third, *tables;  // the planes
    int table_step;

    Rows(const Side& side, const Block& block, int head) {
        const int64_t row = int64_t(head) * side.codes;
        first = block.planes[0] + row * bytes(0), second = block.planes[1] + row * bytes(1), third = block.planes[2] + row * bytes(2);
        tables = side.words + (side.fixed ? row * step : 0), table_step = side.fixed ? step : 0;
    }

    static constexpr int bytes(int plane) { return kBlock * kPlanes[bits][plane] / 8; }

    // Codes of 32 tokens of a row.
    template <int half>
    NARROWKV_INLINE __m512i codes(int row) const {
        return join_planes<bits>([&](auto width, auto plane, auto to) NARROWKV_INLINE {
            const uint8_t* from = plane == 0 ? first : plane == 1 ? second : third;
            return RowPlane<width, half, to>::read(from + row * bytes(plane));
        });
    }
    // Their words; of pairs of numbers, the first ones or the second.
    NARROWKV_INLINE __m512i words(int row, int number, __m512i codes) const {
        return look_up_words<levels>(codes, tables + row * table_step + number * 2 * levels);
    }
};

// Run `part`, which is told bits and numbers as types, for a side whose rows are channels.
template <typename Part>
inline void by_bits(const Side& side, const Part& part) {
    const auto run = [&](auto bits) {
        if (side.numbers == 2) return part(bits, std::integral_constant<int, 2>());
        if constexpr (bits <= 4) part(bits, std::integral_constant<int, 1>());
    };
    switch (side.bits) {
        case 2: return run(std::integral_constant<int, 2>());
        case 3: return run(std::integral_constant<int, 3>());
        case 4: return run(std::integral_constant<int, 4>());
        case 5: return run(std::integral_constant<int, 5>());
        case 6: return run(std::integral_constant<int, 6>());
        case 7: return run(std::integral_constant<int, 7>());
        default: return run(std::integral_constant<int, 8>());
    }
}

// A pair of channels of 32 tokens as two registers of lanes, turned by angles, [2][64] cosines and sines, where there are such.
template <bool turned>
NARROWKV_INLINE inline void to_lanes(__m512i x, __m512i y, const int16_t* angles, __m512i& low, __m512i& high) {
    if constexpr (turned) {
        const __m512i cos = load_words(angles), sin = load_words(angles + kBlock);
        const __m512i first = _mm512_sub_epi16(_mm512_mulhrs_epi16(x, cos), _mm512_mulhrs_epi16(y, sin));
        y = _mm512_add_epi16(_mm512_mulhrs_epi16(x, sin), _mm512_mulhrs_epi16(y, cos)), x = first;
    }
    low = _mm512_unpacklo_epi16(x, y), high = _mm512_unpackhi_epi16(x, y);
}

// Sums of lanes, as `to_lanes` orders them, as those of 32 tokens in a row.
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

// Queries as lanes, for the first 32 tokens of a block and for the others; from one pair, and one query, to the next.
struct Asked {
    const int32_t* halves[2];
    int pair_step, query_step;
};

// Add products of queries with 64 tokens over pairs [from, to), the second channel of a pair `apart` from the first, or the next
// one. angles: [pairs][2][64], or null.
template <int queries, bool turned, typename Keys>
inline void score_rows(const Keys& rows, const Asked& asked, int from, int to, int apart, const int16_t* angles, Ahead& ahead, __m512i total[][4]) {
    constexpr bool of_pairs = Keys::step > 2 * Keys::levels;
    __m512i sums[queries][4];
    each<queries>([&](auto q) NARROWKV_INLINE { each<4>([&](auto i) NARROWKV_INLINE { sums[q][i] = total[q][i]; }); });
    const int pair_step = asked.pair_step, query_step = asked.query_step;
    for (int first = from; first < to; first += kSteps) {
        ahead.step(kSteps);
        for (int pair = first; pair < first + kSteps && pair < to; ++pair) {
            const int x = of_pairs || apart ? pair : 2 * pair, y = of_pairs ? pair : apart ? pair + apart : x + 1;
            each<2>([&](auto half) NARROWKV_INLINE {
                const __m512i ones = rows.template codes<half>(x), twos = of_pairs ? ones : rows.template codes<half>(y);
                __m512i low, high;
                const int16_t* angle = turned ? angles + 2 * kBlock * pair + 32 * half : nullptr;
                to_lanes<turned>(rows.words(x, 0, ones), rows.words(y, of_pairs, twos), angle, low, high);
                const int32_t* query = asked.halves[half] + pair * pair_step;
                each<queries>([&](auto q) NARROWKV_INLINE {
                    const __m512i both = _mm512_set1_epi32(query[q * query_step]);
                    sums[q][2 * half] = _mm512_dpwssd_epi32(sums[q][2 * half], low, both);
                    sums[q][2 * half + 1] = _mm512_dpwssd_epi32(sums[q][2 * half + 1], high, both);
                });
            });
        }
    }
    each<queries>([&](auto q) NARROWKV_INLINE { each<4>([&](auto i) NARROWKV_INLINE { total[q][i] = sums[q][i]; }); });
}

// The sums of the lanes of sixteen registers, in their order.
inline __m512i sum_lanes(const __m512i x[16]) {
    __m512i fours[4];
    for (int i = 0; i < 4; ++i) {
        const __m512i *a = x + 4 * i, *b = a + 1, *c = a + 2, *d = a + 3;
        const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(*a, *b), _mm512_unpackhi_epi32(*a, *b));
        const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(*c, *d), _mm512_unpackhi_epi32(*c, *d));
        fours[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    }
    const auto halves = [](__m512i a, __m512i b) {
        return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
    };
    return halves(halves(fours[0], fours[1]), halves(fours[2], fours[3]));
}

// Sums over the tokens of some blocks of 16 / queries channels, from the row `first` on, times the weights of each query, which lie
// `stride` apart and are ordered by `place_of`. Returns [rows][numbers][queries].
template <int queries, int bits, int numbers>
inline __m512i mix_rows(const Rows<bits, numbers>* const* blocks, int count, int first, int last, const int16_t* weights, int stride) {
    constexpr int together = 16 / queries / numbers;
    __m512i all[16];
    each<16>([&](auto i) NARROWKV_INLINE { all[i] = _mm512_setzero_si512(); });
    for (int block = 0; block < count; ++block, weights += kBlock) {
        if (!blocks[block]) continue;
        const Rows<bits, numbers> rows = *blocks[block];
        each<2>([&](auto half) NARROWKV_INLINE {
            __m512i weight[queries];
            each<queries>([&](auto q) NARROWKV_INLINE { weight[q] = load_words(weights + q * stride + 32 * half); });
            each<together>([&](auto i) NARROWKV_INLINE {
                const int row = first + i < last ? first + i : last;
                const __m512i codes = rows.template codes<half>(row);
                each<numbers>([&](auto number) NARROWKV_INLINE {
                    const __m512i x = rows.words(row, number, codes);
                    each<queries>([&](auto q) NARROWKV_INLINE {
                        constexpr int at = (i * numbers + number) * queries + q;
                        all[at] = _mm512_dpwssd_epi32(all[at], x, weight[q]);
                    });
                });
            });
        });
    }
    return sum_lanes(all);
}

}  // namespace
}  // namespace narrowkv
