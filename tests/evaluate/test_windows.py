"""Windows: what they begin with, where they lie in a text, and how several texts share them."""

import itertools

import pytest
import torch
from tests.letters import TEXT, make_letters

from narrowkv.errors import TextError
from narrowkv.evaluate import cut_windows
from narrowkv.evaluate.retrieval import passages
from narrowkv.evaluate.task_rows import make_rows
from narrowkv.evaluate.windows import cut_apart, encode, prompt_tokens, start_tokens

LETTERS = make_letters()
NUMBERED = "".join(f"Line {i:03d} of a text.\n" for i in range(400))  # 22 characters each


def words(rows):
    return [LETTERS.decode(row) for row in rows]


@pytest.mark.parametrize(
    ("template", "start"), [("$A", []), ("<s> $A", [1]), ("<pad> <s> $A", [0, 1]), ("$A <s>", []), ("<s> $A <pad>", [1])]
)
def test_windows_begin_as_the_tokenizer_begins_a_text_and_end_as_the_text_goes_on(template, start):
    tokenizer = make_letters(template)
    assert start_tokens(tokenizer) == start
    row = cut_windows(tokenizer, TEXT, 40, 1)[0].tolist()
    assert row[: len(start)] == start and not {0, 1} & set(row[len(start) :])
    assert prompt_tokens(tokenizer, "Is it?").tolist() == [start + encode(tokenizer, "Is it?")]
    filler = encode(tokenizer, TEXT)
    for rows in (passages(tokenizer, filler, 60, 1, 0), make_rows("passkey", tokenizer, filler, 400, 1, 0)):
        row = rows.input_ids[0].tolist()
        assert row[: len(start)] == start and not {0, 1} & set(row[len(start) :])


def test_an_option_overrides_the_tokenizer():
    for template, bos, start in (("$A", True, [1]), ("<s> $A", False, [])):
        tokenizer = make_letters(template)
        for rows in (
            cut_windows(tokenizer, TEXT, 40, 2, bos=bos),
            passages(tokenizer, encode(tokenizer, TEXT), 60, 2, 0, bos).input_ids,
            make_rows("counting", tokenizer, encode(tokenizer, TEXT), 900, 2, 0, bos=bos).input_ids,
            prompt_tokens(tokenizer, TEXT, bos),
        ):
            assert all(row[: len(start)] == start and 1 not in row[len(start) :] for row in rows.tolist())
    tokenizer.bos_token = None
    with pytest.raises(TextError, match="no beginning-of-text token"):
        cut_windows(tokenizer, TEXT, 40, bos=True)


def test_windows_begin_with_a_line_and_are_spread_over_the_text():
    found = words(cut_windows(LETTERS, NUMBERED, 60, 4))
    assert [int(text[5:8]) for text in found] == [51, 151, 251, 351]  # the first line after (i + 1/2) / 4
    assert all(text.startswith("Line ") and text[60:] == "" for text in found)
    assert words(cut_windows(LETTERS, NUMBERED, 60, 2, spread=4)) == found[:2]
    assert words(cut_windows(LETTERS, NUMBERED, 60, spread=4)) == found


def test_a_text_without_lines_is_cut_evenly_and_no_token_is_cut_twice():
    numbered = "".join(f"{i:04d} " for i in range(500))  # 2,500 characters, each place known by what stands there
    found = words(cut_windows(LETTERS, numbered, 250, 3))
    starts = [numbered.index(part) for part in found]
    assert starts == [2500 * (2 * i + 1) // 6 - 125 for i in range(3)]
    whole = words(cut_windows(LETTERS, numbered, 250))
    assert "".join(whole) == numbered
    assert "".join(words(cut_windows(LETTERS, numbered, 250, 99))) == numbered  # as many as there are


def test_long_lines_and_long_tokens_are_cut():
    text = ("x" * 3000 + "\n") * 3  # no line begins where three windows would
    assert cut_windows(LETTERS, text, 2000, 3).shape == (3, 2000)
    assert cut_windows(LETTERS, text, 2000, 9).shape == (4, 2000)


def test_several_texts_share_the_windows():
    one, two = "a\n" * 2000, "b\n" * 2000
    found = words(cut_windows(LETTERS, [one, two], 10, 5))
    assert [text[0] for text in found] == ["a", "a", "a", "b", "b"]
    assert torch.equal(cut_windows(LETTERS, [one], 10, 5), cut_windows(LETTERS, one, 10, 5))
    assert [text[0] for text in words(cut_windows(LETTERS, [one, two], 10, 2, spread=8))] == ["a", "b"]
    everything = words(cut_windows(LETTERS, [one, two], 1000))
    assert [text[0] for text in everything] == ["a"] * 4 + ["b"] * 4


def test_two_sets_of_windows_share_nothing():
    numbered = "".join(f"{i:04d} " for i in range(500))
    first, second = (words(rows) for rows in cut_apart(LETTERS, numbered, 100, 4, 6))
    assert len(first) == 4 and len(second) == 6
    starts = sorted(numbered.index(part) for part in first + second)
    assert all(b - a >= 100 for a, b in itertools.pairwise(starts))
    assert numbered.index(first[0]) < 600 and numbered.index(first[-1]) > 1800  # over all of the text
    first, second = cut_apart(LETTERS, numbered, 1000, 2, 3)
    assert len(first) == 2 and len(second) == 0


@pytest.mark.parametrize(
    ("text", "limit", "spread", "cause"),
    [
        ("short", 1, None, "has 5 tokens, one window needs 40"),
        ([TEXT, "short"], 2, None, "Text 2 of 2 has 5 tokens"),
        ([TEXT, TEXT, TEXT], 2, None, "3 texts share the windows, so 2 are too few"),
        (TEXT, 4, 2, "4 windows cannot be taken from 2 positions"),
        ([], 4, None, "no text"),
    ],
)
def test_texts_that_cannot_be_cut_are_refused(text, limit, spread, cause):
    with pytest.raises(TextError, match=cause):
        cut_windows(LETTERS, text, 40, limit, spread=spread)
