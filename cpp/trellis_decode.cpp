// Trellis-coded streams back to elements, for whole tiles of a cache that are attended to by torch.

#include <cstring>

#include "each.h"
#include "trellis.h"

namespace narrowkv {
namespace {

// Eight elements of rate k. state: the last byte of the stream so far, in the end that of these.
template <int k>
inline void decode_unit(const float* levels, const uint8_t* codes, uint64_t& state, float* to) {
    uint64_t bits = state;
    for (int i = 0; i < k; ++i) bits = bits << 8 | codes[i];
    for (int i = 0; i < kUnit; ++i) to[i] = levels[bits >> k * (kUnit - 1 - i) & (kStates - 1)];
    state = bits & (kStates - 1);
}

}  // namespace

void decode_trellis(const TrellisStreams& streams) {
#pragma omp parallel for num_threads(streams.threads)
    for (int64_t row = 0; row < streams.rows; ++row) {
        const uint8_t* codes = streams.codes + row * streams.stride;
        float* to = streams.elements + row * streams.n;
        uint64_t state = 0;
        each<kMostRate>([&](auto i) {
            constexpr int k = i + 1;
            for (int64_t unit = 0; unit < streams.counts[i]; ++unit, codes += k, to += kUnit) decode_unit<k>(streams.levels + i * kStates, codes, state, to);
        });
    }
}

}  // namespace narrowkv
