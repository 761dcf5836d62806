// Rows of 64 codes, those of the tokens of one channel: looked up and multiplied in registers.

#pragma once

#include "int16.h"

namespace narrowkv {
namespace {

// Which channels of keys make a pair: those that rotate together; halves where they have scales of their own, so that these
// lie in a row; else neighbors, so that groups of channels stay together.
struct Pairs {
    int rotated;
    bool interleaved;

    explicit Pairs(const Problem& problem) : rotated(problem.rotation.pairs), interleaved(problem.rotation.interleaved) {
        const PackedTensor& side = problem.keys;
        if (!rotated && (side.fixed || side.range_tokens < kBlock)) rotated = problem.head_dim / 2;
    }
    int first(int pair) const { return pair < rotated && !interleaved ? pair : 2 * pair; }
    int second(int pair) const { return pair < rotated && !interleaved ? pair + rotated : 2 * pair + 1; }

    // The pairs of channels, and which are the second of theirs.
    __m512i of(__m512i channel, __mmask16& second) const {
        const __m512i half = _mm512_set1_epi32(rotated), neighbors = _mm512_srli_epi32(channel, 1);
        const __mmask16 apart = interleaved ? 0 : _mm512_cmplt_epi32_mask(channel, _mm512_slli_epi32(half, 1));
        const __mmask16 later = _mm512_mask_cmpge_epi32_mask(apart, channel, half);
        second = later | (~apart & _mm512_test_epi32_mask(channel, _mm512_set1_epi32(1)));
        return _mm512_mask_sub_epi32(_mm512_mask_mov_epi32(neighbors, apart, channel), later, channel, half);
    }
};

// The rows of a head in a block, with a codebook each, or one for all.
template <int bits>
struct Rows {
    const uint8_t *first, *second, *tables;  // the planes
    int table_step;

    Rows(const PackedTensor& side, const Block& block, int head) {
        const int64_t row = int64_t(head) * side.codes;
        first = block.planes[0] + row * bytes(0), second = block.planes[1] + row * bytes(1);
        table_step = side.fixed ? 2 * kLevels : 0, tables = side.int16 + row * table_step;
    }

    static constexpr int bytes(int plane) { return kBlock * kPlanes[bits][plane] / 8; }

    // Codes of 32 tokens of a row.
    template <int half>
    NARROWKV_INLINE __m512i codes(int row) const {
        return join_planes<bits>([&](auto width, auto plane, auto to) NARROWKV_INLINE {
            return RowPlane<width, half, to>::read((plane == 0 ? first : second) + row * bytes(plane));
        });
    }
    // The words of 32 tokens of a row.
    template <int half>
    NARROWKV_INLINE __m512i int16(int row) const {
        return look_up_int16(codes<half>(row), tables + row * table_step);
    }
};

// Run `part`, which is given bits as a type, for keys.
template <typename Part>
inline void by_bits(const PackedTensor& side, const Part& part) {
    if (side.bits == 2) return part(std::integral_constant<int, 2>());
    side.bits == 3 ? part(std::integral_constant<int, 3>()) : part(std::integral_constant<int, 4>());
}

// A pair of channels of 32 tokens as two registers of lanes, rotated by angles, [2][64] cosines and sines, where there are
// such.
template <bool rotated>
NARROWKV_INLINE inline void to_lanes(__m512i x, __m512i y, const int16_t* angles, __m512i& low, __m512i& high) {
    if constexpr (rotated) {
        const __m512i cos = load_int16(angles), sin = load_int16(angles + kBlock);
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
            const int lane = lane_index(token);
            found[token] = lane / 8 * 4 + lane % 4 + (lane % 8 >= 4 ? 16 : 0);
        }
        return found;
    }();
    for (int i = 0; i < 32; i += 16) _mm512_storeu_ps(to + i, _mm512_permutex2var_ps(low, _mm512_load_si512(&order[i]), high));
}

// Queries as lanes, for the first 32 tokens of a block and for the others; from one pair, and one query, to the next.
struct QueryView {
    const int32_t* halves[2];
    int pair_step, query_step;
};

// Add products of queries with 64 tokens over pairs [from, to), the second channel of a pair `apart` from the first, or the
// next one. angles: [pairs][2][64], or null.
template <int queries, bool rotated, typename Keys>
inline void score_rows(const Keys& rows, const QueryView& view, int from, int to, int apart, const int16_t* angles, Prefetcher& prefetcher, __m512i total[][4]) {
    __m512i sums[queries][4];
    each<queries>([&](auto q) NARROWKV_INLINE { each<4>([&](auto i) NARROWKV_INLINE { sums[q][i] = total[q][i]; }); });
    const int pair_step = view.pair_step, query_step = view.query_step;
    for (int first = from; first < to; first += kSteps) {
        prefetcher.step(kSteps);
        for (int pair = first; pair < first + kSteps && pair < to; ++pair) {
            const int x = apart ? pair : 2 * pair, y = apart ? pair + apart : x + 1;
            each<2>([&](auto half) NARROWKV_INLINE {
                __m512i low, high;
                const int16_t* angle = rotated ? angles + 2 * kBlock * pair + 32 * half : nullptr;
                to_lanes<rotated>(rows.template int16<half>(x), rows.template int16<half>(y), angle, low, high);
                const int32_t* query = view.halves[half] + pair * pair_step;
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

}  // namespace
}  // namespace narrowkv
