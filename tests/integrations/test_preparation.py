"""Making a model ready: from many threads, in copies and other processes, and with nothing left changed for anybody else."""

import copy
import io
import multiprocessing
import threading
import warnings

import pytest
import torch
from tests.families import make
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BartConfig,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    T5Config,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from narrowkv import PackedCache, calibrate, disable, make_default
from narrowkv.errors import NarrowKVWarning, UnsupportedModelError
from narrowkv.evaluate.perplexity import measure


def traces(model):
    return [name for name, module in model.named_modules() if any("narrowkv" in part for part in vars(module))]


def in_threads(count, work):
    found, together = [None] * count, threading.Barrier(count)

    def one(i):
        together.wait()
        try:
            found[i] = work(i)
        except Exception as error:
            found[i] = error

    threads = [threading.Thread(target=one, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def generate(model, ids, cache=None):
    return model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize("training", [False, True])
def test_the_first_caches_are_made_in_many_threads_at_once(tiny, training):
    model, ids = tiny().train(training), torch.randint(2, 97, (1, 30))
    found = in_threads(8, lambda i: PackedCache(model, "int4" if i % 2 else "fp16"))
    assert all(isinstance(cache, PackedCache) for cache in found), found
    assert all(module.training == training for module in model.modules())
    model.eval()
    expected = generate(model, ids)
    assert torch.equal(generate(model, ids, found[0]), expected)


def test_concurrent_users_of_the_model_are_not_disturbed(tiny):
    model, ids = tiny(), torch.randint(2, 97, (1, 40))
    expected = [generate(model, ids[:, i:]) for i in range(6)]
    calibration_of = calibrate(tiny(), ids, "nuq4")

    def work(i):
        if i == 6:
            return calibrate(model, ids, "nuq4").layers[0][0].tensors()
        if i == 7:
            return make_default(model, "fp16")
        caches = [PackedCache(model, "fp16") if i % 2 else DynamicCache() for _ in range(3)]
        return [generate(model, ids[:, i:], cache) for cache in caches]

    *generated, learned, _ = in_threads(8, work)
    for found, tokens in zip(generated, expected, strict=True):
        assert all(torch.equal(one, tokens) for one in found), found
    for name, table in calibration_of.layers[0][0].tensors().items():
        assert torch.equal(learned[name], table)
    assert model.config._attn_implementation == "sdpa"
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_configurations_name_the_users_attention_unless_a_cache_is_in_use(tiny):
    model, ids = tiny(attn_implementation="eager"), torch.randint(2, 97, (1, 20))
    expected = model(ids, output_attentions=True).attentions
    cache = PackedCache(model, "int4")
    assert model.config._attn_implementation == "eager"
    model.config.output_attentions = True  # which transformers allows for eager attention alone
    for found, weights in zip(model(ids).attentions, expected, strict=True):
        assert torch.equal(found, weights)
    model.config.output_attentions = False
    named = []
    hook = model.model.layers[0].register_forward_hook(lambda *_: named.append(model.config._attn_implementation))
    model(ids, past_key_values=cache)
    hook.remove()
    assert named != ["eager"] and model.config._attn_implementation == "eager"
    with pytest.raises(IndexError):  # a call that fails in the middle
        model(torch.full((1, 3), -5), past_key_values=PackedCache(model, "int4"))
    assert model.config._attn_implementation == "eager"


def test_continuous_batching_goes_on_after_a_cache_was_made(tiny):
    model, cached = tiny(), tiny()
    PackedCache(cached, "int4")
    options = {
        "generation_config": GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1),
        "continuous_batching_config": ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=16),  # else it takes all memory
        "warmup": False,
    }
    found = [one.generate_batch(inputs=[[3, 4, 5]], **options)["req_0"].generated_tokens for one in (model, cached)]
    assert found[0] == found[1] and len(found[0]) == 4


def answer_elsewhere(written, ids, pipe):
    """In another process, which has made no cache."""
    model = torch.load(io.BytesIO(written), weights_only=False)
    plain = model(ids).logits
    pipe.send((plain.tolist(), model(ids, past_key_values=PackedCache(model, "fp16")).logits.tolist()))


def test_a_prepared_model_works_in_another_process(tiny):
    model, ids = tiny(), torch.randint(2, 97, (1, 12))
    expected = model(ids).logits
    model(ids, past_key_values=PackedCache(model, "int4"))
    written = io.BytesIO()
    torch.save(model, written)
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=answer_elsewhere, args=(written.getvalue(), ids, theirs))
    process.start()
    assert ours.poll(120)
    for found in ours.recv():
        torch.testing.assert_close(torch.tensor(found), expected)
    process.join()


@pytest.mark.parametrize("family", ["llama", "phi3, longrope"])
def test_copies_of_a_prepared_model_are_models_of_their_own(family):
    model, ids = make(family), torch.randint(2, 97, (1, 20))
    make_default(model, "int4", scoring=True)
    written = io.BytesIO()
    torch.save(model, written)
    written.seek(0)
    for twin in (copy.deepcopy(model), torch.load(written, weights_only=False)):
        with torch.inference_mode():
            options = {"max_new_tokens": 40, "do_sample": False, "return_dict_in_generate": True, "pad_token_id": 0}
            found = twin.generate(ids, **options)
            assert isinstance(found.past_key_values, PackedCache)
            assert found.past_key_values.decoder() is twin.model
            assert torch.equal(found.sequences, model.generate(ids, **options).sequences)
            assert torch.equal(twin(ids).logits, model(ids).logits)
        disable(twin)
        assert not traces(twin) and traces(model)


