// What is there today, at equal bits: codes of pairs of channels, read by the package's own inner loops.

#pragma once

#include "clock.h"
#include "form.h"

#ifdef __AVX512VBMI__
#include "../../cpp/avx512.h"
#include "../../cpp/words_keys.h"
#else
#include "../../cpp/avx2.cpp"
#endif

namespace cycles {

constexpr int kPairs = kDim / 2, kPairBlocks = 16, kPairSpan = 4;

// Codes of pairs and their codebooks as the kernels read them, random, and what they stand for.
template <int bits>
struct PairCodes {
    static constexpr int levels = 1 << bits;
    std::vector<uint8_t> planes[3];
    alignas(64) int16_t words[kPairs][2][levels];
    alignas(64) float floats[kPairs][2][levels < 16 ? 16 : levels];
    std::vector<float> laid_out;
    narrowkv::Side side{};
    narrowkv::Block blocks[kPairBlocks] = {};

    explicit PairCodes(std::mt19937& random) {
        for (int plane = 0; plane < 3; ++plane) {
            const int width = narrowkv::kPlanes[bits][plane], bytes = kPairs * 64 * width / 8;
            planes[plane].resize(size_t(bytes) * kPairBlocks + 64);
            for (auto& byte : planes[plane]) byte = uint8_t(random());
            for (int i = 0; i < kPairBlocks; ++i) blocks[i].planes[plane] = &planes[plane][size_t(i) * bytes];
        }
        for (auto& pair : words) for (auto& number : pair) for (auto& word : number) word = int16_t(int(random() % 8191) - 4095);
        for (int i = 0; i < kPairs * 2; ++i) std::copy(words[i / 2][i % 2], words[i / 2][i % 2] + levels, floats[i / 2][i % 2]);
        side.bits = bits, side.codes = kPairs, side.numbers = 2, side.stride = levels, side.channel_major = side.fixed = true;
        side.words = (const uint8_t*)words, side.table = floats[0][0];
        laid_out.resize(kPairs * 2 * levels);
    }
    int code(int block, int pair, int token) const {
        int found = 0;
        for (int plane = 0, shift = 0; plane < 3 && narrowkv::kPlanes[bits][plane]; shift += narrowkv::kPlanes[bits][plane++]) {
            const int width = narrowkv::kPlanes[bits][plane], bytes = 64 * width / 8;
            found |= (blocks[block].planes[plane][pair * bytes + token % bytes] >> token / bytes * width & ((1 << width) - 1)) << shift;
        }
        return found;
    }
    double value(int block, int pair, int number, int token) const { return words[pair][number][code(block, pair, token)]; }
};

// Angles and queries, as words and as float32.
struct PairQuery {
    alignas(64) int16_t angles[kPairs][2][64];
    alignas(64) float near[2][kPairs][2][32];  // of the first 32 tokens, and of the others
    alignas(64) int32_t words[kPairs][8];
    alignas(64) float floats[8][kDim];
    alignas(64) int16_t weights[8][kPairSpan * 64];
    alignas(64) float float_weights[8][64];

