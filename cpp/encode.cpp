// Three passes: ranges, codes, outliers. The compiler writes the loops over channels for each instruction set.
// Products and sums are not fused, so that codes are exactly those of the plain reference in `codec/quantizers/scalar.py`.

#include "encode.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "encode_loops.h"

namespace narrowkv {
namespace {

// One call of encode: what the passes share.
class Encoder {
public:
    Encoder(const Codec& codec, const TensorView& elements, const uint8_t* skip, const EncodeBuffer& buffer)
        : codec(codec), elements(elements), skip(skip), buffer(buffer) {
        together = codec.sharing == Sharing::channel ? codec.group : 1;
        range_heads = codec.sharing == Sharing::token ? 1 : elements.heads;
        width = codec.sharing == Sharing::channel ? elements.dim : codec.group ? elements.dim / codec.group : 1;
        steps = elements.tokens / together;
        padded_dim = (elements.dim + kLanes - 1) / kLanes * kLanes;
        if (codec.sharing != Sharing::fixed) low.resize(size_t(elements.batch * range_heads * steps * width)), high = low;
        else spread_fixed();
        if (codec.outliers > 0) counts.resize(size_t(elements.batch * elements.heads * elements.tokens));
    }

    int64_t run(int threads) {
        if (codec.sharing != Sharing::fixed) {
#pragma omp parallel for collapse(2) num_threads(threads)
            for (int64_t row = 0; row < elements.batch * range_heads; ++row)
                for (int64_t step = 0; step < steps; ++step) find_ranges(row / range_heads, row % range_heads, step);
            if (!fits) return kDoesNotFit;
        }
#pragma omp parallel for collapse(2) num_threads(threads)
        for (int64_t row = 0; row < elements.batch * elements.heads; ++row)
            for (int64_t step = 0; step < steps; ++step) write_codes(row / elements.heads, row % elements.heads, step);
        return codec.outliers > 0 ? write_outliers() : 0;
    }

private:
    const Codec& codec;
    const TensorView& elements;
    const uint8_t* skip;
    const EncodeBuffer& buffer;
    int64_t together, range_heads, width, steps;  // of tokens that are encoded at once
    int64_t padded_dim;                             // head_dim, rounded up to whole kLanes
    std::vector<float> fixed;                     // [heads, 2, padded_dim], zeros and inverse scales
    std::vector<float> low, high;                 // [batch, range_heads, steps, width], online thresholds
    std::vector<int32_t> counts;                  // [batch, heads, tokens], outliers
    std::atomic<bool> fits{true};

    bool skipped(int64_t row, int64_t token) const { return skip && skip[row * elements.tokens + token]; }

    void spread_fixed() {
        const int64_t dim = elements.dim;
        fixed.resize(size_t(2 * elements.heads * padded_dim));
        for (int64_t head = 0; head < elements.heads; ++head) {
            float *zero = fixed.data() + 2 * head * padded_dim, *inverse = zero + padded_dim;
            std::copy_n(codec.zero + head * dim, dim, zero);
            std::copy_n(codec.scale + head * dim, dim, inverse);
            invert(inverse, dim);
        }
    }

    void find_ranges(int64_t row, int64_t head, int64_t step) {
        const int64_t offset = ((row * range_heads + head) * steps + step) * width;
        float* lower = low.data() + offset;
        float* upper = high.data() + offset;
        if (codec.sharing == Sharing::channel)
            ends_of_channels(row, head, step, lower, upper);
        else
            ends_of_token(row, head, step, lower, upper);
        const int64_t capacity_steps = buffer.tokens / together, at = buffer.at / together + step;
        const int64_t buffer_offset = ((row * range_heads + head) * capacity_steps + at) * width;
        for (int64_t c = 0; c < width; ++c) {
            // of a group in which all tokens are left out
            if (!(lower[c] <= upper[c]) || std::isinf(lower[c]) || std::isinf(upper[c])) lower[c] = upper[c] = 0;
            buffer.scale[buffer_offset + c] = half_from_single((upper[c] - lower[c]) / 2);
            buffer.zero[buffer_offset + c] = half_from_single((upper[c] + lower[c]) / 2);
            if (!is_finite_half(buffer.scale[buffer_offset + c]) || !is_finite_half(buffer.zero[buffer_offset + c])) fits = false;
        }
    }

    void ends_of_channels(int64_t row, int64_t head, int64_t step, float* lower, float* upper) {
        float* x = scratch_of(elements.dim);
        std::fill_n(lower, elements.dim, kInfinite);
        std::fill_n(upper, elements.dim, -kInfinite);
        for (int64_t token = step * together; token < (step + 1) * together; ++token) {
            if (skipped(row, token)) continue;
            load(elements.kind, row_of(elements, row, head, token), elements.dim, x);
            widen(x, elements.dim, lower, upper);
        }
    }

    void ends_of_token(int64_t row, int64_t head, int64_t token, float* lower, float* upper) {
        const int64_t heads = elements.heads / range_heads, dim = elements.dim;
        float* x = scratch_of(heads * dim);
        for (int64_t h = 0; h < heads; ++h) load(elements.kind, row_of(elements, row, head + h, token), dim, x + h * dim);
        const int64_t vector = heads * dim / width, per_tail = int64_t(double(vector) * codec.outliers / 2 + 0.5);
        for (int64_t c = 0; c < width; ++c) find_ends(x + c * vector, vector, per_tail, lower + c, upper + c);
    }

