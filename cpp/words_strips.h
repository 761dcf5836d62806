// Values whose codebooks are those of channels or of pairs of channels, in words: rows of codes are channels, so products with the
// weights of tokens are added up within a row, and the lanes of a register at the end.

#pragma once

#include "words.h"

namespace narrowkv {
namespace {

// How to read a row of 64 codes from one plane: which eight bytes go where, and by how much their bits turn.
struct Reach {
    __m512i order, turns;
    __mmask8 present;
};

// How to read rows of 64 codes. The eights lie so that `look_up` returns numbers in order: 0 4 1 5 2 6 3 7.
struct Reader {
    int row_bytes[3];
    __m512i low[2];  // bits of a code that come from the planes before the second, and before the third
    Reach reach[3];

    explicit Reader(int bits) {
        for (int plane = 0, shift = 0; plane < 3; shift += kPlanes[bits][plane++]) {
            const int width = kPlanes[bits][plane];
            row_bytes[plane] = kBlock * width / 8;
            if (plane) low[plane - 1] = _mm512_set1_epi8(char((1 << shift) - 1));
            if (width) reach[plane] = find(row_bytes[plane], width, shift);
        }
    }

    static Reach find(int bytes, int width, int shift) {
        alignas(64) int64_t order[8], turns[8];
        for (int k = 0; k < 8; ++k) {
            const int code = 8 * (k % 2 * 4 + k / 2);
            order[k] = code % bytes / 8;
            turns[k] = (64 + width * (code / bytes) - shift) % 64;
        }
        return {_mm512_load_si512(order), _mm512_load_si512(turns), __mmask8((1 << bytes / 8) - 1)};
    }
};

// 64 codes, a byte each, with whatever in the bits above those of a code.
template <int bits>
inline __m512i read_row(const Reader& reader, const uint8_t* const* rows) {
    const auto plane = [&](int i) {
        const Reach& reach = reader.reach[i];
        const __m512i packed = _mm512_maskz_loadu_epi64(reach.present, rows[i]);
        return _mm512_rorv_epi64(_mm512_permutexvar_epi64(reach.order, packed), reach.turns);
    };
    __m512i codes = plane(0);
    if constexpr (kPlanes[bits][1] > 0) codes = _mm512_ternarylogic_epi64(reader.low[0], codes, plane(1), 0xca);
    if constexpr (kPlanes[bits][2] > 0) codes = _mm512_ternarylogic_epi64(reader.low[1], codes, plane(2), 0xca);
    return codes;
}

// One byte of each number: of 16 or 32 levels the codebook is repeated, so bits above those of a code do not matter.
template <int levels>
inline __m512i look_up_bytes(__m512i codes, const uint8_t* table) {
    if constexpr (levels == 16) {
        return _mm512_permutexvar_epi8(codes, _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)table)));
    } else if constexpr (levels == 32) {
        return _mm512_permutexvar_epi8(codes, _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)table)));
    } else if constexpr (levels == 64) {
        return _mm512_permutexvar_epi8(codes, _mm512_loadu_si512(table));
    } else if constexpr (levels == 128) {
        return _mm512_permutex2var_epi8(_mm512_loadu_si512(table), codes, _mm512_loadu_si512(table + 64));
    } else {
        const __m512i low = look_up_bytes<128>(codes, table), high = look_up_bytes<128>(codes, table + 128);
        return _mm512_mask_blend_epi8(_mm512_movepi8_mask(codes), low, high);
    }
}

// 64 numbers in two registers, from a codebook's low bytes and the high bytes that follow them.
template <int levels>
inline void look_up(__m512i codes, const uint8_t* table, int16_t* to) {
    const __m512i low = look_up_bytes<levels>(codes, table), high = look_up_bytes<levels>(codes, table + levels);
    store_words(to, _mm512_unpacklo_epi8(low, high));
    store_words(to + 32, _mm512_unpackhi_epi8(low, high));
}

// Rows of codes as rows of words, `stride` apart; of pairs the second numbers `other` words further on.
struct Rows {
    const uint8_t* planes[3];
    const uint8_t* table;
    int table_step, count, stride, other;
    int16_t* tile;
};

template <int bits, int numbers>
void look_up_rows(const Reader& reader, Rows rows) {
    constexpr int levels = kept_levels(bits);
    for (int i = 0; i < rows.count; ++i, rows.table += rows.table_step, rows.tile += rows.stride) {
        const __m512i codes = read_row<bits>(reader, rows.planes);
        look_up<levels>(codes, rows.table, rows.tile);
        if constexpr (numbers == 2) look_up<levels>(codes, rows.table + 2 * levels, rows.tile + rows.other);
        for (int plane = 0; plane < 3; ++plane) rows.planes[plane] += reader.row_bytes[plane];
    }
}

inline void look_up_rows(const Side& side, const Reader& reader, const Rows& rows) {
    const auto run = [&](auto one, auto two) { (side.numbers == 2 ? two : one)(reader, rows); };
    switch (side.bits) {
        case 2: return run(look_up_rows<2, 1>, look_up_rows<2, 2>);
        case 3: return run(look_up_rows<3, 1>, look_up_rows<3, 2>);
        case 4: return run(look_up_rows<4, 1>, look_up_rows<4, 2>);
        case 5: return run(look_up_rows<5, 1>, look_up_rows<5, 2>);
        case 6: return run(look_up_rows<6, 1>, look_up_rows<6, 2>);
        case 7: return run(look_up_rows<7, 1>, look_up_rows<7, 2>);
        default: return run(look_up_rows<8, 1>, look_up_rows<8, 2>);
    }
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

// Sums over `length` tokens of a strip, [channels][stride], of its channels times the weights of each query, as [channels][queries].
template <int queries>
inline void mix_strip(const int16_t* weights, int weights_stride, const int16_t* tile, int stride, int length, __m512i& sums) {
    constexpr int channels = 16 / queries;
    __m512i all[16] = {};
    for (int token = 0; token < length; token += 32) {
        __m512i weight[queries];
        each<queries>([&](auto q) NARROWKV_INLINE { weight[q] = load_words(weights + q * weights_stride + token); });
        each<channels>([&](auto channel) NARROWKV_INLINE {
            const __m512i x = load_words(tile + channel * stride + token);
            each<queries>([&](auto q) NARROWKV_INLINE {
                all[channel * queries + q] = _mm512_dpwssd_epi32(all[channel * queries + q], x, weight[q]);
            });
        });
    }
    sums = sum_lanes(all);
}

}  // namespace
}  // namespace narrowkv
