"""The dense path, chosen by name: the cache decodes a layer's whole past at every step and hands plain tensors to the model.

For models that compute attention by themselves (Falcon, GPT-J, Bloom, MPT). The cache is as small as ever, but a step costs
the time and, for one layer at a time, the memory of the decoded past. Keys arrive after the model's rotary embedding, so
recipes that store them before it do not fit; their `-postrope` twins do.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from narrowkv.errors import CacheUseError, RecipeError
from narrowkv.integrations.interface import before_decoder
from narrowkv.integrations.layer import PackedLayer
from narrowkv.integrations.preparation import prepare
from narrowkv.integrations.probe import AttentionFacts, ModelFacts, watch
from narrowkv.methods import Recipe

DENSE = "dense"


def facts_for(model: PreTrainedModel, backend: str, recipes: Sequence[Recipe]) -> ModelFacts:
    """Make a model ready for caches of these recipes on a backend and return the facts of its layers.

    Raises UnsupportedModelError where the model cannot be served so, RecipeError where a recipe does not fit.
    """
    facts = prepare_dense(model) if backend == DENSE else prepare(model)
    for recipe in recipes:
        recipe.require_layers([fact.layer for fact in facts.attention])
        if backend == DENSE and recipe.keys.pre_rope:
            raise RecipeError(
                f"Recipe {recipe.name} stores keys before the rotary embedding, which the dense path never sees; choose "
                f"{recipe.name}-postrope, or another backend."
            )
    return facts


@torch.no_grad()
def prepare_dense(model: PreTrainedModel) -> ModelFacts:
    """Find the layers of a model that is to be given plain tensors; raises UnsupportedModelError where there are none."""
    known: ModelFacts | None = vars(model).get("narrowkv_dense")
    if known is not None:
        return known
    seen, _ = watch(model)
    facts = [
        AttentionFacts(one.module, int(one.module.layer_idx), one.keys[0].shape[1], one.keys[0].shape[3], None)  # type: ignore[arg-type]
        for one in seen
    ]
    vars(model)["narrowkv_dense"] = found = ModelFacts(facts, [])
    decoder: Any = model.get_decoder()
    vars(decoder)["narrowkv_dense_guard"] = decoder.register_forward_pre_hook(before_decoder, with_kwargs=True)
    return found


def release_dense(model: PreTrainedModel) -> None:
    """Undo `prepare_dense`."""
    if vars(model).pop("narrowkv_dense", None) is not None:
        vars(model.get_decoder()).pop("narrowkv_dense_guard").remove()


class DenseLayer(PackedLayer):
    """A packed layer whose `update` returns what it holds as plain tensors."""

    padding: Tensor | None = None  # [batch, tokens] bool, of the coming step

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Store new tokens [batch, kv_heads, new, head_dim]; returns keys and values of all that are held."""
        self.lazy_initialization(key_states, value_states)
        self._forget()
        past, new = self.store.length, key_states.shape[2]
        valid = None
        if self.padding is not None:
            if self.padding.shape[1] < past + new:
                raise CacheUseError(
                    f"The attention mask covers {self.padding.shape[1]} tokens, but there are {past} in the cache and {new} "
                    "new ones; pass one that covers them all."
                )
            valid = self.padding[:, past : past + new]
        self.store.append(key_states, value_states, valid)
        if self.strict or self.is_exact:
            keys, values = self.store.read()
        elif past == 0:
            return key_states, value_states
        else:
            stored = self.store.read(past)
            keys, values = (
                torch.cat([old.to(x.dtype), x], dim=2) for old, x in zip(stored, (key_states, value_states), strict=True)
            )
        return keys.to(key_states.dtype), values.to(value_states.dtype)
