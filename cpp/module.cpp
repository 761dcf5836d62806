// The compiled part of NarrowKV. It says which instruction sets this processor has, by which CPU kernels are chosen.

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

namespace {

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
}
