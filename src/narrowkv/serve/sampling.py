"""How the next token is chosen from its logits."""

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

FEW = 4096  # of the most likely tokens, among which those of top_p nearly always are


@dataclass(frozen=True)
class Sampling:
    """temperature: 0 is greedy. top_p, top_k: sampled from the most likely tokens of this probability, or of this number (0:
    all). top: how many of the most likely are named with each token; None: no logprobs.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    top: int | None = None


@dataclass(frozen=True)
class Chosen:
    """A token, the logarithm of its probability, and the most likely tokens with theirs."""

    token: int
    logprob: float | None = None
    top: list[tuple[int, float]] = field(default_factory=list)


class Sampler:
    """Chooses the tokens of one answer. choice: which of several to one prompt, so that each has draws of its own."""

    def __init__(self, sampling: Sampling, choice: int = 0):
        self.sampling = sampling
        self.counts: Counter[int] = Counter()
        self.generator: torch.Generator | None = None
        if sampling.temperature > 0:
            self.generator = torch.Generator("cpu")
            seed = torch.seed() if sampling.seed is None else sampling.seed
            self.generator.manual_seed((seed + choice) % 2**63)

    def choose(self, logits: Tensor) -> Chosen:
        """The next token. logits: [vocabulary] of any dtype."""
        scores = self._penalized(logits.float().cpu())
        token = self._draw(scores) if self.generator is not None else int(scores.argmax())
        self.counts[token] += 1
        if self.sampling.top is None:
            return Chosen(token)
        logprobs = scores.log_softmax(-1)
        values, ids = logprobs.topk(self.sampling.top)
        return Chosen(token, float(logprobs[token]), list(zip(ids.tolist(), values.tolist(), strict=True)))

    def _penalized(self, scores: Tensor) -> Tensor:
        presence, frequency = self.sampling.presence_penalty, self.sampling.frequency_penalty
        if not self.counts or not (presence or frequency):
            return scores
        scores = scores.clone()
        ids = torch.tensor(list(self.counts), dtype=torch.int64, device="cpu")
        counts = torch.tensor(list(self.counts.values()), dtype=torch.float32, device="cpu")
        scores[ids] -= presence + frequency * counts
        return scores

    def _draw(self, scores: Tensor) -> int:
        sampling = self.sampling
        probabilities = (scores / sampling.temperature).softmax(-1)
        if sampling.top_k == 0 and sampling.top_p == 1:
            return int(probabilities.multinomial(1, generator=self.generator))
        values, ids = probabilities.topk(min(sampling.top_k or FEW, len(scores)))
        if sampling.top_k:
            values = values / values.sum()
        elif values.sum() < sampling.top_p:
            values, ids = probabilities.sort(descending=True)
        values[1:][values.cumsum(-1)[:-1] >= sampling.top_p] = 0  # the first one is always among them
        return int(ids[values.multinomial(1, generator=self.generator)])
