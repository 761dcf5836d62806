// Two other ways to lay out codes, for scores of keys by additive tables and queries of 8 bits.

#pragma once

#include <array>

#include "scores.h"

namespace cycles {

// Codes of an element for all tokens side by side, [128][64] of k bits; each token's state is carried in a lane. Codes of 3
// bits are a plane of 2 and one of 1.
template <int k>
struct Rows {
    static constexpr int bytes = 8 * k;
    std::vector<uint8_t> memory;

    Rows(int blocks, std::mt19937& random) : memory(size_t(blocks) * kDim * bytes + 64) {
        for (auto& byte : memory) byte = uint8_t(random());
    }
    const uint8_t* row(int block, int element) const { return &memory[(size_t(block) * kDim + element) * bytes]; }

    int code(int block, int element, int token) const {
        const uint8_t* from = row(block, element);
        const auto bit = [&](const uint8_t* plane) { return plane[token / 8] >> token % 8 & 1; };
        if (k == 1) return bit(from);
        if (k == 3) return (from[token % 16] >> token / 16 * 2 & 3) << 1 | bit(from + 16);
        return from[token % bytes] >> token / bytes * k & ((1 << k) - 1);
    }
    int window(int block, int token, int element) const {
        int found = 0;
        for (int e = 0; e <= element; ++e) found = (found << k | code(block, e, token)) & 255;
        return found;
    }
};

// Add a plane's codes to the states: of one bit, of two, of four.
CYCLES_INLINE inline Bytes take_bit(Bytes state, const uint8_t* plane, int part) {
#ifdef __AVX512VBMI__
    uint64_t bits;
    std::memcpy(&bits, plane, 8);
    return sub_8(add_8(state, state), _mm512_movm_epi8(bits));
#else
    int32_t bits;
    std::memcpy(&bits, plane + 4 * part, 4);
    const Bytes order = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const Bytes one = _mm256_set1_epi64x(int64_t(0x8040201008040201)), spread = look_up(all_32(bits), order);
    return sub_8(add_8(state, state), _mm256_cmpeq_epi8(both(spread, one), one));
#endif
}
CYCLES_INLINE inline Bytes take_two(Bytes state, const uint8_t* plane, int part) {
#ifdef __AVX512VBMI__
    const Bytes codes = _mm512_srlv_epi64(broadcast_16(plane), _mm512_setr_epi64(0, 0, 2, 2, 4, 4, 6, 6));
#else
    const Bytes codes = _mm256_srlv_epi64(broadcast_16(plane), _mm256_setr_epi64x(4 * part, 4 * part, 4 * part + 2, 4 * part + 2));
#endif
    return select<3, 255>(codes, left<2>(state));
}
CYCLES_INLINE inline Bytes take_four(Bytes state, const uint8_t* plane, int part) {
#ifdef __AVX512VBMI__
    const Bytes codes = _mm512_srlv_epi64(_mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)plane)), _mm512_setr_epi64(0, 0, 0, 0, 4, 4, 4, 4));
#else
    const Bytes codes = part ? right<4>(load(plane)) : load(plane);
#endif
    return select<15, 255>(codes, left<4>(state));
}

template <int k, int queries>
__attribute__((noinline)) void score_rows(const Rows<k>& rows, int block, const Tables& tables, const Query& query, Sums& sums) {
    std::memset(sums, 0, sizeof sums);
    const Additive<k> table(tables);
    for (int part = 0; part < kParts; ++part) {
        Bytes state = zero();
        for (int unit = 0; unit < kUnits; ++unit) {
            Bytes values[kUnit];
            each<kUnit>([&](auto e) CYCLES_INLINE {
                const uint8_t* row = rows.row(block, unit * kUnit + e);
                if constexpr (k == 4) state = take_four(state, row, part);
                if constexpr (k == 2 || k == 3) state = take_two(state, row, part);
                if constexpr (k == 1 || k == 3) state = take_bit(state, row + (k == 3 ? 16 : 0), part);
                values[e] = table.template value<8>(&state);
            });
            Products8::add<queries>(values, unit, query, part, sums);
        }
    }
}

