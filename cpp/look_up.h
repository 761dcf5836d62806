// From packed bytes to codes, and from codes to elements, a row at a time. Compiled once for each instruction set: included
// after `simd`, whose look-ups it uses.

#pragma once

#include <cstring>

#include "ranges.h"

namespace narrowkv {
namespace {

using simd::Bytes;
constexpr int kCodes = sizeof(Bytes);  // looked up at once

constexpr int kPlanes[9][2] = {{}, {}, {2}, {2, 1}, {4}, {}, {}, {}, {8}};

// Codes of a row of any length: code i lies in byte i % bytes of a plane, at bit width * (i / bytes).
inline void unpack_row(const uint8_t* const* rows, int bits, int length, uint8_t* codes) {
    std::memset(codes, 0, length);
    for (int plane = 0, shift = 0; plane < 2 && kPlanes[bits][plane]; shift += kPlanes[bits][plane++]) {
        const int width = kPlanes[bits][plane], bytes = length * width / 8, mask = (1 << width) - 1;
        for (int i = 0; i < 8 / width; ++i) {
            for (int byte = 0; byte < bytes; ++byte) {
                codes[i * bytes + byte] |= (rows[plane][byte] >> (width * i) & mask) << shift;
            }
        }
    }
}

// Bits of kCodes codes of a row from the i-th on, in the lowest bits of a byte each, where a plane has `width` bits of a
// code.
template <int width, int length>
inline Bytes plane_at(const uint8_t* row, int i) {
    constexpr int bytes = length * width / 8, int16 = bytes / 8;
    Bytes packed = {};
    if constexpr (bytes >= kCodes) {
        std::memcpy(&packed, row + i % bytes, kCodes);
        packed >>= width * (i / bytes);
    } else if constexpr (bytes > 0) {  // a row is shorter: its bytes hold several of these codes
        uint64_t word[int16];
        std::memcpy(word, row, bytes);
        Bytes down;
        for (int part = 0; part < kCodes / 8; ++part) {
            packed[part] = word[part % int16];
            down[part] = width * (part / int16);
        }
        packed >>= down + width * (i / bytes);
    }
    return packed & (0x0101010101010101u * ((1u << width) - 1));
}

// Codes of a row whose length is known, from the i-th on, a byte each.
template <int bits, int length>
inline Bytes codes_at(const uint8_t* const* rows, int i) {
    constexpr int first = kPlanes[bits][0], second = kPlanes[bits][1];
    return plane_at<first, length>(rows[0], i) | plane_at<second, length>(rows[1], i) << first;
}

constexpr int levels_of(int bits) { return bits <= 4 ? 16 : 256; }

// A row of codes, looked up in a codebook of its own.
template <int bits, int length, int from, int stop>
inline void look_up(const uint8_t* const* rows, const float* table, float* elements) {
    const simd::Table<levels_of(bits)> points(table);
#pragma GCC unroll 8
    for (int i = from; i < stop; i += kCodes) {
        const simd::Found found = points(codes_at<bits, length>(rows, i));
#pragma GCC unroll 4
        for (int part = 0; part < kCodes / simd::width; ++part) simd::store(elements + i - from + part * simd::width, found.part[part]);
    }
}

// A row of codes looked up in a codebook of normalized levels, then scaled: all alike, by sixteens, or each by its own.
template <int bits, int length, int from, int stop>
inline void look_up(const uint8_t* const* rows, const float* table, const float* scale, const float* zero, int count,
                    float* elements) {
    const simd::Table<levels_of(bits)> points(table);
    const auto scale_weights = [&](const auto& scale_at, const auto& zero_at) {
#pragma GCC unroll 8
        for (int i = from; i < stop; i += kCodes) {
            const simd::Found found = points(codes_at<bits, length>(rows, i));
#pragma GCC unroll 4
            for (int part = 0; part < kCodes / simd::width; ++part) {
                const int at = i + part * simd::width;
                simd::store(elements + at - from, found.part[part] * scale_at(at) + zero_at(at));
            }
        }
    };
    if (count == 1) {
        const simd::Floats by = scale[0] - simd::Floats{}, to = zero[0] - simd::Floats{};
        scale_weights([&](int) { return by; }, [&](int) { return to; });
    } else if (count == length) {
        scale_weights([&](int at) { return simd::load(scale + at); }, [&](int at) { return simd::load(zero + at); });
    } else {
        const auto group = [&](int at) { return at / 16 * count / (length / 16); };
        scale_weights([&](int at) { return scale[group(at)]; }, [&](int at) { return zero[group(at)]; });
    }
}

// The same for rows of any length and ranges of any, through a buffer of codes, which may go on beyond those that count.
template <int bits>
inline void look_up(const uint8_t* codes, int from, int length, const float* table, const float* scale, const float* zero,
                    const Ranges& ranges, float* elements) {
    const simd::Table<levels_of(bits)> points(table);
    for (int i = 0; i < length; i += kCodes) {
        float scales[kCodes], zeros[kCodes];
        for (int lane = 0; scale && lane < kCodes; ++lane) {
            const int at = (from + i + lane) / ranges.length, group = at < ranges.count ? at : ranges.count - 1;
            scales[lane] = scale[group], zeros[lane] = zero[group];
        }
        Bytes some;
        std::memcpy(&some, codes + from + i, kCodes);
        const simd::Found found = points(some);
        for (int part = 0; part < kCodes / simd::width && i + part * simd::width < length; ++part) {
            const int at = part * simd::width;
            const auto x = found.part[part];
            simd::store(elements + i + at, scale ? x * simd::load(scales + at) + simd::load(zeros + at) : x);
        }
    }
}

}  // namespace
}  // namespace narrowkv
