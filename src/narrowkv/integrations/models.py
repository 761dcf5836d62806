"""Loading models and tokenizers: a local folder, a hub id, a GGUF file, or the built-in model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from narrowkv.defaults import DEMO
from narrowkv.errors import UnsupportedModelError, reason
from narrowkv.integrations.cpu_linear import lacks_products, multiply_in_float32
from narrowkv.integrations.folders import check_folder, single_file
from narrowkv.integrations.gguf import load_gguf

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
        return str(Path(name).expanduser()) if name.startswith("~") else name
    if name != DEMO:
        raise UnsupportedModelError(f"There is no built-in model {name!r}; the built-in model is {DEMO}.")
    return str(Path(__file__).parents[1] / "models" / "demo")


def load_model(
    name: str, dtype: str = "auto", device: str = "cpu", say: Callable[[str], None] = lambda sentence: None
) -> tuple[PreTrainedModel, Any]:
    """Load a model in evaluation mode, and its tokenizer.

    name: a local folder, a hub id, a file that ends in .gguf, or `narrowkv://demo`. dtype: auto, float32, bfloat16, float16 or
    float64; auto is the model's own dtype, and bfloat16 for GGUF. say: called with a sentence on the memory that a GGUF file
    will take. Weights are read from safetensors or GGUF only, and a model's own code is never run. On processors without
    16-bit matmuls, linear layers multiply in float32 and round, which is ten times as fast. Raises UnsupportedModelError if
    loading fails.
    """
    folder = model_folder(name)
    wanted = DTYPES.get(dtype)
    if wanted is None:
        raise UnsupportedModelError(f"There is no dtype {dtype!r}; choose auto, float32, bfloat16 or float16.")
    check_device(device)
    file = _look_into(name, folder)
    if file is not None:
        tokenizer, model, loading = load_gguf(file, torch.bfloat16 if wanted == "auto" else wanted, say)
    else:
        tokenizer, model, loading = _load_folder(name, folder, wanted)
    missing = sorted(loading["missing_keys"])
    if missing:  # transformers makes them up, at random
        raise UnsupportedModelError(
            f"The weights of {name} lack {missing[0]}"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
            + "; it is damaged, or no language model: download it again, or choose another."
        )
    try:
        model = model.to(device).eval()
    except Exception as error:  # every kind of device has its own errors
        raise UnsupportedModelError(f"Cannot move the model {name} to {device}: {reason(error)}.") from error
    if lacks_products(model.dtype, model.device):
        multiply_in_float32(model)
    return model, tokenizer


def _look_into(name: str, folder: str) -> Path | None:
    """The GGUF file to load, or None for a folder that has what a model needs, and for hub ids."""
    if not name.strip():
        raise UnsupportedModelError("The model's name is empty; give a folder, a hub id or a .gguf file.")
    try:
        file = single_file(folder)
        if file is None:
            check_folder(folder)
        return file
    except OSError as error:
        raise UnsupportedModelError(f"Cannot look into {name}: {error.strerror}; check the path.") from error


def check_device(device: str) -> None:
    """Raise UnsupportedModelError unless torch can compute on a device of this name here."""
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = ""
    if kind in ("", "meta"):
        raise UnsupportedModelError(f"There is no device {device!r} to compute on; choose cpu or cuda.")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UnsupportedModelError("This torch has no CUDA device; choose --device cpu, or install a CUDA build of torch.")


def _load_folder(name: str, folder: str, dtype: Any) -> tuple[Any, Any, dict[str, Any]]:
    """A tokenizer, a model, and transformers' loading report."""
    part = "configuration"
    try:
        AutoConfig.from_pretrained(folder)
        part = "tokenizer"
        tokenizer = AutoTokenizer.from_pretrained(folder)
        part = "weights"
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True, output_loading_info=True)
    except Exception as error:  # transformers, tokenizers and safetensors raise errors of all kinds for files they cannot read
        raise UnsupportedModelError(
            f"Cannot load the model {name}: its {part} cannot be read ({reason(error)}); check the name, or copy it again."
        ) from error
    return tokenizer, *loaded
