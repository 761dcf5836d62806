// Sums of values in trellis-coded streams, by weights of 16 bits, with AVX2: grid steps of even tokens and of odd ones become
// words, two of which meet two weights in a lane of 32 bits.

#pragma once

#include "int16_worker.h"
#include "stream_values.h"

namespace narrowkv {
namespace {

// Eight registers of lanes, each added up: of a span no sum exceeds 512 * 2^15 * 2^7.
inline Floats add_lanes(const __m256i* x) {
    const auto fours = [](const __m256i* x) { return _mm256_hadd_epi32(_mm256_hadd_epi32(x[0], x[1]), _mm256_hadd_epi32(x[2], x[3])); };
    const __m256i first = fours(x), second = fours(x + 4);
    return Floats(_mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_permute2x128_si256(first, second, 0x20), _mm256_permute2x128_si256(first, second, 0x31))));
}

class Avx2StreamValues {
  public:
    static constexpr int span = kMostSpan;

    explicit Avx2StreamValues(const Problem& problem)
        : side(problem.values), streams(*side.streams), rows(problem.group * problem.queries), dim(problem.head_dim), words(rows * span),
          weights(rows * span), norms(span), shares(rows), sums(rows * dim) {
        by_units(streams, [&](auto k, int row, int) {
            for (int i = 1; i <= kUnit; ++i) {
                const int end = row * 8 + k * i, last = (end - 1) / 8;
                ends.push_back({k, last * kBlock, 8 * last + 8 - end});
            }
        });
    }

    void begin(int of_head) {
        head = of_head;
        std::fill(sums.begin(), sums.end(), 0.0f);
    }

    int steps() const { return streams.coded() / kUnit; }  // of `prefetcher`, for a block

    // Add a span's values: weight is [rows][span] float32, and what was added up before fades by `rescale` of each row.
    void add(const Span& span, const float* weight, const float* rescale, Prefetcher& prefetcher) {
        const uint8_t* codes[blocks] = {};
        const int count = span.length / kBlock;
        span.find_values(streams, head, codes);
        quantize_weights(codes, count, weight);
        by_units(streams, [&](auto k, int row, int unit) NARROWKV_INLINE {
            alignas(64) int8_t tile[blocks][kUnit * kBlock];  // [32 tokens] of each coefficient, then of the next tokens
            for (int i = 0; i < count; ++i) {
                if (!codes[i]) std::memset(tile[i], 0, sizeof tile[i]);
                else decode_unit<k>(streams, codes[i], row, AsTheyLie(), [&](auto coefficient, int token, Lanes value) NARROWKV_INLINE {
                    store_words(tile[i] + coefficient * kLanes + token * kUnit, __m256i(value));
                });
            }
            prefetcher.step(count);
            by_many<4>(rows, [&](int first, auto queries) { mix_unit<queries>(tile[0], count * kBlock, first, rescale, &sums[first * dim + unit * kUnit]); });
        });
        for (int i = 0; i < count; ++i) {
            if (codes[i]) add_outliers(span.sides[i][1], codes[i], &weights[i * kBlock]);
        }
    }

    // The sums, [rows][head_dim].
    void finish(float* to) const { std::copy(sums.begin(), sums.end(), to); }

  private:
    static constexpr int blocks = kMostSpan / kBlock, kWords = 16;  // kWords: of a register

    // Where the bits of a coefficient end: in which row of codes, and above how many others.
    struct End {
        int rate, row, above;
    };

    const PackedTensor& side;
    const Streams& streams;
    const int rows, dim;
    Buffer<int16_t> words;          // [rows][span]: weights, of 32 tokens those of even ones first
    Buffer<float> weights;          // [rows][span], times norms
    Buffer<float> norms, shares, sums;  // shares: what a sum of 1 stands for
    std::vector<End> ends;          // [coded]
    Misses misses;
    int head = 0;

