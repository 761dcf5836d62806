"""What a stranger installs and meets: metadata, the workflows of continuous integration, forms."""

import re
from pathlib import Path

import pytest
import yaml

import narrowkv
from narrowkv.evaluate.results import openmp

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 does not read TOML")

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def read_yaml(*parts):
    return yaml.safe_load(ROOT.joinpath(*parts).read_text(encoding="utf-8"))


def test_the_package_is_typed():
    assert (Path(narrowkv.__file__).parent / "py.typed").exists()
    assert "Typing :: Typed" in PROJECT["project"]["classifiers"]


def test_the_matrix_has_every_python_that_is_promised():
    matrix = read_yaml(".github", "workflows", "test.yml")["jobs"]["test"]["strategy"]["matrix"]
    promised = [
        re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", line) for line in PROJECT["project"]["classifiers"]
    ]
    assert matrix["python"] == [found[1] for found in promised if found]
    assert matrix["python"][0] == PROJECT["project"]["requires-python"].removeprefix(">=")


def test_the_matrix_has_the_oldest_versions_that_are_promised():
    oldest, newest, *_ = read_yaml(".github", "workflows", "test.yml")["jobs"]["test"]["strategy"]["matrix"]["include"]
    promised = dict(line.split(">=") for line in PROJECT["project"]["dependencies"])
    low = {package: promised[package].split(",")[0] for package in ("torch", "transformers")}
    assert oldest["pins"].startswith(f"torch=={low['torch']}.* transformers=={low['transformers']}.*") and newest["pins"] == ""


def test_wheels_are_published_from_tags_without_a_secret():
    jobs = read_yaml(".github", "workflows", "wheels.yml")["jobs"]
    assert jobs["publish"]["permissions"] == {"id-token": "write"} and "refs/tags/v" in jobs["publish"]["if"]
    assert set(jobs["publish"]["needs"]) == {"wheels", "sdist"}
    text = (ROOT / ".github" / "workflows" / "wheels.yml").read_text(encoding="utf-8")
    assert "secrets." not in text and "password" not in text


@pytest.mark.parametrize("name", ["refused-model.yml", "bug.yml"])
def test_issue_forms_request_the_environment(name):
    form = read_yaml(".github", "ISSUE_TEMPLATE", name)
    asked = [part for part in form["body"] if "narrowkv env" in part["attributes"].get("label", "")]
    assert len(asked) == 1 and asked[0]["validations"]["required"]


def test_the_citation_is_of_this_version():
    cited = read_yaml("CITATION.cff")
    assert cited["version"] == narrowkv.__version__ and cited["license"] == PROJECT["project"]["license"]
    assert cited["repository-code"] == PROJECT["project"]["urls"]["Homepage"]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not tell which libraries are loaded")
def test_the_loaded_openmp_runtime_is_reported():
    found = openmp()
    assert found and all(re.search(r"lib(gomp|omp|iomp)", name) for name in found)
