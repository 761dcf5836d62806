"""The cache of examples/minimal.py is the package's own, without speed."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from examples.minimal import Cache, pack, unpack

from narrowkv import get_recipe
from narrowkv.attention import AttentionInputs, AttentionMask, Rope, tiled
from narrowkv.codec import Quantizer
from narrowkv.store import LayerStore


@pytest.mark.parametrize("chunks", [(63,), (64, 1), (200, 1, 1, 70)])
@pytest.mark.parametrize("head_dim", [64, 80])
def test_it_attends_as_the_backend_torch_does(chunks, head_dim):
    recipe, tokens = get_recipe("nuq3"), sum(chunks)
    keys, values = torch.randn(2, 3, 2, tokens, head_dim)
    query = torch.randn(3, 4, 5, head_dim)
    codebooks = torch.randn(2, 8).sort().values.clamp(-1, 1)
    scale, zero = torch.rand(2, head_dim) + 0.5, torch.randn(2, head_dim)
    rope = Rope(1 / 10_000 ** (torch.arange(head_dim // 2) / (head_dim // 2)))
    store = LayerStore(
        Quantizer(recipe.keys, codebook=codebooks[0], scale=scale, zero=zero),
        Quantizer(recipe.values, codebook=codebooks[1]),
        recipe.sinks,
    )
    cache = Cache(codebooks[0], codebooks[1], scale, zero, rope.inverse_frequencies)
    for new_keys, new_values in zip(keys.split(chunks, 2), values.split(chunks, 2), strict=True):
        store.append(new_keys, new_values)
        cache.append(new_keys, new_values)

    stored = store.read()
    for ours, theirs in zip(cache.read(), stored, strict=True):
        assert torch.equal(ours, theirs)
    positions = torch.arange(tokens).expand(3, -1)
    inputs = AttentionInputs(
        query=rope.rotate(query, positions[:, -5:]),
        past=tokens,
        new=None,
        rope=rope,
        rope_state=positions,
        mask=AttentionMask(),
        scaling=head_dim**-0.5,
    )
    torch.testing.assert_close(cache.attend(query), tiled.attend(inputs, store), atol=1e-5, rtol=1e-5)


def test_packing_and_unpacking():
    codes = torch.randint(8, (3, 5, 64), dtype=torch.uint8)
    assert sum(plane.nbytes for plane in pack(codes)) == codes.numel() * 3 // 8
    assert torch.equal(unpack(pack(codes)), codes)


def test_the_minimal_example_runs():
    script = Path(__file__).parents[1] / "examples" / "minimal.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=True)
    bits = float(done.stdout.split()[0])
    assert 3.1 < bits < 3.4
