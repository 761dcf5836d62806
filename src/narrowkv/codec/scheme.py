"""Scheme: how one tensor, the keys or the values, is quantized. Plain data; what is learned is in `Quantizer`."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from typing import Literal, get_args, get_type_hints

import torch

from narrowkv.errors import RecipeError

Datatype = Literal["exact", "int", "nf", "fp", "nuq", "iv", "iv-kmeans", "trellis"]
Strategy = Literal["channel", "token", "token_head", "block"]
OutlierScope = Literal["vector", "matrix"]
Weighting = Literal["fisher_scaled", "fisher", "none"]
ScaleDtype = Literal["float16", "float8"]
RangeForm = tuple[tuple[int, int, int], torch.dtype]

MAX_OUTLIERS = 0.02
BLOCK = 64  # tokens of a block, the unit in which a store packs
MAX_GROUP_SIZE, MAX_OUTLIER_CAP, MAX_LOOKAHEAD_BLOCKS = 512, 2**16, 64  # channels of a head, exact elements of a token, blocks
# fields that an encoder need not know: of codes and codebooks it is given, or of what is done before and after it
AROUND_CODES = ("bits", "weighting", "qnorm", "pre_rope", "remove_bias", "fold_gain")
UNIT, MOST_RATE, MOST_UNITS = 8, 6, 64  # trellis: channels of one rate, bits of a channel, units of a head


def stream_bytes(counts: Sequence[int]) -> int:
    """Bytes of a token's trellis-coded stream with counts[k] units of rate k."""
    return sum(rate * count for rate, count in enumerate(counts))


