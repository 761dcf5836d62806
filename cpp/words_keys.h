// Scores of packed keys in words.

#pragma once

#include <algorithm>
#include <vector>

#include "kernel.h"
#include "words_tile.h"

namespace narrowkv {
namespace {

constexpr float kMostSum = 2.1e9f, kMostWord = 32767.0f, kMostTurned = 32700.0f;  // kMostTurned: safe of rounding

class WordKeys {
  public:
    WordKeys(const Problem& problem, int16_t* tile)
        : problem(problem), side(problem.keys), rows(problem.group * problem.queries), dim(problem.head_dim),
          all(round_up(dim / 2, 16)), pairs(problem), tile(tile), own_angles(2 * kBlock * all), query(rows * 2 * all),
          words(rows * all), full(rows * all), shrinks(rows), inverse(rows), zeros(rows), ranges(2 * kBlock * dim), channels(6 * all), in_pairs(2 * all) {
        for (int pair = 0; pair < dim / 2; ++pair) {
            in_pairs[pair] = pairs.first(pair), in_pairs[all + pair] = pairs.second(pair);
        }
    }

    // Queries of a head by pairs, as large as their words may be, or, where blocks hold scales of channels, as they are.
    void begin(int row, int head) {
        this->row = row, this->head = head;
        unit = side.unit + (side.fixed ? int64_t(head) * dim : 0);
        const float* from = real_query();
        float* units = channels.data();  // of the channels of pairs
        for (int i = 0; i < 2 * all; ++i) {
            const bool turns = i % all < problem.rotation.pairs;
            units[i] = problem.scaling * (turns ? problem.rotation.scaling : 1.0f) * unit[side.fixed ? in_pairs[i] : 0];
        }
        for (int q = 0; q < rows; ++q, from += dim) {
            float *x = &query[q * 2 * all], *y = x + all;
            for (int i = 0; i < 2 * all; ++i) x[i] = from[in_pairs[i]] * units[i];
            for (int i = dim / 2; i < all; ++i) x[i] = y[i] = 0.0f;
            if (by_channel(side)) continue;
            problem.rotation.pairs ? take_full(q, x, y) : take_fitting(q, x, y);
        }
    }

    // Scores of a block, [rows][stride], whose first token is `start`; `count` of its tokens count.
    void score(const Block& block, int64_t start, int count, Ahead& ahead, float* scores, int stride) {
        const Spread spread = spread_of(block);
        const int16_t* angles = nullptr;
        outliers.clear(), spilt.clear();
        if (block.outlier_offsets) {
            read_outliers(side, block, head, 0, spread, outliers, spilt, [&](__m512i token, __m512i channel) {
                return _mm512_add_epi32(pairs.place(channel), place_of(token));
            });
        }
        read_keys(side, block, int64_t(head) * side.codes, dim / 2, pairs, ahead, tile);
        put_outliers(outliers, tile);
        if (by_channel(side)) {
            for (int group = 0; group < side.range_tokens; ++group) {
                scale_to_words(spread, group);
                const int tokens = kBlock / side.range_tokens, from = group * tokens;
                by_fours(rows, [&](int q, auto queries) {
                    float* to = scores + q * stride + from;
                    tokens == kBlock ? score_tokens<queries, 2>(q, nullptr, from, ahead, to, stride) : score_tokens<queries, 1>(q, nullptr, from, ahead, to, stride);
                });
            }
        } else if (!side.fixed) {
            by_fours(rows, [&](int q, auto queries) { score_by_token<queries>(q, spread, ahead, scores + q * stride, stride); });
        } else {
            angles = turn(start, std::min(count, kBlock));
            by_fours(rows, [&](int q, auto queries) { score_tokens<queries, 2>(q, angles, 0, ahead, scores + q * stride, stride); });
        }
        for (const Spill& spill : spilt) add_spilt(spill, angles, scores, stride);
    }

