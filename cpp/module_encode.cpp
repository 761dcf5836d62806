#include "module_encode.h"

#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <array>
#include <optional>
#include <stdexcept>
#include <string>

#include "arrays.h"
#include "encode.h"
#include "pack.h"
#include "trellis.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace narrowkv {
namespace {

TensorView view_from(int kind, uint64_t data, std::array<int64_t, 4> shape, std::array<int64_t, 4> strides) {
    return {DType(kind), at<const void>(data), shape[0], shape[1], shape[2], shape[3], strides[0], strides[1], strides[2]};
}

// A Codec and the tables that it points into.
struct HeldCodec {
    Codec codec{};
    Table boundaries;
    std::optional<Table> scale, zero, lower, upper;
};

void make_codec(HeldCodec* held, int sharing, int64_t group, double outliers, Table boundaries,
                std::optional<Table> scale, std::optional<Table> zero, std::optional<Table> lower, std::optional<Table> upper) {
    new (held) HeldCodec{{}, boundaries, scale, zero, lower, upper};
    held->codec = Codec{Sharing(sharing),    group,
                        outliers,            int64_t(boundaries.size()),
                        boundaries.data(),   data_or_null(scale),
                        data_or_null(zero),  data_or_null(lower),
                        data_or_null(upper)};
}

// What ranges learned offline are read of is there, for this many channels of all heads.
void require_tables(const HeldCodec& held, int64_t channels) {
    if (held.codec.sharing != Sharing::fixed) return;
    const auto holds = [&](const std::optional<Table>& table) { return table && int64_t(table->size()) >= channels; };
    if (!holds(held.scale) || !holds(held.zero) || (held.codec.outliers > 0 && (!holds(held.lower) || !holds(held.upper))))
        throw std::invalid_argument("tables are smaller than what is read of them");
}

int64_t encode_tokens(const HeldCodec& held, int kind, uint64_t data, std::array<int64_t, 4> shape, std::array<int64_t, 4> strides,
                      uint64_t skip, int64_t tokens, int64_t first, std::array<uint64_t, 5> parts, int64_t outlier_capacity,
                      int threads) {
    const EncodeBuffer buffer{tokens,
                    first,
                    at<uint8_t>(parts[0]),
                    at<uint16_t>(parts[1]),
                    at<uint16_t>(parts[2]),
                    at<int64_t>(parts[3]),
                    at<uint16_t>(parts[4]),
                    outlier_capacity};
    const TensorView elements = view_from(kind, data, shape, strides);
    require_tables(held, shape[1] * shape[3]);
    nb::gil_scoped_release release;
    return encode(held.codec, elements, at<const uint8_t>(skip), buffer, threads);
}

bool are_finite(int kind, uint64_t data, std::array<int64_t, 4> shape, std::array<int64_t, 4> strides, int threads) {
    const TensorView elements = view_from(kind, data, shape, strides);
    nb::gil_scoped_release release;
    return all_finite(elements, threads);
}

void pack_plane(uint64_t codes, std::array<int64_t, 3> shape, std::array<int64_t, 3> strides, int bits, int shift, uint64_t packed,
                int threads) {
    const Packing problem{shape[0],   shape[1],   shape[2], strides[0], strides[1], strides[2], bits, shift, at<const uint8_t>(codes),
                          at<uint8_t>(packed)};
    nb::gil_scoped_release release;
    pack(problem, threads);
}

// shape: heads, rows, rows of weights. counts: units of each rate from 1 on.
void encode_trellis(const std::string& kernel, uint64_t elements, uint64_t weights, uint64_t high, uint64_t low, uint64_t codes,
                    std::array<int64_t, 3> shape, std::array<int64_t, MOST_RATE> counts, int threads) {
    const Trellis problem{shape[0],           shape[1],  counts, at<const int16_t>(elements), at<const uint16_t>(weights), shape[2] > 1,
                          at<const int8_t>(high), at<const int8_t>(low), at<uint8_t>(codes), threads};
    nb::gil_scoped_release release;
    if (kernel == "generic") return encode_trellis_generic(problem);
#if defined(__x86_64__)
    if (kernel == "avx2") return encode_trellis_avx2(problem);
#endif
    throw std::invalid_argument("no kernel of this name");
}

}  // namespace

void define_encode(nb::module_& module) {
    nb::class_<HeldCodec>(module, "Codec", "What is the same for all tokens that a quantizer encodes; see codec/cpu/encode.py.")
        .def("__init__", &make_codec, nb::kw_only(), "sharing"_a, "group"_a, "outliers"_a, "boundaries"_a,
             "scale"_a.none(), "zero"_a.none(), "lower"_a.none(), "upper"_a.none())
        .def("encode", &encode_tokens, "kind"_a, "data"_a, "shape"_a, "strides"_a, "skip"_a, "tokens"_a, "first"_a, "parts"_a,
             "outlier_capacity"_a, "threads"_a, "Write codes, ranges and outliers of new tokens to their buffer; see codec/cpu/encode.py.");
    module.def("all_finite", &are_finite, "kind"_a, "data"_a, "shape"_a, "strides"_a, "threads"_a,
               "Whether no element is NaN or infinite.");
    module.def("encode_trellis", &encode_trellis, "kernel"_a, "elements"_a, "weights"_a, "high"_a, "low"_a, "codes"_a, "shape"_a,
               "counts"_a, "threads"_a, "Write the bit stream of least cost of each row; see codec/trellis.py.");
    module.def("pack", &pack_plane, "codes"_a, "shape"_a, "strides"_a, "bits"_a, "shift"_a, "packed"_a, "threads"_a,
               "Write one plane of codes; see codec/packing.py.");
}

}  // namespace narrowkv
