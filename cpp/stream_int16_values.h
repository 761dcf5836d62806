// Sums of values in trellis-coded streams, by weights of 16 bits: grid steps, a byte each, times the higher bytes of weights,
// then the lower.

#pragma once

#include "stream_values.h"
#include "int16_values.h"

namespace narrowkv {
namespace {


// Eight registers of lanes, each added up.
inline __m256 add_lanes(const __m512i* x) {
    __m512i twos[4], fours[2];
    each<4>([&](auto i) NARROWKV_INLINE {
        twos[i] = _mm512_add_epi32(_mm512_unpacklo_epi32(x[2 * i], x[2 * i + 1]), _mm512_unpackhi_epi32(x[2 * i], x[2 * i + 1]));
    });
    each<2>([&](auto i) NARROWKV_INLINE {
        fours[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(twos[2 * i], twos[2 * i + 1]), _mm512_unpackhi_epi64(twos[2 * i], twos[2 * i + 1]));
    });
    const auto halves = [](__m512i x) {  // the sum of all might not fit a lane
        const __m512 elements = _mm512_cvtepi32_ps(x);
        return _mm512_castps512_ps256(elements) + _mm512_extractf32x8_ps(elements, 1);
    };
    const __m256 first = halves(fours[0]), second = halves(fours[1]);
    return _mm256_permute2f128_ps(first, second, 0x20) + _mm256_permute2f128_ps(first, second, 0x31);
}

class Int16StreamValues {
  public:
    static constexpr int span = kMostSpan;

    explicit Int16StreamValues(const Problem& problem)
        : side(problem.values), streams(*side.streams), rows(problem.group * problem.queries), dim(problem.head_dim), bytes(2 * rows * kMostSpan),
          weights(rows * kMostSpan), norms(kMostSpan), shares(rows), sums(rows * dim), apart(round_up(rows, 4) * kMostSpan), more(round_up(rows, 4) * dim),
          high(2 * kBlock), low(2 * kBlock) {
        by_units(streams, [&](auto k, int row, int) {
            for (int i = 1; i <= kUnit; ++i) rates.push_back(k - 1), ends.push_back(row * 8 + k * i);
        });
        std::copy_n(streams.high, kMostRate * 16, high.begin()), std::copy_n(streams.low, kMostRate * 16, low.begin());
        for (int i = 0; i < 16; ++i) sixteenths[i] = std::exp2(i / 16.0f);
    }

    void begin(int head) {
        this->head = head;
        std::fill(sums.begin(), sums.end(), 0.0f), std::fill(more.begin(), more.end(), 0.0f);
    }

    int steps() const { return streams.coded() / kUnit; }  // of `prefetcher`, for a block

    // Add a span's values: weight is [rows][span] float32, and what was added up before fades by `rescale` of each row.
    void add(const Span& span, const float* weight, const float* rescale, Prefetcher& prefetcher) {
        const uint8_t* codes[blocks] = {};
        const int count = span.length / kBlock;
        span.find_values(streams, head, codes);
        weigh_in_bytes(codes, count, weight);
        bool outliers = false;  // before the sums, so that these need not wait for them
        for (int i = 0; i < count; ++i) {
            differences[i].count = 0;
            if (codes[i] && span.sides[i][1].outlier_offsets) outliers = true, read_outliers(span.sides[i][1], codes[i], differences[i]);
        }
        by_units(streams, [&](auto k, int row, int unit) NARROWKV_INLINE {
            alignas(64) int8_t tile[blocks][kUnit * kBlock];
            for (int i = 0; i < count; ++i) {
                if (codes[i]) decode_unit<k>(streams, codes[i], row, AsTheyLie(), tile[i]);
            }
            prefetcher.step(count);
            by_many<2>(rows, [&](int first, auto queries) { mix_unit<queries>(codes, count, tile[0], first, rescale, &sums[first * dim + unit * kUnit]); });
        });
        rescale_by_fours(rescale, rows, dim, more.data());
        if (!outliers) return;
        set_apart_by_fours(weights.data(), count * kBlock, kMostSpan, rows, apart.data());
        for (int i = 0; i < count; ++i) {
            for (int row = 0; row < rows; row += 4) differences[i].add(&apart[row * kMostSpan + 4 * i * kBlock], &more[row * dim]);
        }
    }

    // The sums, [rows][head_dim].
    void finish(float* to) const {
        for (int row = 0; row < rows; ++row) {
            for (int i = 0; i < dim; ++i) to[row * dim + i] = sums[row * dim + i] + more[(row / 4 * dim + i) * 4 + row % 4];
        }
    }

  private:
    static constexpr int blocks = kMostSpan / kBlock;
    const PackedTensor& side;
    const Streams& streams;
    const int rows, dim;
    Buffer<uint8_t> bytes;  // [2][rows][span]: higher bytes of weights, and lower
    Buffer<float> weights;  // [rows][span], times norms
    Buffer<float> norms, shares, sums;  // shares: what a sum of 1 stands for
    Buffer<float> apart, more;           // weights, [rows / 4][span][4], and what outliers add to sums, [rows / 4][dim][4]
    Buffer<int8_t> high, low;            // tables of streams in two registers
    std::vector<int> rates, ends;      // [coded]: less one, and where their bits end, counted from the first of a stream
    alignas(64) float sixteenths[16];  // 2^(i / 16)
    Differences differences[blocks];
    int head = 0;

