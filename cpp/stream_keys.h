// Scores of keys in trellis-coded streams. Compiled once for each instruction set: included after `simd`.
//
// Keys of a frame of 16 tokens are rotated to its middle already, so that where positions follow each other one query, rotated
// to the middle, meets all of them. Coefficients are multiplied in grid steps, and what the mean of keys adds to each is added
// to it there.

#pragma once

#include "rotation.h"
#include "streams.h"
#include "tile.h"

namespace narrowkv {
namespace {

constexpr int kFrames = kBlock / kFrame;

// Scores [queries][16] of some queries, `stride` apart, and a frame's coefficients, [coded][64], and offsets, [head_dim][16].
template <int queries>
inline void score_frame(const float* query, int stride, const int32_t* query_index, const int8_t* tile, const float* offsets, int coded,
                        int head_dim, float* scores) {
    constexpr int wide = kFrame / simd::width, ways = queries * wide < 8 ? 8 / (queries * wide) : 1;
    Floats sum[ways][queries][wide] = {};
    int i = 0;
    for (; i < coded; i += ways) {
        for (int way = 0; way < ways; ++way) {
            const float* elements = query + query_index[i + way];
            for (int w = 0; w < wide; ++w) {
                const Floats element = simd::to_floats(tile + (i + way) * kBlock + w * simd::width) + load(offsets + (i + way) * kFrame + w * simd::width);
                for (int q = 0; q < queries; ++q) sum[way][q][w] += all(elements[q * stride]) * element;
            }
        }
    }
    for (; i < head_dim; ++i) {
        for (int w = 0; w < wide; ++w) {
            for (int q = 0; q < queries; ++q) sum[0][q][w] += all(query[q * stride + query_index[i]]) * load(offsets + i * kFrame + w * simd::width);
        }
    }
    for (int q = 0; q < queries; ++q) {
        for (int w = 0; w < wide; ++w) {
            for (int way = 1; way < ways; ++way) sum[0][q][w] += sum[way][q][w];
            store(scores + q * kFrame + w * simd::width, sum[0][q][w]);
        }
    }
}

class StreamKeys {
  public:
    explicit StreamKeys(const Problem& problem)
        : problem(problem), rows(problem.group * problem.queries), dim(problem.head_dim) {
        if (!problem.keys.streams) return;
        const size_t size = size_t(rows) * dim;
        unrotated.resize(size), crossed.resize(size), rotated.resize(size);
        cos.resize(dim / 2, 1.0f), sin.resize(dim / 2, 0.0f);
        found.resize(size_t(rows) * kFrame);
        tile.resize(size_t(dim) * kBlock);
    }

    // Queries of a head.
    void begin(int of_row, int of_head) {
        row = of_row, head = of_head;
        const Streams& streams = *problem.keys.streams;
        const int half = dim / 2;
        const float* __restrict query_rotations = streams.query_rotations + int64_t(head) * 8 * half;
        const float* query = problem.packed_query + (int64_t(row) * problem.kv_heads + head) * rows * dim;
        float *__restrict x = rotated.data(), *__restrict y = x + half;
        for (int i = 0; i < rows; ++i, query += dim) {
            for (int i = 0; i < dim; ++i) x[i] = query[streams.channels[i]] * problem.scaling;
            float *__restrict still = &unrotated[i * dim], *__restrict further = &crossed[i * dim];
            for (int element = 0; element < 2; ++element) {
                const float* __restrict rotate = query_rotations + 2 * element * half;
                for (int pair = 0; pair < half; ++pair) still[element * half + pair] = rotate[pair] * x[pair] + rotate[half + pair] * y[pair];
                rotate += 4 * half;
                for (int pair = 0; pair < half; ++pair) further[element * half + pair] = rotate[pair] * x[pair] + rotate[half + pair] * y[pair];
            }
        }
    }

    // Scores [rows][64] of a block, whose tokens begin at `start`.
    void take_block(const Block& block, const Block& next, int64_t start, int count, float* scores) {
        const Streams& streams = *problem.keys.streams;
        const int64_t at = int64_t(head) * streams.bytes * kBlock;
        decode_streams(streams, block.planes[0] + at, next.planes[0] + at, tile.data());
        misses.of_block(problem.keys, block, head, InTile{tile.data()});
        score(start, count, scores);
    }

