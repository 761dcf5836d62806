"""More than one process: sums over a group of torch.distributed, and this process's rank among those that share a model."""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = Any  # torch.distributed.ProcessGroup, which does not exist in builds without it


def join_processes(device: str) -> tuple[Group, int, int]:
    """The group of all processes that torchrun has started, this one's rank, and their number: None, 0, 1 without torchrun.

    device: `cpu` or `cuda`, on which the model lies.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return None, 0, 1
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    return dist.group.WORLD, dist.get_rank(), size


def reduced(x: Tensor, operation: str, group: Group) -> Tensor:
    """x after SUM, MIN or MAX over the processes of a group, the same in all of them."""
    on_device = x.cuda() if dist.get_backend(group) == "nccl" else x.clone()
    dist.all_reduce(on_device, getattr(dist.ReduceOp, operation), group=group)
    return on_device.to(x.device)


def collected(x: Tensor, group: Group) -> list[Tensor]:
    """x [n, ...] of every process of a group, in the order of their ranks; n may differ, the rest may not."""
    sizes = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device="cpu")
    sizes[dist.get_rank(group)] = len(x)
    sizes = reduced(sizes, "SUM", group)
    padded = x.new_zeros(int(sizes.max()), *x.shape[1:])
    padded[: len(x)] = x
    on_device = padded.cuda() if dist.get_backend(group) == "nccl" else padded
    parts = [torch.empty_like(on_device) for _ in sizes]
    dist.all_gather(parts, on_device, group=group)
    return [part[:size].to(x.device) for part, size in zip(parts, sizes.tolist(), strict=True)]


def gathered(parameter: Tensor) -> Tensor:
    """A whole weight, also if each process has a part of it."""
    split: Any = parameter
    whole: Tensor = split.full_tensor() if is_split(split) else parameter
    return whole


def is_split(parameter: Any) -> bool:
    """Whether a weight is spread over processes (tensor parallelism)."""
    return hasattr(parameter, "full_tensor")


def tensor_parallel_rank(model: torch.nn.Module) -> int:
    """Index of this process's part of the heads: 0 if the model is not split."""
    split: Any = next((parameter for parameter in model.parameters() if is_split(parameter)), None)
    if split is None:
        return 0
    mesh = split.device_mesh
    return int(mesh.get_local_rank("tp") if mesh.ndim > 1 else mesh.get_local_rank())
