// The compiled part of NarrowKV: what the processor can do, and the kernels.

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "arrays.h"
#include "attention.h"
#include "module_attention.h"
#include "module_encode.h"
#include "module_pages.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace narrowkv {
namespace {

std::vector<std::string> instruction_sets() {
    std::vector<std::string> found;
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) found.push_back("avx2");
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (wide) found.push_back("avx512");
    if (__builtin_cpu_supports("avx512vbmi")) found.push_back("avx512vbmi");
    if (__builtin_cpu_supports("avx512vbmi2")) found.push_back("avx512vbmi2");
    if (__builtin_cpu_supports("avx512vnni")) found.push_back("avx512vnni");
    if (__builtin_cpu_supports("gfni")) found.push_back("gfni");
    if (__builtin_cpu_supports("avx512bf16")) found.push_back("avx512bf16");
#elif defined(__aarch64__)
    found.push_back("neon");
#endif
    return found;
}

// Streams and the tables that they point into.
struct OwnedStreams {
    Streams streams{};
    Array<const int8_t, nb::ndim<2>> high, low;
    Table finer;
    std::optional<Array<const int32_t, nb::ndim<2>>> query_index;
    std::optional<Array<const int32_t, nb::ndim<1>>> channels;
    std::optional<Table> query_rotations, offsets;
    std::optional<Array<const int32_t, nb::ndim<2>>> int16_scales, int16_maxima;
    std::optional<Array<const int16_t>> int16_offsets;
};

void require(bool sound, const char* message) {
    if (!sound) throw std::invalid_argument(message);
}

// Counts of each rate from 1 on. Nothing is read beyond what these sizes tell.
void make_streams(OwnedStreams* owned, const std::vector<int>& counts, bool norms, Array<const int8_t, nb::ndim<2>> high,
                  Array<const int8_t, nb::ndim<2>> low, Table finer, std::optional<Array<const int32_t, nb::ndim<2>>> query_index,
                  std::optional<Array<const int32_t, nb::ndim<1>>> channels, std::optional<Table> query_rotations, std::optional<Table> offsets,
                  bool uses_int16, std::optional<Array<const int32_t, nb::ndim<2>>> int16_scales,
                  std::optional<Array<const int32_t, nb::ndim<2>>> int16_maxima, std::optional<Array<const int16_t>> int16_offsets) {
    Streams streams{{}, norms, norms, high.data(), low.data(), finer.data(), data_or_null(query_index), data_or_null(channels), data_or_null(query_rotations),
                    data_or_null(offsets), uses_int16, data_or_null(int16_scales), data_or_null(int16_maxima), data_or_null(int16_offsets)};
    require(counts.size() == kMostRate, "streams have a count for each rate from 1 on");
    for (int i = 0; i < kMostRate; ++i) {
        require(counts[i] >= 0 && counts[i] <= kMostDim / kUnit, "streams have more units than a head");
        streams.counts[i] = counts[i];
        streams.bytes += (i + 1) * counts[i];
    }
    for (const auto& part : {high, low}) require(part.shape(0) == kMostRate && part.shape(1) == 16, "tables of streams are [6, 16]");
    require(int64_t(finer.size()) >= streams.coded(), "tables are smaller than what is read of them");
    if (query_index) {
        const int64_t dim = int64_t(query_index->shape(1));
        require(dim >= streams.coded() && dim % 2 == 0, "streams have more coefficients than a head");
        require(channels && int64_t(channels->size()) == dim, "a query has a channel for each element");
        require(offsets && offsets->size() == query_index->size() * kFrame, "offsets of keys do not fit them");
        require(query_rotations && query_rotations->size() == query_index->size() * 4, "rotations of queries do not fit them");
        for (const auto& int16 : {int16_scales, int16_maxima}) require(!uses_int16 || (int16 && int16->size() == query_index->size()), "tables of words do not fit streams");
        require(!uses_int16 || (int16_offsets && int16_offsets->size() == query_index->size() * kFrame), "offsets in words do not fit streams");
        const auto within = [&](int32_t i) { return i >= 0 && i < dim; };
        require(std::all_of(query_index->data(), query_index->data() + query_index->size(), within), "a query has no such element");
        require(std::all_of(channels->data(), channels->data() + dim, within), "a query has no such channel");
    }
    new (owned) OwnedStreams{streams, high, low, finer, query_index, channels, query_rotations, offsets, int16_scales, int16_maxima, int16_offsets};
}

