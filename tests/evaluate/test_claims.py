"""The file of claims: what it says, and that nothing forged in it is run, read or written."""

import json

import pytest
from tests.evaluate.claims import CLAIM, write_clone

from narrowkv.errors import FileFormatError
from narrowkv.evaluate.claims import find_root, read_claims, split_command


def test_a_claim_is_read_and_written_with_its_figures(tmp_path):
    found = read_claims(write_clone(tmp_path))
    claim = found.claims["toy"]
    assert claim.is_sentence and claim.written(found.rows(claim)) == "A cache takes 1,000 bytes,\nall told."
    assert found.runs_of(claim) == [found.runs["plan"]] and found.status(claim) == "replayed in CI"
    assert found.runs["plan"].models() == []
    found = read_claims(
        write_clone(tmp_path, run={"here": "narrowkv plan {models}/tiny --out {out}", "status": "needs a GPU"})
    )
    assert found.runs["plan"].models() == [] and found.status(found.claims["toy"]) == "needs a GPU"


def test_without_a_short_form_the_command_is_the_short_form(tmp_path):
    write_clone(tmp_path)
    path = tmp_path / "results" / "claims.json"
    content = json.loads(path.read_text())
    del content["runs"]["plan"]["here"]
    path.write_text(json.dumps(content))
    run = read_claims(tmp_path).runs["plan"]
    assert run.here == run.command


def test_a_figure_without_its_rows_is_not_written(tmp_path):
    found = read_claims(write_clone(tmp_path, figure={"rows": {"recipe": "int2"}}))
    with pytest.raises(FileFormatError, match="figure bytes of the claim toy lacks rows"):
        found.claims["toy"].written(found.rows(found.claims["toy"]))


@pytest.mark.parametrize(
    "command",
    [
        "narrowkv demo --json {out}/demo.json",
        "python -m benchmarks.real_models {models}/qwen2.5-coder-0.5b --recipes nuq4-1% narrow4.55 --out {out}",
        "python -m benchmarks.peers {models}/a --peers 'KVarN, 4 bits' --out {out}",
        "narrowkv plan narrowkv://demo --out={out}",
    ],
)
def test_commands_of_ours_are_split(command):
    assert " ".join(split_command(command)) == command.replace("'", "")


@pytest.mark.parametrize(
    "command",
    [
        "",
        "rm -rf {out}",
        "/bin/narrowkv plan --out {out}",
        "python evil.py --out {out}",
        "python -c pass --out {out}",
        "python -m",
        "python -m http.server --out {out}",
        "python -m benchmarks --out {out}",
        "python -m benchmarks.a.b --out {out}",
        "python -m benchmarks...os --out {out}",
        "python3 -m benchmarks.peers --out {out}",
        "narrowkv plan x --out {out}; rm -rf /",
        "narrowkv plan x --out {out} && true",
        "narrowkv plan $(id) --out {out}",
        "narrowkv plan `id` --out {out}",
        "narrowkv plan $HOME --out {out}",
        "narrowkv plan ~/x --out {out}",
        "narrowkv plan * --out {out}",
        "narrowkv plan x --out {out} > y",
        "narrowkv plan x\n --out '{out}\n'",
        "narrowkv plan /etc/passwd --out {out}",
        "narrowkv plan ../x --out {out}",
        "narrowkv plan x --out {out}/../..",
        "narrowkv plan x --out={out} --text=/etc/passwd",
        "narrowkv plan x --recipes a,/etc/passwd --out {out}",
        "narrowkv plan {home} --out {out}",
        "narrowkv plan 'x --out {out}",
        "narrowkv plan ü --out {out}",
    ],
)
def test_other_commands_are_refused(command, tmp_path):
    with pytest.raises(FileFormatError, match=r"neither `narrowkv|is not a plain option|quotes in pairs"):
        split_command(command)
    with pytest.raises(FileFormatError):
        read_claims(write_clone(tmp_path, run={"here": command}))


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"run": {"result": "../plan.json"}}, "outside of its folder"),
        ({"run": {"writes": "/etc/passwd"}}, "outside of its folder"),
        ({"run": {"writes": ""}}, "outside of its folder"),
        ({"run": {"result": "results/\0"}}, "outside of its folder"),
        ({"run": {"status": "believed"}}, "has the status 'believed'"),
        ({"run": {"command": "narrowkv plan x"}}, "does not write into"),
        ({"run": {"command": ["narrowkv"]}}, "'command' of the run plan is no str"),
        ({"run": {"shell": True}}, "unknown entries, shell"),
        ({"claim": {"page": "../README.md"}}, "outside of the clone"),
        ({"claim": {"plot": "/x.svg"}}, "outside of the clone"),
        ({"claim": {"sentence": ["{other}"]}}, "has no figures other"),
        ({"claim": {"sentence": "text"}}, "is no list"),
        ({"claim": {"sentence": [1]}}, "not all text"),
        ({"claim": {"figures": {}}}, "has no figures"),
        ({"claim": {"figures": {"bytes": None}}}, "is no object"),
        ({"figure": {"run": "other"}}, "runs that there are not, other"),
    ],
)
def test_forged_claims_are_refused(parts, words, tmp_path):
    with pytest.raises(FileFormatError, match=words) as error:
        read_claims(write_clone(tmp_path, **parts))
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["", "..", "a/b", "A", "-x", "x -->"])
def test_names_are_of_small_letters(name, tmp_path):
    path = write_clone(tmp_path) / "results" / "claims.json"
    content = json.loads(path.read_text())
    for kind in ("runs", "claims"):
        path.write_text(json.dumps(content | {kind: {name: next(iter(content[kind].values()))} | content[kind]}))
        with pytest.raises(FileFormatError, match="not of small letters"):
            read_claims(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format": "narrowkv-result"}', json.dumps({"claims": {"toy": CLAIM}})])
def test_a_file_of_something_else_is_refused(text, tmp_path):
    write_clone(tmp_path)
    (tmp_path / "results" / "claims.json").write_text(text)
    with pytest.raises(FileFormatError, match=r"damaged|not a file of claims"):
        read_claims(tmp_path)


def test_the_clone_is_found_from_within_and_nothing_else_is_one(tmp_path):
    inside = write_clone(tmp_path) / "benchmarks"
    assert find_root(inside) == tmp_path
    (tmp_path / "results" / "claims.json").unlink()
    with pytest.raises(FileFormatError, match="in no clone of NarrowKV"):
        find_root(inside)
