"""TrellisQuantizer: rates by channel and trellis-coded streams of transformed keys or values.

A token's head, less its mean, is transformed to coefficients that are uncorrelated and whose errors cost alike; keys are
rotated to the middle of their frame before (`codec.frames`). Units of 8 coefficients have rates of 0 to 6 bits, the cheapest
first, and all bits of a token's head are one stream (`codec.trellis`).
Trellis-coded quantization: Marcellin and Fischer 1990; with a sliding window of bits as state: QTIP (arXiv 2406.11235).
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from narrowkv.codec import trellis
from narrowkv.codec.cpu.encode import KINDS
from narrowkv.codec.cpu.encode_streams import StreamEncoder
from narrowkv.codec.cuda import encode as cuda
from narrowkv.codec.encode_buffer import EncodeBuffer
from narrowkv.codec.frames import Frames, index_dtype
from narrowkv.codec.outlier_budget import block_budget, within_budget
from narrowkv.codec.pairs import times, times_by_offset
from narrowkv.codec.quantized import QuantizedTensor
from narrowkv.codec.quantizers.base import BaseQuantizer, TableForm, require_table
from narrowkv.codec.quantizers.scalar import keep_outliers
from narrowkv.codec.saturation import Saturation
from narrowkv.codec.scheme import Scheme
from narrowkv.codec.scheme_parts import MOST_RATE
from narrowkv.errors import RecipeError

LARGEST_WEIGHT = 2**16 - 1
OUT_OF_RANGE = 3 * trellis.TOP  # grid steps, beyond what codes reach by its width
NORM_STEPS, NORM_ZERO = 16, 128  # a norm of code c is 2^((c - NORM_ZERO) / NORM_STEPS)


@dataclass(frozen=True)
class TrellisQuantizer(BaseQuantizer):
    """One tensor's scheme and tables; coefficients that have codes are n of a head's head_dim.

    mean: [kv_heads, head_dim] float16, taken out first.
    pairs: [kv_heads, head_dim / 2, 2, 2] float16: coefficients d and d + head_dim / 2 times this are those channels. order:
        [kv_heads, n] uint8, of heads of more than 256 channels int16, which of these coefficients have codes, in the order of
        the stream. None with `learned_rotation`.
    channels, frequencies: of `frames`, by which channels are reordered and rotated first; None without `pre_rope`.
    matrix: [kv_heads, n, head_dim] int8, matrix_steps: [kv_heads, n] bfloat16: coefficients times their product are the
        channels. None without `learned_rotation`.
    entries: [1, 6, 2, 16] int8, of each rate what the high and the low 4 bits of the window add up to, in grid steps.
    steps: [6] float32, what a grid step of each rate is when encoding. scales: the same when decoding.
    weight: [kv_heads, n] bfloat16, what a squared error in each coefficient costs.
    outlier_threshold: [1] float32, the cost above which a coefficient stays exact while its block has free slots; None without
    outliers. Raises RecipeError if the scheme needs tables that are not given, or tables do not fit it.
    """

    scheme: Scheme
    mean: Tensor | None = None
    pairs: Tensor | None = None
    order: Tensor | None = None
    channels: Tensor | None = None
    frequencies: Tensor | None = None
    matrix: Tensor | None = None
    matrix_steps: Tensor | None = None
    entries: Tensor | None = None
    steps: Tensor | None = None
    scales: Tensor | None = None
    weight: Tensor | None = None
    outlier_threshold: Tensor | None = None

    def __post_init__(self) -> None:
        if self.scheme.quantization.counts is None or self.mean is None or self.mean.dim() != 2:
            raise RecipeError("This scheme needs a calibration (rates and tables are learned offline); calibrate the model.")
        for name, (shape, _) in self.forms(self.scheme, *self.mean.shape).items():
            table = getattr(self, name)
            if table is None or tuple(table.shape) != shape:
                raise RecipeError(f"This scheme's tables do not fit it ({name} is learned offline); calibrate the model.")

    @classmethod
    def forms(cls, scheme: Scheme, kv_heads: int, head_dim: int) -> dict[str, TableForm]:
        n, dtype = scheme.outlier_positions(head_dim), index_dtype(head_dim)
        forms: dict[str, TableForm] = {
            "mean": ((kv_heads, head_dim), torch.float16),
            "entries": ((1, MOST_RATE, 2, trellis.NIBBLE), torch.int8),
            "steps": ((MOST_RATE,), torch.float32),
            "scales": ((MOST_RATE,), torch.float32),
            "weight": ((kv_heads, n), torch.bfloat16),
        }
        if scheme.transform.learned_rotation:
            forms |= {"matrix": ((kv_heads, n, head_dim), torch.int8), "matrix_steps": ((kv_heads, n), torch.bfloat16)}
        else:
            forms |= {"pairs": ((kv_heads, head_dim // 2, 2, 2), torch.float16), "order": ((kv_heads, n), dtype)}
        if scheme.transform.pre_rope:
            forms |= {"channels": ((head_dim,), dtype), "frequencies": ((head_dim // 2,), torch.float32)}
        return forms | ({"outlier_threshold": ((1,), torch.float32)} if scheme.outliers.fraction else {})

    def _require_order(self) -> None:
        assert self.mean is not None and self.steps is not None and self.scales is not None
        self._tables  # noqa: B018  # refuses entries beyond the grid
        for name, table in (("steps", self.steps), ("scales", self.scales), ("matrix_steps", self.matrix_steps)):
            require_table(table is None or bool((table > 0).all()), name, "elements that are not above 0")
        for name, found in (("weight", self.weight), ("outlier_threshold", self.outlier_threshold)):
            require_table(found is None or bool((found >= 0).all()), name, "elements below 0")
        for name, index in (("order", self.order), ("channels", self.channels)):
            if index is None:
                continue
            ascending = index.int().sort(-1).values
            within = bool(((ascending >= 0) & (ascending < self.mean.shape[1])).all())
            require_table(within and bool((ascending.diff() > 0).all()), name, "channels that are not those of a head")

    def encode(self, x: Tensor, skip: Tensor | None = None, saturation: Saturation | None = None) -> QuantizedTensor:
        """Quantize elements, once and for all; parameters like those of `Quantizer.encode`, the first token begins a block.

        Codes are [batch, kv_heads, tokens, bytes of a stream], with `token_norm` and a byte for the norm; an outlier is an
        exact coefficient; coefficients are what `saturation` counts. Raises ActivationError where one does not fit 16 bits.
        """
        if x.is_cpu and x.dtype in KINDS and self.encoder is not None:
            batch, heads, tokens, dim = x.shape
            buffer = EncodeBuffer(self.scheme, batch, heads, tokens, dim, like=x)
            outliers = self.encoder.write(buffer, 0, x, skip, saturation)
            if outliers is not None:
                buffer.outliers = outliers
                return buffer.encoded()
        return self.encode_naive(x, skip, saturation)

    def encode_into(
        self, buffer: EncodeBuffer, first: int, x: Tensor, skip: Tensor | None = None, saturation: Saturation | None = None
    ) -> int:
        found = self.encoder.write(buffer, first, x, skip, saturation) if x.is_cpu and self.encoder is not None else None
        return self.encode_naive_into(buffer, first, x, skip, saturation) if found is None else found

    def encode_naive(self, x: Tensor, skip: Tensor | None = None, saturation: Saturation | None = None) -> QuantizedTensor:
        """The same in plain torch, but for the compiled search on a CPU."""
        return self._encode(x, skip, saturation, 0, None)

    def encode_naive_into(
        self, buffer: EncodeBuffer, first: int, x: Tensor, skip: Tensor | None = None, saturation: Saturation | None = None
    ) -> int:
        """`encode_into` in plain torch."""
        earlier = None
        if self.outlier_threshold is not None and first:
            before = buffer.encoded()
            assert before.outlier_index is not None
            batch, heads, tokens, positions = before.outlier_shape
            of_heads = before.outlier_index // (tokens * positions)
            earlier = torch.bincount(of_heads, minlength=batch * heads).view(batch, heads)
        return buffer.put(first, self._encode(x, skip, saturation, first, earlier))

    def _encode(
        self, x: Tensor, skip: Tensor | None, saturation: Saturation | None, first: int, earlier: Tensor | None
    ) -> QuantizedTensor:
        """The same from a block's token `first` on. earlier: outliers that earlier tokens have, [batch, kv_heads], if any."""
        coefficients, norm = self.coefficients(x.detach(), first)
        stream = self.search(coefficients)
        encoded = QuantizedTensor(stream, outlier_positions=coefficients.shape[-1])
        if self.outlier_threshold is not None:
            missed = self._missed(coefficients, stream, norm)
            if skip is not None:
                missed = missed.masked_fill(skip[:, None, :, None], 0)
            outside = within_budget(missed, missed > self.outlier_threshold, self.scheme.outliers.fraction, first, earlier)
            encoded.codes = self._search_around(coefficients, stream, outside)
            keep_outliers(encoded, coefficients.flatten(), outside, None, x.dtype)
        if saturation is not None:
            saturation.observe((coefficients / self._by_coefficient("steps")).abs() > OUT_OF_RANGE, skip)
        if self.scheme.quantization.token_norm:
            encoded.codes = torch.cat([encoded.codes, norm], dim=-1)
        return encoded

    def _search_around(self, coefficients: Tensor, stream: Tensor, outside: Tensor) -> Tensor:
        """The streams again where outliers, which cost nothing then, leave the path free."""
        rows = outside.any(-1).any(1)  # [batch, tokens]: all heads of a token are searched at once
        if not bool(rows.any()):
            return stream

        def picked(part: Tensor) -> Tensor:
            return part.transpose(1, 2)[rows].transpose(0, 1)[None]  # [1, kv_heads, rows, n]

        weight = self.search_weight.to(torch.int32).expand_as(coefficients).masked_fill(outside, 0)
        found = self.search(picked(coefficients), picked(weight))
        by_token = stream.transpose(1, 2).clone(memory_format=torch.contiguous_format)
        by_token[rows] = found[0].transpose(0, 1)
        return by_token.transpose(1, 2).contiguous()

    def encodes_in_torch(self, device: torch.device) -> bool:
        if device.type != "cpu":  # what comes before the search is a few products of matrices
            return not cuda.runs_on(device)
        return not self.scheme.differs_only_in(StreamEncoder.SUPPORTS)

    def search(self, coefficients: Tensor, weight: Tensor | None = None) -> Tensor:
        """Streams [batch, kv_heads, tokens, bytes] uint8 of coefficients [batch, kv_heads, tokens, n] float32.

        weight: of that shape, what a squared grid step in each costs, where it is not the same for all tokens.
        """
        assert self.scheme.quantization.counts is not None
        batch, _, tokens, _ = coefficients.shape
        grid = coefficients / self._by_coefficient("steps")
        elements = (grid * trellis.GRID_STEP).round().clamp(-(2**15), 2**15 - 1).to(torch.int16)
        weights = self.search_weight if weight is None else _by_head(weight).to(torch.uint16)
        stream = trellis.encode(_by_head(elements), weights, self.scheme.quantization.counts, self._tables)
        return stream.unflatten(1, (batch, tokens)).transpose(0, 1).contiguous()

    def cost(self, x: Tensor) -> Tensor:
        """What codes, without outliers, miss each coefficient by, weighted: [batch, kv_heads, tokens, n] float32."""
        coefficients, norm = self.coefficients(x.detach())
        stream = self.search(coefficients)
        return self._missed(coefficients, stream, norm)

    def _missed(self, coefficients: Tensor, stream: Tensor, norm: Tensor) -> Tensor:
        """What streams miss coefficients by, weighted: [batch, kv_heads, tokens, n] float32."""
        assert self.weight is not None
        return ((coefficients - self._dequantized(stream)) * self.norm_of(norm)).square() * self.weight[:, None]

    def dequantize(self, encoded: QuantizedTensor) -> Tensor:
        """What the codes stand for: [batch, kv_heads, tokens, head_dim] float32."""
        assert self.mean is not None
        coefficients, norm = self._dequantized(encoded.codes), encoded.codes[..., -1:]
        if encoded.outlier_index is not None and encoded.outlier_values is not None:
            coefficients.view(-1)[encoded.outlier_index] = encoded.outlier_values.float()
        return self.channels_of(coefficients * self.norm_of(norm)) + self.mean[:, None]

    def channels_of(self, coefficients: Tensor) -> Tensor:
        """Coefficients [batch, kv_heads, tokens, n] of whole blocks, or their first tokens, as channels less their mean."""
        if self.matrix is not None and self.matrix_steps is not None:
            return (coefficients * self.matrix_steps.float()[:, None]) @ self.matrix.float()
        return self._from_pairs(coefficients)

    def _dequantized(self, codes: Tensor) -> Tensor:
        """Coefficients [batch, kv_heads, tokens, n] float32 of streams, which a norm may follow."""
        counts = self.scheme.quantization.counts
        assert counts is not None
        return trellis.dequantize(codes, counts, self._levels)

    @functools.cached_property
    def _levels(self) -> Tensor:
        """What each state of each rate stands for: [6, 256] float32."""
        assert self.scales is not None
        return self._tables.entries() * self.scales[:, None]

    def norm_of(self, codes: Tensor) -> Tensor:
        """Norms [batch, kv_heads, tokens, 1] float32 of their codes, 1 where there are none."""
        if not self.scheme.quantization.token_norm:
            return torch.ones_like(codes[..., :1], dtype=torch.float32)
        return self._norms[codes.long()]

    @functools.cached_property
    def _norms(self) -> Tensor:
        """The norm of each code: [256] float32."""
        assert self.mean is not None
        codes = torch.arange(256, dtype=torch.float32, device=self.mean.device)
        return ((codes - NORM_ZERO) / NORM_STEPS).exp2()

    def coefficients(self, x: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
        """Coefficients [batch, kv_heads, tokens, n] float32, and codes of their norms [batch, kv_heads, tokens, 1] uint8.

        first: the offset of the first token in its block. In float64, so that the codes do not depend on how many tokens come
        at once.
        """
        assert self.mean is not None
        centered = x.double() - self.mean[:, None].double()
        if self.frames is not None:
            centered = self.frames.rotate(centered, first)
        if self.order is None:
            found = centered @ self._inverse
        else:
            every = times(centered, self._inverse[:, None])
            found = every.gather(-1, self.order.long()[:, None].expand(len(x), -1, x.shape[2], -1))
        if not self.scheme.quantization.token_norm:
            return found.float(), torch.zeros(*found.shape[:-1], 1, dtype=torch.uint8, device=x.device)
        norm = found.square().mean(-1, keepdim=True).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
        codes = (norm.log2() * NORM_STEPS + NORM_ZERO).round().clamp(0, 255).to(torch.uint8)
        return (found / self.norm_of(codes).double()).float(), codes

    def _from_pairs(self, coefficients: Tensor) -> Tensor:
        """Channels of coefficients [batch, kv_heads, tokens, n] of pairs."""
        assert self.pairs is not None and self.order is not None
        every = coefficients.new_zeros(*coefficients.shape[:3], 2 * self.pairs.shape[1])
        every.scatter_(-1, self.order.long()[:, None].expand_as(coefficients), coefficients)
        channels = times_by_offset(every, self._pair_matrices)
        return channels if self.frames is None else self.frames.in_order(channels)

    @functools.cached_property
    def _pair_matrices(self) -> Tensor:
        """Those of `pairs`, rotated back within a frame: [2, 2, kv_heads, 1, offsets or 1, head_dim / 2] float32."""
        assert self.pairs is not None
        matrices = self.pairs.double()[:, None]
        back = matrices if self.frames is None else matrices @ self.frames.back()
        return back.float().permute(3, 4, 0, 1, 2)[:, :, :, None].contiguous()

    def _by_coefficient(self, name: str) -> Tensor:
        """`steps` or `scales` of each coefficient's rate: [n]."""
        table: Tensor = getattr(self, name)
        return table[self.rates - 1]

    @functools.cached_property
    def rates(self) -> Tensor:
        """Bits of each coefficient: [n] int64."""
        assert self.scheme.quantization.counts is not None and self.mean is not None
        return trellis.rates_of(self.scheme.quantization.counts, self.mean.device)

    @functools.cached_property
    def _tables(self) -> trellis.TrellisTables:
        assert self.entries is not None
        return trellis.TrellisTables(self.entries[0, :, 0].contiguous(), self.entries[0, :, 1].contiguous())

    @functools.cached_property
    def frames(self) -> Frames | None:
        """How keys rotate within a frame; None where nothing does."""
        return None if self.channels is None or self.frequencies is None else Frames(self.channels, self.frequencies)

    @functools.cached_property
    def search_weight(self) -> Tensor:
        """What a squared grid step costs in the search: [kv_heads, 1, n] uint16, 1 at least."""
        assert self.weight is not None
        weight = self.weight * self._by_coefficient("steps").square()
        return weight.round().clamp(1, LARGEST_WEIGHT).to(torch.int32)[:, None].to(torch.uint16)

    @functools.cached_property
    def _inverse(self) -> Tensor:
        """What channels are multiplied by, float64, of exactly those matrices that decode; a whole head's fits float32."""
        if self.matrix is not None and self.matrix_steps is not None:
            return torch.linalg.pinv(self.matrix_steps.double()[..., None] * self.matrix.double()).float().double()
        assert self.pairs is not None
        return torch.linalg.pinv(self.pairs.double())

    @functools.cached_property
    def encoder(self) -> StreamEncoder | None:
        """The compiled form of `encode`; None if it does not support the scheme."""
        if not self.scheme.differs_only_in(StreamEncoder.SUPPORTS):
            return None
        assert self.scheme.quantization.counts is not None and self.mean is not None and self.weight is not None
        threshold, fraction = self.outlier_threshold, self.scheme.outliers.fraction
        return StreamEncoder(
            self.scheme.quantization.counts[1:],
            self._tables,
            self.mean,
            self._inverse,
            self.order,
            self.frames,
            self._by_coefficient("steps"),
            self._by_coefficient("scales"),
            self.weight,
            self.search_weight.int(),
            self._norms if self.scheme.quantization.token_norm else None,
            0.0 if threshold is None else float(threshold),
            0 if threshold is None else block_budget(fraction, self.weight.shape[1]),
        )


def _by_head(x: Tensor) -> Tensor:
    """[batch, kv_heads, tokens, n] -> [kv_heads, batch * tokens, n], contiguous."""
    return x.transpose(0, 1).flatten(1, 2).contiguous()
