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
#if defined(__F16C__)
        return _cvtsh_ss(bits);
#endif
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

typedef uint64_t Sixteen __attribute__((vector_size(16)));  // codes, a byte each

// Add one plane to a row of codes: code i lies in byte i % bytes at bit width * (i / bytes). Sixteen codes are shifted and
// masked at once, and stored at once, so that loading some of them need not wait until the store is through.
template <int width, bool first>
inline void unpack_plane(const uint8_t* packed, int length, int shift, uint8_t* codes) {
    constexpr uint64_t mask = 0x0101010101010101u * ((1u << width) - 1);
    const int bytes = length * width / 8;
    const auto put = [&](Sixteen plane, int i) {
        if constexpr (!first) {
            Sixteen before;
            std::memcpy(&before, codes + i, 16);
            plane = before | plane << shift;
        }
        std::memcpy(codes + i, &plane, 16);
    };
    if (bytes % 16 == 0) {
        for (int byte = 0; byte < bytes; byte += 16) {
            Sixteen packs;
            std::memcpy(&packs, packed + byte, 16);
            for (int i = 0; i < 8 / width; ++i) put(packs >> (width * i) & mask, i * bytes + byte);
        }
    } else if (bytes == 8) {
        uint64_t word;
        std::memcpy(&word, packed, 8);
        for (int i = 0; i < 8 / width; i += 2) put(Sixteen{word >> (width * i), word >> (width * i + width)} & mask, i * 8);
    } else {
        for (int i = 0; i < length; ++i) {
            const uint8_t code = packed[i % bytes] >> (width * (i / bytes)) & ((1 << width) - 1);
            codes[i] = first ? code : codes[i] | code << shift;
        }
    }
}

template <int width>
inline void unpack_plane(const uint8_t* packed, int length, int shift, uint8_t* codes) {
    if (shift == 0) {
        unpack_plane<width, true>(packed, length, shift, codes);
    } else {
        unpack_plane<width, false>(packed, length, shift, codes);
    }
}

constexpr int kPlanes[9][3] = {{}, {}, {2}, {2, 1}, {4}, {4, 1}, {4, 2}, {4, 2, 1}, {8}};

