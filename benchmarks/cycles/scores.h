// Scores: products of queries with the keys of a block, in three arithmetics, and in 16 bits after a rotation of each pair.
//
// Elements are decoded a unit at a time for the tokens of a register, and multiplied with all queries of the group while they
// are in registers or on the stack. Sums stay in the order that the instructions give; `token_of` tells which token a sum is
// of.

#pragma once

#include <cmath>

#include "decode.h"

namespace cycles {

constexpr int kMostQueries = 8;

// Queries as each arithmetic wants them, for a unit at [query][unit]; and the angles of the rotation.
struct Query {
    alignas(64) int8_t bytes[kMostQueries][kDim];    // |q| summed over a unit is at most 258, so that sums of 16 bits are exact
    alignas(64) int32_t twice[kMostQueries][kDim / 2];  // two of them, twice
    alignas(64) int32_t int16[kMostQueries][kDim / 2];  // pairs of 16 bits
    alignas(64) float floats[kMostQueries][kDim];
    alignas(64) int32_t scale_weights[kDim];               // what whitening took from a channel, a byte, in the lowest of 32 bits and the third
    alignas(64) int16_t angles[kDim / 2][kParts][2][2][kLanes / 2];  // [pair][part][cosine, sine][even tokens, odd ones]
};

inline Query draw_query(std::mt19937& random) {
    Query query;
    const auto draw = [&](int most) { return int(random() % (2 * most + 1)) - most; };
    for (int q = 0; q < kMostQueries; ++q) {
        for (int d = 0; d < kDim; ++d) query.bytes[q][d] = int8_t(draw(32)), query.floats[q][d] = query.bytes[q][d] / 32.0f;
        for (int pair = 0; pair < kDim / 2; ++pair) {
            uint8_t two[2];
            std::memcpy(two, &query.bytes[q][2 * pair], 2);
            query.twice[q][pair] = int32_t((two[0] | two[1] << 8) * 0x10001u);
            query.int16[q][pair] = int32_t(uint32_t(uint16_t(draw(500))) | uint32_t(draw(500)) << 16);
        }
    }
    for (int d = 0; d < kDim; ++d) {
        const int by = 128 + random() % 128;
        query.scale_weights[d] = by | by << 16;
    }
    for (int pair = 0; pair < kDim / 2; ++pair) {
        for (int token = 0; token < kTokens; ++token) {
            const double angle = token * std::pow(1e4, -pair / 64.0);
            auto& to = query.angles[pair][token / kLanes];
            to[0][token % 2][token % kLanes / 2] = int16_t(std::lrint(32767 * std::cos(angle)));
            to[1][token % 2][token % kLanes / 2] = int16_t(std::lrint(32767 * std::sin(angle)));
        }
    }
    return query;
}

using Sums = int32_t[kMostQueries][kParts][4][kNumbers];

// Values in 0 .. 127 times queries of 8 bits.
struct Products8 {
    static constexpr const char* name = "int8 query";
    template <int queries>
    CYCLES_INLINE static void add(const Bytes* values, int unit, const Query& query, int part, Sums& sums) {
        Bytes neighbors[kUnit];  // (even element, odd element) of half the tokens
        each<4>([&](auto i) CYCLES_INLINE {
            neighbors[2 * i] = unpack_low_8(values[2 * i], values[2 * i + 1]), neighbors[2 * i + 1] = unpack_high_8(values[2 * i], values[2 * i + 1]);
        });
#ifdef __AVX512VBMI__
        Bytes fours[kUnit];  // four elements of a token side by side
        each<2>([&](auto i) CYCLES_INLINE {
            const Bytes* x = neighbors + 4 * i;
            fours[4 * i] = unpack_low_16(x[0], x[2]), fours[4 * i + 1] = unpack_high_16(x[0], x[2]);
            fours[4 * i + 2] = unpack_low_16(x[1], x[3]), fours[4 * i + 3] = unpack_high_16(x[1], x[3]);
        });
        for (int q = 0; q < queries; ++q) {
            int32_t asked[2];
            std::memcpy(asked, &query.bytes[q][unit * kUnit], 8);
            each<4>([&](auto i) CYCLES_INLINE {
                const Bytes sum = _mm512_dpbusd_epi32(load(sums[q][part][i]), fours[i], all_32(asked[0]));
                store(sums[q][part][i], _mm512_dpbusd_epi32(sum, fours[4 + i], all_32(asked[1])));
            });
        }
#else
        const Bytes even = all_32(1), odd = all_32(1 << 16);
        for (int q = 0; q < queries; ++q) {
            each<2>([&](auto half) CYCLES_INLINE {
                Bytes sum = zero();  // of the unit, in 16 bits
                each<4>([&](auto i) CYCLES_INLINE { sum = add_16(sum, multiply_bytes(neighbors[2 * i + half], all_32(query.twice[q][unit * 4 + i]))); });
                int32_t* to = sums[q][part][2 * half];
                store(to, add_products_16(load(to), sum, even)), store(to + kNumbers, add_products_16(load(to + kNumbers), sum, odd));
            });
        }
#endif
    }
    static int token_of(int part, int i, int lane) {
#ifdef __AVX512VBMI__
        return 16 * (lane / 4) + 4 * i + lane % 4;
#else
        return 32 * part + 16 * (lane / 4) + 8 * (i / 2) + lane % 4 * 2 + i % 2;
#endif
    }
    static double reference(const Query& query, int q, int element, double value, int) { return query.bytes[q][element] * value; }
};

// Pairs of 16 bits, (even element, odd element), times queries of 16 bits; values are signed bytes, taken 256 times.
struct Products16 {
    static constexpr const char* name = "int16 query";
    template <int queries>
    CYCLES_INLINE static void multiply(const Bytes* pairs, int unit, const Query& query, int part, Sums& sums) {
        for (int q = 0; q < queries; ++q) {
            each<4>([&](auto i) CYCLES_INLINE {
                Bytes sum = load(sums[q][part][i]);
                each<4>([&](auto pair) CYCLES_INLINE { sum = add_products_16(sum, pairs[4 * pair + i], all_32(query.int16[q][unit * 4 + pair])); });
                store(sums[q][part][i], sum);
            });
        }
    }
    template <int queries>
    CYCLES_INLINE static void add(const Bytes* values, int unit, const Query& query, int part, Sums& sums) {
        Bytes pairs[16];
        each<4>([&](auto i) CYCLES_INLINE {
            const Bytes low = unpack_low_8(values[2 * i], values[2 * i + 1]), high = unpack_high_8(values[2 * i], values[2 * i + 1]);
            pairs[4 * i] = unpack_low_8(zero(), low), pairs[4 * i + 1] = unpack_high_8(zero(), low);
            pairs[4 * i + 2] = unpack_low_8(zero(), high), pairs[4 * i + 3] = unpack_high_8(zero(), high);
        });
        multiply<queries>(pairs, unit, query, part, sums);
    }
    static int token_of(int part, int i, int lane) { return kLanes * part + 16 * (lane / 4) + 4 * i + lane % 4; }
    static double reference(const Query& query, int q, int element, double value, int) {
        int16_t pair[2];
        std::memcpy(pair, &query.int16[q][element / 2], 4);
        return 256.0 * pair[element % 2] * value;
    }
};

// The same after each pair of elements was stretched and rotated by its token's angle, as keys before the rotary embedding
// need it.
struct Turned16 {
    static constexpr const char* name = "int16 query, rotated keys";
    template <int queries>
    CYCLES_INLINE static void add(const Bytes* values, int unit, const Query& query, int part, Sums& sums) {
        Bytes pairs[16];
        each<4>([&](auto i) CYCLES_INLINE {
            const int pair = unit * 4 + i;
            const Bytes x = values[2 * i], y = values[2 * i + 1];
            each<2>([&](auto odd) CYCLES_INLINE {  // tokens 0, 2, 4, ..., then 1, 3, 5, ...
                const Bytes a = multiply_bytes(all_32(query.scale_weights[2 * pair] << 8 * odd), x), b = multiply_bytes(all_32(query.scale_weights[2 * pair + 1] << 8 * odd), y);
                const Bytes cos = load(query.angles[pair][part][0][odd]), sin = load(query.angles[pair][part][1][odd]);
                const Bytes first = sub_16(multiply_rounded(a, cos), multiply_rounded(b, sin));
                const Bytes second = add_16(multiply_rounded(a, sin), multiply_rounded(b, cos));
                pairs[4 * i + 2 * odd] = unpack_low_16(first, second), pairs[4 * i + 2 * odd + 1] = unpack_high_16(first, second);
            });
        });
        Products16::multiply<queries>(pairs, unit, query, part, sums);
    }
    static int token_of(int part, int i, int lane) { return kLanes * part + 16 * (lane / 4) + i % 2 * 8 + lane % 4 * 2 + i / 2; }
};

// Values as float32, eight or sixteen tokens to a register; sums are float32 in the same place.
struct ProductsFloat {
    static constexpr const char* name = "float32";
    template <int queries>
    CYCLES_INLINE static void add(const Bytes* values, int unit, const Query& query, int part, Sums& sums) {
        alignas(64) int8_t bytes[kUnit][kLanes];
        Floats elements[kUnit][4];
        each<kUnit>([&](auto e) CYCLES_INLINE { store(bytes[e], values[e]); });
        each<kUnit>([&](auto e) CYCLES_INLINE { each<4>([&](auto i) CYCLES_INLINE { elements[e][i] = to_floats(bytes[e] + i * kNumbers); }); });
        for (int q = 0; q < queries; ++q) {
            each<4>([&](auto i) CYCLES_INLINE {
                float* to = (float*)sums[q][part][i];
                Floats sum = load_floats(to);
                each<kUnit>([&](auto e) CYCLES_INLINE { sum = add_products(elements[e][i], all_floats(query.floats[q][unit * kUnit + e]), sum); });
                store_floats(to, sum);
            });
        }
    }
    static int token_of(int part, int i, int lane) { return kLanes * part + i * kNumbers + lane; }
    static double reference(const Query& query, int q, int element, double value, int) { return query.floats[q][element] * value; }
};

// Scores of a block. Keys of its first `rotated` units are rotated, which makes sums of their own; the others are multiplied
// by `Still`. tables: of the others, and of rotated keys.
template <template <int> class Table, typename Still, int queries>
__attribute__((noinline)) void score(const Streams& streams, int block, const Tables* tables, const Query& query, int rotated, Sums* sums) {
    std::memset(sums, 0, sizeof sums[0]);
    if (rotated) std::memset(sums + 1, 0, sizeof sums[1]);
    for (int part = 0; part < kParts; ++part) {
        const uint8_t* from = streams.block(block) + part * kLanes;
        for (int unit = 0; unit < kUnits; ++unit) {
            by_rate(streams.rates[unit], [&](auto k) CYCLES_INLINE {
                Bytes values[kUnit];
                decode_unit<k>(from, Table<k>(tables[unit < rotated]), values);
                if (unit < rotated) Turned16::add<queries>(values, unit, query, part, sums[1]);
                else Still::template add<queries>(values, unit, query, part, sums[0]);
                from += k * kTokens;
            });
        }
    }
}

}  // namespace cycles
