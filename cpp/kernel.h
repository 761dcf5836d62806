// Decode attention over packed blocks. Compiled once for each instruction set: included after `simd`, whose vectors it uses.
//
// A split of work is a run of blocks of one KV head of one sequence. Each block is decoded into a tile in the nearest cache,
// which all queries of the head's group share; the softmax is carried from block to block, and splits are merged at the end.

#pragma once

#include <algorithm>
#include <cstdlib>
#include <optional>
#include <type_traits>
#include <vector>

#include "attention.h"
#include "decode.h"
#include "exact.h"
#include "rotation.h"
#include "scratch.h"
#include "stream_keys.h"
#include "stream_values.h"
#include "tail.h"
#include "tile.h"

namespace narrowkv {
namespace {

// One split of work: blocks [first, last) of a head of a sequence, the tail among them, or its exact tokens, in runs of 64.
struct Split {
    int row, head;
    bool exact, streamed;  // streamed: sums are those of streams, whose lanes are added up at the end
    int first, last;
    float* result;  // [rows] largest, [rows] total, [rows][head_dim] sum
};

// Which tokens the queries of a head's group see.
class AttentionMask {
  protected:
    const Problem& problem;
    const int rows, dim;

    explicit AttentionMask(const Problem& problem) : problem(problem), rows(problem.group * problem.queries), dim(problem.head_dim) {}

    // Keys, then values.
    const Block* sides_of(const Split& split, int block) const {
        const Block* column = block < problem.blocks ? problem.table + int64_t(block) * problem.batch * 2 : problem.tail_table;
        return column + split.row * 2;
    }

    // The first token of a block, and how many of its tokens are to be seen.
    int64_t start_of(int block) const { return problem.starts[block]; }
    int count_of(int block) const {
        if (block == problem.blocks) return problem.tail;
        return int(std::min(problem.starts[block + 1], problem.tokens) - problem.starts[block]);
    }

    int64_t length() const { return problem.tokens + problem.tail + problem.exact; }

    const uint8_t* hidden(int row, int64_t token) const {
        return problem.hidden + (problem.hidden_batch > 1 ? row : 0) * problem.queries * length() + token;
    }

    bool sees_nothing(int row, int64_t token, int count) const {
        if (!problem.hidden) return false;
        for (int query = 0; query < problem.queries; ++query) {
            const uint8_t* hides = hidden(row, token) + query * length();
            for (int i = 0; i < count; ++i) {
                if (!hides[i]) return false;
            }
        }
        return true;
    }

    // What the bias of keys, which codes are without, adds to the scores of tokens, [rows][stride].
    void add_offsets(const Split& split, int64_t token, int count, float* scores, int stride) const {
        if (!problem.key_offsets) return;
        const int64_t length = problem.tokens + problem.tail;
        const float* offsets = problem.key_offsets + (int64_t(split.row) * problem.kv_heads + split.head) * rows * length + token;
        for (int i = 0; i < rows; ++i, offsets += length, scores += stride) {
            for (int t = 0; t < count; ++t) scores[t] += offsets[t];
        }
    }

    // What the bias of values adds to sums of them, [rows][head_dim], by the sum of their weights.
    void add_value_bias(const Split& split, const float* total, float* sum) const {
        if (!problem.value_bias) return;
        const float* bias = problem.value_bias + int64_t(split.head) * dim;
        for (int i = 0; i < rows; ++i) {
            for (int d = 0; d < dim; ++d) sum[i * dim + d] += total[i] * bias[d];
        }
    }

    // Tokens beyond the last, those that a mask hides, of blocks those that stay exact elsewhere, and exact ones that are read
    // from none. scores: [rows][stride].
    void hide(const Split& split, int64_t token, int count, float* scores, int stride) const {
        for (int i = 0; i < rows; ++i, scores += stride) {
            for (int t = count; t < kBlock; ++t) scores[t] = -INFINITY;
            if (problem.hidden) {
                const uint8_t* hides = hidden(split.row, token) + i % problem.queries * length();
                for (int t = 0; t < count; ++t) scores[t] = hides[t] ? -INFINITY : scores[t];
            }
            for (int sink = 0; sink < problem.sinks && !split.exact; ++sink) {
                const int64_t at = problem.sink_index[int64_t(split.row) * problem.sinks + sink] - token;
                if (at >= 0 && at < count) scores[at] = -INFINITY;
            }
            for (int sink = 0; split.exact && sink < problem.sinks; ++sink) {
                const int64_t at = problem.tokens + problem.tail + sink - token;
                if (at >= 0 && at < count && stored_index(problem, split.row, sink) < 0) scores[at] = -INFINITY;
            }
        }
    }
};

class Worker : AttentionMask {
  public:
    explicit Worker(const Problem& problem)
        : AttentionMask(problem), scratch(problem), stream_keys(problem), stream_values(problem) {}

