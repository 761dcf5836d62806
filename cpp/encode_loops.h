// Loops over the channels of one token for `encode.cpp`, which the compiler writes for each instruction set.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "clones.h"
#include "encode.h"
#include "half.h"

namespace narrowkv {
namespace {

constexpr int64_t kLanes = 16;
typedef float Floats __attribute__((vector_size(4 * kLanes)));  // left to itself, GCC makes vectors of boundaries, not of elements
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
constexpr float kInfinite = std::numeric_limits<float>::infinity();

const char* row_of(const TensorView& elements, int64_t row, int64_t head, int64_t token) {
    const int64_t size = elements.kind == DType::single ? 4 : 2;
    const int64_t offset = row * elements.row_stride + head * elements.head_stride + token * elements.token_stride;
    return static_cast<const char*>(elements.data) + offset * size;
}

// The elements of one token of one head in float32.
FOR_EACH_INSTRUCTION_SET void load(DType kind, const char* from, int64_t dim, float* to) {
    if (kind == DType::single) {
        std::memcpy(to, from, size_t(dim) * 4);
        return;
    }
    const uint16_t* bits = reinterpret_cast<const uint16_t*>(from);
    if (kind == DType::half) {
        for (int64_t c = 0; c < dim; ++c) to[c] = single_from_half(bits[c]);
        return;
    }
    for (int64_t c = 0; c < dim; ++c) to[c] = single_from_bfloat(bits[c]);
}

// Lowers low and raises high, lane by lane, to the elements.
FOR_EACH_INSTRUCTION_SET void widen(const float* x, int64_t count, float* low, float* high) {
    for (int64_t c = 0; c < count; ++c) {
        low[c] = x[c] < low[c] ? x[c] : low[c];
        high[c] = x[c] > high[c] ? x[c] : high[c];
    }
}

inline bool any_outside(const float* x, float low, float high) {
    int outside = 0;
    for (int64_t l = 0; l < kLanes; ++l) outside |= int(x[l] < low) | int(x[l] > high);
    return outside != 0;
}

// The elements of a vector that are stored, at most `count`, those that come first in the order.
template <typename Order>
class First {
public:
    First(int64_t count, float worst) : candidates(size_t(count), worst) {}
    float last() const { return candidates.front(); }
    void see(float x) {
        if (!Order()(x, candidates.front())) return;
        std::pop_heap(candidates.begin(), candidates.end(), Order());
        candidates.back() = x;
        std::push_heap(candidates.begin(), candidates.end(), Order());
    }

private:
    std::vector<float> candidates;
};

// The smallest and the largest number of a vector once `per_tail` are left out at either end. That many elements lie at or
// beyond the ends of as many lanes: only what lies beyond these has to be seen one by one.
FOR_EACH_INSTRUCTION_SET void find_ends(const float* x, int64_t count, int64_t per_tail, float* low, float* high) {
    const int64_t whole = count / kLanes * kLanes;
    float lows[kLanes], highs[kLanes];
    std::fill_n(lows, kLanes, kInfinite), std::fill_n(highs, kLanes, -kInfinite);
    for (int64_t c = 0; c < whole; c += kLanes) widen(x + c, kLanes, lows, highs);
    const bool enough = per_tail < kLanes;
    if (enough) std::nth_element(lows, lows + per_tail, lows + kLanes);
    if (enough) std::nth_element(highs, highs + per_tail, highs + kLanes, std::greater<float>());
    First<std::less<float>> smallest(per_tail + 1, enough ? lows[per_tail] : kInfinite);
    First<std::greater<float>> largest(per_tail + 1, enough ? highs[per_tail] : -kInfinite);
    for (int64_t c = 0; c < count; c += kLanes) {
        if (c < whole && !any_outside(x + c, smallest.last(), largest.last())) continue;
        for (int64_t l = c; l < std::min(c + kLanes, count); ++l) smallest.see(x[l]), largest.see(x[l]);
    }
    *low = smallest.last();
    *high = largest.last();
}

// 0 where the range is empty.
FOR_EACH_INSTRUCTION_SET void invert(float* scale, int64_t dim) {
    for (int64_t c = 0; c < dim; ++c) scale[c] = scale[c] > 0 ? 1 / scale[c] : 0;
}

// Codes of the elements of one token of one head: how many boundaries lie below each, once it is normalized. What is read has
// space for whole kLanes.
FOR_EACH_INSTRUCTION_SET void quantize(const float* x, const float* zero, const float* inverse, const float* boundaries,
                                       int64_t boundary_count, int64_t dim, uint8_t* codes) {
    for (int64_t begin = 0; begin < dim; begin += kLanes) {
        Floats element, middle, by;
        std::memcpy(&element, x + begin, sizeof element);
        std::memcpy(&middle, zero + begin, sizeof middle);
        std::memcpy(&by, inverse + begin, sizeof by);
        const Floats normal = (element - middle) * by;
        Ints below = {};
        for (int64_t b = 0; b < boundary_count; ++b) below -= normal > boundaries[b];  // true is -1
        uint8_t found[kLanes];
        for (int64_t l = 0; l < kLanes; ++l) found[l] = uint8_t(below[l]);
        std::memcpy(codes + begin, found, size_t(std::min(kLanes, dim - begin)));
    }
}

FOR_EACH_INSTRUCTION_SET int32_t count_outside(const float* x, const float* lower, const float* upper, int64_t dim) {
    int32_t count = 0;
    for (int64_t c = 0; c < dim; ++c) count += int(x[c] < lower[c]) | int(x[c] > upper[c]);
    return count;
}

// 1 per element beyond its thresholds, else 0.
FOR_EACH_INSTRUCTION_SET void mark_outside(const float* x, const float* lower, const float* upper, int64_t dim, uint8_t* marks) {
    for (int64_t c = 0; c < dim; ++c) marks[c] = uint8_t(int(x[c] < lower[c]) | int(x[c] > upper[c]));
}

// Memory of this thread, which lasts; what it holds is whatever.
float* scratch_of(int64_t floats) {
    thread_local std::vector<float> scratch;
    if (int64_t(scratch.size()) < floats) scratch.resize(size_t(floats));
    return scratch.data();
}

// Elements are finite where no exponent is all ones.
FOR_EACH_INSTRUCTION_SET bool finite_row(DType kind, const char* from, int64_t dim) {
    int found = 0;
    if (kind == DType::single) {
        const uint32_t* bits = reinterpret_cast<const uint32_t*>(from);
        for (int64_t c = 0; c < dim; ++c) found |= (bits[c] & 0x7f800000u) == 0x7f800000u;
        return found == 0;
    }
    const uint32_t ones = kind == DType::half ? 0x7c00u : 0x7f80u;
    const uint16_t* bits = reinterpret_cast<const uint16_t*>(from);
    for (int64_t c = 0; c < dim; ++c) found |= (bits[c] & ones) == ones;
    return found == 0;
}

}  // namespace
}  // namespace narrowkv