#ifdef __AVX512VBMI__

// Streams of a token after the other; a register has 64 elements of a token, eight to 64 bits, whose windows `vpmultishiftqb`
// takes out.
template <int k>
struct TokenStreams {
    static constexpr int bytes = 16 * k;  // of a token
    std::vector<uint8_t> memory;          // a byte of zeros before each

    TokenStreams(int blocks, std::mt19937& random) : memory(size_t(blocks) * kTokens * (bytes + 1) + 128) {
        for (auto& byte : memory) byte = uint8_t(random());
        for (size_t i = 0; i < size_t(blocks) * kTokens; ++i) memory[i * (bytes + 1)] = 0;  // the state that a stream starts from
    }
    const uint8_t* token(int block, int token) const { return &memory[(size_t(block) * kTokens + token) * (bytes + 1)]; }

    int window(int block, int token, int element) const {
        int found = 0;
        for (int bit = k * (element + 1); bit < k * (element + 1) + 8; ++bit) found = found << 1 | (this->token(block, token)[bit / 8] >> (7 - bit % 8) & 1);
        return found;
    }
};

// The lanes of 16 registers, added up.
CYCLES_INLINE inline __m512i add_lanes(const __m512i* x) {
    __m512i fours[4];
    each<4>([&](auto i) CYCLES_INLINE {
        const __m512i *a = x + 4 * i;
        const __m512i first = add_32(_mm512_unpacklo_epi32(a[0], a[1]), _mm512_unpackhi_epi32(a[0], a[1]));
        const __m512i second = add_32(_mm512_unpacklo_epi32(a[2], a[3]), _mm512_unpackhi_epi32(a[2], a[3]));
        fours[i] = add_32(_mm512_unpacklo_epi64(first, second), _mm512_unpackhi_epi64(first, second));
    });
    const auto halves = [](__m512i a, __m512i b) CYCLES_INLINE { return add_32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd)); };
    return halves(halves(fours[0], fours[1]), halves(fours[2], fours[3]));
}

template <int k, int queries>
__attribute__((noinline)) void score_tokens(const TokenStreams<k>& streams, int block, const Tables& tables, const Query& query, int32_t (*scores)[kTokens]) {
    alignas(64) static constexpr auto order = [] {  // bytes of a unit and the one before, the first as the highest of 64 bits
        std::array<uint8_t, 64> found{};
        for (int i = 0; i < 64; ++i) found[i] = uint8_t(i / 8 * k + 7 - i % 8);
        return found;
    }();
    alignas(64) static constexpr auto shifts = [] {
        std::array<uint8_t, 64> found{};
        for (int i = 0; i < 64; ++i) found[i] = uint8_t(64 - 8 - k * (i % 8 + 1));
        return found;
    }();
    const Additive<k> table(tables);
    const Bytes low = load(shifts.data()), high = add_8(low, all_8(4)), places = load(order.data());
    for (int token = 0; token < kTokens; token += 16) {
        Bytes values[16][2];
        for (int i = 0; i < 16; ++i) {
            for (int half = 0; half < 2; ++half) {
                const Bytes units = look_up(load(streams.token(block, token + i) + half * 8 * k), places);
                values[i][half] = add_8(look_up(table.high, _mm512_multishift_epi64_epi8(high, units)), look_up(table.low, _mm512_multishift_epi64_epi8(low, units)));
            }
        }
        for (int q = 0; q < queries; ++q) {
            Bytes sums[16];
            const Bytes first = load(query.bytes[q]), second = load(query.bytes[q] + 64);
            each<16>([&](auto i) CYCLES_INLINE { sums[i] = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(zero(), values[i][0], first), values[i][1], second); });
            store(scores[q] + token, add_lanes(sums));
        }
    }
}

#endif

}  // namespace cycles