// A Side and the tables that it points into.
struct OwnedPackedTensor {
    PackedTensor side{};
    std::optional<Table> table, scale, zero, unit;
    std::optional<Array<const uint8_t>> int16;
    std::optional<OwnedStreams> streams;
};

void make_packed_tensor(OwnedPackedTensor* owned, int bits, int codes, bool channel_major, std::optional<Table> table, bool fixed,
               std::optional<Table> scale, std::optional<Table> zero, std::vector<int> ranges, int exact, int outlier,
                std::optional<Array<const uint8_t>> int16, std::optional<Table> unit, int most, const OwnedStreams* streams) {
    new (owned) OwnedPackedTensor{{}, table, scale, zero, unit, int16, streams ? std::optional(*streams) : std::nullopt};
    const int stride = bits <= 4 ? 16 : 256;
    owned->side = PackedTensor{bits,      codes,     stride,    channel_major, fixed,
                      ranges[0], ranges[1], ranges[2], DType(exact), DType(outlier),
                      data_or_null(table), data_or_null(int16), data_or_null(unit), most, data_or_null(scale), data_or_null(zero),
                      owned->streams ? &owned->streams->streams : nullptr};
}

bool uses_int16(const OwnedPackedTensor& owned) { return owned.streams ? owned.streams->streams.uses_int16 : owned.side.int16 != nullptr; }

// A Rotation and the tables that it points into.
struct OwnedRotation {
    Rotation rotation{};
    std::optional<Table> far, near, steps;
    std::optional<Array<const int16_t>> int16;
    std::optional<Array<const int32_t>> lanes;
};

void make_rotation(OwnedRotation* owned, int pairs, bool interleaved, float scaling, std::optional<Table> far, std::optional<Table> near,
                   std::optional<Table> steps, std::optional<Array<const int16_t>> int16, std::optional<Array<const int32_t>> lanes) {
    new (owned) OwnedRotation{{}, far, near, steps, int16, lanes};
    owned->rotation = Rotation{pairs, interleaved, scaling, nullptr, 0, far ? int32_t(far->shape(0)) * kBlock - 1 : 0, data_or_null(far), data_or_null(near), data_or_null(steps),
                              data_or_null(int16), data_or_null(lanes), nullptr};
}

// Streams are those of such heads; of keys they meet elements of a query.
void require_streams(const OwnedPackedTensor& owned, bool keys, int64_t kv_heads, int64_t head_dim) {
    if (!owned.streams) return;
    const auto& query_index = owned.streams->query_index;
    require(owned.streams->streams.coded() <= head_dim, "streams have more coefficients than a head");
    require(!keys || (query_index && int64_t(query_index->shape(0)) == kv_heads && int64_t(query_index->shape(1)) == head_dim), "streams are not those of such keys");
}

// Every table is as large as what will be read of it.
void require_tables(const OwnedPackedTensor& owned, int64_t heads) {
    const PackedTensor& side = owned.side;
    const int64_t codes = heads * side.codes, ranges = int64_t(side.range_heads) * side.range_tokens * side.range_channels;
    const auto holds = [](const std::optional<Table>& table, int64_t floats) { return !table || int64_t(table->size()) >= floats; };
    if (!(side.bits == 16 || side.table || side.streams) || !holds(owned.table, (side.fixed ? codes : 1) * side.stride) || !holds(owned.scale, ranges) ||
        !holds(owned.zero, ranges))
        throw std::invalid_argument("tables are smaller than what is read of them");
}

Tail tail_from(const std::vector<int64_t>& parts) {
    if (parts.size() != 6) throw std::invalid_argument("a tail is six integers");
    return {at<const void>(parts[0]), at<const uint16_t>(parts[1]), at<const uint16_t>(parts[2]), at<const void>(parts[3]), at<const int64_t>(parts[4]), parts[5]};
}

