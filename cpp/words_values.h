// Sums of packed values in words: weights of a span of tokens become words of one unit for each query.

#pragma once

#include <algorithm>
#include <vector>

#include "words_keys.h"
#include "words_strips.h"

namespace narrowkv {
namespace {

constexpr int kSpan = 4 * kBlock;  // tokens whose weights share a unit
constexpr int kStrip = 16;         // rows of codes of channels that are decoded together

// Blocks of a span of a sequence; those of which nothing is seen are left out.
struct Span {
    const Block* sides[kSpan / kBlock];  // keys, then values; or null
    int length;
};

// Codes of two tokens, whose rows lie one behind the other: every other code from `from` on.
template <int bits, int codes, int from>
inline __m512i codes_of_lanes(const uint8_t* first, const uint8_t* second) {
    return join_planes<bits>([&](auto width, auto plane, auto to) {
        const uint8_t* row = plane == 0 ? first : second;
        return LanePlane<width, codes, from, to>::read(row, row + codes * width / 8);
    });
}

// Lanes of two tokens of all channels, from two planes.
template <int bits, int codes, int... i>
inline void read_lanes(const uint8_t* first, const uint8_t* second, const uint8_t* table, int16_t* to, std::integer_sequence<int, i...>) {
    const __m512i found[] = {codes_of_lanes<bits, codes, i / 2 * 32 + i % 2>(first, second)...};
    (store_words(to + 32 * i, look_up_words<16>(found[i], table)), ...);
}

// Two tokens of values of 16 channels to a register, [token pairs][channels, ordered by `place_of`] lanes.
template <int bits, int codes>
void read_values(const Side& side, const Block& block, int64_t row, Ahead& ahead, int16_t* tile) {
    constexpr auto bytes = [](int plane) { return codes * kPlanes[bits][plane] / 8; };
    const uint8_t *first = block.planes[0] + row * bytes(0), *second = block.planes[1] + row * bytes(1), *table = side.words;
    for (int token = 0; token < kBlock; token += 2, tile += 2 * codes) {
        if (token % (2 * kSteps) == 0) ahead.step(kSteps);
        read_lanes<bits, codes>(first, second, table, tile, std::make_integer_sequence<int, codes / 16>());
        first += 2 * bytes(0), second += 2 * bytes(1);
    }
}

inline void read_values(const Side& side, const Block& block, int64_t row, Ahead& ahead, int16_t* tile) {
    const auto run = [&](auto two, auto three, auto four) { (side.bits == 2 ? two : side.bits == 3 ? three : four)(side, block, row, ahead, tile); };
    if (side.codes == 64) return run(read_values<2, 64>, read_values<3, 64>, read_values<4, 64>);
    if (side.codes == 128) return run(read_values<2, 128>, read_values<3, 128>, read_values<4, 128>);
    run(read_values<2, 256>, read_values<3, 256>, read_values<4, 256>);
}

// Add 64 tokens of a tile, weighted, to the sums of 16 * parts channels, [queries][stride].
template <int queries, int parts>
inline void mix_lanes(const int16_t* weights, int weights_stride, const int16_t* tile, int stride, Ahead& ahead, int32_t* sums) {
    __m512i all[queries][parts];
    each<queries>([&](auto q) NARROWKV_INLINE {
        each<parts>([&](auto i) NARROWKV_INLINE { all[q][i] = _mm512_loadu_si512(sums + q * stride + 16 * i); });
    });
    for (int first = 0; first < kBlock; first += 2 * kSteps) {
        ahead.step(kSteps);
        for (int token = first; token < first + 2 * kSteps; token += 2, tile += 2 * stride) {
            __m512i values[parts];
            each<parts>([&](auto i) NARROWKV_INLINE { values[i] = load_words(tile + 32 * i); });
            each<queries>([&](auto q) NARROWKV_INLINE {
                int32_t pair;
                std::memcpy(&pair, weights + q * weights_stride + token, 4);
                const __m512i both = _mm512_set1_epi32(pair);
                each<parts>([&](auto i) NARROWKV_INLINE { all[q][i] = _mm512_dpwssd_epi32(all[q][i], values[i], both); });
            });
        }
    }
    each<queries>([&](auto q) NARROWKV_INLINE {
        each<parts>([&](auto i) NARROWKV_INLINE { _mm512_storeu_si512(sums + q * stride + 16 * i, all[q][i]); });
    });
}

class WordValues {
  public:
    WordValues(const Problem& problem, int16_t* tile)
        : side(problem.values), rows(problem.group * problem.queries), dim(problem.head_dim),
          groups(side.channel_major ? 1 : side.range_channels), reader(side.bits),
          tile(tile), weights(rows * groups * kSpan), sums(rows * dim), ranges((2 * groups + 1) * kSpan),
          shares(rows * groups), zeros(rows * groups), whole(rows * dim), places(rows * dim) {
        for (int i = 0; i < rows * dim; ++i) places[i] = place(i / dim, i % dim);
    }

