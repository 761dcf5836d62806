// What decode attention over packed blocks is given. Plain data: the kernels of each instruction set share nothing else.

#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "sizes.h"

namespace narrowkv {

constexpr int kMostDim = 512;  // channels of a head: an index of an outlier in a block has 15 bits
constexpr int kRopeTokens = 32;  // tokens of a tile of keys: with their angles it has space in the nearest cache

enum class DType : int { half, bfloat, single };  // how exact elements are stored

// What all trellis-coded streams of one side have in common. Of keys, a query as coefficients see it has head_dim elements, half
// of them for the first elements of pairs of channels and half for the second ones; pairs that rotate come first.
// `query_rotations` makes such a query of the model's: where the angle of keys is 0, and a quarter of a cycle further.
struct Streams {
    std::array<int, kMostRate> counts;  // units of each rate from 1 on
    int bytes;                          // of a token and head, with that of its norm, if it has one
    bool norms;
    const int8_t* high;    // [rates from 1 on, 16]
    const int8_t* low;     // the same
    const float* finer;    // [coded], grid steps of a unit of each coefficient
    const int32_t* query_index;  // of keys, [kv_heads, head_dim]: of the element of a query that meets each coefficient, those without codes last
    const int32_t* channels;  // of keys, [head_dim]: which channel of the model's query each element is
    const float* query_rotations;    // of keys, [kv_heads, 2, 2, 2, head_dim / 2]: angle, number of a pair as coefficients see it, of the model's pair
    const float* offsets;  // of keys, [kv_heads, head_dim, 16]: what the mean adds to each coefficient, by token of a frame, in grid steps
    bool uses_int16;
    const int32_t* int16_scales;     // of keys in words, [kv_heads, head_dim]: words of a grid step of each coefficient; one byte where it has a code
    const int32_t* int16_maxima;       // of keys in words, [kv_heads, head_dim]: the largest word of each coefficient
    const int16_t* int16_offsets;  // of keys in words, [kv_heads, head_dim / 2, 16, 2]: the offsets

    int coded() const {
        int units = 0;
        for (int count : counts) units += count;
        return kUnit * units;
    }
};

// The keys, or the values, of all blocks: what they have in common.
struct PackedTensor {
    int bits;            // of a code; 16 where elements are exact
    int codes;           // of a head
    int stride;          // floats from one codebook to the next, at least 16
    bool channel_major;  // rows of codes are channels, else tokens
    bool fixed;          // codebooks are those of channels, in real units: [kv_heads, codes, stride]; else one for all
    int range_heads;     // scales and zeros: [1 or kv_heads, range_tokens, range_channels]
    int range_tokens;
    int range_channels;
    DType exact;    // of exact elements
    DType outlier;  // of outliers
    const float* table;
    const uint8_t* int16;  // codebooks of words, as attention/cpu/int16.py lays them out; or null
    const float* unit;     // of words, [kv_heads, head_dim] or [1]
    int most;              // largest word that an outlier becomes
    const float* scale;    // [kv_heads, head_dim], ranges learned offline of rows that are tokens; null where blocks hold them
    const float* zero;
    const Streams* streams;  // instead of codes; or null
};

// Where one block of one side lies. Index and offsets are of outliers, the offsets those of its first head.
struct Block {
    const uint8_t* planes[3];
    const uint16_t* scale;
    const uint16_t* zero;
    const void* outlier_values;
    const uint16_t* outlier_index;
    const int32_t* outlier_offsets;
};

// Tokens that do not fill a block yet: codes a byte each, or exact elements, [batch, kv_heads, 64, codes], and ranges as in a
// block. Outliers of all heads stand in order of arrival, by their index among the codes.
struct Tail {
    const void* codes;
    const uint16_t* scale;
    const uint16_t* zero;
    const void* outlier_values;
    const int64_t* outlier_index;
    int64_t outliers;
};

// Keys stored before the rotary embedding. Either angles are given for each token, or positions, and cosines and sines of
// them: far [positions / 64, 2, pairs] of multiples of 64, steps [64, 2, pairs] of 0 to 63, near [pairs, 2, 32] of 0 to 31.
struct Rotation {
    int pairs;  // that rotate; 0 where keys are stored rotated
    bool interleaved;
    float scaling;
    const int32_t* positions;  // [batch, ...] with this stride
    int64_t position_stride;
    int32_t last;  // position that the tables reach
    const float* far;
    const float* near;
    const float* steps;
    const int16_t* int16;  // [pairs, 2, 64] of 0 to 63, times 32767; of 32 the even ones first
    const int32_t* lanes;  // [2, pairs, 64] of 0 to 63: two words, what the first number of a pair becomes, or the second; then not rotated
    const float* angles;   // [batch, stored, 2, pairs]
};

// Exact tokens: elements [batch, kv_heads, tokens, head_dim] of keys, and of values, where they lie.
struct ExactTokens {
    struct Side {
        const void* elements;
        DType kind;
        int64_t strides[3];  // in elements, of batch, kv_heads and tokens; the channels of each lie side by side
    };
    Side sides[2];
    int tokens;
    bool rotates;  // whether keys are yet to be rotated
};

struct Problem {
    int batch, kv_heads, group, queries, head_dim;  // group: query heads of a KV head
    int blocks;                                     // of each sequence
    int64_t tokens;                                 // in blocks, as far as they are to be seen
    int tail;                                       // tokens that follow them
    int exact;                                      // exact tokens: sinks, then those that follow the tail
    int sinks;                                      // tokens of each sequence that are not to be read from blocks
    int64_t stored;                                 // tokens that are not new ones, which positions or angles are given for
    int hidden_batch;                               // rows of `hidden`: 1 or batch
    int chunk;                                      // blocks that make one split of work
    float scaling, softcap;  // softcap 0: none
    PackedTensor keys, values;
    Rotation rotation;
    const Block* table;          // [blocks, batch, 2]
    const int64_t* starts;       // [blocks + 1] index of the first token of each block
    const float* packed_query;   // [batch, query_heads, queries, head_dim]
    const float* exact_query;    // the same, for exact tokens
    ExactTokens exact_parts[3];  // sinks, the window, new ones
    Tail tails[2];               // of keys, and of values
    const Block* tail_table;     // [batch, 2], the tail packed as a block; whoever attends makes it
    const uint8_t* hidden;       // [hidden_batch, queries, tokens + tail + exact], or null
    const int64_t* sink_index;   // [batch, sinks] among the tokens stored; other sinks than those of blocks and tail are not seen
    const float* sink_logits;    // [query_heads], or null
    const float* key_offsets;    // [batch, query_heads, queries, tokens + tail] added to scores; or null
    const float* value_bias;     // [kv_heads, head_dim] added to each value of blocks and of the tail; or null
    const float* value_matrix;   // [kv_heads, value_rows, head_dim rounded up to 16] by which sums over codes are multiplied; or null
    const float* value_mean;     // [kv_heads, head_dim] that is then added by the sum of their weights; or null
    int value_rows;
    float* output;               // [batch, query_heads, queries, head_dim]
};

// Those of one call, attended to in one parallel region: sequences of different lengths, say.
using Problems = std::vector<const Problem*>;

using AttendProblems = void(const Problems& problems, int threads);

AttendProblems attend_generic, attend_avx2, attend_avx512, attend_int16, attend_avx2_int16;

}  // namespace narrowkv
