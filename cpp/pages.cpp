// Elements are unrotated in float64 and rounded to float32; products and sums are not fused, so that codes are exactly those of
// `PagedLayer.append_naive`.

#include "pages.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "encode_loops.h"

namespace narrowkv {
namespace {

// One call of write_pages.
class PageWriter {
public:
    PageWriter(const Pages& pages, const PageSide& side, const StreamCodec& codec, const TensorView& elements, const Unrotation& unrotation,
               const Run* runs, int64_t count, int64_t tokens)
        : pages(pages), side(side), codec(codec), elements(elements), unrotation(unrotation), runs(runs), count(count), tokens(tokens),
          heads(pages.kv_heads), width(codec.bytes + (codec.norms ? 1 : 0)) {
        gathered.resize(size_t(count * heads * tokens * pages.head_dim));
        codes.resize(size_t(count * heads * tokens * width));
        stored.resize(size_t(count * heads));
        outlier_index.resize(size_t(count * heads * side.budget));
        outlier_values.resize(outlier_index.size());
    }

    int64_t run(EncodeStreams& encode, int threads) {
        std::atomic<bool> finite{true};
#pragma omp parallel for num_threads(threads)
        for (int64_t row = 0; row < count * heads; ++row)
            if (!gather(row / heads, row % heads)) finite = false;
        if (!finite) return kNotFinite;
        std::vector<int64_t> starts;
        std::vector<uint8_t> skip;
        for (int64_t r = 0; r < count; ++r) {
            crop(r);
            starts.push_back(runs[r].first);
            if (runs[r].position == 0) skip.resize(size_t(count * tokens)), skip[size_t(r * tokens)] = 1;
        }
        const int64_t dim = pages.head_dim;
        const TensorView view{DType::single, gathered.data(), count, heads, tokens, dim, heads * tokens * dim, tokens * dim, dim};
        const EncodeBuffer buffer{tokens, 0, codes.data(), nullptr, nullptr, outlier_index.data(), outlier_values.data(), int64_t(outlier_index.size())};
        const StreamCounts found = encode(codec, view, skip.empty() ? nullptr : skip.data(), buffer, stored.data(), starts.data(), true, threads);
        if (found.outliers == kDoesNotFit) return kDoesNotFit;
        for (int64_t r = 0, outlier = 0; r < count; ++r) {
            put_streams(r);
            if (side.budget) outlier = put_outliers(r, outlier, found.outliers);
        }
        return 0;
    }

private:
    const Pages& pages;
    const PageSide& side;
    const StreamCodec& codec;
    const TensorView& elements;
    const Unrotation& unrotation;
    const Run* runs;
    const int64_t count, tokens, heads, width;
    std::vector<float> gathered;        // [runs, heads, tokens, head_dim]
    std::vector<uint8_t> codes;         // [runs, heads, tokens, width]
    std::vector<int32_t> stored;        // [runs, heads], outliers of earlier tokens
    std::vector<int64_t> outlier_index;  // of new ones, among the codes
    std::vector<uint16_t> outlier_values;

    // Elements of a run and head as the encoder takes them; returns whether they are finite.
    bool gather(int64_t r, int64_t head) {
        const int64_t dim = pages.head_dim;
        for (int64_t t = 0; t < tokens; ++t) {
            const int64_t token = runs[r].start + t;
            const char* from = row_of(elements, 0, head, token);
            if (!finite_row(elements.kind, from, dim)) return false;
            float* to = gathered.data() + ((r * heads + head) * tokens + t) * dim;
            load(elements.kind, from, dim, to);
            unrotate(unrotation.turns + token * 2 * unrotation.pairs, to);
        }
        return true;
    }

    void unrotate(const double* turns, float* x) const {
        const int64_t pairs = unrotation.pairs, apart = unrotation.interleaved ? 1 : pairs, step = unrotation.interleaved ? 2 : 1;
        for (int64_t c = 0; c < pairs; ++c) {
            const double cosine = turns[c], sine = turns[pairs + c], first = double(x[c * step]), second = double(x[c * step + apart]);
            x[c * step] = float(first * cosine - second * sine);
            x[c * step + apart] = float(second * cosine + first * sine);
        }
    }

