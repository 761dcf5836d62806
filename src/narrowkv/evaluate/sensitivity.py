"""What the keys, and what the values, of each layer cost when nothing else is quantized."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from narrowkv.calibration import Calibration
from narrowkv.codec import Quantization, Quantizer, Scheme, Transform
from narrowkv.evaluate.perplexity import divergences
from narrowkv.integrations import PackedCache
from narrowkv.integrations.versions import CACHE
from narrowkv.methods import LayerSchemes


def parts(calibration: Calibration) -> dict[tuple[int, str], Calibration]:
    """One calibration for the keys and one for the values of each layer, all else exact."""
    exact = {
        layer: LayerSchemes(
            Scheme(Quantization(16, "exact"), Transform(pre_rope=keys.scheme.transform.pre_rope)),
            Scheme(Quantization(16, "exact")),
        )
        for layer, (keys, _) in calibration.layers.items()
    }
    exact_pairs = {layer: (Quantizer(pair.keys), Quantizer(pair.values)) for layer, pair in exact.items()}
    found = {}
    for layer, (keys, values) in calibration.layers.items():
        for side, pair in (("keys", (keys, exact_pairs[layer][1])), ("values", (exact_pairs[layer][0], values))):
            recipe = replace(calibration.recipe, layers=exact | {layer: LayerSchemes(pair[0].scheme, pair[1].scheme)})
            found[layer, side] = replace(calibration, recipe=recipe, layers=exact_pairs | {layer: pair})
    return found


@torch.inference_mode()
def part_losses(
    model: PreTrainedModel, calibration: Calibration, windows: Tensor, on_step: Callable[[int, int], None] | None = None
) -> dict[tuple[int, str], float]:
    """Strict KL(exact || quantized) in nats for each token, by layer and `keys` or `values`.

    windows: [n, tokens] int64. on_step: called with (steps done, steps in all).
    """
    sources = parts(calibration)
    sums, done = dict.fromkeys(sources, 0.0), 0
    for row in windows.to(model.device):
        baseline = model(row[None], use_cache=False).logits[0, :-1]
        for part, source in sources.items():
            cache = PackedCache(model, source, strict=True)
            logits = model(row[None], **{CACHE: cache}, use_cache=True).logits[0, :-1]
            sums[part] += divergences(baseline, logits).double().mean().item() / len(windows)
            done += 1
            if on_step:
                on_step(done, len(windows) * len(sources))
    return sums
