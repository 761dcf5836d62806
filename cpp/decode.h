// From packed bytes to a tile of elements in the nearest cache. Compiled once for each instruction set: included after `simd`.

#pragma once

#include <cstring>

#include "attention.h"
#include "look_up.h"
#include "ranges.h"

namespace narrowkv {
namespace {

inline int round_up(int n, int to) { return (n + to - 1) / to * to; }

// Which tokens of a block are decoded into a tile: half of them. Elements of a tile lie in rows as codes do: channel-major
// [head_dim][tokens], else [tokens][head_dim rounded up to 16].
struct Part {
    int from, tokens;
};

inline int tile_stride(bool channel_major, int head_dim, int tokens) {
    return channel_major ? tokens : round_up(head_dim, 16);
}

// What is decoded: one head of a block. tables: its codebooks, as look-ups read them, or the one of all. next: the block whose
// codes are prefetched on the way, a row with every row, since only a few lines of memory can be under way at once.
struct Source {
    const PackedTensor& side;
    const Block& block;
    const Block& next;
    const float* tables;
    int head, head_dim;
    int outlier;  // the first one that no part has had yet

    Source(const PackedTensor& side, const Block& block, const Block& next, const float* tables, int head, int head_dim)
        : side(side), block(block), next(next), tables(tables), head(head), head_dim(head_dim),
          outlier(block.outlier_offsets ? block.outlier_offsets[head] : 0) {}
};

// Rows of codes, each read where it lies. length: of a row; from, stop: which of its codes; own: whether a row has a codebook
// of its own, else ranges.
template <int bits, int length, int from, int stop, bool own>
void decode_rows(const Source& source, int64_t row, int count, int stride, const Ranges& given, float* tile) {
    const Ranges ranges = given;  // copies, which stay in registers: for all the compiler knows, the tile might overlap the rest
    const int step = own ? source.side.stride : 0;
    const float* table = source.tables;
    const uint8_t *planes[2], *later[2];
    for (int plane = 0; plane < 2; ++plane) {
        const int64_t at = row * (length * kPlanes[bits][plane] / 8);
        planes[plane] = source.block.planes[plane] + at;
        later[plane] = source.next.planes[plane] + at;
    }
    const float *scale = ranges.scale, *zero = ranges.zero;
    for (int i = 0, left = ranges.rows; i < count; ++i, --left, tile += stride, table += step) {
        if constexpr (own) {
            look_up<bits, length, from, stop>(planes, table, tile);
        } else {
            if (left == 0) left = ranges.rows, scale += ranges.count, zero += ranges.count;
            look_up<bits, length, from, stop>(planes, table, scale, zero, ranges.count, tile);
        }
        for (int plane = 0; plane < 2 && kPlanes[bits][plane]; ++plane) {
            if (from == 0) __builtin_prefetch(later[plane], 0, 2);
            planes[plane] += length * kPlanes[bits][plane] / 8;
            later[plane] += length * kPlanes[bits][plane] / 8;
        }
    }
}

// The same for rows of any length, through a buffer.
template <int bits>
void decode_any(const Source& source, int64_t row, int count, int stride, const Ranges& ranges, int codes, int from, float* tile) {
    const PackedTensor& side = source.side;
    alignas(64) uint8_t row_codes[kMostDim + kCodes] = {};
    for (int i = 0; i < count; ++i, ++row, tile += stride) {
        const uint8_t* planes[2];
        for (int plane = 0; plane < 2; ++plane) {
            planes[plane] = source.block.planes[plane] + row * (codes * kPlanes[bits][plane] / 8);
        }
        unpack_row(planes, bits, codes, row_codes);
        const float* table = source.tables + (side.fixed ? i * side.stride : 0);
        const float* scale = side.fixed ? nullptr : ranges.scale + i / ranges.rows * ranges.count;
        const float* zero = side.fixed ? nullptr : ranges.zero + i / ranges.rows * ranges.count;
        look_up<bits>(row_codes, from, stride, table, scale, zero, ranges, tile);
    }
}

template <int bits>
void decode_codes(const Source& source, Part part, float* buffer, float* tile) {
    const PackedTensor& side = source.side;
    const int head_dim = source.head_dim;
    const int together = side.channel_major ? kBlock / side.range_tokens : head_dim / side.range_channels;
    const bool direct = side.fixed || together == 1 || together % 16 == 0;
    const int rows = side.channel_major ? side.codes : kBlock, codes = side.channel_major ? kBlock : side.codes;
    const int count = side.channel_major ? rows : part.tokens, stride = tile_stride(side.channel_major, head_dim, part.tokens);
    const int64_t row = int64_t(source.head) * rows + (side.channel_major ? 0 : part.from);
    Ranges ranges = side.fixed ? Ranges{1, 0, 0, nullptr, nullptr} : read_ranges(side, source.block, source.head, head_dim, buffer);
    if (!side.channel_major) {  // those of the part's first row
        ranges.scale += part.from / ranges.rows * ranges.count;
        ranges.zero += part.from / ranges.rows * ranges.count;
    }
    const auto run = [&](auto own, auto ranged) { (side.fixed ? own : ranged)(source, row, count, stride, ranges, tile); };
    if (direct && side.channel_major) {
        if (part.from == 0) return run(decode_rows<bits, 64, 0, 32, true>, decode_rows<bits, 64, 0, 32, false>);
        run(decode_rows<bits, 64, 32, 64, true>, decode_rows<bits, 64, 32, 64, false>);
    } else if (direct && (codes == 64 || codes == 128)) {
        const auto read = codes == 64 ? decode_rows<bits, 64, 0, 64, false> : decode_rows<bits, 128, 0, 128, false>;
        read(source, row, count, stride, ranges, tile);
    } else {
        decode_any<bits>(source, row, count, stride, ranges, codes, side.channel_major ? part.from : 0, tile);
    }
}

// Prefetch the outliers of one head of a block that will be read next, once it is known where they lie.
inline void prefetch_outliers(const PackedTensor& side, const Block& block, int head) {
    if (!block.outlier_offsets) return;
    for (int i = block.outlier_offsets[head]; i < block.outlier_offsets[head + 1]; i += 16) {
        __builtin_prefetch(block.outlier_index + i, 0, 2);
        __builtin_prefetch(static_cast<const uint16_t*>(block.outlier_values) + i, 0, 2);
    }
}

// Prefetch what the next block stores besides codes, and where the outliers of the one after it lie.
inline void prefetch_metadata(const PackedTensor& side, const Block& next, const Block& after, int head) {
    const int count = side.range_tokens * side.range_channels, first = side.range_heads > 1 ? head * count : 0;
    for (int i = 0; next.scale && i < count; i += 32) {
        __builtin_prefetch(next.scale + first + i, 0, 2);
        if (next.zero) __builtin_prefetch(next.zero + first + i, 0, 2);
    }
    prefetch_outliers(side, next, head);
    if (after.outlier_offsets) __builtin_prefetch(after.outlier_offsets + head, 0, 2);
}

// Outliers of a part, from `outlier` on; they are sorted by token, and one that is not ends them: none is written beyond the
// tile.
template <DType kind>
void put_outliers(Source& source, Part part, float* tile) {
    const PackedTensor& side = source.side;
    const int stride = tile_stride(side.channel_major, source.head_dim, part.tokens), codes = side.codes;
    const int by_token = side.channel_major ? 1 : stride, by_channel = side.channel_major ? stride : 1;
    const uint64_t reciprocal = (uint64_t(1) << 32) / codes + 1;  // of 16 bits, a product and a shift divide exactly
    const uint16_t* index = source.block.outlier_index;
    const uint16_t* values = static_cast<const uint16_t*>(source.block.outlier_values);
    const int last = source.block.outlier_offsets[source.head + 1], first = part.from * codes;
    const unsigned size = unsigned(part.tokens * codes);
    int i = source.outlier;
    for (; i < last && unsigned(index[i] - first) < size; ++i) {
        const int token = index[i] * reciprocal >> 32, code = index[i] - token * codes;
        tile[(token - part.from) * by_token + code * by_channel] = to_single(values[i], kind);
    }
    source.outlier = i;
}

// Elements of tokens that are stored as they are, [tokens][head_dim], into a tile.
inline void copy_exact(const void* elements, DType kind, Part part, int count, int head_dim, bool channel_major, float* tile) {
    const int stride = tile_stride(channel_major, head_dim, part.tokens);
    for (int token = 0; token < count; ++token) {
        for (int channel = 0; channel < head_dim; ++channel) {
            const float exact = load_exact(elements, int64_t(part.from + token) * head_dim + channel, kind);
            tile[channel_major ? channel * stride + token : token * stride + channel] = exact;
        }
    }
}

// A part of a block, decoded into a tile; parts come in order.
inline void decode(Source& source, Part part, float* buffer, float* tile) {
    const PackedTensor& side = source.side;
    if (side.bits == 16) {
        const int64_t size = int64_t(kBlock) * source.head_dim * (side.exact == DType::single ? 4 : 2);
        const uint8_t* elements = source.block.planes[0] + source.head * size;
        return copy_exact(elements, side.exact, part, part.tokens, source.head_dim, side.channel_major, tile);
    }
    switch (side.bits) {
        case 2: decode_codes<2>(source, part, buffer, tile); break;
        case 3: decode_codes<3>(source, part, buffer, tile); break;
        case 4: decode_codes<4>(source, part, buffer, tile); break;
        default: decode_codes<8>(source, part, buffer, tile);
    }
    if (!source.block.outlier_offsets) return;
    (side.outlier == DType::half ? put_outliers<DType::half> : put_outliers<DType::bfloat>)(source, part, tile);
}

inline int codebooks(const PackedTensor& side) { return side.fixed ? side.codes : 1; }

// The codebooks of a head as look-ups read them, in `capacity` where that is not as they lie.
inline const float* tables_of(const PackedTensor& side, int head, float* capacity) {
    const float* tables = side.table + (side.fixed ? int64_t(head) * codebooks(side) * side.stride : 0);
    if (!simd::lays_out || side.bits > 4) return tables;
    for (int i = 0; i < codebooks(side); ++i) simd::lay_out(tables + i * side.stride, capacity + i * side.stride);
    return capacity;
}

}  // namespace
}  // namespace narrowkv
