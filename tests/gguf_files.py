"""Tiny GGUF files, written as llama.cpp's converter does."""

from pathlib import Path

from transformers import PreTrainedModel

CHAT = (
    "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def letters() -> list[str]:
    """97 tokens: printable letters as GPT-2 spells bytes, one merge (a blank is Ġ, a new line Ċ), and an end of text."""
    return [*(chr(code) for code in range(33, 126)), "ab", "Ġ", "Ċ", "<|end|>"]


def write_gguf(model: PreTrainedModel, path: Path, kind: str = "Q8_0", architecture: str = "qwen2") -> Path:
    """A model of the family Qwen2 as a GGUF file whose matrices are of this kind."""
    import gguf

    config, writer = model.config, gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    tokens = letters()
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 1) + [3])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_chat_template(CHAT)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        elements = tensor.float().numpy()
        wanted = gguf.GGMLQuantizationType[kind if elements.ndim == 2 else "F32"]
        packed = gguf.quants.quantize(elements, wanted)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), packed, raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
