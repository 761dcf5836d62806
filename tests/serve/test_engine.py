"""Jobs on the engine's thread: answers are those of the prompt alone, whatever runs beside it."""

import threading

import pytest
import torch
from tests.serve.conftest import TEXT, wait_until

from narrowkv import PackedCache
from narrowkv.serve.refusals import Refusal
from narrowkv.serve.sampling import Sampling
from narrowkv.serve.sequences import Delta, Job

GREEDY = Sampling(temperature=0.0, top=2)


class Listener:
    """A job, and what came of it."""

    def __init__(self, engine, ids, limit=8, **options):
        self.events = []
        self.done = threading.Event()
        self.job = Job(ids, options.pop("scope", ""), options.pop("sampling", GREEDY), limit, ignore_eos=True, **options)
        self.job.put = self._put
        self.left = self.job.choices
        engine.submit(self.job)

    def _put(self, event):
        self.events.append(event)
        self.left -= isinstance(event, Refusal) or event.finish is not None
        if isinstance(event, Refusal) or self.left == 0:
            self.done.set()

    def wait(self):
        assert self.done.wait(60)
        return self

    def tokens(self, choice=0):
        return [event.chosen.token for event in self.events if isinstance(event, Delta) and event.choice == choice]

    @property
    def refusal(self):
        return self.events[-1] if isinstance(self.events[-1], Refusal) else None


def alone(model, ids, tokens, source="int4", chunk=64):
    """Tokens of a prompt read in chunks and decoded by itself, and by how much each was ahead of the next best."""
    cache, found, margins = PackedCache(model, source), [], []
    with torch.inference_mode():
        for part in torch.tensor([ids]).split(chunk, dim=1):
            logits = model(input_ids=part, past_key_values=cache).logits[0, -1]
        for _ in range(tokens):
            best = logits.topk(2)
            found.append(int(best.indices[0]))
            margins.append(float(best.values[0] - best.values[1]))
            logits = model(input_ids=torch.tensor([found[-1:]]), past_key_values=cache).logits[0, -1]
    return found, margins


def prompt(demo, tokens, start=0):
    return (demo[1](TEXT * 20)["input_ids"] * 3)[start : start + tokens]


def test_answers_are_those_of_each_prompt_alone(demo, make_engine):
    engine = make_engine(rows=4)
    prompts = [prompt(demo, length, start) for length, start in ((5, 0), (64, 3), (130, 9), (70, 20), (200, 40), (33, 50))]
    lengths = [9, 20, 3, 14, 8, 25]
    listeners = [Listener(engine, ids, limit) for ids, limit in zip(prompts, lengths, strict=True)]
    engine.start()
    for listener, ids, limit in zip(listeners, prompts, lengths, strict=True):
        expected, margins = alone(demo[0], ids, limit)
        found = listener.wait().tokens()
        different = next((i for i in range(limit) if found[i] != expected[i]), None)
        assert different is None or margins[different] < 1e-3  # products of several rows are rounded otherwise
        assert listener.events[-1].finish == "length" and len(found) == limit
    assert engine.metrics.read()["steps"] < sum(lengths) - len(lengths)


def test_a_reused_prefix_gives_bit_for_bit_what_a_fresh_one_gives(demo, make_engine):
    engine = make_engine()
    engine.start()
    ids = prompt(demo, 300)
    first, second, longer = (Listener(engine, one).wait() for one in (ids, ids, [*ids[:200], 9, 10, 11]))
    assert (first.job.reused, second.job.reused, longer.job.reused) == (0, 256, 192)
    assert [event.chosen for event in first.events] == [event.chosen for event in second.events]
    fresh = make_engine(cache_bytes=0)
    fresh.start()
    again = Listener(fresh, longer.job.ids).wait()
    assert again.job.reused == 0
    assert [event.chosen for event in again.events] == [event.chosen for event in longer.events]


def test_scopes_share_nothing(demo, make_engine):
    engine = make_engine()
    engine.start()
    ids = prompt(demo, 100)
    reused = [Listener(engine, ids, scope=scope).wait().job.reused for scope in ("one", "two", "one")]
    assert reused == [0, 0, 64]


def test_a_short_prompt_goes_before_the_rest_of_a_long_one(demo, make_engine):
    engine = make_engine()
    order = []
    chunk = engine._read_chunk

    def noted():
        chunk()
        order.append(engine._current.ids)

    engine._read_chunk = noted
    long, short = prompt(demo, 400), prompt(demo, 30, 7)
    listeners = [Listener(engine, long), Listener(engine, short)]
    engine.start()
    for listener in listeners:
        listener.wait()
    assert order.index(short) <= 1
    assert [event.chosen.token for event in listeners[0].events] == alone(demo[0], long, 8)[0]


