// Three passes: ranges, codes, outliers. The compiler writes the loops over channels for each instruction set.
// Products and sums are not fused, so that codes are exactly those of the plain twin in `codec/quantizer.py`.

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
    Encoder(const Codec& codec, const Numbers& numbers, const uint8_t* skip, const Room& room)
        : codec(codec), numbers(numbers), skip(skip), room(room) {
        together = codec.sharing == Sharing::channel ? codec.group : 1;
        range_heads = codec.sharing == Sharing::token ? 1 : numbers.heads;
        width = codec.sharing == Sharing::channel ? numbers.dim : codec.group ? numbers.dim / codec.group : 1;
        steps = numbers.tokens / together;
        room_dim = (numbers.dim + LANES - 1) / LANES * LANES;
        if (codec.sharing != Sharing::fixed) low.resize(size_t(numbers.batch * range_heads * steps * width)), high = low;
        else spread_fixed();
        if (codec.outliers > 0) counts.resize(size_t(numbers.batch * numbers.heads * numbers.tokens));
    }

    int64_t run(int threads) {
        if (codec.sharing != Sharing::fixed) {
#pragma omp parallel for collapse(2) num_threads(threads)
            for (int64_t row = 0; row < numbers.batch * range_heads; ++row)
                for (int64_t step = 0; step < steps; ++step) find_ranges(row / range_heads, row % range_heads, step);
            if (!fits) return DOES_NOT_FIT;
        }
#pragma omp parallel for collapse(2) num_threads(threads)
        for (int64_t row = 0; row < numbers.batch * numbers.heads; ++row)
            for (int64_t step = 0; step < steps; ++step) write_codes(row / numbers.heads, row % numbers.heads, step);
        return codec.outliers > 0 ? write_outliers() : 0;
    }