    explicit PairQuery(std::mt19937& random) {
        const auto draw = [&] { return int(random() % 201) - 100; };
        for (int pair = 0; pair < kPairs; ++pair) {
            for (int token = 0; token < 64; ++token) {
                const double angle = token * std::pow(1e4, -pair / 64.0);
                const int place = token / 32 * 32 + token % 32 / 2 + token % 2 * 16;  // even tokens first
                angles[pair][0][place] = int16_t(std::lrint(32767 * std::cos(angle))), angles[pair][1][place] = int16_t(std::lrint(32767 * std::sin(angle)));
                near[token / 32][pair][0][token % 32] = float(std::cos(angle)), near[token / 32][pair][1][token % 32] = float(std::sin(angle));
            }
            for (int q = 0; q < 8; ++q) {
                const int x = draw(), y = draw();
                words[pair][q] = int32_t(uint32_t(uint16_t(x)) | uint32_t(y) << 16);
                floats[q][pair] = float(x), floats[q][pair + kPairs] = float(y);
            }
        }
        for (auto& row : weights) for (auto& weight : row) weight = int16_t(random() % 256);
        for (int q = 0; q < 8; ++q) for (int t = 0; t < 64; ++t) float_weights[q][t] = weights[q][t];
    }
    static int token_at(int place) { return place / 32 * 32 + place % 16 * 2 + place % 32 / 16; }
};

#ifdef __AVX512VBMI__

// Keys and values of pairs in words of 16 bits, four query heads at a time, as `words_keys.h` and `words_values.h` do it.
template <int bits, int queries, bool turned>
__attribute__((noinline)) void score_pairs(const PairCodes<bits>& codes, int block, const PairQuery& query, float (*scores)[64]) {
    constexpr int some = queries < 4 ? queries : 4;
    narrowkv::Ahead ahead;
    for (int q = 0; q < queries; q += some) {
        __m512i sums[some][4] = {};
        const narrowkv::Rows<bits, 2> rows(codes.side, codes.blocks[block], 0);
        const narrowkv::Asked asked{{&query.words[0][q], &query.words[0][q]}, 8, 1};
        narrowkv::score_rows<some, turned>(rows, asked, 0, kPairs, kPairs, query.angles[0][0], ahead, sums);
        for (int i = 0; i < some; ++i) {
            for (int half = 0; half < 2; ++half) {
                narrowkv::order_sums(_mm512_cvtepi32_ps(sums[i][2 * half]), _mm512_cvtepi32_ps(sums[i][2 * half + 1]), scores[q + i] + 32 * half);
            }
        }
    }
}

template <int bits, int queries>
__attribute__((noinline)) void mix_pairs(const PairCodes<bits>& codes, int block, const PairQuery& query, float* mixed) {
    constexpr int some = queries < 4 ? queries : 4, together = 16 / some / 2;
    std::vector<narrowkv::Rows<bits, 2>> rows;
    const narrowkv::Rows<bits, 2>* blocks[kPairSpan];
    rows.reserve(kPairSpan);
    for (int i = 0; i < kPairSpan; ++i) rows.emplace_back(codes.side, codes.blocks[block + i], 0), blocks[i] = &rows[i];
    for (int q = 0; q < queries; q += some) {
        for (int pair = 0; pair < kPairs; pair += together) {
            float* to = mixed + q * kDim + pair * 2 * some;
            const __m512i found = narrowkv::mix_rows<some>(blocks, kPairSpan, pair, kPairs - 1, query.weights[q], kPairSpan * 64);
            _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), _mm512_cvtepi32_ps(found)));
        }
    }
}
// Where it puts the sum of a query and an element of a pair, and the token that the weight at a place is of.
template <int queries>
int mixed_at(int q, int pair, int number) {
    constexpr int some = queries < 4 ? queries : 4;
    return q / some * some * kDim + (pair * 2 + number) * some + q % some;
}
inline int weighed_token(int place) { return PairQuery::token_at(place); }
constexpr const char* kPairsName = "pair codes, int16";

#else

// Keys and values of pairs in float32 through a tile, as `kernel.h` does it.
template <int bits, int queries, bool turned>
__attribute__((noinline)) void score_pairs(const PairCodes<bits>& codes, int block, const PairQuery& query, float (*scores)[64]) {
    alignas(64) static float tile[kDim * narrowkv::kTurned], ranges[64];
    constexpr int some = queries < 4 ? queries : 4;
    const float* tables = narrowkv::tables_of(codes.side, 0, const_cast<float*>(codes.laid_out.data()));
    narrowkv::Source source(codes.side, codes.blocks[block], codes.blocks[block], tables, 0, kDim);
    for (int from = 0; from < 64; from += 32) {
        narrowkv::decode(source, {from, 32}, ranges, tile);
        if (turned) narrowkv::turn(tile, query.near[from / 32][0][0], kPairs, false);
        for (int q = 0; q < queries; q += some) narrowkv::score<some>(query.floats[q], tile, kDim, scores[q] + from);
    }
}

