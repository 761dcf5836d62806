// The form that is timed: codes of a rate of 0 to 6 bits for each element, one bit stream for each token, of which byte i of all 64
// tokens of a block lies in 64 consecutive bytes. Eight elements of one rate k make a unit, which is k bytes a token. An element's
// value is an entry of its rate's table, chosen by the last bits of the stream up to the element's own. Plain reference beside it.

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

// Streams of some blocks, [blocks][bytes][64], random; before each a byte of zeros, which is the state that it starts from.
struct Streams {
    Rates rates;
    int bytes;
    std::vector<uint8_t> memory;

    Streams(const Rates& rates, int blocks, std::mt19937& random)
        : rates(rates), bytes(stream_bytes(rates)), memory(size_t(blocks) * (bytes + 1) * kTokens + 64) {
        for (size_t i = 0; i < memory.size(); ++i) memory[i] = i / kTokens % (bytes + 1) ? uint8_t(random()) : 0;
    }
    const uint8_t* block(int i) const { return &memory[size_t(i) * (bytes + 1) * kTokens + kTokens]; }

    // The `count` bits that end where the element's own do.
    int window(int block_index, int token, int element, int count) const {
        const uint8_t* from = block(block_index);
        int end = 0;
        for (int unit = 0; unit < element / kUnit; ++unit) end += kUnit * rates[unit];
        end += rates[element / kUnit] * (element % kUnit + 1);
        int found = 0;
        for (int bit = end - count; bit < end; ++bit) {
            const int byte = bit < 0 ? -1 : bit / 8, at = (bit + 8) % 8;
            found = found << 1 | (from[byte * kTokens + token] >> (7 - at) & 1);
        }
        return found;
    }
};

}  // namespace cycles
