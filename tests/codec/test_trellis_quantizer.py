"""Trellis-coded quantizers against the definition, written again in a few plain lines."""

import itertools
from dataclasses import replace

import pytest
import torch
from tests.stream_cases import decode

from narrowkv.calibration.trellis_fit import in_bytes
from narrowkv.codec import Outliers, Quantization, Scheme, Transform, TrellisQuantizer, load_quantizer, trellis
from narrowkv.codec.encode_buffer import EncodeBuffer
from narrowkv.codec.frames import Frames
from narrowkv.codec.gaussian_tables import STEPS, gaussian_tables
from narrowkv.codec.pairs import times
from narrowkv.codec.saturation import Saturation
from narrowkv.errors import RecipeError

COUNTS = {16: (0, 1, 0, 1, 0, 0, 0), 80: (2, 3, 2, 1, 1, 0, 1)}
SHAPES = [(1, 1, 63, 80), (3, 2, 64, 16), (2, 4, 1, 80)]


def scheme(dim, *, learned_rotation=False, outliers=0.0, **settings):
    codes = Quantization(3, "trellis", strategy="channel", counts=COUNTS[dim], token_norm=learned_rotation)
    return Scheme(codes, Transform(learned_rotation=learned_rotation), Outliers(outliers)).with_settings(**settings)


