// Scores of keys in trellis-coded streams in int16 with AVX2, as `Int16StreamKeys` computes them, eight tokens a register.
//
// A frame's sums of four queries fill half of the registers. Two coefficients of a token are interleaved when they are decoded,
// so that bytes widen to words in order, and two words of a query meet all tokens of a frame.

#pragma once

#include "int16_worker.h"
#include "stream_keys.h"

namespace narrowkv {
namespace {

inline __m256i load_words(const void* p) { return _mm256_load_si256(static_cast<const __m256i*>(p)); }
inline void store_words(void* p, __m256i x) { _mm256_store_si256(static_cast<__m256i*>(p), x); }

// Where a token's coefficient lies in a tile, [coded / 2][2 pairs of frames][2 halves of a frame][2 frames][8 tokens][2].
inline int byte_of(int coefficient, int token) {
    return coefficient / 2 * 2 * kBlock + token / 32 * kBlock + token % 16 / 8 * 32 + token % 32 / 16 * 16 + token % 8 * 2 + coefficient % 2;
}

class Avx2StreamKeys : StreamKeys {
  public:
    explicit Avx2StreamKeys(const Problem& problem)
        : StreamKeys(problem), streams(*problem.keys.streams), half(dim / 2), width(round_up(dim, kWords)), along(rows * width),
          across(rows * width), query(kFrames * rows * width), slots(width), angles(round_up(half, 8) * kOfPair), scale_weights(half),
          factors(3 * width), inverse(rows) {}

    int steps() const { return streams.coded() / kUnit; }

    void begin(int row, int head) {
        StreamKeys::begin(row, head);
        const int32_t *scales = streams.int16_scales + int64_t(head) * dim, *maxima = streams.int16_maxima + int64_t(head) * dim;
        const int32_t* query_index = streams.query_index + int64_t(head) * dim;
        for (int i = 0; i < dim; ++i) {
            const int pair = query_index[i] < half ? query_index[i] : query_index[i] - half;
            const bool rotates = pair < problem.rotation.pairs;
            slots[i] = pair / 8 * 8 + pair % 4 * 2 + pair % 8 / 4;
            factors[i] = (rotates ? problem.rotation.scaling : 1.0f) / float(scales[i]);
            factors[width + i] = rotates ? factors[i] : 0.0f;
            factors[2 * width + i] = float(maxima[i]);
        }
        for (int i = 0; i < half; ++i) scale_weights[i] = (scales[2 * i + 1] & 255) << 16 | (scales[2 * i] & 255);
        for (int q = 0; q < rows; ++q) take(q, query_index);
    }

    // Scores of a block, [rows][stride], whose first token is `start`; `count` of its tokens count.
    void score(const Block& block, int64_t start, int count, Prefetcher& prefetcher, float* scores, int stride) {
        int32_t positions[kFrames] = {};
        if (!find_positions(start, std::min(count, kBlock), positions)) return take_apart(block, start, count, scores, stride);
        const uint8_t* codes = block.planes[0] + int64_t(head) * streams.bytes * kBlock;
        by_units(streams, [&](auto k, int row, int unit) NARROWKV_INLINE {
            int8_t* to = tile.data() + unit * kUnit * kBlock;
            Lanes even;
            decode_unit<k>(streams, codes, row, AsTheyLie(), [&](auto i, int token, Lanes value) NARROWKV_INLINE {
                if constexpr (i % 2 == 0) {
                    even = value;
                } else {
                    int8_t* both = to + i / 2 * 2 * kBlock + 2 * token;
                    store_words(both, _mm256_unpacklo_epi8(__m256i(even), __m256i(value)));
                    store_words(both + 32, _mm256_unpackhi_epi8(__m256i(even), __m256i(value)));
                }
            });
            prefetcher.step(1);
        });
        take_angles(positions);
        rotate_queries();
        by_many<4>(rows, [&](int first, auto queries) {
            for (int frame = 0; frame < kFrames; ++frame) score_frame<queries>(frame, first, scores + first * stride + frame * kFrame, stride);
        });
        if (block.outlier_offsets) add_outliers(block, scores, stride);
    }

  private:
    static constexpr int kWords = 16, kOfPair = 2 * kFrames;  // words of a register, and of the angles of a pair
    const Streams& streams;
    const int half, width;          // width: of a query, in words
    Buffer<int16_t> along, across;  // [rows][width]: queries where angles are 0, and a quarter of a cycle further
    Buffer<int16_t> query;          // [frames][rows][width]: rotated
    Buffer<int32_t> slots;          // where the angles of each coefficient's pair are
    Buffer<int16_t> angles;         // [pairs][2][frames]: cosines, sines
    Buffer<int32_t> scale_weights;  // [dim / 2]: of two coefficients
    Buffer<float> factors;  // [3][width]: what elements of a query are multiplied by, those a quarter of a cycle further, and the largest words they meet
    Buffer<float> inverse;

