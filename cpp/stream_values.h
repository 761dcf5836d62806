// Sums of values in trellis-coded streams. Compiled once for each instruction set: included after `simd`.
//
// A token's weight is multiplied by its norm, and its coefficients are added up in grid steps.

#pragma once

#include "streams.h"
#include "tile.h"

namespace narrowkv {
namespace {

// Add coefficients [coded][64], weighted, to the sums of some queries, [queries][head_dim][width]: lanes are added up at the
// end.
template <int queries>
inline void mix_streams(const float* weights, const int8_t* tile, int coded, int head_dim, float* sums) {
    constexpr int ways = 2, wide = kBlock / simd::width;
    Floats weight[queries][wide];
    for (int q = 0; q < queries; ++q) {
        for (int i = 0; i < wide; ++i) weight[q][i] = load(weights + q * kBlock + i * simd::width);
    }
    for (int d = 0; d < coded; d += ways) {
        Floats sum[ways][queries];
        for (int way = 0; way < ways; ++way) {
            for (int q = 0; q < queries; ++q) sum[way][q] = load(sums + (int64_t(q) * head_dim + d + way) * simd::width);
        }
        for (int i = 0; i < wide; ++i) {
            for (int way = 0; way < ways; ++way) {
                const Floats value = simd::to_floats(tile + (d + way) * kBlock + i * simd::width);
                for (int q = 0; q < queries; ++q) sum[way][q] += weight[q][i] * value;
            }
        }
        for (int way = 0; way < ways; ++way) {
            for (int q = 0; q < queries; ++q) store(sums + (int64_t(q) * head_dim + d + way) * simd::width, sum[way][q]);
        }
    }
}

class StreamValues {
  public:
    explicit StreamValues(const Problem& problem)
        : problem(problem), rows(problem.group * problem.queries), dim(problem.head_dim) {
        if (!problem.values.streams) return;
        tile.resize(size_t(dim) * kBlock);
    }

    // Add a block to sums [rows][head_dim][width]. weights: [rows][64], which are multiplied by norms.
    void take_block(const Block& block, const Block& next, int head, float* weights, float* sums) {
        const Streams& streams = *problem.values.streams;
        const int64_t at = int64_t(head) * streams.bytes * kBlock;
        decode_streams(streams, block.planes[0] + at, next.planes[0] + at, tile.data());
        misses.of_block(problem.values, block, head, InTile{tile.data()});
        scale_weights(block.planes[0] + at + (streams.bytes - 1) * kBlock, weights);
        add(weights, sums);
    }

  private:
    const Problem& problem;
    const int rows, dim;
    Buffer<int8_t> tile;  // [coded][64]
    Misses misses;

    void scale_weights(const uint8_t* codes, float* weights) const {
        if (!problem.values.streams->norms) return;
        float factors[kBlock];
        for (int token = 0; token < kBlock; ++token) factors[token] = norms()[codes[token]];
        for (int row = 0; row < rows; ++row) {
            for (int token = 0; token < kBlock; ++token) weights[row * kBlock + token] *= factors[token];
        }
    }

    void add(const float* weights, float* sums) const {
        const int coded = problem.values.streams->coded();
        by_many<kAtOnce>(rows, [&](int row, auto queries) {
            mix_streams<queries>(weights + row * kBlock, tile.data(), coded, dim, sums + int64_t(row) * dim * simd::width);
        });
        for (const Miss& miss : misses) {
            for (int row = 0; row < rows; ++row) {
                sums[(int64_t(row) * dim + miss.coefficient) * simd::width] += weights[row * kBlock + miss.token] * miss.by;
            }
        }
    }
};

}  // namespace
}  // namespace narrowkv