// Codes of a row of `length`; rows of all heads of a block are counted through.
inline void unpack_row(const Block& block, int bits, int64_t row, int length, uint8_t* codes) {
    int shift = 0;
    for (int plane = 0; plane < 3 && kPlanes[bits][plane]; ++plane) {
        const int width = kPlanes[bits][plane];
        const uint8_t* packed = block.planes[plane] + row * (length * width / 8);
        switch (width) {
            case 1: unpack_plane<1>(packed, length, shift, codes); break;
            case 2: unpack_plane<2>(packed, length, shift, codes); break;
            case 4: unpack_plane<4>(packed, length, shift, codes); break;
            default: std::memcpy(codes, packed, length);
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

// Codes i to i + 15 of a row whose length is known, of which planes with 16 bytes or 8 can be read without a buffer.
template <int bits, int length>
inline Sixteen codes_at(const uint8_t* const* rows, int i) {
    Sixteen codes = {};
    int shift = 0;
    for (int plane = 0; plane < 3 && kPlanes[bits][plane]; ++plane) {
        const int width = kPlanes[bits][plane], bytes = length * width / 8, at = width * (i / bytes);
        const uint64_t mask = 0x0101010101010101u * ((1u << width) - 1);
        Sixteen packed;
        if (bytes == 8) {
            uint64_t word;
            std::memcpy(&word, rows[plane], 8);
            packed = Sixteen{word >> at, word >> (at + width)};
        } else {
            std::memcpy(&packed, rows[plane] + i % bytes, 16);
            packed >>= at;
        }
        codes |= (packed & mask) << shift;
        shift += width;
    }
    return codes;
}

constexpr int levels_of(int bits) { return bits <= 3 ? 8 : bits >= 7 ? 256 : 1 << bits; }

// A row of codes, looked up in the codebooks of one number or two, in a row of the tile for each.
template <int bits, int length, int numbers>
inline void look_up(const uint8_t* const* rows, const float* table, int stride, float* first, float* second) {
    const simd::Table<levels_of(bits)> ones(table), twos(table + (numbers - 1) * stride);
#pragma GCC unroll 8
    for (int i = 0; i < length; i += 16) {
        const simd::Codes codes(codes_at<bits, length>(rows, i));
#pragma GCC unroll 4
        for (int part = 0; part < 16 / simd::width; ++part) {
            const int at = i + part * simd::width;
            simd::store(first + at, ones(codes.part(part)));
            if (numbers == 2) simd::store(second + at, twos(codes.part(part)));
        }
    }
}

// A row of codes looked up in a codebook of normalised levels, then stretched: all alike, by sixteens, or each by its own.
template <int bits, int length>
inline void look_up(const uint8_t* const* rows, const float* table, const float* scale, const float* zero, int count,
                    float* numbers) {
    const simd::Table<levels_of(bits)> points(table), stretched = points.stretched(scale[0], zero[0]);
#pragma GCC unroll 8
    for (int i = 0; i < length; i += 16) {
        const simd::Codes codes(codes_at<bits, length>(rows, i));
#pragma GCC unroll 4
        for (int part = 0; part < 16 / simd::width; ++part) {
            const int at = i + part * simd::width;
            if (count == 1) {
                simd::store(numbers + at, stretched(codes.part(part)));
            } else if (count == length) {
                simd::store(numbers + at, points(codes.part(part)) * simd::load(scale + at) + simd::load(zero + at));
            } else {
                const int group = (i / 16) * count / (length / 16);
                simd::store(numbers + at, points(codes.part(part)) * scale[group] + zero[group]);
            }
        }
    }
}

// The same for rows of any length and ranges of any, through a buffer of codes, which may go on beyond those that count.
template <int bits>
inline void look_up(const uint8_t* codes, int length, const float* table, const float* scale, const float* zero,
                    const Ranges& ranges, float* numbers) {
    const simd::Table<levels_of(bits)> points(table);
    for (int i = 0; i < length; i += 16) {
        float scales[16], zeros[16];
        for (int lane = 0; scale && lane < 16; ++lane) {
            const int group = (i + lane) / ranges.length < ranges.count ? (i + lane) / ranges.length : ranges.count - 1;
            scales[lane] = scale[group], zeros[lane] = zero[group];
        }
        Sixteen some;
        std::memcpy(&some, codes + i, 16);
        const simd::Codes parts(some);
        for (int part = 0; part < 16 / simd::width; ++part) {
            const int at = part * simd::width;
            const auto found = points(parts.part(part));
            simd::store(numbers + i + at, scale ? found * simd::load(scales + at) + simd::load(zeros + at) : found);
        }
    }
}

inline int round_up(int n, int to) { return (n + to - 1) / to * to; }

// Numbers of a tile lie in rows as codes do: channel-major [head_dim][64], else [64][head_dim rounded up to 16].
inline int tile_stride(bool channel_major, int head_dim) { return channel_major ? kBlock : round_up(head_dim, 16); }

// length: of a row of codes, where it is one that can be read without a buffer; else 0.
template <int bits, int length>
void decode_codes(const Side& side, const Block& block, int head, int head_dim, float* buffer, float* tile) {
    const int rows = side.channel_major ? side.codes : kBlock, codes = side.channel_major ? kBlock : side.codes;
    const int stride = tile_stride(side.channel_major, head_dim);
    const Ranges ranges = side.fixed ? Ranges{} : read_ranges(side, block, head, head_dim, buffer);
    alignas(64) uint8_t row_codes[256 + 16] = {};
    const uint8_t* planes[3];
    for (int plane = 0; plane < 3; ++plane) {
        planes[plane] = block.planes[plane] + int64_t(head) * rows * (codes * kPlanes[bits][plane] / 8);
    }
    for (int row = 0; row < rows; ++row) {
        const int64_t at = int64_t(head) * rows + row;
        float* numbers = tile + row * stride;
        float* others = numbers + (side.numbers - 1) * rows * stride;
        const float* table = side.fixed ? side.table + at * side.numbers * side.stride : side.table;
        const float* scale = side.fixed ? nullptr : ranges.scale + row / ranges.rows * ranges.count;
        const float* zero = side.fixed ? nullptr : ranges.zero + row / ranges.rows * ranges.count;
        if constexpr (length == 0) {
            unpack_row(block, bits, at, codes, row_codes);
            look_up<bits>(row_codes, stride, table, scale, zero, ranges, numbers);
            if (side.numbers == 2) look_up<bits>(row_codes, stride, table + side.stride, scale, zero, ranges, others);
        } else {
            if (!side.fixed) {
                look_up<bits, length>(planes, table, scale, zero, ranges.count, numbers);
            } else if (side.numbers == 2) {
                look_up<bits, length, 2>(planes, table, side.stride, numbers, others);
            } else {
                look_up<bits, length, 1>(planes, table, side.stride, numbers, numbers);
            }
            for (int plane = 0; plane < 3; ++plane) planes[plane] += codes * kPlanes[bits][plane] / 8;
        }
    }
}

template <int bits>
void decode_codes(const Side& side, const Block& block, int head, int head_dim, float* buffer, float* tile) {
    const int length = side.channel_major ? kBlock : side.codes;
    const int together = side.channel_major ? kBlock / side.range_tokens : head_dim / side.range_channels;
    const bool direct = side.fixed || together == 1 || together % 16 == 0;
    if (direct && length == 64) return decode_codes<bits, 64>(side, block, head, head_dim, buffer, tile);
    if (direct && length == 128) return decode_codes<bits, 128>(side, block, head, head_dim, buffer, tile);
    decode_codes<bits, 0>(side, block, head, head_dim, buffer, tile);
}

// Ask for one head of a block that will be read next.
inline void prefetch(const Side& side, const Block& block, int head) {
    if (side.bits == 16) return;
    const int64_t numbers = int64_t(side.codes) * kBlock;
    for (int plane = 0; plane < 3 && kPlanes[side.bits][plane]; ++plane) {
        const int64_t bytes = numbers * kPlanes[side.bits][plane] / 8;
        for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(block.planes[plane] + head * bytes + at, 0, 2);
    }
    if (block.outlier_offsets) __builtin_prefetch(block.outlier_offsets + head, 0, 2);
}

inline void put_outliers(const Side& side, const Block& block, int head, int head_dim, float* tile) {
    const int stride = tile_stride(side.channel_major, head_dim);
    const uint32_t reciprocal = (1u << 22) / side.codes + 1;  // of an index below 2^14, a product and a shift divide exactly
    for (int i = block.outlier_offsets[head]; i < block.outlier_offsets[head + 1]; ++i) {
        const int token = block.outlier_index[i] * uint64_t(reciprocal) >> 22, code = block.outlier_index[i] - token * side.codes;
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
    switch (side.bits) {
        case 2: decode_codes<2>(side, block, head, head_dim, buffer, tile); break;
        case 3: decode_codes<3>(side, block, head, head_dim, buffer, tile); break;
        case 4: decode_codes<4>(side, block, head, head_dim, buffer, tile); break;
        case 5: decode_codes<5>(side, block, head, head_dim, buffer, tile); break;
        case 6: decode_codes<6>(side, block, head, head_dim, buffer, tile); break;
        case 7: decode_codes<7>(side, block, head, head_dim, buffer, tile); break;
        default: decode_codes<8>(side, block, head, head_dim, buffer, tile);
    }
    if (block.outlier_offsets) put_outliers(side, block, head, head_dim, tile);
}

}  // namespace
}  // namespace narrowkv