    void begin(int head) {
        this->head = head;
        unit = side.unit + (side.fixed ? int64_t(head) * dim : 0);
        std::fill(sums.begin(), sums.end(), 0.0f);
    }

    // Add a span's values: weight is [rows][span] float32, and what was added up before fades by `fading` of each row.
    void add(const Span& span, const float* weight, const float* fading, Ahead& ahead) {
        if (side.channel_major) return add_channels(span, weight, fading, ahead);
        add_tokens(span, weight, fading, ahead);
    }

    // In how many steps of `ahead` a block is read: rows of channels, or pairs of tokens, which are read and then mixed.
    int steps() const { return side.channel_major ? side.codes : kBlock; }

    // The sums, [rows][head_dim].
    void finish(float* to) const {
        for (int row = 0; row < rows; ++row) {
            for (int channel = 0; channel < dim; ++channel, ++to) *to = sums[places[row * dim + channel]] * (side.channel_major ? unit[channel] : 1.0f);
        }
    }

  private:
    const Side& side;
    const int rows, dim, groups;
    const Reader reader;
    int16_t* const tile;               // room for a block, or for a strip of a span
    Room<int16_t> weights;             // [rows][groups][span]
    Room<float> sums, ranges, shares;  // shares: what a sum in words stands for, [rows][groups]
    Room<float> zeros;                 // what zeros add to sums, likewise
    Room<int32_t> whole;               // [rows][head_dim]
    Room<int32_t> places;              // of sums, [rows][head_dim]
    std::vector<uint32_t> outliers;
    std::vector<Spill> spilt;
    int head = 0;
    const float* unit = nullptr;

    // Weights of tokens as words. scale, zero: of values, [groups][span], or null.
    void weigh_in_words(int length, const float* weight, const float* scale, const float* zero, float unit) {
        const float most = kMostSum / float(side.most);
        float* scaled = &ranges[2 * groups * kSpan];
        for (int row = 0; row < rows; ++row, weight += kSpan) {
            for (int group = 0; group < groups; ++group) {
                __m512 sum = {}, largest = {}, from_zero = {};
                for (int i = 0; i < length; i += 16) {
                    const __m512 x = _mm512_load_ps(weight + i), by = scale ? _mm512_load_ps(scale + group * kSpan + i) : _mm512_set1_ps(1.0f);
                    if (zero) from_zero += x * _mm512_load_ps(zero + group * kSpan + i);
                    sum += x * by, largest = _mm512_max_ps(largest, x * by);
                    _mm512_store_ps(scaled + i, x * by);
                }
                const float total = _mm512_reduce_add_ps(sum);
                const float factor = total > 0.0f ? std::min(most / total, kMostWord / _mm512_reduce_max_ps(largest)) : 0.0f;
                int16_t* words = &weights[(row * groups + group) * kSpan];
                for (int i = 0; i < length; i += 16) {
                    const __m512i whole = _mm512_cvtps_epi32(_mm512_load_ps(scaled + i) * factor);
                    _mm256_storeu_si256((__m256i*)(words + i), _mm512_cvtepi32_epi16(whole));
                }
                shares[row * groups + group] = factor > 0.0f ? unit / factor : 0.0f;
                zeros[row * groups + group] = _mm512_reduce_add_ps(from_zero);
            }
        }
    }

