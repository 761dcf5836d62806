"""Rows of tasks: exactly as long as asked, what is given stands where it should, and the answer follows from it."""

import re

import pytest
import torch
from tests.letters import TEXT, make_letters

from narrowkv.errors import TextError
from narrowkv.evaluate.perplexity import recalled
from narrowkv.evaluate.retrieval import accuracy
from narrowkv.evaluate.task_rows import MAKERS, make_rows

TOKENIZER = make_letters("<s> $A")
FILLER = TOKENIZER.encode(TEXT, add_special_tokens=False)
LENGTH = 900


def rows_of(task, depth=None, seed=0, length=LENGTH):
    """Texts of three rows: given, with the question, and the answers."""
    batch = make_rows(task, TOKENIZER, FILLER, length, 3, seed, depth)
    assert batch.input_ids.shape == batch.answer_mask.shape == (3, length)
    for row, mask in zip(batch.input_ids, batch.answer_mask, strict=True):
        assert row[0] == TOKENIZER.bos_token_id and mask[-1]
        text = TOKENIZER.decode(row[1:])
        context, question = text.rsplit("\n\n", 1) if task != "multi-needle" else (text, "")
        yield context, question, TOKENIZER.decode(row[mask])


@pytest.mark.parametrize(("depth", "where"), [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)])
def test_a_passkey_stands_at_its_depth(depth, where):
    for context, question, answer in rows_of("passkey", depth):
        assert question.endswith(answer) and context.count(question + ".") == 1
        assert context.count("The password of") == 4
        running = re.sub(r"\n\nThe password of [^\n]*\n\n", "", context[: context.index(question)])
        whole = re.sub(r"\n\nThe password of [^\n]*\n\n", "", context + "\n\n")
        assert len(running) / len(whole) == pytest.approx(where, abs=0.01)


def test_keys_and_values_take_half_of_the_row():
    for context, question, _ in rows_of("key-value"):
        facts = re.findall(r"The password of [^\n]*\.", context)
        assert question + "." in facts
        assert 0.4 * LENGTH < sum(map(len, facts)) <= 0.5 * LENGTH


def test_all_needles_are_queried():
    for text, _, answers in rows_of("multi-needle"):
        facts = re.findall(r"The password of \w+ is( [^\n.]*)", text)
        context, asked = facts[:4], facts[4:]
        assert sorted(context) == sorted(asked) and "".join(asked) == answers


def test_variables_have_the_queried_value():
    for context, question, answer in rows_of("variables"):
        values = {}
        for name, source in re.findall(r"VAR (\w+) = ([^.\n]*)\.", context):
            values[name] = values[source.removeprefix("VAR ")] if source.startswith("VAR") else source
        wanted = re.search(r"value is (\d+)", question)[1]
        assert answer == " " + ", VAR ".join(name for name, value in values.items() if value == wanted)
        assert len(values) == 8 and set(values.values()) > {wanted}


def test_counts_are_right():
    for context, question, answer in rows_of("counting", length=1200):
        line = re.search(r'"(.*)"', question)[1]
        assert context.count(line) == int(answer) and question.endswith(f"is{answer}")


@pytest.mark.parametrize("task", MAKERS)
def test_rows_are_the_same_for_a_seed_and_too_short_ones_are_refused(task):
    one, same, other = (make_rows(task, TOKENIZER, FILLER, 1200, 2, seed).input_ids for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    with pytest.raises(TextError, match="lengths from"):
        make_rows(task, TOKENIZER, FILLER, 40, 2, 0)


def test_scattered_answers_are_scored_as_from_all_logits(tiny):
    model = tiny()
    batch = make_rows("multi-needle", TOKENIZER, FILLER, 480, 2, 0)
    with torch.inference_mode():
        logits = model(batch.input_ids).logits
        assert recalled(model, None, batch) == accuracy(logits, batch) == 0
        batch.input_ids[0] = torch.where(batch.answer_mask[0], 0, batch.input_ids[0])
        for position in batch.answer_mask[0].nonzero().flatten():  # a row that the model answers
            batch.input_ids[0, position] = model(batch.input_ids[:1, :position]).logits[0, -1].argmax()
        assert recalled(model, None, batch) == 0.5
