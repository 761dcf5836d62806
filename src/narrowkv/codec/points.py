"""PointQuantizer: codebooks of channels or of pairs of channels, in real units.

A code names the point of its channel's, or its pair's, codebook that lies nearest, in the metric of the loss. Source of the
coupling: CQ (arXiv 2405.03917); of weights by the Fisher information: KVQuant, section 3.3.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from narrowkv import _kernels
from narrowkv.codec import cuda
from narrowkv.codec.encoded import Encoded
from narrowkv.codec.memory import address
from narrowkv.codec.quantizer import keep_outliers, within_cap
from narrowkv.codec.scheme import Scheme
from narrowkv.codec.tables import TableForm, Tables, require_table
from narrowkv.errors import RecipeError

LANES = 16  # codes that the compiled search takes at a time
FAR = 3  # widths of a codebook beyond it: tails of what it was learned from do not reach there
FEW = 4  # tokens, for which a matrix product, or a second thread, is not worth the start


def to_vectors(numbers: Tensor, count: int) -> Tensor:
    """Channels that share a code: [..., head_dim] -> [..., head_dim / count, count], channel d with d + head_dim / count."""
    return numbers.unflatten(-1, (count, -1)).transpose(-1, -2)


def from_vectors(vectors: Tensor) -> Tensor:
    """Inverse of `to_vectors`."""
    return vectors.transpose(-1, -2).flatten(-2)


@dataclass(frozen=True)
class PointQuantizer(Tables):
    """One tensor's scheme and tables.

    points: [kv_heads, codes, levels, numbers] float16, what a code decodes to; codes = head_dim / numbers of each head.
    weight: [kv_heads, codes, numbers] float32, what a squared error in each number costs.
    limit: [1] float32, the cost above which a code's numbers are kept exact; None without outliers.
    turn: [kv_heads, head_dim, head_dim] float16, orthogonal: codes are those of numbers @ turn; or None.
    Raises RecipeError if the scheme needs tables that are not given, or tables do not fit it.
    """

    scheme: Scheme
    points: Tensor | None = None
    weight: Tensor | None = None
    limit: Tensor | None = None
    turn: Tensor | None = None

    def __post_init__(self) -> None:
        scheme = self.scheme
        needed = {"points": True, "weight": True, "limit": scheme.outliers > 0, "turn": scheme.turn}
        for name, wanted in needed.items():
            if wanted != (getattr(self, name) is not None):
                raise RecipeError(f"This scheme's tables do not fit it ({name} is learned offline); calibrate the model.")
        assert self.points is not None and self.weight is not None
        if self.points.dim() != 4:
            raise RecipeError(f"Points have four dimensions, not {self.points.dim()}; calibrate the model.")
        heads, codes, levels, numbers = self.points.shape
        forms = [(2**scheme.code_bits, scheme.numbers), (heads, codes, numbers), (heads, codes * numbers, codes * numbers)]
        turn = forms[2] if self.turn is None else tuple(self.turn.shape)
        if forms != [(levels, numbers), tuple(self.weight.shape), turn]:
            raise RecipeError(
                f"{scheme.bits} bits need {forms[0][0]} points of {forms[0][1]} numbers, but the tables have {levels} of "
                f"{numbers}, or weights of another shape; calibrate again."
            )

    @classmethod
    def forms(cls, scheme: Scheme, kv_heads: int, head_dim: int) -> dict[str, TableForm]:
        by_code = (kv_heads, head_dim // scheme.numbers)
        forms: dict[str, TableForm] = {
            "points": ((*by_code, 2**scheme.code_bits, scheme.numbers), torch.float16),
            "weight": ((*by_code, scheme.numbers), torch.float32),
        }
        if scheme.outliers:
            forms["limit"] = ((1,), torch.float32)
        if scheme.turn:
            forms["turn"] = ((kv_heads, head_dim, head_dim), torch.float16)
        return forms

    def _require_order(self) -> None:
        for name, table in (("weight", self.weight), ("limit", self.limit)):
            require_table(table is None or bool((table >= 0).all()), name, "numbers below 0")

    def encode(self, x: Tensor, skip: Tensor | None = None) -> Encoded:
        """Quantise numbers, once and for all; parameters as of `Quantizer.encode`.

        Codes are [batch, kv_heads, tokens, head_dim / numbers], and an outlier is a code whose numbers are all kept.
        Raises ActivationError where an outlier does not fit 16 bits.
        """
        numbers = self.turned(x)
        codes, cost = self._nearest(numbers)
        encoded = Encoded(codes)
        if self.limit is not None:
            exact = to_vectors(numbers, self.scheme.numbers).flatten(0, 3)  # [codes in all, numbers]
            exact = exact if self.scheme.numbers > 1 else exact.squeeze(1)
            outside = cost > self.limit
            if self.scheme.outlier_cap is not None:
                outside &= within_cap(cost, outside, self.scheme.outlier_cap)
            keep_outliers(encoded, exact, outside, skip, x.dtype)
        return encoded

    def far(self, x: Tensor) -> Tensor | None:
        if self.limit is not None and self.scheme.outlier_cap is None:
            return None
        assert self.points is not None
        ends = [end.float() for end in self.points.aminmax(dim=2)]  # [kv_heads, codes, numbers]
        widths = (ends[1] - ends[0]).amax(-1, keepdim=True).expand_as(ends[0])  # codes may leave all but one channel alone
        low, high, width = (from_vectors(part)[:, None] for part in (*ends, widths))  # [kv_heads, 1, head_dim]
        numbers = self.turned(x)
        return (numbers < low - FAR * width) | (numbers > high + FAR * width)

    def stepper(self) -> cuda.Stepper | None:
        unit, points = self._search
        return None if self.scheme.outlier_cap is not None else cuda.PointEncoder(self.turned, unit, points, self.limit)

    def decode(self, encoded: Encoded) -> Tensor:
        """What the codes stand for: [batch, kv_heads, tokens, head_dim] float32."""
        assert self.points is not None
        heads, channels = (
            torch.arange(size, device=encoded.codes.device, dtype=torch.int64) for size in self.points.shape[:2]
        )
        vectors = self.points[heads[:, None, None], channels, encoded.codes.int()].float()
        if encoded.outlier_index is not None and encoded.outlier_values is not None:
            vectors.view(-1, self.scheme.numbers)[encoded.outlier_index] = encoded.outlier_values.float().view(
                -1, self.scheme.numbers
            )
        numbers = from_vectors(vectors)
        return numbers if self.turn is None else numbers @ self.turn.float().transpose(1, 2)

    def nearest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of numbers [batch, kv_heads, tokens, head_dim] and the cost of what they miss: [batch, kv_heads, tokens,
        codes] uint8 and float32.
        """
        return self._nearest(self.turned(x))

    def _nearest(self, turned: Tensor) -> tuple[Tensor, Tensor]:
        unit, points = self._search
        find = cuda.search if cuda.runs_on(points.device) else search if points.is_cpu else nearest_naive
        return find(turned.detach() * unit, points)

    @functools.cached_property
    def _search(self) -> tuple[Tensor, Tensor]:
        """What numbers are multiplied by, [kv_heads, 1, head_dim], and points so multiplied, as `find` takes them."""
        assert self.points is not None and self.weight is not None
        unit = self.weight.sqrt()
        points = self.points.float() * unit[:, :, None]
        compiled = points.is_cpu and not cuda.runs_on(points.device)
        return from_vectors(unit)[:, None].contiguous(), laid_out(points) if compiled else points.contiguous()

    @functools.cached_property
    def _matrices(self) -> Tensor:
        """`turn` as compiled code reads it, row by row."""
        assert self.turn is not None
        return self.turn.contiguous()

    def turned(self, x: Tensor) -> Tensor:
        """Numbers as the codebooks see them: [batch, kv_heads, tokens, head_dim] float32.

        Multiplied in float64: in float32 the last bit, and with it now and then a code, would depend on how many tokens come
        at once.
        """
        if self.turn is None:
            return x.float()
        if not x.is_cpu or x.shape[0] * x.shape[2] > FEW:
            return (x.double() @ self.turn.double()).float()
        numbers = x.float().contiguous()
        turned = torch.empty_like(numbers)
        matrices = address(self._matrices, torch.float16, shape=(numbers.shape[1], numbers.shape[3], numbers.shape[3]))
        _kernels.turn(address(numbers, torch.float32), matrices, address(turned, torch.float32), turned.shape)
        return turned


