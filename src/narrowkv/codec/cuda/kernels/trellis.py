"""Triton: the cheapest bit stream of each row by the algorithm of Viterbi, in the integers of cpp/trellis.h.

A program takes one row:

costs of the 256 states: 0 of the state 0, else the highest
for each element, of rate k:
    the cheapest of the 2^k states that lead to the same 256 / 2^k, which are written to memory
    costs = its cost, less the least of all, + what each state's entry costs the element
follow the states back from the cheapest one; 8 elements of one rate are k bytes
"""

import triton
import triton.language as tl

STATES = tl.constexpr(256)
UNIT = tl.constexpr(8)  # elements of one rate
HISTORY = tl.constexpr(128)  # predecessors of an element at most
UNREACHED = tl.constexpr(65535)  # the highest cost


@triton.jit(do_not_specialize=["rows", "first"])
def search_streams(
    p_elements, p_weights, p_entries, p_codes, p_history, rows, first,
    COUNTS: tl.constexpr, N: tl.constexpr, BYTES: tl.constexpr, BY_ROW: tl.constexpr,
):  # fmt: skip
    """p_elements: [heads, rows, N] int16. p_weights: [heads, rows if BY_ROW else 1, N] uint16. p_entries: [6, 256] int32, in
    the unit of elements. p_codes: [heads, rows, BYTES] uint8. p_history: [programs, N, 128] uint8. Rows from `first` on.
    COUNTS: units of the rates 1 to 6.
    """
    row, head = first + tl.program_id(0), tl.program_id(1)
    at = (head * rows + row).to(tl.int64)
    program = (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
    p_elements += at * N
    p_weights += at * N if BY_ROW else head * N
    p_history += program * N * HISTORY
    index = tl.arange(0, STATES)
    costs = tl.where(index == 0, 0, UNREACHED)
    element, bits = 0, 0
    for i in tl.static_range(6):
        entries = tl.load(p_entries + i * STATES + index)
        for _ in range(COUNTS[i] * UNIT):
            costs = step(costs, entries, p_elements + element, p_weights + element, p_history + element * HISTORY, i + 1)
            element += 1
            bits = tl.minimum(bits + i + 1, 8)
            costs = tl.where(index < (1 << bits), costs, UNREACHED)
    state = tl.min(costs * STATES + index, 0) % STATES
    tl.debug_barrier()  # every predecessor is written
    p_end = p_codes + at * BYTES + BYTES
    for j in tl.static_range(6):
        for _ in range(COUNTS[5 - j]):
            element -= UNIT
            state = write_unit(p_end, p_history + element * HISTORY, state, 6 - j)
            p_end -= 6 - j


@triton.jit
def step(costs, entries, p_element, p_weight, p_history, RATE: tl.constexpr):
    """Costs of all states [256] after an element of this rate; their predecessors are written."""
    groups: tl.constexpr = STATES >> RATE
    best = tl.min(tl.reshape(costs * STATES + tl.arange(0, STATES), [1 << RATE, groups]), 0)
    tl.store(p_history + tl.arange(0, groups), (best % STATES).to(tl.uint8))
    survived = best // STATES
    survived -= tl.min(survived, 0)
    before = tl.reshape(tl.broadcast_to(survived[:, None], [groups, 1 << RATE]), [STATES])
    distance = tl.abs(tl.load(p_element).to(tl.int32) - entries)
    doubled = tl.minimum(2 * distance, UNREACHED).to(tl.uint32)
    cost = (((doubled * doubled) >> 16) * tl.load(p_weight).to(tl.uint32)) >> 16
    return tl.minimum(before + cost.to(tl.int32), UNREACHED)


@triton.jit
def write_unit(p_end, p_history, state, RATE: tl.constexpr):
    """Write the bytes of 8 elements before p_end, the last of which led to a state; returns the state before the first."""
    stream = state.to(tl.int64) * 0
    for i in tl.static_range(UNIT):
        stream |= (state & ((1 << RATE) - 1)).to(tl.int64) << (RATE * i)
        state = tl.load(p_history + (UNIT - 1 - i) * HISTORY + (state >> RATE)).to(tl.int32)
    for i in tl.static_range(RATE):
        tl.store(p_end - 1 - i, ((stream >> (8 * i)) & 255).to(tl.uint8))
    return state
