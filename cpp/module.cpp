// The compiled part of NarrowKV: what the processor can do, and the kernels.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

#include "nearest.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

template <typename Number, int dimensions>
using Array = nb::ndarray<Number, nb::ndim<dimensions>, nb::c_contig, nb::device::cpu>;

void nearest(Array<const float, 4> numbers, Array<const float, 4> points, Array<uint8_t, 4> found, Array<float, 4> cost,
             int threads) {
    narrowkv::Nearest problem{};
    problem.batch = int64_t(found.shape(0));
    problem.heads = int64_t(points.shape(0));
    problem.tokens = int64_t(found.shape(2));
    problem.levels = int64_t(points.shape(1));
    problem.count = int64_t(points.shape(2));
    problem.codes = int64_t(points.shape(3));
    problem.numbers = numbers.data();
    problem.points = points.data();
    problem.found = found.data();
    problem.cost = cost.data();
    problem.threads = threads;
    nb::gil_scoped_release release;
    narrowkv::nearest(problem);
}

void moments(Array<const float, 3> numbers, Array<const uint8_t, 3> found, Array<double, 4> sums, int threads) {
    narrowkv::Moments problem{};
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
    narrowkv::moments(problem);
}

std::vector<std::string> instruction_sets() {
    std::vector<std::string> found;
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back("avx2");
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")) found.push_back("avx512");
    if (__builtin_cpu_supports("avx512vbmi")) found.push_back("avx512vbmi");
    if (__builtin_cpu_supports("avx512vnni")) found.push_back("avx512vnni");
    if (__builtin_cpu_supports("avx512bf16")) found.push_back("avx512bf16");
#elif defined(__aarch64__)
    found.push_back("neon");
#endif
    return found;
}

}  // namespace

NB_MODULE(_kernels, module) {
    module.def("instruction_sets", &instruction_sets,
               "Names of the vector instruction sets of this processor that kernels can use, weakest first.");
    module.def("nearest", &nearest, "numbers"_a, "points"_a, "found"_a, "cost"_a, "threads"_a,
               "Fill in the nearest point of each code and the squared distance to it; see codec/points.py.");
    module.def("moments", &moments, "numbers"_a, "found"_a, "sums"_a, "threads"_a,
               "Add the moments of all vectors to those of the level that each fell to; see codec/points.py.");
}
