"""Training data of the demonstration model: tokenizer, corpora and rows that demand recall.

``Corpora`` holds the tokens of the prose.  ``copying_rows`` gives short rows made of segments that
recur, from which a model learns to copy; ``recall_rows`` gives running prose with facts that are
asked for later, and with passages that come back.  Rows carry a loss weight per token.
"""

from __future__ import annotations

import lzma
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from narrowkv.evaluate import retrieval, texts

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
SEPARATOR = "<|endoftext|>"
HELD_OUT_NOVELS = (17, 71)
"""Places, within the file of novels, of those that are never trained on."""

Rows = tuple[np.ndarray, np.ndarray]
"""Token ids [rows, length] int64 and loss weights [rows, length] float32."""

_OTHER_FACTS = (
    "The secret of {} is",
    "The favorite thing of {} is",
    "{} always carries the",
    "The treasure of {} is the",
    "The name of {}'s house is",
)


@dataclass(frozen=True)
class Corpora:
    """Token ids of the prose, and the words facts are made of in training."""

    novels: np.ndarray
    reference: np.ndarray
    held_out_novels: np.ndarray
    held_out_reference: np.ndarray
    names: list[str]
    words: list[str]

    def prose(self, rng: np.random.Generator, length: int, reference_share: float) -> np.ndarray:
        """Return ``length`` consecutive tokens from a random position of the training prose."""
        source = self.reference if rng.random() < reference_share else self.novels
        begin = rng.integers(0, len(source) - length)
        return source[begin : begin + length].astype(np.int64)


def read_novels(path: Path) -> list[str]:
    """Return the novels of a text file, compressed by xz or plain, separated by SEPARATOR."""
    with lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else path.open(encoding="utf-8") as file:
        return [novel.strip() for novel in file.read().split(SEPARATOR) if novel.strip()]


