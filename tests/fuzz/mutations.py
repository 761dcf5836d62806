"""Forgeries of a file's header and tensors, drawn at random; whoever writes them makes checksums right again."""

import copy
from random import Random
from typing import Any

import torch
from torch import Tensor

DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32),
    *(torch.float8_e4m3fn, torch.float16, torch.bfloat16, torch.float32, torch.float64),
]
PLAIN = [
    *(None, True, False, 0, 1, -1, 2, 3, 7, 63, 65, 1000, 2**31, 2**63, -(2**63) - 1, 10**30, 10**400, 0.5, -0.5, 1e308),
    *(float("nan"), float("inf"), "", "0", "-1", "int", "nuq", "channel", "float16", "\0", "\ud800", "9" * 30),
    *([], {}, [[]], {"": None}, [1, 2], [0, 0, 0], {"0": [1, 1]}),
]
SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32}  # torch adds nothing to the former

Tensors = dict[str, Tensor]


def mutate(header: dict[str, Any], tensors: Tensors, random: Random) -> tuple[dict[str, Any], Tensors]:
    """Copies with one to three forgeries, most of them among the tensors."""
    header, tensors = copy.deepcopy(header), dict(tensors)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        if tensors and random.random() < 0.75:
            _forge_tensor(tensors, random)
        else:
            _forge_plain(header, random)
    return header, tensors


def _forge_tensor(tensors: Tensors, random: Random) -> None:
    name = random.choice(sorted(tensors))
    kind = random.random()
    if kind < 0.5:
        tensors[name] = _other_numbers(tensors[name], random)
    elif kind < 0.65:
        tensors[name] = _other_order(tensors[name], random)
    elif kind < 0.8:
        tensors[name] = _other_shape(tensors[name], random)
    elif kind < 0.9:
        dtype = random.choice(DTYPES)
        tensors[name] = _as_bits(tensors[name], dtype) if random.random() < 0.5 else tensors[name].to(dtype)
    else:
        _other_names(tensors, name, random)


def _extremes(dtype: torch.dtype) -> list[float | int]:
    if dtype.is_floating_point:
        info = torch.finfo(dtype)
        return [0.0, -0.0, 1.0, -1.0, float("nan"), float("inf"), float("-inf"), info.max, info.min, info.tiny, info.max / 2]
    whole = torch.iinfo(dtype)
    return [0, 1, 63, 64, whole.max, whole.max - 1, whole.min, *([-1, -2] if whole.min < 0 else [])]


def _other_numbers(tensor: Tensor, random: Random) -> Tensor:
    if not tensor.numel():
        return tensor
    forged = tensor.clone(memory_format=torch.contiguous_format)
    flat = forged.view(-1).view(torch.uint8) if forged.dtype == torch.bool else forged.view(-1)
    extreme = torch.tensor(random.choice(_extremes(flat.dtype)), dtype=torch.float64 if flat.is_floating_point() else None)
    extreme, kind = extreme.to(flat.dtype), random.random()
    if kind < 0.3:
        flat.fill_(extreme)
    elif kind < 0.45 and not forged.dtype.is_floating_point:
        added = flat.view(SIGNED.get(flat.dtype, flat.dtype))
        added.add_(random.choice((1, 255)) if flat.dtype == torch.uint8 else random.choice((1, -1, 64)))
    elif kind < 0.6:
        flat.view(torch.uint8).copy_(torch.tensor(list(random.randbytes(flat.nbytes)), dtype=torch.uint8))
    else:
        for _ in range(random.choice((1, 1, 5))):
            flat[random.randrange(len(flat))] = extreme
    return forged


def _other_order(tensor: Tensor, random: Random) -> Tensor:
    """Entries swapped, reversed, moved on, or one of them repeated."""
    if not tensor.numel():
        return tensor
    flat = tensor.flatten().clone().view(_bits_of(tensor))
    at, other = random.randrange(len(flat)), random.randrange(len(flat))
    kind = random.randrange(5)
    if kind == 0:
        flat[[at, other]] = flat[[other, at]]
    elif kind == 1:
        flat = flat.flip(0)
    elif kind == 2:
        flat = flat.roll(random.choice((1, -1, 7)))
    elif kind == 3:
        flat[other] = flat[at]
    else:  # neighbors, as one that trusts their order will notice them
        at = min(at, len(flat) - 2)
        flat[[at, at + 1]] = flat[[at + 1, at]]
    return flat.view(tensor.dtype).view(tensor.shape)


def _bits_of(tensor: Tensor) -> torch.dtype:
    return {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize]


def _other_shape(tensor: Tensor, random: Random) -> Tensor:
    kind = random.randrange(8)
    if kind == 0:
        return tensor.flatten()
    if kind == 1:
        return tensor.unsqueeze(random.randrange(tensor.dim() + 1))
    if not tensor.dim():
        return tensor.new_zeros(random.choice(((0,), (1,), (2, 2))))
    dim = random.randrange(tensor.dim())
    if kind == 2:
        return tensor.transpose(dim, random.randrange(tensor.dim())).contiguous()
    if kind == 3:
        return tensor.narrow(dim, 0, min(1, tensor.shape[dim])).contiguous()
    if kind == 4:
        return tensor.narrow(dim, 0, max(tensor.shape[dim] - 1, 0)).contiguous()
    if kind == 5:
        return torch.cat(
            [tensor, tensor.narrow(dim, 0, random.choice((1, tensor.shape[dim])) if tensor.shape[dim] else 0)], dim
        )
    return (
        tensor.narrow(dim, 0, 0).contiguous() if kind == 6 else tensor.flatten()[0:1].reshape(()) if tensor.numel() else tensor
    )


def _as_bits(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    flat = tensor.contiguous().flatten().view(torch.uint8)
    return flat[: len(flat) // dtype.itemsize * dtype.itemsize].clone().view(dtype)


def _other_names(tensors: Tensors, name: str, random: Random) -> None:
    other = random.choice(sorted(tensors))
    kind = random.randrange(5)
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[name], tensors[other] = tensors[other], tensors[name]
    elif kind == 2:
        tensors[name] = tensors[other]
    elif kind == 3:
        tensors[random.choice((name + "x", name.replace("0", "1"), name.replace("keys", "values"), "layers.0.evicted"))] = (
            tensors[name]
        )
    else:
        tensors[name[:-1] or "x"] = tensors.pop(name)


def _forge_plain(header: dict[str, Any], random: Random) -> None:
    """Another value somewhere in plain data, or an entry more, or less."""
    at: Any = header
    while True:
        names = list(at) if isinstance(at, dict) else range(len(at))
        name = random.choice(names)
        if not isinstance(at[name], dict | list) or not at[name] or random.random() < 0.15:
            break
        at = at[name]
    kind = random.random()
    if kind < 0.7:
        at[name] = random.choice(PLAIN)
    elif kind < 0.8:
        del at[name]
    elif kind < 0.9 and isinstance(at[name], int | float):
        at[name] = at[name] + random.choice((1, -1, 2**20, -(2**20)))
    elif isinstance(at, dict):
        at[random.choice((*map(str, range(3)), "keys", "search_space", "sinks", "residual_length"))] = random.choice(
            (*PLAIN, at[name])
        )
    else:
        at.append(at[name])
