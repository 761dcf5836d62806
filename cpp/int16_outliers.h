// Scales and zeros of blocks, and what outliers add, sixteen at a time, for attention in words.

#pragma once

#include <algorithm>

#include "kernel.h"
#include "int16.h"

namespace narrowkv {
namespace {

// Ranges stored as halves, [tokens][channels] from `from` on, as float32: with a stride [channels][stride], else as they lie.
inline void read_halves(const uint16_t* scale, const uint16_t* zero, int64_t from, int tokens, int channels, int stride, float* scales,
                        float* zeros) {
    const auto read = [&](const uint16_t* halves, float* to) {
        const int all = tokens * channels;
        for (int i = 0; i < all && (!stride || channels == 1); i += 16) {
            const __mmask16 some = all - i >= 16 ? 0xffff : (1 << (all - i)) - 1;
            _mm512_mask_storeu_ps(to + i, some, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some, halves + from + i)));
        }
        for (int i = 0; i < all && stride && channels == 4; i += 16) {  // four tokens of four groups
            const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
            const __m512 found = _mm512_permutexvar_ps(order, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(halves + from + i))));
            _mm_storeu_ps(to + i / 4, _mm512_extractf32x4_ps(found, 0));
            _mm_storeu_ps(to + i / 4 + stride, _mm512_extractf32x4_ps(found, 1));
            _mm_storeu_ps(to + i / 4 + 2 * stride, _mm512_extractf32x4_ps(found, 2));
            _mm_storeu_ps(to + i / 4 + 3 * stride, _mm512_extractf32x4_ps(found, 3));
        }
        for (int i = 0; i < all && stride && channels > 1 && channels != 4; ++i) {
            to[i % channels * stride + i / channels] = single_from_half(halves[from + i]);
        }
    };
    read(scale, scales);
    if (zero) return read(zero, zeros);
    for (int channel = 0; channel < (stride ? channels : 1); ++channel) {
        std::memset(zeros + channel * stride, 0, sizeof(float) * (stride ? tokens : tokens * channels));
    }
}

// Where the scale and the zero of a token's channel lie, and the unit that scales are in.
struct Spread {
    const float *scale, *zero;
    float unit;
    int token_shift, token_step, channel_part, channel_step;  // channel_part: of 65536, what one channel is of a group

    // Scales of channels, each for 2 to the power of `shift` tokens: [groups of tokens][head_dim].
    static Spread of_channels(const float* scale, const float* zero, float unit, int shift, int head_dim) {
        return {scale, zero, unit, shift, shift == 6 ? 0 : head_dim, 65536, 1};
    }
    // Scales of tokens, each for this many channels: [groups of channels][stride].
    static Spread of_tokens(const float* scale, const float* zero, float unit, int channels, int groups, int stride) {
        return {scale, zero, unit, 0, 1, 65536 / channels + 1, groups == 1 ? 0 : stride};
    }

    __m512i at(__m512i token, __m512i channel) const {
        if (token_step == 0) return channel;
        if (channel_step == 0) return token;
        const __m512i row = _mm512_mullo_epi32(_mm512_srl_epi32(token, _mm_cvtsi32_si128(token_shift)), _mm512_set1_epi32(token_step));
        const __m512i group = _mm512_srli_epi32(_mm512_mullo_epi32(channel, _mm512_set1_epi32(channel_part)), 16);
        return _mm512_add_epi32(row, _mm512_mullo_epi32(group, _mm512_set1_epi32(channel_step)));
    }
    __m512 scale_at(__m512i at) const { return _mm512_i32gather_ps(at, scale, 4) * unit; }
    __m512 zero_at(__m512i at) const { return zero ? _mm512_i32gather_ps(at, zero, 4) : _mm512_setzero_ps(); }
};

// Tokens and codes of up to sixteen outliers.
struct OutlierIndices {
    __mmask16 some;
    __m512i token, code;

