"""Fingerprint of a model: tells whether a calibration was made for it, whatever dtype it is loaded in."""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from narrowkv.errors import CalibrationError

SAMPLES = 64
TOLERANCE = 0.02  # of the largest sample: loading in bfloat16 moves a number by 0.4%, another model by all of it


@dataclass(frozen=True)
class Fingerprint:
    """Shape of the attention, and some numbers of the input embedding.

    architecture: the model's type. layers, kv_heads, head_dim: of its attention. vocabulary: rows of the embedding.
    embedding: 64 numbers spread over it.
    """

    architecture: str
    layers: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    embedding: list[float] = field(repr=False)

    @classmethod
    def of(cls, model: Any) -> "Fingerprint":
        """Fingerprint of a loaded transformers model."""
        config = model.config.get_text_config(decoder=True)
        table = model.get_input_embeddings().weight.detach()
        place = torch.linspace(0, table.numel() - 1, SAMPLES, dtype=torch.float64).long().to(table.device)
        heads = config.num_attention_heads
        return cls(
            architecture=config.model_type,
            layers=config.num_hidden_layers,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocabulary=table.shape[0],
            embedding=[round(number, 6) for number in table.flatten()[place].float().tolist()],
        )

    def check(self, other: "Fingerprint") -> None:
        """Raise CalibrationError if `other`, of the model at hand, is of another model than this one."""
        for name, expected in asdict(self).items():
            found = getattr(other, name)
            if name == "embedding":
                ours, theirs = torch.tensor(expected), torch.tensor(found)
                same = ours.shape == theirs.shape and (ours - theirs).abs().max() <= TOLERANCE * ours.abs().max()
            else:
                same = expected == found
            if not same:
                detail = "other weights" if name == "embedding" else f"{name} {expected} there, {found} here"
                raise CalibrationError(f"This calibration belongs to another model ({detail}); calibrate this model.")
