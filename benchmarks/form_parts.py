"""Transform, rates and codes of the keys or the values of one layer, fake-quantized: parts of `benchmarks.forms`."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.form_tables import gaussian, learned, on_grid, viterbi
from narrowkv.calibration.trellis_fit import uncorrelated_axes
from narrowkv.codec.pairs import from_pairs, to_pairs

OUTLIER_BITS, NORM_BITS, NORM_STEPS = 24, 8, 16  # of an exact element; of a token's norm, in sixteenths of a power of two
LEARNING_TOKENS = 800
CLIP = 0.99  # gradients of loud tokens are shortened to this quantile of norms


@dataclass(frozen=True)
class Variant:
    """One form.

    texts: what is learned from: `encyclopedia`, source `code`, or a `mix` of both.
    labels: whose gradients the Fisher information is made of: of the text's next tokens (`text`), of tokens that the model
        draws (`drawn`), or of both.
    frame: keys are stored before the rotary embedding (0), as rotated to the middle of their frame of this many positions, or
        after it (-1).
    weighted: the search weights an element's error by what it costs. token_norm: values are divided by their token's norm.
    shrinkage: of the mean cost of a head's channels, added to each. value_weight: of the values in the allocation.
    gain_keys, gain_values: 1 widens what codes decode to until it is unbiased, 0 leaves the means of least squares.
    outliers: share of the elements of a head and page of 64 tokens that are exact.
    table, grid: `full` or `additive`, in steps of this many bits, 0 for float32. state_bits: of the window, 8 if additive.
    unit: channels that get one rate, 8 for codes of whole bytes. rounds: of learning on the layer's own elements.
    sides: what is quantized, keys and values.
    """

    texts: str = "mix"
    labels: str = "both"
    frame: int = 16
    weighted: bool = True
    token_norm: bool = True
    shrinkage: float = 0.03
    value_weight: float = 1.0
    gain_keys: float = 0.0
    gain_values: float = 1.0
    outliers: float = 0.0
    table: str = "additive"
    grid: int = 7
    state_bits: int = 8
    unit: int = 8
    rounds: int = 2
    sides: str = "kv"

    def overhead(self, head_dim: int) -> float:
        """Bits for each element besides the codes."""
        return self.outliers * OUTLIER_BITS + (NORM_BITS / head_dim / 2 if self.token_norm else 0)


@dataclass(frozen=True)
class Samples:
    """What is known of one tensor: elements and gradients [windows, kv_heads, tokens, head_dim], half of the windows of each
    text; the first token is left out.

    angles: [head_dim / 2] float32, how far a position rotates each pair of channels; None for values.
    """

    elements: Tensor
    text: Tensor
    drawn: Tensor
    angles: Tensor | None

    def chosen(self, texts: str, labels: str) -> tuple[Tensor, Tensor]:
        """Elements and gradients, [kv_heads, n, head_dim] each."""
        half = len(self.elements) // 2
        windows = {"encyclopedia": slice(half), "code": slice(half, None), "mix": slice(None)}[texts]
        gradients = {"text": [self.text], "drawn": [self.drawn], "both": [self.text, self.drawn]}[labels]
        parts = self.elements[windows], torch.cat([part[windows] for part in gradients])
        x, g = (part.transpose(0, 1).flatten(1, 2).float() for part in parts)
        return x, g


def fisher(gradients: Tensor) -> Tensor:
    """[kv_heads, head_dim, head_dim] float64 of gradients [kv_heads, n, head_dim]."""
    g = gradients.double()
    norms = g.square().sum(-1).mean(0)
    g = g * (torch.quantile(norms, CLIP) / norms.clamp_min(1e-30)).clamp(max=1).sqrt()[None, :, None]
    f = g.mT @ g / g.shape[1]
    return f + 1e-3 * f.diagonal(dim1=1, dim2=2).mean() * torch.eye(f.shape[-1], dtype=torch.float64)


class Side:
    """Keys or values of one layer: fitted to samples, given rates by `learn`, then called to quantize."""

    rates: Tensor  # [kv_heads, head_dim]

    def __init__(self, samples: Samples, variant: Variant) -> None:
        self.variant, self.angles = variant, samples.angles
        tokens = samples.elements.shape[2]
        x, g = samples.chosen(variant.texts, variant.labels)
        self.mean = x.mean(1, keepdim=True)
        x, g = (self._rotate(part, torch.arange(part.shape[1]) % tokens + 1) for part in (x - self.mean, g))
        f = fisher(g)
        self.axes = None
        if self.angles is None:
            self.axes = uncorrelated_axes(x.double().mT @ x.double() / x.shape[1], f).float()
            x, f = x @ self.axes, self.axes.double().mT @ f @ self.axes.double()
        self.weight = f.diagonal(dim1=1, dim2=2).float().clamp_min(1e-20).sqrt()[:, None]
        pairs = to_pairs(x * self.weight)
        covariance = torch.einsum("hnpi,hnpj->hpij", pairs, pairs) / x.shape[1]
        variances, vectors = torch.linalg.eigh(covariance)
        variances = variances.clamp_min(1e-20) + variant.shrinkage * variances.mean((1, 2), keepdim=True)
        self.spread = vectors @ torch.diag_embed(variances.sqrt())
        self.whiten = torch.diag_embed(variances.rsqrt()) @ vectors.mT
        self.cost = from_pairs(variances)  # of leaving a channel out: [kv_heads, head_dim]
        self.x = x
        tables, errors = gaussian(variant.state_bits, variant.table)
        self.tables = tables.clone()
        gain = variant.gain_values if self.angles is None else variant.gain_keys
        self.gain = (1 + gain * errors / (1 - errors).clamp_min(1e-9)).float()

    def _rotate(self, x: Tensor, positions: Tensor, sign: int = 1) -> Tensor:
        """Keys [kv_heads, n, head_dim] rotated from their position [n] into their frame; values as they are."""
        frame = self.variant.frame
        if self.angles is None or frame == 0:
            return x
        turned = positions.float() if frame == -1 else (positions % frame).float() - (frame - 1) / 2
        angle = sign * turned[:, None] * self.angles
        first, second = x.chunk(2, -1)
        return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)

    def _whitened(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Elements of unit variance, and the norms of tokens [kv_heads, n, 1]."""
        z = from_pairs(torch.einsum("hpij,htpj->htpi", self.whiten, to_pairs(x * self.weight)))
        if self.angles is not None or not self.variant.token_norm:
            return z, torch.ones_like(z[..., :1])
        coded = (self.rates > 0)[:, None]
        norm = ((z * z * coded).sum(-1, keepdim=True) / coded.sum(-1, keepdim=True).clamp_min(1)).sqrt().clamp_min(1e-6)
        norm = ((norm.log2() * NORM_STEPS).round() / NORM_STEPS).exp2()
        return z / norm, norm

    def _paths(self, z: Tensor) -> Iterator[tuple[int, Tensor, Tensor, Tensor, Tensor]]:
        """For each head: channels that have codes, cheapest first, their rates, states [n, channels], what is exact."""
        for head in range(len(z)):
            channels = self.rates[head].nonzero()[:, 0]
            channels = channels[self.cost[head][channels].argsort()]
            if len(channels) == 0:
                continue
            rates, cost, part = self.rates[head][channels], self.cost[head][channels], z[head][:, channels]
            weights = (cost if self.variant.weighted else torch.ones_like(cost)).expand_as(part) / cost.mean()
            states = viterbi(part, weights, rates.tolist(), self.tables)
            exact = torch.zeros_like(part, dtype=torch.bool)
            if self.variant.outliers:
                errors = (part - self.tables[rates, states]).square() * cost
                for page, dearest in zip(exact.split(64), errors.split(64), strict=True):
                    count = round(self.variant.outliers * len(page) * z.shape[-1])
                    page.view(-1)[dearest.flatten().topk(count).indices] = True
                states = viterbi(part, weights.masked_fill(exact, 0), rates.tolist(), self.tables)
            yield head, channels, rates, states, exact

    def learn(self, rates: Tensor) -> None:
        """Take rates, and learn tables for them."""
        self.rates = rates
        for seed in range(self.variant.rounds):
            tokens = torch.randperm(self.x.shape[1], generator=torch.Generator().manual_seed(seed))[:LEARNING_TOKENS]
            z, norm = self._whitened(self.x[:, tokens.sort().values])
            fallen: dict[int, list[Tensor]] = {}
            for head, channels, rate, states, exact in self._paths(z):
                weights = (self.cost[head][channels] / self.cost.mean() * norm[head] ** 2).masked_fill(exact, 0)
                for k in rate.unique().tolist():
                    parts = (states, z[head][:, channels], weights)
                    fallen.setdefault(k, []).append(torch.stack([part[:, rate == k].flatten() for part in parts]))
            for k, rows in fallen.items():
                found, elements, weights = torch.cat(rows, 1)
                self.tables[k] = learned(self.tables[k], found.long(), elements, weights, self.variant.table)
        if self.variant.grid:
            self.tables[1:] = torch.stack([on_grid(table, self.variant.grid, self.variant.table) for table in self.tables[1:]])

    def __call__(self, x: Tensor) -> Tensor:
        """What is left of elements [kv_heads, tokens, head_dim] at positions 1, 2, ..."""
        positions = torch.arange(1, x.shape[1] + 1)
        framed = self._rotate(x - self.mean, positions)
        z, norm = self._whitened(framed @ self.axes if self.axes is not None else framed)
        decoded = torch.zeros_like(z)
        for head, channels, rates, states, exact in self._paths(z):
            elements = self.tables[rates, states] * self.gain[rates]
            decoded[head][:, channels] = torch.where(exact, z[head][:, channels], elements)
        y = from_pairs(torch.einsum("hpij,htpj->htpi", self.spread, to_pairs(decoded * norm))) / self.weight
        return self._rotate(y @ self.axes.mT if self.axes is not None else y, positions, -1) + self.mean


