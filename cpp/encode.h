// Quantizing: codes, ranges and outliers of new tokens, exactly those of the plain reference in `codec/quantizers/scalar.py`.

#pragma once

#include <cstdint>

#include "attention.h"

namespace narrowkv {

// New tokens [batch, heads, tokens, dim], of any strides but that channels are neighbors.
struct TensorView {
    DType kind;
    const void* data;
    int64_t batch, heads, tokens, dim;
    int64_t row_stride, head_stride, token_stride;
};

// Who shares a range: a channel for the whole run, a token, a group of channels of a token's head (all, often), or a channel
// within a group of tokens.
enum class Sharing { fixed, token, token_head, channel };

// What is the same for all tokens. group: of channels or of tokens, 0 for all channels of a head. outliers: which fraction of
// the elements, 0 for none; half at each end of a vector where ranges are found online (none by channel).
// boundaries: [boundary_count]. scale, zero, lower, upper: [heads, dim] where ranges are fixed, else null; lower and upper
// also without outliers.
struct Codec {
    Sharing sharing;
    int64_t group;
    double outliers;
    int64_t boundary_count;
    const float* boundaries;
    const float* scale;
    const float* zero;
    const float* lower;
    const float* upper;
};

// The buffer that new tokens are written to, from token `at` on. codes: [batch, heads, tokens, dim]. scale, zero: float16
// [batch, heads or 1, tokens or groups, width]. outlier_index, in the flattened codes, and outlier_values: [outlier_capacity].
struct EncodeBuffer {
    int64_t tokens, at;
    uint8_t* codes;
    uint16_t* scale;
    uint16_t* zero;
    int64_t* outlier_index;
    uint16_t* outlier_values;
    int64_t outlier_capacity;
};

constexpr int64_t kDoesNotFit = -1;

// Write new tokens to their buffer. skip: [batch, tokens] or null, tokens that have no outliers, nor a part in ranges of
// several tokens. Returns how many outliers there are (none is written where they exceed the capacity), or kDoesNotFit where
// a range or an outlier does not fit 16 bits.
int64_t encode(const Codec& codec, const TensorView& elements, const uint8_t* skip, const EncodeBuffer& buffer, int threads);

// Whether no element is NaN or infinite.
bool all_finite(const TensorView& elements, int threads);

}  // namespace narrowkv
