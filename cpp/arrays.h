// How tensors reach the compiled code: tables as arrays, what changes with every step as addresses, since an array takes ten
// times as long to cross over as all of those.

#pragma once

#include <nanobind/ndarray.h>

#include <cstdint>
#include <optional>

namespace narrowkv {

template <typename T, typename... Shape>
using Array = nanobind::ndarray<T, nanobind::device::cpu, nanobind::c_contig, Shape...>;
using Table = Array<const float>;

template <typename T, typename... Shape>
const T* data_or_null(const std::optional<Array<const T, Shape...>>& array) {
    return array ? array->data() : nullptr;
}

template <typename T>
T* at(uint64_t address) {
    return reinterpret_cast<T*>(address);
}

}  // namespace narrowkv