    void run(const Split& split) {
        read_query(split);
        if (!split.exact) {
            tables[0] = tables_of(problem.keys, split.head, scratch.tables[0]);
            tables[1] = tables_of(problem.values, split.head, scratch.tables[1]);
        }
        if (problem.keys.streams && !split.exact) stream_keys.begin(split.row, split.head);
        const int stride = sum_stride(split);
        for (int i = 0; i < rows; ++i) scratch.largest[i] = -INFINITY, scratch.total[i] = 0.0f;
        for (int64_t i = 0; i < int64_t(rows) * stride; ++i) scratch.sum[i] = 0.0f;
        for (int block = split.first; block < split.last; ++block) split.exact ? take_exact(split, block) : take_block(split, block);
        finish(split);
    }

  private:
    Scratch scratch;
    StreamKeys stream_keys;
    StreamValues stream_values;
    const float* tables[2];  // of the split's head: of keys, and of values

    int sum_stride(const Split& split) const { return split.streamed ? dim * simd::width : round_up(dim, 16); }

    // Of exact tokens as far apart as what is read of these.
    void read_query(const Split& split) {
        const float* query = split.exact ? problem.exact_query : problem.packed_query;
        const int stride = split.exact ? round_up(dim, 16) : dim;
        query += (int64_t(split.row) * problem.kv_heads + split.head) * rows * dim;
        for (int i = 0; i < rows; ++i) {
            for (int d = 0; d < stride; ++d) scratch.query[i * stride + d] = d < dim ? query[i * dim + d] * problem.scaling : 0.0f;
        }
    }

    void take_block(const Split& split, int block) {
        const int64_t start = start_of(block);
        const int count = count_of(block);
        if (count <= 0 || sees_nothing(split.row, start, count)) return;
        const auto later = [&](int blocks) { return sides_of(split, block + blocks < split.last ? block + blocks : split.last - 1); };
        const Block *sides = later(0), *next = later(1), *after = later(2);
        if (problem.keys.streams) {
            stream_keys.take_block(sides[0], next[0], start, count, scratch.scores);
        } else {
            take_keys_of(split, Source(problem.keys, sides[0], next[0], tables[0], split.head, dim), start, count);
        }
        prefetch_metadata(problem.keys, next[0], after[0], split.head);
        add_offsets(split, start, count, scratch.scores, kBlock);
        weigh_all(split, start, count);
        if (problem.values.streams) {
            stream_values.take_block(sides[1], next[1], split.head, scratch.scores, scratch.sum);
        } else {
            take_values_of(split, Source(problem.values, sides[1], next[1], tables[1], split.head, dim), count);
        }
        prefetch_metadata(problem.values, next[1], after[1], split.head);
    }

    void take_keys_of(const Split& split, Source keys, int64_t start, int count) {
        for (int from = 0; from < count; from += kRopeTokens) {
            const int some = count - from < kRopeTokens ? count - from : kRopeTokens;
            decode(keys, {from, kRopeTokens}, scratch.ranges, scratch.tile);
            rotate_and_take_keys(split, start, from, some);
        }
    }

    void take_values_of(const Split& split, Source values, int count) {
        for (int from = 0; from < count; from += kRopeTokens) {
            decode(values, {from, kRopeTokens}, scratch.ranges, scratch.tile);
            add_values(split, from, kRopeTokens);
        }
    }

    // Scores of a tile of packed keys, `from` tokens into those that begin at `start`.
    void rotate_and_take_keys(const Split& split, int64_t start, int from, int some) {
        if (!problem.rotation.pairs) return take_keys(scratch.query, from);
        std::memcpy(scratch.rotated, scratch.query, sizeof(float) * rows * dim);
        const float* angles = relative_angles(problem.rotation, split.row, problem.stored, start + from, some, rows, dim,
                                              scratch.rotated, scratch.angles);
        rotate(scratch.tile, angles, problem.rotation.pairs, problem.rotation.interleaved);
        take_keys(scratch.rotated, from);
    }

