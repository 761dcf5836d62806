// From packed bytes to a tile of numbers in the nearest cache. Compiled once for each instruction set: included after `simd`.

#pragma once

#include <cstring>

#include "attention.h"
#include "ranges.h"

namespace narrowkv {
namespace {

typedef uint64_t Sixteen __attribute__((vector_size(16)));  // codes, a byte each

constexpr int kPlanes[9][3] = {{}, {}, {2}, {2, 1}, {4}, {4, 1}, {4, 2}, {4, 2, 1}, {8}};

// Codes of a row of any length: code i lies in byte i % bytes of a plane, at bit width * (i / bytes).
inline void unpack_row(const uint8_t* const* rows, int bits, int length, uint8_t* codes) {
    std::memset(codes, 0, length);
    for (int plane = 0, shift = 0; plane < 3 && kPlanes[bits][plane]; shift += kPlanes[bits][plane++]) {
        const int width = kPlanes[bits][plane], bytes = length * width / 8, mask = (1 << width) - 1;
        for (int i = 0; i < 8 / width; ++i) {
            for (int byte = 0; byte < bytes; ++byte) {
                codes[i * bytes + byte] |= (rows[plane][byte] >> (width * i) & mask) << shift;
            }
        }
    }
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
template <int bits, int length, int from, int stop, int numbers>
inline void look_up(const uint8_t* const* rows, const float* table, int stride, float* first, float* second) {
    const simd::Table<levels_of(bits)> ones(table), twos(table + (numbers - 1) * stride);
#pragma GCC unroll 8
    for (int i = from; i < stop; i += 16) {
        const simd::Codes codes(codes_at<bits, length>(rows, i));
#pragma GCC unroll 4
        for (int part = 0; part < 16 / simd::width; ++part) {
            const int at = i - from + part * simd::width;
            simd::store(first + at, ones(codes.part(part)));
            if (numbers == 2) simd::store(second + at, twos(codes.part(part)));
        }
    }
}

// A row of codes looked up in a codebook of normalised levels, then stretched: all alike, by sixteens, or each by its own.
template <int bits, int length, int from, int stop>
inline void look_up(const uint8_t* const* rows, const float* table, const float* scale, const float* zero, int count,
                    float* numbers) {
    const simd::Table<levels_of(bits)> points(table), stretched = points.stretched(scale[0], zero[0]);
#pragma GCC unroll 8
    for (int i = from; i < stop; i += 16) {
        const simd::Codes codes(codes_at<bits, length>(rows, i));
#pragma GCC unroll 4
        for (int part = 0; part < 16 / simd::width; ++part) {
            const int at = i + part * simd::width;
            float* to = numbers + at - from;
            if (count == 1) {
                simd::store(to, stretched(codes.part(part)));
            } else if (count == length) {
                simd::store(to, points(codes.part(part)) * simd::load(scale + at) + simd::load(zero + at));
            } else {
                const int group = (i / 16) * count / (length / 16);
                simd::store(to, points(codes.part(part)) * scale[group] + zero[group]);
            }
        }
    }
}

// The same for rows of any length and ranges of any, through a buffer of codes, which may go on beyond those that count.
template <int bits>
inline void look_up(const uint8_t* codes, int from, int length, const float* table, const float* scale, const float* zero,
                    const Ranges& ranges, float* numbers) {
    const simd::Table<levels_of(bits)> points(table);
    for (int i = 0; i < length; i += 16) {
        float scales[16], zeros[16];
        for (int lane = 0; scale && lane < 16; ++lane) {
            const int at = (from + i + lane) / ranges.length, group = at < ranges.count ? at : ranges.count - 1;
            scales[lane] = scale[group], zeros[lane] = zero[group];
        }
        Sixteen some;
        std::memcpy(&some, codes + from + i, 16);
        const simd::Codes parts(some);
        for (int part = 0; part < 16 / simd::width; ++part) {
            const int at = part * simd::width;
            const auto found = points(parts.part(part));
            simd::store(numbers + i + at, scale ? found * simd::load(scales + at) + simd::load(zeros + at) : found);
        }
    }
}

inline int round_up(int n, int to) { return (n + to - 1) / to * to; }

// Which tokens of a block are decoded into a tile: all, or for keys half of them. Numbers of a tile lie in rows as codes do:
// channel-major [head_dim][tokens], else [tokens][head_dim rounded up to 16].
struct Part {
    int from, tokens;
};

inline int tile_stride(bool channel_major, int head_dim, int tokens) {
    return channel_major ? tokens : round_up(head_dim, 16);
}

// Rows of codes of one head, each read where it lies. length: of a row; from, stop: which of its codes.
template <int bits, int length, int from, int stop, int numbers>
void decode_rows(const Side& side, const Block& block, int64_t row, int count, int stride, int other, const Ranges& given,
                 float* tile) {
    const Ranges ranges = given;  // copies, which stay in registers: for all the compiler knows, the tile might overlap the rest
    const int step = side.fixed ? numbers * side.stride : 0, room = side.stride;
    const float* table = side.table + row * step;
    const uint8_t* planes[3];
    for (int plane = 0; plane < 3; ++plane) {
        planes[plane] = block.planes[plane] + row * (length * kPlanes[bits][plane] / 8);
    }
    const float *scale = ranges.scale, *zero = ranges.zero;
    for (int i = 0, left = ranges.rows; i < count; ++i, --left, tile += stride, table += step) {
        if constexpr (numbers == 0) {
            if (left == 0) left = ranges.rows, scale += ranges.count, zero += ranges.count;
            look_up<bits, length, from, stop>(planes, table, scale, zero, ranges.count, tile);
        } else {
            look_up<bits, length, from, stop, numbers>(planes, table, room, tile, tile + other);
        }
        for (int plane = 0; plane < 3; ++plane) planes[plane] += length * kPlanes[bits][plane] / 8;
    }
}

// The same for rows of any length, through a buffer.
template <int bits>
void decode_any(const Side& side, const Block& block, int64_t row, int count, int stride, int other, const Ranges& ranges,
                int codes, int from, float* tile) {
    alignas(64) uint8_t row_codes[256 + 16] = {};
    for (int i = 0; i < count; ++i, ++row, tile += stride) {
        const uint8_t* planes[3];
        for (int plane = 0; plane < 3; ++plane) {
            planes[plane] = block.planes[plane] + row * (codes * kPlanes[bits][plane] / 8);
        }
        unpack_row(planes, bits, codes, row_codes);
        for (int number = 0; number < side.numbers; ++number) {
            const float* table = side.table + (side.fixed ? (row * side.numbers + number) * side.stride : 0);
            const float* scale = side.fixed ? nullptr : ranges.scale + i / ranges.rows * ranges.count;
            const float* zero = side.fixed ? nullptr : ranges.zero + i / ranges.rows * ranges.count;
            look_up<bits>(row_codes, from, stride, table, scale, zero, ranges, tile + number * other);
        }
    }
}

template <int bits>
void decode_codes(const Side& side, const Block& block, int head, int head_dim, Part part, float* buffer, float* tile) {
    const int together = side.channel_major ? kBlock / side.range_tokens : head_dim / side.range_channels;
    const bool direct = side.fixed || together == 1 || together % 16 == 0;
    const int rows = side.channel_major ? side.codes : kBlock, codes = side.channel_major ? kBlock : side.codes;
    const int count = side.channel_major ? rows : part.tokens, stride = tile_stride(side.channel_major, head_dim, part.tokens);
    const int64_t row = int64_t(head) * rows + (side.channel_major ? 0 : part.from);
    Ranges ranges = side.fixed ? Ranges{1, 0, 0, nullptr, nullptr} : read_ranges(side, block, head, head_dim, buffer);
    if (!side.channel_major && !side.fixed) {  // those of the part's first row
        ranges.scale += part.from / ranges.rows * ranges.count;
        ranges.zero += part.from / ranges.rows * ranges.count;
    }
    const auto run = [&](auto one, auto two, auto stretched) {
        (side.fixed ? side.numbers == 2 ? two : one : stretched)(side, block, row, count, stride, rows * stride, ranges, tile);
    };
    if (direct && side.channel_major && part.tokens == kBlock) {
        run(decode_rows<bits, 64, 0, 64, 1>, decode_rows<bits, 64, 0, 64, 2>, decode_rows<bits, 64, 0, 64, 0>);
    } else if (direct && side.channel_major && part.from == 0) {
        run(decode_rows<bits, 64, 0, 32, 1>, decode_rows<bits, 64, 0, 32, 2>, decode_rows<bits, 64, 0, 32, 0>);
    } else if (direct && side.channel_major) {
        run(decode_rows<bits, 64, 32, 64, 1>, decode_rows<bits, 64, 32, 64, 2>, decode_rows<bits, 64, 32, 64, 0>);
    } else if (direct && (codes == 64 || codes == 128)) {
        const auto read = codes == 64 ? decode_rows<bits, 64, 0, 64, 0> : decode_rows<bits, 128, 0, 128, 0>;
        read(side, block, row, count, stride, 0, ranges, tile);
    } else {
        decode_any<bits>(side, block, row, count, stride, rows * stride, ranges, codes, side.channel_major ? part.from : 0, tile);
    }
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

// The same for its outliers, once it is known where they lie.
inline void prefetch_outliers(const Side& side, const Block& block, int head) {
    if (!block.outlier_offsets) return;
    for (int i = block.outlier_offsets[head]; i < block.outlier_offsets[head + 1]; i += 16) {
        __builtin_prefetch(block.outlier_index + i, 0, 2);
        __builtin_prefetch(static_cast<const uint16_t*>(block.outlier_values) + i * side.numbers, 0, 2);
    }
}

template <int numbers, Number kind>
void put_outliers(const Side& side, const Block& block, int head, int head_dim, Part part, float* tile) {
    const int stride = tile_stride(side.channel_major, head_dim, part.tokens), codes = side.codes;
    const int by_token = side.channel_major ? 1 : stride, by_channel = side.channel_major ? stride : 1;
    const uint32_t reciprocal = (1u << 22) / codes + 1;  // of an index below 2^14, a product and a shift divide exactly
    const uint16_t* index = block.outlier_index;
    const uint16_t* values = static_cast<const uint16_t*>(block.outlier_values);
    int i = block.outlier_offsets[head];
    const int last = block.outlier_offsets[head + 1], stop = (part.from + part.tokens) * codes;
    while (i < last && index[i] < part.from * codes) ++i;
    for (; i < last && index[i] < stop; ++i) {  // they are sorted by token
        const int token = index[i] * uint64_t(reciprocal) >> 22, code = index[i] - token * codes;
        float* to = tile + (token - part.from) * by_token + code * by_channel;
        for (int number = 0; number < numbers; ++number) {
            to[number * codes * by_channel] = to_single(values[i * numbers + number], kind);
        }
    }
}

// Numbers of tokens that are held as they are, [tokens][head_dim], into a tile.
inline void copy_exact(const void* numbers, Number kind, Part part, int count, int head_dim, bool channel_major, float* tile) {
    const int stride = tile_stride(channel_major, head_dim, part.tokens);
    for (int token = 0; token < count; ++token) {
        for (int channel = 0; channel < head_dim; ++channel) {
            const float exact = load_exact(numbers, int64_t(part.from + token) * head_dim + channel, kind);
            tile[channel_major ? channel * stride + token : token * stride + channel] = exact;
        }
    }
}

// One head of a part of a block, decoded into a tile.
inline void decode(const Side& side, const Block& block, int head, int head_dim, Part part, float* buffer, float* tile) {
    if (side.bits == 16) {
        const int64_t size = int64_t(kBlock) * head_dim * (side.exact == Number::single ? 4 : 2);
        const uint8_t* numbers = block.planes[0] + head * size;
        return copy_exact(numbers, side.exact, part, part.tokens, head_dim, side.channel_major, tile);
    }
    switch (side.bits) {
        case 2: decode_codes<2>(side, block, head, head_dim, part, buffer, tile); break;
        case 3: decode_codes<3>(side, block, head, head_dim, part, buffer, tile); break;
        case 4: decode_codes<4>(side, block, head, head_dim, part, buffer, tile); break;
        case 5: decode_codes<5>(side, block, head, head_dim, part, buffer, tile); break;
        case 6: decode_codes<6>(side, block, head, head_dim, part, buffer, tile); break;
        case 7: decode_codes<7>(side, block, head, head_dim, part, buffer, tile); break;
        default: decode_codes<8>(side, block, head, head_dim, part, buffer, tile);
    }
    if (!block.outlier_offsets) return;
    const auto put = [&](auto half, auto bfloat) {
        (side.outlier == Number::half ? half : bfloat)(side, block, head, head_dim, part, tile);
    };
    if (side.numbers == 1) put(put_outliers<1, Number::half>, put_outliers<1, Number::bfloat>);
    if (side.numbers == 2) put(put_outliers<2, Number::half>, put_outliers<2, Number::bfloat>);
}

}  // namespace
}  // namespace narrowkv
