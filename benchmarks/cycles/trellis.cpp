// Times inner loops of attention over variants of the trellis-coded form, each checked against plain loops before it is timed.

#include "clock.h"
#include "values.h"

using namespace cycles;

namespace {

constexpr int kBlocks = 16;  // more than the nearest cache holds, less than the second one does

std::mt19937 random_numbers(0);

struct Case {
    std::string name;
    Rates rates;
};

Rates uniform(int k) { return Rates(kUnits, k); }

Rates counted(std::initializer_list<int> counts) {  // units of rate 0, 1, 2, ...
    Rates rates;
    int k = 0;
    for (int count : counts) rates.insert(rates.end(), count, k), ++k;
    return rates;
}

template <template <int> class Table>
int value_of(const Streams& streams, const Tables& tables, int block, int token, int element) {
    int value = 0;
    by_rate(streams.rates[element / kUnit], [&](auto k) {
        value = reference<Table, k>(tables, streams, block, token, element);
    });
    return value;
}

// What the query is worth to a rotated pair whose first element is given.
double turned_score(const Query& query, int q, int token, int element, double first, double second) {
    const auto& angle = query.angles[element / 2][token / kLanes];
    const double cos = angle[0][token % 2][token % kLanes / 2] / 32768.0, sin = angle[1][token % 2][token % kLanes / 2] / 32768.0;
    const double x = first * (query.scale_weights[element] & 255), y = second * (query.scale_weights[element + 1] & 255);
    int16_t asked[2];
    std::memcpy(asked, &query.int16[q][element / 2], 4);
    return asked[0] * (x * cos - y * sin) + asked[1] * (x * sin + y * cos);
}

// Values of all elements, added up by byte: what the decoding alone takes.
template <template <int> class Table>
__attribute__((noinline)) void decode_all(const Streams& streams, int block, const Tables& tables, uint8_t (*sums)[kTokens]) {
    for (int part = 0; part < kParts; ++part) {
        const uint8_t* from = streams.block(block) + part * kLanes;
        Bytes sum[kUnit];
        each<kUnit>([&](auto e) CYCLES_INLINE { sum[e] = zero(); });
        for (int unit = 0; unit < kUnits; ++unit) {
            by_rate(streams.rates[unit], [&](auto k) CYCLES_INLINE {
                Bytes values[kUnit];
                decode_unit<k>(from, Table<k>(tables), values);
                each<kUnit>([&](auto e) CYCLES_INLINE { sum[e] = add_8(sum[e], values[e]); });
                from += k * kTokens;
            });
        }
        each<kUnit>([&](auto e) CYCLES_INLINE { store(sums[e] + part * kLanes, sum[e]); });
    }
}

template <template <int> class Table>
void time_decoding(const Case& which) {
    const Tables tables(0, random_numbers);
    const Streams streams(which.rates, kBlocks, random_numbers);
    const Row row{"decoding alone", Table<4>::name, which.name, 0};
    alignas(64) static uint8_t sums[kUnit][kTokens];
    decode_all<Table>(streams, 1, tables, sums);
    for (int i = 0; i < kUnit * kTokens; ++i) {
        uint8_t expected = 0;
        for (int d = i / kTokens; d < kDim; d += kUnit) expected += uint8_t(value_of<Table>(streams, tables, 1, i % kTokens, d));
        require(sums[i / kTokens][i % kTokens] == expected, row);
    }
    print(row, nanoseconds([&](int i) { decode_all<Table>(streams, i % kBlocks, tables, sums); }, kBlocks) / kTokens);
}

template <template <int> class Table, typename Still, int queries>
void time_scores(const Case& which, int rotated = 0) {
    const Tables tables[] = {{std::is_same_v<Still, Products8> ? 64 : 0, random_numbers}, {0, random_numbers}};
    const Streams streams(which.rates, kBlocks, random_numbers);
    static const Query query = draw_query(random_numbers);
    alignas(64) static Sums sums[2];
    const std::string rotation = rotated == 0 ? "" : rotated == kUnits ? ", rotated" : ", " + std::to_string(rotated) + " of 16 units rotated";
    const Row row{"scores", std::string(Table<4>::name) + ", " + (rotated == kUnits ? Turned16::name : Still::name + rotation), which.name, queries};
    for (int block = 0; block < kBlocks; block += kBlocks - 1) {
        score<Table, Still, queries>(streams, block, tables, query, rotated, sums);
        for (int q = 0; q < queries; ++q) {
            double expected[2][kTokens] = {}, found[2][kTokens] = {};
            for (int token = 0; token < kTokens; ++token) {
                double values[kDim];
                for (int d = 0; d < kDim; ++d) values[d] = value_of<Table>(streams, tables[d / kUnit < rotated], block, token, d);
                for (int d = 0; d < kDim; ++d) {
                    if (which.rates[d / kUnit] && d / kUnit >= rotated) expected[0][token] += Still::reference(query, q, d, values[d], token);
                    if (which.rates[d / kUnit] && d / kUnit < rotated && d % 2 == 0) expected[1][token] += turned_score(query, q, token, d, values[d], values[d + 1]);
                }
            }
            for (int i = 0; i < kParts * 4 * kNumbers; ++i) {
                const int part = i / 4 / kNumbers, at = i / kNumbers % 4, lane = i % kNumbers;
                const int32_t still = sums[0][q][part][at][lane];
                float element;
                std::memcpy(&element, &still, 4);
                found[0][Still::token_of(part, at, lane)] = std::is_same_v<Still, ProductsFloat> ? double(element) : still;
                if (rotated) found[1][Turned16::token_of(part, at, lane)] = sums[1][q][part][at][lane];
            }
            for (int token = 0; token < kTokens; ++token) {
                require(close(found[0][token], expected[0][token], std::is_same_v<Still, ProductsFloat> ? 1e-2 : 0), row);
                require(close(found[1][token], expected[1][token], 2.0 * 500 * 64 * 2), row);  // words are rounded four times a pair
            }
        }
    }
    print(row, nanoseconds([&](int i) { score<Table, Still, queries>(streams, i % kBlocks, tables, query, rotated, sums); }, kBlocks) / kTokens);
}

template <template <int> class Table, typename Products, int queries>
void time_values(const Case& which) {
    const Tables tables(0, random_numbers);
    const Streams streams(which.rates, kBlocks, random_numbers);
    static Weights weights;
    for (int i = 0; i < kMostQueries * kSpan * kTokens; ++i) {
        const int q = i / (kSpan * kTokens), part = i / kLanes % kSpanParts, lane = i % kLanes;
        weights.bytes[q][part][lane] = uint8_t(random_numbers() % 32);
        weights.floats[q][part][lane] = weights.bytes[q][part][lane] / 32.0f;
    }
    const Row row{"values", std::string(Table<4>::name) + ", " + Products::name, which.name, queries};
    alignas(64) static Mixed mixed;
    std::memset(mixed, 0, sizeof mixed);
    mix<Table, Products, queries>(streams, 4, tables, weights, mixed);
    for (int q = 0; q < queries; ++q) {
        for (int d = 0; d < kDim; ++d) {
            double expected = 0;
            for (int token = 0; token < kSpan * kTokens && which.rates[d / kUnit]; ++token) {
                const double weight = Products::weight(weights, q, token / kLanes, token % kLanes);
                expected += weight * value_of<Table>(streams, tables, 4 + token / kTokens, token % kTokens, d);
            }
            require(close(mixed[q][d], expected, 1e-1), row);
        }
    }
    print(row, nanoseconds([&](int i) { mix<Table, Products, queries>(streams, i * kSpan % kBlocks, tables, weights, mixed); }, kBlocks / kSpan) / kTokens / kSpan);
}

template <template <int> class Table, int queries>
void time_both(const Case& which) {
    time_scores<Table, Products8, queries>(which);
    time_values<Table, Mix8, queries>(which);
}

template <template <int> class Table>
void time_table(const Case& which) {
    time_decoding<Table>(which);
    time_both<Table, 1>(which);
    time_both<Table, 4>(which);
}

const Case kMixes[] = {{"mix of 2", counted({2, 3, 6, 3, 2})}, {"mix of 3", counted({1, 1, 3, 4, 6, 1})}, {"mix of 4", counted({0, 1, 1, 2, 7, 3, 2})}};

}  // namespace

