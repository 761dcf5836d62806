#include "module_pages.h"

#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>

#include <array>
#include <stdexcept>
#include <string>

#include "arrays.h"
#include "module_attention.h"
#include "module_encode.h"
#include "pages.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace narrowkv {
namespace {

void require(bool sound, const char* message) {
    if (!sound) throw std::invalid_argument(message);
}

// What is read and written lies in a page. sink: where it lies, and its kind. sides: the elements of a PageSide, of keys, then of values.
void make_pages(Pages* pages, uint64_t memory, int64_t count, int64_t stride, int64_t block_bytes, std::array<int64_t, 2> sink, int64_t kv_heads,
                int64_t head_dim, std::array<std::array<int64_t, 6>, 2> sides) {
    require(count >= 0 && kv_heads > 0 && head_dim > 0 && head_dim <= kMostDim && block_bytes > 0, "there are no such pages");
    new (pages) Pages{at<uint8_t>(memory), count, stride, block_bytes, sink[0], DType(sink[1]), kv_heads, head_dim, {}};
    const int64_t sink_bytes = 2 * kv_heads * head_dim * (pages->sink_kind == DType::single ? 4 : 2);
    require(sink[0] >= kPageBlocks * block_bytes && sink[0] + sink_bytes <= stride, "a page is too small");
    require(memory % 4 == 0 && stride % 4 == 0 && block_bytes % 4 == 0, "pages do not begin at whole words");
    for (int i = 0; i < 2; ++i) {
        const auto& [streams, stream_bytes, offsets, values, index, budget] = sides[size_t(i)];
        require(streams >= 0 && stream_bytes >= 0 && budget >= 0 && budget <= kBlock * head_dim, "there are no such blocks");
        require(streams + kv_heads * stream_bytes * kBlock <= offsets && offsets + 4 * (kv_heads + 1) <= values && values + 2 * kv_heads * budget <= index &&
                    index + 2 * kv_heads * budget <= block_bytes,
                "parts of a block overlap");
        require(offsets % 4 == 0 && values % 2 == 0 && index % 2 == 0, "parts of a block do not begin at whole words");
        pages->sides[i] = {streams, stream_bytes, offsets, values, index, budget};
    }
}

using Place = std::array<int64_t, 4>;  // of [tokens, heads, head_dim]: address, kind, strides of tokens and of heads

TensorView view_at(const Place& place, int64_t heads, int64_t tokens, int64_t dim) {
    return {DType(place[1]), at<const void>(uint64_t(place[0])), 1, heads, tokens, dim, 0, place[3], place[2]};
}

void require_streams(const Pages& pages, const PageSide& side, const StreamCodec& codec) {
    require(codec.heads == pages.kv_heads && codec.dim == pages.head_dim && codec.bytes + (codec.norms ? 1 : 0) == side.stream_bytes && codec.most <= side.budget,
            "streams are not those of such pages");
}

// tokens: how many are new. unrotation: address, pairs, whether they are neighbors. runs: address, how many, tokens of each.
int64_t write(const Pages& pages, const OwnedStreamCodec& keys, const OwnedStreamCodec& values, const std::string& kernel, int64_t tokens, const Place& of_keys,
              const Place& of_values, std::array<int64_t, 3> unrotation, std::array<int64_t, 3> runs, int threads) {
    require_streams(pages, pages.sides[0], keys.codec), require_streams(pages, pages.sides[1], values.codec);
    require(unrotation[1] >= 0 && 2 * unrotation[1] <= pages.head_dim, "more channels rotate than a head has");
    const Run* first = at<const Run>(uint64_t(runs[0]));
    for (const Run* run = first; run < first + runs[1]; ++run) {
        require(run->page >= 0 && run->page < pages.count && run->block >= 0 && run->block < kPageBlocks, "there is no such page");
        require(run->first >= 0 && runs[2] > 0 && run->first + runs[2] <= kBlock, "tokens of a run lie in one block");
        require(run->start >= 0 && run->start + runs[2] <= tokens, "there are no such tokens");
    }
    const TensorView views[] = {view_at(of_keys, pages.kv_heads, tokens, pages.head_dim), view_at(of_values, pages.kv_heads, tokens, pages.head_dim)};
    const Unrotation undone{at<const double>(uint64_t(unrotation[0])), unrotation[1], unrotation[2] != 0};
    EncodeStreams& encode = stream_encoder(kernel);
    nb::gil_scoped_release release;
    const int64_t wrong = write_pages(pages, pages.sides[0], keys.codec, encode, views[0], undone, first, runs[1], runs[2], threads);
    return wrong ? wrong : write_pages(pages, pages.sides[1], values.codec, encode, views[1], {nullptr, 0, false}, first, runs[1], runs[2], threads);
}

ExactTokens new_tokens_at(const Place& keys, const Place& values) {
    ExactTokens found{{}, 1, false};
    const Place* const sides[] = {&keys, &values};
    for (int i = 0; i < 2; ++i) found.sides[i] = {at<const void>(uint64_t((*sides[i])[0])), DType((*sides[i])[1]), {0, (*sides[i])[3], (*sides[i])[2]}};
    return found;
}

// sequences: address of SequenceViews, how many. tables: address, rows, pages of each. counting: addresses of positions and of starts,
// and how many tokens they count. tokens: how many are new; in_pages: whether they are read there.
void attend(const Pages& pages, const std::string& kernel, int threads, const OwnedProblem& layer, std::array<int64_t, 2> sequences,
            std::array<int64_t, 3> tables, std::array<int64_t, 3> counting, int64_t tokens, bool in_pages, const Place& query, const Place& output,
            const Place& keys, const Place& values) {
    static_assert(sizeof(SequenceView) == 7 * sizeof(int64_t), "a view is seven integers");
    require(layer.problem.batch == 1 && layer.problem.kv_heads == pages.kv_heads && layer.problem.head_dim == pages.head_dim, "heads are not those of such pages");
    require_kernel(layer, kernel);
    const Rotation& rotation = layer.problem.rotation;
    const int64_t heads = layer.problem.group * pages.kv_heads;
    const PagedQueries queries{at<const SequenceView>(uint64_t(sequences[0])), sequences[1], at<const int64_t>(uint64_t(tables[0])), tables[2],
                               view_at(query, heads, tokens, pages.head_dim), view_at(output, heads, tokens, pages.head_dim),
                               in_pages ? ExactTokens{} : new_tokens_at(keys, values), at<const int32_t>(uint64_t(counting[0])), at<const int64_t>(uint64_t(counting[1]))};
    for (const SequenceView* one = queries.sequences; one < queries.sequences + queries.count; ++one) {
        require(one->row >= 0 && one->row < tables[1] && one->chunk > 0, "there is no such sequence");
        require(one->start >= 0 && one->queries > 0 && one->start + one->queries <= tokens, "there are no such queries");
        require(one->first >= 0 && one->first % kBlock == 0 && one->first < one->past && one->past <= counting[2] && one->past <= tables[2] * kPageBlocks * kBlock,
                "a sequence has no such tokens");
        require(!rotation.pairs || one->past + kFrame <= rotation.last + 1, "tables of angles do not reach");
        const int64_t* own_pages = queries.tables + one->row * queries.width;
        for (int64_t page = one->first / (kPageBlocks * kBlock); page * kPageBlocks * kBlock < one->past; ++page)
            require(own_pages[page] >= 0 && own_pages[page] < pages.count, "there is no such page");
    }
    AttendProblems& attend_all = attention_kernel(kernel);
    nb::gil_scoped_release release;
    attend_pages(pages, layer.problem, queries, attend_all, threads);
}

}  // namespace

void define_pages(nb::module_& module) {
    nb::class_<Pages>(module, "Pages", "The pages of one layer in an engine's memory; see store/paged.py.")
        .def("__init__", &make_pages, nb::kw_only(), "memory"_a, "count"_a, "stride"_a, "block_bytes"_a, "sink"_a, "kv_heads"_a, "head_dim"_a, "sides"_a)
        .def("write", &write, "keys"_a, "values"_a, "kernel"_a, "tokens"_a, "of_keys"_a, "of_values"_a, "unrotation"_a, "runs"_a, "threads"_a,
             "Write new tokens to their blocks; see store/paged.py.")
        .def("attend", &attend, "kernel"_a, "threads"_a, "layer"_a, "sequences"_a, "tables"_a, "counting"_a, "tokens"_a, "in_pages"_a, "query"_a,
             "output"_a, "keys"_a, "values"_a, "Attention of a few queries of each sequence; see attention/cpu/paged.py.");
}

}  // namespace narrowkv
