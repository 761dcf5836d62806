// Encoding of stream_encode.h, written once for all instruction sets: a file includes it after trellis_kernel.h and its own
// `Doubles`. Products and sums are not fused but for those of a matrix, whose coefficients are rounded to float32: all else
// is exactly what plain torch finds.

#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "half.h"
#include "stream_encode.h"

namespace narrowkv {
namespace {

constexpr int kDoubles = sizeof(Doubles) / sizeof(double);
typedef float Singles __attribute__((vector_size(sizeof(Doubles) / 2)));

// Rounded to an integer, of two to the even one, if it is less than 2^22.
inline float rounded(float x) {
    constexpr float shift = 0x1.8p23f;
    return (x + shift) - shift;
}

// To `rows` of sums [n], what `units` units of a matrix make of rows of x [dim].
template <int rows, int units>
inline void multiply(const double* x, int64_t dim, const float* matrix, double* sums, int64_t n) {
    constexpr int parts = kUnit / kDoubles;
    Doubles sum[rows][units * parts] = {};
    for (int64_t c = 0; c < dim; ++c) {
        Doubles elements[rows];
#pragma GCC unroll 4
        for (int row = 0; row < rows; ++row) elements[row] = x[row * dim + c] - Doubles{};  // unlike a sum with 0, nothing to compute
#pragma GCC unroll 16
        for (int part = 0; part < units * parts; ++part) {
            Singles factors;
            std::memcpy(&factors, matrix + (part / parts * dim + c) * kUnit + part % parts * kDoubles, sizeof factors);
            const Doubles wide = __builtin_convertvector(factors, Doubles);
#pragma GCC unroll 4
            for (int row = 0; row < rows; ++row) sum[row][part] = product_and_sum(elements[row], wide, sum[row][part]);
        }
    }
#pragma GCC unroll 4
    for (int row = 0; row < rows; ++row) std::memcpy(sums + row * n, sum[row], sizeof sum[row]);
}

// Products of rows [count, dim] with a head's matrix: [count, n].
void multiply_rows(const double* x, int64_t count, int64_t dim, const float* matrix, int64_t n, double* sums) {
    int64_t row = 0;
    for (; row + 4 <= count; row += 4)
        for (int64_t at = 0; at < n; at += kUnit) multiply<4, 1>(x + row * dim, dim, matrix + at * dim, sums + row * n + at, n);
    for (; row < count; ++row) {
        int64_t at = 0;
        for (; at + 4 * kUnit <= n; at += 4 * kUnit) multiply<1, 4>(x + row * dim, dim, matrix + at * dim, sums + row * n + at, n);
        for (; at < n; at += kUnit) multiply<1, 1>(x + row * dim, dim, matrix + at * dim, sums + row * n + at, n);
    }
}

// An outlier that was found.
struct Outlier {
    int64_t index;
    uint16_t value;
};

// One call: what its parts share.
struct StreamEncoder {
    const StreamCodec& codec;
    const TensorView& elements;
    const uint8_t* skip;
    const EncodeBuffer& buffer;
    const int32_t* stored_outliers;
    const int64_t* row_starts;
    const bool halves;
    const Search search;
    std::atomic<bool> fits{true};
    std::atomic<int64_t> out_of_range{0};

    StreamCounts run(int threads);
    int64_t code_bytes() const { return codec.bytes + (codec.norms ? 1 : 0); }
};

// Some tokens of one block of some heads: memory for all of them and what is done to it.
class Tile {
public:
    int64_t out_of_range = 0;  // coefficients seen so far

    Tile(StreamEncoder& call, int64_t most_rows) : call(call), codec(call.codec) {
        const int64_t n = codec.n, dim = codec.dim;
        centered.resize(size_t(most_rows * dim));
        found.resize(size_t(most_rows * n));
        every.resize(size_t(dim));
        coefficients.resize(size_t(most_rows * n));
        missed.resize(size_t(n));
        grid.resize(size_t(n));
        states.resize(size_t(most_rows * n));
        inputs.resize(size_t(most_rows * n));
        weights.resize(size_t(most_rows * n));
        norms.resize(size_t(most_rows));
        decisions.resize(size_t(call.search.bytes_of_decisions()));
    }

