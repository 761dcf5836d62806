"""Variants of the trellis-coded form, on real models: `python -m benchmarks.forms MODEL [MODEL ...] --out results/forms`.

Keys (before the rotary embedding) and values are quantized by hooks and at once dequantized, all but the first token; what is
printed is the strict divergence, the mean over tokens of KL(exact || quantized), on windows of encyclopedia text and of source
code. Learned from a mix of both. True bits count codes, norms and exact elements; not tables. For models in the shape of
Llama, Qwen 2 and Gemma 3. One file for each model, which goes on where it was interrupted; about a minute for each row and
model. benchmarks/form_parts.py has the form, benchmarks/form_tables.py its tables.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.form_parts import Key, Samples, Side, Variant, allocate
from benchmarks.real_models import LEARNED_CODE, SAMPLES, SCORED_CODE, SPREAD, TEXTS, WINDOW, code
from narrowkv import load_model
from narrowkv.evaluate.perplexity import divergences
from narrowkv.evaluate.results import environment
from narrowkv.evaluate.sources import read_text
from narrowkv.evaluate.windows import cut_windows
from narrowkv.files import write_json

BASE = Variant()
# name, bits, variant
ROWS: list[tuple[str, float, Variant]] = [
    *((f"the form, {bits} bits", bits, BASE) for bits in (2.04, 2.54, 3.04)),
    *((f"with 0.5% exact, {bits} bits", bits, replace(BASE, outliers=0.005)) for bits in (3.04, 3.54, 4.04, 4.54)),
    ("the form, 4.04 bits", 4.04, BASE),
    ("keys alone", 2.04, replace(BASE, sides="k")),
    ("values alone", 2.04, replace(BASE, sides="v")),
    ("keys before the rotation", 2.04, replace(BASE, frame=0)),
    ("keys in frames of 64", 2.04, replace(BASE, frame=64)),
    ("keys after the rotation", 2.04, replace(BASE, frame=-1)),
    ("gradients of the text's tokens", 2.04, replace(BASE, labels="text")),
    ("gradients of drawn tokens", 2.04, replace(BASE, labels="drawn")),
    ("values not made unbiased", 2.04, replace(BASE, gain_values=0.0)),
    ("keys made unbiased too", 2.04, replace(BASE, gain_keys=1.0)),
    ("search without weights", 2.04, replace(BASE, weighted=False)),
    ("without token norms", 2.04, replace(BASE, token_norm=False)),
    ("without shrinkage", 2.04, replace(BASE, shrinkage=0.0)),
    ("values count 1.5 times", 2.04, replace(BASE, value_weight=1.5)),
    ("0.25% exact", 2.04, replace(BASE, outliers=0.0025)),
    ("0.25% exact", 3.04, replace(BASE, outliers=0.0025)),
    ("table of 256 in float32", 2.04, replace(BASE, table="full", grid=0)),
    ("window of 4 bits", 2.04, replace(BASE, table="full", grid=0, state_bits=4)),
    ("window of 6 bits", 2.04, replace(BASE, table="full", grid=0, state_bits=6)),
    ("window of 10 bits", 2.04, replace(BASE, table="full", grid=0, state_bits=10)),
    ("units of 4 channels", 2.04, replace(BASE, unit=4)),
    ("units of 16 channels", 2.04, replace(BASE, unit=16)),
    *((f"tables of {texts} alone", 2.04, replace(BASE, texts=texts)) for texts in ("encyclopedia", "code")),
    *(
        (f"tables of {texts} alone, 0.25% exact", 3.04, replace(BASE, texts=texts, outliers=0.0025))
        for texts in ("encyclopedia", "code")
    ),
    ("four rounds of learning", 2.04, replace(BASE, rounds=4)),
]


class Subject:
    """A model, what is learned from, and what is scored."""

    def __init__(self, name: str, windows: int) -> None:
        self.model, tokenizer = load_model(name, "float32")
        self.model.requires_grad_(False)
        config: Any = self.model.config
        self.head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        prose, source = read_text(str(TEXTS / "wikitext2-valid.tokens.txt")), code(LEARNED_CODE)
        self.samples = self._capture(cut_windows(tokenizer, [prose, source], WINDOW, SAMPLES))
        texts = {"encyclopedia": read_text(str(TEXTS / "wikitext2-test.raw.txt")), "code": code(SCORED_CODE)}
        self.scored = {kind: cut_windows(tokenizer, text, WINDOW, windows, spread=SPREAD) for kind, text in texts.items()}
        with torch.inference_mode():
            self.exact = {kind: [self._logits(row).half() for row in rows] for kind, rows in self.scored.items()}

    def _logits(self, ids: Tensor) -> Tensor:
        return self.model(ids[None], use_cache=False).logits[0, :-1]

    def _modules(self) -> Iterator[tuple[Key, nn.Module]]:
        """What gives keys before the rotary embedding, and values."""
        for layer, block in enumerate(self.model.model.layers):
            attention = block.self_attn
            yield (layer, "k"), getattr(attention, "k_norm", attention.k_proj)
            yield (layer, "v"), attention.v_proj

    @contextmanager
    def _hooked(self, function: Callable[[Key, Tensor], Tensor | None]) -> Iterator[None]:
        hooks = [
            module.register_forward_hook(lambda _module, _inputs, output, key=key: function(key, output))
            for key, module in self._modules()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _by_head(self, x: Tensor) -> Tensor:
        """[1, heads, tokens, head_dim] or [1, tokens, heads * head_dim] -> [heads, tokens, head_dim]."""
        return x[0] if x.dim() == 4 else x[0].unflatten(-1, (-1, self.head_dim)).transpose(0, 1)

    def _capture(self, windows: Tensor) -> dict[Key, Samples]:
        """Keys, values and gradients of all windows but for their first tokens."""
        seen: dict[Key, dict[str, list[Tensor]]] = {key: {"x": [], "text": [], "drawn": []} for key, _ in self._modules()}
        generator = torch.Generator().manual_seed(0)
        for ids in windows:
            rope_state: dict[Key, Tensor] = {}

            def keep(key: Key, output: Tensor, rope_state: dict[Key, Tensor] = rope_state) -> None:
                output.retain_grad()
                rope_state[key] = output

            embedded = self.model.get_input_embeddings()(ids[None]).detach().requires_grad_(True)
            with self._hooked(keep):
                logits = self.model(inputs_embeds=embedded, use_cache=False).logits[0]
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
            for labels, tokens in (("text", ids[1:]), ("drawn", drawn)):
                loss = nn.functional.cross_entropy(logits[: len(tokens)], tokens, reduction="sum")
                gradients = torch.autograd.grad(loss, list(rope_state.values()), retain_graph=labels == "text")
                for key, gradient in zip(rope_state, gradients, strict=True):
                    seen[key][labels].append(self._by_head(gradient)[:, 1:])
            for key, output in rope_state.items():
                seen[key]["x"].append(self._by_head(output.detach())[:, 1:])
        joined = {key: [torch.stack(part) for part in parts.values()] for key, parts in seen.items()}
        return {
            key: Samples(x, text, drawn, self._angles(key) if key[1] == "k" else None)
            for key, (x, text, drawn) in joined.items()
        }

    def _angles(self, key: Key) -> Tensor:
        """[head_dim / 2]: radians by which a position rotates each pair of channels."""
        config: Any = self.model.config
        parameters = config.rope_parameters
        parameters = parameters if "rope_theta" in parameters else parameters[config.layer_types[key[0]]]
        return parameters["rope_theta"] ** (-torch.arange(0, self.head_dim, 2) / self.head_dim)

    def _divergence(self, kind: str) -> float:
        """Mean over the tokens of one kind of text."""
        rows = zip(self.exact[kind], self.scored[kind], strict=True)
        return torch.cat([divergences(exact, self._logits(ids)) for exact, ids in rows]).double().mean().item()

    def measure(self, bits: float, variant: Variant) -> dict[str, float]:
        """Strict divergence on each kind of text, and the bits of codes for keys and for values."""
        sides = {key: Side(samples, variant) for key, samples in self.samples.items() if key[1] in variant.sides}
        for key, rates in allocate(sides, bits - variant.overhead(self.head_dim), variant).items():
            sides[key].learn(rates)

        def quantize(key: Key, output: Tensor) -> Tensor | None:
            if key not in sides:
                return None
            x = self._by_head(output)
            left = torch.cat([x[:, :1], sides[key](x[:, 1:])], 1)
            return left[None] if output.dim() == 4 else left.transpose(0, 1).reshape(output.shape)

        with torch.inference_mode(), self._hooked(quantize):
            figures = {kind: self._divergence(kind) for kind in self.scored}
        spent = {side: [s.rates.float().mean() for key, s in sides.items() if key[1] == side] for side in variant.sides}
        return {
            **figures,
            **{f"bits_{side}": torch.stack(rates).mean().item() for side, rates in spent.items()},
        }


def run(name: str, options: argparse.Namespace) -> None:
    """All rows that a model's file lacks."""
    path = options.out / f"{Path(name).name}.json"
    saved = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"windows": options.windows, "rows": []}
    done = {(row["name"], row["bits"]) for row in saved["rows"]}
    missing = [row for row in ROWS if row[:2] not in done and (not options.rows or row[0] in options.rows)]
    subject = Subject(name, options.windows) if missing else None
    for label, bits, variant in missing:
        assert subject is not None
        figures = subject.measure(bits, variant)
        differs = {name: value for name, value in asdict(variant).items() if value != getattr(BASE, name)}
        saved["rows"].append({"name": label, "bits": bits, "differs": differs, **figures})
        saved["form"], saved["environment"] = asdict(BASE), environment()
        options.out.mkdir(parents=True, exist_ok=True)
        write_json(path, saved)
        shown = "  ".join(f"{kind} {figure:.4f}" for kind, figure in figures.items())
        print(f"{path.stem:24} {label:32} {bits:5.2f}  {shown}", flush=True)


def table(folder: Path) -> str:
    """Markdown: a line for each row, and for each model the divergence on encyclopedia text / source code."""
    files = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    names = [path.stem for path in sorted(folder.glob("*.json"))]
    lines = [f"| form | true bits | {' | '.join(names)} |", "|---" * (2 + len(names)) + "|"]
    for label, bits, _ in ROWS:
        found = [next((row for row in file["rows"] if (row["name"], row["bits"]) == (label, bits)), None) for file in files]
        if any(found):
            cells = [f"{row['encyclopedia']:.4f} / {row['code']:.4f}" if row else "" for row in found]
            lines.append(f"| {label} | {bits} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="folders of models, or hub ids")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", help="names of rows; by default all")
    parser.add_argument("--windows", type=int, default=2, help="scored of each text")
    options = parser.parse_args()
    for name in options.models:
        run(name, options)
    print(table(options.out))


if __name__ == "__main__":
    main()