    uint8_t* block_of(int64_t r) const { return pages.block(runs[r].page, runs[r].block); }
    int32_t* offsets_of(int64_t r) const { return reinterpret_cast<int32_t*>(block_of(r) + side.offsets); }
    uint16_t* values_of(int64_t r) const { return reinterpret_cast<uint16_t*>(block_of(r) + side.values); }
    uint16_t* index_of(int64_t r) const { return reinterpret_cast<uint16_t*>(block_of(r) + side.index); }

    // Remove the outliers of tokens that are written again, and of later ones; of new blocks, whatever there is, all.
    void crop(int64_t r) {
        int32_t* offsets = offsets_of(r);
        if (runs[r].first == 0 || side.budget == 0) {
            std::fill_n(offsets, heads + 1, 0);
            return;
        }
        uint16_t *values = values_of(r), *index = index_of(r);
        const int64_t limit = runs[r].first * codec.n;
        int32_t left = 0, begin = 0;
        for (int64_t head = 0; head < heads; ++head) {
            const int32_t before = left, end = std::clamp(offsets[head + 1], begin, int32_t(heads * side.budget));
            for (int32_t i = begin; i < end && left - before < side.budget; ++i)
                if (index[i] < limit) index[left] = index[i], values[left++] = values[i];
            begin = end;
            offsets[head + 1] = left;
            stored[size_t(r * heads + head)] = left - before;
        }
        offsets[0] = 0;
    }

    void put_streams(int64_t r) const {
        for (int64_t head = 0; head < heads; ++head) {
            const uint8_t* from = codes.data() + (r * heads + head) * tokens * width;
            uint8_t* to = block_of(r) + side.streams + head * width * kBlock + runs[r].first;
            for (int64_t byte = 0; byte < width; ++byte)
                for (int64_t t = 0; t < tokens; ++t) to[byte * kBlock + t] = from[t * width + byte];
        }
    }

