// Sums of packed values in int16: weights of a span of tokens become words of one unit for each query.

#pragma once

#include <algorithm>

#include "int16_keys.h"

namespace narrowkv {
namespace {

constexpr int kSpan = 4 * kBlock;  // tokens whose weights share a unit

// Add tokens of a block, weighted, to the sums of 64 channels, [queries][dim]: those from 32 * set on and as many half the
// codes further on, whose codes may share bytes. weights: of these two groups of channels, [queries][stride].
template <int bits, int codes, int set, int queries>
void mix_tokens(const PackedTensor& side, const Block& block, int head, const int16_t* const* weights, int stride, Prefetcher& prefetcher, int32_t* sums) {
    constexpr int other = codes / 64, first_bytes = codes * kPlanes[bits][0] / 8, second_bytes = codes * kPlanes[bits][1] / 8;
    const uint8_t* first = block.planes[0] + int64_t(head) * kBlock * first_bytes;
    const uint8_t* second = block.planes[1] + int64_t(head) * kBlock * second_bytes;
    const __m512i table = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)side.int16));
    __m512i all[queries][4];
    const auto at = [](auto q, auto i) { return q * codes + 32 * (set + i / 2 * other) + i % 2 * 16; };
    each<queries>([&](auto q) NARROWKV_INLINE { each<4>([&](auto i) NARROWKV_INLINE { all[q][i] = _mm512_loadu_si512(sums + at(q, i)); }); });
    for (int some = 0; some < kBlock; some += 2 * kSteps) {
        prefetcher.step(kSteps);
        for (int token = some; token < some + 2 * kSteps; token += 2) {
            const uint8_t *from = first + token * first_bytes, *more = second + token * second_bytes;
            __m512i values[4];
            each<4>([&](auto i) NARROWKV_INLINE {
                constexpr int channel = 32 * (set + i / 2 * other) + i % 2;
                const __m512i index = join_planes<bits>([&](auto width, auto plane, auto to) NARROWKV_INLINE {
                    const uint8_t* row = plane == 0 ? from : more;
                    return LanePlane<width, codes, channel, to>::read(row, row + codes * width / 8);
                });
                values[i] = _mm512_permutexvar_epi16(index, table);
            });
            each<queries>([&](auto q) NARROWKV_INLINE {
                each<2>([&](auto group) NARROWKV_INLINE {
                    int32_t pair;
                    std::memcpy(&pair, weights[group] + q * stride + token, 4);
                    const __m512i both = _mm512_set1_epi32(pair);
                    all[q][2 * group] = _mm512_dpwssd_epi32(all[q][2 * group], values[2 * group], both);
                    all[q][2 * group + 1] = _mm512_dpwssd_epi32(all[q][2 * group + 1], values[2 * group + 1], both);
                });
            });
        }
    }
    each<queries>([&](auto q) NARROWKV_INLINE { each<4>([&](auto i) NARROWKV_INLINE { _mm512_storeu_si512(sums + at(q, i), all[q][i]); }); });
}

// What was added up fades, [rows / 4][dim][4], by a factor for each row.
inline void rescale_by_fours(const float* rescale, int rows, int dim, float* sums) {
    for (int row = 0; row < rows; row += 4) {
        alignas(16) float four[4] = {};
        for (int i = 0; i < 4 && row + i < rows; ++i) four[i] = rescale[row + i];
        const __m512 by = _mm512_broadcast_f32x4(_mm_load_ps(four));
        for (float *to = sums + row * dim, *last = to + 4 * dim; to < last; to += 16) _mm512_store_ps(to, _mm512_load_ps(to) * by);
    }
}

