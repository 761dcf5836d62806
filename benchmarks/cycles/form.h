// The form that is timed: codes of a rate of 0 to 6 bits for each element, one bit stream for each token, of which byte i of
// all 64 tokens of a block lies in 64 consecutive bytes. Eight elements of one rate k make a unit, which is k bytes a token.
// An element's value is an entry of its rate's table, chosen by the last bits of the stream up to the element's own. Plain
// reference beside it.

#pragma once

#include <cstdint>
#include <random>
#include <vector>

namespace cycles {

constexpr int kTokens = 64, kDim = 128, kUnit = 8, kUnits = kDim / kUnit, kMostRate = 6;

using Rates = std::vector<int>;  // of the units, ascending

inline int stream_bytes(const Rates& rates) {
    int bytes = 0;
    for (int k : rates) bytes += k;
    return bytes;
}

// Tables of all rates, as bytes of at most 7 bits. `offset` is what a 0 became.
struct Tables {
    alignas(64) int8_t high[kMostRate + 1][16], low[kMostRate + 1][16];  // additive: high[upper nibble] + low[lower nibble]
    alignas(64) int8_t whole[kMostRate + 1][256];                        // one entry for each window
    alignas(64) int8_t repeated[kMostRate + 1][64];  // of a code alone, so that bits above it do not matter
    int offset;

    Tables(int offset, std::mt19937& random) : offset(offset) {
        for (int k = 0; k <= kMostRate; ++k) {
            for (auto& entry : high[k]) entry = int8_t(int(random() % 80) - 40 + offset);
            for (auto& entry : low[k]) entry = int8_t(int(random() % 48) - 24);
            for (auto& entry : whole[k]) entry = int8_t(int(random() % 128) - 64 + offset);
            for (int i = 0; i < 64; ++i) repeated[k][i] = whole[k][i % (1 << k)];
        }
    }
};

// Streams of some blocks, [blocks][bytes][64], random; before each kBefore bytes of zeros, the state that it starts from.
constexpr int kBefore = 3;

struct Streams {
    Rates rates;
    int bytes;
    std::vector<uint8_t> memory;

    Streams(const Rates& rates, int blocks, std::mt19937& random)
        : rates(rates), bytes(stream_bytes(rates)), memory(size_t(blocks) * (bytes + kBefore) * kTokens + 64) {
        for (size_t i = 0; i < memory.size(); ++i) memory[i] = i / kTokens % (bytes + kBefore) < kBefore ? 0 : uint8_t(random());
    }
    const uint8_t* block(int i) const { return &memory[(size_t(i) * (bytes + kBefore) + kBefore) * kTokens]; }

    int byte(int block_index, int token, int i) const { return block(block_index)[i * kTokens + token]; }

    // The first byte of an element's unit.
    int unit_byte(int element) const {
        int found = 0;
        for (int unit = 0; unit < element / kUnit; ++unit) found += rates[unit];
        return found;
    }

    // The `count` bits that end where the element's own do.
    int window(int block_index, int token, int element, int count) const {
        const int end = 8 * unit_byte(element) + rates[element / kUnit] * (element % kUnit + 1);
        int found = 0;
        for (int bit = end - count + 8; bit < end + 8; ++bit) found = found << 1 | (byte(block_index, token, bit / 8 - 1) >> (7 - bit % 8) & 1);
        return found;
    }

    // The last four bits up to an element's of one of the two streams of which its unit has `first` bytes, then `second`.
    int split_window(int block_index, int token, int element, int first, int second, bool of_second) const {
        const int start = unit_byte(element) + (of_second ? first : 0), before = unit_byte(element) - (of_second ? 1 : second + 1);
        const int end = 8 + (of_second ? second : first) * (element % kUnit + 1);
        int found = 0;
        for (int bit = end - 4; bit < end; ++bit) found = found << 1 | (byte(block_index, token, bit < 8 ? before : start + bit / 8 - 1) >> (7 - bit % 8) & 1);
        return found;
    }

    // The same for a unit of one bit, whose upper nibble has the bits of even elements and whose lower one those of odd
    // elements: the last four of the `back`-th element before this one and others of its parity.
    int alternating_window(int block_index, int token, int element, int back) const {
        int found = 0;
        for (int i = 3; i >= 0; --i) {
            const int e = element % kUnit + kUnit - back - 2 * i;  // counted from the first element of the unit before
            found = found << 1 | (byte(block_index, token, unit_byte(element) + e / kUnit - 1) >> ((e % 2 ? 3 : 7) - e % kUnit / 2) & 1);
        }
        return found;
    }
};

}  // namespace cycles