private:
    const Codec& codec;
    const Numbers& numbers;
    const uint8_t* skip;
    const Room& room;
    int64_t together, range_heads, width, steps;  // of tokens that are encoded at once
    int64_t room_dim;                             // head_dim, rounded up to whole LANES
    std::vector<float> fixed;                     // [heads, 2, room_dim], zeros and inverse scales
    std::vector<float> low, high;                 // [batch, range_heads, steps, width], online thresholds
    std::vector<int32_t> counts;                  // [batch, heads, tokens], outliers
    std::atomic<bool> fits{true};

    bool skipped(int64_t row, int64_t token) const { return skip && skip[row * numbers.tokens + token]; }

    void spread_fixed() {
        const int64_t dim = numbers.dim;
        fixed.resize(size_t(2 * numbers.heads * room_dim));
        for (int64_t head = 0; head < numbers.heads; ++head) {
            float *zero = fixed.data() + 2 * head * room_dim, *inverse = zero + room_dim;
            std::copy_n(codec.zero + head * dim, dim, zero);
            std::copy_n(codec.scale + head * dim, dim, inverse);
            invert(inverse, dim);
        }
    }

    void find_ranges(int64_t row, int64_t head, int64_t step) {
        const int64_t place = ((row * range_heads + head) * steps + step) * width;
        float* lower = low.data() + place;
        float* upper = high.data() + place;
        if (codec.sharing == Sharing::channel)
            ends_of_channels(row, head, step, lower, upper);
        else
            ends_of_token(row, head, step, lower, upper);
        const int64_t room_steps = room.tokens / together, at = room.at / together + step;
        const int64_t held = ((row * range_heads + head) * room_steps + at) * width;
        for (int64_t c = 0; c < width; ++c) {
            // of a group in which all tokens are left out
            if (!(lower[c] <= upper[c]) || std::isinf(lower[c]) || std::isinf(upper[c])) lower[c] = upper[c] = 0;
            room.scale[held + c] = half_from_single((upper[c] - lower[c]) / 2);
            room.zero[held + c] = half_from_single((upper[c] + lower[c]) / 2);
            if (!is_finite_half(room.scale[held + c]) || !is_finite_half(room.zero[held + c])) fits = false;
        }
    }

    void ends_of_channels(int64_t row, int64_t head, int64_t step, float* lower, float* upper) {
        float* x = scratch_of(numbers.dim);
        std::fill_n(lower, numbers.dim, INFINITE);
        std::fill_n(upper, numbers.dim, -INFINITE);
        for (int64_t token = step * together; token < (step + 1) * together; ++token) {
            if (skipped(row, token)) continue;
            load(numbers.kind, row_of(numbers, row, head, token), numbers.dim, x);
            widen(x, numbers.dim, lower, upper);
        }
    }

    void ends_of_token(int64_t row, int64_t head, int64_t token, float* lower, float* upper) {
        const int64_t heads = numbers.heads / range_heads, dim = numbers.dim;
        float* x = scratch_of(heads * dim);
        for (int64_t h = 0; h < heads; ++h) load(numbers.kind, row_of(numbers, row, head + h, token), dim, x + h * dim);
        const int64_t vector = heads * dim / width, per_tail = int64_t(double(vector) * codec.outliers / 2 + 0.5);
        for (int64_t c = 0; c < width; ++c) find_ends(x + c * vector, vector, per_tail, lower + c, upper + c);
    }

    // What holds for a channel of a head at a step: from [width] numbers of its range.
    template <typename Get>
    void spread(float* to, Get get) const {
        const int64_t each = numbers.dim / width;
        for (int64_t c = 0; c < width; ++c) std::fill_n(to + c * each, each, get(c));
    }

    struct Thresholds {
        const float* lower;
        const float* upper;
    };

    Thresholds thresholds(int64_t row, int64_t head, int64_t step, float* scratch) const {
        const int64_t dim = numbers.dim;
        if (codec.sharing == Sharing::fixed) return {codec.lower + head * dim, codec.upper + head * dim};
        const int64_t place = ((row * range_heads + head % range_heads) * steps + step) * width;
        spread(scratch, [&](int64_t c) { return low[size_t(place + c)]; });
        spread(scratch + dim, [&](int64_t c) { return high[size_t(place + c)]; });
        return {scratch, scratch + dim};
    }

    void write_codes(int64_t row, int64_t head, int64_t step) {
        const int64_t dim = numbers.dim, sequence = row * numbers.heads + head;
        float *x = scratch_of(5 * room_dim), *online = x + room_dim;
        const float *zero = online, *inverse = zero + room_dim;
        if (codec.sharing == Sharing::fixed) {
            zero = fixed.data() + 2 * head * room_dim, inverse = zero + room_dim;
        } else {
            const int64_t at = room.at / together + step, room_steps = room.tokens / together;
            const int64_t held = ((row * range_heads + head % range_heads) * room_steps + at) * width;
            spread(online, [&](int64_t c) { return single_from_half(room.zero[held + c]); });
            spread(online + room_dim, [&](int64_t c) { return single_from_half(room.scale[held + c]); });
            invert(online + room_dim, dim);
        }
        Thresholds outside{};
        if (codec.outliers > 0) outside = thresholds(row, head, step, online + 2 * room_dim);
        for (int64_t token = step * together; token < (step + 1) * together; ++token) {
            load(numbers.kind, row_of(numbers, row, head, token), dim, x);
            quantise(x, zero, inverse, codec.boundaries, codec.boundary_count, dim,
                     room.codes + (sequence * room.tokens + room.at + token) * dim);
            if (codec.outliers > 0)
                counts[size_t(sequence * numbers.tokens + token)] =
                    skipped(row, token) ? 0 : count_outside(x, outside.lower, outside.upper, dim);
        }
    }

    int64_t write_outliers() {
        int64_t found = 0;
        for (int32_t count : counts) found += count;
        if (found > room.outlier_room) return found;
        const int64_t dim = numbers.dim;
        float* x = scratch_of(3 * dim);
        std::vector<uint8_t> marks;
        marks.resize(size_t(dim));
        int64_t next = 0;
        for (int64_t place = 0; place < int64_t(counts.size()); ++place) {
            if (counts[size_t(place)] == 0) continue;
            const int64_t sequence = place / numbers.tokens, token = place % numbers.tokens;
            const int64_t row = sequence / numbers.heads, head = sequence % numbers.heads;
            const Thresholds outside = thresholds(row, head, token / together, x + dim);
            const char* from = row_of(numbers, row, head, token);
            load(numbers.kind, from, dim, x);
            mark_outside(x, outside.lower, outside.upper, dim, marks.data());
            const int64_t first = (sequence * room.tokens + room.at + token) * dim;
            const auto next_marked = [&](int64_t c) -> int64_t {
                const void* found = c < dim ? std::memchr(marks.data() + c, 1, size_t(dim - c)) : nullptr;
                return found ? static_cast<const uint8_t*>(found) - marks.data() : dim;
            };
            for (int64_t c = next_marked(0); c < dim; c = next_marked(c + 1)) {
                room.outlier_index[next] = first + c;
                room.outlier_values[next++] = exact(from, c, x[c]);
            }
        }
        return fits ? found : DOES_NOT_FIT;
    }

    // A number as it is kept beside codes.
    uint16_t exact(const char* from, int64_t channel, float number) {
        if (numbers.kind != Number::single) return reinterpret_cast<const uint16_t*>(from)[channel];
        const uint16_t rounded = half_from_single(number);
        if (!is_finite_half(rounded)) fits = false;
        return rounded;
    }
};

}  // namespace

int64_t encode(const Codec& codec, const Numbers& numbers, const uint8_t* skip, const Room& room, int threads) {
    return Encoder(codec, numbers, skip, room).run(threads);
}

bool all_finite(const Numbers& numbers, int threads) {
    std::atomic<bool> finite{true};
#pragma omp parallel for collapse(2) num_threads(threads)
    for (int64_t row = 0; row < numbers.batch * numbers.heads; ++row)
        for (int64_t token = 0; token < numbers.tokens; ++token)
            if (!finite_row(numbers.kind, row_of(numbers, row / numbers.heads, row % numbers.heads, token), numbers.dim))
                finite = false;
    return finite;
}

}  // namespace narrowkv
