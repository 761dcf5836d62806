"""What the compiled attention of `cpu` needs besides blocks: codebooks laid out for it, and angles."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

import narrowkv._kernels as _kernels
from narrowkv.attention.cpu.int16 import int16_angles, int16_codebook
from narrowkv.attention.head_transform import head_rotation, unrotate_output
from narrowkv.attention.rope import AnyRope, Rope
from narrowkv.codec import AnyQuantizer, Quantizer
from narrowkv.codec.cpu.encode import KINDS
from narrowkv.codec.frames import FRAME
from narrowkv.errors import UnsupportedModelError
from narrowkv.store import BLOCK
from narrowkv.store.page import PackedTensor, is_channel_major

FEWEST_LEVELS, MOST_LEVELS = 16, 256  # of a codebook as the kernel reads it: one register, or what a byte counts to

TILE = 32  # tokens that the kernel rotates at once
FARTHEST = 2**20  # position that tables are made for, however few tokens there are

Compiled = TypeVar("Compiled")


def compiled(kind: Callable[..., Compiled], **arguments: Any) -> tuple[Compiled, list[Tensor]]:
    """An object of the compiled module, and the tensors that it points into."""
    return kind(**arguments), [part for part in arguments.values() if isinstance(part, Tensor)]


def packed_tensor_args(
    quantizer: AnyQuantizer, side: PackedTensor, keys: bool, rope: AnyRope | None, streams: _kernels.Streams | None
) -> tuple[_kernels.PackedTensor, list[Tensor]]:
    """What all blocks of keys, or of values, have in common, and tables of it. rope: of keys that are stored before it."""
    heads, _, codes = side.shape
    scheme = quantizer.scheme
    if streams is not None:
        _require_rows(side, scheme.codes(codes))
    table, scale, zero = None, None, None
    channel_major = is_channel_major(scheme, keys)
    ranges = list(side.ranges["scale"].shape[1:]) if "scale" in side.ranges else [1, 1, 1]
    if scheme.datatype != "exact" and streams is None:
        assert isinstance(quantizer, Quantizer)
        assert quantizer.codebook is not None
        table = quantizer.codebook.float()
        if scheme.static and channel_major:
            assert quantizer.scale is not None and quantizer.zero is not None
            table = table * quantizer.scale[..., None] + quantizer.zero[..., None]
        elif scheme.static:
            assert quantizer.scale is not None and quantizer.zero is not None
            scale, zero = quantizer.scale.contiguous(), quantizer.zero.contiguous()
            ranges = [heads, 1, codes]
    uses_int16 = None
    if table is not None and (rope is None or isinstance(rope, Rope)):
        uses_int16 = int16_codebook(table, scheme, keys, codes, rotary_layout(rope))
    return compiled(
        _kernels.PackedTensor,
        bits=side.bits,
        codes=codes,
        channel_major=channel_major,
        table=None if table is None else _padded(table),
        fixed=scheme.static and channel_major,
        scale=scale,
        zero=zero,
        ranges=ranges,
        exact=_kind(side.planes[0].dtype if side.bits == 16 else torch.float16),
        outlier=_kind(torch.float16 if side.outlier_values is None else side.outlier_values.dtype),
        int16=None if uses_int16 is None else uses_int16.table.view(torch.uint8),
        unit=None if uses_int16 is None else uses_int16.unit,
        most=0 if uses_int16 is None else uses_int16.most,
        streams=streams,
    )


def _require_rows(side: PackedTensor, rows: int) -> None:
    """Raise UnsupportedModelError unless a head of a block is this many rows of a byte of each token."""
    if side.planes[0].shape[1:] != (side.shape[0], rows, BLOCK):
        raise UnsupportedModelError(
            f"Blocks of trellis-coded streams are {list(side.planes[0].shape[1:])}, not {[side.shape[0], rows, BLOCK]}, which "
            "backend cpu reads; choose backend torch."
        )


def rotary_layout(rope: Rope | None) -> tuple[int, bool]:
    """How many pairs of channels a rotary embedding rotates, and whether they are neighbors."""
    return (len(rope.inverse_frequencies), rope.interleaved) if rope else (0, False)


def _kind(dtype: torch.dtype) -> int:
    if dtype not in KINDS:
        raise UnsupportedModelError(f"Backend cpu does not read elements stored in {dtype}; choose backend torch.")
    return KINDS[dtype]


def _padded(table: Tensor) -> Tensor:
    """Codebooks [..., levels], each as long as the kernel reads it."""
    levels = table.shape[-1]
    width = MOST_LEVELS if levels > FEWEST_LEVELS else FEWEST_LEVELS
    return torch.nn.functional.pad(table, (0, width - levels)).contiguous()


@dataclass(frozen=True)
class ValueMatrix:
    """What makes channels of sums over codes of values, all float32; without a matrix they are channels.

    heads: KV heads. matrix: [heads, rows, head_dim rounded up to 16]. mean: [heads, head_dim], added by the sum of weights.
    """

    heads: int
    matrix: Tensor | None = None
    mean: Tensor | None = None

    @property
    def rows(self) -> int:
        """How many elements of sums it multiplies."""
        return 0 if self.matrix is None else self.matrix.shape[1]

    def tensors(self) -> list[Tensor]:
        """All stored tensors."""
        return [part for part in (self.matrix, self.mean) if part is not None]

    @classmethod
    def padded(cls, matrix: Tensor, mean: Tensor | None = None) -> "ValueMatrix":
        """Of a matrix [heads, rows, head_dim]."""
        return cls(len(matrix), torch.nn.functional.pad(matrix, (0, -matrix.shape[2] % 16)).contiguous(), mean)

    @classmethod
    def of(cls, quantizer: AnyQuantizer, heads: int, head_dim: int) -> "ValueMatrix":
        """Of values that are rotated as whole heads, if they are."""
        rotation = head_rotation(quantizer)
        if rotation is None and not quantizer.scheme.transform.hadamard:
            return cls(heads)
        one_by_one = torch.eye(head_dim, dtype=torch.float32, device="cpu").expand(1, heads, -1, -1)
        return cls.padded(unrotate_output(quantizer, rotation, one_by_one.contiguous())[0])


@dataclass(frozen=True)
class RopeTables:
    """The rotary embedding of stored keys: tables of it, and of each stored token its position, int32, or, where frequencies
    change with the position, cosines and sines [batch, tokens, 2, pairs].

    positions: where they lie, in rows a stride apart. used: what is pointed into.
    """

    rotation: _kernels.Rotation
    positions: int = 0
    position_stride: int = 0
    angles: Tensor | None = None
    used: Tensor | None = None


NOTHING_ROTATES = RopeTables(_kernels.Rotation())


def rope_tables(rope: AnyRope | None, rope_state: Tensor | None, batch: int) -> RopeTables:
    """rope_state: what the rotary embedding needs of each stored token, [1 or batch, tokens, ...]."""
    if rope is None or rope_state is None:
        return NOTHING_ROTATES
    least, most = (int(end) for end in torch.aminmax(rope_state)) if isinstance(rope, Rope) else (0, 0)
    if not isinstance(rope, Rope) or not _tabled(least, most, rope_state.numel()):
        angles = torch.stack(rope.cos_sin(rope_state.expand(batch, *rope_state.shape[1:])), dim=2).float().contiguous()
        steps = _steps(rope.inverse_frequencies) if isinstance(rope, Rope) else None
        return RopeTables(_kernels.Rotation(pairs=angles.shape[-1], interleaved=rope.interleaved, steps=steps), angles=angles)
    positions = rope_state
    if rope_state.dtype != torch.int32 or rope_state.stride(1) != 1:
        positions = rope_state.to(torch.int32).contiguous()
    stride = positions.stride(0) if len(positions) > 1 else 0
    return RopeTables(rotation_to(rope, most + FRAME), positions.data_ptr(), stride, used=positions)


def _tabled(least: int, most: int, tokens: int) -> bool:
    """Whether tables are as good for these positions: they take memory for all up to the largest, wherever tokens stand."""
    return least >= 0 and most < max(FARTHEST, 8 * tokens)


@dataclass(frozen=True)
class RotationTables:
    """Tables of a rotary embedding for the positions below a limit."""

    limit: int
    rotation: _kernels.Rotation
    tables: list[Tensor]

    def tensors(self) -> list[Tensor]:
        """All stored tensors."""
        return self.tables


def rotation_to(rope: Rope, position: int) -> _kernels.Rotation:
    """Tables for positions up to one, and some more."""
    known = rope.plans.get(RotationTables)
    if known is None or position >= known.limit:
        near, steps, far = _angles(rope.inverse_frequencies, position)
        tables = {"near": near, "steps": steps, "far": far, **int16_angles(steps)}
        shape = {"pairs": near.shape[0], "interleaved": rope.interleaved, "scaling": rope.scaling}
        known = rope.plans.put(RotationTables(len(far) * BLOCK, *compiled(_kernels.Rotation, **shape, **tables)))
    return known.rotation


def _angles(frequencies: Tensor, position: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines and sines of multiples of the frequencies [pairs], from which those of all positions up to one are put together.

    Returns those of 0 to 31, [pairs, 2, 32], of 0 to 63, [64, 2, pairs], and of 0, 64, 128, ..., [n, 2, pairs], float32. Taken
    in float64: a position times a frequency, rounded to float32 as models do, is off by as much as the position is large.
    """
    steps, far = (
        _steps(frequencies),
        _steps(frequencies, 2 * (position // BLOCK + 1), BLOCK),
    )  # twice as many as are needed now
    return steps.permute(2, 1, 0)[..., :TILE].contiguous(), steps, far


def _steps(frequencies: Tensor, count: int = BLOCK, step: int = 1) -> Tensor:
    """Cosines and sines of the first `count` multiples of `step` times the frequencies [pairs]: [count, 2, pairs] float32."""
    angles = (torch.arange(count, dtype=torch.int64, device="cpu") * step)[:, None] * frequencies.double()
    return torch.stack([angles.cos(), angles.sin()], dim=1).float()
