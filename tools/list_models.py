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

When its first cache is made, a model is run on 12 tokens to find its attention modules and how each rotates its keys; every
module is then run again with our handles in place of tensors, and must compute the same. There is no list of names. These
architectures are tested with tiny random models (`tests/integrations/test_families.py`; trained checkpoints were not at hand):
with the exact recipe, are the tokens those of `DynamicCache`? "padded" is a batch of 3 with 9, 0 and 53 tokens of left
padding, "beam" 3 beams on that batch. Tested for each besides: logits with keys stored before the rotary embedding and rotated
when read, and calibrated caches of 4 and 2 bits. A dash: transformers 5.23 cannot do that for this architecture itself.
`python tools/list_models.py` writes this page.

"""
DENSE_HEAD = """
## On the dense path
These compute attention by themselves, so the packed path is refused and says so. With `backend="dense"`, chosen by name, the
cache is as small as ever, but hands dequantized tensors to the model at every step. Keys are quantized after the rotary
embedding (`nuq3-1%-postrope`).

"""
CLOSING = """
## Refused
When the cache is made, with a sentence that contains these words:

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
