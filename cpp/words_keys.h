// Scores of packed keys in words.

#pragma once

#include <algorithm>
#include <vector>

#include "kernel.h"
#include "words_tile.h"

namespace narrowkv {
namespace {

constexpr float kMostSum = 2.1e9f, kMostWord = 32767.0f;

class WordKeys {
  public:
    WordKeys(const Problem& problem, int16_t* tile)
        : problem(problem), side(problem.keys), rows(problem.group * problem.queries), dim(problem.head_dim),
          all(round_up(dim / 2, 16)), pairs(problem), tile(tile), own_angles(4 * kTurned * all), query(rows * 2 * all),
          words(rows * all), inverse(rows), zeros(rows), ranges(2 * kBlock * dim), channels(6 * all), places(dim), in_pairs(2 * all) {
        for (int pair = 0; pair < dim / 2; ++pair) {
            in_pairs[pair] = pairs.first(pair), in_pairs[all + pair] = pairs.second(pair);
            places[in_pairs[pair]] = 2 * kBlock * pair, places[in_pairs[all + pair]] = 2 * kBlock * pair + 1;
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
            const float factor = fitting(x, y);
            for (int i = 0; i < 2 * all; ++i) x[i] *= factor;
            inverse[q] = factor > 0.0f ? 1.0f / factor : 0.0f;
            if (!problem.rotation.pairs) turn_to_words(q, x, y, nullptr, nullptr);
        }
    }

    // Scores of a block, [rows][stride], whose first token is `start`; `count` of its tokens count. ahead: in steps of pairs.
    void score(const Block& block, int64_t start, int count, const Ahead& ahead, float* scores, int stride) {
        read_keys(side, block, int64_t(head) * side.codes, dim / 2, pairs, ahead, tile);
        const Spread spread = spread_of(block);
        spilt.clear();
        if (block.outlier_offsets) {
            put_outliers(side, block, head, 0, spread, tile, spilt, [&](__m512i token, __m512i channel) {
                return _mm512_add_epi32(_mm512_i32gather_epi32(channel, places.data(), 4), _mm512_slli_epi32(token, 1));
            });
        }
        const bool by_token = !side.fixed && !by_channel(side);
        if (by_token) by_fours(rows, [&](int q, auto queries) { score_by_token<queries>(q, spread, scores + q * stride, stride); });
        for (int token = 0; token < count; token += kTurned) {
            const int16_t* angles = turn(start + token, std::min(count - token, kTurned));
            if (by_channel(side) && token * side.range_tokens % kBlock == 0) scale_to_words(spread, token * side.range_tokens / kBlock);
            if (!by_token) by_fours(rows, [&](int q, auto queries) { score_tokens<queries>(q, angles, token, scores + q * stride + token, stride); });
            for (const Spill& spill : spilt) {
                if (spill.token / kTurned == token / kTurned) add_spilt(spill, angles, scores, stride);
            }
        }
    }

  private:
    const Problem& problem;
    const Side& side;
    const int rows, dim, all;  // all: pairs, rounded up
    const Pairs pairs;
    int16_t* const tile;  // room for a block, [pairs][64] lanes
    Room<int16_t> own_angles;
    Room<float> query;    // [rows][2][all] in units of words, before it is turned back
    Room<int32_t> words;  // [rows][all] lanes, as it is multiplied
    Room<float> inverse, zeros, ranges, channels;
    Room<int32_t> places;    // where the first token of each channel lies in the tile
    Room<int32_t> in_pairs;  // the channels of pairs, [2][all]
    std::vector<Spill> spilt;
    int row = 0, head = 0;
    const float* unit = nullptr;

    const float* real_query() const {
        return problem.packed_query + (int64_t(row) * problem.kv_heads + head) * rows * dim;
    }

    // The factor that makes the words of a query as large as sums allow: a pair of keys is at most 32767 long.
    float fitting(const float* x, const float* y) const {
        __m512 sum = {}, most = {};
        for (int i = 0; i < all; i += 16) {
            const __m512 first = _mm512_load_ps(x + i), second = _mm512_load_ps(y + i);
            const __m512 length = _mm512_sqrt_ps(first * first + second * second);
            sum += length, most = _mm512_max_ps(most, length);
        }
        const float total = _mm512_reduce_add_ps(sum);
        return total > 0.0f ? std::min(kMostSum / kMostWord / total, kMostWord / _mm512_reduce_max_ps(most)) : 0.0f;
    }

    void turn_to_words(int q, const float* first, const float* second, const float* cos, const float* sin) {
        for (int i = 0; i < all; i += 16) {
            __m512 x = _mm512_load_ps(first + i), y = _mm512_load_ps(second + i);
            if (cos) {
                const __m512 c = _mm512_load_ps(cos + i), s = _mm512_load_ps(sin + i), back = x * c + y * s;
                y = y * c - x * s, x = back;
            }
            _mm512_store_si512(&words[q * all + i], to_lanes(x, y));
        }
    }

