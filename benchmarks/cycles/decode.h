// From the bytes of a unit to the values of its eight elements, for as many tokens as a register has lanes.
//
// `bytes[0]` is the stream's byte before the unit, `bytes[1 .. k]` are its own; bits are counted from the first bit of
// bytes[0].

#pragma once

#include <type_traits>
#include <utility>

#include "form.h"
#include "simd.h"

namespace cycles {

#define CYCLES_INLINE __attribute__((always_inline))

template <typename Part, int... i>
CYCLES_INLINE inline void each(const Part& part, std::integer_sequence<int, i...>) {
    (part(std::integral_constant<int, i>()), ...);
}
template <int n, typename Part>
CYCLES_INLINE inline void each(const Part& part) {
    each(part, std::make_integer_sequence<int, n>());
}

// Bits [from, from + count) as an index; several elements share some of them, and the compiler computes these once.
template <int from, int count>
CYCLES_INLINE inline Bytes field(const Bytes* bytes) {
    constexpr int byte = from / 8, after = from % 8 + count - 8;  // after: bits that lie in the next byte
    if constexpr (after <= 0) return low<count>(right<-after>(bytes[byte]));
    else return select<(1 << after) - 1, (1 << count) - 1>(right<8 - after>(bytes[byte + 1]), left<after>(bytes[byte]));
}
template <int from>
CYCLES_INLINE inline Bytes window(const Bytes* bytes) {
    constexpr int byte = from / 8, after = from % 8;
    if constexpr (after == 0) return bytes[byte];
    else return select<(1 << after) - 1, 255>(right<8 - after>(bytes[byte + 1]), left<after>(bytes[byte]));
}

// Forms of tables. `value<end>`: of the element whose bits end before bit `end`.
template <int k>
struct Additive {  // a window of 8 bits, high[upper nibble] + low[lower nibble]
    static constexpr const char* name = "additive 256";
    Bytes high, low;
    explicit Additive(const Tables& tables) : high(broadcast_16(tables.high[k])), low(broadcast_16(tables.low[k])) {}
    template <int end>
    CYCLES_INLINE Bytes value(const Bytes* bytes) const {
        return add_8(look_up(high, field<end - 8, 4>(bytes)), look_up(low, field<end - 4, 4>(bytes)));
    }
    static int reference(const Tables& tables, int window) { return int8_t(tables.high[k][window >> 4] + tables.low[k][window & 15]); }
    static constexpr int bits = 8;
};

template <int k>
struct Overlapping {  // the same, but the upper nibble is the lower one of the element before: 4 + k bits
    static constexpr const char* name = "additive, nibbles shared";
    Bytes high, low;
    explicit Overlapping(const Tables& tables) : high(broadcast_16(tables.high[k])), low(broadcast_16(tables.low[k])) {}
    template <int end>
    CYCLES_INLINE Bytes value(const Bytes* bytes) const {
        return add_8(look_up(high, field<end - 4 - k, 4>(bytes)), look_up(low, field<end - 4, 4>(bytes)));
    }
    static int reference(const Tables& tables, int window) { return int8_t(tables.high[k][window >> k & 15] + tables.low[k][window & 15]); }
    static constexpr int bits = 4 + k;
};

template <int k>
struct Window16 {  // a window of 4 bits; for a rate of 4 that is a scalar codebook
    static constexpr const char* name = "window 16";
    Bytes table;
    explicit Window16(const Tables& tables) : table(broadcast_16(tables.whole[k])) {}
    template <int end>
    CYCLES_INLINE Bytes value(const Bytes* bytes) const { return look_up(table, field<end - 4, 4>(bytes)); }
    static int reference(const Tables& tables, int window) { return tables.whole[k][window]; }
    static constexpr int bits = 4;
};

// A table of 64 entries.
struct Look64 {
#ifdef __AVX512VBMI__
    Bytes table;
    explicit Look64(const int8_t* entries) : table(load(entries)) {}
    CYCLES_INLINE Bytes operator()(Bytes index) const { return look_up(table, index); }
#else
    Bytes parts[4];
    explicit Look64(const int8_t* entries) {
        for (int i = 0; i < 4; ++i) parts[i] = broadcast_16(entries + 16 * i);
    }
    CYCLES_INLINE Bytes operator()(Bytes index) const {
        const Bytes nibble = low<4>(index), bit4 = left<3>(index), bit5 = left<2>(index);  // as the sign that `vpblendvb` looks at
        const Bytes first = _mm256_blendv_epi8(look_up(parts[0], nibble), look_up(parts[1], nibble), bit4);
        const Bytes second = _mm256_blendv_epi8(look_up(parts[2], nibble), look_up(parts[3], nibble), bit4);
        return _mm256_blendv_epi8(first, second, bit5);
    }
#endif
};

template <int k>
struct Window64 {  // a window of 6 bits
    static constexpr const char* name = "window 64";
    Look64 table;
    explicit Window64(const Tables& tables) : table(tables.whole[k]) {}
    template <int end>
    CYCLES_INLINE Bytes value(const Bytes* bytes) const { return table(field<end - 6, 6>(bytes)); }
    static int reference(const Tables& tables, int window) { return tables.whole[k][window]; }
    static constexpr int bits = 6;
};

template <int k>
struct Window256 {  // a window of 8 bits and an entry for each: four registers of VBMI, or gathered
    static constexpr const char* name = "window 256";
#ifdef __AVX512VBMI__
    Bytes parts[4];
    explicit Window256(const Tables& tables) {
        for (int i = 0; i < 4; ++i) parts[i] = load(tables.whole[k] + 64 * i);
    }
    template <int end>
    CYCLES_INLINE Bytes value(const Bytes* bytes) const {
        const Bytes index = window<end - 8>(bytes);
        const Bytes first = _mm512_permutex2var_epi8(parts[0], index, parts[1]), second = _mm512_permutex2var_epi8(parts[2], index, parts[3]);
        return _mm512_mask_blend_epi8(_mm512_movepi8_mask(index), first, second);
    }
#else
    int32_t entries[256];
    explicit Window256(const Tables& tables) {
        for (int i = 0; i < 256; ++i) entries[i] = tables.whole[k][i];
    }
    template <int end>
    CYCLES_INLINE Bytes value(const Bytes* bytes) const {
        alignas(32) uint8_t index[32];
        store(index, window<end - 8>(bytes));
        const auto eight = [&](int i) { return _mm256_i32gather_epi32(entries, _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(index + 8 * i))), 4); };
        const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(eight(0), eight(1)), _mm256_packs_epi32(eight(2), eight(3)));
        return _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    }
