"""Time on a GPU for `benchmarks.gpu`: CUDA graphs, replayed over inputs that together exceed the L2; on a CPU, plain calls."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

Step = Callable[[], Any]


def milliseconds(steps: Sequence[Step], device: torch.device, repeats: int = 20, graph: bool = True) -> float:
    """Median milliseconds of one step, of several that do the same on inputs of their own."""
    for step in steps:  # compiles what is to be compiled
        step()
    if device.type != "cuda":
        return statistics.median(_seconds(steps) for _ in range(max(repeats // 10, 1))) * 1e3 / len(steps)
    torch.cuda.synchronize()
    run = _captured(steps) if graph else lambda: [step() for step in steps]
    found = []
    for repeat in range(repeats + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        if repeat >= 3:
            found.append(begin.elapsed_time(end) / len(steps))
    return statistics.median(found)


def _captured(steps: Sequence[Step]) -> Step:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for step in steps:
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            for step in steps:
                step()
    finally:
        torch.cuda.set_stream(stream)  # which a capture that failed would not do
    return graph.replay


def _seconds(steps: Sequence[Step]) -> float:
    start = time.perf_counter()
    for step in steps:
        step()
    return time.perf_counter() - start


def bandwidth(device: torch.device, size: int = 2**31) -> float:
    """Gigabytes a second of a copy, bytes read and written."""
    size = size if device.type == "cuda" else 2**24
    first = torch.empty(size, dtype=torch.uint8, device=device)
    second = torch.empty_like(first)
    return 2 * size / milliseconds([lambda: second.copy_(first)], device) / 1e6


def copies(size: int, device: torch.device, free: float = 0.25) -> int:
    """How many inputs of this many bytes exceed the L2 twice, within a share of the memory that is free."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    room = int(torch.cuda.mem_get_info(device)[0] * free) // max(size, 1)
    return max(min(-(-2 * cache // max(size, 1)), room, 64), 1)