    void take_exact(const Split& split, int block) {
        const int first = block * kBlock, count = std::min(problem.exact - first, kBlock), stride = sum_stride(split);
        read_exact(problem, split.row, split.head, 0, first, count, stride, scratch.tile);
        by_fours(rows, [&](int row, auto queries) {
            score_exact<queries>(scratch.query + row * stride, scratch.tile, count, stride, scratch.scores + row * kBlock);
        });
        weigh_all(split, problem.tokens + problem.tail + first, count);
        read_exact(problem, split.row, split.head, 1, first, count, stride, scratch.tile);
        add_values(split, 0, count);
    }

    // Scores of the tokens of a tile of keys, which begins `from` tokens into the block.
    void take_keys(const float* query, int from) {
        by_fours(rows, [&](int row, auto queries) {
            score<queries>(query + row * dim, scratch.tile, dim, scratch.scores + row * kBlock + from);
        });
    }

    // From the scores of a block to weights, in place; `token` is the first one's index in `hidden`.
    void weigh_all(const Split& split, int64_t token, int count) {
        if (problem.softcap != 0.0f) cap(scratch.scores, rows * kBlock, problem.softcap);
        hide(split, token, count, scratch.scores, kBlock);
        const int stride = sum_stride(split);
        for (int i = 0; i < rows; ++i) {
            const float rescale = weigh(scratch.scores + i * kBlock, kBlock, scratch.largest[i], scratch.total[i]);
            float* sum = scratch.sum + int64_t(i) * stride;
            for (int d = 0; rescale != 1.0f && d < stride; ++d) sum[d] *= rescale;
        }
    }

    // Add the values of a tile of `count` tokens, which begins `from` tokens into the block.
    void add_values(const Split& split, int from, int count) {
        const int stride = sum_stride(split);
        by_fours(rows, [&](int row, auto queries) {
            mix<queries>(scratch.scores + row * kBlock + from, kBlock, scratch.tile, count, stride, scratch.sum + int64_t(row) * stride);
        });
    }

    void finish(const Split& split) const {
        const int stride = sum_stride(split), lanes = split.streamed ? simd::width : 1;
        float* sum = split.result + 2 * rows;
        for (int i = 0; i < rows; ++i) {
            split.result[i] = scratch.largest[i];
            split.result[rows + i] = scratch.total[i];
            for (int d = 0; d < dim; ++d) {
                float& to = sum[i * dim + d] = 0.0f;
                for (int lane = 0; lane < lanes; ++lane) to += scratch.sum[int64_t(i) * stride + d * lanes + lane];
            }
        }
        if (!split.exact) add_value_bias(split, scratch.total, sum);
    }
};

// Add what was found in codes to the output of a head, [rows][head_dim]. sums: [rows][head_dim rounded up to 16].
void add_packed(const Problem& problem, int head, const Buffer<float>& sums, const Buffer<float>& totals, float* output) {
    const int rows = problem.group * problem.queries, dim = problem.head_dim, stride = round_up(dim, 16), n = problem.value_rows;
    Buffer<float> found(problem.value_matrix ? rows * stride : 0);
    const float* mean = problem.value_mean ? problem.value_mean + int64_t(head) * dim : nullptr;
    if (problem.value_matrix) {
        const float* matrix = problem.value_matrix + int64_t(head) * n * stride;
        by_fours(rows, [&](int row, auto queries) { mix<queries>(&sums[row * stride], stride, matrix, n, stride, &found[row * stride]); });
    }
    const float* channels = problem.value_matrix ? found.data() : sums.data();
    for (int i = 0; i < rows; ++i) {
        for (int d = 0; d < dim; ++d) output[i * dim + d] += channels[i * stride + d] + (mean ? totals[i] * mean[d] : 0.0f);
    }
}

// Merge the results of a head's splits: the last is that of the exact tokens.
void merge(const Problem& problem, int row, int head, const float* results, int splits, int64_t size) {
    const int rows = problem.group * problem.queries, dim = problem.head_dim, stride = round_up(dim, 16);
    Buffer<float> packed(rows * stride), totals(rows);  // of blocks and tail: sums, and weights
    float* const output = problem.output + (int64_t(row) * problem.kv_heads + head) * rows * dim;
    std::fill_n(output, rows * dim, 0.0f);
    for (int i = 0; i < rows; ++i) {
        const float sink = problem.sink_logits ? problem.sink_logits[head * problem.group + i / problem.queries] : -INFINITY;
        float largest = sink;
        for (int p = 0; p < splits; ++p) largest = std::fmax(largest, results[p * size + i]);
        if (largest == -INFINITY) continue;
        float total = std::exp(sink - largest);
        for (int p = 0; p < splits; ++p) total += std::exp(results[p * size + i] - largest) * results[p * size + rows + i];
        for (int p = 0; p < splits; ++p) {
            const float weight = std::exp(results[p * size + i] - largest) / total;
            const float* sum = results + p * size + 2 * rows + int64_t(i) * dim;
            float* to = p < splits - 1 ? &packed[i * stride] : output + i * dim;
            if (p < splits - 1) totals[i] += weight * results[p * size + rows + i];
            for (int d = 0; d < dim; ++d) to[d] += weight * sum[d];
        }
    }
    add_packed(problem, head, packed, totals, output);
}

// The splits of one problem among those of others: blocks and exact tokens of each head, numbered from `first` on.
struct Share {
    Problem problem;
    PackedTail tail;
    int runs, splits, heads;
    int64_t size, first, first_head;  // size: floats of the result of a split
    float* results;

