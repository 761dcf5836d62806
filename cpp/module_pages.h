// What of the module concerns pages of an engine's memory.

#pragma once

#include <nanobind/nanobind.h>

namespace narrowkv {

void define_pages(nanobind::module_& module);

}  // namespace narrowkv
