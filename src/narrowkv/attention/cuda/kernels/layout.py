"""What kernels written in Triton are compiled for: the form of a side of the packed cache, and the case of a call."""

from dataclasses import dataclass
from typing import ClassVar

from narrowkv.codec.packing import PLANES
from narrowkv.store import BLOCK

ENTRY = 8  # addresses of one side of a block: three planes, scale, zero, outlier values, their index and offsets


def power_of_2(n: int) -> int:
    """The smallest power of 2 that is not less than n."""
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True)
class PackedLayout:
    """The keys, or the values, of packed blocks.

    bits: of a code, 16 for exact elements. dim: head_dim. heads: KV heads. order: bits of the plane that columns of a tile are
    ordered by. wide: bytes read at once, 4 or 1. own: each channel has a codebook of its own, else all share one. even: levels
    are evenly spaced. ranges: "none", "stored" with each block or "fixed", [range_heads, range_tokens, range_channels]. zero:
    whether ranges have one. nonzeros: outliers taken at once, 0 where there are none. kind: of exact elements, "fp16", "bf16"
    or "fp32".
    """

    bits: int
    dim: int
    heads: int
    channel_major: bool
    order: int
    wide: int
    own: bool
    even: bool
    ranges: str
    range_heads: int
    range_tokens: int
    range_channels: int
    zero: bool
    nonzeros: int
    kind: str

    @property
    def levels(self) -> int:
        return 1 << self.bits

    @property
    def by_bytes(self) -> bool:
        """Whether codes are looked up byte by byte in registers: in words, and of 16 levels at most, even ones too."""
        return self.wide == 4 and self.bits <= 4 and self.order <= 4

    @property
    def planes(self) -> tuple[int, ...]:
        return PLANES[self.bits]

    @property
    def offsets(self) -> tuple[int, ...]:
        """Which bit of a code each plane begins with."""
        return tuple(sum(self.planes[:i]) for i in range(len(self.planes)))

    @property
    def masks(self) -> tuple[int, ...]:
        """The lowest bits of each byte of a word that are of each plane, as int32."""
        return tuple(-1 if plane == 8 else ((1 << plane) - 1) * 0x01010101 for plane in self.planes)

    @property
    def row_bytes(self) -> tuple[int, ...]:
        """Bytes of a row of each plane."""
        return tuple(self.length * plane // 8 for plane in self.planes)

    @property
    def rows(self) -> int:
        """Rows of codes of a head in a block: channels, else tokens."""
        return self.dim if self.channel_major else BLOCK

    @property
    def length(self) -> int:
        """Codes of a row."""
        return BLOCK if self.channel_major else self.dim

    @property
    def stride(self) -> int:
        """How many codes of the ordering plane lie between two that share a byte."""
        return self.length * self.order // 8

    @property
    def sharing(self) -> int:
        """How many codes share a byte of the ordering plane."""
        return 8 // self.order

    @property
    def each(self) -> int:
        """Columns that come out of one unit."""
        return self.sharing * self.wide

    @property
    def units_stored(self) -> int:
        """Units of a row of the ordering plane."""
        return self.stride // self.wide

    @property
    def units(self) -> int:
        """The same, filled up to a power of 2, and so that a tile has 16 columns or more."""
        return max(power_of_2(self.units_stored), 16 // self.each)

    @property
    def columns(self) -> int:
        """Columns of a tile."""
        return self.units * self.each

    @property
    def row_capacity(self) -> int:
        """Rows of a head in a block, up to a power of 2."""
        return max(power_of_2(self.rows), 16)

    @property
    def code_capacity(self) -> int:
        """Codes of a token of a head, up to a power of 2."""
        return power_of_2(self.dim)

    @property
    def tile(self) -> int:
        """Elements of a tile for outliers."""
        return self.tile_rows * self.columns if self.nonzeros else 0

    @property
    def tile_rows(self) -> int:
        """Channels or tokens of such a tile."""
        return self.dim if self.channel_major else BLOCK

    @property
    def group_size(self) -> int:
        """Codes of a row that share a range."""
        if self.channel_major:
            return BLOCK // self.range_tokens
        return self.dim // self.range_channels

    @property
    def by_row(self) -> bool:
        """Whether ranges differ between rows."""
        return (self.range_channels if self.channel_major else self.range_tokens) > 1

    @property
    def by_column(self) -> bool:
        """Whether ranges differ between columns."""
        return (self.range_tokens if self.channel_major else self.range_channels) > 1

    @property
    def groups(self) -> int:
        """How many ranges a row has."""
        return self.length // self.group_size


@dataclass(frozen=True)
class StreamLayout:
    """The keys, or the values, of blocks in trellis-coded streams.

    codes: coefficients with codes. dim: head_dim. heads: KV heads. stream_bytes: of a token, its norm included. norms: whether
    it has one. nonzeros: outliers taken at once, 0 where there are none. kind: of outliers, "fp16" or "bf16".
    """

    codes: int
    dim: int
    heads: int
    stream_bytes: int
    norms: bool
    nonzeros: int
    kind: str

    bits: ClassVar = 8
    planes: ClassVar = (8,)
    row_bytes: ClassVar = (BLOCK,)  # of the one plane

    @property
    def rows(self) -> int:
        """Rows of bytes of a head in a block."""
        return self.stream_bytes

    @property
    def capacity(self) -> int:
        """Coefficients of a tile, those without codes included."""
        return max(power_of_2(self.dim), 16)

    @property
    def tile(self) -> int:
        """Elements of a tile for outliers."""
        return self.codes * BLOCK if self.nonzeros else 0


AnyLayout = PackedLayout | StreamLayout


@dataclass(frozen=True)
class KernelConfig:
    """One call of attention.

    rows: queries of all heads of a group, at most `capacity` of them at a time. queries: of one head. dim: head_dim. pairs: of
    channels that are rotated when read, 0 for none; interleaved: whether they are neighbors. rope_mode: "none"; "near",
    relative to the block's first token, where positions follow each other; "positions"; or "given" angles of each token.
    sinks: how many each sequence has. window: tokens that a query sees, 0 for all. softcap, padding, hidden: whether there is
    such a thing.
    """

    rows: int
    capacity: int
    queries: int
    dim: int
    pairs: int
    interleaved: bool
    rope_mode: str
    sinks: int
    softcap: bool
    padding: bool
    window: int
    hidden: bool
    precision: str  # of products of float32: "ieee", "tf32" or "tf32x3"

    @property
    def half(self) -> int:
        return self.dim // 2

    @property
    def rope_state_width(self) -> int:
        """Elements that are stored of each token, by which its keys rotate."""
        return 2 * self.pairs if self.rope_mode == "given" else 1

    @property
    def still(self) -> int:
        """Pairs of channels that do not rotate, but 1 if all do."""
        return max(self.half - self.pairs, 1)

    @property
    def lanes(self) -> int:
        """Pairs of channels of a tile of keys."""
        return max(power_of_2(self.half), 16)

    @property
    def wide(self) -> int:
        """Channels of a tile of exact values."""
        return max(power_of_2(self.dim), 16)


@dataclass(frozen=True)
class DenseSegments:
    """Which kinds of tokens lie outside of blocks: the slot of each among those that there are, else -1."""

    tail: int
    sinks: int
    window: int
    new: int
