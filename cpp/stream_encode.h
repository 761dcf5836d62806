// Encoding keys or values as trellis-coded streams, from elements to what a cache holds of them; the same in plain torch is
// `TrellisQuantizer.encode_naive` in codec/quantizers/trellis.py.

#pragma once

#include <array>
#include <cstdint>

#include "encode.h"
#include "sizes.h"
#include "trellis.h"

namespace narrowkv {

constexpr int kMaxLevel = 63;  // magnitude of a table's entry, in grid steps

// What is the same for all tokens; n coefficients of a head have codes. mean: [heads, dim]. channels: [dim], which channel
// each element is, and turns: [kFrame, 2, dim / 2], cosines and sines, or both null. Coefficients are products with pairs:
// [heads, 4, dim / 2], of the first and the second elements of pairs what goes to the first and to the second, taken in order:
// [heads, n]; or with matrix: [heads, n / kUnit, dim, kUnit]. steps, scales: [n]. weight, search_weight: [heads, n].
// norms: [kNorms], or null. Coefficients whose error costs more than the threshold are outliers, `most` of a head in a block.
struct StreamCodec {
    int64_t heads, dim, n, bytes;
    std::array<int64_t, kMostRate> counts;
    const int8_t* high;
    const int8_t* low;
    const float* mean;
    const int32_t* channels;
    const double* turns;
    const double* pairs;
    const int32_t* order;
    const float* matrix;
    const float* steps;
    const float* scales;
    const float* weight;
    const uint16_t* search_weight;
    const float* norms;
    float threshold;
    int64_t most;
};

// What was found: outliers as `encode` of encode.h returns them, and how many coefficients of tokens that are not skipped lie
// beyond what codes reach by its width.
struct StreamCounts {
    int64_t outliers, out_of_range;
};

// What `encode` of encode.h does, for codes: [batch, heads, tokens, bytes and one of a norm]. stored_outliers: [batch, heads],
// those that the block has already, or null. row_starts: [batch], where in its block each row of new tokens begins, all of them in one
// block, where that is not where the buffer's are; or null. halves: whether outliers are stored in float16, else in bfloat16.
using EncodeStreams = StreamCounts(const StreamCodec& codec, const TensorView& elements, const uint8_t* skip, const EncodeBuffer& buffer,
                                   const int32_t* stored_outliers, const int64_t* row_starts, bool halves, int threads);

EncodeStreams encode_streams_generic;
#if defined(__x86_64__)
EncodeStreams encode_streams_avx2;
EncodeStreams encode_streams_avx512;
#endif

}  // namespace narrowkv
