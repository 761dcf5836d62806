"""Loss of a recipe: perplexity, divergence and recall compared with the 16-bit model, and allocated bytes.

There are two modes. strict: every element attended to has gone through the quantizer, inside the prompt too. stream: the text
is read in chunks, and each chunk attends exactly to itself and to the packed past, as in normal use.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from narrowkv.attention import AUTO
from narrowkv.calibration import Calibration
from narrowkv.calibration.wrappers import require_head, unwrapped
from narrowkv.codec import Quantization, Scheme, Transform
from narrowkv.codec.surroundings import runs_undisturbed
from narrowkv.defaults import STREAM_CHUNK
from narrowkv.errors import ActivationError
from narrowkv.evaluate.retrieval import RecallBatch, accuracy
from narrowkv.integrations import PackedCache
from narrowkv.integrations.calibrator import counted
from narrowkv.integrations.versions import CACHE
from narrowkv.methods import Recipe

Source = Calibration | Recipe
RECALL_ROWS, RECALL_TOKENS = 8, 2**15  # recall rows at a time, fewer where they are long
LOGIT_ROWS = 4  # tokens compared at a time: what is computed of a wide vocabulary stays in the processor's cache


@dataclass(frozen=True)
class Quality:
    """Metrics of one recipe.

    bits_per_element, nbytes: allocated by a cache of one window; nbytes_fp16: the bytes of 16 bits per element.
    perplexity_strict, perplexity_stream, perplexity_fp: in both modes and without quantization. kld_strict, kld_strict_p99:
    mean over tokens of KL(16-bit || quantized), in nats, and its 99th percentile. top1: share of tokens whose most likely next
    token is the same as without quantization, strict. recall, recall_fp: share of recall rows answered without error, strict;
    None without recall rows. tokens: number of scored tokens. window: tokens per sequence. stream_chunk: tokens per chunk of
    the stream mode; None if it was not measured, and perplexity_stream is NaN.
    """

    recipe: str
    bits_per_element: float
    nbytes: int
    nbytes_fp16: int
    perplexity_strict: float
    perplexity_stream: float
    perplexity_fp: float
    kld_strict: float
    kld_strict_p99: float
    top1: float
    recall: float | None
    recall_fp: float | None
    tokens: int
    window: int
    stream_chunk: int | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


@dataclass
class _Sums:
    """Running sums of one recipe."""

    strict: float = 0.0
    stream: float = 0.0
    divergences: list[Tensor] = field(default_factory=list)
    agreed: int = 0
    right: list[float] = field(default_factory=list)
    nbytes: int = 0
    elements: int = 0


@torch.inference_mode()
def measure(
    model: PreTrainedModel,
    sources: Sequence[Source],
    windows: Tensor,
    recall: Sequence[RecallBatch] = (),
    *,
    stream_chunk: int | None = STREAM_CHUNK,
    backend: str = AUTO,
    on_step: Callable[[int, int], None] | None = None,
) -> list[Quality]:
    """Measure several recipes on the same tokens.

    windows: [n, tokens] int64. recall: batches of rows. stream_chunk: None leaves streaming out. backend: of the caches.
    on_step: called with (steps done, steps in all). Returns one Quality per source. Raises ActivationError where the model
    itself computes NaN or infinity, UnsupportedModelError where it predicts no tokens.
    """
    require_head(unwrapped(model))
    sums = [_Sums() for _ in sources]
    loss_fp, recall_fp = 0.0, []
    step = counted(on_step, (len(windows) + len(recall)) * (len(sources) + 1))

    for row in windows.to(model.device):
        ids = row[None]
        baseline = model(ids, use_cache=False).logits[0, :-1]
        if not torch.isfinite(baseline).all():
            raise ActivationError("The model computes NaN or infinity on this text; check its weights and dtype.")
        loss_fp += _loss(baseline, row)
        step()
        for source, total in zip(sources, sums, strict=True):
            cache = PackedCache(model, source, strict=True, backend=backend)
            logits = model(ids, **{CACHE: cache}, use_cache=True).logits[0, :-1]
            total.strict += _loss(logits, row)
            total.divergences.append(divergences(baseline, logits))
            total.agreed += int((baseline.argmax(-1) == logits.argmax(-1)).sum())
            total.nbytes, total.elements = cache.nbytes, cache.elements
            if stream_chunk is not None:
                streamed = _streamed(model, PackedCache(model, source, backend=backend), ids, stream_chunk)
                total.stream += _loss(streamed[0, :-1], row)
            step()
    for batch in recall:
        recall_fp.append(recalled(model, None, batch, backend))
        step()
        for source, total in zip(sources, sums, strict=True):
            total.right.append(recalled(model, source, batch, backend))
            step()
    scored = windows.shape[0] * (windows.shape[1] - 1)
    return [
        Quality(
            recipe=(source.recipe if isinstance(source, Calibration) else source).name,
            bits_per_element=8 * total.nbytes / total.elements,
            nbytes=total.nbytes,
            nbytes_fp16=2 * total.elements,
            perplexity_strict=math.exp(total.strict / scored),
            perplexity_stream=math.nan if stream_chunk is None else math.exp(total.stream / scored),
            perplexity_fp=math.exp(loss_fp / scored),
            kld_strict=torch.cat(total.divergences).double().mean().item(),
            kld_strict_p99=torch.cat(total.divergences).quantile(0.99).item(),
            top1=total.agreed / scored,
            recall=sum(total.right) / len(total.right) if total.right else None,
            recall_fp=sum(recall_fp) / len(recall_fp) if recall_fp else None,
            tokens=scored,
            window=windows.shape[1],
            stream_chunk=stream_chunk,
        )
        for source, total in zip(sources, sums, strict=True)
    ]


def _streamed(model: PreTrainedModel, cache: PackedCache, ids: Tensor, chunk: int) -> Tensor:
    return torch.cat([model(part, **{CACHE: cache}, use_cache=True).logits for part in ids.split(chunk, dim=1)], dim=1)


def recalled(model: PreTrainedModel, source: Source | None, batch: RecallBatch, backend: str = AUTO) -> float:
    """The share of rows in which each token of the answer is the most likely, strict; source: None for the model's own
    cache.
    """
    first = int(batch.answer_mask.any(0).int().argmax())
    keep = batch.input_ids.shape[1] - first + 1
    logits = []
    rows = min(RECALL_ROWS, max(RECALL_TOKENS // batch.input_ids.shape[1], 1))
    for ids in batch.input_ids.to(model.device).split(rows):
        cache = None if source is None else PackedCache(model, source, strict=True, backend=backend)
        logits.append(model(ids, **{CACHE: cache}, use_cache=cache is not None, logits_to_keep=keep).logits)
    return accuracy(torch.cat(logits), batch)


def _loss(logits: Tensor, row: Tensor) -> float:
    """Summed negative log-likelihood of row[1:] under logits [tokens - 1, vocabulary]."""
    return sum(
        torch.nn.functional.cross_entropy(part.float(), target, reduction="sum").item()
        for part, target in zip(logits.split(LOGIT_ROWS), row[1:].split(LOGIT_ROWS), strict=True)
    )


def divergences(baseline: Tensor, logits: Tensor) -> Tensor:
    """KL(baseline || logits) of each token in nats, [tokens] on the CPU; baseline, logits: [tokens, vocabulary]."""
    found = []
    for ours, theirs in zip(baseline.split(LOGIT_ROWS), logits.split(LOGIT_ROWS), strict=True):
        expected = ours.float().log_softmax(-1)
        found.append((expected.exp() * (expected - theirs.float().log_softmax(-1))).sum(-1).cpu())
    return torch.cat(found)


def bits_at(model: PreTrainedModel, source: Source, ids: Tensor, tokens: int) -> float:
    """Allocated bits per element of a cache of `tokens` tokens of one sequence, everything counted; see `filled`."""
    return filled(model, source, ids, tokens).bits_per_element


def at_length(row: Quality, model: PreTrainedModel, source: Source, ids: Tensor, tokens: int) -> Quality:
    """The same metrics with the bits and bytes of a cache of `tokens` tokens; see `filled`."""
    return with_bytes_of(row, filled(model, source, ids, tokens))


def with_bytes_of(row: Quality, cache: PackedCache) -> Quality:
    """The same metrics with the bits and bytes of a cache."""
    return replace(row, bits_per_element=cache.bits_per_element, nbytes=cache.nbytes, nbytes_fp16=2 * cache.elements)


@runs_undisturbed
def filled(model: PreTrainedModel, source: Source, ids: Tensor, tokens: int, backend: str = AUTO) -> PackedCache:
    """A cache of `tokens` tokens of one sequence, whose bytes are those of any text of that length.

    ids: [1, n] int64; what the model stores for them is stored again and again, without running the model that long. Layers
    with a sliding window let go of what has left it.
    backend: of the cache.
    """
    ids = ids[:, :tokens].to(model.device)
    cache = PackedCache(model, source, backend=backend)
    exact_keys = Scheme(Quantization(16, "exact"), Transform(pre_rope=cache.recipe.keys.transform.pre_rope))
    seen = PackedCache(model, Recipe("seen", keys=exact_keys, values=Scheme(Quantization(16, "exact"))), backend=backend)
    model(ids, **{CACHE: cache}, use_cache=True)
    model(ids, **{CACHE: seen}, use_cache=True)
    for position_buffer in cache.position_buffers.values():  # first: a bias is taken out of keys by their positions
        entries = position_buffer.read(0, ids.shape[1])
        while position_buffer.length < tokens:
            more = entries[:, : tokens - position_buffer.length]
            position_buffer.append(more if more.is_floating_point() else more + position_buffer.length)  # positions go on
    for layer, exact in zip(cache.packed, seen.packed, strict=True):
        keys, values = exact.store.read()
        while layer.store.length < tokens:
            layer.evict()
            missing = tokens - layer.store.length
            layer.store.append(keys[:, :, :missing], values[:, :, :missing])
        layer.evict()
    return cache
