"""Samples: some tokens of a stream of keys or values, and how the loss depends on all of them."""

import torch
from torch import Tensor

from narrowkv.calibration.distributed import Group, collected, reduced
from narrowkv.codec import AnyQuantizer
from narrowkv.codec.ranges import require_finite, to_16_bits

CAPACITY = 10240  # tokens stored
LEARNING = 0.8  # of which this many are learned from; the rest measure the loss of a quantizer


class Samples:
    """A uniform sample of tokens and the second moment of the loss's gradient; memory does not grow with the stream.

    Those tokens are stored whose elements, sequence and position in it hash to the smallest values, so the sample depends on
    the sequences alone, not on their order or on who saw them. (Elements alone would not do: in the first layer they follow
    from the word, and some words would never be sampled.)

    elements: [n, kv_heads, head_dim] float16. moment: [kv_heads, head_dim, head_dim] float64, the sum of gradient x gradient
    over `gradients` of them: the Fisher information of a head (KVQuant, section 3.3, off its diagonal too).
    """

    def __init__(self) -> None:
        self.tokens = self.gradients = 0
        self.elements: Tensor | None = None
        self.hashes = torch.empty(0, dtype=torch.int64, device="cpu")
        self.moment = torch.empty(0, dtype=torch.float64, device="cpu")

    def add(self, x: Tensor, gradient: Tensor | None) -> None:
        """x: [tokens, kv_heads, head_dim] of one sequence; gradient of the loss: the same shape, or None for weights of 1.

        Raises ActivationError on NaN, infinity and elements beyond the range of float16.
        """
        require_finite("Keys or values", x)
        if self.elements is None:
            self.elements = x.new_empty(0, *x.shape[1:], dtype=torch.float16)
            self.hashes = self.hashes.to(x.device)
            self.moment = torch.zeros(x.shape[1], x.shape[2], x.shape[2], dtype=torch.float64, device=x.device)
        rounded = to_16_bits(x, torch.float16, "Keys or values")
        if gradient is not None:
            self.add_gradient(gradient)
        self._keep(torch.cat([self.elements, rounded]), torch.cat([self.hashes, _hashes(rounded)]))
        self.tokens += len(x)

    def add_gradient(self, gradient: Tensor) -> None:
        """A gradient [tokens, kv_heads, head_dim] at tokens that are added, or another one at those that were."""
        require_finite("Gradients", gradient)
        by_head = gradient.float().transpose(0, 1)  # [kv_heads, tokens, head_dim]
        self.moment += (by_head.transpose(1, 2) @ by_head).double()
        self.gradients += len(gradient)

    def merge(self, group: Group) -> None:
        """Take in what the other processes of a group have seen; all of them then have the same."""
        assert self.elements is not None
        parts = (torch.cat(collected(part.contiguous(), group)) for part in (self.elements, self.hashes))
        self._keep(*parts)
        self.moment = reduced(self.moment, "SUM", group)
        counts = torch.tensor([self.tokens, self.gradients], dtype=torch.int64, device="cpu")
        self.tokens, self.gradients = reduced(counts, "SUM", group).tolist()

    def _keep(self, elements: Tensor, hashes: Tensor) -> None:
        self.hashes, order = hashes.sort(stable=True)
        self.hashes, self.elements = self.hashes[:CAPACITY].clone(), elements[order[:CAPACITY]]

    def fisher(self) -> Tensor:
        """What an error e in a token's head costs, as a matrix: e @ fisher @ e / 2, in nats of loss for each token of text.

        [kv_heads, head_dim, head_dim] float64; the unit matrix where no gradient was seen. A small part
        of the mean is added to the diagonal: a channel without gradient so far is not one without effect.
        """
        unit = torch.eye(self.moment.shape[-1], dtype=torch.float64, device=self.moment.device).expand_as(self.moment)
        mean = self.moment.diagonal(dim1=1, dim2=2).mean() / max(self.gradients, 1)
        if not mean > 0:
            return unit
        return self.moment / self.gradients + 1e-3 * mean * unit

    def heads(self, unseen: bool = False) -> Tensor:
        """The tokens to learn from, or those to check on, as [1, kv_heads, n, head_dim] float32."""
        assert self.elements is not None
        learned = max(int(LEARNING * len(self.elements)), 1)
        part = self.elements[learned:] if unseen and learned < len(self.elements) else self.elements[:learned]
        return part.float().transpose(0, 1)[None].contiguous()

    def cost(self, quantizer: AnyQuantizer) -> float:
        """The loss that a quantizer is predicted to cost, in nats for each token of text, to the second order.

        Predicted on tokens that its tables were not learned from, so that a large codebook is not chosen for having seen them.
        Where tokens are quantized in groups, those of a group lie anywhere in the text.
        """
        elements = in_whole_groups(self.heads(unseen=True), quantizer.scheme.tokens_per_group)
        missed = (elements - quantizer.dequantize(quantizer.encode(elements)).float())[0].double()  # [kv_heads, n, head_dim]
        return float(((missed @ self.fisher()) * missed).sum() / 2 / missed.shape[1])


def in_whole_groups(elements: Tensor, tokens: int) -> Tensor:
    """The first elements [1, kv_heads, n, head_dim] that fill groups of `tokens`; repeated where they fill none."""
    n = elements.shape[2]
    return elements[:, :, : n - n % tokens] if n >= tokens else elements.repeat(1, 1, -(-tokens // n), 1)[:, :, :tokens]


class SampleFit:
    """Takes a sample of one tensor of one layer, in the second of the passes that `Fit` has."""

    needs_codebook = True

    def __init__(self) -> None:
        self.samples = Samples()

    def observe_range(self, x: Tensor) -> None:
        """First pass. x: [tokens, kv_heads, head_dim]. Raises ActivationError on NaN and infinity."""
        require_finite("Keys or values", x)

    def observe_codebook(self, x: Tensor, gradient: Tensor | None) -> None:
        """Second pass. x, gradient: [tokens, kv_heads, head_dim], like those of `Fit.observe_codebook`."""
        self.samples.add(x, gradient)

    def merge_ranges(self, group: Group) -> None:
        """Nothing was learned in the first pass."""

    def merge_codebook(self, group: Group) -> None:
        """After the second pass: take in what the other processes of a group have seen."""
        self.samples.merge(group)


def _hashes(elements: Tensor) -> Tensor:
    """A hash of each token of a sequence: [tokens] int64, of elements [tokens, ...] float16."""
    bits = elements.flatten(1).contiguous().view(torch.int16).long()
    position = torch.arange(len(bits), device=bits.device, dtype=torch.int64)
    tokens = _mixed(bits * (torch.arange(bits.shape[1], device=bits.device, dtype=torch.int64) * 2 + 1)).sum(1)
    return _mixed(_mixed(tokens) + _mixed(_mixed(tokens).sum() + position))


def _mixed(x: Tensor) -> Tensor:
    """Well scattered elements for different ones: int64 of any shape."""
    x = x * 0x2545F4914F6CDD1D
    x = (x ^ (x >> 29)) * 0x5851F42D4C957F2D
    return x ^ (x >> 32)
