// float16 to float32, by the processor's own instruction where the file is compiled for it, and back; bfloat16 likewise.

#pragma once

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>

namespace narrowkv {
namespace {

inline float single_from_half(uint16_t bits) {
#if defined(__F16C__)
    return _cvtsh_ss(bits);
#else
    // exponent and fraction moved into place, then scaled by the difference of the biases, which mends subnormals too
    uint32_t wide = uint32_t(bits & 0x7fff) << 13;
    float element;
    std::memcpy(&element, &wide, 4);
    element *= 0x1p112f;
    std::memcpy(&wide, &element, 4);
    wide |= uint32_t(bits & 0x8000) << 16;
    std::memcpy(&element, &wide, 4);
    return element;
#endif
}

inline float single_from_bfloat(uint16_t bits) {
    const uint32_t wide = uint32_t(bits) << 16;
    float element;
    std::memcpy(&element, &wide, 4);
    return element;
}

// Rounded to the nearest, of two to the even one; infinity where it does not fit. Not for NaN.
inline uint16_t half_from_single(float element) {
    uint32_t wide;
    std::memcpy(&wide, &element, 4);
    const uint32_t sign = wide >> 16 & 0x8000;
    wide &= 0x7fffffff;
    if (wide >= 0x47800000) return uint16_t(sign | 0x7c00);  // from 65536 on
    if (wide < 0x38800000) {  // below 2^-14: the sum is rounded where the last bit of a subnormal stands
        std::memcpy(&element, &wide, 4);
        element += 0.5f;
        std::memcpy(&wide, &element, 4);
        return uint16_t(sign | (wide - 0x3f000000));
    }
    const uint32_t odd = wide >> 13 & 1;
    return uint16_t(sign | (wide - 0x38000000 + 0xfff + odd) >> 13);
}

// Likewise; infinity where it is rounded to that.
inline uint16_t bfloat_from_single(float element) {
    uint32_t wide;
    std::memcpy(&wide, &element, 4);
    return uint16_t((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
}

inline bool is_finite_half(uint16_t bits) { return (bits & 0x7c00) != 0x7c00; }

}  // namespace
}  // namespace narrowkv
