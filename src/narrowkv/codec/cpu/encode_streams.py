"""The compiled form of `TrellisQuantizer.encode`: from elements to streams and outliers in one call."""

from typing import ClassVar

import torch
from torch import Tensor

import narrowkv._kernels as _kernels
from narrowkv.codec import trellis
from narrowkv.codec.cpu.encode import DOES_NOT_FIT, KINDS, locate
from narrowkv.codec.encode_buffer import EncodeBuffer
from narrowkv.codec.frames import FRAME, Frames
from narrowkv.codec.memory import address
from narrowkv.codec.saturation import Saturation
from narrowkv.codec.scheme import UNIT


class StreamEncoder:
    """The compiled form for one scheme and its tables, on the CPU.

    counts: units of each rate from 1 on; n coefficients of a head have codes. mean: [kv_heads, head_dim]. steps, scales: [n],
    weight, search_weight: [kv_heads, n], norms: [256] or None, as `TrellisQuantizer` has them. inverse: [kv_heads, head_dim,
    n], or with order [kv_heads, n] of pairs [kv_heads, head_dim / 2, 2, 2]. threshold: of outliers. most: how many a head has
    in a block.
    """

    SUPPORTS: ClassVar = (
        "datatype",
        "strategy",
        "counts",
        "token_norm",
        "learned_rotation",
        "outliers",
    )  # settings of a scheme that need not be as by default

    def __init__(
        self,
        counts: tuple[int, ...],
        tables: trellis.TrellisTables,
        mean: Tensor,
        inverse: Tensor,
        order: Tensor | None,
        frames: Frames | None,
        steps: Tensor,
        scales: Tensor,
        weight: Tensor,
        search_weight: Tensor,
        norms: Tensor | None,
        threshold: float,
        most: int,
    ):
        by_unit = pairs = None
        if order is None:
            by_unit = inverse.float().unflatten(2, (-1, UNIT)).transpose(1, 2).contiguous()
        else:
            pairs = inverse.double().flatten(2).transpose(1, 2).contiguous()
        self.codec = _kernels.StreamCodec(
            counts=counts,
            high=tables.high.contiguous(),
            low=tables.low.contiguous(),
            mean=mean.float().contiguous(),
            steps=steps.float().contiguous(),
            scales=scales.float().contiguous(),
            weight=weight.float().contiguous(),
            search_weight=search_weight.int().contiguous(),
            channels=None if frames is None else frames.channels.int().contiguous(),
            turns=None if frames is None else torch.stack(frames.turns(0, FRAME), dim=1).contiguous(),
            pairs=pairs,
            order=None if order is None else order.int().contiguous(),
            matrix=by_unit,
            norms=None if norms is None else norms.float().contiguous(),
            threshold=threshold,
            most=most,
        )
        self.coefficients = steps.numel()  # of a head, that have codes

    def __deepcopy__(self, memo: dict) -> "StreamEncoder":
        """Tables never change, so a copy shares them."""
        return self

    def write(
        self,
        buffer: EncodeBuffer,
        first: int,
        x: Tensor,
        skip: Tensor | None,
        saturation: Saturation | None = None,
        kernel: str = trellis.KERNELS[0],
    ) -> int | None:
        """Encode x [batch, kv_heads, tokens, head_dim] into the buffer from the token `first` on; kernel: of trellis.KERNELS.

        saturation: counts coefficients far beyond what codes reach. Returns how many outliers the buffer then holds, which the
        caller lets it count; None where one does not fit 16 bits, or elements are of another dtype than KINDS.
        """
        if not x.is_cpu or x.dtype not in KINDS:
            return None
        x = x.detach()
        x = x if x.stride(3) == 1 else x.contiguous()
        batch, heads, new, _ = x.shape
        skip = None if skip is None else skip.contiguous()  # referenced as long as its address is used
        skipped = 0 if skip is None else address(skip, torch.bool, shape=(batch, new))
        threads = 1 if batch * heads * new <= trellis.FEW else torch.get_num_threads()
        while True:
            values = buffer.outlier_values
            capacity = 0 if values is None else len(values)
            found, out_of_range = self.codec.encode(
                kernel,
                KINDS[x.dtype],
                x.data_ptr(),
                x.shape,
                x.stride(),
                skipped,
                buffer.codes.shape,
                first,
                buffer.addresses or locate(buffer),
                (buffer.outliers, capacity),
                values is None or values.dtype == torch.float16,
                threads,
            )
            if found == DOES_NOT_FIT:
                return None
            if found <= capacity - buffer.outliers:
                if saturation is not None:
                    saturation.count(out_of_range, batch * heads * new * self.coefficients)
                return buffer.outliers + found
            buffer.reserve(found)
