"""QuantizedTrainer: transformers' Trainer for a model that is to be used with a quantized cache."""

import contextlib
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from narrowkv.calibration import Calibration
from narrowkv.errors import ActivationError, TrainingError
from narrowkv.integrations.hold import evaluating
from narrowkv.methods import Recipe
from narrowkv.training.attention import QuantizedAttention, quantized_attention


class QuantizedTrainer(Trainer):
    """A Trainer within `quantized_attention`, by default to compute what the model did before, without quantization.

    source: the calibration or recipe of the cache. distill: the loss is KL(teacher || model) in nats per token; else it is
    that of the labels. teacher: the unquantized model; None for the model itself with its adapters off. All other parameters
    are those of Trainer. `train` raises TrainingError where the loss is no number, once the last parameters with which it was
    one are saved in the output folder, and where there is no teacher; else as `quantized_attention`.
    """

    def __init__(
        self,
        *args: Any,
        source: Calibration | Recipe | str,
        distill: bool = True,
        teacher: PreTrainedModel | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.model: Any
        self.source = source
        self.distill = distill
        self.teacher = teacher
        self.quantized: QuantizedAttention | None = None
        self._good: dict[str, Tensor] = {}
        if distill:
            self.model_accepts_loss_kwargs = False  # the loss is a mean, for Trainer to divide where it accumulates
        if distill and teacher is None and not hasattr(self.model, "disable_adapter"):
            raise TrainingError("There is no teacher to distill from: add adapters with peft, or pass the unchanged model.")

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with self._within():
            return super().train(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        with self._within():
            return super().evaluate(*args, **kwargs)

    @contextlib.contextmanager
    def _within(self) -> Iterator[None]:
        """Quantized, if it is not already."""
        if self.quantized is not None:
            yield
            return
        with quantized_attention(self.model, self.source) as self.quantized:
            try:
                yield
            finally:
                self.quantized = None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if not self.distill:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = {name: part for name, part in inputs.items() if name != "labels"}
        expected = self._taught(model, inputs)
        outputs = model(**inputs)
        loss = divergence(expected, outputs.logits, inputs.get("attention_mask"))
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _taught(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """Logits [batch, tokens, vocabulary] of the teacher."""
        if self.teacher is not None:
            found: Tensor = self.teacher(**inputs, use_cache=False).logits
            return found
        assert self.quantized is not None
        with self.quantized.off(), evaluating(self.accelerator.unwrap_model(model).get_base_model()), model.disable_adapter():
            logits: Tensor = model(**inputs).logits
        return logits

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        try:
            loss: Tensor = super().training_step(model, *args, **kwargs)
        except ActivationError as error:
            self._stop(error)
        if not bool(loss.isfinite()):
            self._stop()
        self._good = {name: part.detach().clone() for name, part in model.named_parameters() if part.requires_grad}
        return loss

    def _stop(self, error: ActivationError | None = None) -> NoReturn:
        """Save the parameters of the last loss that was a number, and raise TrainingError."""
        step = self.state.global_step + 1
        if not self._good:
            raise TrainingError("The loss is no number at the first step; check the model's weights and dtype.") from error
        with torch.no_grad():
            for name, part in self.model.named_parameters():
                if name in self._good:
                    part.copy_(self._good[name])
        self.save_model()
        raise TrainingError(
            f"The loss is no number any more at step {step}; what was learned before is saved in {self.args.output_dir}, so "
            "go on from there with a lower learning rate."
        ) from error


def divergence(expected: Tensor, logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """KL(expected || logits) in nats, the mean over tokens; both logits [batch, tokens, vocabulary].

    mask: [batch, tokens], 0 for padding.
    """
    targets, found = (part.float().log_softmax(-1) for part in (expected, logits))
    by_token = nn.functional.kl_div(found, targets, reduction="none", log_target=True).sum(-1)
    return by_token.mean() if mask is None else (by_token * mask).sum() / mask.sum()
