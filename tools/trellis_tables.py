"""Learn the tables that trellis-coded codes start from, on a unit Gaussian: `python tools/trellis_tables.py [--starts N]`.

Lloyd's iteration over the trellis: encode Gaussian elements, then move `high` and `low` to the least squares of what fell to
them. Of many starts (quantiles in random order, a uniform code in an element's own bits shifted by older ones, random parts)
the best is stored, by the squared error of a sample of its own. Prints the module `src/narrowkv/codec/gaussian_tables.py`.
"""

import argparse
import sys
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from narrowkv.codec.trellis import GRID_STEP, MOST_RATE, NIBBLE, STATES, TOP, UNIT, TrellisTables, encode, states

LEARNED_ON, MEASURED_ON, UNITS = 1000, 20_000, 8  # rows, and their units
SETTLED = UNIT  # the first elements see only some of the states
ROUNDS, LAST_ROUNDS, BEST = 12, 30, 3
UNIFORM_STEPS = (1.6, 0.9957, 0.586, 0.3352, 0.1881, 0.1041)  # of the best uniform code for a Gaussian
NOISE = (0.5, 1.0, 0.25)  # of the root of the squared error
SWEEPS, STRETCHES = 3, (0.02, 0.005)
PRIOR = 1e-3  # weight of the old table, of all elements


@dataclass(frozen=True)
class Learned:
    """A table of one rate, [2, 16] (high, low) float64 in standard deviations, its grid step and its squared error there."""

    table: Tensor
    step: float
    error: float

    def on_grid(self, rate: int) -> TrellisTables:
        parts = torch.zeros(2, MOST_RATE, NIBBLE, dtype=torch.int8)
        parts[:, rate - 1] = (self.table / self.step).round().to(torch.int8)
        return TrellisTables(*parts)


def fitting_step(table: Tensor) -> float:
    """The grid step that lets the largest entry just fit, rounding of both parts included."""
    return max(table.amax(1).sum().item(), -table.amin(1).sum().item()) / (TOP - 1)


def starts(rate: int, seed: int) -> list[Tensor]:
    """Tables [2, 16] to begin with."""
    generator = torch.Generator().manual_seed(seed)
    state, older = torch.arange(STATES), STATES >> rate
    quantiles = torch.special.ndtri((torch.arange(STATES).double() + 0.5) / STATES)[
        torch.randperm(STATES, generator=generator)
    ]
    order = torch.randperm(older, generator=generator)
    own = (state % (1 << rate)).double() - (2**rate - 1) / 2
    shifted = UNIFORM_STEPS[rate - 1] * (own + 2 * ((order[state >> rate].double() + 0.5) / older - 0.5))
    nibbles = torch.randn(2, NIBBLE, generator=generator, dtype=torch.float64) * torch.tensor([[0.8], [0.5]])
    return [_additive(quantiles), _additive(shifted), nibbles.double()]


def _additive(table: Tensor) -> Tensor:
    """The nearest [2, 16] to a table of all states."""
    square = table.view(NIBBLE, NIBBLE)
    return torch.stack([square.mean(1) - table.mean() / 2, square.mean(0) - table.mean() / 2])


def search(learned: Learned, rate: int, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor, float]:
    """Gaussian elements, the states that they are encoded to, both flat, and the squared error."""
    tables, counts = learned.on_grid(rate), [UNITS * (k == rate) for k in range(MOST_RATE + 1)]
    x = torch.randn(1, rows, UNITS * UNIT, generator=generator, dtype=torch.float64)
    elements = (x / learned.step * GRID_STEP).round().clamp(-32768, 32767).to(torch.int16)
    weights = torch.full((1, 1, UNITS * UNIT), 65535, dtype=torch.int32).to(torch.uint16)
    found = states(encode(elements, weights, counts, tables), counts)[..., SETTLED:].flatten()
    x = x[..., SETTLED:].flatten()
    return x, found, (tables.entries()[rate - 1][found] * learned.step - x).square().mean().item()


def improved(table: Tensor, x: Tensor, found: Tensor) -> Tensor:
    """The table of least squares for the elements of each state, drawn a little to the old one."""
    counts = torch.bincount(found, minlength=STATES).double().view(NIBBLE, NIBBLE)
    sums = torch.bincount(found, weights=x, minlength=STATES).view(NIBBLE, NIBBLE)
    normal = torch.cat([torch.cat([counts.sum(1).diag(), counts], 1), torch.cat([counts.T, counts.sum(0).diag()], 1)])
    prior = PRIOR * counts.sum() / NIBBLE
    right = torch.cat([sums.sum(1), sums.sum(0)]) + prior * table.flatten()
    return torch.linalg.solve(normal + prior * torch.eye(2 * NIBBLE, dtype=torch.float64), right).view(2, NIBBLE)


