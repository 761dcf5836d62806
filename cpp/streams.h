// Trellis-coded streams of a block, decoded to grid steps. Compiled once for each instruction set: included
// after `simd`. codec/trellis.py says what a stream is; a block holds byte i of the streams of its 64 tokens side by side.

#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <vector>

#include "attention.h"
#include "each.h"
#include "half.h"
#include "scratch.h"

namespace narrowkv {
namespace {

using simd::Lanes;

constexpr int kLanes = sizeof(Lanes);
constexpr int kAtOnce = simd::width == 16 ? 8 : 4;  // queries

inline Lanes load_lanes(const uint8_t* p) {
    Lanes x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
inline Lanes every(int byte) { return Lanes{} + uint8_t(byte); }

// Bits `first` to `stop` of each byte become those that lie `by` higher, or lower where that is negative; others 0.
template <int by, int first, int stop>
inline Lanes move_bits(Lanes x) {
#if defined(__GFNI__)
    constexpr uint64_t matrix = [] {
        uint64_t rows = 0;
        for (int bit = first; bit < stop; ++bit) rows |= uint64_t(1) << (8 * (7 - bit) + bit + by);
        return rows;
    }();
    return Lanes(_mm512_gf2p8affine_epi64_epi8(__m512i(x), _mm512_set1_epi64(matrix), 0));
#else
    const simd::Words moved = by >= 0 ? simd::Words(x) >> (by & 15) : simd::Words(x) << (-by & 15);
    return Lanes(moved) & every((1 << stop) - (1 << first));
#endif
}

// Four bits from `from` on, counted from the first bit of bytes[0]; what other bits of 16 hold is cut off.
template <int from>
inline Lanes nibble(const Lanes* bytes) {
    constexpr int byte = from / 8, after = from % 8 - 4;  // after: bits that lie in the next byte
    if constexpr (after <= 0) return move_bits<-after, 0, 4>(bytes[byte]);
    else return move_bits<8 - after, 0, after>(bytes[byte + 1]) | move_bits<-after, after, 4>(bytes[byte]);
}

// Eight coefficients of rate k of 64 tokens, whose bytes begin in a row of the codes. ordered: puts a row's tokens in the
// order in which they are wanted. put: takes each coefficient, whose number is a type, of a register of tokens from one on.
template <int k, typename Ordered, typename Put>
NARROWKV_INLINE inline void decode_unit(const Streams& streams, const uint8_t* codes, int row, const Ordered& ordered, const Put& put) {
    alignas(64) static const uint8_t nothing[kBlock] = {};
    const Lanes high = simd::repeated(streams.high + (k - 1) * 16), low = simd::repeated(streams.low + (k - 1) * 16);
    const uint8_t *own = codes + row * kBlock, *before = row ? own - kBlock : nothing;
    for (int token = 0; token < kBlock; token += kLanes) {
        Lanes bytes[k + 1] = {ordered(load_lanes(before + token))};
        each<k>([&](auto i) NARROWKV_INLINE { bytes[i + 1] = ordered(load_lanes(own + i * kBlock + token)); });
        each<kUnit>([&](auto i) NARROWKV_INLINE {
            constexpr int end = 8 + k * (i + 1);
            put(i, token, simd::pick(high, nibble<end - 8>(bytes)) + simd::pick(low, nibble<end - 4>(bytes)));
        });
    }
}

// The same, [8][64].
template <int k, typename Ordered>
NARROWKV_INLINE inline void decode_unit(const Streams& streams, const uint8_t* codes, int row, const Ordered& ordered, int8_t* tile) {
    decode_unit<k>(streams, codes, row, ordered, [&](auto i, int token, Lanes value) NARROWKV_INLINE {
        std::memcpy(tile + i * kBlock + token, &value, sizeof value);
    });
}

struct AsTheyLie {
    NARROWKV_INLINE Lanes operator()(Lanes bytes) const { return bytes; }
};

// Run `part` for all units of a head: it is given the rate as a type, the row in which their bytes begin, and how many went
// before.
template <typename Part>
inline void by_units(const Streams& streams, const Part& part) {
    int row = 0, element = 0;
    each<kMostRate>([&](auto i) NARROWKV_INLINE {
        for (int unit = 0; unit < streams.counts[i]; ++unit, row += i + 1) part(std::integral_constant<int, i + 1>(), row, element++);
    });
}

// A head of a block: [coded][64]. next: that of the block that will be read next, prefetched on the way.
inline void decode_streams(const Streams& streams, const uint8_t* codes, const uint8_t* next, int8_t* tile) {
    by_units(streams, [&](auto k, int row, int unit) NARROWKV_INLINE {
        decode_unit<k>(streams, codes, row, AsTheyLie(), tile + unit * kUnit * kBlock);
        for (int i = 0; i < k; ++i) __builtin_prefetch(next + (row + i) * kBlock, 0, 2);
    });
}

// What codes of norms stand for: codec/quantizers/trellis.py.
inline const float* norms() {
    static const auto found = [] {
        std::array<float, kNorms> sizes;
        for (int code = 0; code < kNorms; ++code) sizes[code] = std::exp2((code - 128) / 16.0f);
        return sizes;
    }();
    return found.data();
}

// What a state of rate k stands for.
inline int8_t decode_state(const Streams& streams, int k, int state) {
    return int8_t(streams.high[(k - 1) * 16 + (state >> 4)] + streams.low[(k - 1) * 16 + (state & 15)]);
}

// Run `part`, which is given how many queries at once as a type, over all rows, `most` at a time: each time dequantized
// elements are converted anew.
template <int most, typename Part>
inline void by_many(int rows, const Part& part) {
    for (int row = 0; row < rows; row += most) {
        each<most>([&](auto i) {
            if (std::min(rows - row, most) == i + 1) part(row, std::integral_constant<int, i + 1>());
        });
    }
}

// What a tile holds.
struct InTile {
    const int8_t* tile;
    int8_t operator()(int coefficient, int token) const { return tile[coefficient * kBlock + token]; }
};

// By how much an exact coefficient is off what its code stands for, in grid steps.
struct Miss {
    int token, coefficient;
    float by;
};

// A head's outliers in ascending order of tokens, as far as they lie within a block of this many coefficients.
class Misses {
  public:
    const Miss* begin() const { return found.data(); }
    const Miss* end() const { return found.data() + count; }

    // decoded: the grid steps of a coefficient and token.
    template <typename Decoded>
    void of_block(const PackedTensor& side, const Block& block, int head, const Decoded& decoded) {
        count = 0;
        const int coded = side.streams->coded();
        if (!block.outlier_offsets || !coded) return;
        const int first = block.outlier_offsets[head], last = block.outlier_offsets[head + 1];
        reserve(last - first);
        const uint64_t reciprocal = (uint64_t(1) << 32) / coded + 1;  // of 16 bits, a product and a shift divide exactly
        for (int i = first; i < last; ++i) {
            const int index = block.outlier_index[i], token = int(index * reciprocal >> 32);
            if (token < kBlock) add(side, token, index - token * coded, block.outlier_values, i, decoded);
        }
    }

  private:
    std::vector<Miss> found;  // of which `count` count
    int64_t count = 0;

    void reserve(int64_t most) {
        if (int64_t(found.size()) < most) found.resize(most);
    }

    template <typename Decoded>
    NARROWKV_INLINE void add(const PackedTensor& side, int token, int coefficient, const void* values, int64_t i, const Decoded& decoded) {
        const float exact = to_single(static_cast<const uint16_t*>(values)[i], side.outlier);
        found[count++] = {token, coefficient, exact * side.streams->finer[coefficient] - decoded(coefficient, token)};
    }
};

}  // namespace
}  // namespace narrowkv
