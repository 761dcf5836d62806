"""Tail: the newest encoded tokens, which do not fill a block yet, in room for one that is written in place."""

from torch import Tensor

from narrowkv.codec import AnyQuantizer, Encoded, cuda
from narrowkv.codec.room import AHEAD, Room
from narrowkv.store.bias import Numbers
from narrowkv.store.page import BLOCK


class Tail:
    """Keys and values of up to 64 tokens; `tokens` counts them."""

    def __init__(self, quantizers: tuple[AnyQuantizer, AnyQuantizer], keys: Tensor, values: Tensor):
        """Room without a token yet. keys, values: numbers such as will come, [batch, kv_heads, any, head_dim]."""
        self.quantizers = quantizers
        self.tokens = 0
        (batch, heads, _, dim), runs = keys.shape, cuda.runs_on(keys.device)
        found = [quantizer.stepper() if runs else None for quantizer in quantizers]
        self.steppers = [stepper for stepper in found if stepper is not None and None not in found]  # both, or none
        self.most = [stepper.most(batch, heads, dim) for stepper in self.steppers] or [0, 0]  # outliers of a token
        self.stays = runs  # where it is when it is sealed: a GPU's steps read and write it there
        self.rooms = tuple(
            Room(quantizer.scheme, batch, heads, BLOCK, dim, like=like, most=most)
            for quantizer, like, most in zip(quantizers, (keys, values), self.most if runs else (None, None), strict=True)
        )

    @property
    def is_full(self) -> bool:
        return self.tokens == BLOCK

    def tensors(self) -> list[Tensor]:
        """All tensors that are held."""
        return [tensor for room in self.rooms for tensor in room.tensors()]

    def append(self, keys: Numbers, values: Numbers, new: int) -> None:
        """Encode tokens, `new` of which must find room; a refusal (few on a GPU have none) leaves all as it was."""
        if self.steppers and new <= AHEAD and self.make_room(new):
            self.step(keys, values)
            self.tokens += new
            return
        keys_room, values_room = self.rooms
        keys_held = self.quantizers[0].encode_into(keys_room, self.tokens, *keys)
        values_held = self.quantizers[1].encode_into(values_room, self.tokens, *values)
        keys_room.outliers, values_room.outliers = keys_held, values_held
        self.tokens += new

    def make_room(self, new: int) -> bool:
        """Whether so many new tokens may be encoded by `step`; if so, their outliers find room."""
        if not self.steppers or self.tokens + new > BLOCK:
            return False
        for room, most in zip(self.rooms, self.most, strict=True):
            room.promise(new * most)
        return True

    def step(self, keys: Numbers, values: Numbers, places: Tensor | None = None) -> None:
        """Encode tokens on a GPU, without waiting for it, behind those held, or from places[0] on; `tokens` stays."""
        first = self.tokens if places is None else 0
        for stepper, room, (numbers, skip) in zip(self.steppers, self.rooms, (keys, values), strict=True):
            stepper.step(room, first, numbers, skip, places)

    def clear(self) -> None:
        """Forget all tokens; what is written next lies where they lay."""
        for room in self.rooms:
            room.outliers = 0
        self.tokens = 0

    def put(self, pair: tuple[Encoded, Encoded]) -> None:
        """Take tokens that are encoded already."""
        for room, encoded in zip(self.rooms, pair, strict=True):
            room.outliers = room.put(self.tokens, encoded)
        self.tokens += pair[0].tokens

    def block(self) -> tuple[Encoded, Encoded]:
        """The room as one block for each sequence, without a copy; zeros where no token came."""
        return self.rooms[0].encoded(), self.rooms[1].encoded()

    def encoded(self) -> tuple[Encoded, Encoded]:
        """The tokens held, copied, with outliers in ascending order."""
        keys, values = (room.encoded().first(self.tokens) for room in self.rooms)
        return keys, values

    def decode(self) -> tuple[Tensor, Tensor]:
        """What the codes stand for: keys, values [batch, kv_heads, tokens, head_dim], free to be changed."""
        keys, values = (
            quantizer.decode(part)[:, :, : self.tokens].clone()
            for quantizer, part in zip(self.quantizers, self.block(), strict=True)
        )
        return keys, values

    def crop(self, tokens: int) -> None:
        """Keep the first `tokens` tokens."""
        for room in self.rooms:
            room.crop(tokens)
        self.tokens = tokens

    def select(self, rows: Tensor) -> None:
        """Keep the sequences named by `rows` [n] int64, in that order, repeats allowed."""
        for room in self.rooms:
            room.select(rows)
