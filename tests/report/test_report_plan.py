"""Tables and plot of a plan, from its file alone."""

from narrowkv import get_recipe
from narrowkv.evaluate.results import ResultFile, read_result
from narrowkv.plan import Budget, plan, read_shape
from narrowkv.plan.planner import KIND
from narrowkv.report.plan import length, sections
from narrowkv.report.plots import save


def made(path, model, recipes, contexts, budget):
    shape = read_shape(model)
    results = ResultFile(path, KIND, "", shape.to_dict() | budget.to_dict() | {"contexts": contexts})
    plan(shape, [get_recipe(name) for name in recipes], contexts, budget, results)
    return read_result(path)


def test_longest_context_and_bytes_in_a_capacity(tmp_path):
    budget = Budget(batch=2, devices=16, memory=2 * 10**9, reserve=10**8)
    result = made(tmp_path / "plan.json", "llama-3-8b", ["fp16", "int2"], [1000, 2**20], budget)
    (section,) = sections(result)
    longest, contexts = section.tables
    assert "8, so each is stored 2 times" in section.text and "8 KV heads x 128" in section.text
    assert longest.columns == ["recipe", "tokens", "times fp16"]
    assert [row[0] for row in longest.rows] == ["fp16", "int2"]
    assert longest.rows[0][2] == 1 and 16 / 2.26 < longest.rows[1][2] < 16 / 2.24  # one head of 128: a quarter of a bit on top
    assert [row[:2] for row in contexts.rows] == [["fp16", "1,000"], ["fp16", "1M"], ["int2", "1,000"], ["int2", "1M"]]
    save(section.plots[0].figure, tmp_path / "memory.svg")
    assert "what each GPU has" in (tmp_path / "memory.svg").read_text()


def test_without_a_limit_the_needed_bytes_are_reported(tmp_path):
    (section,) = sections(made(tmp_path / "plan.json", "narrowkv://demo", ["int4"], [2**15], Budget()))
    (contexts,) = section.tables
    assert contexts.columns == ["recipe", "context", "prompt MiB", "decoding MiB", "with weights MiB"]
    nbytes = 2 * 2**15 * 2 * 64 * 4 * (4 + 32 / 128) / 8  # codes, and a scale and a zero point for each token of 128 elements
    assert nbytes / 2**20 < contexts.rows[0][2] < 1.001 * nbytes / 2**20
    assert sections({"rows": [], "settings": {}}) == []


def test_lengths():
    assert [length(tokens) for tokens in (64, 1024, 131072, 2**20, 10**7)] == ["64", "1K", "128K", "1M", "10,000,000"]
