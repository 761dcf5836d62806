// Decode attention over packed blocks in int16, added up in 32: for models that compute in 16 bits anyway.
//
// Codebooks hold words, in units of their own; queries and weights become words as large as sums in 32 bits allow. Blocks are
// taken four at a time: scores of all, one softmax, then the values. Elements are multiplied in the registers they are looked
// up in: memory that is written and read again costs more than the arithmetic. Outliers are added in float32, as what they
// differ by.

#pragma once

#include "stream_int16_keys.h"
#include "stream_int16_values.h"
#include "int16_values.h"

namespace narrowkv {
namespace {

// Turn scores into weights relative to the largest so far, as `weigh` of float32 does, but only as exact as words are.
inline float weigh_shortly(float* scores, int count, float& largest, float& total) {
    __m512 most = _mm512_set1_ps(largest), sum = {};
    for (int i = 0; i < count; i += 16) most = _mm512_max_ps(most, _mm512_load_ps(scores + i));
    const float highest = _mm512_reduce_max_ps(most);
    if (highest == -INFINITY) {
        std::fill(scores, scores + count, 0.0f);
        return 1.0f;
    }
    constexpr float kLog2 = 1.44269504f;
    for (int i = 0; i < count; i += 16) {
        const __m512 x = _mm512_max_ps(_mm512_load_ps(scores + i) * kLog2 - highest * kLog2, _mm512_set1_ps(-126.0f));
        const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = x - n;
        const __m512 p = (((r * 9.6181291e-3f + 5.5504109e-2f) * r + 2.4022651e-1f) * r + 6.9314718e-1f) * r + 1.0f;  // 2^r, Taylor
        const __m512 weight = _mm512_scalef_ps(p, n);
        sum += weight;
        _mm512_store_ps(scores + i, weight);
    }
    const float rescale = highest == largest ? 1.0f : std::exp(largest - highest);
    total = total * rescale + _mm512_reduce_add_ps(sum);
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
            const int64_t start = problem.starts[block], stop = std::min(problem.starts[block + 1], problem.tokens);
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
            const int count = int(stop - start);
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
