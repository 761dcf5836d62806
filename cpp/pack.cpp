// Codes are merged where they lie, many bytes at a time; a column-major matrix is rotated after that, when it has shrunk.

#include "pack.h"

#include <cstddef>
#include <vector>

#include "clones.h"

namespace narrowkv {
namespace {

// Byte j of the result: codes j, j + apart, ... at rising bits, for `bytes` bytes.
FOR_EACH_INSTRUCTION_SET void merge(const uint8_t* codes, int64_t apart, int64_t bytes, int bits, int shift, uint8_t* merged) {
    const uint32_t mask = (1u << bits) - 1;
    for (int64_t j = 0; j < bytes; ++j) merged[j] = uint8_t(codes[j] >> shift & mask);
    for (int i = 1; i < 8 / bits; ++i)
        for (int64_t j = 0; j < bytes; ++j) merged[j] = uint8_t(merged[j] | (codes[i * apart + j] >> shift & mask) << (bits * i));
}

void pack_columns(const Packing& problem, const uint8_t* codes, int64_t bytes, uint8_t* packed) {
    std::vector<uint8_t> merged(size_t(problem.rows));
    for (int64_t j = 0; j < bytes; ++j) {
        const int64_t stride = problem.code_stride;
        merge(codes + j * stride, bytes * stride, problem.rows, problem.bits, problem.shift, merged.data());
        for (int64_t r = 0; r < problem.rows; ++r) packed[r * bytes + j] = merged[size_t(r)];
    }
}

}  // namespace

void pack(const Packing& problem, int threads) {
    const int64_t bytes = problem.count * problem.bits / 8;
#pragma omp parallel for num_threads(threads)
    for (int64_t m = 0; m < problem.matrices; ++m) {
        const uint8_t* codes = problem.codes + m * problem.matrix_stride;
        uint8_t* packed = problem.packed + m * problem.rows * bytes;
        if (problem.code_stride != 1) {
            pack_columns(problem, codes, bytes, packed);
            continue;
        }
        for (int64_t r = 0; r < problem.rows; ++r)
            merge(codes + r * problem.row_stride, bytes, bytes, problem.bits, problem.shift, packed + r * bytes);
    }
}

}  // namespace narrowkv
