import pytest
import torch

from narrowkv import PackedCache, calibrate, explain, get_recipe


@pytest.mark.parametrize("options", [{}, {"residual_length": 10, "sinks": 3}], ids=["plain", "window and sinks"])
def test_explained_bytes_add_up_to_the_cache(tiny, options):
    model = tiny()
    recipe = get_recipe("nuq3-1%").with_options(**options)
    cache = PackedCache(model, calibrate(model, torch.randint(2, 97, (2, 50)), recipe))
    with torch.inference_mode():
        model(torch.randint(2, 97, (2, 150)), past_key_values=cache)
    found = explain(cache)
    assert found.nbytes == cache.nbytes
    assert len(found.layers) == 2
    codes = found.layers[0]["codes"]
    assert codes == 2 * 2 * 2 * 128 * 2 * 16 * 3 // 16  # sides, batch, heads, tokens in blocks, head_dim, bits
    assert (found.layers[0]["window"] > 0) == bool(options)
    assert found.layers[0]["sinks"] > 0
    table = str(found).splitlines()
    assert table[0].startswith("nuq3-1%: ") and f"{cache.nbytes:,} bytes" in table[0]
    assert len({len(line) for line in table[1:]}) == 1
