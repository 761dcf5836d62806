// The rotary embedding of keys that are stored without it. A block is turned relative to its first token, by angles that all
// blocks share; what the first token's position adds is taken back from the queries, once for a block.

#pragma once

#include <cstring>

#include "attention.h"

namespace narrowkv {
namespace {

// Turn queries [head_dim][rows] back by an angle for each pair, and stretch them.
template <typename Angle>
inline void turn_back(const Rotation& rotation, int rows, float* query, const Angle& angle) {
    for (int pair = 0; pair < rotation.pairs; ++pair) {
        float* first = query + (rotation.interleaved ? 2 * pair : pair) * rows;
        float* second = query + (rotation.interleaved ? 2 * pair + 1 : pair + rotation.pairs) * rows;
        float cos, sin;
        angle(pair, cos, sin);
        cos *= rotation.scaling, sin *= rotation.scaling;
        for (int row = 0; row < rows; ++row) {
            const float x = first[row], y = second[row];
            first[row] = x * cos + y * sin;
            second[row] = y * cos - x * sin;
        }
    }
}

inline void angle_at(const Rotation& rotation, int32_t position, int pair, float& cos, float& sin) {
    const float* far = rotation.far + (int64_t(position / kBlock) * rotation.pairs + pair) * 2;
    const float* near = rotation.near + pair * 2 * kBlock + position % kBlock;
    cos = far[0] * near[0] - far[1] * near[kBlock];
    sin = far[1] * near[0] + far[0] * near[kBlock];
}

// Angles of the `count` tokens from `start` on, [pairs][2][64], which a tile of keys is to be turned by; `query` is made to fit.
// `own` is room for angles that no other block shares.
inline const float* relative_angles(const Rotation& rotation, int row, int64_t tokens, int64_t start, int count, int rows,
                                    float* query, float* own) {
    const int pairs = rotation.pairs;
    const auto fill = [&](const auto& angle) {
        for (int pair = 0; pair < pairs; ++pair) {
            float* to = own + pair * 2 * kBlock;
            for (int token = 0; token < kBlock; ++token) {
                angle(token < count ? token : 0, pair, to[token], to[kBlock + token]);
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
        turn_back(rotation, rows, query,
                  [&](int pair, float& cos, float& sin) { angle_at(rotation, positions[0], pair, cos, sin); });
        return rotation.near;
    }
    turn_back(rotation, rows, query, [](int, float& cos, float& sin) { cos = 1.0f, sin = 0.0f; });
    return fill([&](int token, int pair, float& cos, float& sin) { angle_at(rotation, positions[token], pair, cos, sin); });
}

}  // namespace
}  // namespace narrowkv