    // Tokens from `start` to before `stop` of heads from `first` to before `last`, numbered over the batch.
    void encode(int64_t first, int64_t last, int64_t start, int64_t stop, std::vector<Outlier>& chosen) {
        const int64_t tokens = stop - start, n = codec.n;
        rows.clear();
        for (int64_t sequence = first; sequence < last; ++sequence) {
            const int64_t at = (sequence - first) * tokens, head = sequence % codec.heads;
            transform(sequence, start, stop, at);
            for (int64_t i = at; i < at + tokens; ++i) {
                const int64_t far_out = scale(i);
                if (!is_skipped(sequence, start + i - at)) out_of_range += far_out;
                uint8_t* codes = call.buffer.codes + token_offset(sequence, start + i - at) * call.code_bytes();
                if (codec.norms) codes[codec.bytes] = norms[size_t(i)];
                rows.push_back({inputs.data() + i * n, codec.search_weight + head * n, codes, states.data() + i * n});
            }
        }
        encode_rows(call.search, rows.data(), int64_t(rows.size()), decisions.data());
        if (codec.most == 0) return;
        again.clear();
        for (int64_t sequence = first; sequence < last; ++sequence) {
            int64_t used = call.stored_outliers && start + call.buffer.at < kBlock ? call.stored_outliers[sequence] : 0;
            for (int64_t token = start; token < stop; ++token) keep_outliers(sequence, token, (sequence - first) * tokens + token - start, used, chosen);
        }
        encode_rows(call.search, again.data(), int64_t(again.size()), decisions.data());
    }

private:
    StreamEncoder& call;
    const StreamCodec& codec;
    std::vector<double> centered, found, every;
    std::vector<float> coefficients, missed, grid;
    std::vector<uint8_t> states, decisions, norms;
    std::vector<int16_t> inputs;
    std::vector<uint16_t> weights;  // of rows that are searched again
    std::vector<Row> rows, again;
    std::vector<int32_t> outside;

    int64_t token_offset(int64_t sequence, int64_t token) const { return sequence * call.buffer.tokens + call.buffer.at + token; }

    bool is_skipped(int64_t sequence, int64_t token) const { return call.skip && call.skip[sequence / codec.heads * call.elements.tokens + token]; }

    // Coefficients of some tokens of a head, in float64, to rows from `at` on.
    void transform(int64_t sequence, int64_t start, int64_t stop, int64_t at) {
        const int64_t dim = codec.dim, n = codec.n, head = sequence % codec.heads;
        const int64_t begin = call.row_starts ? call.row_starts[sequence / codec.heads] : call.buffer.at;
        for (int64_t token = start; token < stop; ++token) {
            double* to = centered.data() + (at + token - start) * dim;
            center(sequence, token, to);
            if (codec.turns) turn(to, codec.turns + (begin + token) % kFrame * dim);
            if (codec.pairs) multiply_pairs(to, head, found.data() + (at + token - start) * n);
        }
        if (codec.matrix) multiply_rows(centered.data() + at * dim, stop - start, dim, codec.matrix + head * n * dim, n, found.data() + at * n);
    }

    // A token's head less the mean, in the order of `channels`.
    void center(int64_t sequence, int64_t token, double* to) {
        const TensorView& x = call.elements;
        const int64_t row = sequence / codec.heads, head = sequence % codec.heads, dim = codec.dim;
        const int64_t from = row * x.row_stride + head * x.head_stride + token * x.token_stride;
        const float* mean = codec.mean + head * dim;
        const auto spread = [&](auto element) {
            if (codec.channels)
                for (int64_t c = 0; c < dim; ++c) to[c] = double(element(codec.channels[c])) - double(mean[codec.channels[c]]);
            else
                for (int64_t c = 0; c < dim; ++c) to[c] = double(element(c)) - double(mean[c]);
        };
        if (x.kind == DType::single) {
            const float* singles = static_cast<const float*>(x.data) + from;
            return spread([&](int64_t c) { return singles[c]; });
        }
        const uint16_t* bits = static_cast<const uint16_t*>(x.data) + from;
        if (x.kind == DType::half) return spread([&](int64_t c) { return single_from_half(bits[c]); });
        spread([&](int64_t c) { return single_from_bfloat(bits[c]); });
    }