def nearest(numbers: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Code of the nearest point and the squared distance to it; compiled for the CPU, `nearest_naive` elsewhere.

    numbers: [batch, kv_heads, tokens, head_dim] float32. points: [kv_heads, codes, levels, numbers] float32. Returns
    [batch, kv_heads, tokens, codes] uint8 and float32. The first of several points as near is taken.
    """
    return search(numbers, laid_out(points)) if numbers.is_cpu else nearest_naive(numbers, points)


def laid_out(points: Tensor) -> Tensor:
    """Points as compiled code reads them: [kv_heads, levels, numbers, codes], filled up to whole registers of codes."""
    missing = -points.shape[1] % LANES
    return torch.nn.functional.pad(points.permute(0, 2, 3, 1), (0, missing)).contiguous()


def search(numbers: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """`nearest` on a CPU; table: from `laid_out`."""
    (batch, heads, tokens, dim), (_, levels, count, codes) = numbers.shape, table.shape
    used = dim // count
    if codes > used:
        numbers = torch.nn.functional.pad(numbers.unflatten(3, (count, used)), (0, codes - used))
    numbers = numbers.contiguous()
    source = address(numbers, torch.float32, shape=(batch, heads, tokens, *((count, codes) if codes > used else (dim,))))
    points = address(table, torch.float32, shape=(heads, levels, count, codes))
    found = torch.empty(batch, heads, tokens, codes, dtype=torch.uint8, device="cpu")
    cost = torch.empty(found.shape, dtype=torch.float32, device="cpu")
    shape = (batch, heads, tokens, levels, count, codes)
    threads = 1 if batch * tokens <= FEW else torch.get_num_threads()
    _kernels.nearest(source, points, address(found, torch.uint8), address(cost, torch.float32), shape, threads)
    return found[..., :used].contiguous(), cost[..., :used].contiguous()


def nearest_naive(numbers: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """The same in plain torch, exactly."""
    parts = to_vectors(numbers, points.shape[3]).unbind(-1)
    best = torch.full_like(parts[0], torch.inf, memory_format=torch.contiguous_format)
    codes = torch.zeros_like(best, dtype=torch.uint8)
    for code, point in enumerate(points.unbind(2)):
        distance = sum((part - at[:, None]).square_() for part, at in zip(parts, point.unbind(-1), strict=True))
        assert isinstance(distance, Tensor)
        codes.masked_fill_(distance < best, code)
        best = torch.minimum(best, distance)
    return codes, best


def moments(numbers: Tensor, codes: Tensor, levels: int, count: int) -> Tensor:
    """How many vectors fell to each level, and sums of their numbers, squares and products; compiled for the CPU.

    numbers: [kv_heads, tokens, head_dim] float32. codes: [kv_heads, tokens, head_dim / count] uint8. Returns [kv_heads, codes,
    levels, 3 or 6] float64: 1, x, xx of single numbers, or 1, x, y, xx, yy, xy of pairs.
    """
    if not numbers.is_cpu:
        return moments_naive(numbers, codes, levels, count)
    sums = torch.zeros(numbers.shape[0], levels, 3 * count, codes.shape[2], dtype=torch.float64, device="cpu")
    _kernels.moments(numbers.contiguous(), codes.contiguous(), sums, torch.get_num_threads())
    return sums.permute(0, 3, 1, 2)


def moments_naive(numbers: Tensor, codes: Tensor, levels: int, count: int) -> Tensor:
    """The same in plain torch."""
    vectors = to_vectors(numbers, count).double()
    kinds = [torch.ones_like(vectors[..., :1]), vectors, vectors.square(), *([vectors.prod(-1, True)] if count == 2 else [])]
    parts = torch.cat(kinds, dim=-1)  # [kv_heads, tokens, codes, 3 or 6]
    sums = parts.new_zeros(parts.shape[0], levels, *parts.shape[2:])
    return sums.scatter_add_(1, codes.long()[..., None].expand_as(parts), parts).transpose(1, 2)