    void weigh_in_bytes(const uint8_t* const* codes, int count, const float* weight) {
        std::fill(norms.begin(), norms.end(), 1.0f);
        for (int i = 0; i < count * kBlock && streams.norms; i += 16) {
            if (const uint8_t* from = codes[i / kBlock]) read_norms(from + (streams.bytes - 1) * kBlock + i % kBlock, &norms[i]);
        }
        for (int row = 0; row < rows; ++row) {
            float* to = &weights[row * kMostSpan];
            __m512 largest = {};
            for (int i = 0; i < count * kBlock; i += 16) {
                const __m512 x = _mm512_load_ps(weight + row * kMostSpan + i) * _mm512_load_ps(&norms[i]);
                largest = _mm512_max_ps(largest, x);
                _mm512_store_ps(to + i, x);
            }
            const float most = _mm512_reduce_max_ps(largest), factor = most > 0.0f ? std::min(65535.0f / most, 1e38f) : 0.0f;
            shares[row] = factor > 0.0f ? 1.0f / factor : 0.0f;
            for (int i = 0; i < count * kBlock; i += 16) {
                const __m512i whole = _mm512_cvtps_epi32(_mm512_load_ps(to + i) * factor);
                _mm_store_si128((__m128i*)&bytes[row * kMostSpan + i], _mm512_cvtepi32_epi8(_mm512_srli_epi32(whole, 8)));
                _mm_store_si128((__m128i*)&bytes[(rows + row) * kMostSpan + i], _mm512_cvtepi32_epi8(whole));
            }
        }
    }

    // What norms stand for: codec/quantizers/trellis.py.
    void read_norms(const uint8_t* codes, float* to) const {
        const __m512i code = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)codes));
        const __m512 whole = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_srli_epi32(code, 4), _mm512_set1_epi32(8)));
        _mm512_store_ps(to, _mm512_scalef_ps(_mm512_permutexvar_ps(code, _mm512_load_ps(sixteenths)), whole));
    }

    // Add a unit of all blocks, tile [blocks][8][64], to sums [queries][dim].
    template <int queries>
    void mix_unit(const uint8_t* const* codes, int count, const int8_t* tile, int first, const float* rescale, float* to) const {
        __m512i found[queries][kUnit] = {};
        const int length = rows * kMostSpan;
        const uint8_t* higher = &bytes[first * kMostSpan];
        for (int part = 0; part < 2; ++part) {
            each<queries * kUnit>([&](auto i) NARROWKV_INLINE { found[i / kUnit][i % kUnit] = _mm512_slli_epi32(found[i / kUnit][i % kUnit], 8); });
            for (int block = 0; block < count; ++block) {
                if (!codes[block]) continue;
                __m512i weight[queries];
                each<queries>([&](auto q) NARROWKV_INLINE {
                    weight[q] = _mm512_load_si512(higher + part * length + q * kMostSpan + block * kBlock);
                });
                each<kUnit>([&](auto i) NARROWKV_INLINE {
                    const __m512i values = _mm512_load_si512(tile + (block * kUnit + i) * kBlock);
                    each<queries>([&](auto q) NARROWKV_INLINE { found[q][i] = _mm512_dpbusd_epi32(found[q][i], weight[q], values); });
                });
            }
        }
        each<queries>([&](auto q) NARROWKV_INLINE {
            const __m256 sum = add_lanes(found[q]) * shares[first + q];
            _mm256_storeu_ps(to + q * dim, _mm256_loadu_ps(to + q * dim) * rescale[first + q] + sum);
        });
    }

    void read_outliers(const Block& block, const uint8_t* codes, Differences& found) const {
        const auto decoded = [&](__m512i token, __m512i coefficient) {
            const __m512i eight = _mm512_set1_epi32(8), end = _mm512_i32gather_epi32(coefficient, ends.data(), 4);
            const __m512i last = _mm512_srli_epi32(_mm512_sub_epi32(end, _mm512_set1_epi32(1)), 3);
            const __m512i at = _mm512_add_epi32(_mm512_slli_epi32(last, 6), token);
            const __mmask16 later = _mm512_test_epi32_mask(last, last);
            const __m512i before = bytes_at(codes, _mm512_mask_sub_epi32(at, later, at, _mm512_set1_epi32(kBlock)));
            const __m512i both = _mm512_or_si512(bytes_at(codes, at), _mm512_maskz_slli_epi32(later, before, 8));
            const __m512i state = _mm512_srlv_epi32(both, _mm512_sub_epi32(_mm512_add_epi32(_mm512_slli_epi32(last, 3), eight), end));
            const __m512i table = _mm512_slli_epi32(_mm512_i32gather_epi32(coefficient, rates.data(), 4), 4), four = _mm512_set1_epi32(15);
            const auto pick = [&](const Buffer<int8_t>& from, __m512i nibble) {
                const __m512i index = _mm512_or_si512(table, _mm512_and_si512(nibble, four));
                return _mm512_permutex2var_epi8(_mm512_load_si512(from.data()), index, _mm512_load_si512(from.data() + kBlock));
            };
            return signed_bytes(_mm512_add_epi8(pick(high, _mm512_srli_epi32(state, 4)), pick(low, state)));
        };
        found.read_streams(side, block, head, decoded, [&](__m512i token, __m512i coefficient, __m512 by, int i) { found.put(i, token, coefficient, by); });
    }
};

}  // namespace
}  // namespace narrowkv