int main() {
    for (int k = 1; k <= 6; ++k) {
        const Case all{"all " + std::to_string(k), uniform(k)};
        time_table<Additive>(all);
        time_table<Window64>(all);
        time_table<Window256>(all);
        time_table<Scalar>(all);
        if (k <= 4) time_table<Window16>(all);
        if (k == 3) time_table<Overlapping>(all);
        time_table<TwoStreams>(all);
    }
    for (const Case& mix : kMixes) {
        time_table<Additive>(mix), time_both<Additive, 2>(mix), time_both<Additive, 8>(mix);
        time_table<TwoStreams>(mix), time_both<TwoStreams, 2>(mix), time_both<TwoStreams, 8>(mix);
        time_table<Window16>(mix);
        time_table<Window64>(mix);
        time_table<Window256>(mix);
        time_table<Scalar>(mix);
        time_scores<TwoStreams, Products16, 1>(mix), time_scores<TwoStreams, Products16, 4>(mix);
        time_scores<TwoStreams, ProductsFloat, 1>(mix), time_scores<TwoStreams, ProductsFloat, 4>(mix);
        time_scores<TwoStreams, Products8, 1>(mix, kUnits), time_scores<TwoStreams, Products8, 4>(mix, kUnits), time_scores<TwoStreams, Products8, 8>(mix, kUnits);
        time_scores<TwoStreams, Products8, 1>(mix, kUnits / 4), time_scores<TwoStreams, Products8, 4>(mix, kUnits / 4);
        time_values<TwoStreams, MixFloat, 1>(mix), time_values<TwoStreams, MixFloat, 4>(mix);
    }
}
