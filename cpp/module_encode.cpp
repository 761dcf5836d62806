#include "module_encode.h"

#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

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

void require(bool sound, const char* message) {
    if (!sound) throw std::invalid_argument(message);
}

// codes: shape of a buffer's codes, `width` of a token's head. parts: where its codes, scale, zero, outlier_index and
// outlier_values begin. outliers: how many of them count, behind which new ones go, and how many fit.
EncodeBuffer buffer_from(const TensorView& elements, int64_t width, std::array<int64_t, 4> codes, int64_t first, std::array<uint64_t, 5> parts,
                         std::array<int64_t, 2> outliers) {
    require(codes[0] == elements.batch && codes[1] == elements.heads && codes[3] == width, "elements are not those of such a buffer");
    require(first >= 0 && elements.tokens <= codes[2] - first, "elements do not fit the buffer");
    require(outliers[0] >= 0 && outliers[0] <= outliers[1], "more outliers count than there are");
    return {codes[2], first, at<uint8_t>(parts[0]), at<uint16_t>(parts[1]), at<uint16_t>(parts[2]),
            at<int64_t>(parts[3]) + outliers[0], at<uint16_t>(parts[4]) + outliers[0], outliers[1] - outliers[0]};
}

// A Codec and the tables that it points into.
struct OwnedCodec {
    Codec codec{};
    Table boundaries;
    std::optional<Table> scale, zero, lower, upper;
};

void make_codec(OwnedCodec* owned, int sharing, int64_t group, double outliers, Table boundaries,
                std::optional<Table> scale, std::optional<Table> zero, std::optional<Table> lower, std::optional<Table> upper) {
    new (owned) OwnedCodec{{}, boundaries, scale, zero, lower, upper};
    owned->codec = Codec{Sharing(sharing),    group,
                         outliers,            int64_t(boundaries.size()),
                         boundaries.data(),   data_or_null(scale),
                         data_or_null(zero),  data_or_null(lower),
                         data_or_null(upper)};
}

// What ranges learned offline are read of is there, for this many channels of all heads.
void require_tables(const OwnedCodec& owned, int64_t channels) {
    if (owned.codec.sharing != Sharing::fixed) return;
    const auto holds = [&](const std::optional<Table>& table) { return table && int64_t(table->size()) >= channels; };
    if (!holds(owned.scale) || !holds(owned.zero) || (owned.codec.outliers > 0 && (!holds(owned.lower) || !holds(owned.upper))))
        throw std::invalid_argument("tables are smaller than what is read of them");
}

int64_t encode_tokens(const OwnedCodec& owned, int kind, uint64_t data, std::array<int64_t, 4> shape, std::array<int64_t, 4> strides,
                      uint64_t skip, std::array<int64_t, 4> codes, int64_t first, std::array<uint64_t, 5> parts,
                      std::array<int64_t, 2> outliers, int threads) {
    const TensorView elements = view_from(kind, data, shape, strides);
    const EncodeBuffer buffer = buffer_from(elements, elements.dim, codes, first, parts, outliers);
    require_tables(owned, shape[1] * shape[3]);
    nb::gil_scoped_release release;
    return encode(owned.codec, elements, at<const uint8_t>(skip), buffer, threads);
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
                    std::array<int64_t, 3> shape, std::array<int64_t, kMostRate> counts, int threads) {
    const Trellis problem{shape[0],           shape[1],  counts, at<const int16_t>(elements), at<const uint16_t>(weights), shape[2] > 1,
                          at<const int8_t>(high), at<const int8_t>(low), at<uint8_t>(codes), threads};
    nb::gil_scoped_release release;
    if (kernel == "generic") return encode_trellis_generic(problem);
#if defined(__x86_64__)
    if (kernel == "avx2") return encode_trellis_avx2(problem);
    if (kernel == "avx512") return encode_trellis_avx512(problem);
#endif
    throw std::invalid_argument("no kernel of this name");
}

