// The best of many times, and a line of JSON for each.

#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "simd.h"

namespace cycles {

// Nanoseconds of a call: the least of many rotations of some calls each.
template <typename Call>
double nanoseconds(const Call& call, int calls = 8, int query_rotations = 400) {
    using Clock = std::chrono::steady_clock;
    double best = INFINITY;
    for (int rotate = 0; rotate < query_rotations; ++rotate) {
        const auto start = Clock::now();
        for (int i = 0; i < calls; ++i) call(i);
        best = std::min(best, std::chrono::duration<double, std::nano>(Clock::now() - start).count() / calls);
    }
    return best;
}

struct Row {
    std::string stage, variant, rates;
    int queries;
};

// Times are of one token and head of 128 elements.
inline void print(const Row& row, double nanoseconds) {
    std::printf("{\"instructions\": \"%s\", \"stage\": \"%s\", \"variant\": \"%s\", \"rates\": \"%s\", \"queries\": %d, \"nanoseconds\": %.3f}\n",
                kInstructions, row.stage.c_str(), row.variant.c_str(), row.rates.c_str(), row.queries, nanoseconds);
    std::fflush(stdout);
}

inline void require(bool right, const Row& row) {
    if (right) return;
    std::fprintf(stderr, "wrong: %s, %s, %s, %d queries\n", row.stage.c_str(), row.variant.c_str(), row.rates.c_str(), row.queries);
    std::exit(1);
}

inline bool close(double a, double b, double tolerance) { return std::abs(a - b) <= tolerance; }

}  // namespace cycles
