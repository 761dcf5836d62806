"""Tables that trellis-coded codes start from, learned on a unit Gaussian: written by tools/trellis_tables.py."""

import torch

from narrowkv.codec.trellis import TrellisTables

# of the rates 1 to 6: the grid step in standard deviations, and the squared error measured on 1,120,000 elements
STEPS = (0.036016, 0.044739, 0.049949, 0.055196, 0.061803, 0.055441)
SQUARED_ERRORS = (0.29898, 0.08102, 0.02264, 0.006447, 0.0022501, 0.0010019)

# fmt: off
HIGH = (
    (11, -13, -16, 19, 26, -25, 12, -20, -12, 22, 20, -10, -14, 25, -34, 23),
    (-8, 31, 0, -9, 2, -19, 26, 20, -22, 2, 17, 1, 16, 8, -24, -33),
    (5, -9, -6, 9, -17, 4, -29, 20, 19, -28, 15, -20, 33, 0, -12, -8),
    (-5, -3, 4, 12, -17, 1, -22, -12, -8, 17, 13, 27, 8, 35, -26, -34),
    (-3, 34, -12, 4, -21, -32, 6, 8, 2, -15, 12, 15, 22, -7, -7, -25),
    (-47, -16, 15, 46, -45, -14, 17, 48, -48, -17, 14, 45, -46, -15, 16, 47),
)
LOW = (
    (-22, 11, -6, 18, 0, 5, 20, -10, 28, -9, 7, -17, 9, -10, -7, -17),
    (-7, 0, 16, -27, -3, 13, 18, -17, -8, -23, -1, 12, -10, 29, 12, -3),
    (-16, 28, 12, 7, 0, -27, -8, 19, 21, -4, 14, -9, -20, 4, -29, 9),
    (-4, -22, 4, 7, 8, 23, -8, 1, -13, 0, -27, 14, 11, -14, 3, 16),
    (-5, 4, -17, 6, 8, 0, -22, 13, 1, 16, -1, -14, 6, -28, 10, 21),
    (-14, -12, -11, -9, -7, -5, -3, -1, 1, 3, 5, 7, 9, 11, 12, 14),
)
# fmt: on


def gaussian_tables() -> TrellisTables:
    """The tables; an element of rate k is to be divided by its standard deviation times STEPS[k - 1]."""
    return TrellisTables(*(torch.tensor(part, dtype=torch.int8, device="cpu") for part in (HIGH, LOW)))
