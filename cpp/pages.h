// Pages of an engine's memory, as store/paged.py lays them out: new tokens written into them, and attention over them. The
// former in plain torch is `PagedLayer.append_naive`.

#pragma once

#include <cstdint>

#include "attention.h"
#include "stream_encode.h"

namespace narrowkv {

constexpr int64_t kPageBlocks = 2;

// Where the keys, or the values, of a block lie, in bytes from where it begins: streams [kv_heads, stream_bytes, 64], offsets
// [kv_heads + 1] int32, values [kv_heads * budget] float16 and index, the same in uint16.
struct PageSide {
    int64_t streams, stream_bytes, offsets, values, index, budget;
};

// The pages of one layer, `stride` bytes apart. sink: where in a page the first token lies, [2, kv_heads, head_dim].
struct Pages {
    uint8_t* memory;
    int64_t count, stride, block_bytes, sink;
    DType sink_kind;
    int64_t kv_heads, head_dim;
    PageSide sides[2];

    uint8_t* block(int64_t page, int64_t number) const { return memory + page * stride + number * block_bytes; }
};

// New tokens of one sequence that lie in one block, from its token `first` on; they begin at the new token `start`, whose
// position is that in its sequence.
struct Run {
    int64_t page, block, first, start, position;
};

// What undoes the rotary embedding of each new token: cosines and sines [tokens, 2, pairs]; no pairs where nothing is to be undone.
struct Unrotation {
    const double* turns;
    int64_t pairs;
    bool interleaved;
};

constexpr int64_t kNotFinite = -2;

// Write runs of `tokens` tokens each to their blocks, keys or values. elements: of all new tokens, its batch is 1. Returns 0,
// kNotFinite where an element is not finite, or kDoesNotFit where an outlier does not fit float16; then outliers are missing.
int64_t write_pages(const Pages& pages, const PageSide& side, const StreamCodec& codec, EncodeStreams& encode, const TensorView& elements,
                    const Unrotation& unrotation, const Run* runs, int64_t count, int64_t tokens, int threads);

// What queries of one sequence see: from its token `first` on, which begins a block, those before `past` in pages. row: of the
// tables of pages. start: which new token is the first query. hidden: as that of a Problem, or null.
struct SequenceView {
    int64_t row, start, queries, first, past, chunk;
    const uint8_t* hidden;
};

// Queries of a step. tables: pages of each row, `width` of them. query, output: of all new tokens, their batch is 1. new_tokens: all
// of them; none where they are read in pages. positions: all from 0 on. starts: multiples of 64.
struct PagedQueries {
    const SequenceView* sequences;
    int64_t count;
    const int64_t* tables;
    int64_t width;
    TensorView query, output;
    ExactTokens new_tokens;
    const int32_t* positions;
    const int64_t* starts;
};

// layer: a problem that lacks what `queries` has.
void attend_pages(const Pages& pages, const Problem& layer, const PagedQueries& queries, AttendProblems& attend, int threads);

}  // namespace narrowkv
