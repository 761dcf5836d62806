// Loops whose steps are known when they are compiled: arrays that are indexed by them become registers.

#pragma once

#include <type_traits>
#include <utility>

#define NARROWKV_INLINE __attribute__((always_inline))

namespace narrowkv {
namespace {

// Run `part` for 0 to n - 1 as types.
template <typename Part, int... i>
NARROWKV_INLINE inline void each(const Part& part, std::integer_sequence<int, i...>) {
    (part(std::integral_constant<int, i>()), ...);
}

template <int n, typename Part>
NARROWKV_INLINE inline void each(const Part& part) {
    each(part, std::make_integer_sequence<int, n>());
}

}  // namespace
}  // namespace narrowkv
