"""Quantizer: a scheme together with what was learned for one layer; encodes and dequantizes one tensor.

Every method dequantizes as x = codebook[code] * scale + zero, except outliers, which are exact.
"""

import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from narrowkv.codec import datatypes, hadamard
from narrowkv.codec.cpu.encode import Encoder
from narrowkv.codec.cuda import encode as cuda
from narrowkv.codec.cuda.encode_groups import GroupEncoder
from narrowkv.codec.encode_buffer import EncodeBuffer
from narrowkv.codec.quantized import QuantizedTensor
from narrowkv.codec.quantizers.base import BaseQuantizer, TableForm, require_table
from narrowkv.codec.ranges import broadcast_groups, online_range, outliers_per_tail, to_16_bits, to_scale_zero
from narrowkv.codec.saturation import Saturation
from narrowkv.codec.scheme import Scheme
from narrowkv.errors import RecipeError

LEVELS: dict[str, Callable[[int], Tensor]] = {
    "int": datatypes.uniform,
    "nf": datatypes.normal_float,
    "fp": datatypes.floating_point,
}
MOST_BOUNDARIES = 15  # that a loop over them takes less time than a search


@dataclass(frozen=True)
class Quantizer(BaseQuantizer):
    """One tensor's scheme and tables. All tensors float32.

    codebook: [levels] what a code dequantizes to, normalized. boundaries: [levels - 1] between the levels when encoding
        (they differ from the codebook's mid-points under Q-Norm, which moves the levels after the codes are chosen).
    scale, zero: [kv_heads, head_dim], static ranges of channels; None where ranges are taken online.
    lower, upper: [kv_heads, head_dim] or [1, 1], outlier thresholds learned offline; None where taken online, or without
        outliers.
    smooth: [kv_heads, head_dim], what elements are divided by before they are quantized; or None.
    Raises RecipeError if the scheme needs tables that are not given.
    """

    scheme: Scheme
    codebook: Tensor | None = None
    boundaries: Tensor | None = None
    scale: Tensor | None = None
    zero: Tensor | None = None
    lower: Tensor | None = None
    upper: Tensor | None = None
    smooth: Tensor | None = None

    def __post_init__(self) -> None:
        scheme = self.scheme
        if scheme.datatype in LEVELS and self.codebook is None:
            object.__setattr__(self, "codebook", LEVELS[scheme.datatype](scheme.code_bits))
        if self.codebook is not None and self.boundaries is None:
            object.__setattr__(self, "boundaries", datatypes.boundaries(self.codebook))
        if self.codebook is not None and self.boundaries is not None:
            levels = (len(self.codebook), len(self.boundaries) + 1)
            if levels != (2**scheme.code_bits,) * 2:
                raise RecipeError(
                    f"{scheme.bits} bits need {2**scheme.code_bits} levels, but the tables have {levels}; calibrate again."
                )
        learned = {
            "codebook": scheme.datatype == "nuq",
            "scale": scheme.static,
            "smooth": scheme.transform.smooth_alpha > 0,
            "lower": scheme.outliers.by_matrix or (scheme.static and scheme.outliers.fraction > 0),
        }
        for name, needed in learned.items():
            if needed and getattr(self, name) is None:
                raise RecipeError(f"This scheme needs a calibration ({name} is learned offline); calibrate the model first.")

    @classmethod
    def forms(cls, scheme: Scheme, kv_heads: int, head_dim: int) -> dict[str, TableForm]:
        levels, by_channel = 2**scheme.code_bits, (kv_heads, head_dim)
        matrix = scheme.outliers.by_matrix
        shapes: dict[str, tuple[int, ...]] = {}
        if scheme.datatype != "exact":
            shapes |= {"codebook": (levels,), "boundaries": (levels - 1,)}
        if scheme.static:
            shapes |= {"scale": by_channel, "zero": by_channel}
        if matrix or (scheme.static and scheme.outliers.fraction):
            shapes |= dict.fromkeys(("lower", "upper"), (1, 1) if matrix else by_channel)
        if scheme.transform.smooth_alpha:
            shapes["smooth"] = by_channel
        return {name: (shape, torch.float32) for name, shape in shapes.items()}

    def _require_order(self) -> None:
        for name in ("codebook", "boundaries"):
            table = getattr(self, name)
            require_table(table is None or bool((table.diff() >= 0).all()), name, "elements out of order")
        require_table(self.scale is None or bool((self.scale >= 0).all()), "scale", "elements below 0")
        require_table(self.smooth is None or bool((self.smooth > 0).all()), "smooth", "elements that are not above 0")
        if self.lower is not None and self.upper is not None:
            require_table(bool((self.lower <= self.upper).all()), "lower", "elements above those of upper")

    def encode(self, x: Tensor, skip: Tensor | None = None, saturation: Saturation | None = None) -> QuantizedTensor:
        """Quantize elements, once and for all.

        x: [batch, kv_heads, tokens, head_dim], any float dtype, finite (who stores checks that). skip: [batch, tokens]
        bool, tokens whose elements are never read from the codes (padding, attention sinks): no outliers are spent on them.
        saturation: counts elements far beyond what codes reach, by its width or more; none where codes reach everything, or
        what they do not reach stays exact. Raises ActivationError where a range or an outlier does not fit 16 bits.
        """
        if saturation is not None:
            self._observe(x, skip, saturation)
        encoder = self._encoder_on(x.device)
        if encoder is not None:
            batch, heads, tokens, dim = x.shape
            buffer = EncodeBuffer(self.scheme, batch, heads, tokens, dim, like=x)
            outliers = encoder.write(buffer, 0, x, skip)
            if outliers is not None:
                buffer.outliers = outliers
                return buffer.encoded()
        return self.encode_naive(x, skip)

    def encode_into(
        self, buffer: EncodeBuffer, first: int, x: Tensor, skip: Tensor | None = None, saturation: Saturation | None = None
    ) -> int:
        encoder = self._encoder if x.is_cpu else self._encoder_on(x.device)
        outliers = None if encoder is None else encoder.write(buffer, first, x, skip)
        if outliers is None:
            return super().encode_into(buffer, first, x, skip, saturation)
        if saturation is not None:
            self._observe(x, skip, saturation)
        return outliers

    def _observe(self, x: Tensor, skip: Tensor | None, saturation: Saturation) -> None:
        """Count the elements that lie far beyond their channel's range."""
        exact = self.scheme.outliers.fraction > 0 and self.scheme.outliers.cap is None
        if self.scale is None or self.zero is None or exact:
            return
        reach = self.scale.clamp(min=float(self.scale.mean()) / 100)  # a channel that was constant may move a little
        saturation.observe((x.float() - self.zero[:, None]).abs() > 3 * reach[:, None], skip)

    def encode_naive(self, x: Tensor, skip: Tensor | None = None) -> QuantizedTensor:
        """The same in plain torch, exactly."""
        if self.scheme.datatype == "exact":
            return QuantizedTensor(x.clone(memory_format=torch.contiguous_format))
        assert self.boundaries is not None
        elements = self._rotated(x)
        lower, upper = self._thresholds(elements, skip)
        scale, zero = self._range(elements, lower, upper)
        ranges = {} if self.scheme.static else self._rounded(scale, zero)
        if ranges:
            scale, zero = _scale_zero(ranges)
        codes = _count_below(
            _normalize(elements, self._broadcast_groups(scale, elements), self._broadcast_groups(zero, elements)),
            self.boundaries,
        )
        encoded = QuantizedTensor(codes, ranges)
        if self.scheme.outliers.fraction:
            assert lower is not None and upper is not None
            lower, upper = self._broadcast_groups(lower, elements), self._broadcast_groups(upper, elements)
            outside = (elements < lower) | (elements > upper)
            if self.scheme.outliers.cap is not None:
                width = (upper - lower).clamp(min=torch.finfo(torch.float32).tiny)
                distance = torch.maximum(lower - elements, elements - upper) / width
                outside &= within_cap(distance, outside, self.scheme.outliers.cap)
            keep_outliers(encoded, elements.flatten(), outside, skip, x.dtype)
        return encoded

    def _has_few_levels(self, supported: Collection[str]) -> bool:
        """Whether a scheme differs from the default in settings alone that an encoder supports, and its levels are so few that
        those below an element are counted.
        """
        evenly = self.scheme.datatype in ("int", "nf", "nuq")
        few = self.boundaries is not None and len(self.boundaries) <= MOST_BOUNDARIES
        return evenly and few and self.scheme.differs_only_in(supported)

    @property
    def _selects(self) -> bool:
        """Whether outliers are picked among the elements of a group."""
        return outliers_per_tail(self.scheme.group_size or 0, self.scheme.outliers.fraction) > 0

    @functools.cached_property
    def _encoder(self) -> Encoder | None:
        """The compiled form of `encode`; None if it does not support the scheme."""
        scheme = self.scheme
        if self.boundaries is None or not self._has_few_levels(Encoder.SUPPORTS):
            return None
        if scheme.strategy == "channel" and self._selects:
            return None
        return Encoder(scheme, self.boundaries, self.scale, self.zero, self.lower, self.upper, self.smooth)

    @functools.cached_property
    def _cuda_encoder(self) -> cuda.Encoder | None:
        """The form of `encode` for a GPU, or None if it does not support the scheme."""
        scheme = self.scheme
        if self.boundaries is None or not self._has_few_levels(cuda.Encoder.SUPPORTS):
            return None
        scale, zero, lower, upper = (
            None if part is None else part.contiguous() for part in (self.scale, self.zero, self.lower, self.upper)
        )
        per_tail = functools.partial(outliers_per_tail, fraction=0.0 if scheme.static else scheme.outliers.fraction)
        rotated = self._rotated if scheme.transform.hadamard or self.smooth is not None else None
        return cuda.Encoder(scheme, self.boundaries.contiguous(), scale, zero, lower, upper, per_tail, rotated)

    @functools.cached_property
    def _group_encoder(self) -> GroupEncoder | None:
        """The same for ranges of groups, as KIVI has it."""
        scheme = self.scheme
        if (
            self.boundaries is None
            or not self._has_few_levels(GroupEncoder.SUPPORTS)
            or not scheme.group_size
            or self._selects
        ):
            return None
        return GroupEncoder(scheme, self.boundaries.contiguous())

    def encodes_in_torch(self, device: torch.device) -> bool:
        return self.scheme.datatype != "exact" and self._encoder_on(device) is None

    def _encoder_on(self, device: torch.device) -> Encoder | cuda.Encoder | GroupEncoder | None:
        """Whatever encodes elements on a device faster than plain torch."""
        if cuda.runs_on(device):
            return self._cuda_encoder or self._group_encoder
        return self._encoder if device.type == "cpu" else None

    def token_encoder(self) -> cuda.TokenEncoder | None:
        return cuda.IdentityEncoder() if self.scheme.datatype == "exact" else self._cuda_encoder

    def _rotated(self, x: Tensor) -> Tensor:
        """Elements as the codes see them, float32."""
        elements = x.float() if self.smooth is None else x.float() / self.smooth[:, None]
        return hadamard.rotate(elements) if self.scheme.transform.hadamard else elements.contiguous()

    def normalize(self, elements: Tensor) -> tuple[Tensor, Tensor]:
        """Elements as a codebook sees them, outside [-1, 1] where they are outliers, and the scale they were divided by.

        elements: [batch, kv_heads, tokens, head_dim] float32. Returns two tensors, the second broadcasts to the first.
        """
        lower, upper = self._thresholds(elements)
        scale, zero = (self._broadcast_groups(part, elements) for part in self._range(elements, lower, upper))
        return _normalize(elements, scale, zero), scale

    def dequantize(self, encoded: QuantizedTensor) -> Tensor:
        """What the codes stand for: [batch, kv_heads, tokens, head_dim] float32 (exact elements keep their dtype)."""
        if self.scheme.datatype == "exact":
            return encoded.codes
        assert self.codebook is not None
        elements = self.codebook[encoded.codes.int()]
        if self.scale is not None and self.zero is not None:
            elements = elements.mul_(self.scale[:, None]).add_(self.zero[:, None])
        else:
            scale, zero = _scale_zero(encoded.ranges)
            elements = elements.mul_(self._broadcast_groups(scale, elements)).add_(self._broadcast_groups(zero, elements))
        if encoded.outlier_index is not None and encoded.outlier_values is not None:
            elements.view(-1)[encoded.outlier_index] = encoded.outlier_values.float()
        elements = hadamard.rotate_back(elements) if self.scheme.transform.hadamard else elements
        return elements if self.smooth is None else elements.mul_(self.smooth[:, None])

    def _rounded(self, scale: Tensor, zero: Tensor) -> dict[str, Tensor]:
        """Online ranges as stored."""
        if self.scheme.quantization.scale_dtype == "float8":
            largest = scale.amax((1, 3), keepdim=True)
            token_scale = (largest / torch.finfo(torch.float8_e4m3fn).max).to(torch.bfloat16)
            shares = scale / token_scale.float().clamp(min=torch.finfo(torch.float32).tiny)
            return {"scale": shares.to(torch.float8_e4m3fn), "token_scale": token_scale}
        parts = {"scale": scale} if self.scheme.symmetric else {"scale": scale, "zero": zero}
        return {name: to_16_bits(part, torch.float16, "Ranges") for name, part in parts.items()}

    def _broadcast_groups(self, part: Tensor, elements: Tensor) -> Tensor:
        """Ranges, repeated within groups so that they broadcast to elements."""
        return broadcast_groups(part, elements) if self.scheme.group_size else part

    def _thresholds(self, elements: Tensor, skip: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        if self.lower is not None and self.upper is not None:
            return self.lower[:, None], self.upper[:, None]  # [kv_heads or 1, 1, head_dim or 1]
        if self.scheme.static:
            return None, None
        return online_range(elements, self.scheme.strategy, self.scheme.outliers.fraction, self.scheme.group_size, skip)

    def _range(self, elements: Tensor, lower: Tensor | None, upper: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.scale is not None and self.zero is not None:
            return self.scale[:, None], self.zero[:, None]
        assert lower is not None and upper is not None
        if self.lower is not None:  # thresholds per matrix: the range is that of the elements inside them
            lower, upper = online_range(elements.clamp(lower, upper), self.scheme.strategy, 0.0)
        if self.scheme.symmetric:
            upper = torch.maximum(upper.abs(), lower.abs())
            lower = -upper
        return to_scale_zero(lower, upper)


def keep_outliers(encoded: QuantizedTensor, exact: Tensor, outside: Tensor, skip: Tensor | None, dtype: torch.dtype) -> None:
    """Store exact elements for the codes that are `outside`, but for tokens that are skipped.

    exact: [codes in all]. outside: bool, shaped as the codes. dtype: of the elements, in which they are stored if it has 16
    bits. Raises ActivationError where one does not fit.
    """
    if skip is not None:
        outside = outside & ~skip[:, None, :, None]
    encoded.outlier_index = outside.flatten().nonzero().squeeze(1)
    stored_as = dtype if dtype.itemsize == 2 else torch.float16
    encoded.outlier_values = to_16_bits(exact[encoded.outlier_index], stored_as, "Outliers")


def within_cap(distance: Tensor, outside: Tensor, cap: int) -> Tensor:
    """Which outliers are among the `cap` of their token that lie farthest out: bool, shaped as distance
    [batch, kv_heads, tokens, codes].
    """
    distance = distance.masked_fill(~outside, -1).transpose(1, 2)  # [batch, tokens, kv_heads, codes]
    per_token = distance.flatten(2)
    farthest = torch.zeros_like(per_token, dtype=torch.bool)
    farthest.scatter_(-1, per_token.topk(min(cap, per_token.shape[-1])).indices, True)
    return farthest.unflatten(-1, distance.shape[2:]).transpose(1, 2)


def _scale_zero(ranges: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Scale and zero in float32 of stored ranges; the zero broadcasts."""
    scale = ranges["scale"].float()
    if "token_scale" in ranges:
        scale = scale * ranges["token_scale"].float()
    return scale, ranges["zero"].float() if "zero" in ranges else scale.new_zeros(1, 1, 1, 1)


def _normalize(elements: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """(elements - zero) / scale in float32; 0 where the range is empty."""
    scale = scale.float()
    return (elements - zero.float()).mul_(torch.where(scale > 0, 1 / scale, 0))


def _count_below(x: Tensor, boundaries: Tensor) -> Tensor:
    """How many boundaries lie below each element, as uint8: `torch.bucketize`, several times as fast for few boundaries."""
    if len(boundaries) > MOST_BOUNDARIES:
        return torch.bucketize(x, boundaries, out_int32=True).to(torch.uint8)
    codes = torch.zeros(x.shape, dtype=torch.uint8, device=x.device)
    for boundary in boundaries:
        codes += x > boundary
    return codes
