"""A clone with claims of a toy model, whose commands run in a second or not at all."""

import json

RUN = {
    "command": "narrowkv plan narrowkv://demo --context 4K,8K --recipes fp16,int4 --out {out}",
    "here": "narrowkv plan narrowkv://demo --context 4K --recipes fp16,int4 --out {out}",
    "writes": "plan.json",
    "result": "results/plan.json",
    "status": "replayed in CI",
}
BYTES = {
    "run": "plan",
    "rows": {"recipe": "int4"},
    "within": {"contexts": {"tokens": 4096}},
    "field": "prompt",
    "format": ",.0f",
    "tolerance": 0.01,
}
CLAIM = {"page": "README.md", "sentence": ["A cache takes {bytes} bytes,", "all told."], "figures": {"bytes": BYTES}}
RESULT = {
    "format": "narrowkv-result",
    "format_version": 1,
    "kind": "plan",
    "command": "narrowkv plan",
    "seed": 0,
    "date": "2026-11-30",
    "settings": {},
    "environment": {"cores": 2, "processor": "abacus"},
    "rows": [{"recipe": "int4", "contexts": [{"tokens": 4096, "prompt": 1000}]}],
}


def write_clone(folder, run=None, claim=None, figure=None, result=None):
    """A clone whose claim differs from the usual one in some entries; returns its folder."""
    content = {
        "format": "narrowkv-claims",
        "format_version": 1,
        "runs": {"plan": RUN | (run or {})},
        "claims": {"toy": CLAIM | {"figures": {"bytes": BYTES | (figure or {})}} | (claim or {})},
    }
    (folder / "results").mkdir(exist_ok=True)
    (folder / "benchmarks").mkdir(exist_ok=True)
    (folder / "results" / "claims.json").write_text(json.dumps(content))
    (folder / "results" / "plan.json").write_text(json.dumps(RESULT | (result or {})))
    return folder
