"""The probe: run a model on a few tokens to find its attention modules and how each of them rotates its keys.

Nothing is known of a family beforehand. Every attention module is run twice on the same input, once with the model's own
rotary embedding and once with the identity in its place; from the two results the rotation is recognised, or the model is
refused with the reason.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from narrowkv.attention import Rope
from narrowkv.errors import UnsupportedModelError

MAX_HEAD_DIM = 512  # the index of an outlier in its block has 16 bits, one of them the sign
TOKENS, FIRST_POSITION = 12, 3
TOLERANCE = 2e-2  # of the largest key: bfloat16 rounds cosine, sine and product
STATIC_ROPE = ("default", "linear", "llama3", "yarn", "proportional")


@dataclass(frozen=True)
class AttentionFacts:
    """One attention module: its layer, kv_heads, head_dim, and how it rotates keys (None: not at all)."""

    module: nn.Module
    layer: int
    kv_heads: int
    head_dim: int
    rope: Rope | None


@dataclass
class _Seen:
    """What the probe sees of one attention module."""

    module: nn.Module
    args: tuple
    kwargs: dict[str, Any]
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)


class EmptyLayer(CacheLayerMixin):
    """A layer of a cache that holds nothing, for those that only want to see what passes."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0


class _ProbeLayer(EmptyLayer):
    """Notes the keys and values of the module that is running."""

    def __init__(self, running: list[_Seen], updated: list[_Seen]):
        super().__init__()
        self.running, self.updated = running, updated

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        seen = self.running[-1]
        seen.keys.append(key_states)
        seen.values.append(value_states)
        if not any(seen is other for other in self.updated):
            self.updated.append(seen)
        return key_states, value_states


@torch.no_grad()
def probe(model: PreTrainedModel) -> list[AttentionFacts]:
    """Facts of every attention module, by layer; raises UnsupportedModelError where one of them cannot be served."""
    if len({parameter.device for parameter in model.parameters()}) > 1:
        raise UnsupportedModelError("A model spread over several devices is not supported yet; load it on one device.")
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    running: list[_Seen] = []
    updated: list[_Seen] = []
    hooks = []

    def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        running.append(_Seen(module, args, kwargs))

    def leave(module: nn.Module, args: tuple, output: Any) -> None:
        running.pop()

    for module in model.modules():
        if hasattr(module, "layer_idx"):
            hooks.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            hooks.append(module.register_forward_hook(leave))
    training = model.training
    try:
        model.eval()
        embedding: Any = model.get_input_embeddings()
        ids = torch.arange(2, 2 + TOKENS, device=model.device)[None] % embedding.weight.shape[0]
        positions = torch.arange(FIRST_POSITION, FIRST_POSITION + TOKENS, device=model.device)[None]
        cache = Cache(layers=[_ProbeLayer(running, updated) for _ in range(layers)])
        model(ids, position_ids=positions, past_key_values=cache, use_cache=True)
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UnsupportedModelError(
            f"This model does not run with a cache of another make ({str(error).splitlines()[0]}); use DynamicCache."
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
        running.clear()
        model.train(training)
    if len(updated) != layers:
        raise UnsupportedModelError(
            f"Of {layers} layers {len(updated)} keep keys and values as the packed cache understands it; use DynamicCache."
        )
    return [_facts(model, seen, positions, running) for seen in updated]


def _facts(model: PreTrainedModel, seen: _Seen, positions: Tensor, running: list[_Seen]) -> AttentionFacts:
    keys, values = seen.keys[0], seen.values[0]
    layer = int(seen.module.layer_idx)  # type: ignore[arg-type]
    if keys.shape[3] % 8 or keys.shape[3] > MAX_HEAD_DIM:
        raise UnsupportedModelError(
            f"A head_dim of {keys.shape[3]} is not supported (multiples of 8 up to {MAX_HEAD_DIM} are); use DynamicCache."
        )
    if keys.shape != values.shape:
        raise UnsupportedModelError(
            f"Layer {layer} has keys and values of different sizes (latent attention); use DynamicCache."
        )
    rope = None
    tables = seen.kwargs.get("position_embeddings")
    if tables is not None and not isinstance(tables, tuple):
        raise UnsupportedModelError(f"Layer {layer} rotates its keys in a way that is not known; use DynamicCache.")
    if "position_ids" not in seen.kwargs:
        raise UnsupportedModelError(f"Layer {layer} is not told the positions of its tokens; use DynamicCache.")
    if tables is not None:
        identity = (torch.ones_like(tables[0]), torch.zeros_like(tables[1]))
        running.append(seen)
        seen.module(*seen.args, **{**seen.kwargs, "position_embeddings": identity})
        running.pop()
        unrotated = seen.keys[1]
        if not torch.equal(unrotated, keys):
            rope = _recognise(model, unrotated, keys, positions, layer)
    return AttentionFacts(seen.module, layer, keys.shape[1], keys.shape[3], rope)


def _recognise(model: PreTrainedModel, unrotated: Tensor, rotated: Tensor, positions: Tensor, layer: int) -> Rope:
    """The rotary embedding that makes `rotated` of `unrotated`, both [1, kv_heads, tokens, head_dim]."""
    largest = rotated.float().abs().max()
    for frequencies, scaling, kind in _frequencies(model):
        for interleaved in (False, True):
            rope = Rope(frequencies, scaling, interleaved)
            if 2 * len(frequencies) > unrotated.shape[-1]:
                continue
            if (rope.rotate(unrotated.float(), positions) - rotated.float()).abs().max() > TOLERANCE * largest:
                continue
            if kind not in STATIC_ROPE:
                raise UnsupportedModelError(
                    f"Rotary embeddings of type {kind!r} change with the length of the sequence and are not supported yet "
                    f"(supported: {', '.join(STATIC_ROPE)}); use DynamicCache."
                )
            return rope
    raise UnsupportedModelError(f"Layer {layer} rotates its keys in a way that is not known; use DynamicCache.")


def _frequencies(model: PreTrainedModel) -> list[tuple[Tensor, float, str]]:
    """All inverse frequencies that the model holds, with their scaling and type."""
    found = []
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name.endswith("inv_freq") and "original" not in name:
                prefix = name.removesuffix("inv_freq")
                kind: Any = getattr(module, "rope_type", "default")
                kind = kind.get(prefix.rstrip("_"), "default") if isinstance(kind, dict) else kind
                scaling = float(getattr(module, f"{prefix}attention_scaling", 1.0))
                found.append((buffer.detach().float(), scaling, str(kind)))
    return found
