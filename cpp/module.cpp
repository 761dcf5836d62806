// The compiled part of NarrowKV: what the processor can do, and the kernels.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "attention.h"
#include "module_encode.h"
#include "nearest.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace narrowkv {
namespace {

template <typename T, typename... Shape>
using Array = nb::ndarray<T, nb::device::cpu, nb::c_contig, Shape...>;
using Table = Array<const float>;
using Heads = Array<const float, nb::ndim<4>>;

template <typename T>
const T* data_or_null(const std::optional<Array<const T>>& array) {
    return array ? array->data() : nullptr;
}

void add_moments(Array<const float, nb::ndim<3>> numbers, Array<const uint8_t, nb::ndim<3>> found,
                 Array<double, nb::ndim<4>> sums, int threads) {
    Moments problem{};
    problem.heads = int64_t(found.shape(0));
    problem.tokens = int64_t(found.shape(1));
    problem.codes = int64_t(found.shape(2));
    problem.levels = int64_t(sums.shape(1));
    problem.count = int64_t(numbers.shape(2)) / problem.codes;
    problem.numbers = numbers.data();
    problem.found = found.data();
    problem.sums = sums.data();
    problem.threads = threads;
    nb::gil_scoped_release release;
    moments(problem);
}

std::vector<std::string> instruction_sets() {
    std::vector<std::string> found;
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) found.push_back("avx2");
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (wide) found.push_back("avx512");
    if (__builtin_cpu_supports("avx512vbmi")) found.push_back("avx512vbmi");
    if (__builtin_cpu_supports("avx512vnni")) found.push_back("avx512vnni");
    if (__builtin_cpu_supports("avx512bf16")) found.push_back("avx512bf16");
#elif defined(__aarch64__)
    found.push_back("neon");
#endif
    return found;
}

Number number_from(const std::string& dtype) {
    if (dtype == "float16") return Number::half;
    if (dtype == "bfloat16") return Number::bfloat;
    if (dtype == "float32") return Number::single;
    throw std::invalid_argument("numbers are float16, bfloat16 or float32, not " + dtype);
}

// A Side and the tables that it points into.
struct HeldSide {
    Side side{};
    std::optional<Table> table, scale, zero, unit;
    std::optional<Array<const uint8_t>> words;
};

void make_side(HeldSide* held, int bits, int codes, int numbers, bool channel_major, std::optional<Table> table, bool fixed,
               std::optional<Table> scale, std::optional<Table> zero, std::vector<int> ranges, const std::string& exact,
               const std::string& outlier, std::optional<Array<const uint8_t>> words, std::optional<Table> unit, int most) {
    new (held) HeldSide{{}, table, scale, zero, unit, words};
    const int stride = bits <= 4 ? 16 : bits >= 7 ? 256 : 1 << bits;
    held->side = Side{bits,      codes,     numbers,   stride, channel_major, fixed,
                      ranges[0], ranges[1], ranges[2], number_from(exact), number_from(outlier),
                      data_or_null(table), data_or_null(words), data_or_null(unit), most, data_or_null(scale), data_or_null(zero)};
}

// A Rotation and the tables that it points into.
struct HeldRotation {
    Rotation rotation{};
    std::optional<nb::ndarray<const int32_t, nb::device::cpu, nb::ndim<2>>> positions;
    std::optional<Table> far, near, steps, angles;
    std::optional<Array<const int16_t>> words;
};

void make_rotation(HeldRotation* held, int pairs, bool interleaved, float scaling, decltype(HeldRotation::positions) positions,
                   std::optional<Table> far, std::optional<Table> near, std::optional<Table> steps,
                   std::optional<Array<const int16_t>> words, std::optional<Table> angles) {
    new (held) HeldRotation{{}, positions, far, near, steps, angles, words};
    held->rotation = Rotation{pairs, interleaved, scaling, positions ? positions->data() : nullptr,
                              positions ? positions->stride(0) : 0,
                              data_or_null(far), data_or_null(near), data_or_null(steps),
                              data_or_null(words), data_or_null(angles)};
}

