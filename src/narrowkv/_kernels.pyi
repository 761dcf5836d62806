from collections.abc import Sequence

from torch import Tensor

def instruction_sets() -> list[str]:
    """Names of the vector instruction sets of this processor that kernels can use, weakest first."""

def all_finite(kind: int, data: int, shape: Sequence[int], strides: Sequence[int], threads: int) -> bool:
    """Whether no element is NaN or infinite; see codec/cpu/encode.py."""

def pack(codes: int, shape: Sequence[int], strides: Sequence[int], bits: int, shift: int, packed: int, threads: int) -> None:
    """Write one plane of codes; see codec/packing.py."""

def encode_trellis(
    kernel: str,
    elements: int,
    weights: int,
    high: int,
    low: int,
    codes: int,
    shape: Sequence[int],
    counts: Sequence[int],
    threads: int,
) -> None:
    """Write the bit stream of least cost of each row; see codec/trellis.py."""

def decode_streams(codes: int, levels: int, elements: int, shape: Sequence[int], counts: Sequence[int], threads: int) -> None:
    """Write what streams stand for; see codec/trellis.py."""

class Codec:
    """What is the same for all tokens that a quantizer encodes; see codec/cpu/encode.py."""

    def __init__(
        self,
        *,
        sharing: int,
        group: int,
        outliers: float,
        boundaries: Tensor,
        scale: Tensor | None,
        zero: Tensor | None,
        lower: Tensor | None,
        upper: Tensor | None,
    ) -> None: ...
    def encode(
        self,
        kind: int,
        data: int,
        shape: Sequence[int],
        strides: Sequence[int],
        skip: int,
        codes: Sequence[int],
        first: int,
        parts: Sequence[int],
        outliers: Sequence[int],
        threads: int,
    ) -> int:
        """Write codes, ranges and outliers of new tokens to their buffer."""

class StreamCodec:
    """What is the same for all tokens that become trellis-coded streams; see codec/cpu/encode_streams.py."""

    def __init__(
        self,
        *,
        counts: Sequence[int],
        high: Tensor,
        low: Tensor,
        mean: Tensor,
        steps: Tensor,
        scales: Tensor,
        weight: Tensor,
        search_weight: Tensor,
        channels: Tensor | None,
        turns: Tensor | None,
        pairs: Tensor | None,
        order: Tensor | None,
        matrix: Tensor | None,
        norms: Tensor | None,
        threshold: float,
        most: int,
    ) -> None: ...
    def encode(
        self,
        kernel: str,
        kind: int,
        data: int,
        shape: Sequence[int],
        strides: Sequence[int],
        skip: int,
        codes: Sequence[int],
        first: int,
        parts: Sequence[int],
        outliers: Sequence[int],
        halves: bool,
        threads: int,
    ) -> list[int]:
        """Write codes and outliers of new tokens to their buffer; how many outliers they have, and what is out of range."""

class Streams:
    """What all trellis-coded streams of one side have in common."""

    def __init__(
        self,
        *,
        counts: list[int],
        norms: bool,
        high: Tensor,
        low: Tensor,
        finer: Tensor,
        query_index: Tensor | None,
        channels: Tensor | None,
        query_rotations: Tensor | None,
        offsets: Tensor | None,
        uses_int16: bool = False,
        int16_scales: Tensor | None = None,
        int16_maxima: Tensor | None = None,
        int16_offsets: Tensor | None = None,
    ) -> None: ...

class PackedTensor:
    """The keys, or the values, of packed blocks: what all of them have in common."""

    def __init__(
        self,
        *,
        bits: int,
        codes: int,
        channel_major: bool,
        table: Tensor | None,
        fixed: bool,
        scale: Tensor | None,
        zero: Tensor | None,
        ranges: list[int],
        exact: int,
        outlier: int,
        int16: Tensor | None,
        unit: Tensor | None,
        most: int,
        streams: Streams | None = None,
    ) -> None: ...
    @property
    def uses_int16(self) -> bool:
        """Whether it can be read in int16."""

class Rotation:
    """The rotary embedding of keys that are stored without it."""

    def __init__(
        self,
        *,
        pairs: int = 0,
        interleaved: bool = False,
        scaling: float = 1.0,
        far: Tensor | None = None,
        near: Tensor | None = None,
        steps: Tensor | None = None,
        int16: Tensor | None = None,
        lanes: Tensor | None = None,
    ) -> None: ...

class Problem:
    """A few queries of some sequences, and what they attend to: blocks, a tail and exact tokens; tensors by their addresses, 0
    for none, which are to live as long as it is used.
    """

    def __init__(
        self,
        *,
        keys: PackedTensor,
        values: PackedTensor,
        rotation: Rotation,
        chunk: int,
        shape: list[int],
        blocks: int,
        tokens: int,
        tail: int,
        stored: int,
        output: int,
        packed_query: int,
        exact_query: int,
        exact: list[list[int]],
        keys_tail: list[int],
        values_tail: list[int],
        positions: int,
        position_stride: int,
        angles: int,
        table: int,
        starts: int,
        hidden: int,
        hidden_batch: int,
        sink_index: int,
        sinks: int,
        sink_logits: int,
        key_offsets: int,
        value_bias: int,
        value_matrix: int,
        value_mean: int,
        value_rows: int,
        scaling: float,
        softcap: float,
    ) -> None: ...

def attend(*, kernel: str, threads: int, problems: list[Problem]) -> None:
    """Attention of all problems, whose splits fill one parallel region; each is computed as if it were alone."""

class Pages:
    """The pages of one layer in an engine's memory; see store/paged.py."""

    def __init__(
        self,
        *,
        memory: int,
        count: int,
        stride: int,
        block_bytes: int,
        sink: Sequence[int],
        kv_heads: int,
        head_dim: int,
        sides: Sequence[Sequence[int]],
    ) -> None: ...
    def write(
        self,
        keys: StreamCodec,
        values: StreamCodec,
        kernel: str,
        tokens: int,
        of_keys: Sequence[int],
        of_values: Sequence[int],
        unrotation: Sequence[int],
        runs: Sequence[int],
        threads: int,
    ) -> int:
        """Write new tokens to their blocks; 0 where nothing is wrong with them."""

    def attend(
        self,
        kernel: str,
        threads: int,
        layer: Problem,
        sequences: Sequence[int],
        tables: Sequence[int],
        counting: Sequence[int],
        tokens: int,
        in_pages: bool,
        query: Sequence[int],
        output: Sequence[int],
        keys: Sequence[int],
        values: Sequence[int],
    ) -> None:
        """Attention of a few queries of each sequence; see attention/cpu/paged.py."""