@dataclass(frozen=True)
class Scheme:
    """How one tensor [batch, kv_heads, tokens, head_dim] is quantized.

    bits: of codes for each element: 2, 3, 4 or 8, with `trellis` any up to 6; 16 means the model's own dtype and goes with
        datatype `exact` only.
    datatype: `int` (evenly spaced), `nf` (NormalFloat), `fp` (e2m1 or e4m3, its range symmetric and without a zero point),
        `nuq` (codebook learned per layer), `iv` and `iv-kmeans` (four intrinsic values of each block, `codec.intrinsic`, found
        by frequency or by k-means), `trellis` (trellis-coded streams, `codec.trellis`), `exact` (not quantized).
    strategy: who shares a scale and zero: a `channel` over the whole run (static, learned offline), a `token` over all its
        KV heads, or a token in one head (`token_head`), both taken online; a `block` of `group` tokens in one head, for `iv`.
    group_size: finer than that: this many consecutive tokens of a `channel` (taken online, then), or this many consecutive
        channels of a token (`token_head`), as KIVI has it. None: no groups.
    pre_rope: keys are stored before the rotary embedding and rotated when read. Values ignore it.
    outliers: fraction of the elements left exact, half at each tail, 0 to 0.02.
    outlier_scope: thresholds per `vector` (the channel, or the token), or one pair per layer (`matrix`, for ablation).
    outlier_cap: at most this many exact elements per token over all KV heads, the farthest out first.
    weighting: what the codebook minimizes: `fisher_scaled` is sum F s^2 (a - Q(a))^2 (KVQuant, section 3.3 and
        appendix E), `fisher` leaves s^2 out, `none` is plain k-means.
    qnorm: shift and scale the codebook so that mean and deviation survive rounding (KVQuant v1, Q-Norm).
    hadamard: codes are those of the head after a randomized Hadamard rotation, which reading rotates back.
    learned_rotation: with `trellis`, codes are those of the head after a rotation learned offline, which takes correlations
    out; reading
        rotates back.
    scale_dtype: in which online scales are stored: `float16`, or `float8` (e4m3, for datatype `fp`), as multiples of a
        bfloat16 scale that each token has over all its KV heads.
    smooth_alpha: elements are divided by a factor for each pair of channels before they are quantized, their largest magnitude
    to
        this power (SmoothQuant's alpha); 0 for none. Learned offline.
    round_down: with `iv`, an element takes the level below it, as published, instead of the nearest.
    lookahead_blocks: with `iv`, the levels of a block are those of a sliding window of this many blocks, itself and those that
    follow it. remove_bias: what a projection adds to every key, or value, is taken out before elements are quantized
    (`store.bias`);
        not where ranges are static, since those of a channel take a constant in, and not from intrinsic values, as published.
    fold_gain: keys stored after the rotary embedding are divided by the gain of the norm that made them, one factor for each
        pair of channels, before they are quantized, where ranges are shared by channels; the query is multiplied by it.
    counts: with `trellis`, how many units of 8 channels of a head have rates of 0, 1, ... 6 bits; None where calibration is
        yet to allocate them.
    token_norm: with `trellis`, a token's head is divided by its norm first, which is stored in 8 bits.

    Raises RecipeError where these contradict each other.
    """

    bits: float
    datatype: Datatype
    strategy: Strategy = "token"
    pre_rope: bool = False
    outliers: float = 0.0
    outlier_scope: OutlierScope = "vector"
    outlier_cap: int | None = None
    weighting: Weighting = "fisher_scaled"
    qnorm: bool = False
    group_size: int | None = None
    hadamard: bool = False
    learned_rotation: bool = False
    scale_dtype: ScaleDtype = "float16"
    smooth_alpha: float = 0.0
    round_down: bool = False
    lookahead_blocks: int = 1
    remove_bias: bool = True
    fold_gain: bool = True
    counts: tuple[int, ...] | None = None
    token_norm: bool = False

    def __post_init__(self) -> None:
        for field, hint in get_type_hints(type(self)).items():
            choices = [choice for choice in get_args(hint) if isinstance(choice, str)]
            if choices and getattr(self, field) not in choices:
                raise RecipeError(f"{field} {getattr(self, field)!r} does not exist; choose one of {', '.join(choices)}.")
        if self.datatype == "exact":
            if self.bits != 16 or self.outliers or self.qnorm:
                raise RecipeError("An exact scheme has 16 bits and neither outliers nor Q-Norm; drop those settings.")
        elif self.datatype == "trellis":
            self._check_trellis()
        elif self.bits not in (2, 3, 4, 8) or type(self.bits) is not int:
            raise RecipeError(f"{self.bits} bits are not supported; choose 2, 3, 4 or 8 (or the recipe fp16).")
        if self.datatype == "fp" and self.bits not in (4, 8):
            raise RecipeError("Datatype fp has 4 bits (e2m1) or 8 (e4m3).")
        if self.scale_dtype == "float8" and (self.datatype != "fp" or self.strategy == "channel" or self.outliers):
            raise RecipeError("Scales of 8 bits go with datatype fp, ranges within a token, and no outliers.")
        if self.hadamard and (self.datatype == "exact" or self.needs_calibration):
            raise RecipeError("The Hadamard rotation goes with codes whose ranges are taken online and need no calibration.")
        if self.datatype in ("nf", "nuq") and self.bits == 8:
            raise RecipeError(f"Datatype {self.datatype} has 2, 3 or 4 bits; with 8 bits choose int.")
        if not isinstance(self.outliers, (int, float)) or not 0 <= self.outliers <= MAX_OUTLIERS:
            raise RecipeError(f"An outlier fraction of {self.outliers} is outside 0 to {MAX_OUTLIERS} (0% to 2%).")
        cap = self.outlier_cap
        if cap is not None and (type(cap) is not int or not 1 <= cap <= MAX_OUTLIER_CAP or not self.outliers):
            raise RecipeError(
                f"An outlier cap is an integer from 1 to {MAX_OUTLIER_CAP} and needs an outlier fraction above 0."
            )
        if self.group_size is not None:
            self._check_group(self.group_size)
        for name in (
            "pre_rope",
            "qnorm",
            "hadamard",
            "learned_rotation",
            "round_down",
            "remove_bias",
            "fold_gain",
            "token_norm",
        ):
            if not isinstance(getattr(self, name), bool):
                raise RecipeError(f"{name} is true or false, not {getattr(self, name)!r}.")
        if self.qnorm and self.datatype != "nuq":
            raise RecipeError("Q-Norm adjusts a learned codebook; it needs datatype nuq.")
        self._check_smooth()
        self._check_block()
        self._check_rotation()

    def _check_smooth(self) -> None:
        if (
            not isinstance(self.smooth_alpha, (int, float))
            or isinstance(self.smooth_alpha, bool)
            or not 0 <= self.smooth_alpha <= 1
        ):
            raise RecipeError(f"smooth_alpha is a power from 0 to 1, not {self.smooth_alpha!r}.")
        if self.smooth_alpha and (self.datatype not in ("int", "nf", "fp") or self.strategy == "channel" or self.outliers):
            raise RecipeError("Smoothing goes with codes of int, nf or fp whose ranges are taken online, without outliers.")

    def _check_trellis(self) -> None:
        if self.strategy != "channel" or self.group_size or self.outlier_scope == "matrix" or self.outlier_cap:
            raise RecipeError("Trellis-coded streams go with strategy channel, without groups, caps or matrix scope.")
        if not isinstance(self.bits, (int, float)) or isinstance(self.bits, bool) or not 0 < self.bits <= MOST_RATE:
            raise RecipeError(f"A trellis-coded stream has more than 0 and at most {MOST_RATE} bits, not {self.bits!r:.40}.")
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

    def _check_block(self) -> None:
        by_value = self.datatype in ("iv", "iv-kmeans")
        if by_value != (self.strategy == "block") or (self.round_down and not by_value):
            raise RecipeError("Intrinsic values (iv, iv-kmeans) go with strategy block, and round_down with both.")
        if by_value and (self.bits != 2 or not self.group_size or self.outliers or self.hadamard):
            raise RecipeError("Intrinsic values have 2 bits, a group of tokens, and neither outliers nor a Hadamard rotation.")
        if (
            type(self.lookahead_blocks) is not int
            or not 1 <= self.lookahead_blocks <= MAX_LOOKAHEAD_BLOCKS
            or (self.lookahead_blocks > 1 and not by_value)
        ):
            raise RecipeError(
                f"lookahead_blocks is an integer from 1 to {MAX_LOOKAHEAD_BLOCKS}, 1 but for intrinsic values, not "
                f"{self.lookahead_blocks!r:.40}."
            )

    def _check_rotation(self) -> None:
        if self.datatype != "trellis" and (self.counts is not None or self.token_norm or self.learned_rotation):
            raise RecipeError("Counts of rates, norms of tokens and learned rotations go with datatype trellis.")
        if self.learned_rotation and self.pre_rope:
            raise RecipeError("Keys that are stored before the rotary embedding cannot be rotated; choose one of the two.")

    def _check_group(self, group: int) -> None:
        if type(group) is not int or not 8 <= group <= MAX_GROUP_SIZE or self.strategy == "token" or self.datatype == "exact":
            raise RecipeError(
                f"A group is an integer from 8 to {MAX_GROUP_SIZE} and goes with codes by channel or block (tokens) or "
                "token_head (channels)."
            )
        if self.strategy in ("channel", "block") and BLOCK % group:
            raise RecipeError(f"Groups of {group} tokens do not fill blocks of {BLOCK}; choose 8, 16, 32 or 64.")
        if self.outlier_scope == "matrix" and self.outliers:
            raise RecipeError("Outlier thresholds per matrix are learned offline and do not go with groups; choose vector.")

    def require_head_dim(self, head_dim: int) -> None:
        """Raise RecipeError where groups, pairs or units of channels do not fill a head."""
        if self.datatype == "trellis" and head_dim % UNIT:
            raise RecipeError(
                f"Units of {UNIT} channels do not fill a head_dim of {head_dim}; choose another recipe than trellis."
            )
        if self.counts is not None and sum(self.counts) * UNIT != head_dim:
            raise RecipeError(f"{sum(self.counts)} units do not make a head_dim of {head_dim}; calibrate this model.")
        if self.smooth_alpha and head_dim % 2:
            raise RecipeError(f"Pairs of channels do not fill a head_dim of {head_dim}; choose a recipe without smoothing.")
        if self.strategy == "token_head" and self.group_size and head_dim % self.group_size:
            raise RecipeError(
                f"Groups of {self.group_size} channels do not fill a head_dim of {head_dim}; choose another group."
            )

    def differs_only_in(self, names: Collection[str]) -> bool:
        """Whether all other fields are as they are by default, but for what is learned and done around the codes."""
        return all(
            getattr(self, field.name) == field.default
            for field in fields(self)
            if field.name not in names and field.name not in AROUND_CODES
        )

    @property
    def code_bits(self) -> int:
        """Bits of one code."""
        return 8 if self.datatype == "trellis" else int(self.bits)

    def codes(self, head_dim: int) -> int:
        """How many codes a token has in one head: with `trellis`, the bytes of its stream and of its norm."""
        if self.counts is not None:
            return stream_bytes(self.counts) + self.token_norm
        return head_dim

    def outlier_places(self, head_dim: int) -> int:
        """How many places of outliers a token has in one head: its codes, or, with `trellis`, the channels that have codes."""
        return self.codes(head_dim) if self.counts is None else UNIT * sum(self.counts[1:])

    @property
    def tokens_per_group(self) -> int:
        """How many tokens can only be encoded at once."""
        return self.group_size if self.strategy in ("channel", "block") and self.group_size else 1

    @property
    def lookahead_tokens(self) -> int:
        """How many tokens must follow, exact still, where others are encoded."""
        return (self.lookahead_blocks - 1) * self.tokens_per_group

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
        if self.scale_dtype == "float8":
            return {"scale": (shape, torch.float8_e4m3fn), "token_scale": ((1, tokens, 1), torch.bfloat16)}
        return dict.fromkeys(("scale",) if self.symmetric else ("scale", "zero"), (shape, torch.float16))

    @property
    def symmetric(self) -> bool:
        """Whether ranges are symmetric, so that there is no zero point."""
        return self.datatype == "fp"

    @property
    def static(self) -> bool:
        """Whether scale and zero are fixed by calibration."""
        return self.datatype != "exact" and self.strategy == "channel" and self.group_size is None

    @property
    def takes_bias_out(self) -> bool:
        """Whether a constant that is added to all elements of a channel would cost precision, and so is taken out."""
        return self.remove_bias and self.datatype != "exact" and not self.static and self.strategy != "block"

    @property
    def takes_gain_out(self) -> bool:
        """Whether keys are divided by the gain of a norm."""
        by_token = self.strategy in ("token", "token_head") and not (self.pre_rope or self.outliers or self.smooth_alpha)
        return self.fold_gain and by_token and self.datatype in ("int", "nf", "fp")

    @property
    def needs_calibration(self) -> bool:
        """Whether anything of it is learned offline."""
        by_matrix = self.outliers > 0 and self.outlier_scope == "matrix"
        return self.static or self.datatype == "nuq" or by_matrix or self.smooth_alpha > 0
