"""Tail: the newest encoded tokens, which do not fill a block yet, in the buffer for one that is written in place."""

from torch import Tensor

from narrowkv.codec import AnyQuantizer, QuantizedTensor
from narrowkv.codec.cuda import encode as cuda
from narrowkv.codec.encode_buffer import AHEAD, CountedBuffer, EncodeBuffer
from narrowkv.codec.saturation import Saturation
from narrowkv.store.bias import Elements
from narrowkv.store.page import BLOCK


class Tail:
    """Keys and values of up to 64 tokens; `tokens` counts them."""

    def __init__(self, quantizers: tuple[AnyQuantizer, AnyQuantizer], keys: Tensor, values: Tensor):
        """A buffer without a token yet. keys, values: elements such as will come, [batch, kv_heads, any, head_dim]."""
        self.quantizers = quantizers
        self.tokens = 0
        (batch, heads, _, dim), runs = keys.shape, cuda.runs_on(keys.device)
        found = [quantizer.token_encoder() if runs else None for quantizer in quantizers]
        self.token_encoders = [
            token_encoder for token_encoder in found if token_encoder is not None and None not in found
        ]  # both, or none
        self.most = [token_encoder.most(batch, heads, dim) for token_encoder in self.token_encoders] or [
            0,
            0,
        ]  # outliers of a token
        self.stays = runs  # where it is when it is sealed: a GPU's steps read and write it there
        self.buffers = tuple(
            CountedBuffer(quantizer.scheme, batch, heads, BLOCK, dim, like, most)
            if runs
            else EncodeBuffer(quantizer.scheme, batch, heads, BLOCK, dim, like)
            for quantizer, like, most in zip(quantizers, (keys, values), self.most, strict=True)
        )

    @property
    def is_full(self) -> bool:
        return self.tokens == BLOCK

    def tensors(self) -> list[Tensor]:
        """All stored tensors."""
        return [tensor for buffer in self.buffers for tensor in buffer.tensors()]

    def append(self, keys: Elements, values: Elements, new: int, saturation: Saturation | None = None) -> None:
        """Encode tokens, `new` of which must fit; a refusal (few on a GPU have none) leaves all as it was.

        saturation: counts elements that are far out of range.
        """
        if self.token_encoders and new <= AHEAD and self.prepare_step(new):
            self.step(keys, values)
            self.tokens += new
            return
        keys_buffer, values_buffer = self.buffers
        key_outliers = self.quantizers[0].encode_into(keys_buffer, self.tokens, *keys, saturation)
        value_outliers = self.quantizers[1].encode_into(values_buffer, self.tokens, *values, saturation)
        keys_buffer.outliers, values_buffer.outliers = key_outliers, value_outliers
        self.tokens += new

    def prepare_step(self, new: int) -> bool:
        """Whether this many new tokens may be encoded by `step`; if so, their outliers fit."""
        if not self.token_encoders or self.tokens + new > BLOCK:
            return False
        for buffer, most in zip(self.buffers, self.most, strict=True):
            assert isinstance(buffer, CountedBuffer)
            buffer.promise(new * most)
        return True

    def step(self, keys: Elements, values: Elements, offsets: Tensor | None = None) -> None:
        """Encode tokens on a GPU, without waiting for it, behind those stored, or from offsets[0] on; `tokens` stays."""
        first = self.tokens if offsets is None else 0
        for token_encoder, buffer, (elements, skip) in zip(self.token_encoders, self.buffers, (keys, values), strict=True):
            token_encoder.step(buffer, first, elements, skip, offsets)

    def clear(self) -> None:
        """Remove all tokens; the next ones overwrite them."""
        for buffer in self.buffers:
            buffer.outliers = 0
        self.tokens = 0

    def put(self, pair: tuple[QuantizedTensor, QuantizedTensor]) -> None:
        """Take tokens that are encoded already."""
        for buffer, encoded in zip(self.buffers, pair, strict=True):
            buffer.outliers = buffer.put(self.tokens, encoded)
        self.tokens += pair[0].tokens

    def block(self) -> tuple[QuantizedTensor, QuantizedTensor]:
        """The buffer as one block for each sequence, without a copy; zeros where no token came."""
        return self.buffers[0].encoded(), self.buffers[1].encoded()

    def encoded(self) -> tuple[QuantizedTensor, QuantizedTensor]:
        """The stored tokens, copied, with outliers in ascending order."""
        keys, values = (buffer.encoded().first(self.tokens) for buffer in self.buffers)
        return keys, values

    def dequantize(self) -> tuple[Tensor, Tensor]:
        """What the codes stand for: keys, values [batch, kv_heads, tokens, head_dim], free to be changed."""
        keys, values = (
            quantizer.dequantize(part)[:, :, : self.tokens].clone()
            for quantizer, part in zip(self.quantizers, self.block(), strict=True)
        )
        return keys, values

    def crop(self, tokens: int) -> None:
        """Keep the first `tokens` tokens."""
        for buffer in self.buffers:
            buffer.crop(tokens)
        self.tokens = tokens

    def select(self, rows: Tensor) -> None:
        """Keep the sequences named by `rows` [n] int64, in that order, repeats allowed."""
        for buffer in self.buffers:
            buffer.select(rows)
