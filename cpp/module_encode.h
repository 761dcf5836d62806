// What of the module concerns quantizing.

#pragma once

#include <nanobind/nanobind.h>

namespace narrowkv {

void define_encode(nanobind::module_& module);

}  // namespace narrowkv
