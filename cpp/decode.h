// From packed bytes to a tile of numbers in the nearest cache. Compiled once for each instruction set: included after `simd`.

#pragma once

#include <cstring>

#include "attention.h"

namespace narrowkv {
namespace {

inline float to_single(uint16_t bits, Number kind) {
    uint32_t wide;
    float number;
    if (kind == Number::bfloat) {
        wide = uint32_t(bits) << 16;
    } else {
        // exponent and fraction moved into place, then scaled by the difference of the biases, which mends subnormals too
        wide = uint32_t(bits & 0x7fff) << 13;
        std::memcpy(&number, &wide, 4);
        number *= 0x1p112f;
        std::memcpy(&wide, &number, 4);
        wide |= uint32_t(bits & 0x8000) << 16;
    }
    std::memcpy(&number, &wide, 4);
    return number;
}

inline float load_exact(const void* numbers, int64_t i, Number kind) {
    if (kind == Number::single) return static_cast<const float*>(numbers)[i];
    return to_single(static_cast<const uint16_t*>(numbers)[i], kind);
}

// One plane of one row: code i lies in byte i % bytes at bit width * (i / bytes). A word of eight bytes is taken apart at once.
template <int width, bool first>
inline void unpack_plane(const uint8_t* __restrict packed, int bytes, int shift, uint8_t* __restrict codes) {
    constexpr uint64_t mask = 0x0101010101010101u * ((1u << width) - 1);
    const auto put = [&](auto word, uint8_t* to) {
        using Word = decltype(word);
        if constexpr (!first) {
            Word before;
            std::memcpy(&before, to, sizeof(Word));
            word = Word(before | (word << shift));
        }
        std::memcpy(to, &word, sizeof(Word));
    };
    for (int i = 0; i < 8 / width; ++i) {
        int byte = 0;
        for (; byte + 8 <= bytes; byte += 8) {
            uint64_t word;
            std::memcpy(&word, packed + byte, 8);
            put((word >> (width * i)) & mask, codes + i * bytes + byte);
        }
        for (; byte < bytes; ++byte) put(uint8_t((packed[byte] >> (width * i)) & uint8_t(mask)), codes + i * bytes + byte);
    }
}

template <int width>
inline void unpack_plane(const uint8_t* packed, int bytes, int shift, uint8_t* codes) {
    if (shift == 0) {
        unpack_plane<width, true>(packed, bytes, shift, codes);
    } else {
        unpack_plane<width, false>(packed, bytes, shift, codes);
    }
}

constexpr int kPlanes[9][3] = {{}, {}, {2}, {2, 1}, {4}, {4, 1}, {4, 2}, {4, 2, 1}, {8}};

// Codes of a row of `length`; rows of all heads of a block are counted through.
inline void unpack_row(const Block& block, int bits, int64_t row, int length, uint8_t* codes) {
    int shift = 0;
    for (int plane = 0; plane < 3 && kPlanes[bits][plane]; ++plane) {
        const int width = kPlanes[bits][plane], bytes = length * width / 8;
        const uint8_t* packed = block.planes[plane] + row * bytes;
        switch (width) {
            case 1: unpack_plane<1>(packed, bytes, shift, codes); break;
            case 2: unpack_plane<2>(packed, bytes, shift, codes); break;
            case 4: unpack_plane<4>(packed, bytes, shift, codes); break;
            default: std::memcpy(codes, packed, bytes);
        }
        shift += width;
    }
}

// Scales and zeros of a head, laid out for rows of codes: row r has those at (r / rows) * count, each for `length` codes.
struct Ranges {
    int rows, count, length;
    float* scale;
    float* zero;
};

inline Ranges read_ranges(const Side& side, const Block& block, int head, int head_dim, float* buffer) {
    const int tokens = side.range_tokens, channels = side.range_channels, all = tokens * channels;
    const int64_t first = side.range_heads > 1 ? int64_t(head) * all : 0;
    Ranges ranges{kBlock / tokens, channels, head_dim / channels, buffer, buffer + all};
    if (side.channel_major) ranges = {head_dim / channels, tokens, kBlock / tokens, buffer, buffer + all};
    for (int token = 0; token < tokens; ++token) {
        for (int channel = 0; channel < channels; ++channel) {
            const int64_t from = first + token * channels + channel;
            const int to = side.channel_major ? channel * tokens + token : token * channels + channel;
            if (side.scale) {
                ranges.scale[to] = side.scale[from];
                ranges.zero[to] = side.zero[from];
                continue;
            }
            ranges.scale[to] = to_single(block.scale[from], Number::half);
            ranges.zero[to] = block.zero ? to_single(block.zero[from], Number::half) : 0.0f;
        }
    }
    return ranges;
}

// A row of codes looked up in a codebook of its own.
template <int levels>
inline void look_up(const uint8_t* codes, int length, const float* table, float* numbers) {
    const simd::Table<levels> points(table);
    for (int i = 0; i < length; i += simd::width) simd::store(numbers + i, points(simd::load_codes(codes + i)));
}

// A row of codes looked up in a codebook of normalised levels, then stretched; `length` may be beyond the codes that count.
template <int levels>
inline void look_up(const uint8_t* codes, int length, const float* table, const Ranges& ranges, int row, float* numbers) {
    const simd::Table<levels> points(table);
    const float* scale = ranges.scale + row / ranges.rows * ranges.count;
    const float* zero = ranges.zero + row / ranges.rows * ranges.count;
    if (ranges.length % simd::width == 0) {
        for (int part = 0, i = 0; part < ranges.count; ++part) {
            const auto stretched = points.stretched(scale[part], zero[part]);
            for (const int stop = i + ranges.length; i < stop; i += simd::width) {
                simd::store(numbers + i, stretched(simd::load_codes(codes + i)));
            }
        }
        return;
    }
    for (int i = 0; i < length; i += simd::width) {
        float scales[simd::width], zeros[simd::width];
        for (int lane = 0; lane < simd::width; ++lane) {
            const int part = (i + lane) / ranges.length < ranges.count ? (i + lane) / ranges.length : ranges.count - 1;
            scales[lane] = scale[part];
            zeros[lane] = zero[part];
        }
        simd::store(numbers + i, points(simd::load_codes(codes + i)) * simd::load(scales) + simd::load(zeros));
    }
}

inline int round_up(int n, int to) { return (n + to - 1) / to * to; }

// Numbers of a tile lie in rows as codes do: channel-major [head_dim][64], else [64][head_dim rounded up to 16].
inline int tile_stride(bool channel_major, int head_dim) { return channel_major ? kBlock : round_up(head_dim, 16); }

template <int levels>
void decode_codes(const Side& side, const Block& block, int head, int head_dim, float* buffer, float* tile) {
    const int rows = side.channel_major ? side.codes : kBlock, length = side.channel_major ? kBlock : side.codes;
    const int stride = tile_stride(side.channel_major, head_dim);
    const Ranges ranges = side.fixed ? Ranges{} : read_ranges(side, block, head, head_dim, buffer);
    alignas(64) uint8_t codes[256 + 16] = {};  // a row; lanes beyond its end are looked up too and never read
    for (int row = 0; row < rows; ++row) {
        const int64_t at = int64_t(head) * rows + row;
        unpack_row(block, side.bits, at, length, codes);
        if (!side.fixed) {
            look_up<levels>(codes, stride, side.table, ranges, row, tile + row * stride);
            continue;
        }
        for (int number = 0; number < side.numbers; ++number) {
            const float* table = side.table + (at * side.numbers + number) * side.stride;
            look_up<levels>(codes, stride, table, tile + (number * rows + row) * stride);
        }
    }
}

inline void put_outliers(const Side& side, const Block& block, int head, int head_dim, float* tile) {
    const int stride = tile_stride(side.channel_major, head_dim);
    for (int i = block.outlier_offsets[head]; i < block.outlier_offsets[head + 1]; ++i) {
        const int token = block.outlier_index[i] / side.codes, code = block.outlier_index[i] % side.codes;
        for (int number = 0; number < side.numbers; ++number) {
            const int channel = code + number * side.codes;
            const float exact = load_exact(block.outlier_values, int64_t(i) * side.numbers + number, side.outlier);
            tile[side.channel_major ? channel * stride + token : token * stride + channel] = exact;
        }
    }
}

// Numbers of 64 tokens that are held as they are, [64][head_dim], into a tile.
inline void copy_exact(const void* numbers, Number kind, int tokens, int head_dim, bool channel_major, float* tile) {
    const int stride = tile_stride(channel_major, head_dim);
    for (int token = 0; token < tokens; ++token) {
        for (int channel = 0; channel < head_dim; ++channel) {
            const float exact = load_exact(numbers, int64_t(token) * head_dim + channel, kind);
            tile[channel_major ? channel * stride + token : token * stride + channel] = exact;
        }
    }
}

// One head of one block, decoded into a tile.
inline void decode(const Side& side, const Block& block, int head, int head_dim, float* buffer, float* tile) {
    if (side.bits == 16) {
        const int64_t size = int64_t(kBlock) * head_dim * (side.exact == Number::single ? 4 : 2);
        return copy_exact(block.planes[0] + head * size, side.exact, kBlock, head_dim, side.channel_major, tile);
    }
    switch (side.levels) {
        case 8: decode_codes<8>(side, block, head, head_dim, buffer, tile); break;
        case 16: decode_codes<16>(side, block, head, head_dim, buffer, tile); break;
        case 32: decode_codes<32>(side, block, head, head_dim, buffer, tile); break;
        case 64: decode_codes<64>(side, block, head, head_dim, buffer, tile); break;
        default: decode_codes<256>(side, block, head, head_dim, buffer, tile);
    }
    if (block.outlier_offsets) put_outliers(side, block, head, head_dim, tile);
}

}  // namespace
}  // namespace narrowkv
