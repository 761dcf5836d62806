"""What a `Scheme` is composed of: `Quantization`, `Transform` and `Outliers`. Each checks itself."""

from collections.abc import Sequence
from dataclasses import Field, dataclass, field, fields
from typing import Any, Literal, get_args, get_type_hints

from narrowkv.errors import RecipeError

Datatype = Literal["exact", "int", "nf", "fp", "nuq", "iv", "iv-kmeans", "trellis"]
Strategy = Literal["channel", "token", "token_head", "block"]
OutlierScope = Literal["vector", "matrix"]
Weighting = Literal["fisher_scaled", "fisher", "none"]
ScaleDtype = Literal["float16", "float8"]

MAX_OUTLIERS = 0.02
BLOCK = 64  # tokens of a block, the unit in which a store packs
MAX_GROUP_SIZE, MAX_OUTLIER_CAP, MAX_LOOKAHEAD_BLOCKS = 512, 2**16, 64  # channels of a head, exact elements of a token, blocks
UNIT, MOST_RATE, MOST_UNITS = 8, 6, 64  # trellis: channels of one rate, bits of a channel, units of a head


@dataclass(frozen=True)
class Quantization:
    """Which codes elements become, and who shares what dequantizes them.

    bits: of codes for each element: 2, 3, 4 or 8, with `trellis` any up to 6; 16 means the model's own dtype and goes with
        datatype `exact` only.
    datatype: `int` (evenly spaced), `nf` (NormalFloat), `fp` (e2m1 or e4m3, its range symmetric and without a zero point),
        `nuq` (codebook learned per layer), `iv` and `iv-kmeans` (four intrinsic values of each block, `codec.intrinsic`, found
        by frequency or by k-means), `trellis` (trellis-coded streams, `codec.trellis`), `exact` (not quantized).
    strategy: who shares a scale and zero: a `channel` over the whole run (static, learned offline), a `token` over all its
        KV heads, or a token in one head (`token_head`), both taken online; a `block` of `group_size` tokens in one head, for
        `iv`.
    group_size: finer than that: this many consecutive tokens of a `channel` (taken online, then), or this many consecutive
        channels of a token (`token_head`), as KIVI has it. None: no groups.
    scale_dtype: in which online scales are stored: `float16`, or `float8` (e4m3, for datatype `fp`), as multiples of a
        bfloat16 scale that each token has over all its KV heads.
    weighting: what the codebook minimizes: `fisher_scaled` is sum F s^2 (a - Q(a))^2 (KVQuant, section 3.3 and
        appendix E), `fisher` leaves s^2 out, `none` is plain k-means.
    qnorm: shift and scale the codebook so that mean and deviation survive rounding (KVQuant v1, Q-Norm).
    round_down: with `iv`, an element takes the level below it, as published, instead of the nearest.
    lookahead_blocks: with `iv`, the levels of a block are those of a sliding window of this many blocks, itself and those that
        follow it.
    counts: with `trellis`, how many units of 8 channels of a head have rates of 0, 1, ... 6 bits; None where calibration is
        yet to allocate them.
    token_norm: with `trellis`, a token's head is divided by its norm first, which is stored in 8 bits.

    Raises RecipeError where these contradict each other.
    """

    bits: float
    datatype: Datatype
    strategy: Strategy = "token"
    group_size: int | None = None
    scale_dtype: ScaleDtype = "float16"
    weighting: Weighting = "fisher_scaled"
    qnorm: bool = False
    round_down: bool = False
    lookahead_blocks: int = 1
    counts: tuple[int, ...] | None = None
    token_norm: bool = False

    def __post_init__(self) -> None:
        _check_choices_and_flags(self)
        self._check_bits()
        if self.scale_dtype == "float8" and (self.datatype != "fp" or self.strategy == "channel"):
            raise RecipeError("Scales of 8 bits go with datatype fp and ranges within a token.")
        if self.qnorm and self.datatype != "nuq":
            raise RecipeError("Q-Norm adjusts a learned codebook; it needs datatype nuq.")
        if self.group_size is not None:
            self._check_group(self.group_size)
        self._check_block()
        if self.datatype == "trellis":
            self._check_trellis()
        elif self.counts is not None or self.token_norm:
            raise RecipeError("Counts of rates and norms of tokens go with datatype trellis.")

    def _check_bits(self) -> None:
        if self.datatype == "exact":
            if self.bits != 16:
                raise RecipeError(
                    f"An exact scheme has 16 bits, not {self.bits!r:.40}; give it 16 or choose another datatype."
                )
        elif self.datatype == "trellis":
            if not isinstance(self.bits, (int, float)) or isinstance(self.bits, bool) or not 0 < self.bits <= MOST_RATE:
                raise RecipeError(
                    f"A trellis-coded stream has more than 0 and at most {MOST_RATE} bits, not {self.bits!r:.40}."
                )
        elif self.bits not in (2, 3, 4, 8) or type(self.bits) is not int:
            raise RecipeError(f"{self.bits} bits are not supported; choose 2, 3, 4 or 8 (or the recipe fp16).")
        elif self.datatype == "fp" and self.bits not in (4, 8):
            raise RecipeError("Datatype fp has 4 bits (e2m1) or 8 (e4m3).")
        elif self.datatype in ("nf", "nuq") and self.bits == 8:
            raise RecipeError(f"Datatype {self.datatype} has 2, 3 or 4 bits; with 8 bits choose int.")

    def _check_group(self, group: int) -> None:
        if type(group) is not int or not 8 <= group <= MAX_GROUP_SIZE or self.strategy == "token" or self.datatype == "exact":
            raise RecipeError(
                f"A group is an integer from 8 to {MAX_GROUP_SIZE} and goes with codes by channel or block (tokens) or "
                "token_head (channels)."
            )
        if self.strategy in ("channel", "block") and BLOCK % group:
            raise RecipeError(f"Groups of {group} tokens do not fill blocks of {BLOCK}; choose 8, 16, 32 or 64.")

    def _check_block(self) -> None:
        by_value = self.datatype in ("iv", "iv-kmeans")
        if by_value != (self.strategy == "block") or (self.round_down and not by_value):
            raise RecipeError("Intrinsic values (iv, iv-kmeans) go with strategy block, and round_down with both.")
        if by_value and (self.bits != 2 or not self.group_size):
            raise RecipeError("Intrinsic values have 2 bits and a group of tokens.")
        if (
            type(self.lookahead_blocks) is not int
            or not 1 <= self.lookahead_blocks <= MAX_LOOKAHEAD_BLOCKS
            or (self.lookahead_blocks > 1 and not by_value)
        ):
            raise RecipeError(
                f"lookahead_blocks is an integer from 1 to {MAX_LOOKAHEAD_BLOCKS}, 1 but for intrinsic values, not "
                f"{self.lookahead_blocks!r:.40}."
            )

    def _check_trellis(self) -> None:
        if self.strategy != "channel" or self.group_size:
            raise RecipeError("Trellis-coded streams go with strategy channel, without groups.")
        if self.counts is None:
            return
        counts = tuple(self.counts) if isinstance(self.counts, (tuple, list)) else ()
        object.__setattr__(self, "counts", counts)  # JSON has lists
        whole = all(type(count) is int and 0 <= count <= MOST_UNITS for count in counts)
        if len(counts) != MOST_RATE + 1 or not whole or not 0 < sum(counts[1:]) <= sum(counts) <= MOST_UNITS:
            raise RecipeError(
                f"counts are {MOST_RATE + 1} integers of units, one for each rate from 0 to {MOST_RATE}, {MOST_UNITS} "
                f"units at most and one with codes at least, not {self.counts!r:.80}."
            )


