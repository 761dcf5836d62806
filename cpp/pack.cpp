// Codes are merged where they lie, many bytes at a time; a column-major matrix is rotated after that, when it has shrunk.

#include "pack.h"

#include <cstddef>
#include <cstring>
#include <vector>

#include "clones.h"

namespace narrowkv {
namespace {

// Rows of packed bytes: byte j of one is made of codes j, j + apart, ... of a row of codes, at rising bits. Eight bytes at a time,
// whose codes do not reach each other's bits.
template <int bits>
inline void merge_rows(const uint8_t* codes, int64_t row_stride, int64_t rows, int64_t apart, int64_t bytes, int shift, uint8_t* merged) {
    constexpr uint64_t mask = 0x0101010101010101u * ((1u << bits) - 1);
    for (int64_t r = 0; r < rows; ++r, codes += row_stride, merged += bytes) {
        int64_t j = 0;
        for (; j + 8 <= bytes; j += 8) {
            uint64_t sum = 0;
            for (int i = 0; i < 8 / bits; ++i) {
                uint64_t eight;
                std::memcpy(&eight, codes + i * apart + j, 8);
                sum |= (eight >> shift & mask) << (bits * i);
            }
            std::memcpy(merged + j, &sum, 8);
        }
        for (; j < bytes; ++j) {
            merged[j] = 0;
            for (int i = 0; i < 8 / bits; ++i) merged[j] = uint8_t(merged[j] | (codes[i * apart + j] >> shift & int(mask & 255)) << (bits * i));
        }
    }
}

FOR_EACH_INSTRUCTION_SET void merge(const uint8_t* codes, int64_t row_stride, int64_t rows, int64_t apart, int64_t bytes, int bits, int shift,
                                    uint8_t* merged) {
    if (bits == 1) return merge_rows<1>(codes, row_stride, rows, apart, bytes, shift, merged);
    if (bits == 2) return merge_rows<2>(codes, row_stride, rows, apart, bytes, shift, merged);
    bits == 4 ? merge_rows<4>(codes, row_stride, rows, apart, bytes, shift, merged) : merge_rows<8>(codes, row_stride, rows, apart, bytes, shift, merged);
}

// Bytes [rows][columns] as [columns][rows], eight by eight in registers.
void transpose(const uint8_t* from, int64_t rows, int64_t columns, uint8_t* to) {
    const int64_t whole_rows = rows / 8 * 8, whole_columns = columns / 8 * 8;
    const auto swap = [](uint64_t& a, uint64_t& b, int shift, uint64_t mask) {
        const uint64_t differ = ((a >> shift) ^ b) & mask;
        b ^= differ, a ^= differ << shift;
    };
    for (int64_t r = 0; r < whole_rows; r += 8) {
        for (int64_t c = 0; c < whole_columns; c += 8) {
            uint64_t x[8];
            for (int i = 0; i < 8; ++i) std::memcpy(&x[i], from + (r + i) * columns + c, 8);
            for (int i = 0; i < 8; i += 2) swap(x[i], x[i + 1], 8, 0x00ff00ff00ff00ff);
            for (int i : {0, 1, 4, 5}) swap(x[i], x[i + 2], 16, 0x0000ffff0000ffff);
            for (int i = 0; i < 4; ++i) swap(x[i], x[i + 4], 32, 0x00000000ffffffff);
            for (int i = 0; i < 8; ++i) std::memcpy(to + (c + i) * rows + r, &x[i], 8);
        }
    }
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = r < whole_rows ? whole_columns : 0; c < columns; ++c) to[c * rows + r] = from[r * columns + c];
    }
}

}  // namespace

void pack_matrix(const Packing& problem, const uint8_t* codes, uint8_t* packed) {
    const int64_t bytes = problem.count * problem.bits / 8, stride = problem.code_stride;
    if (stride == 1) return merge(codes, problem.row_stride, problem.rows, bytes, bytes, problem.bits, problem.shift, packed);
    std::vector<uint8_t> merged(size_t(bytes * problem.rows));  // column by column
    merge(codes, stride, bytes, bytes * stride, problem.rows, problem.bits, problem.shift, merged.data());
    transpose(merged.data(), bytes, problem.rows, packed);
}

void pack(const Packing& problem, int threads) {
    const int64_t size = problem.rows * (problem.count * problem.bits / 8);
#pragma omp parallel for num_threads(threads)
    for (int64_t m = 0; m < problem.matrices; ++m) {
        pack_matrix(problem, problem.codes + m * problem.matrix_stride, problem.packed + m * size);
    }
}

}  // namespace narrowkv
