// Sizes that encoding and attention share.

#pragma once

namespace narrowkv {

constexpr int kBlock = 64;               // tokens of a block
constexpr int kFrame = 16;               // tokens of a frame: codec/frames.py
constexpr int kMostRate = 6, kUnit = 8;  // of streams: bits of a coefficient, coefficients of one rate, in `rate` whole bytes
constexpr int kNorms = 256;              // codes of norms

}  // namespace narrowkv