    void turn(double* x, const double* turns) const {
        const int64_t half = codec.dim / 2;
        for (int64_t c = 0; c < half; ++c) {
            const double cosine = turns[c], sine = turns[half + c], first = x[c], second = x[half + c];
            x[c] = first * cosine - second * sine;
            x[half + c] = second * cosine + first * sine;
        }
    }

    void multiply_pairs(const double* x, int64_t head, double* to) {
        const int64_t half = codec.dim / 2;
        const double* by = codec.pairs + head * 4 * half;
        double* all = every.data();
        for (int64_t c = 0; c < half; ++c) all[c] = x[c] * by[c] + x[half + c] * by[2 * half + c];
        for (int64_t c = 0; c < half; ++c) all[half + c] = x[c] * by[half + c] + x[half + c] * by[3 * half + c];
        const int32_t* order = codec.order + head * codec.n;
        for (int64_t i = 0; i < codec.n; ++i) to[i] = all[order[i]];
    }

    // Coefficients divided by their norm, and as the search takes them; returns how many are out of range. What is not finite
    // becomes some number.
    int64_t scale(int64_t row) {
        const int64_t n = codec.n;
        const double* from = found.data() + row * n;
        float* to = coefficients.data() + row * n;
        double norm = 1;
        if (codec.norms) {
            const uint8_t code = norm_code(from);
            norms[size_t(row)] = code;
            norm = double(codec.norms[code]);
        }
        for (int64_t i = 0; i < n; ++i) to[i] = float(from[i] / norm);
        int16_t* grid_steps = inputs.data() + row * n;
        int32_t far_out = 0;
        for (int64_t i = 0; i < n; ++i) {
            float step = to[i] / codec.steps[i];
            far_out += std::fabs(step) > float(3 * kMaxLevel);
            step *= float(kGridStep);
            step = step > -32768.0f ? step : -32768.0f;
            step = step < 32767.0f ? step : 32767.0f;
            grid_steps[i] = int16_t(int32_t(rounded(step)));
        }
        return far_out;
    }

    uint8_t norm_code(const double* x) const {
        double sums[4] = {};
        for (int64_t i = 0; i < codec.n; i += 4)
            for (int64_t l = 0; l < 4; ++l) sums[l] += x[i + l] * x[i + l];
        const double norm = std::sqrt((sums[0] + sums[1] + sums[2] + sums[3]) / double(codec.n));
        const double code = std::nearbyint(std::log2(std::max(norm, double(std::numeric_limits<float>::min()))) * 16 + 128);
        return uint8_t(code > 0 ? code < 255 ? code : 255.0 : 0.0);
    }

    // Choose a row's outliers, and have it searched again where there are any. used: outliers of its block, raised.
    void keep_outliers(int64_t sequence, int64_t token, int64_t row, int64_t& used, std::vector<Outlier>& chosen) {
        const int64_t n = codec.n, head = sequence % codec.heads, left = codec.most - used;
        if (is_skipped(sequence, token)) return;
        const int64_t wanted = find_outside(row, head);
        used += wanted;
        if (wanted == 0 || left <= 0) return;
        if (wanted > left) {  // the dearest
            std::stable_sort(outside.begin(), outside.end(), [&](int32_t a, int32_t b) { return missed[size_t(a)] > missed[size_t(b)]; });
            outside.resize(size_t(left));
            std::sort(outside.begin(), outside.end());
        }
        Row searched = rows[size_t(row)];
        uint16_t* free = weights.data() + row * n;
        std::copy_n(searched.weights, n, free);
        for (const int32_t i : outside) {
            free[i] = 0;
            chosen.push_back({token_offset(sequence, token) * n + i, exact(coefficients[size_t(row * n + i)])});
        }
        searched.weights = free;
        again.push_back(searched);
    }

