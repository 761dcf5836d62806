// Scores of keys in trellis-coded streams in int16: grid steps, scaled as far as 16 bits allow, and what the mean adds to
// them.
//
// Two coefficients of a token lie in a lane of 32 bits, and a register holds those of a frame, so that a query is the same for
// all lanes. Bytes are put in the order that leads to this before they are decoded, when they are fewest.

#pragma once

#include "stream_keys.h"
#include "int16_keys.h"

namespace narrowkv {
namespace {

constexpr int kTogether = 8;  // queries
constexpr int kWords = 32;  // of a register

// Where the byte of a token stands: of each lane of 32 bits that two bytes of two coefficients become, the frame is known by
// its position.
inline constexpr int byte_of(int token) { return token % kFrame / 4 * 16 + token % 2 * 8 + token / kFrame * 2 + token % 4 / 2; }
struct ByFrames {
    NARROWKV_INLINE Lanes operator()(Lanes bytes) const {
        alignas(64) static constexpr auto order = [] {
            std::array<uint8_t, kBlock> found{};
            for (int token = 0; token < kBlock; ++token) found[byte_of(token)] = uint8_t(token);
            return found;
        }();
        return Lanes(_mm512_permutexvar_epi8(_mm512_load_si512(order.data()), __m512i(bytes)));
    }
};

// Where a word of a query stands while it is rotated: so that, with four frames side by side, four pairs of words follow each
// other.
inline constexpr int slot_of(int i) { return i / 32 * 32 + i % 8 / 2 * 8 + i % 32 / 8 * 2 + i % 2; }

// What the scores of a block are made of. tile: [coded][64] in the order of `byte_of`.
struct Entries {
    const int8_t* tile;
    const int32_t* scale_weights;  // [dim][2]: of even bytes of each coefficient, and of odd ones
    const int16_t* offsets;  // [dim / 2][16][2]
    int coded, dim;
};

// Add a pair of coefficients to sums of some queries, [queries][elements], each of every fourth token from `first` on. query:
// [queries], a register's words apart, of four frames.
template <int queries, int first, int count>
NARROWKV_INLINE inline void add_pair(const __m512i* elements, const int16_t* query, __m512i (*sums)[count]) {
    each<queries>([&](auto q) NARROWKV_INLINE {
        const __m512i pair = _mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)(query + q * kWords)));
        each<count>([&](auto i) NARROWKV_INLINE { sums[q][i] = _mm512_dpwssd_epi32(sums[q][i], elements[i], pair); });
    });
}

// Sums [queries][count] of tokens first, first + 1, ... of every four. query: words [dim / 8][queries][4 pairs][frames][2].
template <int queries, int first, int count>
inline void multiply_frames(const Entries& entries, const int16_t* query, __m512i (*sums)[count]) {
    const int8_t* tile = entries.tile;
    const int32_t* scale_weights = entries.scale_weights;
    const int16_t* offsets = entries.offsets;
    const auto offset = [&](int pair, __m512i* to) NARROWKV_INLINE {
        const __m512i all = load_int16(offsets + pair * kWords);
        each<count>([&](auto i) NARROWKV_INLINE { to[i] = _mm512_shuffle_epi32(all, _MM_PERM_ENUM((first + i) * 0x55)); });
    };
    int i = 0;
    for (; i < entries.coded; i += kUnit, tile += kUnit * kBlock, scale_weights += 2 * kUnit, offsets += kUnit * kFrame, query += queries * kWords) {
        each<kUnit / 2>([&](auto pair) NARROWKV_INLINE {
            const __m512i x = _mm512_load_si512(tile + 2 * pair * kBlock), y = _mm512_load_si512(tile + (2 * pair + 1) * kBlock);
            __m512i elements[count];
            offset(pair, elements);
            each<count / 2>([&](auto part) NARROWKV_INLINE {
                const int32_t* by = scale_weights + 4 * pair + first / 2 + part;
                const __m512i a = _mm512_maddubs_epi16(_mm512_set1_epi32(by[0]), x), b = _mm512_maddubs_epi16(_mm512_set1_epi32(by[2]), y);
                elements[2 * part] = _mm512_add_epi16(elements[2 * part], _mm512_unpacklo_epi16(a, b));
                elements[2 * part + 1] = _mm512_add_epi16(elements[2 * part + 1], _mm512_unpackhi_epi16(a, b));
            });
            add_pair<queries, first, count>(elements, query + pair * 2 * kFrames, sums);
        });
    }
    for (int pair = 0; i < entries.dim; i += 2, ++pair) {
        __m512i elements[count];
        offset(pair, elements);
        add_pair<queries, first, count>(elements, query + pair / 4 * queries * kWords + pair % 4 * 2 * kFrames, sums);
    }
}

