"""Saturation: how many numbers lie far beyond what codes learned offline can stand for."""

from torch import Tensor

from narrowkv.codec import AnyQuantizer

Numbers = tuple[Tensor, Tensor | None]  # [batch, kv_heads, tokens, head_dim], and which are skipped [batch, tokens]


class Saturation:
    """Counts of the tokens that come together on a CPU: a GPU is not waited for, and who stores leaves out single ones."""

    def __init__(self) -> None:
        self.far = 0
        self.seen = 0

    @property
    def fraction(self) -> float:
        """The part of the numbers seen that are far out."""
        return self.far / self.seen if self.seen else 0.0

    def see(self, quantizers: tuple[AnyQuantizer, AnyQuantizer], parts: tuple[Numbers, Numbers]) -> None:
        """Look at keys and values as they are encoded, of which some are skipped."""
        for quantizer, (numbers, skip) in zip(quantizers, parts, strict=True):
            if numbers.is_cpu:
                far = quantizer.far(numbers)
                if far is not None:
                    self.far += int((far if skip is None else far & ~skip[:, None, :, None]).sum())
                    self.seen += far.numel()