def train_tokenizer(novels: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, digits apart, on a sample of the training prose."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sample = [novel[:100_000] for novel in novels] + [texts.training_text()] * 4
    tokenizer.train_from_iterator(sample, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )


def load_corpora(novels: list[str], tokenizer: PreTrainedTokenizerFast) -> Corpora:
    """Split the prose into training and held-out parts and make tokens of it."""
    held_out = [novels[position] for position in HELD_OUT_NOVELS]
    kept = [novel for i, novel in enumerate(novels) if i not in HELD_OUT_NOVELS]
    names, words = _fact_words(kept)
    return Corpora(
        novels=_tokens(kept, tokenizer),
        reference=_tokens([texts.training_text()], tokenizer),
        held_out_novels=_tokens(held_out, tokenizer),
        held_out_reference=_tokens([texts.held_out_text()], tokenizer),
        names=names,
        words=words,
    )


def _tokens(documents: list[str], tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """Return the documents' token ids in one array, each document closed by the end token."""
    parts = []
    for begin in range(0, len(documents), 16):
        batch = documents[begin : begin + 16]
        for encoding in tokenizer.backend_tokenizer.encode_batch(batch, add_special_tokens=False):
            parts.append(np.array([*encoding.ids, tokenizer.eos_token_id], dtype=np.uint16))
    return np.concatenate(parts)


def _fact_words(novels: list[str]) -> tuple[list[str], list[str]]:
    """Return names and ordinary words that are common in the novels and not used in evaluation."""
    counts: Counter[str] = Counter()
    for novel in novels[::4]:
        counts.update(re.findall(r"\b[A-Za-z][a-z]{2,9}\b", novel))
    reserved = {*retrieval.NAMES, *retrieval.ADJECTIVES, *retrieval.NOUNS}
    ranked = [word for word, _ in counts.most_common(12_000) if word not in reserved]
    names = [word for word in ranked if word[0].isupper() and counts[word.lower()] * 20 < counts[word]]
    return names[:600], [word for word in ranked if word.islower()][150:3000]


def copying_rows(corpora: Corpora, rng: np.random.Generator, rows: int, length: int, vocabulary: int) -> Rows:
    """Make rows of a few segments in random order, which recur so that most tokens can be copied.

    Segments are random tokens from all or from a handful of the vocabulary (so that one token of
    context is not enough to find the position), or parts of prose.  A token that cannot be known,
    random and seen for the first time, has weight 0.
    """
    ids = np.empty((rows, length), dtype=np.int64)
    weights = np.zeros((rows, length), dtype=np.float32)
    for row in range(rows):
        kind = rng.choice(3, p=[0.35, 0.35, 0.3])
        longest = int(rng.integers(8, 32))
        alphabet = rng.choice(vocabulary, size=int(rng.integers(12, 64)), replace=False)
        segments: list[np.ndarray] = []
        filled = 0
        while filled < length:
            again = bool(segments) and rng.random() < 0.7
            if again:
                part = segments[rng.integers(len(segments))]
            else:
                size = int(rng.integers(4, longest))
                if kind == 0:
                    part = rng.integers(3, vocabulary, size)
                elif kind == 1:
                    part = rng.choice(alphabet, size)
                else:
                    part = corpora.prose(rng, size, 0.1)
                segments.append(part)
            taken = part[: length - filled]
            ids[row, filled : filled + len(taken)] = taken
            if again:
                known = 3 if kind == 1 else 2
                weights[row, filled + known : filled + len(taken)] = 1.0
            elif kind == 2:
                weights[row, filled + 1 : filled + len(taken)] = 1.0
            filled += len(taken)
    return ids, weights


@dataclass(frozen=True)
class RecallMix:
    """What a row of running prose contains besides: how many facts and repeats, and their weight."""

    facts: int
    repeats: int
    far_share: float = 0.25
    answer_weight: float = 4.0
    repeat_weight: float = 1.5
    reference_share: float = 0.1


class RecallRows:
    """Maker of rows of running prose in which facts are asked for and passages come back."""

    def __init__(self, corpora: Corpora, tokenizer: PreTrainedTokenizerFast) -> None:
        self._corpora = corpora
        self._bos = tokenizer.bos_token_id
        self._tokenizer = tokenizer
        self._cache: dict[str, list[int]] = {}

    def rows(self, rng: np.random.Generator, rows: int, length: int, mix: RecallMix) -> Rows:
        """Return ``rows`` rows of ``length`` tokens."""
        made = [self._row(rng, length, mix) for _ in range(rows)]
        return np.stack([ids for ids, _ in made]), np.stack([weights for _, weights in made])

    def _row(self, rng: np.random.Generator, length: int, mix: RecallMix) -> Rows:
        """Return one row's ids and weights, each [length]."""
        prose = self._corpora.prose(rng, length, mix.reference_share)
        ids = np.empty(length, dtype=np.int64)
        weights = np.ones(length, dtype=np.float32)
        ids[0], filled, used = self._bos, 1, 0
        for position, event in sorted(self._events(rng, length, mix), key=lambda pair: pair[0]):
            plain = min(max(int(position) - filled, 0), length - filled)
            ids[filled : filled + plain] = prose[used : used + plain]
            filled, used = filled + plain, used + plain
            if isinstance(event, tuple):
                tokens, weight = event
            elif filled > 24:
                tokens, weight = self._repeat(rng, ids[:filled], event, mix)
            else:
                continue
            taken = min(len(tokens), length - filled)
            ids[filled : filled + taken] = tokens[:taken]
            weights[filled : filled + taken] = weight[:taken]
            filled += taken
        ids[filled:] = prose[used : used + length - filled]
        return ids, weights

    def _events(self, rng: np.random.Generator, length: int, mix: RecallMix) -> Iterator[tuple[float, Rows | float]]:
        """Yield positions with what comes there: a fact or question, or how far back to repeat from."""
        facts = int(rng.integers(mix.facts // 2, mix.facts + 1)) if mix.facts else 0
        names = rng.choice(self._corpora.names, size=facts, replace=False)
        other = rng.choice(_OTHER_FACTS) if rng.random() < 0.3 else None
        for name in names:
            words = rng.choice(self._corpora.words, size=int(rng.integers(2, 4)), replace=False)
            prefix, answer, end = retrieval.fact_parts(name, " ".join(words))
            prefix = other.format(name) if other else prefix
            stated, asked = self._positions(rng, length, mix)
            yield stated, self._fact(prefix, answer, end, 0.3)
            yield asked, self._fact(prefix, answer, end, mix.answer_weight)
        for _ in range(mix.repeats):
            source, position = self._positions(rng, length, mix)
            yield position, position - source

    @staticmethod
    def _positions(rng: np.random.Generator, length: int, mix: RecallMix) -> tuple[float, float]:
        """Draw two positions within a row, in order: anywhere, or one near each end."""
        if rng.random() < mix.far_share:
            return rng.uniform(0, 0.06 * length), rng.uniform(0.9 * length, length - 24)
        first, second = sorted(rng.uniform(0, length - 16, size=2))
        return first, second

    def _fact(self, prefix: str, answer: str, end: str, answer_weight: float) -> Rows:
        """Return the tokens and weights of a fact in a paragraph of its own."""
        parts = [("\n\n", 0.1), (prefix, 0.2), (answer, answer_weight), (end, 1.0), ("\n\n", 0.2)]
        ids: list[int] = []
        weights: list[float] = []
        for text, weight in parts:
            if text not in self._cache:
                self._cache[text] = self._tokenizer.encode(text, add_special_tokens=False)
            ids += self._cache[text]
            weights += [weight] * len(self._cache[text])
        return np.array(ids), np.array(weights, dtype=np.float32)

    @staticmethod
    def _repeat(rng: np.random.Generator, before: np.ndarray, back: float, mix: RecallMix) -> Rows:
        """Return a passage that began ``back`` tokens before, to be continued after its cue."""
        size = min(int(rng.integers(16, 64)), len(before))
        begin = min(max(len(before) - int(back), 1), len(before) - size)
        tokens = before[begin : begin + size].copy()
        weights = np.full(size, mix.repeat_weight, dtype=np.float32)
        weights[:4] = 0.0
        return tokens, weights