@dataclass(frozen=True)
class Transform:
    """What is done to elements before they are quantized, and undone when they are read.

    pre_rope: keys are stored before the rotary embedding and rotated when read. Values ignore it.
    hadamard: codes are those of the head after a randomized Hadamard rotation, which reading rotates back.
    learned_rotation: with `trellis`, codes are those of the head after a rotation learned offline, which takes correlations
        out; reading rotates back.
    smooth_alpha: elements are divided by a factor for each pair of channels, their largest magnitude to this power
        (SmoothQuant's alpha); 0 for none. Learned offline.
    remove_bias: what a projection adds to every key, or value, is taken out (`store.bias`); not where ranges are static, since
        those of a channel take a constant in, and not from intrinsic values, as published.
    fold_gain: keys stored after the rotary embedding are divided by the gain of the norm that made them, one factor for each
        pair of channels, where ranges are shared by channels; the query is multiplied by it.

    Raises RecipeError where these contradict each other.
    """

    pre_rope: bool = False
    hadamard: bool = False
    learned_rotation: bool = False
    smooth_alpha: float = 0.0
    remove_bias: bool = True
    fold_gain: bool = True

    def __post_init__(self) -> None:
        _check_choices_and_flags(self)
        alpha = self.smooth_alpha
        if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not 0 <= alpha <= 1:
            raise RecipeError(f"smooth_alpha is a power from 0 to 1, not {alpha!r:.40}.")
        if self.learned_rotation and self.pre_rope:
            raise RecipeError("Keys that are stored before the rotary embedding cannot be rotated; choose one of the two.")


