// What of the module concerns quantizing.

#pragma once

#include <nanobind/nanobind.h>

#include <optional>
#include <string>
#include <vector>

#include "arrays.h"
#include "stream_encode.h"

namespace narrowkv {

// A StreamCodec and the tables that it points into.
struct OwnedStreamCodec {
    StreamCodec codec{};
    Array<const int8_t> high, low;
    Table mean, steps, scales, weight;
    std::optional<Array<const int32_t>> channels, order;
    std::optional<Array<const double>> turns, pairs;
    std::optional<Table> matrix, norms;
    std::vector<uint16_t> search_weight;
};

// That of a name; raises std::invalid_argument where there is none.
EncodeStreams& stream_encoder(const std::string& kernel);

void define_encode(nanobind::module_& module);

}  // namespace narrowkv