// shape: rows, bytes from one to the next, elements of a row. counts: units of each rate from 1 on.
void decode_streams(uint64_t codes, uint64_t levels, uint64_t elements, std::array<int64_t, 3> shape, std::array<int64_t, kMostRate> counts,
                    int threads) {
    int64_t n = 0, bytes = 0;
    for (int k = 1; k <= kMostRate; ++k) n += counts[size_t(k - 1)] * kUnit, bytes += counts[size_t(k - 1)] * k;
    require(*std::min_element(counts.begin(), counts.end()) >= 0 && n == shape[2] && bytes <= shape[1], "streams are not of these rates");
    nb::gil_scoped_release release;
    decode_trellis({shape[0], shape[1], n, counts, at<const uint8_t>(codes), at<const float>(levels), at<float>(elements), threads});
}

template <typename Part>
bool holds(const std::optional<Part>& part, int64_t elements) {
    return !part || int64_t(part->size()) == elements;
}

bool are_indices(const std::optional<Array<const int32_t>>& index, int64_t dim) {
    return !index || std::all_of(index->data(), index->data() + index->size(), [&](int32_t i) { return i >= 0 && i < dim; });
}

// Nothing is read beyond what these sizes tell.
void make_stream_codec(OwnedStreamCodec* owned, std::array<int64_t, kMostRate> counts, Array<const int8_t> high, Array<const int8_t> low,
                       Array<const float, nb::ndim<2>> mean, Table steps, Table scales, Table weight, Array<const int32_t> search_weight,
                       std::optional<Array<const int32_t>> channels, std::optional<Array<const double>> turns, std::optional<Array<const double>> pairs,
                       std::optional<Array<const int32_t>> order, std::optional<Table> matrix, std::optional<Table> norms, float threshold, int64_t most) {
    StreamCodec codec{};
    codec.heads = int64_t(mean.shape(0)), codec.dim = int64_t(mean.shape(1)), codec.counts = counts;
    for (int k = 1; k <= kMostRate; ++k) {
        const int64_t units = counts[size_t(k - 1)];
        require(units >= 0 && units <= codec.dim / kUnit, "streams have more units than a head");
        codec.n += units * kUnit, codec.bytes += units * k;
    }
    const int64_t heads = codec.heads, dim = codec.dim, n = codec.n;
    require(n <= dim && dim % 2 == 0, "streams have more coefficients than a head");
    require(int64_t(high.size()) == kMostRate * 16 && high.size() == low.size(), "tables of streams are [6, 16]");
    require(int64_t(steps.size()) == n && int64_t(scales.size()) == n && int64_t(weight.size()) == heads * n && int64_t(search_weight.size()) == heads * n,
            "tables are smaller than what is read of them");
    require(!channels == !turns && holds(channels, dim) && holds(turns, kFrame * dim) && are_indices(channels, dim), "rotations do not fit a head");
    require(!pairs == !order && !pairs == !!matrix && holds(pairs, heads * 2 * dim) && holds(order, heads * n) && are_indices(order, dim) && holds(matrix, heads * n * dim),
            "what makes coefficients does not fit a head");
    require(holds(norms, kNorms), "norms have 256 codes");
    new (owned) OwnedStreamCodec{codec, high, low, Table(mean), steps, scales, weight, channels, order, turns, pairs, matrix, norms, {}};
    owned->search_weight.assign(search_weight.data(), search_weight.data() + search_weight.size());
    codec.high = high.data(), codec.low = low.data(), codec.mean = mean.data();
    codec.channels = data_or_null(channels), codec.turns = data_or_null(turns), codec.pairs = data_or_null(pairs);
    codec.order = data_or_null(order), codec.matrix = data_or_null(matrix), codec.norms = data_or_null(norms);
    codec.steps = steps.data(), codec.scales = scales.data(), codec.weight = weight.data(), codec.search_weight = owned->search_weight.data();
    codec.threshold = threshold, codec.most = most;
    owned->codec = codec;
}

