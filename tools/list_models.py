"""Write docs/models.md: which architectures are served, and what the probe finds of each. python tools/list_models.py"""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.families import FAMILIES, REFUSED, make  # noqa: E402

from narrowkv.integrations.interface import prepare  # noqa: E402

HEAD = """# Models

The probe runs a model on 12 tokens when its first cache is made, and finds its attention modules and how each rotates its
keys. These are tested with tiny random models of two layers (`tests/integrations/test_families.py`): with the exact recipe the
greedy tokens are those of `DynamicCache`, also padded in a batch of 3, in beam search with 3 beams on that batch,
with prefill in chunks and with prompt lookup; and logits agree when keys are stored before the rotary embedding and rotated on
read. Trained checkpoints of these families were not at hand. `python tools/list_models.py` writes this page.

| architecture | rotary embedding | tested with |
|---|---|---|
"""


def describe_rope(name: str) -> str:
    """The rotary embeddings of the two layers, in words."""
    words = []
    for layer in prepare(make(name)):
        if layer.rope is None:
            words.append("none")
            continue
        share = 2 * len(layer.rope.inverse_frequencies) / layer.head_dim
        words.append(
            ("interleaved" if layer.rope.interleaved else "halves") + ("" if share == 1 else f", {share:.0%} of head_dim")
        )
    return words[0] if len(set(words)) == 1 else "; ".join(words)


def main() -> None:
    lines = []
    for name, settings in FAMILIES.items():
        traits = [
            word for key, word in (("num_experts", "experts"), ("sliding_window", "sliding window")) if settings.get(key)
        ]
        lines.append(f"| `{name}` | {describe_rope(name)} | {', '.join(traits) or '-'} |")
    refused = [f'- `{name}`: "{words}"' for name, (_, words) in REFUSED.items()]
    closing = "\nRefused when the cache is made, with a sentence that contains these words:\n\n" + "\n".join(refused) + "\n"
    (ROOT / "docs" / "models.md").write_text(HEAD + "\n".join(lines) + "\n" + closing, encoding="utf-8")


if __name__ == "__main__":
    main()
