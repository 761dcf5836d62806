"""The next token, by hand-made logits."""

import math

import pytest
import torch

from narrowkv.serve.sampling import Sampler, Sampling

LOGITS = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()


def drawn(count=400, **settings):
    sampler = Sampler(Sampling(seed=7, **settings))
    return [sampler.choose(LOGITS).token for _ in range(count)]


def test_greedy_takes_the_most_likely():
    assert set(drawn(5, temperature=0.0)) == {0}


def test_draws_follow_probabilities_and_temperature():
    tokens = drawn(2000)
    assert all(abs(tokens.count(i) / 2000 - p) < 0.04 for i, p in enumerate([0.5, 0.3, 0.15, 0.05]))
    assert drawn(400, temperature=0.1).count(0) > 390


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [({"top_p": 0.4}, {0}), ({"top_p": 0.6}, {0, 1}), ({"top_k": 3}, {0, 1, 2}), ({"top_k": 3, "top_p": 0.6}, {0, 1})],
)
def test_only_the_most_likely_are_drawn(settings, allowed):
    assert set(drawn(**settings)) == allowed


def test_a_flat_distribution_is_sorted_whole():
    logits = torch.zeros(10_000)
    sampler = Sampler(Sampling(top_p=0.9, seed=1))
    assert len({sampler.choose(logits).token for _ in range(50)}) > 40


def test_a_seed_gives_the_same_tokens_and_choices_their_own():
    settings = Sampling(seed=3)
    runs = [[Sampler(settings, choice) for _ in range(2)] for choice in range(2)]
    tokens = [[[one.choose(LOGITS).token for _ in range(30)] for one in pair] for pair in runs]
    assert tokens[0][0] == tokens[0][1] != tokens[1][0] == tokens[1][1]


def test_penalties_push_down_what_was_said():
    presence = Sampler(Sampling(temperature=0.0, presence_penalty=2.0))
    assert [presence.choose(LOGITS).token for _ in range(4)] == [0, 1, 2, 0]
    frequency = Sampler(Sampling(temperature=0.0, frequency_penalty=0.6))
    assert [frequency.choose(LOGITS).token for _ in range(3)] == [0, 1, 0]


def test_logprobs_are_those_of_the_distribution():
    chosen = Sampler(Sampling(temperature=0.0, top=2)).choose(LOGITS)
    assert chosen.logprob == pytest.approx(math.log(0.5), abs=1e-5)
    assert [token for token, _ in chosen.top] == [0, 1] and chosen.top[1][1] == pytest.approx(math.log(0.3), abs=1e-5)
    assert Sampler(Sampling(temperature=0.0)).choose(LOGITS).logprob is None
