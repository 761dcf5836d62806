// Packing small integers into planes of bits; see `codec/packing.py`.

#pragma once

#include <cstdint>

namespace narrowkv {

// codes: [matrices, rows, count], each matrix row-major or column-major. bits: of a plane, taken from bit `shift` of each
// code. packed: [matrices, rows, count * bits / 8].
struct Packing {
    int64_t matrices, rows, count;
    int64_t matrix_stride, row_stride, code_stride;  // one of the last two is 1
    int bits, shift;
    const uint8_t* codes;
    uint8_t* packed;
};

void pack(const Packing& problem, int threads);

// One matrix of them.
void pack_matrix(const Packing& problem, const uint8_t* codes, uint8_t* packed);

}  // namespace narrowkv
