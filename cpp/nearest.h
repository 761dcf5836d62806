// Which point of a small codebook lies nearest, for many numbers at once.

#pragma once

#include <cstdint>

namespace narrowkv {

// numbers: [batch, heads, tokens, count * codes], where number n of code c is at n * codes + c. points: [heads, levels, count,
// codes]. found, cost: [batch, heads, tokens, codes], the nearest level (the first of several) and the squared distance to it.
struct Nearest {
    int64_t batch, heads, tokens, codes, levels, count;
    const float* numbers;
    const float* points;
    uint8_t* found;
    float* cost;
    int threads;
};

void nearest(const Nearest& problem);

// turned = numbers @ matrices, summed in float64. numbers, turned: [batch, heads, tokens, dim]. matrices: [heads, dim, dim] float16.
struct Turn {
    int64_t batch, heads, tokens, dim;
    const float* numbers;
    const uint16_t* matrices;
    float* turned;
};

void turn(const Turn& problem);

// How many vectors of each code fell to each level, and sums of their numbers, squares and products: adds to sums [heads,
// levels, moments, codes] float64, with moments 1, x, xx for one number and 1, x, y, xx, yy, xy for two. found is given.
struct Moments {
    int64_t heads, tokens, codes, levels, count;
    const float* numbers;
    const uint8_t* found;
    double* sums;
    int threads;
};

void moments(const Moments& problem);

}  // namespace narrowkv