    // What holds for a channel of a head at a step: from [width] elements of its range.
    template <typename Get>
    void spread(float* to, Get get) const {
        const int64_t each = elements.dim / width;
        for (int64_t c = 0; c < width; ++c) std::fill_n(to + c * each, each, get(c));
    }

    struct Thresholds {
        const float* lower;
        const float* upper;
    };

    Thresholds thresholds(int64_t row, int64_t head, int64_t step, float* scratch) const {
        const int64_t dim = elements.dim;
        if (codec.sharing == Sharing::fixed) return {codec.lower + head * dim, codec.upper + head * dim};
        const int64_t offset = ((row * range_heads + head % range_heads) * steps + step) * width;
        spread(scratch, [&](int64_t c) { return low[size_t(offset + c)]; });
        spread(scratch + dim, [&](int64_t c) { return high[size_t(offset + c)]; });
        return {scratch, scratch + dim};
    }

    void write_codes(int64_t row, int64_t head, int64_t step) {
        const int64_t dim = elements.dim, sequence = row * elements.heads + head;
        float *x = scratch_of(5 * padded_dim), *online = x + padded_dim;
        const float *zero = online, *inverse = zero + padded_dim;
        if (codec.sharing == Sharing::fixed) {
            zero = fixed.data() + 2 * head * padded_dim, inverse = zero + padded_dim;
        } else {
            const int64_t at = buffer.at / together + step, capacity_steps = buffer.tokens / together;
            const int64_t buffer_offset = ((row * range_heads + head % range_heads) * capacity_steps + at) * width;
            spread(online, [&](int64_t c) { return single_from_half(buffer.zero[buffer_offset + c]); });
            spread(online + padded_dim, [&](int64_t c) { return single_from_half(buffer.scale[buffer_offset + c]); });
            invert(online + padded_dim, dim);
        }
        Thresholds outside{};
        if (codec.outliers > 0) outside = thresholds(row, head, step, online + 2 * padded_dim);
        for (int64_t token = step * together; token < (step + 1) * together; ++token) {
            load(elements.kind, row_of(elements, row, head, token), dim, x);
            quantize(x, zero, inverse, codec.boundaries, codec.boundary_count, dim,
                     buffer.codes + (sequence * buffer.tokens + buffer.at + token) * dim);
            if (codec.outliers > 0)
                counts[size_t(sequence * elements.tokens + token)] =
                    skipped(row, token) ? 0 : count_outside(x, outside.lower, outside.upper, dim);
        }
    }

    int64_t write_outliers() {
        int64_t found = 0;
        for (int32_t count : counts) found += count;
        if (found > buffer.outlier_capacity) return found;
        const int64_t dim = elements.dim;
        float* x = scratch_of(3 * dim);
        std::vector<uint8_t> marks;
        marks.resize(size_t(dim));
        int64_t next = 0;
        for (int64_t i = 0; i < int64_t(counts.size()); ++i) {
            if (counts[size_t(i)] == 0) continue;
            const int64_t sequence = i / elements.tokens, token = i % elements.tokens;
            const int64_t row = sequence / elements.heads, head = sequence % elements.heads;
            const Thresholds outside = thresholds(row, head, token / together, x + dim);
            const char* from = row_of(elements, row, head, token);
            load(elements.kind, from, dim, x);
            mark_outside(x, outside.lower, outside.upper, dim, marks.data());
            const int64_t first = (sequence * buffer.tokens + buffer.at + token) * dim;
            const auto next_marked = [&](int64_t c) -> int64_t {
                const void* found = c < dim ? std::memchr(marks.data() + c, 1, size_t(dim - c)) : nullptr;
                return found ? static_cast<const uint8_t*>(found) - marks.data() : dim;
            };
            for (int64_t c = next_marked(0); c < dim; c = next_marked(c + 1)) {
                buffer.outlier_index[next] = first + c;
                buffer.outlier_values[next++] = exact(from, c, x[c]);
            }
        }
        return fits ? found : kDoesNotFit;
    }

    // An element as it is stored alongside codes.
    uint16_t exact(const char* from, int64_t channel, float element) {
        if (elements.kind != DType::single) return reinterpret_cast<const uint16_t*>(from)[channel];
        const uint16_t rounded = half_from_single(element);
        if (!is_finite_half(rounded)) fits = false;
        return rounded;
    }
};

}  // namespace

int64_t encode(const Codec& codec, const TensorView& elements, const uint8_t* skip, const EncodeBuffer& buffer, int threads) {
    return Encoder(codec, elements, skip, buffer).run(threads);
}

bool all_finite(const TensorView& elements, int threads) {
    std::atomic<bool> finite{true};
#pragma omp parallel for collapse(2) num_threads(threads)
    for (int64_t row = 0; row < elements.batch * elements.heads; ++row)
        for (int64_t token = 0; token < elements.tokens; ++token)
            if (!finite_row(elements.kind, row_of(elements, row / elements.heads, row % elements.heads, token), elements.dim))
                finite = false;
    return finite;
}

}  // namespace narrowkv