  protected:
    const Problem& problem;
    const int rows, dim;
    int row = 0, head = 0;
    Buffer<float> unrotated, crossed, rotated;  // [rows][head_dim]: where angles are 0, a quarter of a cycle further, and as a frame needs it
    Buffer<float> cos, sin;                // [head_dim / 2] of a frame; pairs that do not rotate have an angle of 0
    Buffer<float> found;                   // [rows][16] scores of a frame
    Buffer<int8_t> tile;                   // [coded][64]
    Misses misses;

    // Scores [rows][stride] of a block whose frames have no positions of their own, in float32.
    void take_apart(const Block& block, int64_t start, int count, float* scores, int stride) {
        Buffer<float> found(rows * kBlock);
        take_block(block, block, start, count, found.data());
        for (int q = 0; q < rows; ++q) std::copy_n(&found[q * kBlock], kBlock, scores + q * stride);
    }

    // The position that all tokens of each frame of a block are rotated to; false where those of one have none in common.
    bool find_positions(int64_t start, int count, int32_t* found) const {
        const Rotation& rotation = problem.rotation;
        if (!rotation.pairs) return true;
        const int32_t* positions = rotation.positions + row * rotation.position_stride + start;
        bool shared = true;
        for (int frame = 0; frame < kFrames; ++frame) {
            const int first = frame * kFrame, left = count - first;
            found[frame] = positions[left > 0 ? first : 0] + kFrame;
            for (int i = 0; i < std::min(left, kFrame); ++i) shared &= positions[first + i] - positions[first] == i;
        }
        return shared;
    }

  private:
    void score(int64_t start, int count, float* scores) {
        const Miss* missed = misses.begin();
        for (int from = 0; from < count; from += kFrame) {
            const int stop = count < from + kFrame ? count : from + kFrame;
            for (int first = from; first < stop;) {
                const int end = together(start, first, stop);
                const float* query = rotate(start + first, kFrame - first % kFrame);
                score_some(query, from, first, end, missed, scores);
                first = end;
            }
            while (missed < misses.end() && missed->token < stop) ++missed;
        }
    }

    // Where the tokens end that, from the first one on, share an angle with it.
    int together(int64_t start, int first, int stop) const {
        const Rotation& rotation = problem.rotation;
        if (!rotation.pairs) return stop;
        if (rotation.angles) return first + 1;
        const int32_t* positions = rotation.positions + row * rotation.position_stride + start;
        int end = first + 1;
        while (end < stop && positions[end] - positions[first] == end - first) ++end;
        return end;
    }

    // Queries as coefficients of a token see them, which are rotated `further` than it stands.
    const float* rotate(int64_t token, int further) {
        const int half = dim / 2;
        if (!problem.rotation.pairs) return unrotated.data();
        stored_angles(problem, row, token, further, cos.data(), sin.data());
        const float *c = cos.data(), *s = sin.data(), *x = unrotated.data(), *y = crossed.data();
        float* __restrict to = rotated.data();
        for (int i = 0; i < 2 * rows; ++i, x += half, y += half, to += half) {
            for (int pair = 0; pair < half; ++pair) to[pair] = c[pair] * x[pair] + s[pair] * y[pair];
        }
        return rotated.data();
    }

    // Scores of tokens [first, end) of the frame from `from` on. missed: outliers from the frame's first one on.
    void score_some(const float* query, int from, int first, int end, const Miss* missed, float* scores) {
        const Streams& streams = *problem.keys.streams;
        const int32_t* query_index = streams.query_index + int64_t(head) * dim;
        by_many<kAtOnce>(rows, [&](int i, auto queries) {
            score_frame<queries>(query + i * dim, dim, query_index, tile.data() + from, streams.offsets + int64_t(head) * dim * kFrame,
                                 streams.coded(), dim, found.data() + i * kFrame);
        });
        for (int i = 0; i < rows; ++i) {
            for (int token = first; token < end; ++token) scores[i * kBlock + token] = found[i * kFrame + token - from];
        }
        for (; missed < misses.end() && missed->token < end; ++missed) {
            if (missed->token < first) continue;
            for (int i = 0; i < rows; ++i) scores[i * kBlock + missed->token] += query[i * dim + query_index[missed->coefficient]] * missed->by;
        }
    }
};

}  // namespace
}  // namespace narrowkv
