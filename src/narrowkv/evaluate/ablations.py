"""The ablations of KVQuant's ablations (arXiv 2401.18079, section 4 and its appendices) as recipes, one for each step."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from narrowkv.codec import Outliers, Quantization, Scheme, Transform
from narrowkv.codec.scheme_parts import Weighting
from narrowkv.errors import RecipeError
from narrowkv.integrations.probe import ModelInfo
from narrowkv.methods import Recipe

FRACTIONS = (0.0, 0.001, 0.0025, 0.005, 0.0075, 0.01)
SINKS = (0, 1, 4)
GROUPS = (64, 32, 16)
WEIGHTINGS: dict[Weighting, str] = {"none": "unweighted", "fisher": "Fisher", "fisher_scaled": "Fisher with s²"}
EXACT = Scheme(Quantization(16, "exact"))
OWN_TEXT = "calibration text"


@dataclass(frozen=True)
class AblationStep:
    """One recipe of an ablation. label: its name. parameters: by which table and plot arrange it, plain data.

    text, sequences: from which it learns, if it learns; None: as many as there are.
    """

    label: str
    recipe: Recipe
    parameters: dict[str, Any]
    text: str = OWN_TEXT
    sequences: int | None = None


def steps(bits: Sequence[int], info: ModelInfo) -> list[AblationStep]:
    """From integers for each token to all of the method, a step at a time (tables 1 to 5 of the paper in one)."""
    ablation_steps = []
    for width in bits:
        token = Scheme(Quantization(width, "int", strategy="token"))
        ablation = [("integers per token", _recipe(token, token))]
        keys = Scheme(Quantization(width, "int", strategy="channel"))
        ablation.append(("keys per channel", _recipe(keys, token)))
        if rotates(info):
            keys = keys.with_settings(pre_rope=True)
            ablation.append(("keys before RoPE", _recipe(keys, token)))
        for weighting, label in WEIGHTINGS.items():
            ablation.append((f"non-uniform, {label}", _both(keys, token, datatype="nuq", weighting=weighting)))
        ablation += [
            ("1% outliers per matrix", _both(keys, token, datatype="nuq", outliers=0.01, outlier_scope="matrix")),
            ("1% outliers per vector", _both(keys, token, datatype="nuq", outliers=0.01)),
            ("first token exact", _both(keys, token, sinks=1, datatype="nuq", outliers=0.01)),
            ("Q-Norm", _both(keys, token, sinks=1, datatype="nuq", outliers=0.01, qnorm=True)),
        ]
        ablation_steps += [
            AblationStep(label, recipe, {"bits": width, "step": i}) for i, (label, recipe) in enumerate(ablation)
        ]
    return ablation_steps


def grid(bits: Sequence[int], info: ModelInfo) -> list[AblationStep]:
    """Integers with ranges by channel, token, or token and head, in groups, keys before and after RoPE; the rest exact."""
    ablation_steps = []
    for width in bits:
        ranges = {"channel": Scheme(Quantization(width, "int", strategy="channel"))}
        ranges |= {
            f"channel, {group} tokens": Scheme(Quantization(width, "int", strategy="channel", group_size=group))
            for group in GROUPS
        }
        ranges |= {
            "token": Scheme(Quantization(width, "int", strategy="token")),
            "token and head": Scheme(Quantization(width, "int", strategy="token_head")),
        }
        ranges |= {
            f"token, {group} channels": Scheme(Quantization(width, "int", strategy="token_head", group_size=group))
            for group in GROUPS
            if fits(group, info)
        }
        for label, scheme in ranges.items():
            for rotated in (False, True) if rotates(info) else (True,):
                keys = scheme.with_settings(pre_rope=not rotated)
                column = "keys after RoPE" if rotated else "keys before RoPE"
                parameters = {"bits": width, "side": column if rotates(info) else "keys", "range": label}
                ablation_steps.append(AblationStep(f"{column}, {label}", _recipe(keys, EXACT), parameters))
            parameters = {"bits": width, "side": "values", "range": label}
            ablation_steps.append(
                AblationStep(f"values, {label}", _recipe(EXACT.with_settings(pre_rope=False), scheme), parameters)
            )
    return ablation_steps


def outliers(bits: Sequence[int], info: ModelInfo) -> list[AblationStep]:
    """KVQuant with none, and with 0.1% to 1% of outliers (table 17)."""
    return [
        AblationStep(f"{part:.2%}", kvquant(width, info, part), {"bits": width, "fraction": part})
        for width in bits
        for part in FRACTIONS
    ]


def sinks(bits: Sequence[int], info: ModelInfo) -> list[AblationStep]:
    """KVQuant with and without exact first tokens (section 3.5), with and without outliers."""
    return [
        AblationStep(f"{count} exact", kvquant(width, info, part, count), {"bits": width, "fraction": part, "sinks": count})
        for width in bits
        for part in (0.0, 0.01)
        for count in SINKS
    ]


def parts(bits: Sequence[int], info: ModelInfo) -> list[AblationStep]:
    """KVQuant for the keys alone, for the values alone, and for both."""
    ablation_steps = []
    for width in bits:
        whole = kvquant(width, info)
        exact_keys = EXACT.with_settings(pre_rope=whole.keys.transform.pre_rope)
        for side, keys, values in (
            ("keys", whole.keys, EXACT),
            ("values", exact_keys, whole.values),
            ("both", whole.keys, whole.values),
        ):
            ablation_steps.append(
                AblationStep(f"{side} quantized", _recipe(keys, values, sinks=1), {"bits": width, "side": side})
            )
    return ablation_steps


def texts(bits: Sequence[int], info: ModelInfo, sequences: Mapping[str, int]) -> list[AblationStep]:
    """KVQuant learned from fewer and fewer sequences, and from other texts (tables 20 to 22).

    sequences: how many there are of each text.
    """
    ablation_steps = []
    for text, most in sequences.items():
        counts = [2**i for i in range(most.bit_length())] if text == OWN_TEXT else [most]
        for count in sorted({*counts, most}):
            for width in bits:
                parameters = {"bits": width, "text": text, "sequences": count}
                ablation_steps.append(AblationStep(f"{count} of {text}", kvquant(width, info), parameters, text, count))
    return ablation_steps


ABLATIONS: dict[str, Callable[[Sequence[int], ModelInfo], list[AblationStep]]] = {
    "steps": steps,
    "grid": grid,
    "outliers": outliers,
    "sinks": sinks,
    "parts": parts,
}


def kvquant(width: int, info: ModelInfo, part: float = 0.01, count: int = 1) -> Recipe:
    """KVQuant with so much of outliers and this many exact first tokens; after RoPE where the model has none."""
    keys = Scheme(Quantization(width, "nuq", strategy="channel"), Transform(pre_rope=rotates(info)), Outliers(part))
    return _recipe(keys, Scheme(Quantization(width, "nuq", strategy="token"), outliers=Outliers(part)), sinks=count)


def rotates(info: ModelInfo) -> bool:
    """Whether the model rotates its keys by a rotary embedding that a cache can put off until they are read."""
    return any(layer_info.rope is not None for layer_info in info.attention)


def fits(group: int, info: ModelInfo) -> bool:
    """Whether this many channels are a part of every head, and not all of it."""
    dim = math.gcd(*(layer_info.head_dim for layer_info in info.attention))
    return dim % group == 0 and group < dim


def require_widths(bits: Sequence[int]) -> None:
    """Raise RecipeError for widths that learned codebooks do not have."""
    if not bits or not set(bits) <= {2, 3, 4}:
        raise RecipeError(f"Ablations are climbed at 2, 3 or 4 bits, not {', '.join(map(str, bits)) or 'none'}.")


def _both(keys: Scheme, values: Scheme, sinks: int = 0, **changes: Any) -> Recipe:
    """A recipe of two schemes with the same changes to both."""
    return _recipe(keys.with_settings(**changes), values.with_settings(**changes), sinks)


def _recipe(keys: Scheme, values: Scheme, sinks: int = 0) -> Recipe:
    """A recipe named by what distinguishes it from others."""
    return Recipe(f"keys {keys.describe()}; values {values.describe()}; sinks {sinks}", keys=keys, values=values, sinks=sinks)
