"""The compiled attention against the naive twin in float64: every form of block, odd shapes, adversarial numbers."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from narrowkv.attention import Rope, StoredRope, Visible, cpu, naive
from narrowkv.codec import Quantizer, Scheme, quantizer_for
from narrowkv.errors import UnsupportedModelError
from narrowkv.store import LayerStore

KEYS = {
    "nuq4-1%": Scheme(4, "nuq", axis="channel", pre_rope=True, outliers=0.01),
    "nuq3-1%": Scheme(3, "nuq", axis="channel", pre_rope=True, outliers=0.01),
    "nuq2": Scheme(2, "nuq", axis="channel", pre_rope=True),
    "int8": Scheme(8, "int", axis="channel"),
    "kivi-2": Scheme(2, "int", axis="channel", group=32),
    "kivi-4-g8": Scheme(4, "int", axis="channel", group=8, outliers=0.01),
    "token": Scheme(4, "int", pre_rope=True, outliers=0.02),
    "token_head groups": Scheme(3, "nf", axis="token_head", group=8),
    "fp4": Scheme(4, "fp", axis="token_head"),
    "hadamard": Scheme(4, "int", axis="token_head", hadamard=True),
    "exact": Scheme(16, "exact", pre_rope=True),
    "channel3-1%": Scheme(3, "nuq", axis="channel", codebook="channel", pre_rope=True, outliers=0.01),
    "channel2 turned": Scheme(2, "nuq", axis="channel", codebook="channel", turn=True),
    "pair1.5": Scheme(1.5, "nuq", axis="channel", codebook="pair", pre_rope=True),
    "pair2-1%": Scheme(2, "nuq", axis="channel", codebook="pair", pre_rope=True, outliers=0.01),
    "pair2.5 turned": Scheme(2.5, "nuq", axis="channel", codebook="pair", turn=True, outliers=0.01),
    "pair3": Scheme(3, "nuq", axis="channel", codebook="pair", pre_rope=True),
    "pair3.5": Scheme(3.5, "nuq", axis="channel", codebook="pair", pre_rope=True),
    "pair4": Scheme(4, "nuq", axis="channel", codebook="pair"),
}
VALUES = {name: replace(scheme, pre_rope=False) for name, scheme in KEYS.items()}
SHAPES = [
    # batch, query heads, kv heads, head_dim, tokens, new
    pytest.param((1, 1, 1, 80, 65, 1), id="one head, 65 tokens"),
    pytest.param((3, 6, 2, 8, 130, 1), id="batch 3, groups of 3, head_dim 8"),
    pytest.param((1, 4, 1, 128, 700, 5), id="one KV head, 700 tokens, five queries"),
]


class PreciseRope(Rope):
    """Angles in float64: rounded to float32 they are off by as much as positions are large."""

    def cos_sin(self, kept):
        angles = kept[..., None].double() * self.inverse_frequencies.double()
        return angles.cos() * self.scaling, angles.sin() * self.scaling


def made(scheme, heads, dim):
    """A quantizer of a scheme, with tables drawn at random where it needs any."""
    if scheme.codebook == "layer":
        if not scheme.needs_calibration:
            return Quantizer(scheme)
        scale = torch.rand(heads, dim) * 3 + 0.5
        zero = torch.randn(heads, dim)
        codebook = torch.linspace(-1, 1, 2**scheme.code_bits) ** 3 if scheme.datatype == "nuq" else None
        if not scheme.static:
            return Quantizer(scheme, codebook=codebook)
        return Quantizer(scheme, codebook=codebook, scale=scale, zero=zero, lower=zero - 2 * scale, upper=zero + 2 * scale)
    codes = dim // scheme.numbers
    return quantizer_for(
        scheme,
        points=torch.randn(heads, codes, 2**scheme.code_bits, scheme.numbers).half(),
        weight=torch.rand(heads, codes, scheme.numbers) + 0.1,
        limit=torch.ones(1) * 0.3 if scheme.outliers else None,
        turn=torch.linalg.qr(torch.randn(heads, dim, dim)).Q.half() if scheme.turn else None,
    )


def frequencies(pairs):
    return 1 / 10_000 ** (torch.arange(pairs) / pairs)


def case(keys, values, shape, *, sinks=1, window=0, rope="half", padded=None, dtype=torch.float32, numbers=torch.randn):
    """A store of random numbers and the arguments of attention over it: (query, store, options)."""
    batch, heads, kv_heads, dim, total, new = shape
    store = LayerStore(made(keys, kv_heads, dim), made(values, kv_heads, dim), sinks=sinks, window=window)
    k, v = (numbers(batch, kv_heads, total, dim).to(dtype) for _ in range(2))
    valid = None if padded is None else torch.arange(total) >= torch.tensor(padded)[:, None]
    store.append(k, v, valid)
    past = total - new
    positions = (torch.arange(total) if valid is None else valid.cumsum(1) - 1).clamp(min=0).expand(batch, -1)
    kinds = {
        "half": PreciseRope(frequencies(dim // 2)),
        "interleaved": PreciseRope(frequencies(dim // 2), 1.3, interleaved=True),
        "partial": PreciseRope(frequencies(dim // 4)),
        "stored": StoredRope("angles0", "once"),
    }
    turning = kinds[rope]
    kept = positions
    if rope == "stored":
        angles = torch.rand(batch, total, dim // 2)
        kept = turning.keep(None, (angles.cos(), angles.sin()))
    options = {
        "past": past,
        "new": (turning.rotate(k.double(), kept)[:, :, past:], v[:, :, past:]),
        "rope": turning if keys.pre_rope else None,
        "kept": kept[:, store.first : past] if keys.pre_rope else None,
        "visible": Visible(valid),
        "scaling": dim**-0.5,
    }
    return torch.randn(batch, heads, new, dim), store, options


def check(query, store, options, kernel=cpu.KERNELS[0], tolerance=1e-5):
    tolerance = 2e-3 if kernel == cpu.WORDS else tolerance
    found = cpu.attend(query, store, kernel=kernel, **options)
    expected = naive.attend(query.double(), store, **options)
    assert found.dtype == torch.float32 and found.isfinite().all()
    assert (found - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("kernel", cpu.KERNELS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("keys", KEYS)
def test_every_form_of_keys(keys, shape, kernel):
    check(*case(KEYS[keys], VALUES["token"], shape), kernel)


@pytest.mark.parametrize("kernel", cpu.KERNELS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("values", VALUES)
def test_every_form_of_values(values, shape, kernel):
    check(*case(KEYS["nuq4-1%"], VALUES[values], shape), kernel)


@pytest.mark.parametrize("kernel", cpu.KERNELS)
@pytest.mark.parametrize("rope", ["interleaved", "partial", "stored"])
def test_every_rotary_embedding(rope, kernel):
    check(*case(KEYS["pair2-1%"], VALUES["nuq2"], (2, 4, 2, 32, 200, 2), rope=rope), kernel)


@pytest.mark.parametrize("kernel", cpu.KERNELS)
@pytest.mark.parametrize("length", [64, 96, 256])
def test_every_length_of_a_row_of_codes(length, kernel):
    for name in ("nuq3-1%", "pair3", "kivi-2"):
        check(*case(KEYS[name], VALUES["token_head groups"], (1, 2, 1, length, 140, 1)), kernel)
        check(*case(KEYS["token"], VALUES[name], (1, 2, 1, length, 140, 1)), kernel)


@pytest.mark.parametrize("group", [1, 2, 5, 16])
def test_groups_of_query_heads(group):
    check(*case(KEYS["nuq4-1%"], VALUES["pair2.5 turned"], (2, 2 * group, 2, 16, 150, 3)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["exact", "nuq4-1%"])
def test_numbers_kept_in_16_bits(name, dtype):
    check(*case(KEYS[name], VALUES[name], (2, 4, 2, 80, 150, 1), dtype=dtype))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("rule", [None, lambda b, h, q, k: (k <= q) & (k // 48 == q // 48), lambda b, h, q, k: k <= q + b])
def test_whatever_hides_tokens(rule, window, softcap):
    query, store, options = case(KEYS["nuq4-1%"], VALUES["token"], (3, 6, 2, 24, 300, 7), sinks=3, padded=[0, 150, 290])
    options["visible"] = Visible(options["visible"].padding, window, rule, batch=3)
    options |= {"softcap": softcap, "sink_logits": torch.randn(6)}
    if window:
        first = store.first
        store.forget(options["past"] - window + 1)
        options["kept"] = options["kept"][:, store.first - first :]
    check(query, store, options)


def test_a_query_that_sees_nothing_yields_zeros():
    query, store, options = case(KEYS["nuq2"], VALUES["token"], (2, 2, 1, 16, 100, 1), padded=[0, 100])
    found = cpu.attend(query, store, **options)
    assert found[0].any() and not found[1].any()


@pytest.mark.parametrize("numbers", ["one huge", "all equal", "small and large"])
def test_adversarial_numbers(numbers):
    def draw(*shape):
        x = torch.randn(shape)
        if numbers == "all equal":
            return torch.ones(shape)
        if numbers == "one huge":
            x[:, :, shape[2] // 3] *= 300
            return x
        return x * 10.0 ** torch.linspace(-4, 3, shape[3])

    for keys in ("nuq4-1%", "token", "kivi-2"):
        check(*case(KEYS[keys], VALUES["token"], (1, 4, 2, 32, 300, 1), numbers=draw))


def test_a_cache_as_it_grows_is_cropped_selected_and_strict():
    keys, values = KEYS["nuq3-1%"], VALUES["kivi-2"]
    query, store, options = case(keys, values, (3, 4, 2, 16, 330, 1), sinks=2, window=40)
    check(query, store, options)
    check(query, store, options | {"past": 330, "new": None, "kept": torch.arange(330).expand(3, -1)})
    store.crop(201)
    options |= {"past": 201, "new": None, "kept": torch.arange(201).expand(3, -1)}
    check(query, store, options)
    store.select(torch.tensor([2, 0, 2]))
    check(query, store, options)
    store.append(torch.randn(3, 2, 100, 16), torch.randn(3, 2, 100, 16))
    check(query, store, options | {"past": 301, "kept": torch.arange(301).expand(3, -1)})


def test_the_result_does_not_depend_on_the_number_of_threads():
    query, store, options = case(KEYS["nuq4-1%"], VALUES["pair2-1%"], (1, 4, 1, 64, 900, 1))
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(cpu.attend(query, store, **options))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_what_it_does_not_do():
    query, store, options = case(replace(KEYS["hadamard"], pre_rope=True), VALUES["token"], (1, 1, 1, 16, 70, 1))
    with pytest.raises(UnsupportedModelError, match="Hadamard"):
        cpu.attend(query, store, **options)
    query, store, options = case(KEYS["nuq2"], VALUES["token"], (1, 1, 1, 16, 70, 1))
    assert cpu.attend(query.double(), store, **options).dtype == torch.float64
    with pytest.raises(ValueError, match="kernel"):
        cpu.attend(query, store, kernel="none", **options)


SCHEMES = st.sampled_from(sorted(KEYS))


@settings(max_examples=60, deadline=None)
@given(
    keys=SCHEMES,
    values=SCHEMES,
    shape=st.tuples(
        st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), st.sampled_from([8, 16, 40, 64]), st.integers(65, 260)
    ),
    new=st.integers(0, 1) | st.integers(2, 16),
    sinks=st.integers(0, 5),
    window=st.sampled_from([0, 33]),
    kernel=st.sampled_from(cpu.KERNELS),
    seed=st.integers(0, 2**31),
)
def test_any_recipe_and_shape(keys, values, shape, new, sinks, window, kernel, seed):
    torch.manual_seed(seed)
    batch, group, heads, dim, total = shape
    query, store, options = case(
        KEYS[keys], VALUES[values], (batch, group * heads, heads, dim, total, max(new, 1)), sinks=sinks, window=window
    )
    check(query, store, options, kernel)
