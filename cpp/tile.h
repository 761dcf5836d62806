// Arithmetic on one dequantized tile: rotate, score, weigh, mix. Compiled once for each instruction set: included after
// `simd`.

#pragma once

#include <cmath>

#include "attention.h"

namespace narrowkv {
namespace {

using simd::Floats;
using simd::Ints;
using simd::load;
using simd::store;

inline Floats all(float x) { return x - Floats{}; }

// Vectors of tokens or channels in registers at once, besides those of four queries.
constexpr int kWide = simd::width == 16 ? 4 : 2;

// Rotate pairs of channels of a channel-major tile by the angles of its tokens, [pairs][2][32] cosines and sines.
inline void rotate(float* tile, const float* angles, int pairs, bool interleaved) {
    for (int pair = 0; pair < pairs; ++pair) {
        float* first = tile + (interleaved ? 2 * pair : pair) * kRopeTokens;
        float* second = tile + (interleaved ? 2 * pair + 1 : pair + pairs) * kRopeTokens;
        const float* cos = angles + pair * 2 * kRopeTokens;
        for (int i = 0; i < kRopeTokens; i += simd::width) {
            const Floats x = load(first + i), y = load(second + i), c = load(cos + i), s = load(cos + kRopeTokens + i);
            store(first + i, x * c - y * s);
            store(second + i, y * c + x * s);
        }
    }
}

// Scores of some queries, [queries][head_dim], against a channel-major tile of keys: [queries][64], half of which are filled.
template <int queries>
inline void score(const float* query, const float* tile, int head_dim, float* scores) {
    constexpr int wide = 2;  // vectors of tokens
    for (int token = 0; token < kRopeTokens; token += wide * simd::width) {
        Floats sum[queries][wide] = {};
        for (int d = 0; d < head_dim; ++d) {
            const float* keys = tile + d * kRopeTokens + token;
            for (int q = 0; q < queries; ++q) {
                const Floats x = all(query[q * head_dim + d]);
                for (int i = 0; i < wide; ++i) sum[q][i] += x * load(keys + i * simd::width);
            }
        }
        for (int q = 0; q < queries; ++q) {
            for (int i = 0; i < wide; ++i) store(scores + q * kBlock + token + i * simd::width, sum[q][i]);
        }
    }
}

// Add rows [tokens][stride], weighted, to the sums of some queries, [queries][stride]; apart: from the weights of one query to
// those of the next.
template <int queries, int wide>
inline int mix_tokens(const float* weights, int apart, const float* rows, int tokens, int stride, int from, float* sums) {
    int d = from;
    for (; d + wide * simd::width <= stride; d += wide * simd::width) {
        Floats sum[queries][wide];
        for (int q = 0; q < queries; ++q) {
            for (int i = 0; i < wide; ++i) sum[q][i] = load(sums + q * stride + d + i * simd::width);
        }
        for (int token = 0; token < tokens; ++token) {
            const float* values = rows + int64_t(token) * stride + d;
            for (int q = 0; q < queries; ++q) {
                const Floats weight = all(weights[q * apart + token]);
                for (int i = 0; i < wide; ++i) sum[q][i] += weight * load(values + i * simd::width);
            }
        }
        for (int q = 0; q < queries; ++q) {
            for (int i = 0; i < wide; ++i) store(sums + q * stride + d + i * simd::width, sum[q][i]);
        }
    }
    return d;
}

template <int queries>
inline void mix(const float* weights, int apart, const float* rows, int tokens, int stride, float* sums) {
    mix_tokens<queries, 1>(weights, apart, rows, tokens, stride, mix_tokens<queries, kWide>(weights, apart, rows, tokens, stride, 0, sums), sums);
}

// Run `part`, which is given how many queries at once as a type, over all rows: four at a time, then two, then one.
template <typename Part>
inline void by_fours(int rows, const Part& part) {
    int row = 0;
    for (; row + 4 <= rows; row += 4) part(row, std::integral_constant<int, 4>());
    for (; row + 2 <= rows; row += 2) part(row, std::integral_constant<int, 2>());
    if (row < rows) part(row, std::integral_constant<int, 1>());
}

// e to the power of x in float32, 0 below -87: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2] (Cephes).
inline Floats exponential(Floats exponent) {
    const Ints counts = exponent > -87.0f;
    const Floats x = counts ? exponent : all(-87.0f);
    const Floats shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the nearest integer lies in the last bits
    const Floats n = shifted - 12582912.0f;
    const Floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return Floats((Ints(p) + (Ints(shifted) << 23)) & counts);
}

// softcap * tanh(score / softcap) instead of every score.
inline void cap(float* scores, int count, float softcap) {
    for (int i = 0; i < count; ++i) scores[i] = softcap * std::tanh(scores[i] / softcap);
}

// Turn scores, a multiple of 16, into weights relative to the largest score so far, and add them to the total so far. Returns
// the factor by which all that was added up before fades.
inline float weigh(float* scores, int count, float& largest, float& total) {
    Floats most = load(scores);
    for (int i = simd::width; i < count; i += simd::width) {
        const Floats part = load(scores + i);
        most = part > most ? part : most;
    }
    float highest = largest;
    for (int lane = 0; lane < simd::width; ++lane) highest = most[lane] > highest ? most[lane] : highest;
    if (highest == -INFINITY) {
        for (int i = 0; i < count; ++i) scores[i] = 0.0f;
        return 1.0f;
    }
    Floats sum = {};
    for (int i = 0; i < count; i += simd::width) {
        const Floats weight = exponential(load(scores + i) - highest);
        sum += weight;
        store(scores + i, weight);
    }
    const float rescale = highest == largest ? 1.0f : std::exp(largest - highest);
    total *= rescale;
    for (int lane = 0; lane < simd::width; ++lane) total += sum[lane];
    largest = highest;
    return rescale;
}

}  // namespace
}  // namespace narrowkv