// Words in the order of elements, `width` of them, of `from`, of which there are a multiple of 64.
inline void pick_int16(const int16_t* from, int count, const int16_t* order, int width, int16_t* __restrict to) {
    for (int at = 0; at < count; at += 2 * kWords) {
        const __m512i first = load_int16(from + at), second = load_int16(from + at + kWords), part = _mm512_set1_epi16(int16_t(at / (2 * kWords)));
        for (int i = 0; i < width; i += kWords) {
            const __m512i lanes = load_int16(order + i), found = _mm512_permutex2var_epi16(first, lanes, second);
            const __mmask32 here = _mm512_cmpeq_epi16_mask(_mm512_srli_epi16(lanes, 6), part);
            at == 0 ? store_int16(to + i, found) : _mm512_mask_storeu_epi16(to + i, here, found);
        }
    }
}

// Cosines and sines of up to 32 pairs at a position, from the first one on, as words; of pairs that do not rotate those of 0.
inline void int16_angles(const Rotation& rotation, int32_t position, int first, __m512i& cos, __m512i& sin) {
    cos = _mm512_set1_epi16(int16_t(kMaxInt16)), sin = _mm512_setzero_si512();
    if (first >= rotation.pairs) return;
    position = within(rotation, position);
    const float* far = rotation.far + int64_t(position / kBlock) * 2 * rotation.pairs;
    const float* step = rotation.steps + position % kBlock * 2 * rotation.pairs;
    __m256i c[2], s[2];
    for (int half = 0; half < 2; ++half) {
        const int i = first + 16 * half, left = rotation.pairs - i;
        const __mmask16 some = left >= 16 ? 0xffff : left > 0 ? (1 << left) - 1 : 0;
        const auto read = [&](const float* from) { return _mm512_maskz_loadu_ps(some, from + i); };
        const __m512 x = read(far), y = read(far + rotation.pairs), near = read(step), up = read(step + rotation.pairs);
        const auto word = [](__m512 element) { return _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(element * kMaxInt16)); };
        c[half] = word(_mm512_mask_blend_ps(some, _mm512_set1_ps(1.0f), x * near - y * up)), s[half] = word(y * near + x * up);
    }
    cos = _mm512_inserti64x4(_mm512_castsi256_si512(c[0]), c[1], 1), sin = _mm512_inserti64x4(_mm512_castsi256_si512(s[0]), s[1], 1);
}

class Int16StreamKeys : StreamKeys {
  public:
    explicit Int16StreamKeys(const Problem& problem)
        : StreamKeys(problem), streams(*problem.keys.streams), half(dim / 2), width(round_up(dim, kWords)), capacity(round_up(half, 2 * kWords)),
          along(rows * width), across(rows * width), query(kTogether * kFrames * width), order(width), natural(2 * kFrames * capacity),
          angles(2 * kFrames * width), scale_weights(2 * dim), query_index(width), factors(3 * width), inverse(rows),
          int16(round_up(rows, 4) * dim), lane_of(dim), lanes(kFrames * capacity), more(4 * kBlock) {}

    int steps() const { return streams.coded() / kUnit; }

    void begin(int row, int head) {
        StreamKeys::begin(row, head);
        const int32_t *int16_scales = streams.int16_scales + int64_t(head) * dim, *int16_maxima = streams.int16_maxima + int64_t(head) * dim;
        const int pairs = problem.rotation.pairs;
        any_outliers = false;
        for (int i = 0; i < dim; ++i) {
            const int at = slot_of(i), element = streams.query_index[int64_t(head) * dim + i], pair = element < half ? element : element - half;
            scale_weights[2 * i] = (int16_scales[i] & 255) * 0x10001, scale_weights[2 * i + 1] = scale_weights[2 * i] << 8;
            query_index[at] = element, order[at] = int16_t(pair);
            lane_of[i] = pair / 32 * 32 + pair % 8 / 4 * 16 + pair % 32 / 8 * 4 + pair % 4;
            factors[at] = (pair < pairs ? problem.rotation.scaling : 1.0f) / float(int16_scales[i]);
            factors[width + at] = pair < pairs ? factors[at] : 0.0f;
            factors[2 * width + at] = float(int16_maxima[i]);
        }
        for (int q = 0; q < rows; ++q) take(q);
    }

