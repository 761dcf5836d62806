"""What may be given to calibrate on: token ids in the forms in which tokenizers and data loaders hand them over."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from narrowkv.errors import CalibrationError

WANTED = "token ids [batch, tokens], such as `narrowkv.evaluate.cut_windows(tokenizer, text, window=2048)` makes of a text"


def token_batches(given: Any, model: PreTrainedModel) -> list[Tensor]:
    """Batches of token ids [batch, tokens] int64, of at least 2 tokens that the model knows.

    given: token ids [n, tokens], of which each sequence becomes a batch, or an iterable of batches: tensors, arrays and lists
    of integers, or dictionaries with `input_ids`, whose padding is left out where they have an `attention_mask`.
    Raises CalibrationError for anything else.
    """
    if isinstance(given, Mapping) or _is_ids(given):
        parts = [row for batch in _batches(given) for row in batch.split(1)]
    elif isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
        raise CalibrationError(f"Calibration takes {WANTED}, not {_named(given)}.")
    else:
        parts = [batch for one in given for batch in _batches(one)]
    data = [batch for batch in parts if batch.numel()]
    if not data or any(batch.shape[1] < 2 for batch in data):
        raise CalibrationError(
            "Calibration needs batches of token ids [batch, tokens] of 2 tokens or more; give it more text."
        )
    _require_known(data, model)
    return data


def _batches(given: Any) -> Iterator[Tensor]:
    """One batch, or where padding is left out one for each sequence."""
    mask = None
    if isinstance(given, Mapping):
        if "input_ids" not in given:
            raise CalibrationError(
                f"A batch has {', '.join(map(str, given)) or 'nothing'}, but no `input_ids`; give {WANTED}."
            )
        given, mask = given["input_ids"], given.get("attention_mask")
    if not isinstance(given, (Tensor, np.ndarray)) and _is_ids(given) and any(isinstance(row, Sequence) for row in given):
        for i, row in enumerate(given):  # which may differ in length
            yield from _batches({"input_ids": row} | ({} if mask is None else {"attention_mask": mask[i]}))
        return
    ids = _as_ids(given)
    mask_ = torch.ones_like(ids) if mask is None else _as_tensor(mask)
    if mask_.numel() != ids.numel():
        raise CalibrationError(f"An attention mask covers {mask_.numel()} of {ids.numel()} tokens; give one for each token.")
    if bool(mask_.all()):
        yield ids
        return
    for row, real in zip(ids, mask_.to(ids.device).bool().reshape(ids.shape), strict=True):
        yield row[real][None]


def _as_ids(given: Any) -> Tensor:
    if not _is_ids(given):
        raise CalibrationError(f"A batch is {_named(given)}; give {WANTED}.")
    ids = _as_tensor(given)
    if ids.numel() and (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool):
        raise CalibrationError(f"Token ids are integers, and a batch has {ids.dtype}; give {WANTED}.")
    ids = ids[None] if ids.dim() == 1 else ids
    if ids.dim() != 2:
        raise CalibrationError(f"A batch has the shape {tuple(ids.shape)}; give {WANTED}.")
    return ids.to(torch.int64)


def _as_tensor(given: Any) -> Tensor:
    """On the CPU where it is no tensor yet, whatever the default device."""
    return given if isinstance(given, Tensor) else torch.as_tensor(given, device="cpu")


def _is_ids(given: Any) -> bool:
    """Whether this is an array, or a list of elements or of such lists."""
    if isinstance(given, (Tensor, np.ndarray)):
        return True
    if not isinstance(given, (list, tuple)) or not given:
        return False
    return all(isinstance(one, Integral) for one in given) or all(
        isinstance(row, (list, tuple)) and all(isinstance(one, Integral) for one in row) for row in given
    )


def _require_known(data: Sequence[Tensor], model: PreTrainedModel) -> None:
    """Raise CalibrationError for token ids that the model has no embedding of."""
    try:
        embedding: Any = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # some models do not say
        return
    words = getattr(embedding, "num_embeddings", None) or len(embedding.weight)
    for batch in data:
        if not 0 <= int(batch.min()) <= int(batch.max()) < words:
            raise CalibrationError(
                f"Token ids are from 0 to {words - 1:,} for this model, and a batch has {int(batch.min()):,} to "
                f"{int(batch.max()):,}; use the model's own tokenizer."
            )


def _named(given: Any) -> str:
    kind = type(given)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
