// Times the encoding of a head of 128 elements by windows of 8, 6 and 4 bits, after checking it against plain loops.

#include "two_streams.h"

#include <random>
#include <vector>

#include "clock.h"

using namespace cycles;

namespace {

constexpr int kHeads = 64;

// The states of a path, by plain loops. predecessor: of an element, a state and what was lost from its windows.
template <typename Table, typename Predecessor>
std::vector<uint8_t> encode_plainly(const Problem& problem, const int16_t* x, int count, const Table& table, const Predecessor& predecessor) {
    std::vector<int> cost(count, 65535);
    std::vector<std::vector<int>> from(kElements);
    cost[0] = 0;
    for (int i = 0; i < kElements; ++i) {
        const int k = problem.rates[i], least = *std::min_element(cost.begin(), cost.end());
        if (k == 0) continue;
        std::vector<int> next(count);
        from[i].resize(count);
        for (int state = 0; state < count; ++state) {
            int best = predecessor(i, state, 0);
            for (int lost = 1; lost < 1 << k; ++lost) best = cost[predecessor(i, state, lost)] < cost[best] ? predecessor(i, state, lost) : best;
            from[i][state] = best;
            const int64_t twice = std::min(2 * std::min(std::abs(x[i] - table(i)[state]), 32768), 65535);
            const int64_t square = (twice * twice >> 16) * problem.weights[i] >> 16;
            next[state] = int(std::min<int64_t>(65535, cost[best] - least + square));
        }
        cost = next;
    }
    std::vector<uint8_t> states(kElements);
    int state = int(std::min_element(cost.begin(), cost.end()) - cost.begin());
    for (int i = kElements - 1; i >= 0; --i) {
        states[i] = uint8_t(state);
        if (problem.rates[i]) state = from[i][state];
    }
    return states;
}

int16_t elements[kHeads][kElements];
uint8_t states[kHeads][kElements];

// Unit Gaussian elements of 16 steps, clipped to the tables' 7 bits.
Problem draw(const std::vector<int>& rates, std::mt19937& random) {
    Problem problem;
    std::normal_distribution<double> normal(0.0, 16.0 * 512.0);
    for (auto& table : problem.tables) for (auto& entry : table) entry = int16_t(std::clamp(int(normal(random) / 512), -64, 63) * 512);
    for (int i = 0; i < kElements; ++i) problem.rates[i] = rates[i], problem.weights[i] = uint16_t(random() % 49152 + 16384);
    for (auto& head : elements) for (auto& x : head) x = int16_t(std::clamp(normal(random), -32768.0, 32767.0));
    return problem;
}

// Check the encoding of all heads against plain loops, and time it.
template <typename Encode, typename Plainly>
void time_heads(const Row& row, const Encode& encode, const Plainly& plainly) {
    encode();
    for (int i = 0; i < kHeads; ++i) require(std::equal(states[i], states[i] + kElements, plainly(elements[i]).begin()), row);
    print(row, nanoseconds([&](int) { encode(); }, 1, 100) / kHeads);
}

template <int window, int together>
void time_encoding(const std::string& name, const std::vector<int>& rates, std::mt19937& random) {
    static Problem problem;
    problem = draw(rates, random);
    const auto encode_all = [&] {
        for (int i = 0; i < kHeads; i += together) encode<window, together>(problem, elements + i, states + i);
    };
    const auto table = [&](int i) { return problem.tables[problem.rates[i]]; };
    const auto predecessor = [&](int i, int state, int lost) { return lost << (window - problem.rates[i]) | state >> problem.rates[i]; };
    const Row row{"Viterbi", std::to_string(1 << window) + " states, " + std::to_string(together) + " tokens taking turns", name, 0};
    time_heads(row, encode_all, [&](const int16_t* x) { return encode_plainly(problem, x, 1 << window, table, predecessor); });
}

template <int together>
void time_split(const std::string& name, const std::vector<int>& rates, std::mt19937& random) {
    static Problem problem;
    problem = draw(rates, random);
    const auto encode_all = [&] {
        for (int i = 0; i < kHeads; i += together) encode_split<together>(problem, elements + i, states + i);
    };
    const auto table = [&](int i) { return split_table(problem, i); };
    const auto predecessor = [&](int i, int state, int lost) {
        int from = 0;
        for_parts(problem.rates[i], i, [&](auto first, auto second) {
            const int of_first = lost & ((1 << first) - 1), of_second = lost >> first;
            from = (of_first << (4 - first) | state >> (4 + first)) << 4 | of_second << (4 - second) | (state & 15) >> second;
        });
        return from;
    };
    const Row row{"Viterbi", "two streams, " + std::to_string(together) + " tokens taking turns", name, 0};
    time_heads(row, encode_all, [&](const int16_t* x) { return encode_plainly(problem, x, 256, table, predecessor); });
}

std::vector<int> counted(std::initializer_list<int> units) {
    std::vector<int> rates;
    int k = 0;
    for (int count : units) rates.insert(rates.end(), 8 * count, k), ++k;
    return rates;
}

template <int together>
void time_all(std::mt19937& random) {
    for (int k = 1; k <= 6; ++k) {
        const std::vector<int> rates(kElements, k);
        const std::string name = "all " + std::to_string(k);
        time_encoding<8, together>(name, rates, random);
        time_split<together>(name, rates, random);
        if (k <= 4) time_encoding<6, together>(name, rates, random);
        if (k <= 3) time_encoding<4, together>(name, rates, random);
    }
    const std::vector<int> mixes[] = {counted({2, 3, 6, 3, 2}), counted({1, 1, 3, 4, 6, 1}), counted({0, 1, 1, 2, 7, 3, 2})};
    for (int i = 0; i < 3; ++i) {
        time_encoding<8, together>("mix of " + std::to_string(i + 2), mixes[i], random);
        time_split<together>("mix of " + std::to_string(i + 2), mixes[i], random);
    }
}

}  // namespace

int main() {
    std::mt19937 random(0);
    time_all<1>(random);
    time_all<2>(random);
    time_all<4>(random);
}
