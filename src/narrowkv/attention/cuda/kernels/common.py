"""Triton: what all kernels of attention share: channels that rotate together, angles, what is hidden, a running softmax.

Queries of a group are columns of tiles, [channels or tokens, capacity], since a product on a GPU's matrix unit may have as few
as 8 columns, but not rows.
"""

import triton
import triton.language as tl


@triton.jit
def pair_channels(C: tl.constexpr):
    """The two channels of each pair [lanes] that rotates together; those that do not rotate are paired as they come."""
    i = tl.arange(0, C.lanes)
    beyond = i - C.pairs
    first = tl.where(beyond < 0, 2 * i if C.interleaved else i, 2 * C.pairs + beyond)
    second = tl.where(beyond < 0, 2 * i + 1 if C.interleaved else i + C.pairs, C.pairs + C.half + beyond)
    return first, second


@triton.jit
def pair_of(channel, C: tl.constexpr):
    """The inverse: the pair of a channel, and whether it is the second."""
    beyond = channel - 2 * C.pairs
    pair = C.pairs + beyond % C.still
    second = beyond >= C.still
    if C.pairs > 0:
        rope_mode = channel // 2 if C.interleaved else channel % C.pairs
        pair = tl.where(beyond < 0, rope_mode, pair)
        second = tl.where(beyond < 0, (channel % 2 == 1) if C.interleaved else (channel >= C.pairs), second)
    return pair, second


@triton.jit
def cos_sin(position, cycles):
    """Cosine and sine of positions times frequencies, which are given in cycles, float64: whole cycles are left out exactly.

    Within an eighth of a cycle to either side of a quarter, by their Taylor series, whose error is 3e-7 at most.
    """
    rotated = position.to(tl.float64) * cycles
    rotated -= tl.floor(rotated)
    quarter = tl.floor(rotated * 4 + 0.5)
    x = ((rotated - quarter * 0.25) * 6.283185307179586).to(tl.float32)
    y = x * x
    cos = 1 - y * (0.5 - y * (1 / 24 - y * (1 / 720 - y * (1 / 40320))))
    sin = x * (1 - y * (1 / 6 - y * (1 / 120 - y * (1 / 5040 - y * (1 / 362880)))))
    quarter = quarter.to(tl.int32)
    odd = quarter % 2 == 1
    far, across = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    return tl.where((quarter == 1) | (quarter == 2), -far, far), tl.where((quarter == 2) | (quarter == 3), -across, across)


@triton.jit
def angles(pair, offset, live, near, cycles, rope_state, C: tl.constexpr):
    """Cosine and sine by which channels of a pair rotate at a token, for `pair` and `offset` that broadcast, float32.

    offset: of a token in its block, if angles are "near": [2, pairs, 64] those of positions 0 to 63; else among those stored.
    rope_state: of its sequence, positions [tokens] int32, or "given" angles [tokens, 2, pairs].
    """
    rope_mode = live & (pair < C.pairs)
    if C.rope_mode == "near":
        at = near + pair * 64 + offset
        return tl.load(at, mask=rope_mode, other=1.0), tl.load(at + C.pairs * 64, mask=rope_mode, other=0.0)
    elif C.rope_mode == "given":
        at = rope_state + offset * 2 * C.pairs + pair
        cos, sin = tl.load(at, mask=rope_mode, other=1.0), tl.load(at + C.pairs, mask=rope_mode, other=0.0)
        return cos.to(tl.float32), sin.to(tl.float32)
    else:
        return cos_sin(tl.load(rope_state + offset, mask=live, other=0), tl.load(cycles + pair, mask=rope_mode, other=0.0))


@triton.jit
def read_query(query, head, rows, channels, scaling, rope_scale, C: tl.constexpr):
    """Queries [.., rows, head_dim] times scaling, where channels rotate also times the factor of the rotary embedding.

    Returns [lanes, capacity] float32; 0 beyond the last row and channel.
    """
    pair = tl.arange(0, C.lanes)
    live = (rows < C.rows)[None, :] & (pair < C.half)[:, None]
    at = (head * C.rows + rows)[None, :] * C.dim + channels[:, None]
    factor = scaling + pair * 0.0
    if C.pairs > 0 and C.rope_mode != "given":
        factor = tl.where(pair < C.pairs, scaling * rope_scale, scaling)
    return tl.load(query + at, mask=live, other=0.0).to(tl.float32) * factor[:, None]


@triton.jit
def seen(rows, offset, live, first, query_positions, padding, hidden, hidden_stride, window, C: tl.constexpr):
    """Which tokens queries see: [n, capacity]. offset: [n] of tokens among those stored, of which the first is token `first`.

    query_positions: which token the first query is. padding: of the sequence, 0 where a token is hidden. hidden: [queries,
    hidden_stride] of its stored tokens, 0 where a query sees one, instead of causality.
    """
    own = (query_positions + rows % C.queries)[None, :]
    token = (first + offset)[:, None]
    if C.hidden:
        at = (rows % C.queries)[None, :] * hidden_stride + offset[:, None]
        sees = tl.load(hidden + at, mask=live[:, None], other=1) == 0
    else:
        sees = live[:, None] & (token <= own)
    if C.window > 0:
        sees &= token > own - window
    if C.padding:
        sees &= (tl.load(padding + first + offset, mask=live, other=0) != 0)[:, None]
    return sees


@triton.jit
def in_powers_of_2(scores, softcap, C: tl.constexpr):
    """Scores as powers of 2, after softcap * tanh(scores / softcap) if there is one."""
    if C.softcap:
        scores = softcap * (1.0 - 2.0 / (1.0 + tl.exp(2.0 * scores / softcap)))
    return scores * 1.4426950408889634


@triton.jit
def weigh(scores, largest):
    """Weights of scores [n, capacity], by how much what was summed before fades, and the new largest score of each query."""
    found = tl.maximum(largest, tl.max(scores, 0))
    reference = tl.where(found == float("-inf"), 0.0, found)
    return tl.exp2(scores - reference[None, :]), tl.exp2(largest - reference), found


@triton.jit
def write_part(sums, running_max, part, total, largest, channels, rows, slot, C: tl.constexpr):
    """What a program found: sums [channels, capacity] to [.., rows, head_dim], largest score and total to [.., rows, 2]."""
    live = rows < C.rows
    at = slot * C.rows + rows
    inside = live[None, :] & (channels < C.dim)[:, None]
    tl.store(sums + at[None, :] * C.dim + channels[:, None], part, mask=inside)
    tl.store(running_max + 2 * at, largest, mask=live)
    tl.store(running_max + 2 * at + 1, total, mask=live)