Key = tuple[int, str]  # a layer, and k or v


def allocate(sides: Mapping[Key, Side], budget: float, variant: Variant) -> dict[Key, Tensor]:
    """Rates [kv_heads, head_dim] of least summed cost under `budget` bits an element, the same counts in all heads.

    Channels of a head get their rates by units, in the order of their cost.
    """
    _, errors = gaussian(variant.state_bits, variant.table)
    usable = int((errors < 1).sum()) + 1
    bits = torch.arange(usable, dtype=torch.float64)
    losses, orders, total = {}, {}, 0
    for key, side in sides.items():
        cost, orders[key] = side.cost.double().sort(-1, descending=True)
        unit = cost.sum(0).unflatten(0, (-1, variant.unit)).sum(1) * (variant.value_weight if key[1] == "v" else 1)
        losses[key] = unit[:, None] * errors[:usable]  # [units, rates]
        total += cost.numel()

    def rates(price: float) -> dict[Key, Tensor]:
        return {key: (loss + price * bits * variant.unit * len(orders[key])).argmin(1) for key, loss in losses.items()}

    low, high = 1e-16, 1e6
    for _ in range(100):
        price = (low * high) ** 0.5
        used = sum(bits[rate].sum().item() * variant.unit * len(orders[key]) for key, rate in rates(price).items())
        low, high = (price, high) if used > budget * total else (low, price)
    found = {}
    for key, rate in rates(high).items():
        order = orders[key]
        found[key] = torch.zeros_like(order).scatter_(1, order, rate.repeat_interleave(variant.unit).expand_as(order))
    return found
