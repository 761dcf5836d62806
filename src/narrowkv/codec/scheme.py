"""Scheme: how one tensor, the keys or the values, is quantized. Plain data; what is learned is in `Quantizer`."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import torch

from narrowkv.codec.scheme_parts import UNIT, Datatype, Outliers, Quantization, Strategy, Transform, setting_name, stream_bytes
from narrowkv.errors import RecipeError

RangeForm = tuple[tuple[int, int, int], torch.dtype]

PARTS = (Quantization, Transform, Outliers)
# settings that an encoder need not know: of codes and codebooks it is given, or of what is done before and after it
AROUND_CODES = frozenset({"bits", "weighting", "qnorm", "pre_rope", "remove_bias", "fold_gain"})
WORDS = {"pre_rope": "pre-RoPE", "qnorm": "Q-Norm", "group_size": "groups of"}


@dataclass(frozen=True)
class Scheme:
    """How one tensor [batch, kv_heads, tokens, head_dim] is quantized: the codes, what is done before, and what stays exact.

    Its settings are the fields of all three parts under names of their own, as they stand in files and as encoders declare
    which of them they support: those of `Outliers` are called `outliers`, `outlier_scope` and `outlier_cap`, all others as the
    fields are. Raises RecipeError where the parts contradict each other.
    """

    quantization: Quantization
    transform: Transform = field(default_factory=Transform)
    outliers: Outliers = field(default_factory=Outliers)

    def __post_init__(self) -> None:
        self._check_outliers()
        online = self.datatype != "exact" and not self.needs_calibration
        if self.transform.hadamard and (not online or self.strategy == "block"):
            raise RecipeError("The Hadamard rotation goes with codes whose ranges are taken online and need no calibration.")
        by_step = self.datatype in ("int", "nf", "fp") and self.strategy != "channel"
        if self.transform.smooth_alpha and (not by_step or self.outliers.fraction):
            raise RecipeError("Smoothing goes with codes of int, nf or fp whose ranges are taken online, without outliers.")
        if self.transform.learned_rotation and self.datatype != "trellis":
            raise RecipeError("Learned rotations go with datatype trellis.")

    def _check_outliers(self) -> None:
        if self.outliers.fraction:
            if self.datatype == "exact" or self.strategy == "block":
                raise RecipeError("Exact schemes and intrinsic values have no outliers; leave these out.")
            if self.quantization.scale_dtype == "float8":
                raise RecipeError("Scales of 8 bits go without outliers; leave one of the two out.")
        if self.datatype == "trellis" and (self.outliers.scope == "matrix" or self.outliers.cap):
            raise RecipeError("Trellis-coded streams have outliers without cap or matrix scope; leave these out.")
        if self.group_size and self.outliers.by_matrix:
            raise RecipeError("Outlier thresholds per matrix are learned offline and do not go with groups; choose vector.")

    @cached_property
    def bits(self) -> float:
        """Bits of codes for each element."""
        return self.quantization.bits

    @cached_property
    def datatype(self) -> Datatype:
        """What codes stand for."""
        return self.quantization.datatype

    @cached_property
    def strategy(self) -> Strategy:
        """Who shares a scale and zero."""
        return self.quantization.strategy

    @cached_property
    def group_size(self) -> int | None:
        """How many consecutive tokens or channels share them, if not all."""
        return self.quantization.group_size

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain data, which `from_dict` reads back."""
        return {name: setting for name, setting, _ in self._every_setting()}

    def settings(self) -> dict[str, Any]:
        """Those that differ from the defaults, or have none."""
        return {name: setting for name, setting, default in self._every_setting() if setting != default}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "Scheme":
        """Inverse of `to_dict`; raises RecipeError on unknown, missing or wrong settings."""
        names = [{setting_name(each): each.name for each in fields(kind)} for kind in PARTS]
        unknown = sorted(set(plain).difference(*names))
        if unknown:
            raise RecipeError(
                f"A Scheme has no field {', '.join(unknown)[:80]}; `narrowkv recipes show NAME` prints a valid recipe."
            )
        if not {"bits", "datatype"} <= set(plain):
            raise RecipeError("A Scheme needs bits and datatype; `narrowkv recipes show NAME` prints a valid recipe.")
        quantization, transform, outliers = ({known[name]: plain[name] for name in known if name in plain} for known in names)
        return cls(Quantization(**quantization), Transform(**transform), Outliers(**outliers))

    def with_settings(self, **changes: Any) -> "Scheme":
        """A copy with settings replaced, of any part: `with_settings(bits=4, pre_rope=False, outliers=0.01)`."""
        return self.from_dict(self.to_dict() | changes)

    def _every_setting(self) -> Iterator[tuple[str, Any, Any]]:
        """Name, setting, and default of each; the last is MISSING where there is none."""
        for part in (self.quantization, self.transform, self.outliers):
            for each in fields(part):
                yield setting_name(each), getattr(part, each.name), each.default

    def describe(self) -> str:
        """The settings that differ from the defaults in a line, which no other scheme has."""
        rest = {name: setting for name, setting in self.settings().items() if name not in ("bits", "datatype")}
        head = "exact" if self.datatype == "exact" else f"{self.datatype}{self.bits}"
        return ", ".join([head, *(_in_words(name, setting) for name, setting in rest.items())])

    def differs_only_in(self, names: Collection[str]) -> bool:
        """Whether all other settings are as they are by default, but for what is learned and done around the codes."""
        return self.settings().keys() <= AROUND_CODES.union(names)

    def require_head_dim(self, head_dim: int) -> None:
        """Raise RecipeError where groups, pairs or units of channels do not fill a head."""
        if self.datatype == "trellis" and head_dim % UNIT:
            raise RecipeError(
                f"Units of {UNIT} channels do not fill a head_dim of {head_dim}; choose another recipe than trellis."
            )
        counts = self.quantization.counts
        if counts is not None and sum(counts) * UNIT != head_dim:
            raise RecipeError(f"{sum(counts)} units do not make a head_dim of {head_dim}; calibrate this model.")
        if self.transform.smooth_alpha and head_dim % 2:
            raise RecipeError(f"Pairs of channels do not fill a head_dim of {head_dim}; choose a recipe without smoothing.")
        if self.strategy == "token_head" and self.group_size and head_dim % self.group_size:
            raise RecipeError(
                f"Groups of {self.group_size} channels do not fill a head_dim of {head_dim}; choose another group."
            )

    @cached_property
    def code_bits(self) -> int:
        """Bits of one code."""
        return 8 if self.datatype == "trellis" else int(self.bits)

    def codes(self, head_dim: int) -> int:
        """How many codes a token has in one head: with `trellis`, the bytes of its stream and of its norm."""
        if self.quantization.counts is not None:
            return stream_bytes(self.quantization.counts) + self.quantization.token_norm
        return head_dim

    def outlier_positions(self, head_dim: int) -> int:
        """Elements of a token in one head that may be outliers: its codes, or, with `trellis`, the channels with codes."""
        return self.codes(head_dim) if self.quantization.counts is None else UNIT * sum(self.quantization.counts[1:])

    @cached_property
    def tokens_per_group(self) -> int:
        """How many tokens can only be encoded at once."""
        return self.group_size if self.strategy in ("channel", "block") and self.group_size else 1

    @cached_property
    def lookahead_tokens(self) -> int:
        """How many tokens must follow, exact still, where others are encoded."""
        return (self.quantization.lookahead_blocks - 1) * self.tokens_per_group

    def range_forms(self, kv_heads: int, tokens: int, head_dim: int) -> dict[str, RangeForm]:
        """Stored online ranges, by name: shape without the batch, for whole groups of tokens, and dtype."""
        if self.datatype == "exact" or self.static:
            return {}
        if self.strategy == "block":
            return {"levels": ((kv_heads, tokens // self.tokens_per_group, 4), torch.float16)}
        if self.strategy == "channel":
            shape = (kv_heads, tokens // (self.group_size or tokens), head_dim)
        else:
            shape = (
                (1 if self.strategy == "token" else kv_heads),
                tokens,
                (head_dim // self.group_size if self.group_size else 1),
            )
        if self.quantization.scale_dtype == "float8":
            return {"scale": (shape, torch.float8_e4m3fn), "token_scale": ((1, tokens, 1), torch.bfloat16)}
        return dict.fromkeys(("scale",) if self.symmetric else ("scale", "zero"), (shape, torch.float16))

    @cached_property
    def symmetric(self) -> bool:
        """Whether ranges are symmetric, so that there is no zero point."""
        return self.datatype == "fp"

    @cached_property
    def static(self) -> bool:
        """Whether scale and zero are fixed by calibration."""
        return self.datatype != "exact" and self.strategy == "channel" and self.group_size is None

    @cached_property
    def takes_bias_out(self) -> bool:
        """Whether a constant that is added to all elements of a channel would cost precision, and so is taken out."""
        return self.transform.remove_bias and self.datatype != "exact" and not self.static and self.strategy != "block"

    @cached_property
    def takes_gain_out(self) -> bool:
        """Whether keys are divided by the gain of a norm."""
        by_token = self.strategy in ("token", "token_head") and self.datatype in ("int", "nf", "fp")
        otherwise = self.transform.pre_rope or self.transform.smooth_alpha or self.outliers.fraction
        return self.transform.fold_gain and by_token and not otherwise

    @cached_property
    def needs_calibration(self) -> bool:
        """Whether anything of it is learned offline."""
        return self.static or self.datatype == "nuq" or self.outliers.by_matrix or self.transform.smooth_alpha > 0


def _in_words(name: str, setting: Any) -> str:
    """One setting of a description."""
    if name == "strategy":
        return f"per {setting.replace('_', ' and ')}"
    word = WORDS.get(name, name.replace("_", " "))
    if isinstance(setting, bool):
        return word if setting else f"no {word}"
    return f"{word} {' '.join(map(str, setting)) if isinstance(setting, tuple) else setting}"