def test_prompts_that_begin_alike_are_read_once_though_they_come_together(demo, make_engine):
    engine = make_engine()
    ids = prompt(demo, 300)
    together = [Listener(engine, [*ids[:length], 5 + length]) for length in (299, 210, 130)]
    engine.start()
    assert [listener.wait().job.reused for listener in together] == [192, 128, 0]  # the shortest is read first
    for listener in together:
        assert listener.tokens() == alone(demo[0], listener.job.ids, 8)[0]


def test_several_choices_of_one_prompt_are_read_once(demo, make_engine):
    engine = make_engine(rows=3)
    engine.start()
    sampling = Sampling(temperature=2.0, seed=5)
    listener = Listener(engine, prompt(demo, 100), 12, sampling=sampling, choices=3).wait()
    assert len({tuple(listener.tokens(i)) for i in range(3)}) == 3
    assert engine.metrics.read()["chunks"] == 2
    again = Listener(engine, prompt(demo, 100), 12, sampling=sampling, choices=3).wait()
    assert [again.tokens(i) for i in range(3)] == [listener.tokens(i) for i in range(3)]


def test_a_cancelled_job_frees_its_row(demo, make_engine):
    engine = make_engine(rows=1)
    engine.start()
    endless, waiting = Listener(engine, prompt(demo, 70), 1500), Listener(engine, prompt(demo, 20), 3)
    wait_until(lambda: len(endless.events) > 2)
    assert not waiting.events
    endless.job.cancelled = True
    engine.wake()
    waiting.wait()
    assert not endless.done.is_set() and engine.metrics.read()["cancelled"] == 1


def test_what_a_cancelled_prompt_has_read_serves_the_next(demo, make_engine):
    engine = make_engine()
    ids = prompt(demo, 500)
    chunk, first = engine._read_chunk, []

    def cancel_at_half():
        chunk()
        if engine._current.read >= 256 and not first:
            first.append(engine._current)
            engine._current.cancelled = True

    engine._read_chunk = cancel_at_half
    Listener(engine, ids)
    engine.start()
    wait_until(lambda: engine.metrics.read()["cancelled"] == 1)
    assert Listener(engine, ids).wait().job.reused == 256


def test_a_full_queue_refuses(demo, make_engine):
    engine = make_engine(rows=1, queue=2)
    listeners = [Listener(engine, prompt(demo, 5)) for _ in range(2)]
    with pytest.raises(Refusal) as found:
        Listener(engine, prompt(demo, 5))
    assert found.value.status == 429 and "Retry-After" in found.value.headers
    engine.start()
    for listener in listeners:
        assert listener.wait().refusal is None


def test_a_step_that_fails_ends_its_jobs_and_no_others(demo, make_engine, caplog):
    engine = make_engine()
    logits = engine._logits

    def failing(ids, cache, **options):
        if 1999 in ids[0]:
            raise RuntimeError("no memory")
        return logits(ids, cache, **options)

    engine._logits = failing
    engine.start()
    bad, good = Listener(engine, [5, 1999, 6]).wait(), Listener(engine, prompt(demo, 30)).wait()
    assert bad.refusal.status == 500 and "no memory" in bad.refusal.message
    assert good.refusal is None and len(good.tokens()) == 8 and engine.is_alive
    assert "A step failed" in caplog.text


def test_the_end_finishes_or_refuses_what_runs(demo, make_engine):
    engine = make_engine()
    engine.start()
    short, endless = Listener(engine, prompt(demo, 30), 5), Listener(engine, prompt(demo, 40), 1800)
    wait_until(lambda: endless.events)
    engine.stop(seconds=1.0)
    assert short.wait().refusal is None and endless.wait().refusal.status == 503
    with pytest.raises(Refusal, match="stopping"):
        Listener(engine, prompt(demo, 5))
    assert not engine.is_alive


def test_models_whose_rows_cannot_go_together_are_decoded_one_by_one(demo, make_engine, monkeypatch):
    from narrowkv.errors import UnsupportedModelError
    from narrowkv.integrations import CacheGroup

    def refuse(*args):
        raise UnsupportedModelError("rows differ")

    monkeypatch.setattr(CacheGroup, "start", refuse)
    engine = make_engine()
    listeners = [Listener(engine, prompt(demo, length)) for length in (20, 70)]
    engine.start()
    for listener, length in zip(listeners, (20, 70), strict=True):
        assert listener.wait().tokens() == alone(demo[0], prompt(demo, length), 8)[0]
