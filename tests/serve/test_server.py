"""`narrowkv serve` as a process with a port, called by the openai client."""

import json
import threading
import urllib.request

import openai
import pytest
from tests.serve.conftest import TEXT, Process, wait_until

GREEDY = {"model": "demo", "temperature": 0, "max_tokens": 12}
ASK = [{"role": "user", "content": "Where do the ships go?"}]


@pytest.fixture(scope="module")
def client(process):
    return openai.OpenAI(base_url=f"{process.url}/v1", api_key="one", max_retries=0)


def cached(answer):
    return answer.usage.prompt_tokens_details.cached_tokens


def test_the_model_is_listed(client):
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").owned_by == "narrowkv"


def test_a_chat_whole_and_in_parts(client):
    whole = client.chat.completions.create(messages=ASK, **GREEDY)
    assert whole.choices[0].finish_reason in ("stop", "length") and whole.choices[0].message.content
    parts = list(client.chat.completions.create(messages=ASK, stream=True, stream_options={"include_usage": True}, **GREEDY))
    assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == whole.choices[0].message.content
    assert [part.choices[0].finish_reason for part in parts if part.choices][-1] == whole.choices[0].finish_reason
    assert parts[-1].choices == [] and parts[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(part.usage is None for part in parts[:-1]) and parts[0].choices[0].delta.role == "assistant"
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens


def test_a_second_turn_reuses_the_first(client):
    turns = [{"role": "user", "content": TEXT * 8}]
    first = client.chat.completions.create(messages=turns, **GREEDY)
    turns += [{"role": "assistant", "content": first.choices[0].message.content}, {"role": "user", "content": "And then?"}]
    second = client.chat.completions.create(messages=turns, **GREEDY)
    assert cached(first) < 64 <= (first.usage.prompt_tokens - 1) // 64 * 64 == cached(second)


def test_one_key_does_not_see_prefixes_of_another(client, process):
    prompt = "Nobody else knows this. " + TEXT * 8
    other = openai.OpenAI(base_url=f"{process.url}/v1", api_key="two", max_retries=0)
    found = [cached(one.completions.create(prompt=prompt, **GREEDY)) for one in (client, other, client, other)]
    assert found[:2] == [0, 0] and found[2] == found[3] >= 64


def test_completions_of_texts_and_of_ids(client, demo):
    texts = client.completions.create(prompt=["It was", "The sea"], n=2, logprobs=2, **GREEDY)
    assert [choice.index for choice in texts.choices] == [0, 1, 2, 3]
    assert texts.choices[0].text == texts.choices[1].text and texts.choices[2].text == texts.choices[3].text
    ids = client.completions.create(prompt=[demo[1](text)["input_ids"] for text in ("It was", "The sea")], **GREEDY)
    assert [choice.text for choice in ids.choices] == [texts.choices[0].text, texts.choices[2].text]
    logprobs = texts.choices[0].logprobs
    assert "".join(logprobs.tokens) == texts.choices[0].text and len(logprobs.top_logprobs[0]) == 2
    assert all(
        max(top.values()) == logprob for top, logprob in zip(logprobs.top_logprobs, logprobs.token_logprobs, strict=True)
    )


def test_sampling_fields(client):
    settings = {"model": "demo", "messages": ASK, "max_tokens": 10, "temperature": 1.5, "top_p": 0.9, "seed": 4}
    one, same, other = (
        client.chat.completions.create(**{**settings, **change}, extra_body={"top_k": 50}).choices[0].message.content
        for change in ({}, {}, {"seed": 5})
    )
    assert one == same != other
    several = client.chat.completions.create(**settings, n=3, presence_penalty=1, frequency_penalty=0.5).choices
    assert len({choice.message.content for choice in several}) == 3
    named = client.chat.completions.create(**settings, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert len(named) == 10 and all(len(token.top_logprobs) == 3 and token.logprob <= 0 for token in named)


def test_an_answer_ends_before_a_stop_text(client):
    whole = client.completions.create(prompt="It was", **{**GREEDY, "max_tokens": 40}).choices[0].text
    stop = whole[10:14]
    for stream in (False, True):
        answer = client.completions.create(prompt="It was", stop=[stop], stream=stream, **{**GREEDY, "max_tokens": 40})
        parts = list(answer) if stream else [answer]
        assert "".join(part.choices[0].text for part in parts) == whole[: whole.index(stop)]
        assert parts[-1].choices[0].finish_reason == "stop"


def test_errors_are_those_of_openai(client, process):
    with pytest.raises(openai.AuthenticationError, match="API key is wrong"):
        openai.OpenAI(base_url=f"{process.url}/v1", api_key="three", max_retries=0).models.list()
    for name in ("../../etc/passwd", "other", "narrowkv://demo", "demo/../demo", "\x00", "%2e%2e"):
        with pytest.raises(openai.NotFoundError, match="not served here"):
            client.chat.completions.create(messages=ASK, **{**GREEDY, "model": name})
    with pytest.raises(openai.BadRequestError, match="grammar"):
        client.chat.completions.create(messages=ASK, response_format={"type": "json_object"}, **GREEDY)
    with pytest.raises(openai.BadRequestError, match="chat template"):
        client.chat.completions.create(messages=ASK, tools=[{"type": "function", "function": {"name": "f"}}], **GREEDY)
    with pytest.raises(openai.BadRequestError, match="this server takes") as found:
        client.completions.create(prompt=TEXT * 200, **GREEDY)
    assert found.value.code == "context_length_exceeded"
    for ids in ([2048], [-1], [10**12], [2**70]):
        with pytest.raises(openai.BadRequestError):
            client.completions.create(prompt=ids, **GREEDY)
    with pytest.raises(openai.BadRequestError, match="new tokens are more"):
        client.completions.create(prompt="It was", **{**GREEDY, "max_tokens": 2047})


def test_a_client_that_leaves_is_noticed(client, process):
    """A stream, and a plain request: both would have gone on for a minute."""
    long = {"model": "demo", "prompt": "It was", "max_tokens": 2000, "extra_body": {"ignore_eos": True}}

    def running():
        request = urllib.request.Request(f"{process.url}/stats", headers={"Authorization": "Bearer one"})
        return json.load(urllib.request.urlopen(request))

    before = running()["cancelled"]
    stream = client.completions.create(stream=True, **long)
    next(iter(stream))
    stream.close()
    wait_until(lambda: running()["cancelled"] == before + 1)

    def leave():
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.5).completions.create(**long)

    thread = threading.Thread(target=leave)
    thread.start()
    thread.join()
    wait_until(lambda: running()["cancelled"] == before + 2 and running()["running"] == 0)


def test_the_end_finishes_what_runs_and_prefixes_come_back(client, process, prefix_dir):
    """The last test of this process."""
    prompt = "To be read once. " + TEXT * 8
    stream = client.completions.create(prompt=prompt, stream=True, **{**GREEDY, "max_tokens": 60})
    answer = [next(iter(stream)).choices[0].text]
    stopper = threading.Thread(target=process.stop)
    stopper.start()
    answer += [part.choices[0].text for part in stream]
    stopper.join()
    assert process.process.returncode == 0 and list(prefix_dir.iterdir())
    with pytest.raises(openai.APIConnectionError):
        client.models.list()
    again = Process(*process.options)
    new = openai.OpenAI(base_url=f"{again.url}/v1", api_key="one", max_retries=0)
    read = new.completions.create(prompt=prompt, **{**GREEDY, "max_tokens": 60})
    assert again.stop() == 0
    assert cached(read) >= 128 and read.choices[0].text == "".join(answer)