void attend(const std::string& kernel, int threads, int chunk, Array<float, nb::ndim<5>> output, Heads packed_query,
            Heads dense_query, Heads dense_keys, Heads dense_values, const HeldSide& keys, const HeldSide& values,
            const HeldRotation& rotation, Array<const int64_t, nb::ndim<4>> table, Array<const int64_t, nb::ndim<1>> starts,
            int64_t tokens, std::optional<Array<const bool>> hidden, std::optional<Array<const int64_t>> sink_index,
            std::optional<Table> sink_logits, float scaling, float softcap) {
    static_assert(sizeof(Block) == 8 * sizeof(int64_t), "a block is eight addresses");
    Problem problem{};
    problem.batch = int(packed_query.shape(0));
    problem.kv_heads = int(dense_keys.shape(1));
    problem.group = int(packed_query.shape(1)) / problem.kv_heads;
    problem.queries = int(packed_query.shape(2));
    problem.head_dim = int(packed_query.shape(3));
    problem.blocks = int(table.shape(0));
    problem.dense = int(dense_keys.shape(2));
    problem.tokens = tokens;
    problem.sinks = sink_index ? int(sink_index->shape(1)) : 0;
    problem.hidden_batch = hidden ? int(hidden->shape(0)) : 0;
    problem.chunk = chunk;
    problem.threads = threads;
    problem.scaling = scaling;
    problem.softcap = softcap;
    problem.keys = keys.side;
    problem.values = values.side;
    problem.rotation = rotation.rotation;
    problem.table = reinterpret_cast<const Block*>(table.data());
    problem.starts = starts.data();
    problem.packed_query = packed_query.data();
    problem.dense_query = dense_query.data();
    problem.dense_keys = dense_keys.data();
    problem.dense_values = dense_values.data();
    problem.hidden = hidden ? reinterpret_cast<const uint8_t*>(hidden->data()) : nullptr;
    problem.sink_index = data_or_null(sink_index);
    problem.sink_logits = data_or_null(sink_logits);
    problem.output = output.data();
    nb::gil_scoped_release release;
#if defined(__x86_64__)
    const bool words = keys.side.words && values.side.words && (!problem.rotation.pairs || problem.rotation.words);
    if (kernel == "words" && words) return attend_words(problem);
    if (kernel == "avx512") return attend_avx512(problem);
    if (kernel == "avx2") return attend_avx2(problem);
#endif
    if (kernel == "generic") return attend_generic(problem);
    throw std::invalid_argument("there is no kernel " + kernel);
}

}  // namespace
}  // namespace narrowkv

NB_MODULE(_kernels, module) {
    using namespace narrowkv;
    module.def("instruction_sets", &instruction_sets,
               "Names of the vector instruction sets of this processor that kernels can use, weakest first.");
    module.def("moments", &add_moments, "numbers"_a, "found"_a, "sums"_a, "threads"_a,
               "Add the moments of all vectors to those of the level that each fell to; see codec/points.py.");
    define_encode(module);
    nb::class_<HeldSide>(module, "Side", "The keys, or the values, of packed blocks: what all of them have in common.")
        .def("__init__", &make_side, nb::kw_only(), "bits"_a, "codes"_a, "numbers"_a, "channel_major"_a, "table"_a.none(),
             "fixed"_a, "scale"_a.none(), "zero"_a.none(), "ranges"_a, "exact"_a, "outlier"_a, "words"_a.none(),
             "unit"_a.none(), "most"_a)
        .def_prop_ro("in_words", [](const HeldSide& held) { return held.side.words != nullptr; });
    nb::class_<HeldRotation>(module, "Rotation", "The rotary embedding of keys that are stored without it.")
        .def("__init__", &make_rotation, nb::kw_only(), "pairs"_a = 0, "interleaved"_a = false, "scaling"_a = 1.0f,
             "positions"_a.none() = nb::none(), "far"_a.none() = nb::none(), "near"_a.none() = nb::none(), "steps"_a.none() = nb::none(),
             "words"_a.none() = nb::none(), "angles"_a.none() = nb::none());
    module.def("attend", &attend, nb::kw_only(), "kernel"_a, "threads"_a, "chunk"_a, "output"_a, "packed_query"_a,
               "dense_query"_a, "dense_keys"_a, "dense_values"_a, "keys"_a, "values"_a, "rotation"_a, "table"_a, "starts"_a,
               "tokens"_a, "hidden"_a.none(), "sink_index"_a.none(), "sink_logits"_a.none(), "scaling"_a, "softcap"_a,
               "Attention of a few queries over packed blocks and the exact tokens that follow them.");
}
