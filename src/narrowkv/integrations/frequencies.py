"""Frequencies of rotary embeddings: those that a model stores, and the embedding that they make of positions alone."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from narrowkv.attention import AnyRope, Rope, StoredRope
from narrowkv.attention.rope import CosSin

STATIC_ROPE = ("default", "linear", "llama3", "yarn", "proportional")  # angles that positions alone determine


def by_position(model: PreTrainedModel, positions: Tensor | None, stored: StoredRope, tables: CosSin) -> Rope | None:
    """The same embedding made of positions alone, if frequencies that the model stores and never changes give its tables.

    Every sine must agree for itself: embeddings of one model may differ in their slowest frequencies only.
    """
    if positions is None or positions.dim() != 2:
        return None
    if has_sections(model):
        return None
    rope_state = stored.keep(None, tables)
    expected = torch.cat(stored.cos_sin(rope_state), dim=-1).double()
    tolerance = (2**-6 if rope_state.dtype.itemsize == 2 else 1e-3) * expected.abs() + 1e-6
    for inverse, scaling, kind in frequencies(model):
        rope = Rope(inverse, scaling, stored.interleaved)
        if kind in STATIC_ROPE and 2 * len(inverse) == expected.shape[-1]:
            found = torch.cat(rope.cos_sin(positions), dim=-1).double()
            if bool(((found - expected).abs() <= tolerance).all()):
                return rope
    return None


def module_index(rope: AnyRope | None, found: list[tuple[Tensor, float, str]]) -> int | None:
    """Which of the frequencies that were found in a model are those of an embedding; None where it has none of its own."""
    if not isinstance(rope, Rope):
        return None
    static = (
        i
        for i, (inverse, _, kind) in enumerate(found)
        if kind in STATIC_ROPE and torch.equal(inverse, rope.inverse_frequencies)
    )
    return next(static, None)


def has_sections(model: PreTrainedModel) -> bool:
    """Whether a token has several positions, which are alike only in text."""
    return "mrope_section" in str(getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {})


def frequencies(model: nn.Module) -> list[tuple[Tensor, float, str]]:
    """All inverse frequencies that the model stores, with their scaling and type."""
    found = []
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name.endswith("inv_freq") and "original" not in name:
                prefix = name.removesuffix("inv_freq")
                kind: Any = getattr(module, "rope_type", "default")
                kind = kind.get(prefix.rstrip("_"), "default") if isinstance(kind, dict) else kind
                scaling = float(getattr(module, f"{prefix}attention_scaling", 1.0))
                found.append((buffer.detach().float(), scaling, str(kind)))
    return found
