// The search of trellis.h, written once for all instruction sets: a file includes it after its own `Lanes`, a vector of
// `width` uint16_t, and what is done with them.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "trellis.h"

namespace narrowkv {
namespace {

#define TRELLIS_INLINE __attribute__((always_inline))

constexpr uint16_t UNREACHED = 65535;
constexpr int TOGETHER = 4;  // rows that take turns, since an element waits for the one before

// States that share `state >> rate` after an element have the same predecessors, and are a group.
constexpr int groups_of(int rate) { return STATES >> rate; }
// Bytes of the decisions of an element: for each group the bits that its best predecessor loses.
constexpr int decisions_of(int rate) { return std::max(groups_of(rate), width); }

// Keep the better of each lane and of that `distance` lanes on.
template <int distance>
TRELLIS_INLINE inline void fold(Lanes& least, Lanes& lost) {
    const Lanes other = rotate<distance>(least), other_lost = rotate<distance>(lost), lower = minimum(least, other);
    const Lanes best = select(lower == least, lost, other_lost);
    lost = select(least == other, minimum(lost, other_lost), best);
    least = lower;
}

// The least cost of the predecessors of each group, and the bits that this predecessor loses.
template <int rate>
TRELLIS_INLINE inline void survive(const uint16_t* cost, uint16_t* best, uint8_t* decisions) {
    constexpr int groups = groups_of(rate), stride = std::max(groups, width), rows = STATES / stride;
    for (int at = 0; at < stride; at += width) {
        Lanes least = load(cost + at), lost = splat(0);
#pragma GCC unroll 64
        for (int i = 1; i < rows; ++i) {
            const Lanes next = load(cost + i * stride + at), lower = minimum(least, next);
            lost = select(lower == least, lost, splat(uint16_t(i)));
            least = lower;
        }
        if constexpr (groups < width) {  // a vector holds several predecessors of a group
            lost = lost * splat(width / groups) + lane_indices() / splat(groups);
            if constexpr (groups <= 16 && width > 16) fold<16>(least, lost);
            if constexpr (groups <= 8 && width > 8) fold<8>(least, lost);
            if constexpr (groups <= 4 && width > 4) fold<4>(least, lost);
        }
        store(best + at, least);
        store_bytes(decisions + at, lost);
    }
}

TRELLIS_INLINE inline Lanes cost_of(Lanes element, Lanes entries, Lanes weight) {
    const Lanes distance = saturated_distance(element, entries), twice = saturated_sum(distance, distance);
    return high_product(high_product(twice, twice), weight);
}

// Advance the costs of all states by one element.
template <int rate>
TRELLIS_INLINE inline void step(uint16_t* cost, const int16_t* table, int16_t element, uint16_t weight, uint8_t* decisions) {
    constexpr int padded = std::max(groups_of(rate), width);
    alignas(64) uint16_t best[padded];
    survive<rate>(cost, best, decisions);
    Lanes least = load(best);  // lanes from the last group on repeat others
    for (int i = width; i < padded; i += width) least = minimum(least, load(best + i));
    least = splat(least_of(least));
    for (int i = 0; i < padded; i += width) store(best + i, load(best + i) - least);
    const Lanes elements = splat(uint16_t(element)), weights = splat(weight);
#pragma GCC unroll 16
    for (int state = 0; state < STATES; state += width) {
        const Lanes added = cost_of(elements, load(table + state), weights);
        store(cost + state, saturated_sum(spread<rate>(best + (state >> rate)), added));
    }
}

// Some rows of a head, and the decisions of their elements.
template <int together>
struct Rows {
    const Trellis& problem;
    const int16_t (*tables)[STATES];
    const int16_t* elements;  // [together, n]
    const uint16_t* weights;  // [together or 1, n]
    uint8_t* codes;           // [together, bytes]
    uint8_t* decisions;
    int64_t n, bytes;
    alignas(64) uint16_t cost[together][STATES];
    int state[together];

