"""Train NarrowKV's built-in demonstration model, a small Llama that recalls what it has read.

A model this small does not come to recall by itself from prose, so the stages go from dense copying
in short rows, over facts and repeated passages in rows of 512 tokens, to rows of the whole window
of 2048 tokens, always alongside ordinary prose.  The result depends only on the seed and the machine's
arithmetic.  Run from the repository root, with the package installed::

    python tools/train_demo_model.py --novels NOVELS.txt.xz --out DIR

``NOVELS`` holds English novels separated by ``<|endoftext|>``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import demo_data
from demo_data import Corpora, RecallMix, RecallRows
from demo_model import build_model
from narrowkv.evaluate import retrieval

VOCABULARY = 2048


@dataclass(frozen=True)
class Stage:
    """One part of the curriculum: the rows of its steps, what they hold and the learning rate.

    The rate falls in a straight line from its peak to zero between two counts of tokens.  A stage
    with ``warm_up`` steps starts from the rounded checkpoint of the one before, with new optimizers.
    """

    name: str
    steps: int
    rows: int
    length: int
    copying: float
    mix: RecallMix
    falls: tuple[int, int] = (6_174_720, 13_721_600)
    warm_up: int = 0

    def rate(self, within: int, tokens: int) -> float:
        """Return the learning rate of a step of the stage, after ``tokens`` tokens in all."""
        first, last = self.falls
        warm = (within + 1) / self.warm_up if self.warm_up else 1.0
        return PEAK_RATE * min(1.0, warm) * min(1.0, (last - tokens) / (last - first))


STAGES = (
    Stage("copy", 400, 32, 128, 0.8, RecallMix(facts=0, repeats=0), warm_up=60),
    Stage("short", 250, 24, 512, 0.15, RecallMix(facts=6, repeats=4), warm_up=60),
    Stage("long", 150, 8, 2048, 0.0, RecallMix(facts=12, repeats=12)),
    Stage(
        "recall",
        200,
        8,
        2048,
        0.0,
        RecallMix(facts=12, repeats=16, repeat_weight=4.0, reference_share=0.15),
        falls=(6_021_120, 11_755_520),
        warm_up=20,
    ),
    Stage(
        "finish",
        140,
        8,
        2048,
        0.0,
        RecallMix(facts=12, repeats=20, repeat_weight=6.0, reference_share=0.25),
        falls=(8_151_040, 12_738_560),
        warm_up=10,
    ),
    Stage(
        "polish",
        360,
        8,
        2048,
        0.0,
        RecallMix(facts=12, repeats=20, repeat_weight=6.0, reference_share=0.2),
        falls=(6_840_320, 18_636_800),
        warm_up=20,
    ),
)
PEAK_RATE = 3e-3


def build_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the layers and AdamW for embeddings and norms."""
    head_rotations = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(head_rotations, lr=PEAK_RATE, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]


@torch.no_grad()
def round_weights(model: LlamaForCausalLM) -> None:
    """Round the weights as a checkpoint does."""
    for weight in model.parameters():
        weight.copy_(weight.bfloat16())


def draw_rows(
    stage: Stage, corpora: Corpora, maker: RecallRows, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the token ids and loss weights of one step, each [rows, length]."""
    copying = round(stage.rows * stage.copying)
    ids, weights = maker.rows(rng, stage.rows - copying, stage.length, stage.mix)
    if copying:
        # Copying rows stay short: several of them fill one row's length.
        folds = stage.length // 128
        more, more_weights = demo_data.copying_rows(corpora, rng, copying * folds, 128, VOCABULARY)
        ids = np.concatenate([ids, more.reshape(copying, -1)])
        weights = np.concatenate([weights, more_weights.reshape(copying, -1)])
    return torch.from_numpy(ids), torch.from_numpy(weights)


def weighted_loss(model: LlamaForCausalLM, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the mean cross entropy of the next tokens, by their weights."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    losses = F.cross_entropy(logits.reshape(-1, VOCABULARY).float(), ids[:, 1:].reshape(-1), reduction="none")
    shares = weights[:, 1:].reshape(-1)
    return (losses * shares).sum() / shares.sum()


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, corpora: Corpora, rows: int) -> dict[str, float]:
    """Return recall at several distances, and perplexity of both kinds of held-out prose."""
    model.eval()
    model.set_attn_implementation("sdpa")
    figures: dict[str, float] = {}
    filler = corpora.held_out_reference.tolist()
    for distance in (128, 512, 1024, 1900, 2000):
        for kind in (retrieval.facts, retrieval.passages):
            batch = kind(tokenizer, filler, distance, rows, seed=1)
            kept = int(batch.answer_mask.sum(1).max()) + 1
            with torch.autocast("cpu", torch.bfloat16):
                logits = torch.cat([model(ids, logits_to_keep=kept).logits for ids in batch.input_ids.split(8)])
            figures[f"{kind.__name__}_{distance}"] = retrieval.accuracy(logits, batch)
    figures["perplexity_reference"] = perplexity(model, tokenizer, corpora.held_out_reference)
    figures["perplexity_novels"] = perplexity(model, tokenizer, corpora.held_out_novels[:40_000])
    model.train()
    model.set_attn_implementation("blocked")
    return figures


def perplexity(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tokens: np.ndarray) -> float:
    """Return the perplexity of the tokens in windows of 1024, each begun with the start token."""
    width = 1023
    windows = torch.from_numpy(tokens[: len(tokens) // width * width].astype(np.int64))
    windows = F.pad(windows.view(-1, width), (1, 0), value=tokenizer.bos_token_id)
    losses = [weighted_loss(model, part, torch.ones_like(part)).item() * len(part) for part in windows.split(8)]
    return math.exp(sum(losses) / len(windows))


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write model (as bfloat16) and tokenizer into ``out``, each file at once."""
    staging = out.with_name(out.name + ".partial")
    staging.mkdir(parents=True, exist_ok=True)
    copy: Any = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16).save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    out.mkdir(parents=True, exist_ok=True)
    for file in staging.iterdir():
        os.replace(file, out / file.name)
    staging.rmdir()


