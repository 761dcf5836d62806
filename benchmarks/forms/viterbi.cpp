// The best path through a trellis of 2^BITS states, in float32, for one token at a time; any state width, any table.
// The state after an element is the last BITS bits of the stream; element j adds rates[j] bits and costs
// weights[j] * (elements[j] - tables[rates[j]][state])^2. The state before the first element is 0; of equal costs the lowest
// state wins.
#include <cstdint>
#include <vector>

namespace {

constexpr float NEVER = 1e30f;

template <int BITS>
void search(const float* elements, const float* weights, const int32_t* rates, const float* tables, int64_t tokens, int64_t count,
            int32_t* states) {
  constexpr int STATES = 1 << BITS;
  std::vector<uint8_t> dropped(count * STATES);  // bits that leave the window, by element and by what stays of the state
  alignas(64) float cost[STATES], best[STATES];
  alignas(64) int32_t from[STATES];
  for (int64_t token = 0; token < tokens; token++) {
    for (float& state : cost) state = NEVER;
    cost[0] = 0;
    for (int64_t j = 0; j < count; j++) {
      const int rate = rates[j], stays = STATES >> rate;
      for (int s = 0; s < stays; s++) best[s] = cost[s], from[s] = 0;
      for (int bits = 1; bits < 1 << rate; bits++)
        for (int s = 0; s < stays; s++) {
          const bool less = cost[bits * stays + s] < best[s];
          from[s] = less ? bits : from[s];
          best[s] = less ? cost[bits * stays + s] : best[s];
        }
      for (int s = 0; s < stays; s++) dropped[j * STATES + s] = uint8_t(from[s]);
      const float element = elements[token * count + j], weight = weights[token * count + j];
      const float* table = tables + rate * STATES;
      for (int s = 0; s < STATES; s++) {
        const float error = element - table[s];
        cost[s] = best[s >> rate] + weight * error * error;
      }
    }
    int state = 0;
    for (int s = 1; s < STATES; s++)
      if (cost[s] < cost[state]) state = s;
    for (int64_t j = count - 1; j >= 0; j--) {
      states[token * count + j] = state;
      state >>= rates[j];
      state |= int(dropped[j * STATES + state]) << (BITS - rates[j]);
    }
  }
}

}  // namespace

extern "C" void viterbi(const float* elements, const float* weights, const int32_t* rates, const float* tables, int64_t tokens,
                        int64_t count, int bits, int32_t* states) {
  if (bits == 4) search<4>(elements, weights, rates, tables, tokens, count, states);
  if (bits == 6) search<6>(elements, weights, rates, tables, tokens, count, states);
  if (bits == 8) search<8>(elements, weights, rates, tables, tokens, count, states);
  if (bits == 10) search<10>(elements, weights, rates, tables, tokens, count, states);
}