    // A query as words as large as sums allow.
    void take(int q, const int32_t* query_index) {
        Floats sum = {}, largest = {};
        const float *x = &unrotated[q * dim], *y = &crossed[q * dim];
        Buffer<float> found(2 * width);
        for (int i = 0; i < dim; ++i) found[i] = x[query_index[i]] * factors[i], found[width + i] = y[query_index[i]] * factors[width + i];
        for (int i = 0; i < width; i += simd::width) {
            const Floats a = load(&found[i]), b = load(&found[width + i]), length = Floats(_mm256_sqrt_ps(__m256(a * a + b * b)));
            sum += length * load(&factors[2 * width + i]), largest = length > largest ? length : largest;
        }
        float total = 0.0f, most = 0.0f;
        for (int lane = 0; lane < simd::width; ++lane) total += sum[lane], most = std::max(most, largest[lane]);
        const float factor = total > 0.0f ? std::min(kMostSum / total, kMaxRotated / most) : 0.0f;
        inverse[q] = factor > 0.0f ? 1.0f / factor : 0.0f;
        for (int i = 0; i < dim; ++i) {
            along[q * width + i] = int16_t(std::lrint(found[i] * factor)), across[q * width + i] = int16_t(std::lrint(found[width + i] * factor));
        }
    }

