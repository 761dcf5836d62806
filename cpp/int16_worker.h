// Decode attention over packed blocks in int16, added up in 32: for models that compute in 16 bits anyway.
//
// Codebooks hold words, in units of their own; queries and weights become words as large as sums in 32 bits allow. Blocks are
// taken four at a time: scores of all, one softmax, then the values. Elements are multiplied in the registers they are looked
// up in: memory that is written and read again costs more than the arithmetic. Outliers are added in float32, as what they
// differ by. Compiled once for each instruction set: included after `simd`.

#pragma once

#include "kernel.h"

namespace narrowkv {
namespace {

constexpr float kMostSum = 2.1e9f, kMaxInt16 = 32767.0f, kMaxRotated = 32700.0f;  // kMaxRotated: safe of rounding
constexpr int kMostSpan = 8 * kBlock;  // tokens whose weights share a unit, of any form of values

// Blocks of a span of a sequence; those of which nothing is seen are left out.
struct Span {
    const Block* sides[kMostSpan / kBlock];  // keys, then values; or null
    int length;

    // Where the streams of a head's values begin in each block; unchanged where nothing is seen.
    void find_values(const Streams& streams, int head, const uint8_t** codes) const {
        for (int i = 0; i < length / kBlock; ++i) {
            if (sides[i]) codes[i] = sides[i][1].planes[0] + int64_t(head) * streams.bytes * kBlock;
        }
    }
};

// Memory that will be read next, prefetched little by little: a burst would wait for the few lines that can be on their way.
class Prefetcher {
  public:
    // The codes of a head.
    void add(const PackedTensor& side, const Block& block, int head) {
        if (side.streams) return add(block.planes[0], head, side.streams->bytes * kBlock);
        for (int plane = 0; plane < 2 && kPlanes[side.bits][plane]; ++plane) {
            add(block.planes[plane], head, side.codes * kBlock * kPlanes[side.bits][plane] / 8);
        }
    }
    // In how many steps all is to be prefetched.
    void spread(int steps) { rate = (lines << 16) / steps + 1; }
    void step(int steps) {
        for (due += steps * rate; due >= 1 << 16 && at < count; due -= 1 << 16) {
            __builtin_prefetch(parts[at].from, 0, 2);
            if ((parts[at].from += 64) >= parts[at].to) ++at;
        }
    }

  private:
    struct Part {
        const uint8_t *from, *to;
    };
    Part parts[24];
    int count = 0, lines = 0, at = 0, rate = 0, due = 0;  // rate, due: lines times 65536

    void add(const uint8_t* plane, int head, int bytes) {
        const uint8_t* from = plane + int64_t(head) * bytes;
        parts[count++] = {from, from + bytes};
        lines += (bytes + 63) / 64;
    }
};

// Turn scores into weights relative to the largest so far, as `weigh` of float32 does, but only as exact as words are.
inline float weigh_shortly(float* scores, int count, float& largest, float& total) {
    Floats most = all(largest), sum = {};
    const auto larger = [](Floats x, Floats y) { return x > y ? x : y; };
    for (int i = 0; i < count; i += simd::width) most = larger(load(scores + i), most);
    float highest = largest;
    for (int lane = 0; lane < simd::width; ++lane) highest = std::max(highest, most[lane]);
    if (highest == -INFINITY) {
        std::fill(scores, scores + count, 0.0f);
        return 1.0f;
    }
    constexpr float kLog2 = 1.44269504f;
    for (int i = 0; i < count; i += simd::width) {
        const Floats x = larger(load(scores + i) * kLog2 - highest * kLog2, all(-126.0f));
        const Floats shifted = x + 12582912.0f, r = x - (shifted - 12582912.0f);  // 1.5 * 2^23: the nearest integer lies in the last bits
        const Floats p = (((r * 9.6181291e-3f + 5.5504109e-2f) * r + 2.4022651e-1f) * r + 6.9314718e-1f) * r + 1.0f;  // 2^r, Taylor
        const Floats weight = Floats(Ints(p) + (Ints(shifted) << 23));
        sum += weight;
        store(scores + i, weight);
    }
    const float rescale = highest == largest ? 1.0f : std::exp(largest - highest);
    total *= rescale;
    for (int lane = 0; lane < simd::width; ++lane) total += sum[lane];
    largest = highest;
    return rescale;
}

// Keys, Values: what takes those of blocks.
template <typename Keys, typename Values>
class Int16Worker : AttentionMask {
  public:
    explicit Int16Worker(const Problem& problem)
        : AttentionMask(problem), keys(problem), values(problem), scores(rows * Values::span), largest(rows), total(rows), rescale(rows) {}

    void run(const Split& split) {
        keys.begin(split.row, split.head);
        values.begin(split.head);
        std::fill(largest.begin(), largest.end(), -INFINITY);
        std::fill(total.begin(), total.end(), 0.0f);
        for (int block = split.first; block < split.last; block += Values::span / kBlock) {
            take_span(split, block, std::min(block + Values::span / kBlock, split.last));
        }
        float* to = split.result + 2 * rows;
        for (int row = 0; row < rows; ++row) {
            split.result[row] = largest[row];
            split.result[rows + row] = total[row];
        }
        values.finish(to);
        add_value_bias(split, total.data(), to);
    }

  private:
    Keys keys;
    Values values;
    Buffer<float> scores, largest, total, rescale;  // scores: [rows][span]

    void take_span(const Split& split, int first, int last) {
        Span span{{}, (last - first) * kBlock};
        for (int block = first; block < last; ++block) {
            const int64_t start = start_of(block);
            const int count = count_of(block);
            const Block* sides = sides_of(split, block);
            const auto later = [&](int blocks) { return sides_of(split, std::min(block + blocks, split.last - 1)); };
            Prefetcher prefetcher;
            prefetcher.add(problem.values, sides[1], split.head);
            if (first == split.first) prefetcher.add(problem.keys, later(1)[0], split.head);
            prefetcher.spread(keys.steps());
            prefetch_outliers(problem.keys, later(1)[0], split.head);
            prefetch_outliers(problem.values, later(1)[1], split.head);
            for (int side = 0; side < 2; ++side) {
                if (const int32_t* offsets = later(2)[side].outlier_offsets) __builtin_prefetch(offsets + split.head);
            }
            const bool visible = count > 0 && !sees_nothing(split.row, start, count);
            float* to = &scores[(block - first) * kBlock];
            if (visible) span.sides[block - first] = sides, keys.score(sides[0], start, count, prefetcher, to, Values::span);
            if (visible) add_offsets(split, start, count, to, Values::span);
            for (int row = 0; problem.softcap != 0.0f && row < rows; ++row) cap(to + row * Values::span, kBlock, problem.softcap);
            hide(split, start, visible ? count : 0, to, Values::span);
        }
        for (int row = 0; row < rows; ++row) rescale[row] = weigh_shortly(&scores[row * Values::span], span.length, largest[row], total[row]);
        Prefetcher prefetcher;
        for (int block = last; block < std::min(last + Values::span / kBlock, split.last); ++block) prefetcher.add(problem.keys, sides_of(split, block)[0], split.head);
        prefetcher.spread(values.steps() * (last - first));
        values.add(span, scores.data(), rescale.data(), prefetcher);
    }
};

}  // namespace
}  // namespace narrowkv
