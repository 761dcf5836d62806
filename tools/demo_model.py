"""The demonstration model before training: its shape, its start and its attention on CPU."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WINDOW = 2048


def blocked_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention over whole rows in blocks of queries, several times faster on CPU here.

    query [B, H, T, D], key and value [B, G, T, D]; returns [B, T, H, D].
    """
    batch, heads, length, width = query.shape
    groups = key.shape[1]
    size = min(256, length)
    hidden = torch.full((size, size), -math.inf, dtype=query.dtype).triu(1)
    outputs = []
    for begin in range(0, length, size):
        block = (query[:, :, begin : begin + size] * scaling).reshape(batch * groups, -1, width)
        end = min(begin + size, length)
        keys = key[:, :, :end].reshape(batch * groups, end, width)
        values = value[:, :, :end].reshape(batch * groups, end, width)
        scores = torch.bmm(block, keys.transpose(1, 2)).view(-1, end - begin, end)
        scores = scores + F.pad(hidden[: end - begin, : end - begin], (begin, 0))
        shares = scores.softmax(-1).view(batch * groups, -1, end)
        outputs.append(torch.bmm(shares, values).view(batch, heads, end - begin, width))
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def build_model(tokenizer: PreTrainedTokenizerFast, layers: int) -> LlamaForCausalLM:
    """Return an untrained model with grouped queries, a window of 2048 tokens and heads that look back."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    _look_back(model)
    AttentionInterface.register("blocked", blocked_attention)
    model.set_attn_implementation("blocked")
    return model


@torch.no_grad()
def _look_back(model: LlamaForCausalLM) -> None:
    """Start the first layer's heads 0, 1 and 2 looking at the token one, two and three positions back.

    Recall needs such heads, and to find them takes a small model most of its training.  Every
    embedding gets the same first component; from it the heads' queries and keys get a constant
    part, in the fast rotating pairs alone, which rotation aligns at the wanted distance.
    """
    constant, strength, pairs = 0.16, 6.0, 8
    embedding = model.model.embed_tokens.weight
    embedding[:, 0] = constant
    gain = strength / (constant / embedding[-1].square().mean().sqrt())
    attention = model.model.layers[0].self_attn
    width = attention.head_dim
    turns = model.model.rotary_emb.inv_freq[:pairs]
    keys = attention.k_proj.weight.view(-1, width, model.config.hidden_size)
    keys[:, :pairs, 0] = gain
    keys[:, width // 2 : width // 2 + pairs, 0] = 0.0
    queries = attention.q_proj.weight.view(-1, width, model.config.hidden_size)
    for head, back in enumerate((1, 2, 3)):
        queries[head, :pairs, 0] = gain * torch.cos(back * turns)
        queries[head, width // 2 : width // 2 + pairs, 0] = -gain * torch.sin(back * turns)
