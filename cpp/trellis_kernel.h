// The search of trellis.h, written once for all instruction sets: a file includes it after its own `Lanes`, a vector of
// `width` uint16_t, and what is done with them.

#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "each.h"
#include "trellis.h"

namespace narrowkv {
namespace {

constexpr uint16_t kZero = 32768;  // added to signed ones, so that none is negative
constexpr uint16_t kUnreached = 65535;
constexpr int kTogether = 4;  // rows that take turns, since an element waits for the one before

// States that share `state >> rate` after an element have the same predecessors, and are a group.
constexpr int groups_of(int rate) { return kStates >> rate; }
constexpr int kBest = std::max(groups_of(1), width);
// Bytes of the decisions of an element: for each group the bits that its best predecessor loses.
constexpr int decisions_of(int rate) { return std::max(groups_of(rate), width); }

// Keep the better of each lane and of that `distance` lanes on.
template <int distance>
NARROWKV_INLINE inline void fold(Lanes& least, Lanes& lost) {
    const Lanes other = rotate<distance>(least), other_lost = rotate<distance>(lost), lower = minimum(least, other);
    const Lanes best = if_equal(lower, least, lost, other_lost);
    lost = if_equal(least, other, minimum(lost, other_lost), best);
    least = lower;
}

// The least cost of the predecessors of each group, less the least of all, and the bits that this predecessor loses.
// costs: of as many states as a vector has lanes, from a state on.
template <int rate, typename Costs>
NARROWKV_INLINE inline void survive(const Costs& costs, uint16_t* best, uint8_t* decisions) {
    constexpr int groups = groups_of(rate), stride = std::max(groups, width), rows = kStates / stride;
    Lanes survivors[stride / width], least_of_all = splat(kUnreached);
#pragma GCC unroll 16
    for (int at = 0; at < stride; at += width) {
        Lanes least = costs(at), lost = splat(0);
#pragma GCC unroll 64
        for (int i = 1; i < rows; ++i) {
            const Lanes next = costs(i * stride + at), lower = minimum(least, next);
            lost = if_equal(lower, least, lost, splat(uint16_t(i)));
            least = lower;
        }
        if constexpr (groups < width) {  // a vector holds several predecessors of a group
            lost = lost * splat(width / groups) + lane_indices() / splat(groups);
            if constexpr (groups <= 16 && width > 16) fold<16>(least, lost);
            if constexpr (groups <= 8 && width > 8) fold<8>(least, lost);
            if constexpr (groups <= 4 && width > 4) fold<4>(least, lost);
        }
        store_bytes(decisions + at, lost);
        survivors[at / width] = least;  // lanes from the last group on repeat others
        least_of_all = minimum(least_of_all, least);
    }
    least_of_all = least_of(least_of_all);
#pragma GCC unroll 16
    for (int at = 0; at < stride; at += width) store(best + at, survivors[at / width] - least_of_all);
}

NARROWKV_INLINE inline Lanes cost_of(Lanes element, Lanes entries, Lanes weight) {
    const Lanes distance = maximum(element, entries) - minimum(element, entries), twice = saturated_sum(distance, distance);
    return high_product(high_product(twice, twice), weight);
}

// The costs of states once an element is added to what survived for it.
template <int rate>
struct Added {
    const uint16_t* best;
    const uint16_t* table;
    Lanes element, weight;

    NARROWKV_INLINE Lanes operator()(int state) const {
        return saturated_sum(spread<rate>(best + (state >> rate)), cost_of(element, load(table + state), weight));
    }
};

// A row to search for. elements, weights: [n]. codes: [bytes]. states: [n], of its elements.
struct Row {
    const int16_t* elements;
    const uint16_t* weights;
    uint8_t* codes;
    uint8_t* states;
};

// What all rows have in common.
struct Search {
    const std::array<int64_t, kMostRate>& counts;
    alignas(64) uint16_t tables[kMostRate][kStates];

    Search(const std::array<int64_t, kMostRate>& counts, const int8_t* high, const int8_t* low) : counts(counts) {
        for (int i = 0; i < kMostRate; ++i)
            for (int state = 0; state < kStates; ++state)
                tables[i][state] = uint16_t(kZero + (high[i * 16 + state / 16] + low[i * 16 + state % 16]) * kGridStep);
    }

    int64_t bytes_of_decisions() const {
        int64_t sum = 0;
        for_rates([&](auto rate) { sum += counts[rate - 1] * kUnit * kTogether * decisions_of(rate); });
        return sum;
    }

    template <typename Part>
    static NARROWKV_INLINE void for_rates(const Part& part) {
        each<kMostRate>([&](auto i) NARROWKV_INLINE { part(std::integral_constant<int, i + 1>()); });
    }
};

// Some rows, and the decisions of their elements.
template <int together>
struct Rows {
    const Search& search;
    const Row* rows;
    uint8_t* decisions;
    alignas(64) uint16_t cost[together][kStates];
    int state[together];

