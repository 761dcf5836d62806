"""GGUF files, llama.cpp's format: weights of 4 to 6 bits, which transformers reads into a model of 16 bits."""

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from narrowkv.errors import MissingPackageError, UnsupportedModelError, reason

ANYWAY = "NARROWKV_ANY_SIZE"  # an environment variable: load files for which there seems to be no space
DECODING = 8  # bytes that an element takes while its tensor is decoded: twice, in float32


def load_gguf(path: Path, dtype: torch.dtype, say: Callable[[str], None]) -> tuple[Any, Any, dict[str, Any]]:
    """The tokenizer of a GGUF file with its chat template, the model, and transformers' loading report.

    say: is given what memory the model will take, before it is loaded. Raises MissingPackageError without the packages that
    read such files, and UnsupportedModelError where the file is damaged, its architecture is unknown to transformers, or it
    needs more memory than there is.
    """
    _require_packages()
    architecture, location = _check(path, dtype, say), _location(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(**location)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            **location, dtype=dtype, output_loading_info=True, quantization_config=_decoded()
        )
    except Exception as error:  # readers of foreign files raise errors of all kinds
        raise UnsupportedModelError(
            f"transformers cannot read {path.name}, a GGUF file of the architecture {architecture} ({reason(error)}); give "
            "the folder or hub id of the original model."
        ) from error
    model, loading = loaded
    if hasattr(model, "hf_quantizer"):  # it is a model like any other now, which can be saved
        model.hf_quantizer.remove_quantization_config(model)
    model.narrowkv_few_bits = True  # for its fingerprint
    return tokenizer, model, loading


def gguf_config(path: Path) -> Any:
    """The configuration of the model in a GGUF file; no weight is read; raises what transformers raises."""
    _require_packages()
    return AutoConfig.from_pretrained(**_location(path))


def _location(path: Path) -> dict[str, Any]:
    # by its whole path, for transformers prefers a file of that name in the working folder
    return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": str(path.resolve())}


def _require_packages() -> None:
    for package in ("gguf", "accelerate"):
        if find_spec(package) is None:
            raise MissingPackageError(f"GGUF files are read by the package {package}; `pip install 'narrowkv[gguf]'`.")


def _check(path: Path, dtype: torch.dtype, say: Callable[[str], None]) -> str:
    """Compare the memory needed with what there is; returns the file's architecture."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        fields = {
            name: reader.fields[name].contents() for name in ("general.architecture", "split.count") if name in reader.fields
        }
        sizes = [int(tensor.n_elements) for tensor in reader.tensors]
    except Exception as error:  # a damaged file leads the reader anywhere
        raise UnsupportedModelError(f"{path} is no GGUF file, or damaged ({reason(error)}); download it again.") from error
    if fields.get("split.count", 0) > 1:
        raise UnsupportedModelError(
            f"{path} is one of {fields['split.count']} parts of a model; join them first: llama-gguf-split --merge."
        )
    if not sizes or "general.architecture" not in fields:
        raise UnsupportedModelError(f"{path} has no weights of a language model; give the file that has them.")
    resident = sum(sizes) * dtype.itemsize
    needed, free = resident + DECODING * max(sizes), available_memory()
    width = str(dtype).removeprefix("torch.")
    found = (
        f"{path.name}: {path.stat().st_size / 1e9:.1f} GB in the file become {resident / 1e9:.1f} GB of memory in {width} "
        f"({needed / 1e9:.1f} GB while loading)"
    )
    if needed > free and not os.environ.get(ANYWAY):
        raise UnsupportedModelError(
            f"{found}, and {free / 1e9:.1f} GB are free; close other programs, choose a smaller model, or set {ANYWAY}=1 to "
            "try all the same."
        )
    say(f"{found}; {free / 1e9:.1f} GB are free.")
    return str(fields["general.architecture"])


def _decoded() -> Any:
    """Weights become elements, also where kernels for packed ones could be fetched."""
    from transformers.utils.quantization_config import GgufConfig

    return GgufConfig(dequantize=True)


def available_memory() -> int:
    """Bytes that can be taken without swapping: of the machine, or of the container if that has less."""
    import psutil  # which accelerate requires

    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((group / f"memory.{name}").read_text(encoding="ascii")) for name in ("max", "current"))
        parts = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
        return min(free, limit - used + int(parts.get("inactive_file", 0)))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return free
