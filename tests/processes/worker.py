"""Run by torchrun, one process of two: `split` decodes with a model split between them, `shared` calibrates on half the data.

Each writes what it found to FOLDER/<task>.<rank>.pt, for the test to compare.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.distributed import DistributedConfig

from narrowkv import Calibration, PackedCache, calibrate
from narrowkv.errors import UnsupportedModelError

RECIPES = ["nuq3-1%", "int4-channel", "nuq2-qnorm", "narrow3"]


def prompt() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(2, 97, (3, 90))
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    mask[2, :70] = 0
    return ids, mask


def text() -> list[torch.Tensor]:
    torch.manual_seed(2)
    return list(torch.randint(2, 97, (6, 80)).split(1))


def tokens(model: PreTrainedModel, cache: object) -> torch.Tensor:
    ids, mask = prompt()
    options = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    found: torch.Tensor = model.generate(ids, attention_mask=mask, past_key_values=cache, **options)
    return found


def decode(model: PreTrainedModel, folder: Path) -> dict[str, object]:
    """Tokens and what is stored, by recipe."""
    found: dict[str, object] = {"dynamic": tokens(model, DynamicCache())}
    sources: dict[str, Calibration | str] = {"fp16": "fp16", "token and head": "TOKEN_HEAD", "calibrated": "CALIBRATED"}
    for name, source in sources.items():
        if source == "CALIBRATED":
            source = Calibration.from_pretrained(folder / "calibration")
        if source == "TOKEN_HEAD":
            source = str(folder / "token_head.json")
        cache = PackedCache(model, source, strict=True)
        found[name] = tokens(model, cache)
        found[f"{name}, stored"] = [layer.store.read() for layer in cache.packed]
        found[f"{name}, bytes"] = cache.nbytes
    try:
        calibrate(model, text(), "nuq2")
    except UnsupportedModelError as error:
        found["refusal"] = str(error)
    return found


def main() -> None:
    task, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    if task == "split":
        config = DistributedConfig(tp_size=2)
        model = AutoModelForCausalLM.from_pretrained(folder / "model", distributed_config=config).eval()
        found = decode(model, folder)
    else:
        dist.init_process_group("gloo")
        model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
        for recipe in RECIPES:
            learned = calibrate(model, text()[dist.get_rank() :: 2], recipe, group=dist.group.WORLD)
            learned.save_pretrained(folder / f"{task}.{dist.get_rank()}" / recipe)
        found = {}
    torch.save(found, folder / f"{task}.{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