#endif
    static int reference(const Tables& tables, int window) { return tables.whole[k][window]; }
    static constexpr int bits = 8;
};

template <int k>
struct Scalar {  // no trellis: a codebook of 2^k entries
    static constexpr const char* name = "scalar";
    static constexpr bool wide = k > 4;
    std::conditional_t<wide, Look64, Bytes> table;
    explicit Scalar(const Tables& tables) : table([&] {
        if constexpr (wide) return Look64(tables.repeated[k]);
        else return broadcast_16(tables.repeated[k]);
    }()) {}
    template <int end>
    CYCLES_INLINE Bytes value(const Bytes* bytes) const {
        const Bytes code = field<end - k, k>(bytes);
        if constexpr (wide) return table(code);
        else return look_up(table, code);
    }
    static int reference(const Tables& tables, int window) { return tables.whole[k][window]; }
    static constexpr int bits = k;
};

// Two streams for each rate, of 1 + 1, 2 + 1, 2 + 2, 4 + 1 or 4 + 2 bits, and high[last 4 bits of the first] + low[last 4 bits
// of the second]. Of rate 1, bits of even and of odd elements are the streams: high[last 4 of the own] + low[last 4 of the
// other].
template <int k>
struct TwoStreams {
    static constexpr const char* name = "two streams";
    static constexpr int first = k == 1 ? 0 : k < 5 ? k - k / 2 : 4, second = k - first;
    Bytes high, low;
    explicit TwoStreams(const Tables& tables) : high(broadcast_16(tables.high[k])), low(broadcast_16(tables.low[k])) {}
    CYCLES_INLINE Bytes value(Bytes upper, Bytes lower) const { return add_8(look_up(high, upper), look_up(low, lower)); }
    static int reference(const Tables& tables, const Streams& streams, int block, int token, int element) {
        const auto window = [&](bool other) {
            return k == 1 ? streams.alternating_window(block, token, element, other) : streams.split_window(block, token, element, first, second, other);
        };
        return int8_t(tables.high[k][window(false)] + tables.low[k][window(true)]);
    }
};