def settle(table: Tensor, rate: int, rounds: int, rows: int) -> Learned:
    """The best table of some rounds; all tables of a rate see the same elements."""
    generator = torch.Generator().manual_seed(rate)
    tried = []
    for _ in range(rounds):
        learned = Learned(table, fitting_step(table), 0.0)
        x, found, error = search(learned, rate, rows, generator)
        tried.append(replace(learned, error=error))
        table = improved(table, x, found)
        middle = table[1].mean()
        table = table + torch.stack([middle, -middle])[:, None]
    return min(tried, key=by_error)


def shaken(learned: Learned, rate: int, count: int) -> Learned:
    """The best table that is found by disturbing the best one so far, `count` times."""
    generator = torch.Generator().manual_seed(rate)
    for i in range(count):
        noise = torch.randn(2, NIBBLE, generator=generator, dtype=torch.float64)
        amount = NOISE[i % len(NOISE)] * learned.error**0.5
        learned = min(learned, settle(learned.table + amount * noise, rate, ROUNDS, LEARNED_ON), key=by_error)
    return learned


def polished(learned: Learned, rate: int) -> Learned:
    """The best table that is reached by moving single entries, or the step, a little on the grid."""
    learned = replace(learned, table=(learned.table / learned.step).round() * learned.step, error=float("inf"))
    for move in [*range(2 * NIBBLE), *STRETCHES] * SWEEPS:
        for sign in (0, -1, 1):
            if isinstance(move, float):
                factor = 1 + sign * move
                other = replace(learned, table=learned.table * factor, step=learned.step * factor)
            else:
                table = learned.table.clone()
                table.view(-1)[move] += sign * learned.step
                other = replace(learned, table=table)
            if fitting_step((other.table / other.step).round()) * (TOP - 1) > TOP:
                continue
            error = search(other, rate, 2 * LEARNED_ON, torch.Generator().manual_seed(rate))[2]
            learned = min(learned, replace(other, error=error), key=by_error)
    return learned


def learn(rate: int, count: int) -> Learned:
    """The best table of `count` starts of each kind, and its squared error on a sample of its own."""
    tried = [settle(start, rate, ROUNDS, LEARNED_ON) for seed in range(count) for start in starts(rate, seed)]
    best = [shaken(one, rate, 2 * count) for one in sorted(tried, key=by_error)[:BEST]]
    found = polished(settle(min(best, key=by_error).table, rate, LAST_ROUNDS, 10 * LEARNED_ON), rate)
    return replace(found, error=search(found, rate, MEASURED_ON, torch.Generator().manual_seed(99))[2])


def by_error(learned: Learned) -> float:
    return learned.error


TEMPLATE = '''"""Tables that trellis-coded codes start from, learned on a unit Gaussian: written by tools/trellis_tables.py."""

import torch

from narrowkv.codec.trellis import TrellisTables

# of the rates 1 to 6: the grid step in standard deviations, and the squared error measured on {measured:,} elements
STEPS = ({steps})
SQUARED_ERRORS = ({errors})

# fmt: off
HIGH = (
{high}
)
LOW = (
{low}
)
# fmt: on


def gaussian_tables() -> TrellisTables:
    """The tables; an element of rate k is to be divided by its standard deviation times STEPS[k - 1]."""
    return TrellisTables(*(torch.tensor(part, dtype=torch.int8, device="cpu") for part in (HIGH, LOW)))
'''


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--starts", type=int, default=14, help="of each of three kinds")
    arguments = parser.parse_args()
    found = []
    for rate in range(1, MOST_RATE + 1):
        found.append(learn(rate, arguments.starts))
        print(f"rate {rate}: squared error {found[-1].error:.5f}", file=sys.stderr, flush=True)
    parts = [one.on_grid(rate) for rate, one in enumerate(found, start=1)]
    rows = {
        name: "\n".join(f"    {tuple(getattr(part, name)[i].tolist())}," for i, part in enumerate(parts))
        for name in ("high", "low")
    }
    steps, errors = (
        ", ".join(f"{x:.5g}" for x in elements) for elements in zip(*((one.step, one.error) for one in found), strict=True)
    )
    measured = MEASURED_ON * (UNITS * UNIT - SETTLED)
    print(TEMPLATE.format(measured=measured, steps=steps, errors=errors, **rows), end="")


if __name__ == "__main__":
    main()
