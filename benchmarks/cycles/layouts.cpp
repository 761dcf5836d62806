// Times scores of keys in other layouts than that of `trellis.cpp`.

#include "layouts.h"

#include "clock.h"

using namespace cycles;

namespace {

constexpr int kBlocks = 16;

std::mt19937 random_numbers(0);

template <typename Codes, int k>
double expected(const Codes& codes, const Tables& tables, const Query& query, int q, int block, int token) {
    double sum = 0;
    for (int d = 0; d < kDim; ++d) sum += query.bytes[q][d] * double(Additive<k>::reference(tables, codes.window(block, token, d)));
    return sum;
}

template <int k, int queries>
void time_layouts() {
    static const Query query = draw_query(random_numbers);
    const Tables tables(64, random_numbers);
    const std::string name = "additive 256, int8 query, ", rates = "all " + std::to_string(k);
    {
        const Row row{"scores", name + "rows of elements, state carried", rates, queries};
        const Rows<k> codes(kBlocks, random_numbers);
        alignas(64) static Sums sums;
        score_rows<k, queries>(codes, 1, tables, query, sums);
        for (int i = 0; i < queries * kTokens; ++i) {
            const int q = i / kTokens, part = i / 4 / kNumbers % kParts, at = i / kNumbers % 4, lane = i % kNumbers;
            require(sums[q][part][at][lane] == expected<Rows<k>, k>(codes, tables, query, q, 1, Products8::token_of(part, at, lane)), row);
        }
        print(row, nanoseconds([&](int i) { score_rows<k, queries>(codes, i % kBlocks, tables, query, sums); }, kBlocks) / kTokens);
    }
#ifdef __AVX512VBMI__
    {
        const Row row{"scores", name + "stream after stream", rates, queries};
        const TokenStreams<k> codes(kBlocks, random_numbers);
        alignas(64) static int32_t scores[kMostQueries][kTokens];
        score_tokens<k, queries>(codes, 1, tables, query, scores);
        for (int i = 0; i < queries * kTokens; ++i) {
            require(scores[i / kTokens][i % kTokens] == expected<TokenStreams<k>, k>(codes, tables, query, i / kTokens, 1, i % kTokens), row);
        }
        print(row, nanoseconds([&](int i) { score_tokens<k, queries>(codes, i % kBlocks, tables, query, scores); }, kBlocks) / kTokens);
    }
#endif
}

}  // namespace

int main() {
    time_layouts<1, 1>(), time_layouts<1, 4>(), time_layouts<2, 1>(), time_layouts<2, 4>();
    time_layouts<3, 1>(), time_layouts<3, 4>(), time_layouts<4, 1>(), time_layouts<4, 4>();
}
