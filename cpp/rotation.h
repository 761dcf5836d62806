// The rotary embedding of keys that are stored without it. A tile is rotated relative to its first token, by angles that all
// tiles share; what the first token's position adds is taken back from the queries, once for a tile.

#pragma once

#include <cstring>

#include "attention.h"

namespace narrowkv {
namespace {

constexpr int kMostPairs = kMostDim / 2;

// A position that the tables reach: whoever makes them sees to that, but nothing beyond them is read.
inline int32_t within(const Rotation& rotation, int32_t position) {
    return position < 0 ? 0 : position < rotation.last ? position : rotation.last;
}

// Cosines and sines [pairs] of a position, scaled.
inline void angles_at(const Rotation& rotation, int32_t position, float* __restrict cos, float* __restrict sin) {
    const int pairs = rotation.pairs;
    position = within(rotation, position);
    const float* __restrict far = rotation.far + int64_t(position / kBlock) * 2 * pairs;
    const float* __restrict step = rotation.steps + position % kBlock * 2 * pairs;
    for (int pair = 0; pair < pairs; ++pair) {
        cos[pair] = rotation.scaling * (far[pair] * step[pair] - far[pairs + pair] * step[pairs + pair]);
        sin[pair] = rotation.scaling * (far[pairs + pair] * step[pair] + far[pair] * step[pairs + pair]);
    }
}

// Cosines and sines [pairs] of a stored token, or of a position so far behind it, less than 64.
inline void stored_angles(const Problem& problem, int row, int64_t token, int further, float* cos, float* sin) {
    const Rotation& rotation = problem.rotation;
    if (!rotation.angles) return angles_at(rotation, rotation.positions[row * rotation.position_stride + token] + further, cos, sin);
    const int pairs = rotation.pairs;
    const float* given = rotation.angles + (row * problem.stored + token) * 2 * pairs;
    std::memcpy(cos, given, sizeof(float) * pairs), std::memcpy(sin, given + pairs, sizeof(float) * pairs);
    if (!further) return;
    const float* step = rotation.steps + further * 2 * pairs;
    for (int pair = 0; pair < pairs; ++pair) {
        const float x = cos[pair], y = sin[pair];
        cos[pair] = x * step[pair] - y * step[pairs + pair], sin[pair] = y * step[pair] + x * step[pairs + pair];
    }
}

// Rotate queries [rows][head_dim] back by the angle of a position, and scale them.
inline void unrotate(const Rotation& rotation, int32_t position, int rows, int head_dim, float* query) {
    const int pairs = rotation.pairs;
    float cos[kMostPairs], sin[kMostPairs];
    angles_at(rotation, position, cos, sin);
    for (int row = 0; row < rows; ++row, query += head_dim) {
        if (rotation.interleaved) {
            for (int pair = 0; pair < pairs; ++pair) {
                const float x = query[2 * pair], y = query[2 * pair + 1];
                query[2 * pair] = x * cos[pair] + y * sin[pair];
                query[2 * pair + 1] = y * cos[pair] - x * sin[pair];
            }
            continue;
        }
        float* __restrict first = query;
        float* __restrict second = query + pairs;
        for (int pair = 0; pair < pairs; ++pair) {
            const float x = first[pair], y = second[pair];
            first[pair] = x * cos[pair] + y * sin[pair];
            second[pair] = y * cos[pair] - x * sin[pair];
        }
    }
}

inline void angle_at(const Rotation& rotation, int32_t position, int pair, float& cos, float& sin) {
    position = within(rotation, position);
    const float* far = rotation.far + int64_t(position / kBlock) * 2 * rotation.pairs + pair;
    const float* step = rotation.steps + position % kBlock * 2 * rotation.pairs + pair;
    cos = far[0] * step[0] - far[rotation.pairs] * step[rotation.pairs];
    sin = far[rotation.pairs] * step[0] + far[0] * step[rotation.pairs];
}

// Angles of the `count` tokens from `start` on, [pairs][2][32], which a tile of keys is to be rotated by; `query` is made to
// fit. `own` is space for angles that no other block shares.
inline const float* relative_angles(const Rotation& rotation, int row, int64_t tokens, int64_t start, int count, int rows,
                                    int head_dim, float* query, float* own) {
    const int pairs = rotation.pairs;
    const auto fill = [&](const auto& angle) {
        for (int pair = 0; pair < pairs; ++pair) {
            float* to = own + pair * 2 * kRopeTokens;
            for (int token = 0; token < kRopeTokens; ++token) {
                angle(token < count ? token : 0, pair, to[token], to[kRopeTokens + token]);
            }
        }
        return own;
    };
    if (rotation.angles) {
        const float* given = rotation.angles + (row * tokens + start) * 2 * pairs;
        return fill([&](int token, int pair, float& cos, float& sin) {
            cos = given[2 * token * pairs + pair];
            sin = given[(2 * token + 1) * pairs + pair];
        });
    }
    const int32_t* positions = rotation.positions + row * rotation.position_stride + start;
    bool consecutive = true;
    for (int token = 1; token < count; ++token) consecutive &= positions[token] == positions[0] + token;
    if (consecutive) {
        unrotate(rotation, positions[0], rows, head_dim, query);
        return rotation.near;
    }
    unrotate(rotation, 0, rows, head_dim, query);
    return fill([&](int token, int pair, float& cos, float& sin) { angle_at(rotation, positions[token], pair, cos, sin); });
}

}  // namespace
}  // namespace narrowkv
