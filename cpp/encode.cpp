// Three passes: ranges, codes, outliers. The compiler writes the loops over channels for each instruction set.
// Products and sums are not fused, so that codes are exactly those of the plain twin in `codec/quantizer.py`.

#include "encode.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "clones.h"
#include "half.h"

namespace narrowkv {
namespace {

constexpr int64_t LANES = 16;
typedef float Floats __attribute__((vector_size(4 * LANES)));  // left to itself, GCC makes vectors of boundaries, not of numbers
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
constexpr float INFINITE = std::numeric_limits<float>::infinity();

const char* row_of(const Numbers& numbers, int64_t row, int64_t head, int64_t token) {
    const int64_t size = numbers.kind == Number::single ? 4 : 2;
    const int64_t offset = row * numbers.row_stride + head * numbers.head_stride + token * numbers.token_stride;
    return static_cast<const char*>(numbers.data) + offset * size;
}

// The numbers of one token of one head in float32.
FOR_EACH_INSTRUCTION_SET void load(Number kind, const char* from, int64_t dim, float* to) {
    if (kind == Number::single) {
        std::memcpy(to, from, size_t(dim) * 4);
        return;
    }
    const uint16_t* bits = reinterpret_cast<const uint16_t*>(from);
    if (kind == Number::half) {
        for (int64_t c = 0; c < dim; ++c) to[c] = single_from_half(bits[c]);
        return;
    }
    for (int64_t c = 0; c < dim; ++c) {
        const uint32_t wide = uint32_t(bits[c]) << 16;
        std::memcpy(to + c, &wide, 4);
    }
}

// Lowers low and raises high, lane by lane, to the numbers.
FOR_EACH_INSTRUCTION_SET void widen(const float* x, int64_t count, float* low, float* high) {
    for (int64_t c = 0; c < count; ++c) {
        low[c] = x[c] < low[c] ? x[c] : low[c];
        high[c] = x[c] > high[c] ? x[c] : high[c];
    }
}

inline bool any_outside(const float* x, float low, float high) {
    int outside = 0;
    for (int64_t l = 0; l < LANES; ++l) outside |= int(x[l] < low) | int(x[l] > high);
    return outside != 0;
}

// The numbers of a vector that are kept, at most `count`, those that come first in the order.
template <typename Order>
class First {
public:
    First(int64_t count, float worst) : kept(size_t(count), worst) {}
    float last() const { return kept.front(); }
    void see(float x) {
        if (!Order()(x, kept.front())) return;
        std::pop_heap(kept.begin(), kept.end(), Order());
        kept.back() = x;
        std::push_heap(kept.begin(), kept.end(), Order());
    }

private:
    std::vector<float> kept;
};

// The smallest and the largest number of a vector once `per_tail` are left out at either end. So many numbers lie at or beyond the
// ends of as many lanes: only what lies beyond these has to be seen one by one.
FOR_EACH_INSTRUCTION_SET void find_ends(const float* x, int64_t count, int64_t per_tail, float* low, float* high) {
    const int64_t whole = count / LANES * LANES;
    float lows[LANES], highs[LANES];
    std::fill_n(lows, LANES, INFINITE), std::fill_n(highs, LANES, -INFINITE);
    for (int64_t c = 0; c < whole; c += LANES) widen(x + c, LANES, lows, highs);
    const bool enough = per_tail < LANES;
    if (enough) std::nth_element(lows, lows + per_tail, lows + LANES);
    if (enough) std::nth_element(highs, highs + per_tail, highs + LANES, std::greater<float>());
    First<std::less<float>> smallest(per_tail + 1, enough ? lows[per_tail] : INFINITE);
    First<std::greater<float>> largest(per_tail + 1, enough ? highs[per_tail] : -INFINITE);
    for (int64_t c = 0; c < count; c += LANES) {
        if (c < whole && !any_outside(x + c, smallest.last(), largest.last())) continue;
        for (int64_t l = c; l < std::min(c + LANES, count); ++l) smallest.see(x[l]), largest.see(x[l]);
    }
    *low = smallest.last();
    *high = largest.last();
}

// 0 where the range is empty.
FOR_EACH_INSTRUCTION_SET void invert(float* scale, int64_t dim) {
    for (int64_t c = 0; c < dim; ++c) scale[c] = scale[c] > 0 ? 1 / scale[c] : 0;
}

// Codes of the numbers of one token of one head: how many boundaries lie below each, once it is normalised. What is read has room
// for whole LANES.
FOR_EACH_INSTRUCTION_SET void quantise(const float* x, const float* zero, const float* inverse, const float* boundaries,
                                       int64_t boundary_count, int64_t dim, uint8_t* codes) {
    for (int64_t begin = 0; begin < dim; begin += LANES) {
        Floats number, middle, by;
        std::memcpy(&number, x + begin, sizeof number);
        std::memcpy(&middle, zero + begin, sizeof middle);
        std::memcpy(&by, inverse + begin, sizeof by);
        const Floats normal = (number - middle) * by;
        Ints below = {};
        for (int64_t b = 0; b < boundary_count; ++b) below -= normal > boundaries[b];  // true is -1
        uint8_t found[LANES];
        for (int64_t l = 0; l < LANES; ++l) found[l] = uint8_t(below[l]);
        std::memcpy(codes + begin, found, size_t(std::min(LANES, dim - begin)));
    }
}

FOR_EACH_INSTRUCTION_SET int32_t count_outside(const float* x, const float* lower, const float* upper, int64_t dim) {
    int32_t count = 0;
    for (int64_t c = 0; c < dim; ++c) count += int(x[c] < lower[c]) | int(x[c] > upper[c]);
    return count;
}

// 1 for each number beyond its thresholds, else 0.
FOR_EACH_INSTRUCTION_SET void mark_outside(const float* x, const float* lower, const float* upper, int64_t dim, uint8_t* marks) {
    for (int64_t c = 0; c < dim; ++c) marks[c] = uint8_t(int(x[c] < lower[c]) | int(x[c] > upper[c]));
}

// Room of this thread, which lasts; what it holds is whatever.
float* scratch_of(int64_t floats) {
    thread_local std::vector<float> scratch;
    if (int64_t(scratch.size()) < floats) scratch.resize(size_t(floats));
    return scratch.data();
}

// Numbers are finite where no exponent is all ones.
FOR_EACH_INSTRUCTION_SET bool finite_row(Number kind, const char* from, int64_t dim) {
    int found = 0;
    if (kind == Number::single) {
        const uint32_t* bits = reinterpret_cast<const uint32_t*>(from);
        for (int64_t c = 0; c < dim; ++c) found |= (bits[c] & 0x7f800000u) == 0x7f800000u;
        return found == 0;
    }
    const uint32_t ones = kind == Number::half ? 0x7c00u : 0x7f80u;
    const uint16_t* bits = reinterpret_cast<const uint16_t*>(from);
    for (int64_t c = 0; c < dim; ++c) found |= (bits[c] & ones) == ones;
    return found == 0;
}

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