def tables(scheme, heads, dim, outlier_threshold=40.0):
    n = scheme.outlier_positions(dim)
    universal, steps = gaussian_tables(), torch.tensor(STEPS)
    matrix = torch.linalg.qr(torch.randn(heads, dim, dim)).Q[:, :n] * torch.linspace(0.2, 3, n)[:, None]
    made = {
        "mean": (torch.randn(heads, dim) * 5).half(),
        "entries": torch.stack([universal.high, universal.low], dim=1)[None],
        "steps": steps,
        "scales": 1.1 * steps,
        "weight": (torch.rand(heads, n) * 3000 + 500).bfloat16(),
    }
    if scheme.transform.learned_rotation:
        made |= in_bytes(matrix.double())
    else:
        made["pairs"] = (torch.randn(heads, dim // 2, 2, 2) + 2 * torch.eye(2)).half()
        made["order"] = torch.stack([torch.randperm(dim)[:n] for _ in range(heads)]).byte()
    if scheme.transform.pre_rope:
        made |= vars(Frames.of(dim, 10000.0 ** -(torch.arange(dim // 2 - 3) / dim * 2), interleaved=True))
    return made | ({"outlier_threshold": torch.tensor([outlier_threshold])} if scheme.outliers.fraction else {})


def made(shape, learned_rotation, outliers=0.0, **settings):
    _, heads, _, dim = shape
    of = scheme(dim, learned_rotation=learned_rotation, outliers=outliers, **settings)
    return TrellisQuantizer(of, **tables(of, heads, dim))


def head_rotation(found):
    return found.matrix_steps.float()[..., None] * found.matrix.float()


def drawn_elements(found, shape):
    """Elements whose coefficients are Gaussian, and those coefficients."""
    batch, heads, tokens, dim = shape
    z = torch.randn(batch, heads, tokens, found.scheme.outlier_positions(dim))
    if found.scheme.transform.learned_rotation:
        return z, z @ head_rotation(found) + found.mean[:, None]
    every = torch.randn(shape)
    for head in range(heads):
        every[:, head][..., found.order[head].long()] = z[:, head]
    first, second = every.chunk(2, -1)
    p = found.pairs.float()[None, :, None]  # [1, kv_heads, 1, dim / 2, 2, 2]
    x = torch.cat([first * p[..., 0, i] + second * p[..., 1, i] for i in (0, 1)], -1)
    return z, x + found.mean[:, None]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("learned_rotation", [False, True])
def test_codes_are_a_stream_and_a_norm_and_decode_as_defined(shape, learned_rotation):
    found = made(shape, learned_rotation)
    batch, heads, tokens, dim = shape
    rates = torch.tensor([rate for rate, count in enumerate(COUNTS[dim]) for _ in range(8 * count) if rate])
    z, x = drawn_elements(found, shape)
    encoded = found.encode(x)
    stream = encoded.codes[..., : sum(rates) // 8].flatten(0, 1)
    assert encoded.codes.shape == (batch, heads, tokens, sum(rates) // 8 + learned_rotation) and not encoded.ranges
    tables_of_it = trellis.TrellisTables(found.entries[0, :, 0], found.entries[0, :, 1])
    grid = decode(stream, COUNTS[dim], tables_of_it).float().unflatten(0, (batch, heads))
    norm = torch.ones(batch, heads, tokens, 1)
    if learned_rotation:
        norm = 2 ** ((encoded.codes[..., -1:].float() - 128) / 16)
        torch.testing.assert_close(norm, z.square().mean(-1, keepdim=True).sqrt(), rtol=0.023, atol=0)
    elements = (z / norm / found.steps[rates - 1] * 512).round().short().transpose(0, 1).flatten(1, 2)
    weights = (found.weight * found.steps[rates - 1] ** 2).round().clamp(1, 65535).int().to(torch.uint16)[:, None]
    expected = trellis.encode(elements, weights, COUNTS[dim], tables_of_it).unflatten(1, (batch, tokens)).transpose(0, 1)
    same = (expected == encoded.codes[..., : expected.shape[-1]]).all(-1).float().mean()
    assert same > 0.5  # coefficients computed in float32 here round otherwise now and then
    coefficients = grid * found.scales[rates - 1] * norm
    if learned_rotation:
        dequantized = coefficients @ head_rotation(found)
    else:
        dequantized = torch.zeros(shape)
        for head in range(heads):
            for i, channel in enumerate(found.order[head].tolist()):
                for half in (0, 1):
                    pair = found.pairs[head, channel % (dim // 2), channel // (dim // 2), half].float()
                    dequantized[:, head, :, channel % (dim // 2) + half * (dim // 2)] += coefficients[:, head, :, i] * pair
    torch.testing.assert_close(found.dequantize(encoded), dequantized + found.mean[:, None], atol=1e-4, rtol=1e-4)


def places_by_hand(cost, found, fraction):
    """Flat places of the outliers, token by token: the dearest first, as long as a block has a place for them."""
    batch, heads, tokens, n = cost.shape
    most, places = round(fraction * 64 * n), []
    for row, head in itertools.product(range(batch), range(heads)):
        used = 0
        for token in range(tokens):
            used = 0 if token % 64 == 0 else used
            wanted = [place for place in range(n) if cost[row, head, token, place] > found.outlier_threshold]
            wanted.sort(key=lambda place: -cost[row, head, token, place])
            places += [((row * heads + head) * tokens + token) * n + place for place in wanted[: most - used]]
            used += min(len(wanted), most - used)
    return torch.tensor(sorted(places))


@pytest.mark.parametrize("learned_rotation", [False, True])
def test_what_costs_more_than_the_limit_is_exact(learned_rotation):
    shape = (2, 2, 200, 16)
    plain, found = made(shape, learned_rotation), made(shape, learned_rotation, outliers=0.01)
    found = replace(found, **plain.tensors())
    z, x = drawn_elements(found, shape)
    cost = found.cost(x)
    found = replace(found, outlier_threshold=cost.flatten().kthvalue(int(0.98 * cost.numel())).values[None])
    encoded = found.encode(x)
    assert encoded.outlier_positions == 16 and torch.equal(encoded.outlier_index, places_by_hand(cost, found, 0.01))
    norm = 2 ** ((encoded.codes[..., -1:].float() - 128) / 16) if learned_rotation else torch.ones_like(z[..., :1])
    torch.testing.assert_close(
        encoded.outlier_values.float(), (z / norm).flatten()[encoded.outlier_index], atol=1e-2, rtol=1e-2
    )
    missed = ((found.dequantize(encoded) - x) ** 2).mean()
    assert missed < ((plain.dequantize(plain.encode(x)) - x) ** 2).mean()
    skip = torch.arange(200)[None] < torch.tensor([[50], [200]])
    skipped = found.encode(x, skip)
    token = torch.unravel_index(skipped.outlier_index, skipped.outlier_shape)
    assert len(token[0]) and not skip[token[0], token[2]].any()


def test_a_block_has_no_more_outliers_than_places():
    shape = (2, 2, 192, 80)
    found = replace(made(shape, learned_rotation=False, outliers=0.01), outlier_threshold=torch.tensor([1e5]))
    _, x = drawn_elements(found, shape)
    x[:, :, 64:] *= 100
    index = found.encode(x).outlier_index
    of_block = torch.bincount(index // (64 * found.scheme.outlier_positions(80)), minlength=12).view(2, 2, 3)
    assert (of_block[..., 1:] == round(0.01 * 64 * found.scheme.outlier_positions(80))).all()
    assert (of_block[..., 0] < of_block[..., 1]).all()


def test_a_tail_appended_in_chunks_equals_one_appended_at_once():
    shape = (2, 2, 60, 80)
    found = made(shape, learned_rotation=True, outliers=0.01)
    _, x = drawn_elements(found, shape)
    x[:, :, 10:40] *= 20
    whole = EncodeBuffer(found.scheme, 2, 2, 64, 80, like=x)
    whole.outliers = found.encode_into(whole, 0, x)
    pieces, first = EncodeBuffer(found.scheme, 2, 2, 64, 80, like=x), 0
    for count in (1, 12, 7, 40):
        pieces.outliers = found.encode_into(pieces, first, x[:, :, first : first + count])
        first += count
    one, other = (buffer.encoded().first(60) for buffer in (whole, pieces))
    assert len(one.outlier_index) and torch.equal(one.outlier_index, other.outlier_index)
    assert torch.equal(one.codes, other.codes) and torch.equal(one.outlier_values, other.outlier_values)


def test_keys_in_frames_equal_rotated_keys():
    shape = (3, 2, 63, 80)
    found = made(shape, learned_rotation=False, pre_rope=True)
    plain = TrellisQuantizer(scheme(80), **{name: getattr(found, name) for name in tables(scheme(80), 2, 80)})
    _, x = drawn_elements(plain, shape)
    mean = found.mean[:, None].double()
    rotated = found.frames.rotate(x.double() - mean, 0)
    assert torch.equal(found.encode(x).codes, plain.encode((rotated + mean).double()).codes)
    back = found.frames.back().float().repeat(4, 1, 1, 1)[:63]  # of each token
    dequantized = times(plain.dequantize(plain.encode(rotated + mean)) - found.mean[:, None], back)
    torch.testing.assert_close(
        found.dequantize(found.encode(x)), found.frames.in_order(dequantized) + found.mean[:, None], atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize(
    "settings",
    [{"learned_rotation": False}, {"learned_rotation": True}, {"learned_rotation": False, "pre_rope": True}],
    ids=str,
)
def test_tokens_one_by_one_have_the_codes_of_all_at_once(settings):
    shape = (2, 2, 40, 80)
    found = made(shape, outliers=0.01, **settings)
    _, x = drawn_elements(found, shape)
    heads_per_program, buffer = found.encode(x), EncodeBuffer(found.scheme, 2, 2, 64, 80, like=x)
    for i in range(40):
        buffer.outliers = found.encode_into(buffer, i, x[:, :, i : i + 1])
    assert torch.equal(buffer.codes[:, :, :40], heads_per_program.codes) and len(heads_per_program.outlier_index)
    for head in (0, 1):
        assert torch.equal(
            found.of_heads(head, 1).encode(x[:, head : head + 1]).codes, heads_per_program.codes[:, head : head + 1]
        )


def counts(quantizer, x, skip=None):
    saturation = Saturation()
    quantizer.encode(x, skip, saturation)
    return saturation


def test_elements_far_out_of_range_are_counted():
    found = made((1, 2, 10, 16), learned_rotation=False)
    z, x = drawn_elements(found, (1, 2, 10, 16))
    assert counts(found, x).out_of_range == 0 and counts(found, x).seen == z.numel()
    far = found.mean[:, None] + 100 * (x - found.mean[:, None])
    rates = torch.tensor([rate for rate, count in enumerate(COUNTS[16]) for _ in range(8 * count) if rate])
    expected = (100 * z).abs() > 3 * 63 * found.steps[rates - 1]
    assert expected.float().mean() > 0.5
    assert abs(counts(found, far).out_of_range - int(expected.sum())) <= 1  # one may lie at the border
    skip = torch.arange(10)[None] < 4
    assert abs(counts(found, far, skip).out_of_range - int(expected[:, :, 4:].sum())) <= 1
    with_outliers = replace(made((1, 2, 10, 16), learned_rotation=False, outliers=0.01), **found.tensors())
    assert vars(counts(with_outliers, far)) == vars(counts(found, far))


@pytest.mark.parametrize(
    ("name", "spoilt"),
    [
        ("entries", lambda table: table.fill_(40)),
        ("steps", torch.neg),
        ("scales", torch.zeros_like),
        ("weight", torch.neg),
        ("order", torch.zeros_like),
        ("order", lambda table: table + 16),
        ("channels", lambda table: table // 2),
        ("frequencies", lambda table: table / 0),
        ("mean", lambda table: table / 0),
        ("pairs", lambda table: table[:, 1:]),
    ],
)
def test_tables_that_no_calibration_finds_are_refused(name, spoilt):
    of = scheme(16, outliers=0.01, pre_rope=True)
    sound = tables(of, 2, 16)
    load_quantizer(of, dict(sound), 2, 16)
    with pytest.raises(RecipeError):
        load_quantizer(of, sound | {name: spoilt(sound[name].clone())}, 2, 16)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"counts": (1, 2)}, "7 integers"),
        ({"counts": (2, 0, 0, 0, 0, 0, 0)}, "one with codes at least"),
        ({"counts": (0, 1, 1, 0, 0, 0, -1)}, "7 integers"),
        ({"bits": 0}, "more than 0"),
        ({"strategy": "token"}, "strategy channel"),
        ({"learned_rotation": True, "pre_rope": True}, "cannot be rotated"),
        ({"datatype": "nuq", "bits": 3}, "datatype trellis"),
    ],
)
def test_schemes_that_contradict_themselves_are_refused(settings, message):
    plain = {"bits": 3, "datatype": "trellis", "strategy": "channel", "counts": (0, 1, 1, 0, 0, 0, 0)}
    with pytest.raises(RecipeError, match=message):
        Scheme.from_dict(plain | settings)


@pytest.mark.parametrize(("dim", "message"), [(20, "Units of 8 channels"), (24, "2 units do not make")])
def test_a_head_that_units_do_not_fill_is_refused(dim, message):
    with pytest.raises(RecipeError, match=message):
        scheme(16).require_head_dim(dim)