    OutlierIndices(const uint16_t* index, int count, int codes) : some(__mmask16((1 << count) - 1)) {
        const __m512i last = _mm512_set1_epi32(kBlock * codes - 1);  // what a forged index would have written lies inside the block
        const __m512i flat = _mm512_min_epu32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, index)), last);
        if ((codes & (codes - 1)) == 0) {
            token = _mm512_srl_epi32(flat, _mm_cvtsi32_si128(__builtin_ctz(codes)));
            code = _mm512_and_si512(flat, _mm512_set1_epi32(codes - 1));
            return;
        }
        const __m512 fraction = _mm512_cvtepi32_ps(flat) * (1.0f / float(codes)) + 0.5f / float(codes);  // safe of rounding
        token = _mm512_cvttps_epi32(fraction);
        code = _mm512_sub_epi32(flat, _mm512_mullo_epi32(token, _mm512_set1_epi32(codes)));
    }
};

// The exact elements of up to sixteen outliers from the i-th on.
inline __m512 exact_outliers(const PackedTensor& side, const Block& block, int i, int count) {
    const uint16_t* from = static_cast<const uint16_t*>(block.outlier_values) + i;
    const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(__mmask16((1 << count) - 1), from));
    if (side.outlier == DType::bfloat) return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
    return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(bits));
}

// Whether blocks store scales of channels.
inline bool by_channel(const PackedTensor& side) { return !side.fixed && side.range_tokens < kBlock; }

// Sixteen codes of a head: its rows are channels or tokens, and this many codes long.
inline __m512i codes_of(const PackedTensor& side, const Block& block, int head, __m512i row, __m512i column, int length) {
    const int64_t first = int64_t(head) * (side.channel_major ? side.codes : kBlock);
    __m512i found = _mm512_setzero_si512();
    for (int plane = 0, bit = 0; plane < 2 && kPlanes[side.bits][plane]; bit += kPlanes[side.bits][plane++]) {
        const int width = kPlanes[side.bits][plane], bytes = length * width / 8;  // a power of two, as are their halves
        const __m128i shift = _mm_cvtsi32_si128(__builtin_ctz(bytes));
        const __m512i byte = _mm512_add_epi32(_mm512_sll_epi32(row, shift), _mm512_and_si512(column, _mm512_set1_epi32(bytes - 1)));
        const __m512i four = _mm512_i32gather_epi32(_mm512_srli_epi32(byte, 2), block.planes[plane] + first * bytes, 4);
        const __m512i within = _mm512_slli_epi32(_mm512_and_si512(byte, _mm512_set1_epi32(3)), 3);
        const __m512i rotate = _mm512_add_epi32(within, _mm512_mullo_epi32(_mm512_srl_epi32(column, shift), _mm512_set1_epi32(width)));
        const __m512i part = _mm512_and_si512(_mm512_srlv_epi32(four, rotate), _mm512_set1_epi32((1 << width) - 1));
        found = _mm512_or_si512(found, _mm512_sll_epi32(part, _mm_cvtsi32_si128(bit)));
    }
    return found;
}

// Sixteen words of a table of an even number of them.
inline __m512 int16_at(const uint8_t* table, __m512i index) {
    const __m512i two = _mm512_i32gather_epi32(_mm512_srli_epi32(index, 1), table, 4);
    const __m512i odd = _mm512_slli_epi32(_mm512_and_si512(index, _mm512_set1_epi32(1)), 4);
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(_mm512_srlv_epi32(two, odd), 16), 16));
}

// Sixteen bytes, as elements without a sign, of a multiple of four of them.
inline __m512i bytes_at(const void* from, __m512i index) {
    const __m512i four = _mm512_i32gather_epi32(_mm512_srli_epi32(index, 2), from, 4);
    const __m512i shift = _mm512_slli_epi32(_mm512_and_si512(index, _mm512_set1_epi32(3)), 3);
    return _mm512_and_si512(_mm512_srlv_epi32(four, shift), _mm512_set1_epi32(255));
}

// The last byte of each of sixteen as a number with a sign.
inline __m512i signed_bytes(__m512i x) { return _mm512_srai_epi32(_mm512_slli_epi32(x, 24), 24); }

// Outliers of a head as what they add to sums of four queries: by how much they differ from what their codes stand for, times
// the four elements at `from`, to those at `to`.
struct Differences {
    int count = 0;
    Buffer<int32_t> from, to, lane;  // lane: which one rotates it, see `Int16Keys::take_rotated`
    Buffer<float> by;

