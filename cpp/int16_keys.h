// Scores of packed keys in words.

#pragma once

#include <algorithm>

#include "int16_outliers.h"
#include "int16_rows.h"

namespace narrowkv {
namespace {


class Int16Keys {
  public:
    explicit Int16Keys(const Problem& problem)
        : problem(problem), side(problem.keys), rows(problem.group * problem.queries), dim(problem.head_dim),
          all(round_up(dim / 2, 16)), pairs(problem), own_angles(2 * kBlock * problem.rotation.pairs),
          own_lanes(2 * kBlock * problem.rotation.pairs + 2), query(rows * 2 * all), int16(2 * capacity()),
          full(capacity()), shrinks(round_up(rows, 4)), inverse(2 * rows), zeros(2 * rows), ranges(side.fixed ? 0 : 2 * kBlock * dim), channels(6 * all),
          in_pairs(2 * all), real_query(round_up(rows, 4) * dim), more(4 * kBlock), inverse_units(side.fixed ? dim : 0) {
        for (int pair = 0; pair < dim / 2; ++pair) {
            in_pairs[pair] = pairs.first(pair), in_pairs[all + pair] = pairs.second(pair);
        }
        const int still = 2 * kBlock * problem.rotation.pairs;
        own_lanes[still] = as_lane(int16_t(kMaxInt16), 0), own_lanes[still + 1] = as_lane(0, int16_t(kMaxInt16));
    }

    int steps() const { return dim / 2 * (rows / 4 + rows % 4 / 2 + rows % 2); }

    // Queries of a head by pairs, as large as their words may be, or, where blocks hold scales of channels, as they are.
    void begin(int row, int head) {
        this->row = row, this->head = head;
        unit = side.unit + (side.fixed ? int64_t(head) * dim : 0);
        const float* from = problem.packed_query + (int64_t(row) * problem.kv_heads + head) * rows * dim;
        const bool rotated = problem.rotation.pairs > 0;  // outliers are then added in words, else in real units
        for (int d = 0; rotated && d < dim; ++d) inverse_units[d] = 1.0f / unit[d];
        float* units = channels.data();  // of the channels of pairs
        for (int i = 0; i < 2 * all; ++i) {
            const bool rotates = i % all < problem.rotation.pairs;
            units[i] = problem.scaling * (rotates ? problem.rotation.scaling : 1.0f) * unit[side.fixed ? in_pairs[i] : 0];
        }
        for (int q = 0; q < rows; ++q, from += dim) {
            float *x = &query[q * 2 * all], *y = x + all;
            for (int i = 0; i < 2 * all; ++i) x[i] = from[in_pairs[i]] * units[i];
            for (int i = dim / 2; i < all; ++i) x[i] = y[i] = 0.0f;
            for (int d = 0; !rotated && d < dim; ++d) real_query[(q / 4 * dim + d) * 4 + q % 4] = from[d] * problem.scaling;
            if (!by_channel(side)) rotated ? take_full(q, x, y) : take_fitting(q, x, y, 0);
        }
    }

    // Scores of a block, [rows][stride], whose first token is `start`; `count` of its tokens count.
    void score(const Block& block, int64_t start, int count, Prefetcher& prefetcher, float* scores, int stride) {
        const Spread spread = spread_of(block);
        for (int group = 0; by_channel(side) && group < side.range_tokens; ++group) scale_to_int16(spread, group);
        const int16_t* angles = side.fixed ? rotate(start, std::min(count, kBlock)) : nullptr;
        if (block.outlier_offsets) read_outliers(block, spread, angles != nullptr);  // before the scores, so that these need not wait for them
        by_bits(side, [&](auto bits) {
            const Rows<bits> keys(side, block, head);
            by_fours(rows, [&](int q, auto queries) {
                float* to = scores + q * stride;
                side.fixed || by_channel(side) ? score_tokens<queries>(keys, q, angles, prefetcher, to, stride)
                                               : score_by_token<queries>(keys, q, spread, prefetcher, to, stride);
            });
        });
        if (block.outlier_offsets) add_outliers(angles != nullptr, scores, stride);
    }

