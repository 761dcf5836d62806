// Scales and zeros of a block, and exact elements, as float32. Compiled once for each instruction set: included after `simd`.

#pragma once

#include <cstring>

#include "attention.h"
#include "half.h"

namespace narrowkv {
namespace {

inline float to_single(uint16_t bits, DType kind) {
    return kind == DType::half ? single_from_half(bits) : single_from_bfloat(bits);
}

inline float load_exact(const void* elements, int64_t i, DType kind) {
    if (kind == DType::single) return static_cast<const float*>(elements)[i];
    return to_single(static_cast<const uint16_t*>(elements)[i], kind);
}

// Scales and zeros of a head, laid out for rows of codes: row r has those at (r / rows) * count, each for `length` codes.
struct Ranges {
    int rows, count, length;
    float* scale;
    float* zero;
};

inline Ranges read_ranges(const PackedTensor& side, const Block& block, int head, int head_dim, float* buffer) {
    const int tokens = side.range_tokens, channels = side.range_channels, all = tokens * channels;
    const int64_t first = side.range_heads > 1 ? int64_t(head) * all : 0;
    Ranges ranges{kBlock / tokens, channels, head_dim / channels, buffer, buffer + all};
    if (side.channel_major) ranges = {head_dim / channels, tokens, kBlock / tokens, buffer, buffer + all};
    const auto expand = [&](const auto& scale, const auto& zero) {
        for (int token = 0; token < tokens; ++token) {
            for (int channel = 0; channel < channels; ++channel) {
                const int to = side.channel_major ? channel * tokens + token : token * channels + channel;
                ranges.scale[to] = scale(first + token * channels + channel);
                ranges.zero[to] = zero(first + token * channels + channel);
            }
        }
    };
    if (side.scale) {
        expand([&](int64_t i) { return side.scale[i]; }, [&](int64_t i) { return side.zero[i]; });
    } else if (!side.channel_major && all % 16 == 0) {  // in the order in which they lie
        for (int i = 0; i < all; i += simd::width) {
            simd::store(ranges.scale + i, simd::load_halves(block.scale + first + i));
            simd::store(ranges.zero + i, block.zero ? simd::load_halves(block.zero + first + i) : simd::Floats{});
        }
    } else {
        expand([&](int64_t i) { return to_single(block.scale[i], DType::half); },
               [&](int64_t i) { return block.zero ? to_single(block.zero[i], DType::half) : 0.0f; });
    }
    return ranges;
}

}  // namespace
}  // namespace narrowkv
