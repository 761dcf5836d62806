"""Triton: what all kernels of attention share: channels that turn together, angles, what is hidden, a running softmax.

Queries of a group are columns of tiles, [channels or tokens, room], since a product on a GPU's matrix unit may have as few as
8 columns, but not rows.
"""

import triton
import triton.language as tl


@triton.jit
def pair_channels(C: tl.constexpr):
    """The two channels of each pair [lanes] that turns together; those that do not turn are paired as they come."""
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
        turning = channel // 2 if C.interleaved else channel % C.pairs
        pair = tl.where(beyond < 0, turning, pair)
        second = tl.where(beyond < 0, (channel % 2 == 1) if C.interleaved else (channel >= C.pairs), second)
    return pair, second


@triton.jit
def cos_sin(position, turns):
    """Cosine and sine of positions times frequencies, which are given in turns, float64: whole turns are left out exactly.

    Within an eighth of a turn to either side of a quarter, by their Taylor series, whose error is 3e-7 at most.
    """
    turned = position.to(tl.float64) * turns
    turned -= tl.floor(turned)
    quarter = tl.floor(turned * 4 + 0.5)
    x = ((turned - quarter * 0.25) * 6.283185307179586).to(tl.float32)
    y = x * x
    cos = 1 - y * (0.5 - y * (1 / 24 - y * (1 / 720 - y * (1 / 40320))))
    sin = x * (1 - y * (1 / 6 - y * (1 / 120 - y * (1 / 5040 - y * (1 / 362880)))))
    quarter = quarter.to(tl.int32)
    odd = quarter % 2 == 1
    far, across = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    return tl.where((quarter == 1) | (quarter == 2), -far, far), tl.where((quarter == 2) | (quarter == 3), -across, across)


@triton.jit
def angles(pair, place, live, near, turns, kept, C: tl.constexpr):
    """Cosine and sine by which channels of a pair turn at a token, for `pair` and `place` that broadcast, float32.

    place: of a token in its block, if angles are "near": [2, pairs, 64] those of the positions 0 to 63; else among those held.
    kept: of its sequence, positions [tokens] int32, or "given" angles [tokens, 2, pairs].
    """
    turning = live & (pair < C.pairs)
    if C.turning == "near":
        at = near + pair * 64 + place
        return tl.load(at, mask=turning, other=1.0), tl.load(at + C.pairs * 64, mask=turning, other=0.0)
    elif C.turning == "given":
        at = kept + place * 2 * C.pairs + pair
        cos, sin = tl.load(at, mask=turning, other=1.0), tl.load(at + C.pairs, mask=turning, other=0.0)
        return cos.to(tl.float32), sin.to(tl.float32)
    else:
        return cos_sin(tl.load(kept + place, mask=live, other=0), tl.load(turns + pair, mask=turning, other=0.0))


@triton.jit
def read_query(query, head, rows, channels, scaling, stretch, C: tl.constexpr):
    """Queries [.., rows, head_dim] times scaling, where channels turn also times the factor of the rotary embedding.

    Returns [lanes, room] float32; 0 beyond the last row and channel.
    """
    pair = tl.arange(0, C.lanes)
    live = (rows < C.rows)[None, :] & (pair < C.half)[:, None]
    at = (head * C.rows + rows)[None, :] * C.dim + channels[:, None]
    factor = scaling + pair * 0.0
    if C.pairs > 0 and C.turning != "given":
        factor = tl.where(pair < C.pairs, scaling * stretch, scaling)
    return tl.load(query + at, mask=live, other=0.0).to(tl.float32) * factor[:, None]


@triton.jit
def seen(rows, place, live, first, asking, padding, hidden, hidden_stride, window, C: tl.constexpr):
    """Which tokens queries see: [n, room]. place: [n] of tokens among those held, of which the first is token `first`.

    asking: which token the first query is. padding: of the sequence, 0 where a token is hidden. hidden: [queries,
    hidden_stride] of its tokens held, 0 where a query sees one, in place of causality.
    """
    own = (asking + rows % C.queries)[None, :]
    token = (first + place)[:, None]
    if C.hidden:
        at = (rows % C.queries)[None, :] * hidden_stride + place[:, None]
        sees = tl.load(hidden + at, mask=live[:, None], other=1) == 0
    else:
        sees = live[:, None] & (token <= own)
    if C.window > 0:
        sees &= token > own - window
    if C.padding:
        sees &= (tl.load(padding + first + place, mask=live, other=0) != 0)[:, None]
    return sees


@triton.jit
def in_twos(scores, softcap, C: tl.constexpr):
    """Scores as powers of 2, after softcap * tanh(scores / softcap) if there is one."""
    if C.softcap:
        scores = softcap * (1.0 - 2.0 / (1.0 + tl.exp(2.0 * scores / softcap)))
    return scores * 1.4426950408889634


@triton.jit
def weigh(scores, largest):
    """Weights of scores [n, room], by how much what was summed before fades, and the new largest score of each query."""
    found = tl.maximum(largest, tl.max(scores, 0))
    reference = tl.where(found == float("-inf"), 0.0, found)
    return tl.exp2(scores - reference[None, :]), tl.exp2(largest - reference), found


@triton.jit
def write_part(sums, peaks, part, total, largest, channels, rows, slot, C: tl.constexpr):
    """What a program found: sums [channels, room] to [.., rows, head_dim], largest score and total to [.., rows, 2]."""
    live = rows < C.rows
    at = slot * C.rows + rows
    inside = live[None, :] & (channels < C.dim)[:, None]
    tl.store(sums + at[None, :] * C.dim + channels[:, None], part, mask=inside)
    tl.store(peaks + 2 * at, largest, mask=live)
    tl.store(peaks + 2 * at + 1, total, mask=live)