  private:
    const Problem& problem;
    const Side& side;
    const int rows, dim, all;  // all: pairs, rounded up
    const Pairs pairs;
    int16_t* const tile;  // room for a block, [pairs][64] lanes
    Room<int16_t> own_angles;
    Room<float> query;      // [rows][2][all] in units of words
    Room<int32_t> words;    // [rows][all] lanes, as it is multiplied
    Room<int32_t> full;     // the same before it is turned back, in words as large as may be
    Room<int16_t> shrinks;  // what makes these small enough for sums, times 32768
    Room<float> inverse, zeros, ranges, channels;
    Room<int32_t> in_pairs;  // the channels of pairs, [2][all]
    std::vector<uint32_t> outliers;
    std::vector<Spill> spilt;
    int row = 0, head = 0;
    const float* unit = nullptr;

    const float* real_query() const {
        return problem.packed_query + (int64_t(row) * problem.kv_heads + head) * rows * dim;
    }

    // A query as words that are as large as sums allow, of keys that are not turned.
    void take_fitting(int q, const float* x, const float* y) {
        __m512 sum = {}, largest = {};
        for (int i = 0; i < all; i += 16) {
            const __m512 first = _mm512_abs_ps(_mm512_load_ps(x + i)), second = _mm512_abs_ps(_mm512_load_ps(y + i));
            sum += first + second, largest = _mm512_max_ps(largest, _mm512_max_ps(first, second));
        }
        const float total = _mm512_reduce_add_ps(sum), most = _mm512_reduce_max_ps(largest);
        const float factor = total > 0.0f ? std::min(kMostSum / float(side.most) / total, kMostWord / most) : 0.0f;
        to_words(x, y, factor, &words[q * all]);
        inverse[q] = factor > 0.0f ? 1.0f / factor : 0.0f;
    }

    // A query that will be turned back: words as large as may be, and by how much these have to shrink then. A pair of keys is at
    // most 32767 long.
    void take_full(int q, const float* x, const float* y) {
        __m512 sum = {}, largest = {};
        for (int i = 0; i < all; i += 16) {
            const __m512 first = _mm512_load_ps(x + i), second = _mm512_load_ps(y + i);
            const __m512 length = _mm512_sqrt_ps(first * first + second * second);
            sum += length, largest = _mm512_max_ps(largest, length);
        }
        const float total = _mm512_reduce_add_ps(sum), most = _mm512_reduce_max_ps(largest);
        const float factor = total > 0.0f ? kMostTurned / most : 0.0f;
        shrinks[q] = total > 0.0f ? int16_t(std::min(kMostSum / kMostWord / total / factor, 1.0f) * kMostWord) : 0;
        to_words(x, y, factor, &full[q * all]);
        inverse[q] = total > 0.0f ? 32768.0f / (factor * shrinks[q]) : 0.0f;
    }

    void to_words(const float* x, const float* y, float factor, int32_t* to) const {
        for (int i = 0; i < all; i += 16) _mm512_store_si512(to + i, to_lanes(_mm512_load_ps(x + i) * factor, _mm512_load_ps(y + i) * factor));
    }

    // Queries turned back by the angle of a position.
    void turn_back(int32_t position) {
        const Rotation& rotation = problem.rotation;
        const float* far = rotation.far + int64_t(position / kBlock) * 2 * rotation.pairs;
        const float* step = rotation.steps + position % kBlock * 2 * rotation.pairs;
        for (int i = 0; i < all; i += 16) {
            const int left = rotation.pairs - i;
            const __mmask16 some = left >= 16 ? 0xffff : left > 0 ? (1 << left) - 1 : 0;
            const auto read = [&](const float* from) { return _mm512_maskz_loadu_ps(some, from + i); };
            const __m512 c = read(far), s = read(far + rotation.pairs), near = read(step), up = read(step + rotation.pairs);
            const __m512 cos = _mm512_mask_blend_ps(some, _mm512_set1_ps(kMostWord), (c * near - s * up) * kMostWord);
            const __m512 sin = (s * near + c * up) * kMostWord;
            const __m512i along = to_lanes(cos, cos), across = to_lanes(sin, -sin);
            const int16_t* shrink = shrinks.data();
            const int32_t* from = full.data() + i;
            int32_t* to = words.data() + i;
            for (int q = 0; q < rows; ++q, from += all, to += all) {
                const __m512i x = _mm512_load_si512(from), swapped = _mm512_rol_epi32(x, 16);
                const __m512i turned = _mm512_add_epi16(_mm512_mulhrs_epi16(x, along), _mm512_mulhrs_epi16(swapped, across));
                _mm512_store_si512(to, _mm512_mulhrs_epi16(turned, _mm512_set1_epi16(shrink[q])));
            }
        }
    }