    // take: is given the tokens, the channels and the differences of up to sixteen, and where they go. inverse: of scales of
    // channels, where differences are to be in words rather than in real units; or null.
    template <typename Take>
    void read(const PackedTensor& side, const Block& block, int head, const Spread& spread, const float* inverse, const Take& take) {
        const int first = block.outlier_offsets[head], all = block.outlier_offsets[head + 1] - first;
        reserve(size_t(all + 16));
        const uint8_t* table = side.int16 + (side.fixed ? int64_t(head) * side.codes * kLevels * 2 : 0);
        const __m512 shared = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i*)table)));
        const bool rows = side.channel_major;
        for (int i = 0; i < all; i += 16) {
            const int some = all - i < 16 ? all - i : 16;
            const OutlierIndices outliers(block.outlier_index + first + i, some, side.codes);
            const __m512i code = rows ? codes_of(side, block, head, outliers.code, outliers.token, kBlock)
                                      : codes_of(side, block, head, outliers.token, outliers.code, side.codes);
            const __m512i of_channel = _mm512_add_epi32(code, _mm512_mullo_epi32(outliers.code, _mm512_set1_epi32(kLevels)));
            const __m512 word = side.fixed ? int16_at(table, of_channel) : _mm512_permutexvar_ps(code, shared);
            const __m512 exact = exact_outliers(side, block, first + i, some);
            if (inverse) {
                take(outliers.token, outliers.code, exact * _mm512_i32gather_ps(outliers.code, inverse, 4) - word, i);
            } else {
                const __m512i range = spread.at(outliers.token, outliers.code);
                take(outliers.token, outliers.code, exact - spread.zero_at(range) - word * spread.scale_at(range), i);
            }
        }
        count = all;
    }

    // The same of trellis-coded streams, in grid steps. decoded: is given tokens and coefficients, and yields what their codes stand
    // for.
    template <typename Decoded, typename Take>
    void read_streams(const PackedTensor& side, const Block& block, int head, const Decoded& decoded, const Take& take) {
        const int first = block.outlier_offsets[head], coded = side.streams->coded();
        count = block.outlier_offsets[head + 1] - first;
        reserve(size_t(count + 16));
        for (int i = 0; i < count; i += 16) {
            const int some = std::min(count - i, 16);
            const OutlierIndices outliers(block.outlier_index + first + i, some, coded);
            const __m512 exact = exact_outliers(side, block, first + i, some) * _mm512_i32gather_ps(outliers.code, side.streams->finer, 4);
            take(outliers.token, outliers.code, exact - _mm512_cvtepi32_ps(decoded(outliers.token, outliers.code)), i);
        }
    }

    void reserve(size_t capacity) {
        if (by.size() < capacity) from.resize(capacity), to.resize(capacity), lane.resize(capacity), by.resize(capacity);
    }

    void put(int at, __m512i from, __m512i to, __m512 by) {
        _mm512_storeu_si512(&this->from[at], _mm512_slli_epi32(from, 2)), _mm512_storeu_si512(&this->to[at], _mm512_slli_epi32(to, 2));
        _mm512_storeu_ps(&this->by[at], by);
    }

    void add(const float* elements, float* sums) const {
        const int32_t *one = from.data(), *other = to.data();
        const float* difference = by.data();
        for (int64_t i = 0; i < count; ++i) {
            float* sum = sums + other[i];
            _mm_store_ps(sum, _mm_load_ps(sum) + _mm_load_ps(elements + one[i]) * difference[i]);
        }
    }

    // The same, of words times the lanes by which outliers rotate.
    void add(const int32_t* int16, const int32_t* lanes, float* sums) const {
        const int32_t *one = from.data(), *other = to.data(), *rotate = lane.data();
        const float* difference = by.data();
        for (int64_t i = 0; i < count; ++i) {
            float* sum = sums + other[i];
            const __m128i products = _mm_madd_epi16(_mm_load_si128((const __m128i*)(int16 + one[i])), _mm_set1_epi32(lanes[rotate[i]]));
            _mm_store_ps(sum, _mm_load_ps(sum) + _mm_cvtepi32_ps(products) * difference[i]);
        }
    }
};

}  // namespace
}  // namespace narrowkv
