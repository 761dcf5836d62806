// The tail: tokens whose codes are not packed yet, decoded for one head. Compiled once for each instruction set: included
// after `simd`, whose look-ups it uses.

#pragma once

#include "decode.h"

namespace narrowkv {
namespace {

// A token's codes looked up in codebooks that are `step` apart, or in one; a register at a time, then one by one. Bits of a
// byte beyond those of a code are not looked at.
inline void look_up_tail(const uint8_t* codes, int count, int bits, const float* table, int step, float* elements) {
    const int mask = (1 << bits) - 1;
    simd::Ints apart;
    for (int lane = 0; lane < simd::width; ++lane) apart[lane] = lane * step;
    int code = 0;
    for (; code + simd::width <= count; code += simd::width) {
        simd::store(elements + code, simd::gather(table + code * step, (simd::widen(codes + code) & mask) + apart));
    }
    for (; code < count; ++code) elements[code] = table[code * step + (codes[code] & mask)];
}

// Decode the first `count` tokens of a head into [count][head_dim]. batch_head: row * kv_heads + head.
inline void read_tail(const PackedTensor& side, const Tail& tail, int64_t batch_head, int head, int kv_heads, int count, int head_dim, float* elements) {
    const int64_t first = batch_head * kBlock * side.codes;
    if (side.bits == 16) {
        for (int i = 0; i < count * head_dim; ++i) elements[i] = load_exact(tail.codes, first + i, side.exact);
        return;
    }
    const uint8_t* codes = static_cast<const uint8_t*>(tail.codes) + first;
    const int step = side.fixed ? side.stride : 0;
    const float* table = side.table + int64_t(head) * side.codes * step;
    const int64_t heads = side.range_heads, row = batch_head / kv_heads;
    for (int token = 0; token < count; ++token, codes += side.codes) {
        float* to = elements + token * head_dim;
        look_up_tail(codes, side.codes, side.bits, table, step, to);
        if (side.fixed) continue;
        const int64_t of_head = side.scale ? head : row * heads + (heads > 1 ? head : 0);
        const int64_t at = (of_head * side.range_tokens + token * side.range_tokens / kBlock) * side.range_channels;
        const int together = head_dim / side.range_channels;
        for (int channel = 0; channel < head_dim; ++channel) {
            const int64_t i = at + channel / together;
            const float scale = side.scale ? side.scale[i] : to_single(tail.scale[i], DType::half);
            const float zero = side.scale ? side.zero[i] : tail.zero ? to_single(tail.zero[i], DType::half) : 0.0f;
            to[channel] = to[channel] * scale + zero;
        }
    }
    const uint16_t* values = static_cast<const uint16_t*>(tail.outlier_values);
    for (int64_t i = 0; i < tail.outliers; ++i) {
        const int64_t at = tail.outlier_index[i] - first;
        if (at < 0 || at >= int64_t(count) * side.codes) continue;
        elements[at / side.codes * head_dim + at % side.codes] = to_single(values[i], side.outlier);
    }
}

}  // namespace
}  // namespace narrowkv
