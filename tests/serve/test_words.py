"""Text as tokens come equals the text of all of them, up to the first stop text."""

import pytest
import torch

from narrowkv.serve.words import Words, beginning

TEXTS = ["It was a bright cold day in April.", "naïve, 日本語 🙂 🙃 façade", "\n\n\tend\n\nUser: no", "aaaa" * 20]


def shown(words, tokens):
    return [*(words.add(token) for token in tokens), words.end()]


@pytest.mark.parametrize("text", TEXTS)
def test_parts_make_the_whole(demo, text):
    tokens = demo[1](text)["input_ids"]
    parts = shown(Words(demo[1]), tokens)
    assert "".join(parts) == demo[1].decode(tokens, skip_special_tokens=True)


def test_any_tokens_make_the_text_that_they_make_together(demo):
    tokens = torch.randint(3, len(demo[1]), (200,)).tolist()
    assert "".join(shown(Words(demo[1]), tokens)) == demo[1].decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize(("stops", "expected"), [(["User"], "\n\n\tend\n\n"), (["d\n\nU", "zzz"], "\n\n\ten"), (["\n"], "")])
def test_nothing_of_a_stop_text_is_shown(demo, stops, expected):
    tokens = demo[1](TEXTS[2])["input_ids"]
    words = Words(demo[1], stops)
    parts = []
    for token in tokens:
        parts.append(words.add(token))
        assert expected.startswith("".join(parts))
    assert words.stopped and "".join([*parts, words.end()]) == expected


def test_what_only_began_a_stop_text_is_shown_at_the_end(demo):
    tokens = demo[1]("we are the en")["input_ids"]
    words = Words(demo[1], ["end of it"])
    assert "".join(words.add(token) for token in tokens) != "we are the en" == "".join(shown(Words(demo[1], ["end"]), tokens))
    assert not words.stopped


def test_letters_that_may_begin_a_stop_text_are_counted():
    assert [beginning(text, "stop") for text in ("a sto", "stop", "s", "nothing")] == [3, 0, 1, 0]
