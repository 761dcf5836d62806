"""What differs between versions of transformers."""

import pytest
import torch
from transformers import DynamicCache

from narrowkv import PackedCache, disable, make_default
from narrowkv.integrations.versions import CACHE, NAMES, cache_of, keeps_nothing

# transformers takes the other name too, from the version on that renamed it
TAKEN = NAMES if CACHE == "cache" else [CACHE]


def test_the_cache_is_found_by_either_name():
    cache = DynamicCache()
    assert all(cache_of({"use_cache": True, name: cache}) is cache for name in NAMES)
    assert cache_of({"past_key_values": None, "cache": None}) is None


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_model_takes_and_gives_the_cache_by_every_name_that_it_knows(tiny, name):
    model, ids = tiny(), torch.randint(2, 97, (1, 20))
    cache = PackedCache(model, "int4")
    with torch.no_grad():
        assert getattr(model(ids, **{name: cache}), name) is cache
    assert cache.get_seq_length() == 20


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_default_yields_to_a_cache_given_by_any_name(tiny, name):
    model, ids = tiny(), torch.randint(2, 97, (1, 20))
    make_default(model, "int4", scoring=True)
    own = DynamicCache(config=model.config)
    with torch.no_grad():
        model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0, **{name: own})
        assert own.get_seq_length() == 21
        model(ids[:, :1], **{name: own})
        assert own.get_seq_length() == 22
    disable(model)


def test_layers_that_store_keys_are_not_taken_for_placeholders(tiny):
    assert not any(keeps_nothing(layer) for layer in DynamicCache(config=tiny().config).layers)
