"""What is looked at, against the model's own projections and gradients; models without a rotary embedding; resumption."""

import json

import pytest
import torch
from tests.conftest import make_tiny
from tests.families import make

from narrowkv.errors import RecipeError, TextError, UnsupportedModelError
from narrowkv.evaluate.inspect import inspect
from narrowkv.evaluate.results import ResultFile, read_result
from narrowkv.report.inspect import sections

BATCHES = torch.randint(2, 97, (2, 1, 63), generator=torch.Generator().manual_seed(0))
LAYERS, CHANNELS, TOKENS = 2, 32, 63


def opened(folder):
    return ResultFile(folder / "inspect.json", "inspect", "narrowkv inspect", {})


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """The metrics of a tiny model, and what its projections give: [sequences, tokens, channels] and their gradients."""
    folder = tmp_path_factory.mktemp("inspect")
    steps = []
    inspect(make_tiny(), BATCHES, opened(folder), 1, "nuq3", on_step=lambda *step: steps.append(step))
    assert steps == [(i + 1, 4) for i in range(4)]
    model = make_tiny()
    found = {(layer, name): ([], []) for layer in range(LAYERS) for name in ("keys", "values")}

    def keep(layer, name):
        def hook(module, inputs, output):
            elements, gradients = found[layer, name]
            elements.append(output.detach())
            output.register_hook(gradients.append)

        return hook

    for i, layer in enumerate(model.model.layers):
        layer.self_attn.k_proj.register_forward_hook(keep(i, "keys"))
        layer.self_attn.v_proj.register_forward_hook(keep(i, "values"))
    for ids in BATCHES:
        logits = model(ids, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum").backward()
    naive = {place: tuple(torch.cat(part) for part in pair) for place, pair in found.items()}
    return folder, naive


def test_ranges_and_fisher_are_those_of_the_projections(seen):
    folder, naive = seen
    saved = opened(folder)
    for (layer, name), (elements, gradients) in naive.items():
        row = saved.find(what="layer", layer=layer, tensor=name)
        size = elements[:, 1:].abs().flatten()  # without the first token
        assert row["t100"] == pytest.approx(size.max().item(), rel=1e-4)
        assert row["t99"] == pytest.approx(size.quantile(0.99).item(), rel=0.02)
        assert row["t99"] <= row["t99.9"] <= row["t99.99"] <= row["t100"]
        assert row["first_token"] == pytest.approx(elements[:, 0].abs().max().item(), rel=1e-4)
        assert row["fisher"] == pytest.approx(gradients[:, 1:].square().mean().item(), rel=1e-3)
    assert saved.find(what="layer", layer=0, tensor="rotated")["t100"] > 0


def test_heat_maps_and_outliers_are_those_of_the_chosen_layer(seen):
    folder, naive = seen
    saved = opened(folder)
    for name in ("keys", "values"):
        elements = naive[1, name][0].abs()
        heat = saved.find(what="heat map", tensor=name)
        assert heat["layer"] == 1 and (heat["channels"], heat["tokens"]) == (CHANNELS, TOKENS)
        torch.testing.assert_close(torch.tensor(heat["magnitude"]), elements[0].T, rtol=1e-4, atol=1e-4)
        row = saved.find(what="outliers", tensor=name)
        beyond = (elements > row["beyond"] * (1 + 1e-5)).double()  # which is rounded
        torch.testing.assert_close(torch.tensor(row["by_channel"]), beyond.mean((0, 1)).float(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(torch.tensor(row["by_token"]), beyond.mean((0, 2)).float(), rtol=1e-4, atol=1e-4)
        fullest = beyond.sum((0, 1)).sort(descending=True).values[:3].sum() / beyond.sum()
        assert row["in_fullest_channels"] == pytest.approx(fullest.item(), rel=1e-4)


def test_distributions_have_their_codebooks(seen):
    saved = opened(seen[0])
    for name in ("keys", "values"):
        row = saved.find(what="distribution", tensor=name)
        assert sum(row["density"]) * 2 / len(row["density"]) == pytest.approx(1, rel=1e-4)
        assert sum(row["weight"]) * 2 / len(row["weight"]) == pytest.approx(1, rel=1e-4)
        assert len(row["codebook"]) == 8 and row["codebook"] == sorted(row["codebook"])


def test_an_interrupted_run_goes_on_and_a_finished_one_is_not_measured_again(seen, tmp_path):
    saved = json.loads((seen[0] / "inspect.json").read_text())
    path = tmp_path / "inspect.json"
    path.write_text(json.dumps({**saved, "rows": saved["rows"][:4]}))
    assert sections(read_result(path)) == []
    inspect(make_tiny(), BATCHES, opened(tmp_path), 1, "nuq3")
    assert json.loads(path.read_text())["rows"] == saved["rows"]
    inspect(make_tiny(), BATCHES, opened(tmp_path), 1, "nuq3", on_step=lambda *step: pytest.fail("measured again"))


def test_plots_draw_from_the_file_alone(seen):
    first, second = sections(read_result(seen[0] / "inspect.json"))
    assert [plot.name for plot in first.plots + second.plots] == [
        *("magnitude", "outliers", "distribution", "ranges", "fisher")
    ]
    assert "before the rotary embedding" in first.text and len(first.tables[0].rows) == 3
    assert len(second.tables[0].rows) == 3 * LAYERS
    titles = [axes.get_title() for axes in first.plots[0].figure.axes]
    assert titles[:3] == ["keys before RoPE", "keys after RoPE", "values"]


@pytest.mark.parametrize(("family", "options"), [("gpt2", {}), ("gptj", {"recipe": "nuq3-postrope", "backend": "dense"})])
def test_without_a_rotary_embedding_a_sentence_says_so(tmp_path, family, options):
    inspect(make(family), BATCHES, opened(tmp_path), **options)
    first, _ = sections(read_result(tmp_path / "inspect.json"))
    assert "no rotary embedding" in first.text and len(first.tables[0].rows) == 2
    assert [axes.get_title() for axes in first.plots[0].figure.axes][:2] == ["keys", "values"]


@pytest.mark.parametrize(
    ("arguments", "error", "cause"),
    [
        ((BATCHES, 2), UnsupportedModelError, "choose one of 0, 1"),
        ((BATCHES, 0, "int3"), RecipeError, "no codebook"),
        ((BATCHES, 0, "narrow3"), RecipeError, "no codebook"),
        ((BATCHES[:0],), TextError, "nothing to look at"),
        ((BATCHES[:, :, :2],), TextError, "3 tokens"),
    ],
)
def test_what_cannot_be_is_one_sentence(tmp_path, arguments, error, cause):
    batches, *rest = arguments
    with pytest.raises(error, match=cause):
        inspect(make_tiny(), batches, opened(tmp_path), *rest)
    assert not list(tmp_path.iterdir())