  private:
    const Problem& problem;
    const PackedTensor& side;
    const int rows, dim, all;  // all: pairs, rounded up
    const Pairs pairs;
    Buffer<int16_t> own_angles;  // of a block whose positions are not consecutive
    Buffer<int32_t> own_lanes;   // the same as lanes
    const int32_t* lanes = nullptr;  // of this block's angles, as Rotation has them
    Buffer<float> query;      // [rows][2][all] in units of words
    Buffer<int32_t> int16;    // lanes, for both halves of a block: [2][rows][all], or where they are rotated [rows / 4][all][4]
    Buffer<int32_t> full;     // the latter before they are rotated back, as large as may be
    Buffer<int16_t> shrinks;  // what makes these small enough for sums, times 32768
    Buffer<float> inverse, zeros, ranges, channels;
    Buffer<int32_t> in_pairs;  // the channels of pairs, [2][all]
    Buffer<float> real_query;  // [rows / 4][head_dim][4] in real units
    Buffer<float> more;        // what outliers add to scores, [64][4]
    Buffer<float> inverse_units;
    Differences differences;
    int row = 0, head = 0;
    const float* unit = nullptr;

    int capacity() const { return round_up(rows, 4) * all; }

    static int32_t as_lane(int16_t first, int16_t second) { return int32_t(uint32_t(uint16_t(second)) << 16 | uint16_t(first)); }

    // A query as words that are as large as sums allow, of keys that are not rotated, for a half of a block.
    void take_fitting(int q, const float* x, const float* y, int half) {
        __m512 sum = {}, largest = {};
        for (int i = 0; i < all; i += 16) {
            const __m512 first = _mm512_abs_ps(_mm512_load_ps(x + i)), second = _mm512_abs_ps(_mm512_load_ps(y + i));
            sum += first + second, largest = _mm512_max_ps(largest, _mm512_max_ps(first, second));
        }
        const float total = _mm512_reduce_add_ps(sum), most = _mm512_reduce_max_ps(largest);
        const float factor = total > 0.0f ? std::min(kMostSum / float(side.most) / total, kMaxInt16 / most) : 0.0f;
        int32_t* to = &int16[half * capacity() + q * all];
        for (int i = 0; i < all; i += 16) _mm512_store_si512(to + i, to_lanes(_mm512_load_ps(x + i) * factor, _mm512_load_ps(y + i) * factor));
        inverse[half * rows + q] = factor > 0.0f ? 1.0f / factor : 0.0f;
    }

    // A query that will be rotated back: words as large as may be, and by how much these have to shrink then. A pair of keys
    // is at most 32767 long.
    void take_full(int q, const float* x, const float* y) {
        __m512 sum = {}, largest = {};
        for (int i = 0; i < all; i += 16) {
            const __m512 first = _mm512_load_ps(x + i), second = _mm512_load_ps(y + i);
            const __m512 length = _mm512_sqrt_ps(first * first + second * second);
            sum += length, largest = _mm512_max_ps(largest, length);
        }
        const float total = _mm512_reduce_add_ps(sum), most = _mm512_reduce_max_ps(largest);
        const float factor = total > 0.0f ? kMaxRotated / most : 0.0f;
        shrinks[q] = total > 0.0f ? int16_t(std::min(kMostSum / kMaxInt16 / total / factor, 1.0f) * kMaxInt16) : 0;
        inverse[q] = total > 0.0f ? 32768.0f / (factor * shrinks[q]) : 0.0f;
        alignas(64) int32_t lanes[16];
        for (int i = 0; i < all; i += 16) {
            _mm512_store_si512(lanes, to_lanes(_mm512_load_ps(x + i) * factor, _mm512_load_ps(y + i) * factor));
            for (int k = 0; k < 16; ++k) full[(q / 4 * all + i + k) * 4 + q % 4] = lanes[k];
        }
    }

