"""The form for a GPU of `Quantizer.encode` for ranges of groups, written in Triton."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from narrowkv.codec.encode_buffer import EncodeBuffer
from narrowkv.codec.scheme import Scheme


@dataclass(frozen=True)
class GroupEncoder:
    """`Quantizer.encode` for groups of tokens of a channel, or of channels of a token, that have no outliers."""

    SUPPORTS: ClassVar = ("datatype", "strategy", "group_size", "outliers")  # settings that need not be as by default

    scheme: Scheme
    boundaries: Tensor

    def write(self, buffer: EncodeBuffer, first: int, x: Tensor, skip: Tensor | None) -> int | None:
        """Encode x [batch, kv_heads, tokens, head_dim], whole groups, into the buffer from the token `first` on.

        Returns how many outliers the buffer stores, as before; None where a range does not fit 16 bits, for which the host
        waits.
        """
        counts = torch.zeros(2, dtype=torch.int32, device=x.device)
        self.launch(buffer, first, x, skip, counts)
        return None if counts[1].item() else buffer.outliers

    def launch(self, buffer: EncodeBuffer, first: int, x: Tensor, skip: Tensor | None, counts: Tensor) -> None:
        """The same without waiting: counts[1] int32 is added to, by ranges that do not fit."""
        import triton

        from narrowkv.codec.cuda.kernels import encode_groups

        group = self.scheme.group_size
        assert group is not None
        x = x if x.stride(3) == 1 else x.contiguous()
        batch, heads, tokens, dim = x.shape
        shared = (buffer.codes, buffer.ranges["scale"], buffer.ranges["zero"], counts, self.boundaries, first, buffer.tokens)
        shape = {"HEADS": heads, "DIM": dim, "GROUP": group, "BOUNDARIES": len(self.boundaries), "enable_fp_fusion": False}
        with torch.cuda.device_of(x):
            if self.scheme.strategy == "channel":
                marks = counts if skip is None else skip.contiguous().view(torch.uint8)
                encode_groups.encode_token_groups[(batch, tokens // group, heads)](
                    x, marks, *shared, *x.stride()[:3], tokens,
                    WIDE=triton.next_power_of_2(dim), SKIPS=skip is not None, **shape,
                )  # fmt: skip
            else:
                encode_groups.encode_channel_groups[(batch, tokens)](
                    x, *shared, *x.stride()[:3],
                    GROUPS=triton.next_power_of_2(heads * dim // group), WIDE=triton.next_power_of_2(group), **shape,
                )  # fmt: skip
