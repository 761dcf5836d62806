"""Conversations: turns on one cache give what the model gives for the whole text, also where templates spell turns anew."""

import pytest
import torch
from tests.conftest import make_tiny
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from narrowkv import PackedCache
from narrowkv.errors import TextError
from narrowkv.integrations.conversation import USER, Conversation, _Streamer

TEMPLATE = "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
# earlier answers lose their first two letters, as some templates drop what a model thought
FORGETFUL = TEMPLATE.replace("{{ m.content }}", "{{ m.content[2:] if m.role == 'assistant' else m.content }}")


def tokenizer(template=TEMPLATE):
    """A token for each letter."""
    letters = Tokenizer(WordLevel({"\n": 0} | {chr(31 + i): i for i in range(1, 97)}, unk_token="\x7f"))
    letters.pre_tokenizer = Split("", "isolated")
    letters.decoder = Fuse()
    found = PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="\x7f")
    found.chat_template = template
    return found


def talk(template=TEMPLATE, model=None, recipe="fp16", **settings):
    model = model or make_tiny()
    return Conversation(model, tokenizer(template), PackedCache(model, recipe), **settings)


def expected(conversation, tokens):
    """What the model itself says to all but the last answer."""
    asked = conversation.messages[:-1]
    text = conversation.tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    ids = conversation.tokenizer(text, return_tensors="pt")["input_ids"]
    said = conversation.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0
    )
    return conversation.tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("template", [TEMPLATE, FORGETFUL], ids=["plain", "forgetful"])
def test_turns_on_one_cache_say_what_the_model_says(template):
    conversation = talk(template, system="Be kind")
    for turn in ("Hello", "And now?", "Bye"):
        words = []
        answer = conversation.ask(turn, 9, words.append, do_sample=False)
        assert answer == "".join(words) == expected(conversation, 9) and len(answer) > 5


def test_only_what_is_new_is_read():
    conversation, read = talk(), []
    conversation.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    conversation.ask("A long question to begin with", 6, do_sample=False)
    read.clear()
    conversation.ask("Yes", 6, do_sample=False)
    # the last token of the answer has not been read before
    assert not conversation.read_anew
    assert read[0] == len("?\n[u]Yes\n[a]")


def test_a_conversation_resets_a_cache_that_cannot_be_cropped():
    model = make_tiny("mistral", sliding_window=16)
    conversation = talk(FORGETFUL, model, recipe="int4")
    for turn in ("A question that is longer than the window" * 3, "And another one, longer than the window too"):
        answer = conversation.ask(turn, 100, do_sample=False)
        assert len(answer) > 50
    assert conversation.read_anew and conversation.cache.get_seq_length() == len(conversation._token_ids)


def test_reset_keeps_the_instruction_only():
    conversation = talk(system="Be kind")
    first = conversation.ask("Hello", 5, do_sample=False)
    conversation.ask("Again", 5, do_sample=False)
    conversation.reset()
    assert conversation.messages == [{"role": "system", "content": "Be kind"}] and conversation.cache.get_seq_length() == 0
    assert conversation.ask("Hello", 5, do_sample=False) == first


def test_an_answer_can_be_stopped_and_the_conversation_goes_on():
    conversation, heard = talk(), []
    answer = conversation.ask("Hello", 50, heard.append, lambda: len(heard) >= 3, do_sample=False)
    assert 0 < len(answer) < 50
    assert conversation.ask("Go on", 9, do_sample=False) == expected(conversation, 9)


def test_a_failure_leaves_the_conversation_as_it_was():
    conversation = talk()
    conversation.ask("Hello", 5, do_sample=False)
    before = list(conversation.messages)

    def fail(words):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conversation.ask("Then", 5, fail, do_sample=False)
    assert conversation.messages == before
    assert conversation.ask("Then", 9, do_sample=False) == expected(conversation, 9)


def test_a_conversation_longer_than_the_model_supports_raises():
    conversation = talk()
    conversation.model.config.max_position_embeddings = 40
    conversation.ask("Hello", 100, do_sample=False)
    assert conversation.cache.get_seq_length() <= 40
    with pytest.raises(TextError, match="40 positions; begin a new one"):
        conversation.ask("And now?", 5, do_sample=False)


def test_an_error_of_a_chat_template_is_reported():
    conversation = talk("{{ raise_exception('No system role, please') }}")
    with pytest.raises(TextError, match="No system role, please"):
        conversation.ask("Hello", 5, do_sample=False)


def test_without_a_template_turns_are_plain_text():
    conversation = talk(None, system="Be kind")
    assert not conversation.templated
    conversation.ask("Hello", 5, do_sample=False)
    assert conversation.tokenizer.decode(conversation._token_ids).startswith(
        "Be kind??User: Hello??Assistant:".replace("?", "\n")
    )


def test_text_generated_in_the_users_name_is_not_streamed():
    shown = []
    streamer = _Streamer(tokenizer(), shown.append, USER)
    for part in ("Fine", ".\n", "\nUser", ": and", " more"):
        streamer.on_finalized_text(part)
    streamer.on_finalized_text("", stream_end=True)
    assert "".join(shown) == "Fine."
    shown.clear()
    for part in ("Fine", ".\n", "\nUs"):
        streamer = streamer if shown else _Streamer(tokenizer(), shown.append, USER)
        streamer.on_finalized_text(part)
    streamer.on_finalized_text("ual", stream_end=True)
    assert "".join(shown) == "Fine.\n\nUsual"
