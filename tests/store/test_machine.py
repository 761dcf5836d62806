"""Any sequence of append, crop, select, copy and read, against plain tensors: a number is quantised once in its life."""

import copy

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from narrowkv.codec import Quantizer, Scheme
from narrowkv.store import LayerStore

HEADS, DIM = 2, 56
SCHEMES = st.sampled_from(
    [
        Scheme(16, "exact"),
        Scheme(4, "int"),
        Scheme(3, "nf", axis="token_head"),
        Scheme(2, "int", outliers=0.02),
    ]
)


class StoreMachine(RuleBasedStateMachine):
    """The model: decoded keys and values as they were first stored, [batch, heads, tokens, dim]."""

    @initialize(keys=SCHEMES, values=SCHEMES, batch=st.integers(1, 3), seed=st.integers(0, 2**31))
    def begin(self, keys, values, batch, seed):
        self.generator = torch.Generator().manual_seed(seed)
        self.store = LayerStore(Quantizer(keys), Quantizer(values))
        self.model = [torch.zeros(batch, HEADS, 0, DIM) for _ in range(2)]

    @rule(new=st.one_of(st.integers(1, 5), st.integers(60, 150)))
    def append(self, new):
        fresh = [torch.randn(len(self.model[0]), HEADS, new, DIM, generator=self.generator) for _ in range(2)]
        self.store.append(*fresh)
        for side, quantizer in enumerate(self.store.quantizers):
            decoded = quantizer.decode(quantizer.encode(fresh[side])).float()
            self.model[side] = torch.cat([self.model[side], decoded], dim=2)

    @rule(drop=st.integers(0, 200))
    def crop(self, drop):
        length = max(self.model[0].shape[2] - drop, 0)
        if length == 0 or length <= self.store.first:
            return
        self.store.crop(length)
        self.model = [side[:, :, :length] for side in self.model]

    @rule(share=st.floats(0, 1))
    def forget(self, share):
        before = int(share * self.store.length)
        first = self.store.first
        self.store.forget(before)
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
            for found, side in zip(original.read(), expected, strict=True):
                assert torch.equal(found.float(), side[:, :, original.first :])

    @invariant()
    def same_numbers(self):
        if not hasattr(self, "store"):
            return
        assert self.store.length == self.model[0].shape[2]
        if self.store.length > self.store.first:
            for found, side in zip(self.store.read(), self.model, strict=True):
                assert torch.equal(found.float(), side[:, :, self.store.first :])


StoreMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=12, deadline=None)
TestStoreMachine = StoreMachine.TestCase
