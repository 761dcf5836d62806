"""What recipes were measured to lose on real models; the metrics are written by `make results`."""

import json
from dataclasses import dataclass
from importlib.resources import files


@dataclass(frozen=True)
class Loss:
    """Of one recipe on one model, with tables of the built-in mix where it learns.

    bits: for each element of a cache of 32,768 tokens, everything counted. encyclopedia, code: strict divergence from the
    exact model on such text, in nats for a token.
    """

    bits: float
    encyclopedia: float
    code: float


def measured_losses() -> dict[str, dict[str, Loss]]:
    """By recipe and by model."""
    losses = json.loads(files(__package__).joinpath("measured.json").read_text(encoding="utf-8"))
    return {recipe: {model: Loss(*figures) for model, figures in by_model.items()} for recipe, by_model in losses.items()}
