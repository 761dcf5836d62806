"""Other people's methods on real models: `python -m benchmarks.peers MODEL [MODEL ...] --out results/peers`.

Each method is written again from its paper and code (benchmarks/peer_methods), fitted to the mix of encyclopedia text and
source code that benchmarks.real_models learns from, and applied to keys after the rotary embedding, with their bias, and to
values. Printed is the strict divergence, the mean over tokens of KL(exact || quantized), on WikiText-2's test part / on other
source code: once under our terms, where the first token alone is exact, on windows of 512 tokens like those of
benchmarks.real_models; and once under the published ones, where sinks and recent tokens are exact for each token as if it were
decoded, on the second half of a window of 2,048. Bits are all that a cache of 32,768 tokens holds: codes, scales, zero points,
norms, exact tokens at 16 bits, and tables of rotations. KIVI and KVQuant are recipes of the package: see
benchmarks.real_models.

For models in the shape of Llama, Qwen 2 and Gemma 3 with heads of 2^n channels. One file for each model, which goes on where
it was interrupted.
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks.peer_methods import block_gtq, kvarn, oscar, oscar_norms, quantized_cache, turboquant, wush_kv
from benchmarks.peer_methods.base import Pair, Statistics
from benchmarks.peer_model import Subject, Terms, true_bits
from narrowkv.evaluate.results import ResultFile, read_result

KIND = "peers"
OURS = Terms()


@dataclass(frozen=True)
class Peer:
    """A method of some width, how a layer of it is fitted, and its published terms."""

    name: str
    fit: Callable[[Statistics], Pair]
    published: Terms


KVARN, FLUSHED = Terms(sinks=kvarn.TILE, tile=kvarn.TILE), Terms(sinks=0, tile=quantized_cache.BUFFER)
VLLM, ALL_CODED = Terms(sinks=0, boundary=2), Terms(sinks=0)
PEERS = (
    Peer("OSCAR, 2 bits", oscar.fit, Terms(sinks=64, recent=256)),
    *(Peer(f"WUSH-KV, {width} bits", partial(wush_kv.fit, width=width), Terms(sinks=16, recent=128)) for width in (2, 3, 4)),
    Peer("KVarN, K4V2", partial(kvarn.fit, keys=4, values=2), KVARN),
    *(Peer(f"KVarN, {width} bits", partial(kvarn.fit, keys=width, values=width), KVARN) for width in (2, 3, 4)),
    Peer("OScaR, 2 bits", oscar_norms.fit, Terms(sinks=0, tile=oscar_norms.BUFFER)),
    Peer("Block-GTQ, K2V2", partial(block_gtq.fit, keys=2, values=2), ALL_CODED),
    Peer("Block-GTQ, K3V2", partial(block_gtq.fit, keys=3, values=2), ALL_CODED),
    *(Peer(f"Block-GTQ, {width} bits", partial(block_gtq.fit, keys=width, values=width), ALL_CODED) for width in (3, 4)),
    *(Peer(f"TurboQuant, {width} bits", partial(turboquant.fit, keys=width, values=width), VLLM) for width in (2, 3, 4)),
    *(
        Peer(f"QuantizedCache, quanto int{width}", partial(quantized_cache.fit_quanto, width=width), FLUSHED)
        for width in (4, 2)
    ),
    *(Peer(f"QuantizedCache, hqq int{width}", partial(quantized_cache.fit_hqq, width=width), FLUSHED) for width in (4, 2)),
)


def run(name: str, options: argparse.Namespace) -> None:
    """All rows that a model's file lacks, those under our terms first."""
    model = Path(name).name
    settings = {"model": model, "windows": options.windows, "long": options.long}
    results = ResultFile(options.out / f"{model}.json", KIND, f"python -m benchmarks.peers {model}", settings)
    asked = [peer for peer in PEERS if not options.peers or peer.name in options.peers]
    terms_of = [(peer, label) for label in ("ours", "published") for peer in asked]
    missing = [(peer, label) for peer, label in terms_of if results.find(peer=peer.name, terms=label) is None]
    subject = Subject(name, options.windows, options.long) if missing else None
    for peer, label in missing:
        assert subject is not None
        terms = OURS if label == "ours" else peer.published
        pairs = [peer.fit(statistics) for statistics in subject.statistics]
        figures = {**true_bits(pairs, terms, subject.shape), **subject.divergence(pairs, terms, label)}
        results.add({"peer": peer.name, "terms": label, "exact": asdict(terms), **figures})
        shown = "  ".join(f"{kind} {figure:.4f}" for kind, figure in figures.items())
        print(f"{model:20} {label:10} {peer.name:28} {shown}", flush=True)


def table(folder: Path) -> str:
    """Markdown: for each method, terms and model the true bits and the divergence on encyclopedia text / source code."""
    paths = sorted(folder.glob("*.json"))
    rows = {path.stem: read_result(path, KIND)["rows"] for path in paths}
    found = {(model, row["peer"], row["terms"]): row for model, parts in rows.items() for row in parts}
    lines = [f"| terms | method | {' | '.join(f'bits | {model}' for model in rows)} |", "|---" * (2 + 2 * len(rows)) + "|"]
    for terms in ("ours", "published"):
        for peer in PEERS:
            saved = [found.get((model, peer.name, terms)) for model in rows]
            cells = [f"{r['bits']:.2f} | {r['encyclopedia']:.4f} / {r['code']:.4f}" if r else " | " for r in saved]
            lines += [f"| {terms} | {peer.name} | {' | '.join(cells)} |"] if any(saved) else []
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="folders of models, or hub ids")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--peers", nargs="+", help="names of methods; by default all")
    parser.add_argument("--windows", type=int, default=2, help="of 512 tokens, scored of each text under our terms")
    parser.add_argument("--long", type=int, default=2048, help="tokens of the window of each text under published terms")
    options = parser.parse_args()
    torch.manual_seed(0)
    for name in options.models:
        run(name, options)
    print(table(options.out))


if __name__ == "__main__":
    main()
