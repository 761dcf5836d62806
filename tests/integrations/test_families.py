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
UNROTATED = Recipe("unrotated", keys=Scheme(16, "exact", pre_rope=True), values=Scheme(16, "exact"))


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
    ids, mask = prompt("padded")
    with torch.inference_mode():
        expected = model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
        found = model(ids, attention_mask=mask, past_key_values=PackedCache(model, UNROTATED, strict=True)).logits[mask.bool()]
    torch.testing.assert_close(found, expected, atol=5e-3, rtol=5e-3)