    void add_tokens(const Span& span, const float* weight, const float* fading, Ahead& ahead) {
        const int channels = dim / groups;
        float *scale = ranges.data(), *zero = scale + groups * kSpan;
        std::fill(scale, scale + 2 * groups * kSpan, 0.0f);
        for (int at = 0; at < span.length; at += kBlock) {
            const Block* block = span.sides[at / kBlock];
            const int64_t from = side.range_heads > 1 ? int64_t(head) * kBlock * groups : 0;
            if (block) read_halves(block[1].scale, block[1].zero, from, kBlock, groups, kSpan, scale + at, zero + at);
        }
        weigh_in_words(span.length, weight, scale, zero, *unit);
        std::fill(whole.begin(), whole.end(), 0);
        spilt.clear();
        for (int at = 0; at < span.length; at += kBlock) {
            const Block* block = span.sides[at / kBlock];
            if (!block) continue;
            outliers.clear();
            if (block[1].outlier_offsets) {
                const Spread spread = Spread::of_tokens(scale + at, zero + at, *unit, channels, kSpan);
                read_outliers(side, block[1], head, at, spread, outliers, spilt, [&](__m512i token, __m512i channel) {
                    const __m512i pair = _mm512_mullo_epi32(_mm512_srli_epi32(token, 1), _mm512_set1_epi32(2 * dim));
                    const __m512i lane = _mm512_add_epi32(_mm512_slli_epi32(place_of(channel), 1), _mm512_and_si512(token, _mm512_set1_epi32(1)));
                    return _mm512_add_epi32(pair, lane);
                });
            }
            read_values(side, block[1], int64_t(head) * kBlock, ahead, tile);
            put_outliers(outliers, tile);
            mix(at, ahead);
        }
        for (int row = 0; row < rows; ++row) {
            for (int channel = 0; channel < dim; channel += 16) {
                const int group = row * groups + channel / channels;
                const __m512 found = _mm512_cvtepi32_ps(_mm512_load_si512(&whole[row * dim + channel])) * shares[group] + zeros[group];
                float* to = &sums[row * dim + channel];
                _mm512_store_ps(to, _mm512_load_ps(to) * fading[row] + found);
            }
            for (const Spill& spill : spilt) sums[places[row * dim + spill.channel]] += weight[row * kSpan + spill.token] * spill.rest;
        }
    }

    void mix(int at, Ahead& ahead) {
        const int channels = dim / groups, parts = channels % 64 == 0 ? 4 : 2;
        by_fours(rows, [&](int row, auto queries) {
            const auto run = parts == 4 ? mix_lanes<queries, 4> : mix_lanes<queries, 2>;
            for (int channel = 0; channel < dim; channel += 16 * parts) {
                const int16_t* weight = &weights[(row * groups + channel / channels) * kSpan + at];
                run(weight, groups * kSpan, &tile[2 * channel], dim, ahead, &whole[row * dim + channel]);
            }
        });
    }

