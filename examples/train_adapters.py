"""Train adapters against a quantized cache: `pip install narrowkv[train]`, `python examples/train_adapters.py --out adapters`.

The adapters (LoRA) learn to compute with a quantized cache what the model computes without one: the loss is the KL divergence
from the model itself, or with `--loss language` that of plain language modeling. Afterwards the strict divergence from the
original model is measured on text that was not trained on, before and after, and written to `--json FILE`. Without arguments
the built-in model is trained, in a few minutes on a CPU.
"""

import argparse
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import TrainingArguments

from narrowkv import Calibration, PackedCache, calibrate, get_recipe, load_model
from narrowkv.evaluate import cut_windows
from narrowkv.evaluate.finished import tables_checksum
from narrowkv.evaluate.perplexity import Source, divergences
from narrowkv.evaluate.results import ResultFile, definition
from narrowkv.evaluate.sources import read_text, read_texts
from narrowkv.training.trainer import QuantizedTrainer

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NOT_SETTINGS = ("model", "out", "json", "calibration", "text", "held_out")


def train(model: PeftModel, source: Source, windows: Tensor, options: argparse.Namespace) -> float:
    """Train the adapters on token ids [n, tokens] and save them; returns seconds."""
    arguments = TrainingArguments(
        output_dir=str(options.out),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(options.steps // 10, 1),
        label_names=["labels"],
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        seed=options.seed,
        use_cpu=not torch.cuda.is_available(),
    )
    rows = [{"input_ids": row, "labels": row} for row in windows]
    trainer = QuantizedTrainer(model, arguments, train_dataset=rows, source=source, distill=options.loss == "distillation")
    start = time.perf_counter()
    trainer.train()
    trainer.save_model()
    return time.perf_counter() - start


@torch.inference_mode()
def measure(model: Any, source: Source, windows: Tensor) -> dict[str, float]:
    """Strict divergence from the original model in nats per token, and perplexities: strict, and of the original."""
    found: list[Tensor] = []
    losses = torch.zeros(2, dtype=torch.float64)
    for row in windows.to(model.device):
        with model.disable_adapter():
            exact = model(input_ids=row[None], use_cache=False).logits[0, :-1]
        cache = PackedCache(model, source, strict=True)
        quantized = model(input_ids=row[None], past_key_values=cache, use_cache=True).logits[0, :-1]
        found.append(divergences(exact, quantized))
        losses += torch.tensor([float(torch.nn.functional.cross_entropy(part, row[1:])) for part in (quantized, exact)])
    perplexity, original = (losses / len(windows)).exp().tolist()
    return {"kld": float(torch.cat(found).double().mean()), "perplexity": perplexity, "perplexity_fp": original}


def options_of_command() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="narrowkv://demo", help="a folder, or a hub id")
    parser.add_argument("--calibration", help="folder of tables; without it the recipe is calibrated on the training text")
    parser.add_argument("--recipe", default="narrow2", help="where no calibration is given")
    parser.add_argument("--text", nargs="+", default=["narrowkv://train"], help="to be trained on, in equal parts")
    parser.add_argument("--held-out", nargs="+", default=["narrowkv://held-out"], help="to be measured on, each for itself")
    parser.add_argument("--loss", choices=["distillation", "language"], default="distillation")
    parser.add_argument("--targets", nargs="+", default=PROJECTIONS, help="projections that get adapters")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=1, help="windows of a step")
    parser.add_argument("--window", type=int, default=256, help="tokens")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--measured", type=int, default=4, help="windows of 512 tokens that each text is measured on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="of the model; adapters have 32 bits"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the adapters")
    parser.add_argument("--json", type=Path, help="file of results to add a row for each text to")
    return parser.parse_args()


def main() -> None:
    options = options_of_command()
    torch.manual_seed(options.seed)
    model, tokenizer = load_model(options.model, options.dtype)
    windows = cut_windows(tokenizer, read_texts(options.text), options.window, options.steps * options.batch)
    recipe = get_recipe(options.recipe)
    source: Source = recipe
    if options.calibration:
        source = Calibration.from_pretrained(options.calibration, model)
    elif recipe.needs_calibration:
        source = calibrate(model, windows[:32].split(1), recipe)
    held_out = {Path(name).name: cut_windows(tokenizer, read_text(name), 512, options.measured) for name in options.held_out}
    adapted = get_peft_model(model, LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules=options.targets))
    before = {name: measure(adapted, source, rows) for name, rows in held_out.items()}
    seconds = train(adapted.train(), source, windows, options)
    adapted.eval()
    for name, rows in held_out.items():
        report(options, name, source, before[name], measure(adapted, source, rows), seconds)


def report(
    options: argparse.Namespace,
    name: str,
    source: Source,
    before: dict[str, float],
    after: dict[str, float],
    seconds: float,
) -> None:
    """Print what was measured on one text, and add it to a file of results."""
    change = after["kld"] / before["kld"] - 1
    print(f"{name}: KLD {before['kld']:.4f} -> {after['kld']:.4f} ({change:+.0%}), perplexity ", end="")
    print(f"{before['perplexity']:.2f} -> {after['perplexity']:.2f} ({before['perplexity_fp']:.2f} in 16 bits)", flush=True)
    if options.json is None:
        return
    settings = {key: value for key, value in vars(options).items() if key not in NOT_SETTINGS}
    words = [word if word.startswith(("-", "narrowkv:")) else Path(word).name for word in sys.argv[1:]]
    results = ResultFile(
        options.json, "adapters", shlex.join(["python", "examples/train_adapters.py", *words]), settings, options.seed
    )
    recipe, tables = (source.recipe, tables_checksum(source)) if isinstance(source, Calibration) else (source, None)
    row: dict[str, Any] = {"model": Path(options.model).name, "recipe": recipe.name, "text": name, "seconds": seconds}
    results.add(row | {"before": before, "after": after, "definition": definition(recipe), "checksum": tables})


if __name__ == "__main__":
    main()
