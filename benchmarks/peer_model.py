"""A model that attends to keys and values as a method leaves them, and what that loses: parts of `benchmarks.peers`."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from benchmarks.peer_methods.base import HALF, Pair, Statistics
from benchmarks.real_models import LEARNED_CODE, SAMPLES, SCORED_CODE, SPREAD, TEXTS, WINDOW, code
from narrowkv import load_model
from narrowkv.evaluate.perplexity import divergences
from narrowkv.evaluate.sources import read_text
from narrowkv.evaluate.windows import cut_windows

NAME = "benchmarks-peers"
CONTEXT = 32768  # tokens at which bits are counted
QUERIES = 256  # rows of attention at a time where it reads exact and quantized tokens

# of a layer's index, queries [heads, tokens, head_dim], keys, values [kv_heads, tokens, head_dim], an additive mask
# [1, 1, tokens, tokens] and the scale of logits: outputs [heads, tokens, head_dim]
Attend = Callable[[int, Tensor, Tensor, Tensor, Tensor, float], Tensor]


@dataclass(frozen=True)
class Terms:
    """Which tokens stay exact, as a token that is decoded sees them.

    sinks: the first ones. recent: the last ones, its own among them. tile: those after the last full tile of this many tokens,
    in place of `recent`. boundary: all tokens of this many layers at either end.
    """

    sinks: int = 1
    recent: int = 0
    tile: int = 0
    boundary: int = 0

    @property
    def tail(self) -> float:
        """Exact tokens at the end, on average."""
        return (self.tile - 1) / 2 if self.tile else self.recent

    def quantized(self, tokens: int) -> Tensor:
        """[queries, keys] bool: what each of this many tokens reads quantized."""
        positions = torch.arange(tokens)
        seen = positions[:, None] + 1 - self.sinks
        end = seen.div(self.tile, rounding_mode="floor") * self.tile if self.tile else seen - self.recent
        return (positions >= self.sinks) & (positions - self.sinks < end)


@dataclass(frozen=True)
class Shape:
    """What a cache consists of. stored: tokens of each layer at `CONTEXT` tokens; whole: layers that see all tokens."""

    kv_heads: int
    head_dim: int
    stored: tuple[int, ...]
    whole: tuple[bool, ...]


def true_bits(pairs: Sequence[Pair], terms: Terms, shape: Shape) -> dict[str, float]:
    """Bits for each element of a cache of `CONTEXT` tokens: all, and of that what tables and exact tokens take.

    A layer with a sliding window has no sinks by then.
    """
    size, count = (shape.kv_heads, shape.head_dim), len(pairs)
    codes, exact, tables = 0.0, 0.0, 0.0
    for layer, (pair, stored, whole) in enumerate(zip(pairs, shape.stored, shape.whole, strict=True)):
        rope_state = min(stored, terms.tail + (terms.sinks if whole else 0))
        if min(layer, count - 1 - layer) < terms.boundary:
            rope_state = stored
        else:
            tables += sum(side.tables(*size) for side in pair)
        exact += 2 * rope_state * HALF
        codes += sum((stored - rope_state) * side.bits(*size) for side in pair)
    elements = 2 * sum(shape.stored)  # for each channel of each head
    tables /= shape.kv_heads * shape.head_dim
    parts = {"bits": codes + exact + tables, "bits_exact": exact, "bits_tables": tables}
    return {name: part / elements for name, part in parts.items()}


def attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """Outputs [heads, tokens, head_dim] of shapes like those of `Attend`."""
    repeats = len(queries) // len(keys)
    keys, values = (x.repeat_interleave(repeats, 0) for x in (keys, values))
    return nn.functional.scaled_dot_product_attention(queries, keys, values, mask[0], scale=scaling)


def mixed_attention(
    queries: Tensor, exact: tuple[Tensor, Tensor], left: tuple[Tensor, Tensor], quantized: Tensor, mask: Tensor, scaling: float
) -> Tensor:
    """Attention to keys and values that are `left` where `quantized` [queries, keys], else exact; shapes like those of
    `Attend`.
    """
    repeats = len(queries) // len(exact[0])
    keys, values, left_keys, left_values = (x.repeat_interleave(repeats, 0) for x in (*exact, *left))
    outputs = []
    rows = (queries.split(QUERIES, 1), quantized.split(QUERIES), mask[0, 0].split(QUERIES))
    for q, coded, masked in zip(*rows, strict=True):
        logits = torch.where(coded, q @ left_keys.mT, q @ keys.mT) * scaling + masked
        weights = logits.softmax(-1)
        outputs.append((weights * coded) @ left_values + (weights * ~coded) @ values)
    return torch.cat(outputs, 1)


def leave(pair: Pair, exact: tuple[Tensor, Tensor], terms: Terms) -> tuple[Tensor, Tensor]:
    """Keys and values [kv_heads, tokens, head_dim] with all but sinks, and what is beyond the last full tile, quantized."""
    tokens = exact[0].shape[1]
    end = tokens - (tokens - terms.sinks) % terms.tile if terms.tile else tokens
    start = min(terms.sinks, end)
    if start == end:
        return exact
    left = [torch.cat([x[:, :start], side(x[:, start:end]), x[:, end:]], 1) for side, x in zip(pair, exact, strict=True)]
    return left[0], left[1]


def attend_by(pairs: Sequence[Pair], terms: Terms, tokens: int) -> Attend:
    """Attention of a model whose layers' keys and values are quantized, for texts of this many tokens."""
    quantized = terms.quantized(tokens) if terms.tail else None

    def attend(layer: int, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scaling: float) -> Tensor:
        if min(layer, len(pairs) - 1 - layer) < terms.boundary:
            return attention(queries, keys, values, mask, scaling)
        left = leave(pairs[layer], (keys, values), terms)
        if quantized is None:
            return attention(queries, *left, mask, scaling)
        return mixed_attention(queries, (keys, values), left, quantized, mask, scaling)

    return attend


