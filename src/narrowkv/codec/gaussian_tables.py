"""Tables that trellis-coded codes start from, learned on a unit Gaussian: written by tools/trellis_tables.py."""

import torch

from narrowkv.codec.trellis import TrellisTables

# of the rates 1 to 6: the grid step in standard deviations, and the squared error measured on 1,120,000 elements
STEPS = (0.037606, 0.041034, 0.050001, 0.055595, 0.060762, 0.053236)
SQUARED_ERRORS = (0.29242, 0.079515, 0.021734, 0.00618, 0.0019749, 0.00084114)

# fmt: off
HIGH = (
    (15, -17, 17, -5, 25, -17, -19, 22, -33, 11, -13, 1, -14, 29, 21, -24),
    (-1, -3, -2, -8, 20, -29, 15, 7, -7, -1, -20, 27, -20, 28, 11, -31),
    (30, -12, -4, 6, -11, 0, -35, -29, 2, 14, 19, -18, 10, 26, -21, -5),
    (15, 5, 9, -15, 18, -34, -8, -20, -12, -24, 32, -5, -2, 23, 2, 11),
    (-4, 40, -11, 6, -21, -34, 3, 10, 0, -17, 13, 17, 23, -6, -8, -25),
    (-44, -16, 14, 44, -43, -12, 17, 49, -49, -17, 12, 42, -45, -14, 15, 45),
)
LOW = (
    (9, -17, -12, 17, 4, -13, 11, -5, -6, 24, 17, -27, -11, 2, -6, 10),
    (24, -25, 4, -8, -8, -16, 34, 11, -27, 18, 1, -8, 28, 10, -29, -2),
    (17, 5, 9, 28, -27, -2, -5, -13, 13, -15, 3, -8, -22, 6, -3, 23),
    (-4, 6, 2, -7, -27, -2, -10, 2, 15, -17, 13, 28, 10, -13, 21, -22),
    (-4, 4, -19, 6, 11, -2, -22, 13, 1, 19, 1, -14, 8, -27, 10, 16),
    (-14, -13, -11, -9, -7, -5, -3, -1, 1, 3, 5, 7, 9, 10, 12, 14),
)
# fmt: on


def gaussian_tables() -> TrellisTables:
    """The tables; an element of rate k is to be divided by its standard deviation times STEPS[k - 1]."""
    return TrellisTables(*(torch.tensor(part, dtype=torch.int8, device="cpu") for part in (HIGH, LOW)))
