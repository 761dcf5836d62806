// Memory that a thread works in. Compiled once for each instruction set: included after `simd`.

#pragma once

#include <cstdlib>
#include <utility>
#include <vector>

#include "decode.h"

namespace narrowkv {
namespace {

// Scratch memory of one thread. sum: of token-major values [rows][head_dim rounded up], else [rows][head_dim][width].
struct Scratch {
    float *tile, *ranges, *angles, *query, *rotated, *scores, *sum, *largest, *total, *tables[2];
    void* memory;

    explicit Scratch(const Problem& problem) {
        const size_t rows = round_up(problem.group * problem.queries, 16), dim = round_up(problem.head_dim, 16);
        const auto levels = [](const PackedTensor& side) { return size_t(16 * codebooks(side)); };  // where they are laid out at all
        const std::pair<float**, size_t> parts[] = {
            {&tile, dim * kBlock},
            {&ranges, 2 * dim * kBlock},
            {&angles, dim * kBlock},
            {&query, dim * rows},
            {&rotated, dim * rows},
            {&scores, rows * kBlock},
            {&sum, rows * dim * simd::width},
            {&largest, rows},
            {&total, rows},
            {&tables[0], levels(problem.keys)},
            {&tables[1], levels(problem.values)},
        };
        size_t floats = 0;
        for (const auto& [part, size] : parts) floats += size;
        memory = std::aligned_alloc(64, floats * sizeof(float));
        float* next = static_cast<float*>(memory);
        for (const auto& [part, size] : parts) *part = next, next += size;
    }
    ~Scratch() { std::free(memory); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
};

// Memory for a vector that begins where a register of any width can be read at once.
template <typename T>
struct Aligned {
    using value_type = T;
    Aligned() = default;
    template <typename U>
    Aligned(const Aligned<U>&) {}
    T* allocate(size_t count) { return static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64)); }
    void deallocate(T* memory, size_t) { std::free(memory); }
    bool operator==(const Aligned&) const { return true; }
    bool operator!=(const Aligned&) const { return false; }
};

template <typename T>
using Buffer = std::vector<T, Aligned<T>>;

}  // namespace
}  // namespace narrowkv