    // Scores of a block, [rows][stride], whose first token is `start`; `count` of its tokens count.
    void score(const Block& block, int64_t start, int count, Prefetcher& prefetcher, float* scores, int stride) {
        int32_t positions[kFrames] = {};
        if (!find_positions(start, std::min(count, kBlock), positions)) return take_apart(block, start, count, scores, stride);
        const uint8_t* codes = block.planes[0] + int64_t(head) * streams.bytes * kBlock;
        by_units(streams, [&](auto k, int row, int unit) NARROWKV_INLINE {
            decode_unit<k>(streams, codes, row, ByFrames(), tile.data() + unit * kUnit * kBlock);
            prefetcher.step(1);
        });
        rotate_to(positions);
        if (block.outlier_offsets) read_outliers(block);  // before the scores, so that these need not wait for them
        by_many<kTogether>(rows, [&](int first, auto queries) { score_some<queries>(first, scores + first * stride, stride); });
        if (block.outlier_offsets) add_outliers(scores, stride);
    }

  private:
    const Streams& streams;
    const int half, width, capacity;   // width: of a query, in words
    Buffer<int16_t> along, across;   // [rows][width] in the order of `slot_of`: queries where angles are 0, and a quarter of a cycle further
    Buffer<int16_t> query;           // some, as `multiply_frames` reads them
    Buffer<int16_t> order, natural;  // which pair each word is of; [frames][2][capacity] cosines and sines of pairs
    Buffer<int16_t> angles;          // [2][frames][width]: those of words
    Buffer<int32_t> scale_weights, query_index;  // query_index: of words
    Buffer<float> factors;            // [3][width]: what elements of a query are multiplied by, those a quarter of a cycle further, and the largest words they meet
    Buffer<float> inverse;
    bool any_outliers = false;
    Buffer<int32_t> int16;    // [rows / 4][dim][4]: queries as outliers meet them, both elements in a lane
    Buffer<int32_t> lane_of;  // where among the lanes of a frame a coefficient's angle is
    Buffer<int32_t> lanes;    // [frames][capacity] cosines and sines in a lane, in the order in which registers fall apart
    Buffer<float> more;       // what outliers add to scores, [64][4]
    Differences differences;