    // Which coefficients of a row cost more than the threshold, to `outside`, and how many they are.
    int64_t find_outside(int64_t row, int64_t head) {
        const int64_t n = codec.n;
        const float norm = codec.norms ? codec.norms[norms[size_t(row)]] : 1.0f;
        const float *x = coefficients.data() + row * n, *weight = codec.weight + head * n;
        const uint8_t* reached = states.data() + row * n;
        int64_t i = 0;
        Search::for_rates([&](auto rate) {
            const int8_t *high = codec.high + 16 * (rate - 1), *low = codec.low + 16 * (rate - 1);
            for (const int64_t end = i + kUnit * codec.counts[rate - 1]; i < end; ++i) grid[size_t(i)] = float(high[reached[i] >> 4] + low[reached[i] & 15]);
        });
        int64_t count = 0;
        for (i = 0; i < n; ++i) {
            const float apart = (x[i] - grid[size_t(i)] * codec.scales[i]) * norm;
            missed[size_t(i)] = apart * apart * weight[i];
        }
        for (i = 0; i < n; ++i) count += missed[size_t(i)] > codec.threshold;
        outside.clear();
        for (i = 0; count > 0 && i < n; ++i)
            if (missed[size_t(i)] > codec.threshold) outside.push_back(int32_t(i));
        return count;
    }

    uint16_t exact(float x) {
        if (call.halves) {
            const uint16_t bits = half_from_single(x);
            if (!is_finite_half(bits)) call.fits = false;
            return bits;
        }
        const uint16_t bits = bfloat_from_single(x);
        if ((bits & 0x7f80) == 0x7f80) call.fits = false;
        return bits;
    }
};

inline StreamCounts StreamEncoder::run(int threads) {
    const int64_t sequences = elements.batch * elements.heads, at = buffer.at, tokens = elements.tokens;
    const int64_t block = at / kBlock, blocks = (at + tokens + kBlock - 1) / kBlock - block;
    const int64_t together = tokens < kTogether ? kTogether / tokens : 1, groups = (sequences + together - 1) / together;
    std::vector<std::vector<Outlier>> chosen(size_t(groups * blocks));
#pragma omp parallel num_threads(threads)
    {
        Tile tile(*this, together * std::min<int64_t>(tokens, kBlock));
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < groups * blocks; ++item) {
            const int64_t first = item / blocks * together, start = (block + item % blocks) * kBlock - at;
            tile.encode(first, std::min(first + together, sequences), std::max<int64_t>(start, 0), std::min(start + kBlock, tokens), chosen[size_t(item)]);
        }
        out_of_range += tile.out_of_range;
    }
    if (!fits) return {kDoesNotFit, 0};
    int64_t count = 0;
    for (const auto& part : chosen) count += int64_t(part.size());
    if (count > buffer.outlier_capacity) return {count, out_of_range};
    int64_t next = 0;
    for (const auto& part : chosen)
        for (const Outlier& outlier : part) buffer.outlier_index[next] = outlier.index, buffer.outlier_values[next++] = outlier.value;
    return {count, out_of_range};
}

StreamCounts encode_all_streams(const StreamCodec& codec, const TensorView& elements, const uint8_t* skip, const EncodeBuffer& buffer,
                                const int32_t* stored_outliers, const int64_t* row_starts, bool halves, int threads) {
    if (elements.tokens == 0 || elements.batch == 0) return {0, 0};
    return StreamEncoder{codec, elements, skip, buffer, stored_outliers, row_starts, halves, Search(codec.counts, codec.high, codec.low)}.run(threads);
}

}  // namespace
}  // namespace narrowkv
