"""vLLM's attention on a CPU over packed pages.

A page of vLLM's is a block of 128 tokens, for which vLLM allocates as many bytes as `PageLayout` takes; so its own counts of
blocks, tokens and usage are those of packed pages. What new tokens see of each other is exact, also in a chunk of a prompt,
unless it is to be strict; all before them is read in pages.
"""

import os
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.logger import init_logger
from vllm.model_executor.layers import rotary_embedding
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionType, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from narrowkv.attention import Rope
from narrowkv.attention.cpu.paged import LayerTables, PagedAttention, StepSequence, StepView
from narrowkv.errors import UnsupportedModelError
from narrowkv.store.page_layout import PageLayout
from narrowkv.store.paged import PagedLayer
from narrowkv.store.runs import PAGE, NewTokens
from narrowkv.vllm import STRICT
from narrowkv.vllm.tables import Pair, calibration, quantizers, require_model, require_plain, rope_of

logger = init_logger(f"vllm.{__name__}")


class PackedAttentionBackend(CPUAttentionBackend):
    """What vLLM takes in place of its own attention on a CPU."""

    forward_includes_kv_cache_update = True
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto"]

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [PAGE]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return sorted({head_dim for _, head_dim in calibration().shapes.values()})

    @classmethod
    def supports_non_causal(cls) -> bool:
        return False

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type == AttentionType.DECODER

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """The same with as many bytes of a token as a page takes; raises UnsupportedModelError on blocks of another size."""
        if spec.state_content_bytes is not None:
            return spec
        if spec.block_size > 1 and spec.block_size % PAGE:  # of 1 where vLLM asks before it has chosen
            raise UnsupportedModelError(
                f"NarrowKV's pages have {PAGE} tokens, and this vLLM's blocks {spec.block_size}; leave out --block-size, or "
                f"make it a multiple of {PAGE}."
            )
        nbytes = page_bytes(spec.num_kv_heads, spec.head_size, spec.dtype)
        return replace(spec, dtype=torch.uint8, state_content_bytes=-(-nbytes // (spec.num_kv_heads * PAGE)))

    @staticmethod
    def get_impl_cls() -> type["PackedAttention"]:
        return PackedAttention

    @staticmethod
    def get_builder_cls() -> type["PackedMetadataBuilder"]:
        return PackedMetadataBuilder


def page_bytes(kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of the largest page of any layer with such heads, in one process; dtype: of the model."""
    every = (_own_tables(layer, kv_heads, head_dim) for layer, shape in calibration().shapes.items() if shape[1] == head_dim)
    return max(PageLayout.of(pair, dtype).nbytes for pair in every)


def _own_tables(layer: int, kv_heads: int, head_dim: int) -> Pair:
    rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    return quantizers(layer, kv_heads, head_dim, rank, ranks)


@dataclass
class PackedMetadata(CPUAttentionMetadata):
    """Of one step. sequences: those that have new tokens, and tables: their pages [sequences, n] int64. new: where new tokens
    go.
    """

    sequences: tuple[StepSequence, ...] = ()
    tables: Tensor | None = None
    new: NewTokens | None = None
    views: dict[tuple[int, int | None, bool], StepView] = field(default_factory=dict)

    def view(self, kv_heads: int, window: int | None, in_pages: bool) -> StepView:
        """What layers of this window see; found once in a step."""
        assert self.tables is not None
        key = kv_heads, window, in_pages
        if key not in self.views:
            self.views[key] = StepView(self.sequences, self.tables, *key)
        return self.views[key]


class PackedMetadataBuilder(CPUAttentionMetadataBuilder):
    """Builds `PackedMetadata`, once in a step for all layers."""

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> PackedMetadata:
        common = common_attn_metadata
        if common.causal is not True:
            raise UnsupportedModelError(
                "NarrowKV's vLLM plug-in serves causal attention alone; unset NARROWKV_VLLM_CALIBRATION."
            )
        starts, lengths = common.query_start_loc.tolist(), common.seq_lens.tolist()
        tables = common.block_table_tensor.long()
        sequences = [StepSequence(*one) for one in zip(starts[:-1], starts[1:], lengths, strict=True)]
        present = [i for i, one in enumerate(sequences) if one.stop > one.start]
        return PackedMetadata(
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            query_start_loc=common.query_start_loc,
            max_seq_len=common.max_seq_len,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            scheduler_metadata=None,
            sequences=tuple(sequences[i] for i in present),
            tables=tables[present],
            new=NewTokens.of(starts, lengths, tables.tolist()),
        )


class PackedAttention(CPUAttentionBackendImpl):
    """Attention of one layer."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        config = get_current_vllm_config()
        require_plain(
            {
                "attention of encoders, or from one to another model": self.attn_type != AttentionType.DECODER,
                "ALiBi, whose scores depend on distances": self.alibi_slopes is not None,
                "layers that read another layer's keys": self.kv_sharing_target_layer_name is not None,
                f"--kv-cache-dtype {self.kv_cache_dtype} as well": self.kv_cache_dtype != "auto",
                "--kv-cache-dtype-skip-layers": bool(config.cache_config.kv_cache_dtype_skip_layers),
            }
        )
        self._strict = os.environ.get(STRICT) == "1"
        self._known: PagedAttention | None = None
        self._tables: tuple[Pair, Rope | None] | None = None

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Called for each layer once the model is loaded; raises CalibrationError where it is not the calibration's."""
        super().process_weights_after_loading(act_dtype)
        config = get_current_vllm_config()
        require_model_once(config.model_config.hf_text_config, config.model_config.model)
        for layer in config.compilation_config.static_forward_context.values():
            if isinstance(getattr(layer, "impl", None), PackedAttention):
                layer.impl._of_layer(layer, act_dtype)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """query: [tokens, query_heads, head_dim], key, value: [tokens, kv_heads, head_dim], rotated; output: like query."""
        if not isinstance(attn_metadata, PackedMetadata):  # vLLM warms up
            return output
        assert attn_metadata.new is not None
        attention = self._attention(layer, kv_cache, key.dtype)
        if self._strict:
            attention.layer.append(attn_metadata.new, key, value)
        window = self.sliding_window if self.sliding_window > 0 else None
        view = attn_metadata.view(self.num_kv_heads, window, self._strict)
        attention.attend(view, query, (key, value), output)
        if not self._strict:
            attention.layer.append(attn_metadata.new, key, value)
        return output

    def _attention(self, layer: Any, kv_cache: Tensor, dtype: torch.dtype) -> PagedAttention:
        """Attention over the layer's memory."""
        known = self._known
        if known is None or known.layer.memory.data_ptr() != kv_cache.data_ptr():
            count, heads, tokens, nbytes = kv_cache.shape
            if tokens != PAGE or not kv_cache[:1].is_contiguous():
                raise UnsupportedModelError(
                    f"NarrowKV's pages have {PAGE} tokens, side by side, and this vLLM's {tokens}; leave out --block-size and "
                    "VLLM_KV_CACHE_LAYOUT."
                )
            rows = kv_cache.as_strided((count, heads * tokens * nbytes), (kv_cache.stride(0), 1))
            pair, rope = self._of_layer(layer, dtype)
            pages = PagedLayer(pair, rope, rows, dtype)
            known = PagedAttention(pages, self.num_heads, self.scale, self.logits_soft_cap or None, self.sinks)
            self._known = known
        return known

    def _of_layer(self, layer: Any, dtype: torch.dtype) -> tuple[Pair, Rope | None]:
        """The layer's quantizers and the rotary embedding of its keys; found once the model is loaded. dtype: of queries."""
        if self._tables is None:
            index = extract_layer_index(layer.layer_name)
            pair = _own_tables(index, self.num_kv_heads, self.head_size)
            self._tables = pair, rope_of(pair[0], rotations())
            if index == 0:
                scheme = calibration().recipe.name
                kernel = LayerTables.of(*self._tables).kernel(dtype)
                logger.info("NarrowKV packs keys and values (%s), read in place by kernel %s.", scheme, kernel)
        return self._tables


_known: set[str] = set()


def require_model_once(config: Any, folder: str) -> None:
    """`require_model`, the first time in a process."""
    if folder not in _known:
        require_model(config, folder)
        _known.add(folder)


def rotations() -> list[tuple[Tensor, bool]]:
    """Cosines and sines of the rotary embeddings of this process, and whether pairs of channels are neighbors."""
    found = []
    for module in rotary_embedding._ROPE_DICT.values():
        table = getattr(module, "cos_sin_cache", None)
        if table is not None and getattr(module, "mrope_section", None) is None:
            found.append((table, not module.is_neox_style))
    return found
