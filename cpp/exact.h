// Exact tokens, read where they lie. Compiled once for each instruction set: included after `simd`.

#pragma once

#include "rotation.h"
#include "tile.h"

namespace narrowkv {
namespace {

inline void widen_exact(const void* elements, DType kind, int64_t at, int count, float* __restrict to) {
    if (kind == DType::single) {
        std::memcpy(to, static_cast<const float*>(elements) + at, sizeof(float) * count);
        return;
    }
    const uint16_t* from = static_cast<const uint16_t*>(elements) + at;
    int i = 0;
    for (; kind == DType::half && i + simd::width <= count; i += simd::width) store(to + i, simd::load_halves(from + i));
    for (; i < count; ++i) to[i] = to_single(from[i], kind);
}

// Rotate the channels of one key by cosines and sines [pairs].
inline void rotate_row(const float* cos, const float* sin, int pairs, bool interleaved, float* key) {
    const int apart = interleaved ? 1 : pairs, step = interleaved ? 2 : 1;
    float *__restrict first = key, *__restrict second = key + apart;
    for (int pair = 0; pair < pairs; ++pair) {
        const float x = first[pair * step], y = second[pair * step];
        first[pair * step] = x * cos[pair] - y * sin[pair];
        second[pair * step] = y * cos[pair] + x * sin[pair];
    }
}

// The number of an exact token among those stored; -1 of a sink that is not to be seen, what is beyond those of a new one.
inline int64_t stored_index(const Problem& problem, int row, int token) {
    const int64_t packed = problem.tokens + problem.tail;
    if (token >= problem.sinks) return packed + token - problem.sinks;
    const int64_t at = problem.sink_index[int64_t(row) * problem.sinks + token];
    return at >= 0 && at < packed ? at : -1;
}

// Elements of a head's exact tokens from the `first` on, [count][stride], keys (side 0) rotated; zeros beyond head_dim.
inline void read_exact(const Problem& problem, int row, int head, int side, int first, int count, int stride, float* to) {
    const int dim = problem.head_dim;
    int before = 0;
    for (const ExactTokens& part : problem.exact_parts) {
        const ExactTokens::Side& from = part.sides[side];
        for (int token = std::max(first, before); token < std::min(first + count, before + part.tokens); ++token) {
            float* element = to + int64_t(token - first) * stride;
            const int64_t at = row * from.strides[0] + head * from.strides[1] + (token - before) * from.strides[2];
            widen_exact(from.elements, from.kind, at, dim, element);
            for (int d = dim; d < stride; ++d) element[d] = 0.0f;
            const int64_t stored = stored_index(problem, row, token);
            if (side || !part.rotates || stored < 0) continue;
            float cos[kMostPairs], sin[kMostPairs];
            stored_angles(problem, row, stored, 0, cos, sin);
            rotate_row(cos, sin, problem.rotation.pairs, problem.rotation.interleaved, element);
        }
        before += part.tokens;
    }
}

// The sum of all lanes.
inline float add_up(Floats x) {
    float lanes[simd::width];
    store(lanes, x);
    for (int half = simd::width / 2; half; half /= 2) {
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    }
    return lanes[0];
}

// Scores [queries][64] of some queries [queries][stride] and keys [count][stride].
template <int queries>
inline void score_exact(const float* query, const float* keys, int count, int stride, float* scores) {
    for (int token = 0; token < count; ++token, keys += stride) {
        Floats sum[queries] = {};
        for (int d = 0; d < stride; d += simd::width) {
            const Floats key = load(keys + d);
            for (int q = 0; q < queries; ++q) sum[q] += load(query + q * stride + d) * key;
        }
        for (int q = 0; q < queries; ++q) scores[q * kBlock + token] = add_up(sum[q]);
    }
}

}  // namespace
}  // namespace narrowkv