@contextmanager
def attending(model: PreTrainedModel, attend: Attend) -> Iterator[None]:
    """Let a model attend by a function, for one sequence at a time."""

    def forward(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        return attend(module.layer_idx, query[0], key[0], value[0], mask, scaling).transpose(0, 1)[None], None

    AttentionInterface.register(NAME, forward)
    AttentionMaskInterface.register(NAME, eager_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def collect(model: Any, windows: Tensor) -> list[Statistics]:
    """What calibration sees of each layer on windows [n, tokens]."""
    seen: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}

    def capture(layer: int, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scaling: float) -> Tensor:
        grouped = queries[:, 1:].double().unflatten(0, (len(keys), -1)).flatten(1, 2)
        moment = grouped.mT @ grouped / grouped.shape[1]
        seen.setdefault(layer, []).append((moment, keys[:, 1:].clone(), values[:, 1:].clone()))
        return attention(queries, keys, values, mask, scaling)

    with torch.inference_mode(), attending(model, capture):
        for ids in windows:
            model(ids[None], use_cache=False, logits_to_keep=1)
    return [_joined(seen[layer], block.self_attn.o_proj.weight) for layer, block in enumerate(model.model.layers)]


def _joined(parts: list[tuple[Tensor, Tensor, Tensor]], projection: Tensor) -> Statistics:
    """What windows gave of one layer, and its output projection [hidden, heads * head_dim]."""
    moments, keys, values = zip(*parts, strict=True)
    kv_heads, _, head_dim = keys[0].shape
    columns = projection.detach().double().unflatten(1, (kv_heads, -1, head_dim))
    output = torch.einsum("okgd,okge->kde", columns, columns) / (columns.shape[0] * columns.shape[2])
    return Statistics(torch.stack(moments).mean(0), torch.cat(keys, 1), torch.cat(values, 1), output)


class Subject:
    """A model, what was learned of it, and what is scored: `windows` of 512 tokens of each text, and one of `long`.

    Of the long one, the second half is scored: before it, most of what is read is exact under the terms of most methods.
    """

    def __init__(self, name: str, windows: int, long: int) -> None:
        self.model, self.tokenizer = load_model(name, "float32")
        self.model.requires_grad_(False)
        self.sizes = {"ours": (WINDOW, windows, WINDOW), "published": (long, 1, long // 2)}
        prose = read_text(str(TEXTS / "wikitext2-valid.tokens.txt"))
        self.statistics = collect(self.model, cut_windows(self.tokenizer, [prose, code(LEARNED_CODE)], WINDOW, SAMPLES))
        self.texts = {"encyclopedia": read_text(str(TEXTS / "wikitext2-test.raw.txt")), "code": code(SCORED_CODE)}

    @functools.cached_property
    def shape(self) -> Shape:
        """Of the cache."""
        config: Any = self.model.config
        kv_heads, _, head_dim = self.statistics[0].keys.shape
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        whole = tuple(kind == "full_attention" for kind in kinds)
        stored = tuple(CONTEXT if all_tokens else min(CONTEXT, config.sliding_window) for all_tokens in whole)
        return Shape(kv_heads, head_dim, stored, whole)

    @functools.cache  # noqa: B019 - as long-lived as the process
    def exact(self, terms: str) -> dict[str, list[tuple[Tensor, Tensor]]]:
        """Windows of each kind of text and their exact logits [scored, vocabulary] float16."""
        size, count, _ = self.sizes[terms]
        cut = {kind: cut_windows(self.tokenizer, text, size, count, spread=SPREAD) for kind, text in self.texts.items()}
        with torch.inference_mode():
            return {kind: [(ids, self._logits(ids, terms).half()) for ids in rows] for kind, rows in cut.items()}

    def _logits(self, ids: Tensor, terms: str) -> Tensor:
        return self.model(ids[None], use_cache=False, logits_to_keep=self.sizes[terms][2]).logits[0, :-1]

    def divergence(self, pairs: Sequence[Pair], terms: Terms, name: str) -> dict[str, float]:
        """Mean over tokens of KL(exact || quantized) on each kind of text, cut as for terms of this name."""
        exact = self.exact(name)
        with torch.inference_mode(), attending(self.model, attend_by(pairs, terms, self.sizes[name][0])):
            return {
                kind: torch.cat([divergences(logits, self._logits(ids, name)) for ids, logits in rows]).double().mean().item()
                for kind, rows in exact.items()
            }