    Share(const Problem& given, int64_t first, int64_t first_head)
        : problem(given),
          tail(given),
          runs((problem.blocks + problem.chunk - 1) / problem.chunk),
          splits(runs + 1),
          heads(problem.batch * problem.kv_heads),
          size(round_up(problem.group * problem.queries * (problem.head_dim + 2), 16)),
          first(first),
          first_head(first_head),
          results(nullptr) {
        problem.tail_table = tail.table.data();
    }

    Split split(int i) const {
        const int head = i % heads, run = i / heads;
        const bool exact = run == runs, streamed = problem.values.streams && !exact;
        Split found{head / problem.kv_heads, head % problem.kv_heads, exact, streamed, 0, (problem.exact + kBlock - 1) / kBlock, result(head, run)};
        if (!exact) found.first = run * problem.chunk, found.last = run < runs - 1 ? found.first + problem.chunk : problem.blocks + (problem.tail > 0);
        return found;
    }

    float* result(int head, int run) const { return results + (int64_t(head) * splits + run) * size; }
};

// Packed: the worker that takes blocks; exact tokens are taken in float32. How a problem is split depends on it alone, so its
// sums are the same whatever else is attended to.
template <typename Packed>
void attend(const Problems& problems, int threads) {
    std::vector<Share> shares;
    shares.reserve(problems.size());
    int64_t splits = 0, heads = 0, floats = 0;
    for (const Problem* problem : problems) {
        const Share& share = shares.emplace_back(*problem, splits, heads);
        splits += int64_t(share.splits) * share.heads, heads += share.heads, floats += share.size * share.splits * share.heads;
    }
    float* results = static_cast<float*>(std::aligned_alloc(64, sizeof(float) * floats));
    float* next = results;
    for (Share& share : shares) share.results = next, next += share.size * share.splits * share.heads;
    const auto of_head = [&](int64_t i) -> Share& { return *(std::upper_bound(shares.begin(), shares.end(), i, [](int64_t i, const Share& share) { return i < share.first_head; }) - 1); };
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        std::optional<Packed> packed;
        std::optional<Worker> exact;
        const Share* share = nullptr;  // the work of a thread goes from the first problem to the last
#pragma omp for schedule(static)
        for (int64_t i = 0; i < heads; ++i) {
            Share& owner = of_head(i);
            owner.tail.pack(int(i - owner.first_head));
        }
#pragma omp for schedule(monotonic : dynamic, 1)
        for (int64_t i = 0; i < splits; ++i) {
            const Share* before = share;
            if (!share) share = shares.data();
            while (share + 1 < shares.data() + shares.size() && share[1].first <= i) ++share;
            if (share != before) packed.emplace(share->problem), exact.emplace(share->problem);
            const Split split = share->split(int(i - share->first));
            split.exact ? exact->run(split) : packed->run(split);
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < heads; ++i) {
            const Share& owner = of_head(i);
            const int head = int(i - owner.first_head), kv_heads = owner.problem.kv_heads;
            merge(owner.problem, head / kv_heads, head % kv_heads, owner.result(head, 0), owner.splits, owner.size);
        }
    }
    std::free(results);
}

}  // namespace
}  // namespace narrowkv
