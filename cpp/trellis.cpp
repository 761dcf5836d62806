// Trellis-coded codes for any processor: eight states at once, as the compiler sees fit.

#include "trellis.h"

#include <cstdint>
#include <cstring>

namespace narrowkv {
namespace {

constexpr int width = 8;
typedef uint16_t Lanes __attribute__((vector_size(16)));
typedef int16_t Signed __attribute__((vector_size(16)));
typedef uint8_t Bytes __attribute__((vector_size(8)));

template <typename T>
inline Lanes load(const T* p) {
    Lanes x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
inline void store(uint16_t* p, Lanes x) { std::memcpy(p, &x, sizeof x); }
inline void store_bytes(uint8_t* p, Lanes x) {
    const Bytes bytes = __builtin_convertvector(x, Bytes);
    std::memcpy(p, &bytes, sizeof bytes);
}
inline Lanes splat(uint16_t x) { return Lanes{x, x, x, x, x, x, x, x}; }
inline Lanes lane_indices() { return Lanes{0, 1, 2, 3, 4, 5, 6, 7}; }
inline Lanes select(Signed mask, Lanes a, Lanes b) { return (a & Lanes(mask)) | (b & ~Lanes(mask)); }
inline Lanes if_equal(Lanes a, Lanes b, Lanes then, Lanes otherwise) { return select(a == b, then, otherwise); }
inline Lanes minimum(Lanes a, Lanes b) { return select(a < b, a, b); }
inline Lanes maximum(Lanes a, Lanes b) { return select(a < b, b, a); }
inline Lanes saturated_sum(Lanes a, Lanes b) { return a + minimum(b, ~a); }
// By bytes, since there is no common name for instructions that do it.
inline Lanes high_product(Lanes a, Lanes b) {
    const Lanes a_high = a >> 8, a_low = a & 255, b_high = b >> 8, b_low = b & 255;
    const Lanes first = a_high * b_low, second = a_low * b_high;
    const Lanes carried = (a_low * b_low >> 8) + (first & 255) + (second & 255);
    return a_high * b_high + (first >> 8) + (second >> 8) + (carried >> 8);
}

template <int distance>
inline Lanes rotate(Lanes x) {
    static_assert(distance == 4);
    return Lanes{x[4], x[5], x[6], x[7], x[0], x[1], x[2], x[3]};
}

inline Lanes least_of(Lanes x) {
    uint16_t least = x[0];
    for (int i = 1; i < width; ++i) least = x[i] < least ? x[i] : least;
    return splat(least);
}

// Lane i is from[i >> rate].
template <int rate>
inline Lanes spread(const uint16_t* from) {
    Lanes x;
    for (int i = 0; i < width; ++i) x[i] = from[i >> rate];
    return x;
}

typedef double Doubles __attribute__((vector_size(16)));
inline Doubles product_and_sum(Doubles a, Doubles b, Doubles sum) { return a * b + sum; }

}  // namespace
}  // namespace narrowkv

#include "trellis_kernel.h"
#include "stream_encode_kernel.h"

namespace narrowkv {
void encode_trellis_generic(const Trellis& problem) { encode_problem(problem); }
StreamCounts encode_streams_generic(const StreamCodec& codec, const TensorView& elements, const uint8_t* skip, const EncodeBuffer& buffer,
                                    const int32_t* stored_outliers, const int64_t* row_starts, bool halves, int threads) {
    return encode_all_streams(codec, elements, skip, buffer, stored_outliers, row_starts, halves, threads);
}
}  // namespace narrowkv