    template <int rate>
    TRELLIS_INLINE void forward(int64_t first) {
        const int64_t weight_stride = problem.weights_by_row ? n : 0;
        for (int64_t i = first; i < first + UNIT; ++i) {
            for (int t = 0; t < together; ++t) {
                step<rate>(cost[t], tables[rate - 1], elements[t * n + i], weights[t * weight_stride + i], decisions);
                decisions += decisions_of(rate);
                const int64_t reached = i < UNIT ? int64_t(1) << std::min<int64_t>(rate * (i + 1), 8) : STATES;
                for (int64_t unreached = reached; unreached < STATES; ++unreached) cost[t][unreached] = UNREACHED;
            }
        }
    }

    // Follow the decisions of a unit back to its first element, and write its bytes, the first bit in the highest place.
    template <int rate>
    TRELLIS_INLINE void backward(int64_t end) {
        uint64_t bits[together] = {};
        for (int i = 0; i < UNIT; ++i) {
            decisions -= together * decisions_of(rate);
            for (int t = 0; t < together; ++t) {
                bits[t] |= uint64_t(state[t] & ((1 << rate) - 1)) << (rate * i);
                const int group = state[t] >> rate;
                state[t] = group | decisions[t * decisions_of(rate) + group] << (8 - rate);
            }
        }
        for (int t = 0; t < together; ++t)
            for (int i = 1; i <= rate; ++i) codes[t * bytes + end - i] = uint8_t(bits[t] >> (8 * (i - 1)));
    }

    void encode() {
        for (auto& row : cost) std::fill(row, row + STATES, UNREACHED), row[0] = 0;
        int64_t element = 0, byte = bytes;
        for_rates(std::make_integer_sequence<int, MOST_RATE>(), [&](auto rate) TRELLIS_INLINE {
            for (int64_t unit = 0; unit < problem.counts[rate - 1]; ++unit, element += UNIT) forward<rate>(element);
        });
        for (int t = 0; t < together; ++t) state[t] = int(std::min_element(cost[t], cost[t] + STATES) - cost[t]);
        for_rates(std::make_integer_sequence<int, MOST_RATE>(), [&](auto back) TRELLIS_INLINE {
            constexpr int rate = MOST_RATE + 1 - back;
            for (int64_t unit = 0; unit < problem.counts[rate - 1]; ++unit, byte -= rate) backward<rate>(byte);
        });
    }

    template <int... rates, typename Part>
    static void for_rates(std::integer_sequence<int, rates...>, const Part& part) {
        (part(std::integral_constant<int, rates + 1>()), ...);
    }
};

void make_tables(const Trellis& problem, int16_t (*tables)[STATES]) {
    for (int i = 0; i < MOST_RATE; ++i)
        for (int state = 0; state < STATES; ++state)
            tables[i][state] = int16_t((problem.high[i * 16 + state / 16] + problem.low[i * 16 + state % 16]) * GRID_STEP);
}

void encode_rows(const Trellis& problem) {
    alignas(64) int16_t tables[MOST_RATE][STATES];
    make_tables(problem, tables);
    const int64_t n = UNIT * problem.units(), bytes = problem.bytes(), tiles = (problem.rows + TOGETHER - 1) / TOGETHER;
#pragma omp parallel num_threads(problem.threads)
    {
        std::vector<uint8_t> decisions(size_t(n * TOGETHER * decisions_of(1)));
#pragma omp for collapse(2)
        for (int64_t head = 0; head < problem.heads; ++head) {
            for (int64_t tile = 0; tile < tiles; ++tile) {
                const auto encode = [&](int64_t row, auto together) {
                    const int64_t at = head * problem.rows + row, weights = problem.weights_by_row ? at : head;
                    Rows<together>{problem, tables, problem.elements + at * n, problem.weights + weights * n,
                                   problem.codes + at * bytes, decisions.data(), n, bytes, {}, {}}.encode();
                };
                const int64_t first = tile * TOGETHER, last = std::min(first + TOGETHER, problem.rows);
                if (last - first == TOGETHER) encode(first, std::integral_constant<int, TOGETHER>());
                else for (int64_t row = first; row < last; ++row) encode(row, std::integral_constant<int, 1>());
            }
        }
    }
}

}  // namespace
}  // namespace narrowkv