// Of keys, then of values: address, kind, three strides; then how many, and whether keys are yet to be rotated.
ExactTokens exact_from(const std::vector<int64_t>& parts) {
    if (parts.size() != 12) throw std::invalid_argument("exact tokens are twelve integers");
    ExactTokens found{{}, int(parts[10]), parts[11] != 0};
    for (int side = 0; side < 2; ++side) {
        const int64_t* from = &parts[5 * side];
        found.sides[side] = {at<const void>(from[0]), DType(from[1]), {from[2], from[3], from[4]}};
    }
    return found;
}

void make_problem(OwnedProblem* owned, const OwnedPackedTensor& keys, const OwnedPackedTensor& values, const OwnedRotation& rotation, int chunk,
                  const std::vector<int>& shape, int blocks, int64_t tokens, int tail, int64_t stored, uintptr_t output, uintptr_t packed_query,
                  uintptr_t exact_query, const std::vector<std::vector<int64_t>>& exact, const std::vector<int64_t>& keys_tail,
                  const std::vector<int64_t>& values_tail, uintptr_t positions, int64_t position_stride, uintptr_t angles, uintptr_t table,
                  uintptr_t starts, uintptr_t hidden, int hidden_batch, uintptr_t sink_index, int sinks, uintptr_t sink_logits,
                  uintptr_t key_offsets, uintptr_t value_bias, uintptr_t value_matrix, uintptr_t value_mean, int value_rows, float scaling,
                  float softcap) {
    static_assert(sizeof(Block) == 8 * sizeof(int64_t), "a block is eight addresses");
    if (shape.size() != 5) throw std::invalid_argument("a shape is batch, query heads, KV heads, queries and head_dim");
    if (shape[4] > kMostDim) throw std::invalid_argument("heads have at most 512 channels");
    if (2 * rotation.rotation.pairs > shape[4]) throw std::invalid_argument("more channels rotate than a head has");
    require_tables(keys, shape[2]), require_tables(values, shape[2]);
    require_streams(keys, true, shape[2], shape[4]), require_streams(values, false, shape[2], shape[4]);
    Problem problem{};
    problem.batch = shape[0];
    problem.kv_heads = shape[2];
    problem.group = shape[1] / shape[2];
    problem.queries = shape[3];
    problem.head_dim = shape[4];
    problem.blocks = blocks;
    problem.tokens = tokens;
    problem.tail = tail;
    require(exact.size() <= std::size(problem.exact_parts), "there are at most three kinds of exact tokens");
    for (size_t i = 0; i < exact.size(); ++i) problem.exact_parts[i] = exact_from(exact[i]), problem.exact += problem.exact_parts[i].tokens;
    require(sinks <= problem.exact_parts[0].tokens, "sinks are the first exact tokens");
    require(value_rows <= shape[4], "sums of values have more elements than a head");
    problem.sinks = sinks;
    problem.stored = stored;
    problem.hidden_batch = hidden_batch;
    problem.chunk = chunk;
    problem.scaling = scaling;
    problem.softcap = softcap;
    problem.keys = keys.side;
    problem.values = values.side;
    problem.tails[0] = tail_from(keys_tail);
    problem.tails[1] = tail_from(values_tail);
    problem.rotation = rotation.rotation;
    problem.rotation.positions = at<const int32_t>(positions);
    problem.rotation.position_stride = position_stride;
    problem.rotation.angles = at<const float>(angles);
    problem.table = at<const Block>(table);
    problem.starts = at<const int64_t>(starts);
    problem.packed_query = at<const float>(packed_query);
    problem.exact_query = at<const float>(exact_query);
    problem.hidden = at<const uint8_t>(hidden);
    problem.sink_index = at<const int64_t>(sink_index);
    problem.sink_logits = at<const float>(sink_logits);
    problem.key_offsets = at<const float>(key_offsets);
    problem.value_bias = at<const float>(value_bias);
    problem.value_matrix = at<const float>(value_matrix);
    problem.value_mean = at<const float>(value_mean);
    problem.value_rows = value_rows;
    problem.output = at<float>(output);
    const bool int16 = uses_int16(keys) && uses_int16(values) && !keys.streams == !values.streams && (!problem.rotation.pairs || problem.rotation.int16);
    new (owned) OwnedProblem{problem, int16};
}

