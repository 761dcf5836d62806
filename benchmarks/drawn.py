"""What the benchmarks of one layer share: a store of 8 KV heads of 128 channels with tables and elements drawn at random."""

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from narrowkv import get_recipe
from narrowkv.attention import AttentionInputs, AttentionMask, Rope
from narrowkv.calibration.trellis_fit import in_bytes
from narrowkv.codec import AnyQuantizer, QuantizedTensor, Quantizer, Scheme, TrellisQuantizer
from narrowkv.codec.frames import Frames
from narrowkv.codec.gaussian_tables import STEPS, gaussian_tables
from narrowkv.codec.quantizers.trellis import NORM_ZERO
from narrowkv.codec.saturation import Saturation
from narrowkv.store import LayerStore

QUERY_HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
RATES = {
    2: (2, 3, 6, 3, 2, 0, 0),
    3: (1, 1, 3, 4, 6, 1, 0),
    4: (0, 1, 1, 2, 7, 3, 2),
}  # units of 0, 1, ... bits


def rotary() -> Rope:
    """The rotary embedding of keys."""
    return Rope(1 / 10_000 ** (torch.arange(HEAD_DIM // 2) / (HEAD_DIM // 2)))


def random_quantizer(scheme: Scheme) -> AnyQuantizer:
    """A scheme with tables that fit normal elements about as learned ones would."""
    if scheme.datatype == "trellis":
        return random_streams(scheme.with_settings(counts=RATES[int(scheme.bits)]))
    tables: dict[str, Tensor] = {}
    if scheme.datatype == "nuq":
        tables["codebook"] = torch.linspace(-1, 1, 2**scheme.code_bits)
    if scheme.static:
        tables["zero"] = torch.zeros(KV_HEADS, HEAD_DIM)
        tables["upper"] = torch.full((KV_HEADS, HEAD_DIM), 2.576)  # 1% of normal elements lie beyond
        tables["scale"], tables["lower"] = tables["upper"], -tables["upper"]
    return Quantizer(scheme, **tables)


def random_streams(scheme: Scheme) -> TrellisQuantizer:
    """Trellis-coded streams of the rates of a scheme."""
    n, universal = scheme.outlier_positions(HEAD_DIM), gaussian_tables()
    tables = {
        "mean": torch.randn(KV_HEADS, HEAD_DIM).half(),
        "entries": torch.stack([universal.high, universal.low], dim=1)[None],
        "steps": torch.tensor(STEPS),
        "scales": torch.tensor(STEPS),
        "weight": torch.ones(KV_HEADS, n, dtype=torch.bfloat16),
    }
    if scheme.outliers.fraction:
        tables["outlier_threshold"] = torch.ones(1)
    if scheme.transform.learned_rotation:
        tables |= in_bytes(torch.linalg.qr(torch.randn(KV_HEADS, HEAD_DIM, HEAD_DIM).double()).Q[:, :n])
    else:
        tables["pairs"] = torch.eye(2).expand(KV_HEADS, HEAD_DIM // 2, -1, -1).half()
        tables["order"] = torch.stack([torch.randperm(HEAD_DIM)[:n] for _ in range(KV_HEADS)]).byte()
    if scheme.transform.pre_rope:
        tables |= vars(Frames.of(HEAD_DIM, rotary().inverse_frequencies))
    return TrellisQuantizer(scheme, **tables)


def draw_codes(scheme: Scheme, x: Tensor, skip: Tensor | None = None, saturation: Saturation | None = None) -> QuantizedTensor:
    """Streams and outliers at random, in place of those of least cost."""
    shape = (*x.shape[:3], scheme.codes(HEAD_DIM))
    encoded = QuantizedTensor(torch.randint(2**scheme.code_bits, shape, dtype=torch.uint8))
    if scheme.quantization.token_norm:
        encoded.codes[..., -1] = NORM_ZERO
    if scheme.outliers.fraction:
        encoded.outlier_positions = scheme.outlier_positions(HEAD_DIM)
        positions = x.shape[:3].numel() * encoded.outlier_positions
        encoded.outlier_index = torch.rand(positions).lt(scheme.outliers.fraction).nonzero()[:, 0]
        encoded.outlier_values = torch.randn(len(encoded.outlier_index)).half()
    return encoded


@contextlib.contextmanager
def draw_at_random(store: LayerStore) -> Iterator[None]:
    """Within, streams are not searched for: they are drawn."""
    searching = [quantizer for quantizer in store.quantizers if quantizer.scheme.datatype == "trellis"]
    for quantizer in searching:
        object.__setattr__(quantizer, "encode", functools.partial(draw_codes, quantizer.scheme))
    yield
    for quantizer in searching:
        object.__delattr__(quantizer, "encode")


def fill(name: str, tokens: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> LayerStore:
    """A store with random elements of a dtype."""
    recipe = get_recipe(name)
    store = LayerStore(random_quantizer(recipe.keys), random_quantizer(recipe.values), recipe.sinks, recipe.residual_length)
    with draw_at_random(store):
        for start in range(0, tokens, 4096):
            chunk = torch.randn(2, batch, KV_HEADS, min(4096, tokens - start), HEAD_DIM, dtype=dtype)
            store.append(chunk[0], chunk[1])
    return store


def attention_inputs(store: LayerStore, query: Tensor, new: tuple[Tensor, Tensor]) -> AttentionInputs:
    """Attention of a query to all stored tokens, and to new keys and values."""
    pre_rope = store.quantizers[0].scheme.transform.pre_rope
    positions = torch.arange(store.length, dtype=torch.int32, device=query.device)[None]
    return AttentionInputs(
        query=query,
        past=store.length,
        new=new,
        rope=rotary().to(query.device) if pre_rope else None,
        rope_state=positions if pre_rope else None,
        mask=AttentionMask(),
        scaling=HEAD_DIM**-0.5,
    )
