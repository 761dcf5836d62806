// Codes are SIMD lanes, and a few tokens share each point that is loaded. The compiler writes the loops for each instruction set.
// Products and sums are not fused, so that codes are exactly those of the plain twin in `codec/points.py`.

#include "nearest.h"

#include <algorithm>
#include <cstddef>
#include <limits>
#include <vector>

#include "clones.h"
#include "half.h"

namespace narrowkv {
namespace {

constexpr int64_t TOKENS = 4;  // that share a point
constexpr int64_t LANES = 16;  // codes at a time

// The best of all levels for `count` tokens and LANES codes that begin at numbers, points, found and cost.
template <int64_t count>
inline void nearest_lanes(const Nearest& problem, const float* numbers, const float* points, uint8_t* found, float* cost) {
    const int64_t codes = problem.codes, row = problem.count * codes;
    float best[count][LANES];
    int32_t level[count][LANES];
    for (int64_t t = 0; t < count; ++t)
        for (int64_t c = 0; c < LANES; ++c) best[t][c] = std::numeric_limits<float>::infinity(), level[t][c] = 0;
    for (int64_t l = 0; l < problem.levels; ++l) {
        const float* point = points + l * row;
        for (int64_t t = 0; t < count; ++t) {
            const float* number = numbers + t * row;
            for (int64_t c = 0; c < LANES; ++c) {
                const float first = number[c] - point[c];
                float distance = first * first;
                if (problem.count == 2) {
                    const float second = number[codes + c] - point[codes + c];
                    distance += second * second;
                }
                level[t][c] = distance < best[t][c] ? int32_t(l) : level[t][c];
                best[t][c] = std::min(distance, best[t][c]);
            }
        }
    }
    for (int64_t t = 0; t < count; ++t)
        for (int64_t c = 0; c < LANES; ++c) found[t * codes + c] = uint8_t(level[t][c]), cost[t * codes + c] = best[t][c];
}

FOR_EACH_INSTRUCTION_SET void nearest_tile(const Nearest& problem, const float* numbers, const float* points, uint8_t* found,
                                           float* cost) {
    nearest_lanes<TOKENS>(problem, numbers, points, found, cost);
}

FOR_EACH_INSTRUCTION_SET void nearest_token(const Nearest& problem, const float* numbers, const float* points, uint8_t* found,
                                            float* cost) {
    nearest_lanes<1>(problem, numbers, points, found, cost);
}

// The same for one token and one code.
void nearest_single(const Nearest& problem, const float* numbers, const float* points, uint8_t* found, float* cost) {
    const int64_t codes = problem.codes;
    float best = std::numeric_limits<float>::infinity();
    *found = 0;
    for (int64_t l = 0; l < problem.levels; ++l) {
        const float* point = points + l * problem.count * codes;
        const float first = numbers[0] - point[0];
        float distance = first * first;
        if (problem.count == 2) {
            const float second = numbers[codes] - point[codes];
            distance += second * second;
        }
        if (distance < best) best = distance, *found = uint8_t(l);
    }
    *cost = best;
}

// Sums of a row of a product with a matrix.
FOR_EACH_INSTRUCTION_SET void add_turned(const float* numbers, const uint16_t* matrix, int64_t dim, double* sums) {
    for (int64_t d = 0; d < dim; ++d) {
        const double number = numbers[d];
        for (int64_t c = 0; c < dim; ++c) sums[c] += number * double(single_from_half(matrix[d * dim + c]));
    }
}

}  // namespace

void nearest(const Nearest& problem) {
    const int64_t tiles = (problem.tokens + TOKENS - 1) / TOKENS, row = problem.count * problem.codes;
#pragma omp parallel for collapse(2) num_threads(problem.threads)
    for (int64_t sequence = 0; sequence < problem.batch * problem.heads; ++sequence) {
        for (int64_t tile = 0; tile < tiles; ++tile) {
            const float* points = problem.points + sequence % problem.heads * problem.levels * row;
            const int64_t first = tile * TOKENS, last = std::min(first + TOKENS, problem.tokens);
            const int64_t place = sequence * problem.tokens + first;
            const int64_t whole = problem.codes / LANES * LANES;
            const float* numbers = problem.numbers + place * row;
            uint8_t* found = problem.found + place * problem.codes;
            float* cost = problem.cost + place * problem.codes;
            const bool full = last - first == TOKENS;
            for (int64_t c = 0; full && c < whole; c += LANES) nearest_tile(problem, numbers + c, points + c, found + c, cost + c);
            for (int64_t t = 0; t < last - first; ++t) {
                const float* number = numbers + t * row;
                const int64_t at = t * problem.codes;
                for (int64_t c = 0; !full && c < whole; c += LANES)
                    nearest_token(problem, number + c, points + c, found + at + c, cost + at + c);
                for (int64_t c = whole; c < problem.codes; ++c)
                    nearest_single(problem, number + c, points + c, found + at + c, cost + at + c);
            }
        }
    }
}

void turn(const Turn& problem) {
    std::vector<double> sums(size_t(problem.dim));
    for (int64_t row = 0; row < problem.batch * problem.heads * problem.tokens; ++row) {
        const int64_t head = row / problem.tokens % problem.heads;
        std::fill(sums.begin(), sums.end(), 0.0);
        add_turned(problem.numbers + row * problem.dim, problem.matrices + head * problem.dim * problem.dim, problem.dim, sums.data());
        for (int64_t c = 0; c < problem.dim; ++c) problem.turned[row * problem.dim + c] = float(sums[size_t(c)]);
    }
}

void moments(const Moments& problem) {
    const int64_t codes = problem.codes, kinds = problem.count == 2 ? 6 : 3, row = problem.count * codes;
#pragma omp parallel for num_threads(problem.threads)
    for (int64_t head = 0; head < problem.heads; ++head) {
        double* sums = problem.sums + head * problem.levels * kinds * codes;
        for (int64_t t = 0; t < problem.tokens; ++t) {
            const float* numbers = problem.numbers + (head * problem.tokens + t) * row;
            const uint8_t* found = problem.found + (head * problem.tokens + t) * codes;
            for (int64_t c = 0; c < codes; ++c) {
                double* at = sums + found[c] * kinds * codes + c;
                const double x = numbers[c];
                at[0] += 1;
                at[codes] += x;
                if (problem.count == 1) {
                    at[2 * codes] += x * x;
                    continue;
                }
                const double y = numbers[codes + c];
                at[2 * codes] += y;
                at[3 * codes] += x * x;
                at[4 * codes] += y * y;
                at[5 * codes] += x * y;
            }
        }
    }
}

}  // namespace narrowkv
