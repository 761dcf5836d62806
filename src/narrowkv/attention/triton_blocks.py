"""Triton: attention over sealed blocks, read where they lie. A program takes a run of blocks of one KV head of one sequence.

Each block is decoded once for all queries of its group. Keys are turned relative to the block's first token, by angles that all
blocks share, and queries are turned back by its position. Outliers are added as what they differ by from the number that their
code stands for: a product with a one-hot matrix adds a piece of them at once, whichever tokens they are of.
"""

import triton
import triton.language as tl

from narrowkv.attention.triton_rows import angles, cos_sin, in_twos, pair_channels, pair_of, read_query, seen, stretched
from narrowkv.attention.triton_rows import weigh, write_part
from narrowkv.attention.triton_tiles import column_of, column_places, levels_of, missed, read_codes, to_numbers


@triton.jit
def attend_blocks(
    query, table, starts, bases, lengths, sums, peaks,
    key_table, key_scale, key_zero, value_table, value_scale, value_zero,
    near, turns, kept, padding, hidden, sink_index,
    batch, slots, splits, kept_stride, padding_stride, hidden_batch, hidden_stride, window,
    scaling, softcap, stretch,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """query: [batch, heads, rows, head_dim]. table: [columns, batch, 2, 8] addresses. starts: [columns + 1]; bases: [columns,
    batch] positions of the first tokens. lengths: [4] columns, sealed tokens that count, first token held, first query.
    near, turns, kept: of `angles`; padding, hidden: of `seen`, for each sequence. Results as of `write_part`, [batch * heads,
    slots, ..], of which a program fills the slot of its split.
    """
    split, place = tl.program_id(0), tl.program_id(1)
    row, head = place // K.heads, place % K.heads
    rows = tl.program_id(2) * C.room + tl.arange(0, C.room)
    count, sealed = tl.load(lengths), tl.load(lengths + 1)
    first, asking = tl.load(lengths + 2), tl.load(lengths + 3)
    share = (count + splits - 1) // splits
    begin = split * share
    end = tl.minimum(begin + share, count)
    kept += row.to(tl.int64) * kept_stride
    padding += row.to(tl.int64) * padding_stride
    hidden += (row % hidden_batch).to(tl.int64) * C.queries * hidden_stride

    channel_a, channel_b = pair_channels(C)
    query_a = stretched(read_query(query, place, rows, channel_a, C) * scaling, stretch, C)
    query_b = stretched(read_query(query, place, rows, channel_b, C) * scaling, stretch, C)
    levels_a = key_levels(key_table, head, channel_a, K)
    levels_b = key_levels(key_table, head, channel_b, K)
    value_levels = 0
    value_levels_b = 0
    if V.bits < 16:
        value_rows = tl.arange(0, V.row_room)
        value_levels = levels_of(value_table, head, value_rows, value_rows * 0, V)
        value_levels_b = levels_of(value_table, head, value_rows, value_rows * 0 + V.numbers - 1, V)
    pair = tl.arange(0, C.lanes)
    turn = tl.load(turns + pair, mask=pair < C.pairs, other=0.0)
    token_of = tl.reshape(column_places(K), [64])  # of a column of scores

    largest = tl.full([C.room], float("-inf"), tl.float32)
    total = tl.zeros([C.room], tl.float32)
    part = tl.zeros([C.room, V.channels], tl.float32)
    for i in range(begin, end):
        entry = table + (i * batch + row) * 16
        start = tl.load(starts + i)
        live = token_of < tl.minimum(tl.load(starts + i + 1), sealed) - start
        back_a, back_b = query_a, query_b
        if C.turning == "near":
            cos, sin = cos_sin(tl.load(bases + i * batch + row), turn)
            back_a = query_a * cos[None, :] + query_b * sin[None, :]
            back_b = query_b * cos[None, :] - query_a * sin[None, :]
        keys_a, keys_b = read_keys(entry, levels_a, levels_b, key_table, key_scale, key_zero, head, token_of, K, C)
        at = 0 if C.turning == "near" else start  # where angles of tokens are counted from
        if C.turning != "none":
            cos, sin = angles(pair[:, None], at + token_of[None, :], live[None, :], near, turns, kept, C)
            keys_a, keys_b = keys_a * cos - keys_b * sin, keys_b * cos + keys_a * sin
        scores = tl.dot(back_a.to(DOT), keys_a.to(DOT), input_precision=C.precision)
        scores = tl.dot(back_b.to(DOT), keys_b.to(DOT), scores, input_precision=C.precision)
        if K.nonzeros > 0:
            scores = add_key_outliers(
                scores, entry, key_table, key_scale, key_zero, head, token_of, back_a, back_b, at, near, turns, kept, K, C
            )
        scores = in_twos(scores, softcap, C)
        for j in tl.static_range(C.sinks):
            live &= first + start + token_of != tl.load(sink_index + row * C.sinks + j)
        sees = seen(rows, start + token_of, live, first, asking, padding, hidden, hidden_stride, window, C)
        weights, fading, largest = weigh(tl.where(sees, scores, float("-inf")), largest)
        total = total * fading + tl.sum(weights, 1)
        values = read_values(
            entry + 8, value_levels, value_levels_b, value_table, value_scale, value_zero, head, token_of, V
        )
        part = tl.dot(weights.to(DOT), values.to(DOT), part * fading[:, None], input_precision=C.precision)
        if V.nonzeros > 0:
            part = add_value_outliers(
                part, entry + 8, value_table, value_scale, value_zero, head, weights, K, V, C
            )
    write_part(sums, peaks, part, total, largest, value_channels(V), rows, place * slots + split, C)


@triton.jit
def exact_at(entry, head, token, channel, F: tl.constexpr):
    """Exact numbers of a block [64, head_dim], for `token` and `channel` that broadcast, float32; 0 beyond the last channel."""
    address = tl.load(entry)
    at = (head * 64 + token) * F.dim + channel
    if F.kind == "fp16":
        numbers = tl.multiple_of(address.to(tl.pointer_type(tl.float16)), 16)
    elif F.kind == "bf16":
        numbers = tl.multiple_of(address.to(tl.pointer_type(tl.bfloat16)), 16)
    else:
        numbers = tl.multiple_of(address.to(tl.pointer_type(tl.float32)), 16)
    return tl.load(numbers + at, mask=(token >= 0) & (channel < F.dim), other=0.0).to(tl.float32)


@triton.jit
def key_levels(table, head, channel, K: tl.constexpr):
    """Codebooks of the codes in which channels lie."""
    if K.bits == 16:
        return 0
    else:
        return levels_of(table, head, channel % K.codes, channel // K.codes, K)


@triton.jit
def read_keys(entry, levels_a, levels_b, table, scale, zero, head, token_of, K: tl.constexpr, C: tl.constexpr):
    """Keys of a block, but for outliers, not turned: the first and the second channels of pairs, [lanes, 64] each."""
    channel_a, channel_b = pair_channels(C)
    if K.bits == 16:
        keys_a = exact_at(entry, head, token_of[None, :], channel_a[:, None], K)
        keys_b = exact_at(entry, head, token_of[None, :], channel_b[:, None], K)
        return keys_a, keys_b
    else:
        rows_a, rows_b = channel_a % K.codes, channel_b % K.codes
        codes_a = read_codes(entry, head, rows_a, K)
        codes_b = codes_a
        if K.numbers == 1 or not C.coupled:
            codes_b = read_codes(entry, head, rows_b, K)
        keys_a = to_numbers(codes_a, levels_a, entry, table, scale, zero, head, rows_a, channel_a // K.codes, K)
        keys_b = to_numbers(codes_b, levels_b, entry, table, scale, zero, head, rows_b, channel_b // K.codes, K)
        return keys_a, keys_b


@triton.jit
def value_channels(V: tl.constexpr):
    """Which channel each column of a tile of values is: [channels]; head_dim or more where there is none."""
    if V.channel_major:
        column = tl.arange(0, V.channels)
        code = column // V.numbers
        return tl.where(code < V.codes, code + column % V.numbers * V.codes, V.dim)
    else:
        return tl.reshape(column_places(V), [V.channels])


@triton.jit
def read_values(entry, levels, levels_b, table, scale, zero, head, token_of, V: tl.constexpr):
    """Values of a block, but for outliers: [64, channels]."""
    if V.bits == 16:
        return exact_at(entry, head, token_of[:, None], value_channels(V)[None, :], V)
    elif not V.channel_major:
        codes = read_codes(entry, head, token_of, V)
        return to_numbers(codes, levels, entry, table, scale, zero, head, token_of, token_of * 0, V)
    else:
        rows = tl.arange(0, V.row_room)
        codes = read_codes(entry, head, rows, V)
        numbers = to_numbers(codes, levels, entry, table, scale, zero, head, rows, rows * 0, V)
        if V.numbers == 2:
            others = to_numbers(codes, levels_b, entry, table, scale, zero, head, rows, rows * 0 + 1, V)
            both = tl.join(tl.trans(numbers), tl.trans(others))
            return tl.reshape(both, [64, V.channels])
        else:
            return tl.trans(numbers)


@triton.jit
def outlier_range(entry, head):
    """Where the outliers of a head of a block begin and end."""
    offsets = tl.load(entry + 7).to(tl.pointer_type(tl.int32)) + head
    return tl.load(offsets), tl.load(offsets + 1)


@triton.jit
def outlier_values(entry, which, number: tl.constexpr, live, F: tl.constexpr):
    """Exact numbers of outliers [n], float32."""
    address = tl.load(entry + 5)
    at = which * F.numbers + number
    if F.kind == "bf16":
        return tl.load(address.to(tl.pointer_type(tl.bfloat16)) + at, mask=live, other=0.0).to(tl.float32)
    else:
        return tl.load(address.to(tl.pointer_type(tl.float16)) + at, mask=live, other=0.0).to(tl.float32)


@triton.jit
def add_key_outliers(
    scores, entry, table, scale, zero, head, token_of, back_a, back_b, at, near, turns, kept, K: tl.constexpr, C: tl.constexpr
):
    """Scores [room, 64] with what outliers of keys add; back_a, back_b: queries [room, lanes]; at: of `angles`."""
    begin, end = outlier_range(entry, head)
    index = tl.load(entry + 6).to(tl.pointer_type(tl.int16))
    for start in range(begin, end, K.nonzeros):
        which = start + tl.arange(0, K.nonzeros)
        live = which < end
        places = tl.load(index + which, mask=live, other=0).to(tl.int32)
        token, code = places // K.codes, places % K.codes
        added = tl.zeros([C.room, K.nonzeros], tl.float32)
        for number in tl.static_range(K.numbers):
            exact = outlier_values(entry, which, number, live, K)
            more = missed(entry, table, scale, zero, head, token, code, number, exact, live, K)
            pair, second = pair_of(code + number * K.codes, C)
            pairs = tl.broadcast_to(pair[None, :], [C.room, K.nonzeros])
            first_part, second_part = tl.gather(back_a, pairs, 1), tl.gather(back_b, pairs, 1)
            factor = tl.where(second[None, :], second_part, first_part)
            if C.turning != "none":
                cos, sin = angles(pair, at + token, live, near, turns, kept, C)
                crossed = tl.where(second[None, :], -first_part, second_part)
                factor = factor * cos[None, :] + crossed * sin[None, :]
            added += factor * more[None, :]
        chosen = (token[:, None] == token_of[None, :]).to(tl.float32)
        scores = tl.dot(added, chosen, scores, input_precision=C.precision)
    return scores


@triton.jit
def add_value_outliers(
    part, entry, table, scale, zero, head, weights, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr
):
    """Sums [room, channels] with what outliers of values add; weights: [room, 64]."""
    begin, end = outlier_range(entry, head)
    index = tl.load(entry + 6).to(tl.pointer_type(tl.int16))
    channels = value_channels(V)
    for start in range(begin, end, V.nonzeros):
        which = start + tl.arange(0, V.nonzeros)
        live = which < end
        places = tl.load(index + which, mask=live, other=0).to(tl.int32)
        token, code = places // V.codes, places % V.codes
        columns = tl.broadcast_to(column_of(token, K)[None, :], [C.room, V.nonzeros])
        weight = tl.gather(weights, columns, 1)
        for number in tl.static_range(V.numbers):
            exact = outlier_values(entry, which, number, live, V)
            more = missed(entry, table, scale, zero, head, token, code, number, exact, live, V)
            chosen = (code[:, None] + number * V.codes == channels[None, :]).to(tl.float32)
            part = tl.dot(weight * more[None, :], chosen, part, input_precision=C.precision)
    return part
