"""Saturation: how many elements lie far beyond what codes learned offline can stand for."""

from torch import Tensor

from narrowkv.codec import AnyQuantizer

Elements = tuple[Tensor, Tensor | None]  # [batch, kv_heads, tokens, head_dim], and which are skipped [batch, tokens]


class Saturation:
    """Counts of the tokens that come together on a CPU: a GPU is not waited for, and who stores leaves out single ones."""

    def __init__(self) -> None:
        self.out_of_range = 0
        self.seen = 0

    @property
    def fraction(self) -> float:
        """The part of the elements seen that are far out."""
        return self.out_of_range / self.seen if self.seen else 0.0

    def observe(self, quantizers: tuple[AnyQuantizer, AnyQuantizer], parts: tuple[Elements, Elements]) -> None:
        """Look at keys and values as they are encoded, of which some are skipped."""
        for quantizer, (elements, skip) in zip(quantizers, parts, strict=True):
            if elements.is_cpu:
                out_of_range = quantizer.out_of_range(elements)
                if out_of_range is not None:
                    self.out_of_range += int((out_of_range if skip is None else out_of_range & ~skip[:, None, :, None]).sum())
                    self.seen += out_of_range.numel()
