"""Write docs/models.md: which architectures are served, in which modes, how they rotate. python tools/list_models.py"""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from rich.progress import track  # noqa: E402
from tests.families import DENSE, FAMILIES, MODES, REFUSED, compare_modes, make  # noqa: E402

from narrowkv.attention import Rope  # noqa: E402
from narrowkv.integrations.preparation import prepare  # noqa: E402

HEAD = """# Models

There is no list of supported names. When its first cache is created, a model is run on 12 tokens to find its attention
modules and their rotary embeddings. Each module is then run again through NarrowKV's hooks, and its output must be the
same.

These architectures are tested with tiny random models (`tests/integrations/test_families.py`), since trained
checkpoints were not available. The table says whether the exact recipe generates the same tokens as `DynamicCache`:

- "padded" is a batch of 3 with 9, 0 and 53 tokens of left padding;
- "beam" uses 3 beams on that batch;
- a dash means that transformers 5.23 does not support this mode for the architecture.

Two more properties are tested for each architecture: the logits with keys stored before the rotary embedding and
rotated when read, and calibrated caches of 4 and 2 bits. `python tools/list_models.py` writes this page.

"""
DENSE_HEAD = """
## With the dense backend
These models compute attention themselves, so the default backends refuse them with the reason. With `backend="dense"`,
the cache has the same size, but passes dequantized tensors to the model at every step. Keys are quantized after the
rotary embedding (`nuq3-1%-postrope`).

"""
CLOSING = """
## Refused
These are refused when the cache is created, with an error that contains the words below:

"""


def describe_rope(name: str) -> str:
    """The rotary embeddings of a model's layers, in words."""
    words = []
    for layer in prepare(make(name)).attention:
        if layer.rope is None:
            words.append("none")
            continue
        pairs = "interleaved" if layer.rope.interleaved else "halves"
        if isinstance(layer.rope, Rope):
            share = 2 * len(layer.rope.inverse_frequencies) / layer.head_dim
            words.append(pairs + ("" if share == 1 else f", {share:.0%} of head_dim"))
        else:
            words.append(f"{pairs}, angles stored by token")
    return words[0] if len(set(words)) == 1 else "; ".join(words)


def table(names: list[str], describe: bool) -> str:
    """A row for each architecture, a column for each mode."""
    heads = ["architecture", *(["rotary embedding"] if describe else []), *MODES]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name in track(names, "Models"):
        cells = [f"`{name}`", *([describe_rope(name)] if describe else [])]
        marks = {True: "equal", False: "**differs**", None: "-"}
        lines.append(f"| {' | '.join([*cells, *(marks[equal] for equal in compare_modes(name).values())])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    served = table(list(FAMILIES), True) + DENSE_HEAD + table(list(DENSE), False)
    refused = "\n".join(f'- `{name}`: "{words}"' for name, (_, words) in REFUSED.items())
    (ROOT / "docs" / "models.md").write_text(HEAD + served + CLOSING + refused + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
