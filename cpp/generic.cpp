// Kernels for any processor: four numbers at once, as the compiler sees fit.

#include <cstdint>
#include <cstring>

#include "half.h"

namespace narrowkv {
namespace {
namespace simd {

constexpr int width = 4;
typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));
typedef uint64_t Bytes __attribute__((vector_size(16)));

inline Floats load(const float* p) {
    Floats x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
inline void store(float* p, Floats x) { std::memcpy(p, &x, sizeof x); }
inline Floats load_halves(const uint16_t* p) {
    return Floats{single_from_half(p[0]), single_from_half(p[1]), single_from_half(p[2]), single_from_half(p[3])};
}

// Sixteen codes, a byte each, as whole numbers.
struct Codes {
    uint8_t bytes[16];

    explicit Codes(Bytes from) { std::memcpy(bytes, &from, 16); }
    Ints part(int i) const { return Ints{bytes[4 * i], bytes[4 * i + 1], bytes[4 * i + 2], bytes[4 * i + 3]}; }
};

template <int levels>
struct Table {
    const float* points;
    float scale = 1.0f, zero = 0.0f;

    explicit Table(const float* table) : points(table) {}
    Floats operator()(Ints codes) const {
        return Floats{points[codes[0]], points[codes[1]], points[codes[2]], points[codes[3]]} * scale + zero;
    }
    Table stretched(float by, float to) const {
        Table result = *this;
        result.scale = by, result.zero = to;
        return result;
    }
};

}  // namespace simd
}  // namespace
}  // namespace narrowkv

#include "kernel.h"

namespace narrowkv {
void attend_generic(const Problem& problem) { attend<Worker>(problem); }
}  // namespace narrowkv
