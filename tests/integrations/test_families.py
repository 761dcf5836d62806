"""Over many architectures, found by the probe: the exact recipe gives the tokens of DynamicCache in every mode, and keys that
are stored before the rotary embedding come back rotated right.
"""

import pytest
import torch
from tests.families import FAMILIES, make
from transformers import DynamicCache

from narrowkv import PackedCache, Recipe, Scheme

MODES = {
    "greedy": {},
    "padded": {},
    "beam": {"num_beams": 3},
    "chunked prefill": {"prefill_chunk_size": 10},
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
}
EIGHT_BITS = Recipe(
    "eight", keys=Scheme(8, "int", axis="token_head", pre_rope=True), values=Scheme(8, "int", axis="token_head")
)


def prompt(mode):
    torch.manual_seed(1)
    ids = torch.randint(2, 9 if mode == "prompt lookup" else 97, (3, 40))
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    mask[2, :33] = 0
    return (ids, mask) if mode in ("padded", "beam") else (ids[:1], mask[1:2])


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family):
    model = make(family)
    for mode, options in MODES.items():
        ids, mask = prompt(mode)
        tokens = []
        for cache in (DynamicCache(config=model.config), PackedCache(model, "fp16")):
            with torch.inference_mode():
                found = model.generate(
                    ids,
                    attention_mask=mask,
                    past_key_values=cache,
                    max_new_tokens=24,
                    do_sample=False,
                    pad_token_id=0,
                    **options,
                )
            tokens.append(found)
        assert torch.equal(*tokens), f"{family}, {mode}"
    ids, _ = prompt("greedy")
    with torch.inference_mode():
        expected = model(ids, use_cache=False).logits.log_softmax(-1)
        found = model(ids, past_key_values=PackedCache(model, EIGHT_BITS, strict=True)).logits.log_softmax(-1)
    divergence = (expected.exp() * (expected - found)).sum(-1).mean()
    assert divergence < 0.02, f"{family}: rounding to 8 bits moves the predictions by {divergence:.3f} nats"