def plot(log: list[dict[str, Any]], path: Path) -> None:
    """Draw the training loss and the recall measured along the way over the tokens trained on."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (upper, lower) = pyplot.subplots(2, 1, figsize=(8, 7), sharex=True)
    for name in dict.fromkeys(entry["stage"] for entry in log):
        part = [entry for entry in log if entry["stage"] == name]
        upper.plot([e["tokens"] / 1e6 for e in part], [e["loss"] for e in part], label=name)
    upper.set_ylabel("training loss (nats per token, weighted)")
    upper.legend(title="stage")
    measured = [entry for entry in log if "facts_512" in entry]
    for key in ("facts_512", "facts_2000", "passages_512", "passages_2000"):
        label = "{} at {} tokens".format(*key.split("_"))
        lower.plot([e["tokens"] / 1e6 for e in measured], [e[key] for e in measured], "o-", label=label)
    lower.set_xlabel("tokens trained on (millions)")
    lower.set_ylabel("share of rows recalled exactly")
    lower.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def train(options: argparse.Namespace) -> None:
    """Run all stages, writing checkpoint, log and curve along the way."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    novels = demo_data.read_novels(options.novels)
    kept = [text for i, text in enumerate(novels) if i not in demo_data.HELD_OUT_NOVELS]
    tokenizer = demo_data.train_tokenizer(kept, VOCABULARY)
    corpora = demo_data.load_corpora(novels, tokenizer)
    maker = RecallRows(corpora, tokenizer)
    print(len(corpora.novels), len(corpora.reference), len(corpora.held_out_reference), flush=True)
    model = build_model(tokenizer, options.layers)
    log: list[dict[str, Any]] = []
    if options.start:
        started = LlamaForCausalLM.from_pretrained(options.start, dtype=torch.float32)
        model.load_state_dict(started.state_dict())
        log = json.loads((options.start / "training_log.json").read_text())["log"]
    before = log[-1] if log else {"seconds": 0.0, "step": 0, "tokens": 0}
    begun = time.monotonic() - float(before["seconds"])
    step, tokens = int(before["step"]), int(before["tokens"])
    for element, stage in enumerate(STAGES):
        if stage.name not in options.stages:
            continue
        rng = np.random.default_rng(options.seed + element)
        if stage.warm_up:
            if element:
                round_weights(model)
            optimizers = build_optimizers(model)
        losses: list[float] = []
        for within in range(stage.steps):
            rate = stage.rate(within, tokens)
            loss = weighted_loss(model, *draw_rows(stage, corpora, maker, rng))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()
                optimizer.zero_grad()
            step, tokens = step + 1, tokens + stage.rows * stage.length
            losses.append(loss.item())
            last = within == stage.steps - 1
            if step % 20 == 0 or last:
                entry: dict[str, Any] = {
                    "step": step,
                    "tokens": tokens,
                    "seconds": round(time.monotonic() - begun, 1),
                    "loss": round(sum(losses) / len(losses), 4),
                    "stage": stage.name,
                }
                losses.clear()
                if step % options.evaluate_every == 0 or last:
                    figures = evaluate(model, tokenizer, corpora, options.rows)
                    entry |= {name: round(value, 4) for name, value in figures.items()}
                    save(model, tokenizer, options.out)
                log.append(entry)
                print(json.dumps(entry), flush=True)
                if "facts_512" in entry:
                    summary = {"stages": [asdict(s) for s in STAGES], "log": log}
                    (options.out / "training_log.json").write_text(json.dumps(summary, indent=1))
                    plot(log, options.out / "loss_curve.png")


def main() -> None:
    """Read the options and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--novels", type=Path, required=True, help="text of novels, plain or .xz")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--start", type=Path, help="folder of a model that ended the stage before")
    parser.add_argument("--stages", nargs="+", default=[s.name for s in STAGES], help="in order")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=24, help="rows of each recall measurement")
    parser.add_argument("--evaluate-every", type=int, default=240, help="steps")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