    void quantize_weights(const uint8_t* const* codes, int count, const float* weight) {
        std::fill(norms.begin(), norms.end(), 1.0f);
        for (int i = 0; i < count; ++i) {
            if (!codes[i] || !streams.norms) continue;
            const uint8_t* from = codes[i] + (streams.bytes - 1) * kBlock;
            for (int token = 0; token < kBlock; ++token) norms[i * kBlock + token] = narrowkv::norms()[from[token]];
        }
        for (int row = 0; row < rows; ++row) {
            float* to = &weights[row * span];
            Floats largest = {};
            for (int i = 0; i < count * kBlock; i += simd::width) {
                const Floats x = load(weight + row * span + i) * load(&norms[i]);
                largest = x > largest ? x : largest;
                store(to + i, x);
            }
            float most = 0.0f;
            for (int lane = 0; lane < simd::width; ++lane) most = std::max(most, largest[lane]);
            const float factor = most > 0.0f ? std::min(kMaxInt16 / most, 1e38f) : 0.0f;
            shares[row] = factor > 0.0f ? 1.0f / factor : 0.0f;
            for (int i = 0; i < count * kBlock; i += 32) to_words(to + i, factor, &words[row * span + i]);
        }
    }

    // Weights of 32 tokens as words, those of even ones first.
    static void to_words(const float* weights, float factor, int16_t* to) {
        const __m256i order = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
        const auto eight = [&](int i) { return _mm256_cvtps_epi32(__m256(load(weights + i) * factor)); };
        const auto sixteen = [&](int i) {  // of each eight the even ones first
            return _mm256_shuffle_epi8(_mm256_permute4x64_epi64(_mm256_packs_epi32(eight(i), eight(i + 8)), 0xd8), order);
        };
        const __m256i first = sixteen(0), second = sixteen(16);
        store_words(to, _mm256_permute4x64_epi64(_mm256_unpacklo_epi64(first, second), 0xd8));
        store_words(to + kWords, _mm256_permute4x64_epi64(_mm256_unpackhi_epi64(first, second), 0xd8));
    }

    // Add a unit of some tokens, tile [tokens / 32][8][32], to sums [queries][dim].
    template <int queries>
    void mix_unit(const int8_t* tile, int tokens, int first, const float* rescale, float* to) const {
        __m256i found[queries][kUnit];
        each<kUnit / 2>([&](auto pair) NARROWKV_INLINE {
            __m256i sums[queries][2] = {};
            const int8_t* from = tile + 2 * pair * kLanes;
            const int16_t *by = &words[first * span], *end = by + tokens;
            for (; by < end; by += kLanes, from += kUnit * kLanes) mix_two<queries>(from, by, sums);  // more at once GCC would put by
            each<queries>([&](auto q) NARROWKV_INLINE { each<2>([&](auto i) NARROWKV_INLINE { found[q][2 * pair + i] = sums[q][i]; }); });
        });
        each<queries>([&](auto q) NARROWKV_INLINE {
            store(to + q * dim, load(to + q * dim) * rescale[first + q] + add_lanes(found[q]) * shares[first + q]);
        });
    }

    // Add two coefficients of 32 tokens, [2][32], to sums of some queries, whose words are [queries][span].
    template <int queries>
    NARROWKV_INLINE static void mix_two(const int8_t* tile, const int16_t* words, __m256i (*sums)[2]) {
        __m256i values[2][2];
        each<2>([&](auto i) NARROWKV_INLINE {
            const __m256i x = load_words(tile + i * kLanes);
            values[i][0] = _mm256_maddubs_epi16(_mm256_set1_epi16(1), x), values[i][1] = _mm256_srai_epi16(x, 8);
        });
        each<queries>([&](auto q) NARROWKV_INLINE {
            each<2>([&](auto odd) NARROWKV_INLINE {
                const __m256i by = load_words(words + q * span + odd * kWords);
                each<2>([&](auto i) NARROWKV_INLINE { sums[q][i] = _mm256_add_epi32(sums[q][i], _mm256_madd_epi16(values[i][odd], by)); });
            });
        });
    }

    void add_outliers(const Block& block, const uint8_t* codes, const float* weights) {
        misses.of_block(side, block, head, [&](int coefficient, int token) { return decoded(codes, coefficient, token); });
        for (const Miss& miss : misses) {
            for (int row = 0; row < rows; ++row) sums[row * dim + miss.coefficient] += weights[row * span + miss.token] * miss.by;
        }
    }

    int8_t decoded(const uint8_t* codes, int coefficient, int token) const {
        const auto& [rate, row, above] = ends[coefficient];
        const int two = (row ? codes[row - kBlock + token] << 8 : 0) | codes[row + token];
        return decode_state(streams, rate, two >> above & 255);
    }
};

}  // namespace
}  // namespace narrowkv