    // Cosines and sines of eight pairs at a position, as words in lanes; of pairs that do not rotate those of 0.
    void angles_at(int32_t position, int first, __m256i& cos, __m256i& sin) const {
        const Rotation& rotation = problem.rotation;
        const auto words = [](Floats x) { return _mm256_cvtps_epi32(__m256(x * kMaxInt16)); };
        cos = words(all(1.0f)), sin = _mm256_setzero_si256();
        if (first >= rotation.pairs) return;
        position = within(rotation, position);
        const __m256i some = _mm256_cmpgt_epi32(_mm256_set1_epi32(rotation.pairs - first), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
        const bool whole = first + simd::width <= rotation.pairs;
        const auto read = [&](const float* from) { return whole ? load(from + first) : Floats(_mm256_maskload_ps(from + first, some)); };
        const float* far = rotation.far + int64_t(position / kBlock) * 2 * rotation.pairs;
        const float* step = rotation.steps + position % kBlock * 2 * rotation.pairs;
        const Floats x = read(far), y = read(far + rotation.pairs), near = read(step), up = read(step + rotation.pairs);
        cos = _mm256_blendv_epi8(cos, words(x * near - y * up), some), sin = words(y * near + x * up);
    }

    // Those of all pairs and frames.
    void take_angles(const int32_t* positions) {
        for (int first = 0; first < half; first += 8) {
            __m256i cos[kFrames], sin[kFrames];
            each<kFrames>([&](auto frame) NARROWKV_INLINE { angles_at(positions[frame], first, cos[frame], sin[frame]); });
            const auto both = [](__m256i x, __m256i y) { return _mm256_blend_epi16(x, _mm256_slli_epi32(y, 16), 0xaa); };
            const __m256i c[] = {both(cos[0], cos[1]), both(cos[2], cos[3])}, s[] = {both(sin[0], sin[1]), both(sin[2], sin[3])};
            const __m256i low_c = _mm256_unpacklo_epi32(c[0], c[1]), high_c = _mm256_unpackhi_epi32(c[0], c[1]);
            const __m256i low_s = _mm256_unpacklo_epi32(s[0], s[1]), high_s = _mm256_unpackhi_epi32(s[0], s[1]);
            int16_t* to = &angles[first * kOfPair];
            store_words(to, _mm256_unpacklo_epi64(low_c, low_s)), store_words(to + kWords, _mm256_unpackhi_epi64(low_c, low_s));
            store_words(to + 2 * kWords, _mm256_unpacklo_epi64(high_c, high_s)), store_words(to + 3 * kWords, _mm256_unpackhi_epi64(high_c, high_s));
        }
    }

    // Those of the pairs of sixteen coefficients: cosines of all frames, then sines.
    void angles_of(const int32_t* slots, __m256i* found) const {
        const auto read = [&](int i) { return _mm_load_si128(reinterpret_cast<const __m128i*>(&angles[slots[i] * kOfPair])); };
        __m256i x[kOfPair], y[kOfPair];
        each<kOfPair>([&](auto i) NARROWKV_INLINE { x[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(read(i)), read(8 + i), 1); });
        each<4>([&](auto i) NARROWKV_INLINE {
            y[i] = _mm256_unpacklo_epi16(x[2 * i], x[2 * i + 1]), y[4 + i] = _mm256_unpackhi_epi16(x[2 * i], x[2 * i + 1]);
        });
        each<2>([&](auto part) NARROWKV_INLINE {
            const __m256i* z = y + 4 * part;
            const __m256i low[] = {_mm256_unpacklo_epi32(z[0], z[1]), _mm256_unpacklo_epi32(z[2], z[3])};
            const __m256i high[] = {_mm256_unpackhi_epi32(z[0], z[1]), _mm256_unpackhi_epi32(z[2], z[3])};
            found[4 * part] = _mm256_unpacklo_epi64(low[0], low[1]), found[4 * part + 1] = _mm256_unpackhi_epi64(low[0], low[1]);
            found[4 * part + 2] = _mm256_unpacklo_epi64(high[0], high[1]), found[4 * part + 3] = _mm256_unpackhi_epi64(high[0], high[1]);
        });
    }

    // Queries rotated to the angles of all frames.
    void rotate_queries() {
        const int size = width, frame_size = rows * width;  // of their own: stores might change members, for all the compiler knows
        for (int i = 0; i < size; i += kWords) {
            __m256i by[kOfPair];
            angles_of(&slots[i], by);
            const int16_t *x = &along[i], *y = &across[i];
            int16_t* to = &query[i];
            for (const int16_t* end = x + frame_size; x < end; x += size, y += size, to += size) {
                const __m256i a = load_words(x), b = load_words(y);
                each<kFrames>([&](auto frame) NARROWKV_INLINE {
                    store_words(to + frame * frame_size, _mm256_add_epi16(_mm256_mulhrs_epi16(a, by[frame]), _mm256_mulhrs_epi16(b, by[kFrames + frame])));
                });
            }
        }
    }

    // Scores of a frame, [queries][stride].
    template <int queries>
    void score_frame(int frame, int first, float* scores, int stride) const {
        const int16_t *from = &query[(frame * rows + first) * width], *offsets = streams.int16_offsets + int64_t(head) * dim * kFrame;
        const int8_t* bytes = tile.data() + byte_of(0, frame * kFrame);
        __m256i sums[queries][2] = {};
        const auto add = [&](int pair, __m256i x, __m256i y) NARROWKV_INLINE {
            each<queries>([&](auto q) NARROWKV_INLINE {
                int32_t two;
                std::memcpy(&two, from + q * width + 2 * pair, sizeof two);
                const __m256i by = _mm256_set1_epi32(two);
                sums[q][0] = _mm256_add_epi32(sums[q][0], _mm256_madd_epi16(x, by)), sums[q][1] = _mm256_add_epi32(sums[q][1], _mm256_madd_epi16(y, by));
            });
        };
        const auto offset = [&](int pair, int part) NARROWKV_INLINE {
            return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(offsets + (2 * pair + part) * kWords));
        };
        int pair = 0;
        for (; pair < streams.coded() / 2; ++pair) {
            const __m256i by = _mm256_set1_epi32(scale_weights[pair]);
            const auto element = [&](int part) NARROWKV_INLINE {
                const __m128i* from = reinterpret_cast<const __m128i*>(bytes + pair * 2 * kBlock + part * 32);
                return _mm256_add_epi16(_mm256_mullo_epi16(_mm256_cvtepi8_epi16(_mm_load_si128(from)), by), offset(pair, part));
            };
            add(pair, element(0), element(1));
        }
        for (; pair < half; ++pair) add(pair, offset(pair, 0), offset(pair, 1));
        each<queries>([&](auto q) NARROWKV_INLINE {
            each<2>([&](auto part) NARROWKV_INLINE { store(scores + q * stride + part * 8, Floats(_mm256_cvtepi32_ps(sums[q][part])) * inverse[first + q]); });
        });
    }

    void add_outliers(const Block& block, float* scores, int stride) {
        const int32_t* scales = streams.int16_scales + int64_t(head) * dim;
        misses.of_block(problem.keys, block, head, [&](int coefficient, int token) { return tile[byte_of(coefficient, token)]; });
        for (const Miss& miss : misses) {
            const int16_t* from = &query[miss.token / kFrame * rows * width + miss.coefficient];
            const float by = miss.by * float(scales[miss.coefficient]);
            for (int q = 0; q < rows; ++q) scores[q * stride + miss.token] += float(from[q * width]) * by * inverse[q];
        }
    }
};

}  // namespace
}  // namespace narrowkv