    // Queries rotated back by the angle of a position.
    void unrotate(int32_t position) {
        const Rotation& rotation = problem.rotation;
        position = within(rotation, position);
        const float* far = rotation.far + int64_t(position / kBlock) * 2 * rotation.pairs;
        const float* step = rotation.steps + position % kBlock * 2 * rotation.pairs;
        const __m512i quarter = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
        const int units = round_up(rows, 4) / 4, size = all;
        for (int i = 0; i < size; i += 16) {
            const int left = rotation.pairs - i;
            const __mmask16 some = left >= 16 ? 0xffff : left > 0 ? (1 << left) - 1 : 0;
            const auto read = [&](const float* from) { return _mm512_maskz_loadu_ps(some, from + i); };
            const __m512 c = read(far), s = read(far + rotation.pairs), near = read(step), up = read(step + rotation.pairs);
            const __m512 cos = _mm512_mask_blend_ps(some, _mm512_set1_ps(kMaxInt16), (c * near - s * up) * kMaxInt16);
            const __m512 sin = (s * near + c * up) * kMaxInt16;
            const __m512i along = to_lanes(cos, cos), across = to_lanes(sin, -sin);
            for (int unit = 0; unit < units; ++unit) {
                const __m512i shrink = _mm512_cvtepi16_epi32(_mm256_castsi128_si256(_mm_loadl_epi64((const __m128i*)&shrinks[4 * unit])));
                const __m512i twice = _mm512_or_si512(shrink, _mm512_slli_epi32(shrink, 16)), shrinking = _mm512_shuffle_i32x4(twice, twice, 0);
                const int32_t* from = &full[(unit * size + i) * 4];
                int32_t* to = &int16[(unit * size + i) * 4];
                for (int k = 0; k < 4; ++k) {
                    const __m512i four = _mm512_add_epi32(quarter, _mm512_set1_epi32(4 * k));
                    const __m512i x = _mm512_load_si512(from + 16 * k), swapped = _mm512_rol_epi32(x, 16);
                    const __m512i first = _mm512_mulhrs_epi16(x, _mm512_permutexvar_epi32(four, along));
                    const __m512i rotated = _mm512_add_epi16(first, _mm512_mulhrs_epi16(swapped, _mm512_permutexvar_epi32(four, across)));
                    _mm512_store_si512(to + 16 * k, _mm512_mulhrs_epi16(rotated, shrinking));
                }
            }
        }
    }

