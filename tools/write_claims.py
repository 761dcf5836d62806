"""Write the sentences of README.md and docs that have figures, and CLAIMS.md, from results/claims.json: `make results`.

Every figure is computed from the committed files of results, which say by which command, where and when they were made.
"""

from pathlib import Path

from narrowkv.evaluate.claims import MODELS, OUT, Claim, Claims, Run, read_claims
from narrowkv.evaluate.results import read_result
from pages import ROOT, hardware, markdown, replace_block, source

PAGE = "CLAIMS.md"
PEERS = Path("results") / "peers" / "qwen2.5-coder-0.5b.json"
INTRODUCTION = """# Claims

What the pages of NarrowKV state of memory, accuracy and speed, the command behind it, and where and when it ran.
`narrowkv replay NAME` runs the command again in a clone and compares the figures. `narrowkv replay --all --here` runs short
forms of all commands, within wider tolerances. `make results` writes this page from `results/claims.json`.

"""


def write_sentences(claims: Claims, root: Path) -> None:
    """Write each sentence with its figures between the marks `<!-- NAME:begin -->` and `<!-- NAME:end -->` of its page."""
    for claim in claims.claims.values():
        if claim.is_sentence:
            replace_block(root / claim.page, claim.name, claim.written(claims.rows(claim)))


def write_peers(root: Path) -> None:
    """The table of other methods in docs/accuracy.md, on encyclopedia text and code."""
    result = read_result(ROOT / PEERS, "peers")
    rows = [row for row in result["rows"] if row["terms"] == "ours"]
    lines = [[row["peer"], f"{row['bits']:.2f}", f"{row['encyclopedia']:.3f}", f"{row['code']:.3f}"] for row in rows]
    table = markdown(["method", "true bits", "divergence on encyclopedia text", "on code"], lines)
    windows = f"Qwen2.5-Coder-0.5B, {result['settings']['windows']} windows of 512 tokens of each text."
    replace_block(root / "docs" / "accuracy.md", "peers", f"{table}\n{windows} {source(result)}\n")


def write_page(claims: Claims, root: Path) -> None:
    """CLAIMS.md: a row for each claim."""
    heads = ["name", "claim", "page", "command", "hardware", "date", "results", "status"]
    table = markdown(heads, [cells(claims, claim) for claim in claims.claims.values()])
    (root / PAGE).write_text(INTRODUCTION + table, encoding="utf-8")


def cells(claims: Claims, claim: Claim) -> list[str]:
    """A claim's row."""
    runs = claims.runs_of(claim)
    results = [claims.result(run) for run in runs]
    return [
        f"`{claim.name}`",
        " ".join(claim.written(claims.rows(claim)).split()),
        f"`{claim.plot or claim.page}`",
        "<br>".join(f"`{readable(run)}`" for run in runs),
        "<br>".join(dict.fromkeys(hardware(result) for result in results)),
        "<br>".join(dict.fromkeys(result["date"] for result in results)),
        "<br>".join(f"`{run.result}`" for run in runs),
        claims.status(claim),
    ]


def readable(run: Run) -> str:
    """A run's command with names of folders."""
    folder = run.result.removesuffix(f"/{run.writes}")
    return run.command.replace(OUT, folder).replace(MODELS, "MODELS")


def write_all(root: Path) -> None:
    """All of them."""
    claims = read_claims(ROOT)
    write_sentences(claims, root)
    write_peers(root)
    write_page(claims, root)


if __name__ == "__main__":
    write_all(ROOT)
