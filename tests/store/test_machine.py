"""Any sequence of append, crop, select, copy and read, against plain tensors: an element is quantized once in its life."""

import copy

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from narrowkv.codec import Outliers, Quantization, Scheme, Transform, quantizer_for
from narrowkv.store import LayerStore

HEADS, DIM = 2, 56
SCHEMES = st.sampled_from(
    [
        Scheme(Quantization(16, "exact")),
        Scheme(Quantization(4, "int")),
        Scheme(Quantization(3, "nf", strategy="token_head")),
        Scheme(Quantization(2, "int"), outliers=Outliers(0.02)),
        Scheme(Quantization(4, "fp", strategy="token_head", group_size=8, scale_dtype="float8")),
        Scheme(Quantization(8, "int", strategy="token_head"), Transform(smooth_alpha=0.5)),
    ]
)


GROUPED = st.sampled_from(
    [
        Scheme(Quantization(2, "int", strategy="channel", group_size=32), outliers=Outliers(0.02)),
        Scheme(Quantization(2, "iv", strategy="block", group_size=64, round_down=True)),
        Scheme(Quantization(2, "iv-kmeans", strategy="block", group_size=32)),
        Scheme(Quantization(2, "iv-kmeans", strategy="block", group_size=16, lookahead_blocks=3)),
    ]
)


def made(scheme):
    """A quantizer of a scheme, with tables drawn at random where it needs any."""
    return quantizer_for(scheme, **({"smooth": torch.rand(HEADS, DIM) + 0.1} if scheme.transform.smooth_alpha else {}))


class StoreMachine(RuleBasedStateMachine):
    """The model: dequantized keys and values as they were first stored, [batch, heads, tokens, dim]."""

    @initialize(keys=SCHEMES, values=SCHEMES, batch=st.integers(1, 3), seed=st.integers(0, 2**31))
    def begin(self, keys, values, batch, seed):
        self.generator = torch.Generator().manual_seed(seed)
        self.store = LayerStore(made(keys), made(values))
        self.model = [torch.zeros(batch, HEADS, 0, DIM) for _ in range(2)]

    @rule(new=st.one_of(st.integers(1, 5), st.integers(60, 150)))
    def append(self, new):
        fresh = [torch.randn(len(self.model[0]), HEADS, new, DIM, generator=self.generator) for _ in range(2)]
        self.store.append(*fresh)
        for side, quantizer in enumerate(self.store.quantizers):
            dequantized = quantizer.dequantize(quantizer.encode(fresh[side])).float()
            self.model[side] = torch.cat([self.model[side], dequantized], dim=2)

    @rule(drop=st.integers(0, 200))
    def crop(self, drop):
        length = max(self.model[0].shape[2] - drop, 0)
        if length == 0 or length <= self.store.first:
            return
        self.store.crop(length)
        self.model = [side[:, :, :length] for side in self.model]

    @rule(share=st.floats(0, 1))
    def evict(self, share):
        before = int(share * self.store.length)
        first = self.store.first
        self.store.evict(before)
        assert self.store.first <= max(before, first)

    @rule(data=st.data())
    def select(self, data):
        rows = len(self.model[0])
        chosen = torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=4)))
        if self.store.shape is None:
            return
        self.store.select(chosen)
        self.model = [side[chosen] for side in self.model]

    @rule()
    def continue_with_a_copy(self):
        original, expected = self.store, [side.clone() for side in self.model]
        self.store = copy.deepcopy(original)
        self.append(70)
        if expected[0].shape[2] > original.first:
            self.same(original, expected)

    @invariant()
    def same_numbers(self):
        if not hasattr(self, "store"):
            return
        assert self.store.length == self.model[0].shape[2]
        if self.store.length > self.store.first:
            self.same(self.store, self.model)

    @staticmethod
    def same(store, model):
        for found, side in zip(store.read(), model, strict=True):
            torch.testing.assert_close(found.float(), side[:, :, store.first :], rtol=0, atol=0)


StoreMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=12, deadline=None)
TestStoreMachine = StoreMachine.TestCase


class GroupedMachine(StoreMachine):
    """Groups of tokens: what leaves the window is encoded by this many, counted from the first token after the last crop."""

    @initialize(keys=GROUPED, batch=st.integers(1, 3), seed=st.integers(0, 2**31), window=st.sampled_from([0, 40]))
    def begin(self, keys, batch, seed, window):
        self.generator = torch.Generator().manual_seed(seed)
        values = Scheme(Quantization(4, "int", strategy="token_head", group_size=8))
        self.store = LayerStore(made(keys), made(values), residual_length=max(window, keys.lookahead_tokens))
        self.model = [torch.zeros(batch, HEADS, 0, DIM) for _ in range(2)]
        self.exact = 0  # how many of the newest tokens are

    @rule(new=st.one_of(st.integers(1, 5), st.integers(60, 150)))
    def append(self, new):
        fresh = [torch.randn(len(self.model[0]), HEADS, new, DIM, generator=self.generator) for _ in range(2)]
        self.store.append(*fresh)
        self.exact += new
        num_to_flush = (
            max(self.exact - self.store.residual_length, 0) // self.store.tokens_per_group * self.store.tokens_per_group
        )
        for side, quantizer in enumerate(self.store.quantizers):
            every = torch.cat([self.model[side], fresh[side]], dim=2)
            start = every.shape[2] - self.exact
            if num_to_flush:
                seen = every[:, :, start : start + num_to_flush + quantizer.scheme.lookahead_tokens]
                every[:, :, start : start + num_to_flush] = quantizer.dequantize(quantizer.encode(seen))
            self.model[side] = every
        self.exact -= num_to_flush

    @rule(drop=st.integers(0, 200))
    def crop(self, drop):
        before = self.model[0].shape[2]
        super().crop(drop)
        self.exact = max(self.exact - (before - self.model[0].shape[2]), 0)


GroupedMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=12, deadline=None)
TestGroupedMachine = GroupedMachine.TestCase