// Weights, [rows][span], of four rows interleaved: [rows / 4][span][4].
inline void set_apart_by_fours(const float* weight, int length, int span, int rows, float* apart) {
    for (int row = 0; row < rows; row += 4) {
        for (int token = 0; token < length; token += 16) {
            __m512i four[4] = {};
            for (int i = 0; i < 4 && row + i < rows; ++i) four[i] = _mm512_load_si512(weight + (row + i) * span + token);
            swap_lanes(four), swap_parts(four);
            for (int i = 0; i < 4; ++i) _mm512_store_si512(apart + row * span + token * 4 + 16 * i, four[i]);
        }
    }
}

class Int16Values {
  public:
    static constexpr int span = kSpan;

    explicit Int16Values(const Problem& problem)
        : side(problem.values), rows(problem.group * problem.queries), dim(problem.head_dim), groups(side.range_channels),
          weights(rows * groups * kSpan), sums(rows * dim), ranges((2 * groups + 1) * kSpan), shares(rows * groups), zeros(rows * groups),
          whole(rows * dim), apart(round_up(rows, 4) * kSpan), more(round_up(rows, 4) * dim) {}

    void begin(int head) {
        this->head = head;
        std::fill(sums.begin(), sums.end(), 0.0f);
        std::fill(more.begin(), more.end(), 0.0f);
    }

    // Add a span's values: weight is [rows][span] float32, and what was added up before fades by `rescale` of each row.
    void add(const Span& span, const float* weight, const float* rescale, Prefetcher& prefetcher) {
        float *scale = ranges.data(), *zero = scale + groups * kSpan;
        read_ranges(span, scale, zero);
        weigh_in_int16(span.length, weight, scale, zero);
        const bool outliers = read_outliers(span, scale, zero);  // before the sums, so that these need not wait for them
        add_tokens(span, rescale, prefetcher);
        rescale_by_fours(rescale, rows, dim, more.data());
        if (!outliers) return;
        set_apart_by_fours(weight, span.length, kSpan, rows, apart.data());
        for (int at = 0; at < span.length; at += kBlock) {
            for (int row = 0; row < rows; row += 4) differences[at / kBlock].add(&apart[row * kSpan + 4 * at], &more[row * dim]);
        }
    }

    // In how many steps of `prefetcher` a block is read: pairs of tokens of 64 channels.
    int steps() const { return kBlock / 2 * (side.codes / 64); }

    // The sums, [rows][head_dim].
    void finish(float* to) const {
        for (int row = 0; row < rows; ++row) {
            const float* other = &more[row / 4 * dim * 4 + row % 4];
            for (int channel = 0; channel < dim; ++channel, ++to) {
                *to = sums[row * dim + lane_index(channel)] + other[4 * channel];
            }
        }
    }

  private:
    const PackedTensor& side;
    const int rows, dim, groups;
    Buffer<int16_t> weights;             // [rows][groups][span]
    Buffer<float> sums, ranges, shares;  // sums: ordered by `lane_index`; shares: what a sum in words stands for, [rows][groups]
    Buffer<float> zeros;                 // what zeros add to sums, likewise
    Buffer<int32_t> whole;               // [rows][head_dim]
    Buffer<float> apart;                 // the weights, [rows / 4][span][4]
    Buffer<float> more;                  // what outliers add to sums, [rows / 4][head_dim][4]
    Differences differences[kSpan / kBlock];
    int head = 0;

    void read_ranges(const Span& span, float* scale, float* zero) {
        std::fill(scale, scale + 2 * groups * kSpan, 0.0f);
        for (int at = 0; at < span.length; at += kBlock) {
            const Block* block = span.sides[at / kBlock];
            const int64_t from = side.range_heads > 1 ? int64_t(head) * kBlock * groups : 0;
            if (block) read_halves(block[1].scale, block[1].zero, from, kBlock, groups, kSpan, scale + at, zero + at);
        }
    }

