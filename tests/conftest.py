"""Shared fixtures: tiny random models, the real models where they are at hand, and poisoned memory."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton

from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from narrowkv import load_model

# where tests of kernels run that need not be interpreted
KERNEL_DEVICE = "cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda"
ASSETS = Path(os.environ.get("NARROWKV_ASSETS", Path(__file__).parents[2] / "shared" / "assets"))


with torch.device("meta"):
    torch.empty(0)  # torch remembers now, before it is replaced below, what such a context applies to


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody wrote holds NaN (or 0x2B), so that reading it is noticed."""
    empty, empty_like, new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty

    def poison(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor.fill_(0x2B)

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poison(empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: poison(empty_like(*args, **kwargs)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: poison(new_empty(*args, **kwargs)))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


FAMILIES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
}


def make_tiny(
    family: str = "llama",
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    layers: int = 2,
    vocabulary: int = 97,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **extra: Any,
) -> PreTrainedModel:
    """A random model with logits spread wide, so that greedy tokens are not decided by ties."""
    config_class, model_class = FAMILIES[family]
    torch.manual_seed(seed)
    config = config_class(
        vocab_size=vocabulary,
        hidden_size=heads * head_dim,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
        tie_word_embeddings=False,
        **{"initializer_range": 0.4, **({"sliding_window": None} if family == "mistral" else {}), **extra},
    )
    return model_class(config).to(dtype).eval()


@pytest.fixture
def tiny() -> Callable[..., PreTrainedModel]:
    return make_tiny


def asset(*parts: str) -> Path:
    """A file or folder of the local test data; skips the test where it is absent."""
    path = ASSETS.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"needs {'/'.join(parts)}; set NARROWKV_ASSETS to the folder that has it")
    return path


@pytest.fixture(params=["stories260K", "babyllama-tok105"])
def real_model(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, Any]:
    return load_model(str(asset("models", request.param)), "float32")


@pytest.fixture(scope="session")
def stories_text() -> str:
    return asset("text", "tinystories-sample.txt").read_text(encoding="utf-8")[:200_000]
