"""What lies in a model's folder: why it cannot be loaded is said by what is missing, before anything is read."""

import json
from pathlib import Path

from narrowkv.errors import UnsupportedModelError

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
TOKENIZERS = ("tokenizer.*", "vocab.*", "*.model", "*.tiktoken", "tekken.json")  # any of them; not tokenizer_config.json
OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")


def single_file(name: str) -> Path | None:
    """The GGUF file to load: the one that was named, or the only one of a folder without safetensors; None for others.

    Raises UnsupportedModelError where a path leads to nothing, to another kind of file, or to a folder from which it is not
    clear what to load.
    """
    path = Path(name)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise UnsupportedModelError(f"{name} is a file; give the model's folder, or a file that ends in .gguf.")
        return path
    if not path.is_dir():
        if name.lower().endswith(".gguf") or name.startswith(("/", "./", "../", "~")):
            raise UnsupportedModelError(f"There is no file or folder {name}; check the path.")
        return None
    files = sorted(path.glob("*.gguf"))
    if not files or _has_safetensors(path):
        return None
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:3]) + (", ..." if len(files) > 3 else "")
        raise UnsupportedModelError(f"{name} has {len(files)} GGUF files ({names}); name the one to load.")
    return files[0]


def check_folder(name: str) -> None:
    """Raise UnsupportedModelError, with the cause, where a local folder lacks what a model needs; hub ids pass."""
    path = Path(name)
    if not path.is_dir():
        return
    if not any(path.iterdir()):
        raise UnsupportedModelError(f"The folder {name} is empty; give one that has a model's files.")
    if not (path / CONFIG).is_file():
        if (path / "adapter_config.json").is_file():
            raise UnsupportedModelError(
                f"The folder {name} has an adapter only; merge it with its model (peft's merge_and_unload) and save that."
            )
        raise UnsupportedModelError(f"The folder {name} has no {CONFIG}; give the folder that a model was saved into.")
    if not _has_safetensors(path):
        _explain_weights(name, path)
    if (path / INDEX).is_file():
        _check_shards(name, path)
    if not any(file.is_file() for pattern in TOKENIZERS for file in path.glob(pattern)):
        raise UnsupportedModelError(
            f"The folder {name} has no tokenizer (tokenizer.json); copy the tokenizer's files from where the model came from."
        )


def _has_safetensors(path: Path) -> bool:
    return any(path.glob("*.safetensors")) or (path / INDEX).is_file()


def _explain_weights(name: str, path: Path) -> None:
    others = sorted(file.name for pattern in OTHER_WEIGHTS for file in path.glob(pattern))
    if others:
        raise UnsupportedModelError(
            f"The folder {name} has its weights as {others[0]} only, which can run code when it is read; if you trust it, "
            "write them as safetensors: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)."
        )
    raise UnsupportedModelError(f"The folder {name} has no weights (model.safetensors); download or copy the model again.")


def _check_shards(name: str, path: Path) -> None:
    try:
        shards = set(json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        missing = sorted(shard for shard in shards if not (path / shard).is_file())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnsupportedModelError(f"{INDEX} in {name} is damaged; download or copy it again.") from error
    if missing:
        raise UnsupportedModelError(
            f"The folder {name} lacks {missing[0]}"
            + (f" and {len(missing) - 1} more files of weights" if len(missing) > 1 else "")
            + "; download or copy them again."
        )
