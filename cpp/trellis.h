// Trellis-coded codes of many rows: the cheapest bit stream for each, found by the algorithm of Viterbi in integers.
//
// The last 8 bits of a row's stream are its state, at first 0. An element of rate k appends k bits and is decoded to
// high[k][state >> 4] + low[k][state & 15] of the state that it leads to. With the difference of the element, in 1/512 of a
// grid step, from 512 times that as d, a state costs
//     ((min(2 |d|, 65535)^2 >> 16) * weight) >> 16,
// weight / 2^16 times 16 times the squared distance in steps, plus the least cost of the 2^k states that it can come from,
// less the least cost of all, at most 65535. States that no stream has reached yet (those from 2^bits on, with less than 8
// bits) cost 65535. On equal costs the lowest predecessor wins, and at the end the lowest state. `encode_naive` in
// codec/trellis.py is the same in plain torch.

#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "sizes.h"

namespace narrowkv {

constexpr int kStates = 256;        // of a window of 8 bits
constexpr int16_t kGridStep = 512;  // of an element

// elements: [heads, rows, n]. weights: [heads, rows or 1, n]. codes: [heads, rows, bytes]. counts: units of each rate from 1
// on, which lie in ascending order. high, low: [rates from 1 on, 16].
struct Trellis {
    int64_t heads, rows;
    std::array<int64_t, kMostRate> counts;
    const int16_t* elements;
    const uint16_t* weights;
    bool weights_by_row;
    const int8_t* high;
    const int8_t* low;
    uint8_t* codes;
    int threads;

    int64_t units() const {
        int64_t sum = 0;
        for (int64_t count : counts) sum += count;
        return sum;
    }
    int64_t bytes() const {
        int64_t sum = 0;
        for (int k = 1; k <= kMostRate; ++k) sum += k * counts[size_t(k - 1)];
        return sum;
    }
};

// Streams to decode. codes: [rows], `stride` bytes apart. counts: as above. levels: [rates from 1 on, states]. elements:
// [rows, n].
struct TrellisStreams {
    int64_t rows, stride, n;
    std::array<int64_t, kMostRate> counts;
    const uint8_t* codes;
    const float* levels;
    float* elements;
    int threads;
};

void decode_trellis(const TrellisStreams& streams);
void encode_trellis_generic(const Trellis& problem);
#if defined(__x86_64__)
void encode_trellis_avx2(const Trellis& problem);
void encode_trellis_avx512(const Trellis& problem);
#endif

}  // namespace narrowkv