// Returns both of StreamCounts.
std::array<int64_t, 2> encode_stream_tokens(const OwnedStreamCodec& owned, const std::string& kernel, int kind, uint64_t data, std::array<int64_t, 4> shape,
                             std::array<int64_t, 4> strides, uint64_t skip, std::array<int64_t, 4> codes, int64_t first, std::array<uint64_t, 5> parts,
                             std::array<int64_t, 2> outliers, bool halves, int threads) {
    const StreamCodec& codec = owned.codec;
    const TensorView elements = view_from(kind, data, shape, strides);
    require(shape[1] == codec.heads && shape[3] == codec.dim, "elements are not those of such streams");
    const EncodeBuffer buffer = buffer_from(elements, codec.bytes + (codec.norms ? 1 : 0), codes, first, parts, outliers);
    const int64_t* index = at<const int64_t>(parts[3]);
    std::vector<int32_t> stored_outliers;
    if (first > 0 && codec.most > 0) {
        stored_outliers.resize(size_t(shape[0] * codec.heads));
        for (int64_t i = 0; i < outliers[0]; ++i) {
            const int64_t sequence = index[i] / (buffer.tokens * codec.n);
            require(sequence >= 0 && sequence < int64_t(stored_outliers.size()), "an outlier lies outside the buffer");
            ++stored_outliers[size_t(sequence)];
        }
    }
    EncodeStreams& encode = stream_encoder(kernel);
    nb::gil_scoped_release release;
    const StreamCounts found = encode(codec, elements, at<const uint8_t>(skip), buffer, stored_outliers.empty() ? nullptr : stored_outliers.data(), nullptr, halves, threads);
    return {found.outliers, found.out_of_range};
}

}  // namespace

EncodeStreams& stream_encoder(const std::string& kernel) {
#if defined(__x86_64__)
    if (kernel == "avx512") return encode_streams_avx512;
    if (kernel == "avx2") return encode_streams_avx2;
#endif
    if (kernel == "generic") return encode_streams_generic;
    throw std::invalid_argument("no kernel of this name");
}

void define_encode(nb::module_& module) {
    nb::class_<OwnedCodec>(module, "Codec", "What is the same for all tokens that a quantizer encodes; see codec/cpu/encode.py.")
        .def("__init__", &make_codec, nb::kw_only(), "sharing"_a, "group"_a, "outliers"_a, "boundaries"_a,
             "scale"_a.none(), "zero"_a.none(), "lower"_a.none(), "upper"_a.none())
        .def("encode", &encode_tokens, "kind"_a, "data"_a, "shape"_a, "strides"_a, "skip"_a, "codes"_a, "first"_a, "parts"_a,
             "outliers"_a, "threads"_a, "Write codes, ranges and outliers of new tokens to their buffer; see codec/cpu/encode.py.");
    nb::class_<OwnedStreamCodec>(module, "StreamCodec", "What is the same for all tokens that become trellis-coded streams; see codec/cpu/encode_streams.py.")
        .def("__init__", &make_stream_codec, nb::kw_only(), "counts"_a, "high"_a, "low"_a, "mean"_a, "steps"_a, "scales"_a, "weight"_a,
             "search_weight"_a, "channels"_a.none(), "turns"_a.none(), "pairs"_a.none(), "order"_a.none(), "matrix"_a.none(), "norms"_a.none(),
             "threshold"_a, "most"_a)
        .def("encode", &encode_stream_tokens, "kernel"_a, "kind"_a, "data"_a, "shape"_a, "strides"_a, "skip"_a, "codes"_a, "first"_a, "parts"_a,
             "outliers"_a, "halves"_a, "threads"_a, "Write codes and outliers of new tokens to their buffer; see codec/cpu/encode_streams.py.");
    module.def("all_finite", &are_finite, "kind"_a, "data"_a, "shape"_a, "strides"_a, "threads"_a,
               "Whether no element is NaN or infinite.");
    module.def("encode_trellis", &encode_trellis, "kernel"_a, "elements"_a, "weights"_a, "high"_a, "low"_a, "codes"_a, "shape"_a,
               "counts"_a, "threads"_a, "Write the bit stream of least cost of each row; see codec/trellis.py.");
    module.def("decode_streams", &decode_streams, "codes"_a, "levels"_a, "elements"_a, "shape"_a, "counts"_a, "threads"_a,
               "Write what streams stand for; see codec/trellis.py.");
    module.def("pack", &pack_plane, "codes"_a, "shape"_a, "strides"_a, "bits"_a, "shift"_a, "packed"_a, "threads"_a,
               "Write one plane of codes; see codec/packing.py.");
}

}  // namespace narrowkv