    // Queries turned back by the angle of a position, as words.
    void turn_back_to_words(int32_t position) {
        const Rotation& rotation = problem.rotation;
        const float* far = rotation.far + int64_t(position / kBlock) * 2 * rotation.pairs;
        const float* step = rotation.steps + position % kBlock * 2 * rotation.pairs;
        alignas(64) float cos[kMostPairs], sin[kMostPairs];
        for (int i = 0; i < all; i += 16) {
            const int left = rotation.pairs - i;
            const __mmask16 some = left >= 16 ? 0xffff : left > 0 ? (1 << left) - 1 : 0;
            const auto read = [&](const float* from) { return _mm512_maskz_loadu_ps(some, from + i); };
            const __m512 c = read(far), s = read(far + rotation.pairs), near = read(step), up = read(step + rotation.pairs);
            _mm512_store_ps(cos + i, _mm512_mask_blend_ps(some, _mm512_set1_ps(1.0f), c * near - s * up));
            _mm512_store_ps(sin + i, s * near + c * up);
        }
        for (int q = 0; q < rows; ++q) turn_to_words(q, &query[q * 2 * all], &query[(q * 2 + 1) * all], cos, sin);
    }

    // Angles of up to 32 tokens relative to the first, by whose own the queries are turned back; null where nothing turns.
    const int16_t* turn(int64_t start, int count) {
        const Rotation& rotation = problem.rotation;
        if (!rotation.pairs) return nullptr;
        const int32_t* positions = rotation.positions + row * rotation.position_stride + start;
        bool consecutive = true;
        for (int token = 1; token < count; ++token) consecutive &= positions[token] == positions[0] + token;
        turn_back_to_words(consecutive ? positions[0] : 0);
        if (consecutive) return rotation.words;
        for (int i = 0; i < rotation.pairs * kTurned; ++i) {
            const int pair = i / kTurned, token = i % kTurned;
            float cos, sin;
            angle_at(rotation, positions[token < count ? token : 0], pair, cos, sin);
            int16_t* to = &own_angles[4 * kTurned * pair + 2 * token];
            to[0] = to[1] = int16_t(std::lrint(cos * kMostWord));
            to[2 * kTurned + 1] = int16_t(std::lrint(sin * kMostWord)), to[2 * kTurned] = -to[2 * kTurned + 1];
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

    // Scores of 32 tokens, from the words that the queries are now.
    template <int queries>
    void score_tokens(int q, const int16_t* angles, int token, float* scores, int stride) {
        const int turned = problem.rotation.pairs;
        __m512 found[queries][2] = {}, rest[queries][2] = {};
        if (turned) score_lanes<queries, 2, true>(&words[q * all], all, tile + 2 * token, 0, turned, angles, found);
        if (turned < dim / 2) score_lanes<queries, 2, false>(&words[q * all], all, tile + 2 * token, turned, dim / 2, nullptr, rest);
        for (int i = 0; i < queries; ++i) {
            const float zero = by_channel(side) ? zeros[q + i] : 0.0f;
            for (int part = 0; part < 2; ++part) {
                _mm512_storeu_ps(scores + i * stride + 16 * part, (found[i][part] + rest[i][part]) * inverse[q + i] + zero);
            }
        }
    }

    // Each group of channels of a token has a scale and a zero.
    template <int queries>
    void score_by_token(int q, const Spread& spread, float* scores, int stride) {
        const int length = dim / 2 / side.range_channels;
        for (int group = 0; group < side.range_channels; ++group) {
            __m512 found[queries][4];
            score_lanes<queries, 4, false>(&words[q * all], all, tile, group * length, (group + 1) * length, nullptr, found);
            for (int i = 0; i < queries; ++i) {
                const float *x = &query[(q + i) * 2 * all + group * length], *y = x + all;
                float sum = 0.0f;
                for (int pair = 0; pair < length; ++pair) sum += x[pair] + y[pair];
                for (int part = 0; part < 4; ++part) {
                    const int at = group * kBlock + 16 * part;
                    const __m512 scaled = found[i][part] * _mm512_loadu_ps(spread.scale + at);
                    const __m512 score = (scaled + _mm512_loadu_ps(spread.zero + at) * (sum / *unit)) * inverse[q + i];
                    float* to = scores + i * stride + 16 * part;
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
            const float factor = fitting(scaled, scaled + all);
            for (int i = 0; i < 2 * all; ++i) scaled[i] *= factor;
            inverse[q] = factor > 0.0f ? 1.0f / factor : 0.0f;
            zeros[q] = _mm512_reduce_add_ps(sum);
            turn_to_words(q, scaled, scaled + all, nullptr, nullptr);
        }
    }

    // What of an outlier did not fit.
    void add_spilt(const Spill& spill, const int16_t* angles, float* scores, int stride) {
        const int place = places[spill.channel], pair = place / (2 * kBlock), second = place % 2;
        const float* from = real_query();
        for (int q = 0; q < rows; ++q, from += dim) {
            float factor = from[spill.channel] * problem.scaling;
            if (pair < problem.rotation.pairs) {  // from the words, which are turned back by the block's first position
                int16_t word[2];
                std::memcpy(word, &words[q * all + pair], 4);
                const int16_t* angle = angles + 4 * kTurned * pair + 2 * (spill.token % kTurned);
                const float cos = angle[0] / kMostWord, sin = angle[2 * kTurned + 1] / kMostWord;
                factor = second ? word[1] * cos - word[0] * sin : word[0] * cos + word[1] * sin;
                factor *= inverse[q] / unit[spill.channel];
            }
            scores[q * stride + spill.token] += factor * spill.rest;
        }
    }
};

}  // namespace
}  // namespace narrowkv
