"""What people hand over as a model: wrappers are taken off, and what is no model that we serve is refused at the door."""

from typing import Any

from torch import nn

from narrowkv.errors import UnsupportedModelError


def unwrapped(model: Any) -> Any:
    """The transformers model in what torch.compile, PEFT or DistributedDataParallel made of it.

    Raises UnsupportedModelError, naming what was given, where there is none, or one that no packed cache serves.
    """
    while True:
        if hasattr(model, "_orig_mod"):  # torch.compile
            model = model._orig_mod
        elif hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif type(model).__name__ in ("DistributedDataParallel", "FullyShardedDataParallel") and hasattr(model, "module"):
            model = model.module
        else:
            break
    _require_model(model)
    text = model.config.get_text_config(decoder=True)
    if getattr(model.config, "is_encoder_decoder", False) or getattr(text, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} is an encoder-decoder, which stores keys of both its input and its answer; only "
            "models without an encoder are served, so use this one with transformers' own cache."
        )
    return model


def require_head(model: Any) -> None:
    """Raise UnsupportedModelError where a model, its wrappers taken off, predicts no tokens: a classifier, or layers alone."""
    if not model.can_generate() and model.get_output_embeddings() is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} predicts no tokens, and these are what calibration and evaluation go by; load the model "
            "that has its language head (AutoModelForCausalLM). A cache with a calibration of that one serves this one too."
        )


def decoder_of(model: Any) -> Any:
    """The innermost language model: the module that runs the layers."""
    inner = model.get_decoder()
    while inner is not model and hasattr(inner, "get_decoder"):
        model, inner = inner, inner.get_decoder()
    return inner


def _require_model(model: Any) -> None:
    if isinstance(model, nn.Module) and hasattr(model, "config") and hasattr(model, "get_decoder"):
        return
    wanted, package = "A loaded transformers model is wanted", type(model).__module__.partition(".")[0]
    given = f"a {type(model).__name__}" if package in ("builtins", "__main__") else f"a {package} {type(model).__name__}"
    if model is None or isinstance(model, str):
        given = "None" if model is None else f"the name {model!r}"
    part = next((name for name in ("model", "module") if hasattr(getattr(model, name, None), "get_decoder")), None)
    remedy = f"pass its .{part}" if part else "load one, as narrowkv.load_model does"
    raise UnsupportedModelError(f"{wanted}, not {given}; {remedy}.")
