"""Loading models and tokenizers: a local folder, a hub id, or the built-in model."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from narrowkv.defaults import DEMO
from narrowkv.errors import UnsupportedModelError
from narrowkv.integrations.products import lacks_products, multiply_in_float32

DTYPES: dict[str, Any] = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def model_folder(name: str) -> str:
    """The local folder of a built-in name, or `name` unchanged."""
    if not name.startswith("narrowkv://"):
        return name
    if name != DEMO:
        raise UnsupportedModelError(f"There is no built-in model {name!r}; the built-in model is {DEMO}.")
    return str(Path(__file__).parents[1] / "models" / "demo")


def load_model(name: str, dtype: str = "auto", device: str = "cpu") -> tuple[PreTrainedModel, Any]:
    """A model in evaluation mode and its tokenizer.

    name: a local folder, a hub id or `narrowkv://demo`. dtype: auto, float32, bfloat16, float16 or float64. Weights are read
    from safetensors only, and no code that comes with a model is run. On processors that have no products of 16
    bits, linear layers multiply in float32 and round, which is ten times as fast. Raises UnsupportedModelError where loading
    fails.
    """
    folder = model_folder(name)
    wanted = DTYPES.get(dtype)
    if wanted is None:
        raise UnsupportedModelError(f"There is no dtype {dtype!r}; choose auto, float32, bfloat16 or float16.")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UnsupportedModelError("This torch has no CUDA device; choose --device cpu, or install a CUDA build of torch.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=wanted, use_safetensors=True)
        model = model.to(device).eval()
        if lacks_products(model.dtype, model.device):
            multiply_in_float32(model)
        return model, tokenizer
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UnsupportedModelError(f"Cannot load the model {name} on {device}: {reason}") from error
