"""The notebook runs as it stands, and prints what its text says."""

import json
import re
from pathlib import Path

NOTEBOOK = json.loads((Path(__file__).parents[1] / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))
CELLS = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    names, printed = {}, {}
    for cell in CELLS:
        code = "".join(cell["source"])
        exec(compile(code, cell["id"], "exec"), names)
        printed |= dict.fromkeys(
            (call for call in ("generate(", "explain(", "measure(") if call in code), capsys.readouterr().out
        )
    assert "silent harbour" in printed["generate("] and "PackedCache(narrow3" in printed["generate("]
    short, long = map(float, re.match(r"([\d.]+) bits.*, ([\d.]+) in the long one", printed["explain("]).groups())
    assert short > long
    rows = {name: float(kld) for name, kld in re.findall(r"^(\S+) +\S+ bits +KLD (\S+)", printed["measure("], flags=re.M)}
    assert rows["narrow4"] < rows["narrow3"] < rows["narrow2"] and rows["narrow3"] < rows["int3"]
    assert len(names["axes"].collections) == len(rows)


def test_the_notebook_is_one_of_jupyter_without_outputs():
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in NOTEBOOK["cells"]}) == len(NOTEBOOK["cells"])
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CELLS)