    // Angles of a block's tokens relative to the first, by whose own the queries are rotated back; null where nothing rotates.
    const int16_t* rotate(int64_t start, int count) {
        const Rotation& rotation = problem.rotation;
        if (!rotation.pairs) return nullptr;
        const int32_t* positions = rotation.positions + row * rotation.position_stride + start;
        __m512i next = _mm512_add_epi32(_mm512_set1_epi32(positions[0]), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
        bool consecutive = true;
        for (int token = 0; token < count; token += 16, next = _mm512_add_epi32(next, _mm512_set1_epi32(16))) {
            const __mmask16 some = count - token >= 16 ? 0xffff : (1 << (count - token)) - 1;
            consecutive &= !_mm512_mask_cmpneq_epi32_mask(some, _mm512_maskz_loadu_epi32(some, positions + token), next);
        }
        unrotate(consecutive ? positions[0] : 0);
        lanes = consecutive ? rotation.lanes : own_lanes.data();
        if (consecutive) return rotation.int16;
        for (int i = 0; i < rotation.pairs * kBlock; ++i) {
            const int pair = i / kBlock, token = i % kBlock;
            float cos, sin;
            angle_at(rotation, positions[token < count ? token : 0], pair, cos, sin);
            const int16_t int16[] = {int16_t(std::lrint(cos * kMaxInt16)), int16_t(std::lrint(sin * kMaxInt16))};
            int16_t* to = &own_angles[2 * kBlock * pair + lane_index(token)];
            to[0] = int16[0], to[kBlock] = int16[1];
            own_lanes[i] = as_lane(int16[0], int16[1]), own_lanes[rotation.pairs * kBlock + i] = as_lane(int16_t(-int16[1]), int16[0]);
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
        return Spread::of_tokens(scale, zero, *unit, dim / count, count, kBlock);
    }

    // Queries times the scales of channels that a group of tokens shares, as words; and what their zeros add to scores.
    void scale_to_int16(const Spread& spread, int group) {
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
            zeros[group * rows + q] = _mm512_reduce_add_ps(sum);
            take_fitting(q, scaled, scaled + all, group);
        }
    }

    // Scores from the words that the queries are now.
    template <int queries, typename Keys>
    void score_tokens(const Keys& keys, int q, const int16_t* angles, Prefetcher& prefetcher, float* scores, int stride) {
        const int rotated = problem.rotation.pairs, groups = by_channel(side) ? side.range_tokens : 1;
        const int32_t* first = rotated ? &int16[q / 4 * 4 * all + q % 4] : &int16[q * all];
        const QueryView view{{first, first + (groups - 1) * capacity()}, rotated ? 4 : 1, rotated ? 1 : all};
        __m512i found[queries][4] = {};
        if (rotated) score_rows<queries, true>(keys, view, 0, rotated, pairs.interleaved ? 0 : rotated, angles, prefetcher, found);
        if (rotated < dim / 2) score_rows<queries, false>(keys, view, rotated, dim / 2, rotated ? 0 : pairs.rotated, nullptr, prefetcher, found);
        for (int i = 0; i < queries; ++i) {
            for (int half = 0; half < 2; ++half) {
                const int at = half * (groups - 1) * rows + q + i;
                const auto real = [&](__m512i sums) { return _mm512_cvtepi32_ps(sums) * inverse[at] + (by_channel(side) ? zeros[at] : 0.0f); };
                order_sums(real(found[i][2 * half]), real(found[i][2 * half + 1]), scores + i * stride + 32 * half);
            }
        }
    }

    // Each group of channels of a token has a scale and a zero.
    template <int queries, typename Keys>
    void score_by_token(const Keys& keys, int q, const Spread& spread, Prefetcher& prefetcher, float* scores, int stride) {
        const int length = dim / 2 / side.range_channels;
        const QueryView view{{&int16[q * all], &int16[q * all]}, 1, all};
        for (int group = 0; group < side.range_channels; ++group) {
            __m512i found[queries][4] = {};
            score_rows<queries, false>(keys, view, group * length, (group + 1) * length, pairs.rotated, nullptr, prefetcher, found);
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

    void read_outliers(const Block& block, const Spread& spread, bool rotated) {
        if (rotated) {
            differences.read(side, block, head, spread, inverse_units.data(), [&](__m512i token, __m512i channel, __m512 by, int at) {
                take_rotated(token, channel, by, at);
            });
        } else {
            differences.read(side, block, head, spread, nullptr, [&](__m512i token, __m512i channel, __m512 by, int at) {
                differences.put(at, channel, token, by);
            });
        }
    }

    void add_outliers(bool rotated, float* scores, int stride) {
        for (int q = 0; q < rows; q += 4) {
            std::fill(more.begin(), more.end(), 0.0f);
            rotated ? differences.add(&int16[q * all], lanes, more.data()) : differences.add(&real_query[q * dim], more.data());
            for (int token = 0; token < kBlock; token += 16) {
                __m512i sums[4];
                for (int k = 0; k < 4; ++k) sums[k] = _mm512_load_si512(&more[4 * token + 16 * k]);
                swap_parts(sums), swap_lanes(sums);
                for (int i = 0; i < 4 && q + i < rows; ++i) {
                    float* to = scores + (q + i) * stride + token;
                    const float scale = rotated ? inverse[q + i] / kMaxInt16 : 1.0f;
                    _mm512_storeu_ps(to, _mm512_loadu_ps(to) + _mm512_castsi512_ps(sums[i]) * scale);
                }
            }
        }
    }

    // Outliers by the lane that rotates them: that of their pair and token, for the pair's first number or for its second.
    void take_rotated(__m512i token, __m512i channel, __m512 by, int at) {
        const int rotated = problem.rotation.pairs;
        __mmask16 second;
        const __m512i pair = pairs.of(channel, second), rotating_lane = _mm512_add_epi32(_mm512_slli_epi32(pair, 6), token);
        const __mmask16 rotates = _mm512_cmplt_epi32_mask(pair, _mm512_set1_epi32(rotated));
        const __m512i first = _mm512_mask_mov_epi32(_mm512_set1_epi32(2 * rotated * kBlock), rotates, rotating_lane);
        const __m512i step = _mm512_mask_mov_epi32(_mm512_set1_epi32(1), rotates, _mm512_set1_epi32(rotated * kBlock));
        _mm512_storeu_si512(&differences.lane[at], _mm512_mask_add_epi32(first, second, first, step));
        differences.put(at, pair, token, by);
    }
};

}  // namespace
}  // namespace narrowkv