// Values of a unit of rate k whose bytes begin at `from`, for the tokens of a register.
template <int k, typename Table>
CYCLES_INLINE inline void decode_unit(const uint8_t* from, const Table& table, Bytes* values) {
    Bytes bytes[k + 1];
    each<k + 1>([&](auto i) CYCLES_INLINE { bytes[i] = load(from + (i - 1) * kTokens); });
    each<kUnit>([&](auto i) CYCLES_INLINE { values[i] = table.template value<8 + k * (i + 1)>(bytes); });
}

template <int k>
CYCLES_INLINE inline void decode_unit(const uint8_t* from, const TwoStreams<k>& table, Bytes* values) {
    constexpr int first = TwoStreams<k>::first, second = TwoStreams<k>::second;
    if constexpr (k == 1) {
        const Bytes before = load(from - kTokens), bits = load(from);
        const Bytes even = select<15, 255>(right<4>(bits), before), odd = select<15, 255>(bits, left<4>(before));
        Bytes windows[kUnit + 1] = {low<4>(right<4>(odd))};  // after each element that of its own stream
        each<4>([&](auto i) CYCLES_INLINE { windows[2 * i + 1] = low<4>(right<3 - i>(even)), windows[2 * i + 2] = low<4>(right<3 - i>(odd)); });
        each<kUnit>([&](auto i) CYCLES_INLINE { values[i] = table.value(windows[i + 1], windows[i]); });
    } else {
        Bytes one[first + 1] = {load(from - (second + 1) * kTokens)}, two[second + 1] = {load(from - kTokens)};
        each<first>([&](auto i) CYCLES_INLINE { one[i + 1] = load(from + i * kTokens); });
        each<second>([&](auto i) CYCLES_INLINE { two[i + 1] = load(from + (first + i) * kTokens); });
        each<kUnit>([&](auto i) CYCLES_INLINE { values[i] = table.value(field<4 + first * (i + 1), 4>(one), field<4 + second * (i + 1), 4>(two)); });
    }
}

// What an element of a block of streams stands for.
template <template <int> class Table, int k>
int reference(const Tables& tables, const Streams& streams, int block, int token, int element) {
    if constexpr (std::is_same_v<Table<k>, TwoStreams<k>>) return TwoStreams<k>::reference(tables, streams, block, token, element);
    else return Table<k>::reference(tables, streams.window(block, token, element, Table<k>::bits));
}

// Run `part`, which is given the rate as a type.
template <typename Part>
CYCLES_INLINE inline void by_rate(int rate, const Part& part) {
    switch (rate) {
        case 1: return part(std::integral_constant<int, 1>());
        case 2: return part(std::integral_constant<int, 2>());
        case 3: return part(std::integral_constant<int, 3>());
        case 4: return part(std::integral_constant<int, 4>());
        case 5: return part(std::integral_constant<int, 5>());
        case 6: return part(std::integral_constant<int, 6>());
    }
}

}  // namespace cycles