void attend(const std::string& kernel, int threads, const std::vector<const OwnedProblem*>& owned) {
    Problems problems;
    for (const OwnedProblem* one : owned) {
        require(one, "a problem is missing");
        require_kernel(*one, kernel);
        problems.push_back(&one->problem);
    }
    AttendProblems& attend_all = attention_kernel(kernel);
    nb::gil_scoped_release release;
    attend_all(problems, threads);
}

}  // namespace

void require_kernel(const OwnedProblem& problem, const std::string& kernel) {
    require(kernel != "int16" || problem.int16, "there is no kernel int16 for what is attended to");
    require(kernel != "avx2-int16" || (problem.int16 && problem.problem.keys.streams), "there is no kernel avx2-int16 for what is attended to");
}

AttendProblems& attention_kernel(const std::string& kernel) {
#if defined(__x86_64__)
    if (kernel == "int16") return attend_int16;
    if (kernel == "avx2-int16") return attend_avx2_int16;
    if (kernel == "avx512") return attend_avx512;
    if (kernel == "avx2") return attend_avx2;
#endif
    if (kernel == "generic") return attend_generic;
    throw std::invalid_argument("there is no kernel " + kernel);
}

}  // namespace narrowkv

NB_MODULE(_kernels, module) {
    using namespace narrowkv;
    module.def("instruction_sets", &instruction_sets,
               "Names of the vector instruction sets of this processor that kernels can use, weakest first.");
    define_encode(module);
    nb::class_<OwnedStreams>(module, "Streams", "What all trellis-coded streams of one side have in common.")
        .def("__init__", &make_streams, nb::kw_only(), "counts"_a, "norms"_a, "high"_a, "low"_a, "finer"_a, "query_index"_a.none(),
             "channels"_a.none(), "query_rotations"_a.none(), "offsets"_a.none(), "uses_int16"_a = false,
             "int16_scales"_a.none() = nb::none(), "int16_maxima"_a.none() = nb::none(), "int16_offsets"_a.none() = nb::none());
    nb::class_<OwnedPackedTensor>(module, "PackedTensor", "The keys, or the values, of packed blocks: what all of them have in common.")
        .def("__init__", &make_packed_tensor, nb::kw_only(), "bits"_a, "codes"_a, "channel_major"_a, "table"_a.none(),
             "fixed"_a, "scale"_a.none(), "zero"_a.none(), "ranges"_a, "exact"_a, "outlier"_a, "int16"_a.none(),
             "unit"_a.none(), "most"_a, "streams"_a.none() = nb::none())
        .def_prop_ro("uses_int16", &uses_int16);
    nb::class_<OwnedRotation>(module, "Rotation", "The rotary embedding of keys that are stored without it.")
        .def("__init__", &make_rotation, nb::kw_only(), "pairs"_a = 0, "interleaved"_a = false, "scaling"_a = 1.0f,
             "far"_a.none() = nb::none(), "near"_a.none() = nb::none(), "steps"_a.none() = nb::none(), "int16"_a.none() = nb::none(),
             "lanes"_a.none() = nb::none());
    nb::class_<OwnedProblem>(module, "Problem", "A few queries of some sequences, and what they attend to: blocks, a tail and exact tokens.")
        .def("__init__", &make_problem, nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>(), nb::kw_only(), "keys"_a,
             "values"_a, "rotation"_a, "chunk"_a, "shape"_a, "blocks"_a, "tokens"_a, "tail"_a, "stored"_a, "output"_a, "packed_query"_a,
             "exact_query"_a, "exact"_a, "keys_tail"_a, "values_tail"_a, "positions"_a, "position_stride"_a, "angles"_a, "table"_a, "starts"_a,
             "hidden"_a, "hidden_batch"_a, "sink_index"_a, "sinks"_a, "sink_logits"_a, "key_offsets"_a, "value_bias"_a, "value_matrix"_a,
             "value_mean"_a, "value_rows"_a, "scaling"_a, "softcap"_a);
    module.def("attend", &attend, nb::kw_only(), "kernel"_a, "threads"_a, "problems"_a,
               "Attention of all problems, whose splits fill one parallel region; each is computed as if it were alone.");
    define_pages(module);
}
