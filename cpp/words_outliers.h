// Scales and zeros of blocks, and outliers, sixteen at a time, for attention in words.

#pragma once

#include <immintrin.h>

#include <vector>

#include "ranges.h"

namespace narrowkv {
namespace {

// Ranges held as halves, [tokens][channels] from `from` on, as float32: with a stride [channels][stride], else as they lie.
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
        return {scale, zero, unit, shift, head_dim, 65536, 1};
    }
    // Scales of tokens, each for so many channels: [groups of channels][stride].
    static Spread of_tokens(const float* scale, const float* zero, float unit, int channels, int stride) {
        return {scale, zero, unit, 0, 1, 65536 / channels + 1, stride};
    }

    __m512i at(__m512i token, __m512i channel) const {
        const __m512i row = _mm512_mullo_epi32(_mm512_srl_epi32(token, _mm_cvtsi32_si128(token_shift)), _mm512_set1_epi32(token_step));
        const __m512i group = _mm512_srli_epi32(_mm512_mullo_epi32(channel, _mm512_set1_epi32(channel_part)), 16);
        return _mm512_add_epi32(row, _mm512_mullo_epi32(group, _mm512_set1_epi32(channel_step)));
    }
    __m512 scale_at(__m512i at) const { return _mm512_i32gather_ps(at, scale, 4) * unit; }
    __m512 zero_at(__m512i at) const { return zero ? _mm512_i32gather_ps(at, zero, 4) : _mm512_setzero_ps(); }
};

// Tokens and codes of up to sixteen outliers.
struct Places {
    __mmask16 some;
    __m512i token, code;

    Places(const uint16_t* index, int count, int codes) : some(__mmask16((1 << count) - 1)) {
        const __m512i flat = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, index));
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

// The exact numbers of up to sixteen outliers from the i-th on; of pairs, the first or the second ones.
inline __m512 exact_outliers(const Side& side, const Block& block, int i, int count, int number) {
    const uint16_t* from = static_cast<const uint16_t*>(block.outlier_values) + int64_t(i) * side.numbers;
    const __mmask16 some = __mmask16((1 << count) - 1);
    __m512i bits = side.numbers == 1 ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, from)) : _mm512_maskz_loadu_epi32(some, from);
    if (number == 1) bits = _mm512_srli_epi32(bits, 16);
    if (side.outlier == Number::bfloat) return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
    return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(bits));
}

// Whether blocks hold scales of channels.
inline bool by_channel(const Side& side) { return !side.fixed && side.range_tokens < kBlock; }

// What of an outlier does not fit a word, in real units.
struct Spill {
    int token, channel;
    float rest;
};

// The outliers of a head as words: of each, the word in the low half of a lane, where in a tile it goes in the high half. What does
// not fit goes aside, its tokens counted from `at`. place: where in the tile the number of a token and a channel lies.
template <typename Place>
void read_outliers(const Side& side, const Block& block, int head, int at, const Spread& spread, std::vector<uint32_t>& lanes,
                   std::vector<Spill>& spilt, const Place& place) {
    const int first = block.outlier_offsets[head], count = block.outlier_offsets[head + 1] - first;
    lanes.resize(round_up(count * side.numbers, 16) + 16);
    uint32_t* to = lanes.data();
    const __m512 most = _mm512_set1_ps(float(side.most));
    for (int i = 0; i < count; i += 16) {
        const int some = count - i < 16 ? count - i : 16;
        const Places places(block.outlier_index + first + i, some, side.codes);
        for (int number = 0; number < side.numbers; ++number, to += some) {
            const __m512i channel = _mm512_maskz_add_epi32(places.some, places.code, _mm512_set1_epi32(number * side.codes));
            const __m512i range = spread.at(places.token, channel);
            const __m512 exact = exact_outliers(side, block, first + i, some, number) - spread.zero_at(range);
            const __m512 scale = spread.scale_at(range), word = exact * _mm512_rcp14_ps(scale);
            const __mmask16 ordered = _mm512_cmp_ps_mask(word, word, _CMP_ORD_Q);  // not 0 / 0: the scale of equal numbers
            const __m512 kept = _mm512_maskz_max_ps(ordered, _mm512_min_ps(word, most), -most);
            const __m512i high = _mm512_slli_epi32(place(places.token, channel), 16);
            _mm512_storeu_si512(to, _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_cvtps_epi32(kept), high));
            const __mmask16 fits = _mm512_cmp_ps_mask(_mm512_abs_ps(word), most, _CMP_LE_OQ);
            if (__builtin_expect((~fits & places.some) == 0, 1)) continue;
            alignas(64) int32_t tokens[16], channels[16];
            alignas(64) float rests[16];
            _mm512_store_si512(tokens, places.token), _mm512_store_si512(channels, channel), _mm512_store_ps(rests, exact - kept * scale);
            for (uint32_t left = ~fits & places.some; left; left &= left - 1) {
                const int k = __builtin_ctz(left);
                spilt.push_back({at + tokens[k], channels[k], rests[k]});
            }
        }
    }
    lanes.resize(to - lanes.data());
}

inline void put_outliers(const std::vector<uint32_t>& lanes, int16_t* tile) {
    for (uint32_t lane : lanes) tile[lane >> 16] = int16_t(lane);
}

}  // namespace
}  // namespace narrowkv