    // Add a run's outliers, from the number `next` on, to those of its block; returns the number of the next run's first.
    int64_t put_outliers(int64_t r, int64_t next, int64_t found) const {
        const int64_t of_head = tokens * codec.n;
        std::vector<int64_t> begins(1, next);  // of each head
        for (int64_t head = 0; head < heads; ++head) {
            while (next < found && outlier_index[size_t(next)] < (r * heads + head + 1) * of_head) ++next;
            begins.push_back(next);
        }
        if (next == begins[0]) return next;
        int32_t* offsets = offsets_of(r);
        uint16_t *values = values_of(r), *index = index_of(r);
        for (int64_t head = heads - 1; head >= 0; --head) {
            const int64_t shift = begins[size_t(head)] - begins[0];
            std::copy_backward(values + offsets[head], values + offsets[head + 1], values + offsets[head + 1] + shift);
            std::copy_backward(index + offsets[head], index + offsets[head + 1], index + offsets[head + 1] + shift);
            int64_t at = offsets[head + 1] + shift;
            for (int64_t i = begins[size_t(head)]; i < begins[size_t(head + 1)]; ++i, ++at) {
                values[at] = outlier_values[size_t(i)];
                index[at] = uint16_t(outlier_index[size_t(i)] - (r * heads + head) * of_head + runs[r].first * codec.n);
            }
            offsets[head + 1] = int32_t(at);
        }
        return next;
    }
};

ExactTokens sink_of(const Pages& pages, int64_t page) {
    const int64_t size = pages.sink_kind == DType::single ? 4 : 2;
    const uint8_t* from = pages.memory + page * pages.stride + pages.sink;
    ExactTokens found{{}, 1, false};
    for (int side = 0; side < 2; ++side) found.sides[side] = {from + side * pages.kv_heads * pages.head_dim * size, pages.sink_kind, {0, pages.head_dim, 0}};
    return found;
}

ExactTokens new_tokens_of(const ExactTokens& all, const SequenceView& sequence) {
    ExactTokens found = all;
    found.tokens = int(sequence.queries);
    for (auto& side : found.sides) {
        const int64_t size = side.kind == DType::single ? 4 : 2;
        side.elements = static_cast<const uint8_t*>(side.elements) + sequence.start * side.strides[2] * size;
    }
    return found;
}

// Heads of a sequence's queries: which, of which new token, and where it stands in [query_heads, queries] of those of each sequence.
template <typename Take>
void for_each_query(const SequenceView& sequence, int64_t heads, Take take) {
    for (int64_t head = 0; head < heads; ++head)
        for (int64_t i = 0; i < sequence.queries; ++i) take(head, sequence.start + i, sequence.start * heads + head * sequence.queries + i);
}

// The opposite of `load`.
void put(DType kind, const float* from, int64_t dim, char* to) {
    if (kind == DType::single) return void(std::memcpy(to, from, size_t(dim) * 4));
    uint16_t* bits = reinterpret_cast<uint16_t*>(to);
    for (int64_t c = 0; c < dim; ++c) bits[c] = kind == DType::half ? half_from_single(from[c]) : bfloat_from_single(from[c]);
}

// Where a block's keys and values lie.
void locate(const Pages& pages, const uint8_t* block, Block* to) {
    for (const PageSide& side : pages.sides) {
        *to = Block{};
        to->planes[0] = block + side.streams;
        if (side.budget) {
            to->outlier_values = block + side.values;
            to->outlier_index = reinterpret_cast<const uint16_t*>(block + side.index);
            to->outlier_offsets = reinterpret_cast<const int32_t*>(block + side.offsets);
        }
        ++to;
    }
}

}  // namespace

int64_t write_pages(const Pages& pages, const PageSide& side, const StreamCodec& codec, EncodeStreams& encode, const TensorView& elements,
                    const Unrotation& unrotation, const Run* runs, int64_t count, int64_t tokens, int threads) {
    return PageWriter(pages, side, codec, elements, unrotation, runs, count, tokens).run(encode, threads);
}

void attend_pages(const Pages& pages, const Problem& layer, const PagedQueries& queries, AttendProblems& attend, int threads) {
    static const int64_t first_token = 0;
    const int64_t heads = queries.query.heads, dim = queries.query.dim;
    std::vector<Problem> all(size_t(queries.count), layer);
    std::vector<std::vector<Block>> tables(static_cast<size_t>(queries.count));
    std::vector<float> query(size_t(queries.query.tokens * heads * dim)), output(query.size());
    Problems problems;
    for (int64_t i = 0; i < queries.count; ++i) {
        const SequenceView& sequence = queries.sequences[i];
        const int64_t* own_pages = queries.tables + sequence.row * queries.width;
        const int64_t first = sequence.first / kBlock, stop = (sequence.past + kBlock - 1) / kBlock;
        tables[size_t(i)].resize(size_t(2 * (stop - first)));
        for (int64_t block = first; block < stop; ++block)
            locate(pages, pages.block(own_pages[block / kPageBlocks], block % kPageBlocks), &tables[size_t(i)][size_t(2 * (block - first))]);
        Problem& problem = all[size_t(i)];
        problem.queries = int(sequence.queries), problem.blocks = int(stop - first), problem.chunk = int(sequence.chunk);
        problem.tokens = problem.stored = sequence.past - sequence.first;
        problem.table = tables[size_t(i)].data(), problem.starts = queries.starts;
        problem.rotation.positions = queries.positions + sequence.first;
        problem.packed_query = problem.exact_query = query.data() + sequence.start * heads * dim;
        problem.output = output.data() + sequence.start * heads * dim;
        for_each_query(sequence, heads, [&](int64_t head, int64_t token, int64_t at) { load(queries.query.kind, row_of(queries.query, 0, head, token), dim, &query[size_t(at * dim)]); });
        problem.hidden = sequence.hidden, problem.hidden_batch = sequence.hidden ? 1 : 0;
        int parts = 0;
        if (sequence.first == 0) problem.exact_parts[parts++] = sink_of(pages, own_pages[0]), problem.sinks = 1, problem.sink_index = &first_token;
        if (queries.new_tokens.tokens) problem.exact_parts[parts++] = new_tokens_of(queries.new_tokens, sequence);
        for (int part = 0; part < parts; ++part) problem.exact += problem.exact_parts[part].tokens;
        problems.push_back(&problem);
    }
    attend(problems, threads);
    for (int64_t i = 0; i < queries.count; ++i)
        for_each_query(queries.sequences[i], heads, [&](int64_t head, int64_t token, int64_t at) {
            put(queries.output.kind, &output[size_t(at * dim)], dim, const_cast<char*>(row_of(queries.output, 0, head, token)));
        });
}

}  // namespace narrowkv
