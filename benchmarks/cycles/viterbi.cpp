// Times the encoding of a head of 128 elements by windows of 8, 6 and 4 bits, after checking it against plain loops.

#include "viterbi.h"

#include <random>
#include <vector>

#include "clock.h"

using namespace cycles;

namespace {

constexpr int kHeads = 64;

std::vector<uint8_t> encode_plainly(const Problem& problem, const int16_t* x, int window) {
    const int count = 1 << window;
    std::vector<int> cost(count, 65535);
    std::vector<std::vector<int>> from(kElements);
    cost[0] = 0;
    for (int i = 0; i < kElements; ++i) {
        const int k = problem.rates[i], least = *std::min_element(cost.begin(), cost.end());
        if (k == 0) continue;
        std::vector<int> next(count);
        from[i].resize(count);
        for (int state = 0; state < count; ++state) {
            int best = 0;
            for (int first = 1; first < 1 << k; ++first) {
                if (cost[first << (window - k) | state >> k] < cost[best << (window - k) | state >> k]) best = first;
            }
            from[i][state] = best << (window - k) | state >> k;
            const int64_t twice = std::min(2 * std::min(std::abs(x[i] - problem.tables[k][state]), 32768), 65535);
            const int64_t square = (twice * twice >> 16) * problem.weights[i] >> 16;
            next[state] = int(std::min<int64_t>(65535, cost[from[i][state]] - least + square));
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

template <int window, int together>
void time_encoding(const std::string& name, const std::vector<int>& rates, std::mt19937& random) {
    static Problem problem;
    static int16_t numbers[kHeads][kElements];
    std::normal_distribution<double> normal(0.0, 16.0 * 512.0);
    for (int k = 0; k < 7; ++k) for (auto& entry : problem.tables[k]) entry = int16_t(std::clamp(int(normal(random) / 512), -64, 63) * 512);
    for (int i = 0; i < kElements; ++i) problem.rates[i] = rates[i], problem.weights[i] = uint16_t(random() % 49152 + 16384);
    for (auto& head : numbers) for (auto& x : head) x = int16_t(std::clamp(normal(random), -32768.0, 32767.0));
    const Row row{"Viterbi", std::to_string(1 << window) + " states, " + std::to_string(together) + " tokens taking turns", name, 0};
    static uint8_t states[kHeads][kElements];
    for (int i = 0; i < kHeads; i += together) encode<window, together>(problem, numbers + i, states + i);
    for (int i = 0; i < kHeads; ++i) require(std::equal(states[i], states[i] + kElements, encode_plainly(problem, numbers[i], window).begin()), row);
    const auto encode_all = [&](int) {
        for (int i = 0; i < kHeads; i += together) encode<window, together>(problem, numbers + i, states + i);
    };
    print(row, nanoseconds(encode_all, 1, 100) / kHeads);
}

std::vector<int> counted(std::initializer_list<int> units) {
    std::vector<int> rates;
    int k = 0;
    for (int count : units) rates.insert(rates.end(), 8 * count, k), ++k;
    return rates;
}

}  // namespace

int main() {
    std::mt19937 random(0);
    for (int k = 1; k <= 6; ++k) {
        const std::vector<int> rates(kElements, k);
        const std::string name = "all " + std::to_string(k);
        time_encoding<8, 1>(name, rates, random), time_encoding<8, 2>(name, rates, random), time_encoding<8, 4>(name, rates, random);
        if (k <= 4) time_encoding<6, 1>(name, rates, random), time_encoding<6, 2>(name, rates, random), time_encoding<6, 4>(name, rates, random);
        if (k <= 3) time_encoding<4, 1>(name, rates, random), time_encoding<4, 4>(name, rates, random);
    }
    const std::vector<int> two = counted({2, 3, 6, 3, 2}), three = counted({1, 1, 3, 4, 6, 1}), four = counted({0, 1, 1, 2, 7, 3, 2});
    time_encoding<8, 1>("mix of 2", two, random), time_encoding<8, 2>("mix of 2", two, random), time_encoding<8, 4>("mix of 2", two, random);
    time_encoding<8, 1>("mix of 3", three, random), time_encoding<8, 2>("mix of 3", three, random), time_encoding<8, 4>("mix of 3", three, random);
    time_encoding<8, 1>("mix of 4", four, random), time_encoding<8, 2>("mix of 4", four, random), time_encoding<8, 4>("mix of 4", four, random);
    time_encoding<6, 2>("mix of 2", two, random), time_encoding<6, 4>("mix of 2", two, random);
}
