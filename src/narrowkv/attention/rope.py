"""Rotary position embeddings: those that a position determines, and those whose angles are stored with each token."""

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from narrowkv.codec.frames import Frames
from narrowkv.store import Plans

# what models hand to their attention modules: cosine and sine [1 or batch, tokens, n], or complex [1 or batch, tokens, n]
CosSin = tuple[Tensor, Tensor] | Tensor


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate pairs of channels of x [batch, heads, tokens, head_dim] by angles [batch, tokens, rotary_dim / 2], in x's dtype.

    interleaved: channel 2 i pairs with channel 2 i + 1, else channel i with channel i + rotary_dim / 2. Channels beyond
    rotary_dim are left alone.
    """
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    rotary = 2 * cos.shape[-1]
    rotary_part, rest = x[..., :rotary], x[..., rotary:]
    first, second = rotary_part.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else rotary_part.chunk(2, dim=-1)
    pair = (first * cos - second * sin, second * cos + first * sin)
    rotated = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat([rotated, rest], dim=-1) if rest.shape[-1] else rotated


@dataclass(frozen=True)
class Rope:
    """A rotary embedding whose frequencies do not change with the length of the sequence.

    inverse_frequencies: [rotary_dim / 2] float32. scaling: factor on cosine and sine (yarn), 1 otherwise. interleaved: as in
    `rotate_pairs`. plans: tables that backends have made of it, for all layers that share it.
    """

    inverse_frequencies: Tensor
    scaling: float = 1.0
    interleaved: bool = False
    plans: Plans = field(default_factory=Plans, init=False, repr=False, compare=False)
    record: ClassVar[str] = "positions"  # under which name the cache keeps what `keep` returns

    def to(self, device: torch.device) -> "Rope":
        """The same embedding with its frequencies on `device`."""
        frequencies = self.inverse_frequencies.to(device)
        return self if frequencies is self.inverse_frequencies else replace(self, inverse_frequencies=frequencies)

    def rotates_like(self, other: "AnyRope | None") -> bool:
        """Whether another embedding rotates by the same angles."""
        return (
            isinstance(other, Rope)
            and (self.scaling, self.interleaved) == (other.scaling, other.interleaved)
            and torch.equal(self.inverse_frequencies, other.inverse_frequencies)
        )

    def keep(self, positions: Tensor | None, tables: CosSin | None) -> Tensor:
        """What is to be stored of new tokens: their positions [1 or batch, tokens]."""
        assert positions is not None
        return positions

    def cos_sin(self, rope_state: Tensor, precise: bool = False) -> tuple[Tensor, Tensor]:
        """rope_state: [batch, tokens] positions. Returns cosine and sine, [batch, tokens, rotary_dim / 2] float32.

        precise: in float64, where float32 would be off by as much as positions are large, which is how models have it.
        """
        dtype = torch.float64 if precise else torch.float32
        angles = rope_state[..., None].to(dtype) * self.inverse_frequencies.to(dtype)
        return angles.cos() * self.scaling, angles.sin() * self.scaling

    def rotate(self, x: Tensor, rope_state: Tensor, precision: torch.dtype | None = None) -> Tensor:
        """Rotate x: [batch, heads, tokens, head_dim] by positions [1 or batch, tokens], as models do.

        In the dtype of x or, if it has more bits, in `precision`.
        """
        return rotate_pairs(_widened(x, precision), *self.cos_sin(rope_state), self.interleaved)

    def rotate_precisely(self, x: Tensor, rope_state: Tensor) -> Tensor:
        """The same in float64, angles too."""
        return rotate_pairs(x.double(), *self.cos_sin(rope_state, precise=True), self.interleaved)

    def unrotate(self, x: Tensor, rope_state: Tensor) -> Tensor:
        """What x was before `rotate` rotated it, in float64: the sines that it used, in the dtype of x, are undone."""
        return rotate_pairs(x.double(), *self.unrotation(rope_state, x.dtype), self.interleaved)

    def unrotation(self, rope_state: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines [..., rotary_dim / 2] float64 that undo those which `rotate` used in a dtype."""
        cos, sin = (part.to(dtype).double() for part in self.cos_sin(rope_state))
        size = cos.square() + sin.square()
        return cos / size, -sin / size


@dataclass(frozen=True)
class StoredRope:
    """A rotary embedding whose angles no single position determines: they are stored with each token, as the model gave them.

    Frequencies that change with the length (dynamic, longrope), or several positions of one token (images). record: the name
    under which the cache keeps them, one for all layers that are given the same. layout: of the model's tables, each angle
    once, all twice over (`halves`), each twice in a row (`repeated`), or complex.
    """

    record: str
    layout: Literal["once", "halves", "repeated", "complex"]
    interleaved: bool = False

    def to(self, device: torch.device) -> "StoredRope":
        """Itself: it holds no table."""
        return self

    def keep(self, positions: Tensor | None, tables: CosSin | None) -> Tensor:
        """What is to be stored of new tokens: cosines and sines [1 or batch, tokens, 2, rotary_dim / 2] in the model's
        dtype.
        """
        if isinstance(tables, Tensor):
            return torch.view_as_real(tables).transpose(-1, -2)
        assert tables is not None
        pair = torch.stack(tables, dim=-2)
        if self.layout == "halves":
            return pair[..., : pair.shape[-1] // 2]
        return pair[..., ::2] if self.layout == "repeated" else pair

    def cos_sin(self, rope_state: Tensor, precise: bool = False) -> tuple[Tensor, Tensor]:
        """rope_state: [batch, tokens, 2, rotary_dim / 2]. Returns cosine and sine, [batch, tokens, rotary_dim / 2]."""
        cos, sin = rope_state.unbind(-2)
        return cos, sin

    def rotate(self, x: Tensor, rope_state: Tensor, precision: torch.dtype | None = None) -> Tensor:
        """Rotate x: [batch, heads, tokens, head_dim] by what was stored of its tokens; dtypes like those of `Rope.rotate`."""
        return rotate_pairs(_widened(x, precision), *self.cos_sin(rope_state), self.interleaved)

    def rotate_precisely(self, x: Tensor, rope_state: Tensor) -> Tensor:
        """The same in float64."""
        return rotate_pairs(x.double(), *self.cos_sin(rope_state), self.interleaved)


def _widened(x: Tensor, precision: torch.dtype | None) -> Tensor:
    return x if precision is None else x.to(torch.promote_types(x.dtype, precision))


AnyRope = Rope | StoredRope


def frames_of(rope: AnyRope | None, head_dim: int) -> Frames | None:
    """How keys before a rotary embedding, or without one, rotate within a frame; None where no single position tells."""
    if rope is None:
        return Frames.of(head_dim)
    return Frames.of(head_dim, rope.inverse_frequencies.cpu(), rope.interleaved) if isinstance(rope, Rope) else None