def test_layers_removed_or_exchanged_are_found_by_the_next_cache(tiny):
    model, ids = tiny(layers=4), torch.randint(2, 97, (1, 20))
    PackedCache(model, "int4")
    for change in ("fewer", "fewer, said in the configuration", "another module", "another embedding"):
        if change == "fewer":
            model.model.layers = model.model.layers[:3]
        elif change == "another module":
            model.model.layers[1].self_attn = copy.deepcopy(tiny(seed=3).model.layers[1].self_attn)
        elif change == "another embedding":
            model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq / 4
        else:
            model.model.layers, model.config.num_hidden_layers = model.model.layers[:2], 2
        expected = generate(model, ids)
        assert torch.equal(generate(model, ids, PackedCache(model, "fp16")), expected), change
        assert generate(model, ids, PackedCache(model, "int4")).shape == expected.shape


SMALL = {"vocab_size": 97, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "pad_token_id": 0}
HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}


def t5():
    return AutoModelForSeq2SeqLM.from_config(T5Config(vocab_size=97, d_model=32, d_kv=16, num_layers=1, num_heads=2, d_ff=32))


def bart():
    return AutoModelForSeq2SeqLM.from_config(BartConfig(**SMALL, **HEADS))


def whisper():
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return WhisperForConditionalGeneration(WhisperConfig(**SMALL, **HEADS, **tokens, num_mel_bins=8))


@pytest.mark.parametrize("make_model", [t5, bart, whisper])
def test_encoder_decoders_are_refused_untouched(make_model):
    model = make_model()
    for attempt in (
        lambda: PackedCache(model, "int4"),
        lambda: make_default(model, "int4"),
        lambda: calibrate(model, torch.randint(2, 90, (1, 9)), "nuq4"),
        lambda: disable(model),
    ):
        with pytest.raises(UnsupportedModelError, match="is an encoder-decoder"):
            attempt()
    assert not traces(model) and model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("gpt2", "not the name 'gpt2'; load one"),
        (None, "not None"),
        (3, "not a int"),
        (nn.Linear(2, 2), "not a torch Linear"),
        ("data parallel", "not a torch DataParallel; pass its .module"),
        ("pipeline", "not a .*Spoken; pass its .model"),
    ],
)
def test_what_is_no_model_is_named(tiny, given, said):
    class Spoken:
        model = tiny()

    given = {"data parallel": nn.DataParallel(tiny()), "pipeline": Spoken()}.get(given, given) if given else given
    for attempt in (
        lambda: PackedCache(given, "int4"),
        lambda: make_default(given, "int4"),
        lambda: calibrate(given, torch.randint(2, 90, (1, 9)), "nuq4"),
        lambda: disable(given),
    ):
        with pytest.raises(UnsupportedModelError, match=said):
            attempt()


@pytest.mark.parametrize("kind", [AutoModel, AutoModelForSequenceClassification, AutoModelForQuestionAnswering])
def test_a_model_without_a_language_head_is_served_but_not_calibrated(kind, tiny):
    whole, ids = tiny("qwen2"), torch.randint(2, 97, (2, 40))
    whole.config.pad_token_id = 0
    model = kind.from_config(whole.config).eval()
    model.get_decoder().load_state_dict(whole.model.state_dict())
    for attempt in (lambda: calibrate(model, ids, "nuq4"), lambda: measure(model, ["int4"], ids)):
        with pytest.raises(UnsupportedModelError, match=f"{type(model).__name__} predicts no tokens"):
            attempt()
    assert not traces(model)
    with torch.inference_mode():
        plain, ours = DynamicCache(config=model.config), PackedCache(model, "fp16")
        for part in ids.split(25, dim=1):
            expected, found = model(part, past_key_values=plain), model(part, past_key_values=ours)
            torch.testing.assert_close(found[0], expected[0])
        cache = PackedCache(model, calibrate(whole, ids, "nuq4"))
        assert model(ids, past_key_values=cache)[0].isfinite().all() and cache.length == 40


def test_a_compiled_model_is_the_model_in_it(tiny):
    model, ids = tiny(), torch.randint(2, 97, (1, 20))
    wrapped = torch.compile(model, backend="eager")
    make_default(wrapped, "int4")
    with torch.inference_mode():
        found = wrapped.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, return_dict_in_generate=True)
    assert isinstance(found.past_key_values, PackedCache)
    assert PackedCache(wrapped, calibrate(wrapped, ids, "nuq4")).get_seq_length() == 0
    disable(wrapped)
    assert not traces(model)


def test_more_tokens_than_positions_warn_once(tiny):
    model, ids = tiny(), torch.randint(2, 97, (1, 17))
    model.config.max_position_embeddings = 16
    with pytest.warns(NarrowKVWarning, match="17 tokens are more than the 16 positions"):
        model(ids, past_key_values=PackedCache(model, "int4"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", NarrowKVWarning)
        model(ids, past_key_values=PackedCache(model, "int4"))


def test_offloaded_weights_are_reported(tiny):
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(tiny(), execution_device="cpu")
    with pytest.raises(UnsupportedModelError, match="weights are offloaded"):
        PackedCache(model, "int4")
