// Kernels for any processor: four elements at once, as the compiler sees fit.

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

inline Ints widen(const uint8_t* codes) { return Ints{codes[0], codes[1], codes[2], codes[3]}; }
inline Floats gather(const float* points, Ints codes) {
    return Floats{points[codes[0]], points[codes[1]], points[codes[2]], points[codes[3]]};
}

// A byte of each of some tokens, and two of them taken together.
typedef uint8_t Lanes __attribute__((vector_size(16)));
typedef uint16_t Words __attribute__((vector_size(16)));

inline Lanes repeated(const int8_t* table) {
    Lanes x;
    std::memcpy(&x, table, sizeof x);
    return x;
}
inline Lanes pick(Lanes table, Lanes index) {
    for (int i = 0; i < 16; ++i) index[i] = table[index[i]];
    return index;
}
inline Floats to_floats(const int8_t* p) { return Floats{float(p[0]), float(p[1]), float(p[2]), float(p[3])}; }

#include "gathered.h"

template <int levels>
using Table = Gathered;

constexpr bool lays_out = false;
inline void lay_out(const float*, float*) {}

}  // namespace simd
}  // namespace
}  // namespace narrowkv

#include "kernel.h"

namespace narrowkv {
void attend_generic(const Problems& problems, int threads) { attend<Worker>(problems, threads); }
}  // namespace narrowkv
