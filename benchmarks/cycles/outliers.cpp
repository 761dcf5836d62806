// Times one outlier for each token and head: a position of 8 bits and, in float16, what the decoded value misses by.

#include <random>

#include "clock.h"

using namespace cycles;

namespace {

constexpr int kTokens = 64, kDim = 128, kMostQueries = 4;

struct Block {
    alignas(64) uint8_t position[kTokens];
    alignas(64) uint16_t miss[kTokens];
    alignas(64) float query[kMostQueries][kDim];
    alignas(64) float cos[kDim / 2][kTokens], sin[kDim / 2][kTokens];
    alignas(64) float weights[kTokens][4];
};

inline __m256i positions(const Block& block, int token) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(block.position + token))); }
inline __m256 misses(const Block& block, int token) { return _mm256_cvtph_ps(_mm_load_si128((const __m128i*)(block.miss + token))); }

// Add query[position] * miss to the scores of eight tokens at a time.
template <int queries>
__attribute__((noinline)) void add_to_scores(const Block& block, float (*scores)[kTokens]) {
    for (int token = 0; token < kTokens; token += 8) {
        const __m256i at = positions(block, token);
        const __m256 miss = misses(block, token);
        for (int q = 0; q < queries; ++q) {
            _mm256_store_ps(scores[q] + token, _mm256_fmadd_ps(_mm256_i32gather_ps(block.query[q], at, 4), miss, _mm256_load_ps(scores[q] + token)));
        }
    }
}

// The same where neighbors are rotated by the token's angle after they are decoded.
template <int queries>
__attribute__((noinline)) void add_rotated(const Block& block, float (*scores)[kTokens]) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    for (int token = 0; token < kTokens; token += 8) {
        const __m256i at = positions(block, token), angle = _mm256_add_epi32(_mm256_slli_epi32(_mm256_srli_epi32(at, 1), 6), _mm256_add_epi32(lanes, _mm256_set1_epi32(token)));
        const __m256 sign = _mm256_castsi256_ps(_mm256_slli_epi32(at, 31)), miss = misses(block, token);  // the second of a pair: minus
        const __m256 along = _mm256_mul_ps(miss, _mm256_i32gather_ps(block.cos[0], angle, 4));
        const __m256 across = _mm256_xor_ps(sign, _mm256_mul_ps(miss, _mm256_i32gather_ps(block.sin[0], angle, 4)));
        for (int q = 0; q < queries; ++q) {
            const __m256 own = _mm256_i32gather_ps(block.query[q], at, 4), other = _mm256_i32gather_ps(block.query[q], _mm256_xor_si256(at, _mm256_set1_epi32(1)), 4);
            const __m256 score = _mm256_fmadd_ps(own, along, _mm256_load_ps(scores[q] + token));
            _mm256_store_ps(scores[q] + token, _mm256_fmadd_ps(other, across, score));
        }
    }
}

// Add weight * miss to the sums at the position, one token after the other, of four queries at once or of one.
template <int queries>
__attribute__((noinline)) void add_to_sums(const Block& block, float (*sums)[4]) {
    for (int token = 0; token < kTokens; ++token) {
        const float miss = _cvtsh_ss(block.miss[token]);
        float* to = sums[block.position[token]];
        if (queries == 1) to[0] += miss * block.weights[token][0];
        else _mm_store_ps(to, _mm_fmadd_ps(_mm_set1_ps(miss), _mm_load_ps(block.weights[token]), _mm_load_ps(to)));
    }
}

template <int queries>
void time_outliers(const Block& block) {
    alignas(64) static float scores[kMostQueries][kTokens], sums[kDim][4];
    const auto fresh = [&] { std::memset(scores, 0, sizeof scores), std::memset(sums, 0, sizeof sums); };
    const auto check = [&](const Row& row, bool rotated) {
        for (int q = 0; q < queries; ++q) {
            for (int t = 0; t < kTokens; ++t) {
                const int at = block.position[t];
                const double cos = rotated ? block.cos[at / 2][t] : 1, sin = rotated ? block.sin[at / 2][t] * (at % 2 ? -1 : 1) : 0;
                require(close(scores[q][t], _cvtsh_ss(block.miss[t]) * (block.query[q][at] * cos + block.query[q][at ^ 1] * sin), 1e-4), row);
            }
        }
    };
    const Row still{"outliers", "scores", "1 of 128", queries}, rotated{"outliers", "scores, rotated keys", "1 of 128", queries}, values{"outliers", "values", "1 of 128", queries};
    fresh(), add_to_scores<queries>(block, scores), check(still, false);
    print(still, nanoseconds([&](int) { add_to_scores<queries>(block, scores); }) / kTokens);
    fresh(), add_rotated<queries>(block, scores), check(rotated, true);
    print(rotated, nanoseconds([&](int) { add_rotated<queries>(block, scores); }) / kTokens);
    fresh(), add_to_sums<queries>(block, sums);
    for (int d = 0; d < kDim; ++d) {
        for (int q = 0; q < queries; ++q) {
            double expected = 0;
            for (int t = 0; t < kTokens; ++t) expected += block.position[t] == d ? block.weights[t][q] * _cvtsh_ss(block.miss[t]) : 0.0f;
            require(close(sums[d][q], expected, 1e-4), values);
        }
    }
    print(values, nanoseconds([&](int) { add_to_sums<queries>(block, sums); }) / kTokens);
}

}  // namespace

int main() {
    std::mt19937 random(0);
    std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
    static Block block;
    for (int t = 0; t < kTokens; ++t) {
        block.position[t] = uint8_t(random() % kDim), block.miss[t] = _cvtss_sh(uniform(random), 0);
        for (float& weight : block.weights[t]) weight = uniform(random);
        for (int pair = 0; pair < kDim / 2; ++pair) block.cos[pair][t] = std::cos(t / (1.0f + pair)), block.sin[pair][t] = std::sin(t / (1.0f + pair));
    }
    for (auto& query : block.query) for (float& x : query) x = uniform(random);
    time_outliers<1>(block);
    time_outliers<4>(block);
}
