"""llama.cpp as a peer of `benchmarks.decode`, where llama-cpp-python and gguf are installed: the same model, its caches.

Build it for the processor at hand: `CMAKE_ARGS=-DGGML_NATIVE=ON pip install llama-cpp-python gguf` (ten minutes). Weights are
those of the model given, in float16. Its cache of 4 bits rotates keys and values by Hadamard first, as it does by default.
"""

import ctypes
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

PACKAGES = ("llama_cpp", "gguf")
EMPTY = "llama.cpp, almost empty"
CHUNK = 512  # tokens of a prompt that are computed at once
CACHES = {  # by name: type of keys and values, as llama.cpp elements them, and whether attention is fused
    "llama.cpp f16": (1, False),
    "llama.cpp f16, fused": (1, True),
    "llama.cpp q8_0, fused": (8, True),
    "llama.cpp q4_0, fused": (2, True),
}
TENSORS = {  # a layer's, by the names of transformers
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def write_model(model: PreTrainedModel, path: Path) -> None:
    """A Llama of transformers as llama.cpp reads it, without a tokenizer. Rows of queries and keys are not put into the order
    of its rotary embedding, so it computes another model of the same cost.
    """
    import gguf

    config, weights = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    for layer in range(config.num_hidden_layers):
        names |= {f"blk.{layer}.{name}": f"model.layers.{layer}.{source}" for name, source in TENSORS.items()}
    for name, source in names.items():
        tensor = weights[f"{source}.weight"]
        kind = torch.float32 if tensor.dim() == 1 else torch.float16
        writer.add_tensor(f"{name}.weight", tensor.to(kind).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Context:
    """A cache of llama.cpp that holds some tokens."""

    def __init__(self, model: Any, cache: str, tokens: int, threads: int):
        import llama_cpp

        self.api, self.tokens = llama_cpp, tokens
        kind, fused = CACHES[cache]
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = (tokens // 256 + 1) * 256
        settings.n_batch = settings.n_ubatch = CHUNK
        settings.n_threads = settings.n_threads_batch = threads
        settings.n_seq_max, settings.kv_unified = 2, True
        settings.type_k = settings.type_v = kind
        settings.flash_attn_type = (
            llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED if fused else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        self.context = llama_cpp.llama_init_from_model(model, settings)
        if not self.context:
            raise RuntimeError(f"llama.cpp makes no cache {cache!r}.")
        self.batch = llama_cpp.llama_batch_init(CHUNK, 0, 1)
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.fill()

    def decode(self, start: int, count: int, sequence: int) -> None:
        batch = self.batch
        batch.n_tokens = count
        for i in range(count):
            batch.token[i], batch.pos[i] = (start + i) % 1000, start + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = i == count - 1
        if failed := self.api.llama_decode(self.context, batch):
            raise RuntimeError(f"llama.cpp does not decode (error {failed}).")

    def fill(self) -> None:
        """Chunks that attend only to themselves, which takes seconds where the whole prompt takes minutes in 4 bits."""
        for start in range(0, self.tokens, CHUNK):
            count = min(CHUNK, self.tokens - start)
            self.decode(start, count, 1)
            self.api.llama_memory_seq_cp(self.memory, 1, 0, -1, -1)
            self.api.llama_memory_seq_rm(self.memory, 1, -1, -1)

    def step(self) -> None:
        """Decode one token, and forget it."""
        self.decode(self.tokens, 1, 0)
        self.api.llama_memory_seq_rm(self.memory, 0, self.tokens, -1)


@functools.cache  # stored, since llama.cpp calls it later
def silence() -> Any:
    import llama_cpp

    return llama_cpp.llama_log_callback(lambda level, text, data: None)


def steps(model: PreTrainedModel, tokens: int, threads: int) -> dict[str, Callable[[], Any]]:
    """A step of decoding by each of its caches, and by one with a single token."""
    import llama_cpp

    llama_cpp.llama_log_set(silence(), ctypes.c_void_p(0))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_model(model, path)
        settings = llama_cpp.llama_model_default_params()
        settings.use_mmap = False
        loaded = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
    if not loaded:
        raise RuntimeError("llama.cpp does not read the model written for it.")
    found = {EMPTY: Context(loaded, "llama.cpp f16", 1, threads).step}
    return found | {name: Context(loaded, name, tokens, threads).step for name in CACHES}
