// The tail, tokens that do not fill a block yet, packed as one: it is read as the others are, and once it is sealed, the same is
// found. Compiled once for each instruction set.

#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "attention.h"
#include "look_up.h"
#include "pack.h"

namespace narrowkv {
namespace {

// The keys, or the values, of all sequences. Codes of tokens that are not there yet are whatever they are, for no weight meets
// them; what could be NaN becomes 0.
class PackedTailSide {
  public:
    PackedTailSide(const Problem& problem, int which)
        : side((which ? problem.values : problem.keys)), tail(problem.tails[which]), tokens(problem.tail), heads(problem.batch * problem.kv_heads),
          kv_heads(problem.kv_heads), codes(side.streams ? side.streams->bytes : side.codes) {
        for (int plane = 0; plane < 2; ++plane) planes[plane].reset(new uint8_t[size_t(heads) * bytes(plane)]);
        const size_t ranges = tail.scale ? size_t(problem.batch) * side.range_heads * side.range_tokens * side.range_channels : 0;
        scale.reset(new uint16_t[ranges]), zero.reset(new uint16_t[ranges]);
        if (tail.outliers) sort_outliers();
    }

    // Of a sequence.
    Block block(int row) const {
        Block found{};
        for (int plane = 0; plane < 2; ++plane) found.planes[plane] = planes[plane].get() + int64_t(row) * kv_heads * bytes(plane);
        const int64_t ranges = int64_t(row) * side.range_heads * side.range_tokens * side.range_channels;
        if (tail.scale) found.scale = scale.get() + ranges;
        if (tail.scale && tail.zero) found.zero = zero.get() + ranges;
        if (tail.outliers) found.outlier_values = values.data(), found.outlier_index = index.data(), found.outlier_offsets = &offsets[size_t(row) * kv_heads];
        return found;
    }

    // Pack one head, [batch, kv_heads].
    void pack(int head) {
        if (tail.scale && (side.range_heads > 1 || head % kv_heads == 0)) {
            const int64_t at = side.range_heads > 1 ? head : head / kv_heads;
            copy_ranges(tail.scale, at, scale.get());
            if (tail.zero) copy_ranges(tail.zero, at, zero.get());
        }
        if (side.bits == 16) return copy_exact(head);
        const uint8_t* from = static_cast<const uint8_t*>(tail.codes) + int64_t(head) * kBlock * codes;
        const int bits = side.streams ? 8 : side.bits;
        for (int plane = 0, shift = 0; plane < 2 && kPlanes[bits][plane]; shift += kPlanes[bits][plane++]) {
            const bool rows = side.channel_major;
            const Packing packing{1, rows ? codes : kBlock, rows ? kBlock : codes, 0, rows ? 1 : codes, rows ? codes : 1, kPlanes[bits][plane], shift, nullptr, nullptr};
            pack_matrix(packing, from, planes[plane].get() + int64_t(head) * bytes(plane));
        }
    }

  private:
    const PackedTensor& side;
    const Tail& tail;
    const int tokens, heads, kv_heads, codes;
    std::unique_ptr<uint8_t[]> planes[2];     // [batch, kv_heads, bytes]
    std::unique_ptr<uint16_t[]> scale, zero;  // [batch, ...] as in a block
    std::vector<uint16_t> values, index;      // of outliers
    std::vector<int32_t> offsets;             // [batch * kv_heads + 1]

    // Of a plane of a head.
    int bytes(int plane) const {
        if (side.bits == 16) return plane ? 0 : kBlock * codes * (side.exact == DType::single ? 4 : 2);
        return kBlock * codes * kPlanes[side.streams ? 8 : side.bits][plane] / 8;
    }

    void copy_ranges(const uint16_t* from, int64_t at, uint16_t* to) const {
        const int size = side.range_tokens * side.range_channels;
        const int written = (tokens * side.range_tokens + kBlock - 1) / kBlock * side.range_channels;
        std::memcpy(to + at * size, from + at * size, written * sizeof(uint16_t));
        std::memset(to + at * size + written, 0, (size - written) * sizeof(uint16_t));
    }

    void copy_exact(int head) {
        const int64_t first = int64_t(head) * bytes(0);
        const int written = bytes(0) / kBlock * tokens;
        std::memcpy(planes[0].get() + first, static_cast<const uint8_t*>(tail.codes) + first, written);
        std::memset(planes[0].get() + first + written, 0, bytes(0) - written);
    }

    // Outliers, which lie in order of arrival, by head and index; those of no head are left out.
    void sort_outliers() {
        const int size = kBlock * (side.streams ? side.streams->coded() : side.codes);
        std::vector<uint32_t> found(tail.outliers);  // index and value
        offsets.assign(heads + 1, 0);
        const auto head_of = [&](int64_t i) { return size && tail.outlier_index[i] >= 0 && tail.outlier_index[i] / size < heads ? int(tail.outlier_index[i] / size) : heads; };
        for (int64_t i = 0; i < tail.outliers; ++i) ++offsets[head_of(i)];
        for (int head = 0, sum = 0; head <= heads; ++head) sum += std::exchange(offsets[head], sum);
        std::vector<int32_t> next(offsets);
        for (int64_t i = 0; i < tail.outliers; ++i) {
            const int head = head_of(i);
            const uint32_t within = head < heads ? uint32_t(tail.outlier_index[i] - int64_t(head) * size) : 0;
            found[next[head]++] = within << 16 | static_cast<const uint16_t*>(tail.outlier_values)[i];
        }
        values.resize(tail.outliers), index.resize(tail.outliers);
        for (int head = 0; head < heads; ++head) std::sort(found.begin() + offsets[head], found.begin() + offsets[head + 1]);
        for (int64_t i = 0; i < tail.outliers; ++i) index[i] = uint16_t(found[i] >> 16), values[i] = uint16_t(found[i]);
    }
};

// Both sides, each head packed by a thread.
class PackedTail {
  public:
    explicit PackedTail(const Problem& problem) {
        if (!problem.tail) return;
        for (int which = 0; which < 2; ++which) sides.emplace_back(problem, which);
        for (int row = 0; row < problem.batch; ++row) table.push_back(sides[0].block(row)), table.push_back(sides[1].block(row));
    }

    std::vector<Block> table;  // [batch, 2]

    void pack(int head) {
        for (PackedTailSide& side : sides) side.pack(head);
    }

  private:
    std::vector<PackedTailSide> sides;
};

}  // namespace
}  // namespace narrowkv