    // Angles of a block's tokens relative to the first, by whose own the queries are turned back; null where nothing turns.
    const int16_t* turn(int64_t start, int count) {
        const Rotation& rotation = problem.rotation;
        if (!rotation.pairs) return nullptr;
        const int32_t* positions = rotation.positions + row * rotation.position_stride + start;
        __m512i next = _mm512_add_epi32(_mm512_set1_epi32(positions[0]), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
        bool consecutive = true;
        for (int token = 0; token < count; token += 16, next = _mm512_add_epi32(next, _mm512_set1_epi32(16))) {
            const __mmask16 some = count - token >= 16 ? 0xffff : (1 << (count - token)) - 1;
            consecutive &= !_mm512_mask_cmpneq_epi32_mask(some, _mm512_maskz_loadu_epi32(some, positions + token), next);
        }
        turn_back(consecutive ? positions[0] : 0);
        if (consecutive) return rotation.words;
        for (int i = 0; i < rotation.pairs * kBlock; ++i) {
            const int pair = i / kBlock, token = i % kBlock;
            float cos, sin;
            angle_at(rotation, positions[token < count ? token : 0], pair, cos, sin);
            int16_t* to = &own_angles[2 * kBlock * pair + place_of(token)];
            to[0] = int16_t(std::lrint(cos * kMostWord)), to[kBlock] = int16_t(std::lrint(sin * kMostWord));
        }
        return own_angles.data();
    }

    // Scales and zeros of a block: of channels, for good or of some tokens, else of tokens, by groups of channels.
    Spread spread_of(const Block& block) {
        if (side.fixed) return Spread::of_channels(unit, nullptr, 1.0f, 6, dim);
        float *scale = ranges.data(), *zero = scale + kBlock * dim;
        const int tokens = side.range_tokens, count = side.range_channels;
        const int64_t from = side.range_heads > 1 ? int64_t(head) * tokens * count : 0;
        read_halves(block.scale, block.zero, from, tokens, count, by_channel(side) ? 0 : kBlock, scale, zero);
        if (by_channel(side)) return Spread::of_channels(scale, zero, *unit, tokens == 1 ? 6 : 5, dim);
        return Spread::of_tokens(scale, zero, *unit, dim / count, kBlock);
    }

    // Scores of 32 tokens or 64, from the words that the queries are now.
    template <int queries, int halves>
    void score_tokens(int q, const int16_t* angles, int token, Ahead& ahead, float* scores, int stride) {
        const int turned = problem.rotation.pairs;
        __m512i found[queries][2 * halves] = {};
        if (turned) score_lanes<queries, halves, true>(&words[q * all], all, tile + token, 0, turned, angles, ahead, found);
        if (turned < dim / 2) score_lanes<queries, halves, false>(&words[q * all], all, tile + token, turned, dim / 2, nullptr, ahead, found);
        for (int i = 0; i < queries; ++i) {
            const float zero = by_channel(side) ? zeros[q + i] : 0.0f;
            const auto real = [&](int part) { return _mm512_cvtepi32_ps(found[i][part]) * inverse[q + i] + zero; };
            for (int half = 0; half < halves; ++half) order_sums(real(2 * half), real(2 * half + 1), scores + i * stride + 32 * half);
        }
    }

    // Each group of channels of a token has a scale and a zero.
    template <int queries>
    void score_by_token(int q, const Spread& spread, Ahead& ahead, float* scores, int stride) {
        const int length = dim / 2 / side.range_channels;
        for (int group = 0; group < side.range_channels; ++group) {
            __m512i found[queries][4] = {};
            score_lanes<queries, 2, false>(&words[q * all], all, tile, group * length, (group + 1) * length, nullptr, ahead, found);
            for (int i = 0; i < queries; ++i) {
                const float *x = &query[(q + i) * 2 * all + group * length], *y = x + all;
                float sum = 0.0f;
                for (int pair = 0; pair < length; ++pair) sum += x[pair] + y[pair];
                alignas(64) float sums[kBlock];
                for (int half = 0; half < 2; ++half) {
                    const __m512i* pair = found[i] + 2 * half;
                    order_sums(_mm512_cvtepi32_ps(pair[0]), _mm512_cvtepi32_ps(pair[1]), sums + 32 * half);
                }
                for (int token = 0; token < kBlock; token += 16) {
                    const int at = group * kBlock + token;
                    const __m512 scaled = _mm512_load_ps(sums + token) * _mm512_loadu_ps(spread.scale + at) * inverse[q + i];
                    const __m512 score = scaled + _mm512_loadu_ps(spread.zero + at) * (sum / *unit);
                    float* to = scores + i * stride + token;
                    _mm512_storeu_ps(to, group ? _mm512_loadu_ps(to) + score : score);
                }
            }
        }
    }

    // Queries times the scales of channels that a group of tokens shares, as words; and what their zeros add to scores.
    void scale_to_words(const Spread& spread, int group) {
        float *scale = channels.data(), *zero = scale + 2 * all, *scaled = zero + 2 * all;  // what pads pairs is times 0
        for (int half = 0; half < 2; ++half) {
            const int from = group * dim + half * (dim / 2), to = half * all;
            for (int i = 0; i < dim / 2; ++i) scale[to + i] = spread.scale[from + i];
            for (int i = 0; i < dim / 2; ++i) zero[to + i] = spread.zero[from + i] / spread.unit;
        }
        for (int q = 0; q < rows; ++q) {
            __m512 sum = {};
            for (int i = 0; i < 2 * all; i += 16) {
                const __m512 x = _mm512_load_ps(&query[q * 2 * all + i]);
                sum += x * _mm512_load_ps(zero + i);
                _mm512_store_ps(scaled + i, x * _mm512_load_ps(scale + i));
            }
            zeros[q] = _mm512_reduce_add_ps(sum);
            take_fitting(q, scaled, scaled + all);
        }
    }

    // What of an outlier did not fit.
    void add_spilt(const Spill& spill, const int16_t* angles, float* scores, int stride) {
        const int place = _mm_cvtsi128_si32(_mm512_castsi512_si128(pairs.place(_mm512_set1_epi32(spill.channel))));
        const int pair = place / (2 * kBlock), second = place / kBlock % 2;
        const float* from = real_query();
        for (int q = 0; q < rows; ++q, from += dim) {
            float factor = from[spill.channel] * problem.scaling;
            if (pair < problem.rotation.pairs) {  // from the words, which are turned back by the block's first position
                int16_t word[2];
                std::memcpy(word, &words[q * all + pair], 4);
                const int16_t* angle = angles + 2 * kBlock * pair + place_of(spill.token);
                const float cos = angle[0] / kMostWord, sin = angle[kBlock] / kMostWord;
                factor = second ? word[1] * cos - word[0] * sin : word[0] * cos + word[1] * sin;
                factor *= inverse[q] / unit[spill.channel];
            }
            scores[q * stride + spill.token] += factor * spill.rest;
        }
    }
};

}  // namespace
}  // namespace narrowkv