    // Weights of tokens as words. scale, zero: of values, [groups][span].
    void weigh_in_int16(int length, const float* weight, const float* scale, const float* zero) {
        const float most = kMostSum / float(side.most);
        float* scaled = &ranges[2 * groups * kSpan];
        for (int row = 0; row < rows; ++row, weight += kSpan) {
            for (int group = 0; group < groups; ++group) {
                __m512 sum = {}, largest = {}, from_zero = {};
                for (int i = 0; i < length; i += 16) {
                    const __m512 x = _mm512_load_ps(weight + i), by = _mm512_load_ps(scale + group * kSpan + i);
                    from_zero += x * _mm512_load_ps(zero + group * kSpan + i);
                    sum += x * by, largest = _mm512_max_ps(largest, x * by);
                    _mm512_store_ps(scaled + i, x * by);
                }
                const float total = _mm512_reduce_add_ps(sum);
                const float factor = total > 0.0f ? std::min(most / total, kMaxInt16 / _mm512_reduce_max_ps(largest)) : 0.0f;
                int16_t* int16 = &weights[(row * groups + group) * kSpan];
                for (int i = 0; i < length; i += 32) {
                    const auto half = [&](int at) { return _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(_mm512_load_ps(scaled + at) * factor)); };
                    store_int16(int16 + i, _mm512_inserti64x4(_mm512_castsi256_si512(half(i)), half(i + 16), 1));
                }
                shares[row * groups + group] = factor > 0.0f ? *side.unit / factor : 0.0f;
                zeros[row * groups + group] = _mm512_reduce_add_ps(from_zero);
            }
        }
    }

    void add_tokens(const Span& span, const float* rescale, Prefetcher& prefetcher) {
        std::fill(whole.begin(), whole.end(), 0);
        for (int at = 0; at < span.length; at += kBlock) {
            const Block* block = span.sides[at / kBlock];
            if (block) by_fours(rows, [&](int row, auto queries) { mix<queries>(block[1], row, at, prefetcher); });
        }
        const int channels = dim / groups;
        for (int row = 0; row < rows; ++row) {
            for (int channel = 0; channel < dim; channel += 16) {
                const int group = row * groups + channel / channels;
                const __m512 found = _mm512_cvtepi32_ps(_mm512_load_si512(&whole[row * dim + channel])) * shares[group] + zeros[group];
                float* to = &sums[row * dim + channel];
                _mm512_store_ps(to, _mm512_load_ps(to) * rescale[row] + found);
            }
        }
    }

    template <int queries>
    void mix(const Block& block, int row, int at, Prefetcher& prefetcher) {
        const auto run = [&](auto bits, auto codes) {
            each<codes / 64>([&](auto set) {
                const auto group = [&](int channel) { return &weights[(row * groups + channel * groups / dim) * kSpan + at]; };
                const int16_t* both[2] = {group(32 * set), group(32 * (set + codes / 64))};
                mix_tokens<bits, codes, set, queries>(side, block, head, both, groups * kSpan, prefetcher, &whole[row * dim]);
            });
        };
        const auto any = [&](auto bits) {
            if (side.codes == 64) return run(bits, std::integral_constant<int, 64>());
            if (side.codes == 128) return run(bits, std::integral_constant<int, 128>());
            run(bits, std::integral_constant<int, 256>());
        };
        if (side.bits == 2) return any(std::integral_constant<int, 2>());
        side.bits == 3 ? any(std::integral_constant<int, 3>()) : any(std::integral_constant<int, 4>());
    }

    bool read_outliers(const Span& span, const float* scale, const float* zero) {
        bool any = false;
        for (int at = 0; at < span.length; at += kBlock) {
            const Block* block = span.sides[at / kBlock];
            Differences& found = differences[at / kBlock];
            found.count = 0;
            if (!block || !block[1].outlier_offsets) continue;
            any = true;
            const Spread spread = Spread::of_tokens(scale + at, zero + at, *side.unit, dim / groups, groups, kSpan);
            found.read(side, block[1], head, spread, nullptr, [&](__m512i token, __m512i channel, __m512 by, int i) {
                found.put(i, token, channel, by);
            });
        }
        return any;
    }
};

}  // namespace
}  // namespace narrowkv