    // Codebooks of channels: a strip of channels of all blocks at a time, whose lanes are added up once.
    void add_channels(const Span& span, const float* weight, const float* fading, Ahead& ahead) {
        weigh_in_words(span.length, weight, nullptr, nullptr, 1.0f);
        for (int from = 0; from < side.codes; from += kStrip) {
            const int count = std::min(kStrip, side.codes - from);
            for (int at = 0; at < span.length; at += kBlock) {
                const Block* block = span.sides[at / kBlock];
                if (block) look_up_rows(side, reader, strip_of(block[1], from, count, at));
                ahead.step(count);
            }
            for (int number = 0; number < side.numbers; ++number) mix_strips(number * side.codes + from, count, number, span.length, fading);
        }
        for (int at = 0; at < span.length; at += kBlock) {
            const Block* block = span.sides[at / kBlock];
            if (block && block[1].outlier_offsets) correct(block[1], weight + at);
        }
    }

    Rows strip_of(const Block& block, int row, int count, int at) {
        const int64_t from = int64_t(head) * side.codes + row;
        const int step = side.numbers * 2 * kept_levels(side.bits);
        Rows found{{}, side.words + from * step, step, count, kSpan, kStrip * kSpan, tile + at};
        for (int plane = 0; plane < 3; ++plane) found.planes[plane] = block.planes[plane] + from * reader.row_bytes[plane];
        return found;
    }

    void mix_strips(int channel, int count, int number, int length, const float* fading) {
        by_fours(rows, [&](int row, auto queries) {
            constexpr int together = 16 / queries;
            alignas(64) float share[16], fade[16];
            for (int i = 0; i < 16; ++i) share[i] = shares[row + i % queries], fade[i] = fading[row + i % queries];
            for (int i = 0; i < count; i += together) {
                __m512i found;
                mix_strip<queries>(&weights[row * kSpan], kSpan, &tile[(number * kStrip + i) * kSpan], kSpan, length, found);
                const int left = std::min(count - i, together) * queries;
                const __mmask16 some = left >= 16 ? 0xffff : (1 << left) - 1;
                float* to = &sums[row * dim + (channel + i) * queries];
                const __m512 faded = _mm512_maskz_loadu_ps(some, to) * _mm512_load_ps(fade);
                const __m512 sum = faded + _mm512_cvtepi32_ps(found) * _mm512_load_ps(share);
                _mm512_mask_storeu_ps(to, some, sum);
            }
        });
    }

    // Where the sum of a row's channel lies: as in a tile, or, with codebooks of channels, where rows are taken together, beside theirs.
    int place(int row, int channel) const {
        if (!side.channel_major) return row * dim + place_of(channel);
        const int fours = rows / 4 * 4, together = row < fours ? 4 : rows - fours >= 2 && row < fours + 2 ? 2 : 1;
        const int first = row - row % together;
        return first * dim + channel * together + row - first;
    }

    // Outliers where codebooks are those of channels: what they differ by from the numbers of their codes, in words.
    void correct(const Block& block, const float* weight) {
        const uint16_t* exact = static_cast<const uint16_t*>(block.outlier_values);
        const int levels = kept_levels(side.bits);
        for (int i = block.outlier_offsets[head]; i < block.outlier_offsets[head + 1]; ++i) {
            const int token = block.outlier_index[i] / side.codes, code = block.outlier_index[i] % side.codes;
            const Rows row = strip_of(block, code, 1, 0);
            int level = 0;
            for (int plane = 0, shift = 0; plane < 3 && kPlanes[side.bits][plane]; shift += kPlanes[side.bits][plane++]) {
                const int width = kPlanes[side.bits][plane], bytes = reader.row_bytes[plane];
                level |= (row.planes[plane][token % bytes] >> (width * (token / bytes)) & ((1 << width) - 1)) << shift;
            }
            for (int number = 0; number < side.numbers; ++number) {
                const uint8_t* table = row.table + number * 2 * levels;
                const int channel = code + number * side.codes, word = int16_t(table[level] | table[levels + level] << 8);
                const float rest = to_single(exact[i * side.numbers + number], side.outlier) / unit[channel] - float(word);
                for (int r = 0; r < rows; ++r) sums[places[r * dim + channel]] += weight[r * kSpan + token] * rest;
            }
        }
    }
};

}  // namespace
}  // namespace narrowkv
