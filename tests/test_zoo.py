"""The batch of ready tables: tables, cards and results for each model, resumed, and pushed to a stand-in of the hub."""

import sys
from pathlib import Path

import pytest
import yaml

import narrowkv
from tests.conftest import make_tiny
from tests.letters import TEXT, make_letters

ROOT = Path(__file__).parents[1]


@pytest.fixture
def zoo(monkeypatch):
    """The tool, with a text for tiny models."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import zoo

    monkeypatch.setattr(zoo, "read_texts", lambda names: [TEXT])
    yield zoo
    sys.modules.pop("zoo")


@pytest.fixture
def batch(zoo, tmp_path):
    """Arguments of a run over a tiny model and one that does not exist."""
    model = tmp_path / "tiny"
    make_tiny().save_pretrained(model)
    make_letters().save_pretrained(model)
    models = [{"id": str(tmp_path / "absent"), "license": "mit"}, {"id": str(model), "license": "mit", "note": "random"}]
    (tmp_path / "zoo.yaml").write_text(yaml.safe_dump({"recipes": ["nuq3-1%", "nuq2"], "models": models}))
    short = ["--window", "64", "--samples", "2", "--scored", "2", "--device", "cpu"]
    return ["--list", str(tmp_path / "zoo.yaml"), "--out", str(tmp_path / "out"), *short]


@pytest.fixture
def uploads(monkeypatch):
    """What a stand-in of the hub was given: files by repository."""
    import huggingface_hub

    found = {}

    class Hub:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, private, exist_ok):
            found.setdefault(repo_id, [])

        def upload_folder(self, repo_id, folder_path, commit_message):
            found[repo_id] += sorted(path.name for path in Path(folder_path).iterdir())
            return f"https://hub.example/{repo_id}"

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    return found


def test_the_list_has_twenty_models_with_licenses(zoo):
    recipes, models = zoo.read_list(zoo.LIST)
    assert len({model["id"] for model in models}) == 20
    assert all(model["id"].count("/") == 1 and model["license"] for model in models)
    assert [narrowkv.get_recipe(recipe).name for recipe in recipes] == recipes


def test_tables_cards_and_uploads_are_made_once(zoo, batch, uploads, tmp_path, monkeypatch, capsys):
    assert zoo.main([*batch, "--push", "me"]) == 1
    assert "absent" in capsys.readouterr().out
    model, _ = narrowkv.load_model(str(tmp_path / "tiny"))
    for recipe in ("nuq3-1%", "nuq2"):
        folder = tmp_path / "out" / f"tiny-{recipe}"
        assert narrowkv.Calibration.from_pretrained(folder, model).recipe.name == recipe
        card = (folder / "README.md").read_text()
        _, head, _ = card.split("---\n", 2)
        assert yaml.safe_load(head)["license"] == "apache-2.0"
        assert "KLD" in card and "narrowkv://mix" in card and "License of the model**: mit" in card and "random" in card
        assert f'from_pretrained("me/tiny-{recipe}")' in card
    expected = {f"me/tiny-{recipe}": ["README.md", "narrowkv.safetensors"] for recipe in ("nuq3-1%", "nuq2")}
    assert uploads == expected

    monkeypatch.setattr(narrowkv, "calibrate_many", None)  # whatever is there is not learned again
    assert zoo.main([*batch, "--push", "me", "--only", "tiny"]) == 0
    assert uploads == expected