    // A query as words as large as sums allow.
    void take(int q) {
        __m512 sum = {}, largest = {};
        const auto element = [&](const Buffer<float>& from, int part, int i) {
            const __m512i at = _mm512_load_si512(&query_index[i]);
            return _mm512_i32gather_ps(at, &from[q * dim], 4) * _mm512_load_ps(&factors[part * width + i]);
        };
        for (int i = 0; i < width; i += 16) {
            const __m512 x = element(unrotated, 0, i), y = element(crossed, 1, i), length = _mm512_sqrt_ps(x * x + y * y);
            sum += length * _mm512_load_ps(&factors[2 * width + i]), largest = _mm512_max_ps(largest, length);
        }
        const float total = _mm512_reduce_add_ps(sum);
        const float factor = total > 0.0f ? std::min(kMostSum / total, kMaxRotated / _mm512_reduce_max_ps(largest)) : 0.0f;
        inverse[q] = factor > 0.0f ? 1.0f / factor : 0.0f;
        const auto store = [&](int16_t* to, __m512 x) { _mm256_store_si256((__m256i*)to, _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(x * factor))); };
        for (int i = 0; i < width; i += 16) {
            store(&along[q * width + i], element(unrotated, 0, i)), store(&across[q * width + i], element(crossed, 1, i));
        }
    }

    void rotate_to(const int32_t* positions) {
        const Rotation& rotation = problem.rotation;
        for (int frame = 0; frame < kFrames; ++frame) {
            int16_t *cos = &natural[2 * frame * capacity], *sin = cos + capacity;
            for (int i = 0; i < capacity; i += kWords) {
                __m512i c, s;
                int16_angles(rotation, positions[frame], i, c, s);
                store_int16(cos + i, c), store_int16(sin + i, s);
                int32_t* both = &lanes[frame * capacity + i];
                _mm512_store_si512(both, _mm512_unpacklo_epi16(c, s)), _mm512_store_si512(both + 16, _mm512_unpackhi_epi16(c, s));
            }
        }
        for (int part = 0; part < 2 * kFrames; ++part) {  // read only now: stores take their time
            const int16_t* from = &natural[(part % kFrames * 2 + part / kFrames) * capacity];
            pick_int16(from, capacity, order.data(), width, &angles[part * width]);
        }
    }

    // Queries as `Differences` multiplies them.
    void take_whole() {
        any_outliers = true;
        for (int q = 0; q < rows; ++q) {
            for (int i = 0; i < dim; ++i) {
                const int at = q * width + slot_of(i), to = (q / 4 * dim + i) * 4 + q % 4;
                int16[to] = int32_t(uint32_t(uint16_t(across[at])) << 16 | uint16_t(along[at]));
            }
        }
    }

    void read_outliers(const Block& block) {
        const __m512i size = _mm512_set1_epi32(capacity);
        if (!any_outliers) take_whole();
        differences.read_streams(problem.keys, block, head, [&](__m512i token, __m512i coefficient) {
            const auto times = [](__m512i x, int shift, int mask) { return _mm512_slli_epi32(_mm512_and_si512(x, _mm512_set1_epi32(mask)), shift); };
            const __m512i within = _mm512_or_si512(_mm512_or_si512(times(token, 2, 12), times(token, 3, 1)), _mm512_srli_epi32(times(token, 0, 2), 1));
            const __m512i byte = _mm512_add_epi32(within, _mm512_slli_epi32(_mm512_srli_epi32(token, 4), 1));
            return signed_bytes(bytes_at(tile.data(), _mm512_add_epi32(_mm512_slli_epi32(coefficient, 6), byte)));
        }, [&](__m512i token, __m512i coefficient, __m512 by, int i) {
            const __m512 stretched = _mm512_cvtepi32_ps(_mm512_i32gather_epi32(coefficient, streams.int16_scales + int64_t(head) * dim, 4)) * (1.0f / 32768.0f);
            const __m512i pair = _mm512_i32gather_epi32(coefficient, lane_of.data(), 4);
            differences.put(i, coefficient, token, by * stretched);
            _mm512_storeu_si512(&differences.lane[i], _mm512_add_epi32(_mm512_mullo_epi32(_mm512_srli_epi32(token, 4), size), pair));
        });
    }

    // Of keys as they lie, rotated to the angles of the outliers' frames.
    void add_outliers(float* scores, int stride) {
        for (int first = 0; first < rows; first += 4) {
            std::fill(more.begin(), more.end(), 0.0f);
            differences.add(&int16[first * dim], lanes.data(), more.data());
            for (int token = 0; token < kBlock; token += 16) {
                __m512i four[4];
                each<4>([&](auto i) NARROWKV_INLINE { four[i] = _mm512_load_si512(&more[4 * (token + 4 * i)]); });
                swap_parts(four), swap_lanes(four);
                for (int q = 0; q < std::min(4, rows - first); ++q) {
                    float* to = scores + (first + q) * stride + token;
                    _mm512_storeu_ps(to, _mm512_loadu_ps(to) + _mm512_castsi512_ps(four[q]) * inverse[first + q]);
                }
            }
        }
    }

    // Queries rotated to the angles of all frames.
    template <int queries>
    void rotate_some(int first) {
        const int size = width;
        const int16_t *x = &along[first * size], *y = &across[first * size], *cos = angles.data(), *sin = cos + kFrames * size;
        int16_t* __restrict to = query.data();
        for (int i = 0; i < size; i += kWords, to += kFrames * queries * kWords) {
            __m512i c[kFrames], s[kFrames];
            each<kFrames>([&](auto frame) NARROWKV_INLINE { c[frame] = load_int16(cos + frame * size + i), s[frame] = load_int16(sin + frame * size + i); });
            for (int q = 0; q < queries; ++q) {
                const __m512i a = load_int16(x + q * size + i), b = load_int16(y + q * size + i);
                __m512i rotated[kFrames];
                each<kFrames>([&](auto frame) NARROWKV_INLINE {
                    rotated[frame] = _mm512_add_epi16(_mm512_mulhrs_epi16(a, c[frame]), _mm512_mulhrs_epi16(b, s[frame]));
                });
                swap_lanes(rotated);
                each<kFrames>([&](auto four) NARROWKV_INLINE { store_int16(to + (four * queries + q) * kWords, rotated[four]); });
            }
        }
    }

    template <int queries>
    void score_some(int first, float* scores, int stride) {
        rotate_some<queries>(first);
        const Entries entries{tile.data(), scale_weights.data(), streams.int16_offsets + int64_t(head) * dim * kFrame, streams.coded(), dim};
        __m512i found[queries][4] = {};
        if constexpr (queries <= 4) {
            multiply_frames<queries, 0, 4>(entries, query.data(), found);
        } else {
            each<2>([&](auto part) NARROWKV_INLINE {  // sums of all would not fit registers
                __m512i sums[queries][2] = {};
                multiply_frames<queries, 2 * part, 2>(entries, query.data(), sums);
                each<queries>([&](auto q) NARROWKV_INLINE { found[q][2 * part] = sums[q][0], found[q][2 * part + 1] = sums[q][1]; });
            });
        }
        each<queries>([&](auto q) NARROWKV_INLINE {
            swap_lanes(found[q]);
            each<kFrames>([&](auto frame) NARROWKV_INLINE {
                _mm512_storeu_ps(scores + q * stride + frame * kFrame, _mm512_cvtepi32_ps(found[q][frame]) * inverse[first + q]);
            });
        });
    }
};

}  // namespace
}  // namespace narrowkv