template <int bits, int queries>
__attribute__((noinline)) void mix_pairs(const PairCodes<bits>& codes, int block, const PairQuery& query, float* mixed) {
    alignas(64) static float tile[kDim * 64], ranges[64];
    constexpr int some = queries < 4 ? queries : 4;
    const float* tables = narrowkv::tables_of(codes.side, 0, const_cast<float*>(codes.laid_out.data()));
    for (int i = 0; i < kPairSpan; ++i) {
        narrowkv::Source source(codes.side, codes.blocks[block + i], codes.blocks[block + i], tables, 0, kDim);
        narrowkv::decode(source, {0, 64}, ranges, tile);
        for (int q = 0; q < queries; q += some) narrowkv::mix_channels<some>(query.float_weights[q], tile, kDim, mixed + q * kDim * 8);
    }
}
template <int queries>
int mixed_at(int q, int pair, int number) { return (q * kDim + number * kPairs + pair) * 8; }
inline int weighed_token(int place) { return place; }
constexpr const char* kPairsName = "pair codes, float32";

#endif

template <int bits, int queries, bool turned>
void time_pair_scores(const PairCodes<bits>& codes, const PairQuery& query) {
    const Row row{"scores", std::string(kPairsName) + (turned ? ", rotated" : ""), "all " + std::to_string(bits / 2), queries};
    alignas(64) static float scores[8][64];
    score_pairs<bits, queries, turned>(codes, 1, query, scores);
    for (int q = 0; q < queries; ++q) {
        for (int token = 0; token < 64; ++token) {
            double expected = 0;
            for (int pair = 0; pair < kPairs; ++pair) {
                const double x = codes.value(1, pair, 0, token), y = codes.value(1, pair, 1, token), angle = turned ? token * std::pow(1e4, -pair / 64.0) : 0;
                expected += query.floats[q][pair] * (x * std::cos(angle) - y * std::sin(angle));
                expected += query.floats[q][pair + kPairs] * (x * std::sin(angle) + y * std::cos(angle));
            }
            require(close(scores[q][token], expected, turned ? 2.0 * 100 * 64 * 2 : 64), row);
        }
    }
    print(row, nanoseconds([&](int i) { score_pairs<bits, queries, turned>(codes, i % kPairBlocks, query, scores); }, kPairBlocks) / 64);
}

template <int bits, int queries>
void time_pair_values(const PairCodes<bits>& codes, const PairQuery& query) {
    const Row row{"values", kPairsName, "all " + std::to_string(bits / 2), queries};
    alignas(64) static float mixed[8 * kDim * 8];
    std::memset(mixed, 0, sizeof mixed);
    mix_pairs<bits, queries>(codes, 4, query, mixed);
    for (int q = 0; q < queries; ++q) {
        for (int at = 0; at < kDim; ++at) {
            double expected = 0, found = 0;
            for (int place = 0; place < kPairSpan * 64; ++place) {
                const int block = place / 64, token = weighed_token(place % 64);
                const double weight = kParts == 1 ? query.weights[q][place] : query.float_weights[q][place % 64];
                expected += weight * codes.value(4 + block, at / 2, at % 2, token);
            }
            for (int lane = 0; lane < (kParts == 1 ? 1 : 8); ++lane) found += mixed[mixed_at<queries>(q, at / 2, at % 2) + lane];
            require(close(found, expected, 1e-4 * 256 * 256 * 4096 / 16), row);
        }
    }
    print(row, nanoseconds([&](int i) { mix_pairs<bits, queries>(codes, i * kPairSpan % kPairBlocks, query, mixed); }, kPairBlocks / kPairSpan) / 64 / kPairSpan);
}

template <int bits>
void time_pairs(std::mt19937& random) {
    static const PairCodes<bits> codes(random);
    static const PairQuery query(random);
    const auto by_queries = [&](auto queries) {
        time_pair_scores<bits, queries, false>(codes, query);
        time_pair_scores<bits, queries, true>(codes, query);
        time_pair_values<bits, queries>(codes, query);
    };
    by_queries(std::integral_constant<int, 1>()), by_queries(std::integral_constant<int, 2>());
    by_queries(std::integral_constant<int, 4>()), by_queries(std::integral_constant<int, 8>());
}

}  // namespace cycles