@dataclass(frozen=True)
class Outliers:
    """Which elements are left exact, with their indices, instead of becoming codes.

    fraction: of all elements, half at each tail, 0 to 0.02.
    scope: thresholds per `vector` (the channel, or the token), or one pair per layer (`matrix`, for ablation).
    cap: at most this many exact elements per token over all KV heads, the farthest out first.

    Raises RecipeError where these contradict each other.
    """

    fraction: float = field(default=0.0, metadata={"setting": "outliers"})
    scope: OutlierScope = field(default="vector", metadata={"setting": "outlier_scope"})
    cap: int | None = field(default=None, metadata={"setting": "outlier_cap"})

    def __post_init__(self) -> None:
        _check_choices_and_flags(self)
        if not isinstance(self.fraction, (int, float)) or not 0 <= self.fraction <= MAX_OUTLIERS:
            raise RecipeError(f"An outlier fraction of {self.fraction} is outside 0 to {MAX_OUTLIERS} (0% to 2%).")
        cap = self.cap
        if cap is not None and (type(cap) is not int or not 1 <= cap <= MAX_OUTLIER_CAP or not self.fraction):
            raise RecipeError(
                f"An outlier cap is an integer from 1 to {MAX_OUTLIER_CAP} and needs an outlier fraction above 0."
            )

    @property
    def by_matrix(self) -> bool:
        """Whether one pair of thresholds, learned offline, tells the outliers of a layer."""
        return self.fraction > 0 and self.scope == "matrix"


def setting_name(field: Field[Any]) -> str:
    """What a field of a part is called among all settings of a scheme."""
    name: str = field.metadata.get("setting", field.name)
    return name


def _check_choices_and_flags(part: Any) -> None:
    """Raise RecipeError where a field of a dataclass is none of the words of its Literal, or a flag neither true nor false."""
    hints = get_type_hints(type(part))
    for each in fields(part):
        name, hint, value = setting_name(each), hints[each.name], getattr(part, each.name)
        choices = [choice for choice in get_args(hint) if isinstance(choice, str)]
        if choices and value not in choices:
            raise RecipeError(f"{name} {value!r:.40} does not exist; choose one of {', '.join(choices)}.")
        if hint is bool and not isinstance(value, bool):
            raise RecipeError(f"{name} is true or false, not {value!r:.40}.")


def stream_bytes(counts: Sequence[int]) -> int:
    """Bytes of a token's trellis-coded stream with counts[k] units of rate k."""
    return sum(rate * count for rate, count in enumerate(counts))