    // Advance by a unit. Only between units do costs of all states lie in memory.
    template <int rate>
    NARROWKV_INLINE void forward(int64_t first) {
        if (first == 0) return begin<rate>();
        alignas(64) uint16_t best[2][together][kBest];
        for (int t = 0; t < together; ++t) survive_from<rate>(t, best[0][t]);
        for (int i = 0; i < kUnit - 1; ++i) {
            for (int t = 0; t < together; ++t) {
                survive<rate>(added<rate>(t, first + i, best[i % 2][t]), best[1 - i % 2][t], decisions);
                decisions += decisions_of(rate);
            }
        }
        for (int t = 0; t < together; ++t) finish<rate>(t, first + kUnit - 1, best[(kUnit - 1) % 2][t]);
    }

    // The first unit, in which no stream reaches some of the states yet.
    template <int rate>
    NARROWKV_INLINE void begin() {
        alignas(64) uint16_t best[kBest];
        for (int i = 0; i < kUnit; ++i) {
            for (int t = 0; t < together; ++t) {
                survive_from<rate>(t, best);
                finish<rate>(t, i, best);
                for (int unreached = 1 << std::min(rate * (i + 1), 8); unreached < kStates; ++unreached) cost[t][unreached] = kUnreached;
            }
        }
    }

    template <int rate>
    NARROWKV_INLINE Added<rate> added(int t, int64_t i, const uint16_t* best) const {
        return {best, search.tables[rate - 1], splat(uint16_t(rows[t].elements[i] + kZero)), splat(rows[t].weights[i])};
    }

    template <int rate>
    NARROWKV_INLINE void survive_from(int t, uint16_t* best) {
        survive<rate>([&](int state) NARROWKV_INLINE { return load(cost[t] + state); }, best, decisions);
        decisions += decisions_of(rate);
    }

    template <int rate>
    NARROWKV_INLINE void finish(int t, int64_t i, const uint16_t* best) {
        const auto costs = added<rate>(t, i, best);
#pragma GCC unroll 32
        for (int state = 0; state < kStates; state += width) store(cost[t] + state, costs(state));
    }

    // Follow the decisions of a unit back to its first element, and write its bytes, the most significant bit first.
    template <int rate>
    NARROWKV_INLINE void backward(int64_t last, int64_t end) {
        uint64_t bits[together] = {};
        for (int i = 0; i < kUnit; ++i) {
            decisions -= together * decisions_of(rate);
            for (int t = 0; t < together; ++t) {
                rows[t].states[last - i] = uint8_t(state[t]);
                bits[t] |= uint64_t(state[t] & ((1 << rate) - 1)) << (rate * i);
                const int group = state[t] >> rate;
                state[t] = group | decisions[t * decisions_of(rate) + group] << (8 - rate);
            }
        }
        for (int t = 0; t < together; ++t)
            for (int i = 1; i <= rate; ++i) rows[t].codes[end - i] = uint8_t(bits[t] >> (8 * (i - 1)));
    }

    void encode() {
        for (auto& row : cost) std::fill(row, row + kStates, kUnreached), row[0] = 0;
        int64_t element = 0, byte = 0;
        Search::for_rates([&](auto rate) NARROWKV_INLINE {
            for (int64_t unit = 0; unit < search.counts[rate - 1]; ++unit, element += kUnit, byte += rate) forward<rate>(element);
        });
        for (int t = 0; t < together; ++t) state[t] = int(std::min_element(cost[t], cost[t] + kStates) - cost[t]);
        Search::for_rates([&](auto back) NARROWKV_INLINE {
            constexpr int rate = kMostRate + 1 - back;
            for (int64_t unit = 0; unit < search.counts[rate - 1]; ++unit, element -= kUnit, byte -= rate) backward<rate>(element - 1, byte);
        });
    }
};

// decisions: memory for those of kTogether rows.
void encode_rows(const Search& search, const Row* rows, int64_t count, uint8_t* decisions) {
    int64_t done = 0;
    const auto encode = [&](auto together) {
        for (; done + together <= count; done += together) Rows<together>{search, rows + done, decisions, {}, {}}.encode();
    };
    encode(std::integral_constant<int, kTogether>());
    if constexpr (width > 8) encode(std::integral_constant<int, 2>());  // others are slow anyway
    encode(std::integral_constant<int, 1>());
}

void encode_problem(const Trellis& problem) {
    const Search search(problem.counts, problem.high, problem.low);
    const int64_t n = kUnit * problem.units(), bytes = problem.bytes(), rows = problem.heads * problem.rows;
#pragma omp parallel num_threads(problem.threads)
    {
        std::vector<uint8_t> decisions(size_t(search.bytes_of_decisions())), states(size_t(kTogether * n));
#pragma omp for
        for (int64_t first = 0; first < rows; first += kTogether) {
            Row tile[kTogether];
            const int64_t count = std::min<int64_t>(kTogether, rows - first);
            for (int64_t i = 0; i < count; ++i) {
                const int64_t at = first + i, weights = problem.weights_by_row ? at : at / problem.rows;
                tile[i] = {problem.elements + at * n, problem.weights + weights * n, problem.codes + at * bytes, states.data() + i * n};
            }
            encode_rows(search, tile, count, decisions.data());
        }
    }
}

}  // namespace
}  // namespace narrowkv
