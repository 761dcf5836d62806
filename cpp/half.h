// float16 to float32, by the processor's own instruction where the file is compiled for it.

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
    float number;
    std::memcpy(&number, &wide, 4);
    number *= 0x1p112f;
    std::memcpy(&wide, &number, 4);
    wide |= uint32_t(bits & 0x8000) << 16;
    std::memcpy(&number, &wide, 4);
    return number;
#endif
}

}  // namespace
}  // namespace narrowkv
